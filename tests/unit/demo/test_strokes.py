"""Stroke classes: distinct labels, ascending key times, complete poses."""

from pathlib import Path

import numpy as np
import pytest
import yaml

from mmdistill.data.annotations.f3set import F3SET_FIELDS
from mmdistill.demo import strokes
from mmdistill.demo.strokes import FIELDS, POSE_SIZE, READY, SLICES, STROKES, Stroke

TABLE = yaml.safe_load(Path(strokes.__file__).with_suffix(".yaml").read_text())["strokes"]


def test_classes_have_distinct_fields_and_names() -> None:
    assert len({stroke.fields for stroke in STROKES}) == len(STROKES) >= 12
    assert len({stroke.name for stroke in STROKES}) == len(STROKES)
    assert F3SET_FIELDS[2:6] == ("type", "side", "technique", "direction")  # the order of `Stroke.fields`


@pytest.mark.parametrize("stroke", STROKES, ids=lambda stroke: stroke.name)
def test_key_poses_are_ascending_and_include_the_contact(stroke: Stroke) -> None:
    times, poses = stroke.times, stroke.poses
    (keys,) = [entry["keys"] for entry in TABLE if entry["name"] == stroke.name]
    assert (np.diff(times) > 0).all()
    assert 0.0 in times
    assert poses.shape == (len(times), POSE_SIZE)
    for name in set(FIELDS) - set(keys[0]):
        np.testing.assert_array_equal(poses[0, SLICES[name]], READY[SLICES[name]])
    assert set().union(*keys) <= {"time", *FIELDS}
