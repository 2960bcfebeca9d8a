"""The first setting of an evaluation is repeated exactly; files that do not fit are one error."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mmdistill.builders import make_clip_dataset
from mmdistill.evaluation.repeated_evaluation import match_clips, repeat_evaluation
from mmdistill.fewshot.errors import FewshotError
from mmdistill.fewshot.features import load_features
from tests.browse_data import browse_config, write_evaluation
from tests.tiny_data import make_tiny


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("repeated") / "data")


@pytest.fixture(scope="module")
def path(data: Path) -> Path:
    return write_evaluation(browse_config(data), data.parent)


def test_the_accuracy_is_that_of_the_file(path: Path) -> None:
    repeated = repeat_evaluation(path)
    assert repeated.scores.accuracy.mean() == pytest.approx(json.loads(path.read_text())["top1_action_ensemble"])
    assert len(repeated.scores.episodes) == 20


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"files": [None]}, "names no file with the features"),
        ({"files": ["absent.safetensors"]}, "its features absent.safetensors do not exist"),
        ({"top1_action_ensemble": 0.99}, "the accuracy is 99.00 %, but its features"),
        ({"n_way": ...}, "has no n_way"),
    ],
)
def test_other_files_are_rejected(path: Path, tmp_path: Path, change: dict[str, object], message: str) -> None:
    content = {k: v for k, v in {**json.loads(path.read_text()), **change}.items() if v is not ...}
    (tmp_path / "fewshot.json").write_text(json.dumps(content))
    with pytest.raises(FewshotError, match=message):
        repeat_evaluation(tmp_path / "fewshot.json")


def test_a_file_that_is_not_json_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("<html>")
    with pytest.raises(FewshotError, match="not JSON"):
        repeat_evaluation(tmp_path / "report.html")


def test_clips_are_matched_by_their_id_and_class(path: Path, data: Path) -> None:
    dataset = make_clip_dataset(browse_config(data).data_module, ("rgb",), training=False, seed=0)
    classes = [dataset.index.classes[clip.label] for clip in dataset.index.clips]
    features = load_features(path.with_name("features.safetensors"))
    order = np.arange(len(classes))[::-1]
    reverse = replace(
        features,
        features=features.features[order],
        labels=features.labels[order],
        ids=features.ids[::-1],
        groups=features.groups[::-1],
    )
    assert match_clips(reverse, dataset, classes) == order.tolist()
    with pytest.raises(FewshotError, match=r"set data_module\.label_fields"):
        match_clips(features, dataset, ["other"] * len(classes))
    with pytest.raises(FewshotError, match="24 clips of the evaluation are not in the dataset, for example x"):
        match_clips(replace(features, ids=tuple(f"x{i}" for i in range(24))), dataset, classes)
