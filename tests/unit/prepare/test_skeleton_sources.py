"""Skeletons of prepared videos are computed or read again if their source has changed."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mmdistill.prepare.pipeline import Settings, prepare_video
from mmdistill.prepare.vitpose import POSE_MODEL, describe_model
from tests.tiny_pose import write_vitpose
from tests.unit.prepare.conftest import TwoPlayers
from tests.unit.prepare.test_pose import write_ready


@pytest.mark.usefixtures("tracked")
def test_files_of_another_model_are_replaced(
    pose_models: tuple[str, str], two_players: TwoPlayers, tmp_path: Path
) -> None:
    detector, pose = pose_models
    settings = Settings(height=48, flow="none", skeleton="vitpose", detector_model=detector, pose_model=pose)
    result = prepare_video("v", two_players.path, tmp_path / "out", settings)
    assert result.error is None
    assert result.record is not None
    part = result.record["parts"]["skeleton"]
    assert (part["pose_model"], part["detector_model"]) == (describe_model(pose), describe_model(detector))
    assert part["pose_model"].startswith("vitpose:")
    assert (tmp_path / "out/contact_sheets/v.jpg").exists()
    assert prepare_video("v", two_players.path, tmp_path / "out", settings).reused
    other = str(write_vitpose(tmp_path / "vitpose", seed=1))
    replaced = prepare_video("v", two_players.path, tmp_path / "out", replace(settings, pose_model=other))
    assert (replaced.error, replaced.reused) == (None, False)
    assert replaced.record is not None
    assert replaced.record["parts"]["skeleton"]["pose_model"] != part["pose_model"]
    assert describe_model(POSE_MODEL) == POSE_MODEL


def test_ready_skeletons_are_a_source_of_prepare(two_players: TwoPlayers, tmp_path: Path) -> None:
    ready, out = tmp_path / "ready", tmp_path / "out"
    ready.mkdir()
    settings = Settings(height=48, flow="none", skeleton=str(ready))
    missing = prepare_video("v", two_players.path, out, settings)
    assert f"{ready}/v.pkl: no such skeleton file" in str(missing.error)
    write_ready(ready / "v.pkl", two_players)
    result = prepare_video("v", two_players.path, out, settings)
    assert result.error is None
    assert result.record is not None
    assert result.record["parts"]["skeleton"]["method"] == "files"
    assert (out / "contact_sheets/v.jpg").exists()
    assert prepare_video("v", two_players.path, out, settings).reused
    write_ready(ready / "v.pkl", two_players, keypoint_score=np.full((2, 40, 17), 0.5))
    changed = prepare_video("v", two_players.path, out, settings)
    assert (changed.error, changed.reused) == (None, False)
    own = replace(settings, skeleton=str(out / "skeletons/f3set-tennis"))
    assert "--skeleton and --output are the same folder" in str(prepare_video("v", two_players.path, out, own).error)
    assert (out / "skeletons/f3set-tennis/v.pkl").exists()
