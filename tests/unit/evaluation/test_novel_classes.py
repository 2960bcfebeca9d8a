"""Classes that a network has learned from labels are rejected in its evaluation."""

from pathlib import Path
from typing import Any

import pytest

from mmdistill.checkpoint import open_checkpoint, save_torch
from mmdistill.config import ConfigError, modality_specs, to_plain
from mmdistill.data.clips import Clip, ClipIndex, ClipSource
from mmdistill.distill.teachers import load_teachers
from mmdistill.evaluation.networks import load_networks
from mmdistill.evaluation.novel_classes import check_novel_classes
from mmdistill.evaluation.run import check_evaluation, evaluate_checkpoint
from mmdistill.fewshot.errors import FewshotError
from tests.configs import distill_config
from tests.tiny_data import EVAL, make_tiny, overrides, write_teacher

LABELS = [f"near_deuce_stroke_{side}_gs_{direction}_-_in" for side in ("fh", "bh") for direction in ("CC", "DL")]


def _check(classes: list[str], *, fields: list[str] | None = None, labels: list[str] = LABELS, **names: str) -> None:
    """Evaluate one clip of each label, whose class is the whole label."""
    clips = tuple(Clip(label, "v", (0,), i, "v") for i, label in enumerate(labels))
    learned = [{"dataset": "a", "label_fields": fields, "classes": classes}]
    sources = [ClipSource("m", label) for label in labels]
    check_novel_classes("CKPT", learned, names.get("dataset", "a"), ClipIndex(clips, tuple(labels)), sources)


def test_common_classes_are_named() -> None:
    with pytest.raises(FewshotError, match=r"CKPT was pretrained with labels of 2 classes of the evaluation, of its "):
        _check([*LABELS[1:3], "other"])
    with pytest.raises(FewshotError, match=rf"source a: {LABELS[3]}\. Evaluate novel classes only: `mmdistill split-"):
        _check([LABELS[3]])
    _check(["near_deuce_stroke_fh_gs_T_-_in"])


def test_classes_of_other_label_fields_are_compared() -> None:
    """The clips with a backhand belong to the learned class bh, whatever their own classes are."""
    with pytest.raises(FewshotError, match=r"2 classes .*: near_deuce_stroke_bh_gs_CC_-_in, near_deuce_"):
        _check(["bh"], fields=["side"])
    _check(["bh"], fields=["side"], labels=LABELS[:2])
    _check(["bh"], fields=["side"], labels=["walk", "run"])  # labels without these fields


def test_numbers_of_classes_are_compared_within_a_dataset_only() -> None:
    _check(["3", "take (1)"], labels=["3", "put (1)"], dataset="b")
    for labels, dataset in ((["3", "put"], "a"), (["take (7)"], "b")):
        with pytest.raises(FewshotError, match="1 class "):
            _check(["3", "take (1)"], labels=labels, dataset=dataset)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = make_tiny(tmp_path_factory.mktemp("tiny") / "data")
    return [*overrides(root), *EVAL, "accelerator=cpu", "feature_cache=null"]


def test_sources_reach_the_distilled_checkpoint_and_its_evaluation(data: list[str], tmp_path: Path) -> None:
    """From the metadata of a teacher to those of the student; checked before the training and by the evaluation."""
    source: dict[str, Any] = {"dataset": "base", "label_fields": None, "statistics": {}}
    classes = ["near_deuce_stroke_fh_gs_W_-_in", "x"]
    teachers = [
        write_teacher(tmp_path / "rgb", "rgb", 0),
        write_teacher(tmp_path / "flow", "flow", 1, source={**source, "classes": classes}),
        write_teacher(tmp_path / "skeleton", "skeleton", 2, source={**source, "classes": []}),
    ]
    config = distill_config(*data, f"trainer.ckpt_path=[{','.join(map(str, teachers))}]")
    message = r"was pretrained with labels of 1 class of the evaluation, of its source base: near_deuce_stroke_fh_gs_W"
    with pytest.raises(ConfigError, match=rf"flow {message}.*; or set test=False"):
        check_evaluation(config)
    encoders, sources = load_teachers(config, modality_specs(config.data_module), None)
    learned = {"dataset": "base", "label_fields": None, "classes": classes}
    assert {name: entry.get("sources") for name, entry in sources.items()} == {
        "teacher_rgb": None,
        "teacher_flow": [learned],
        "teacher_skeleton": None,
    }
    student = encoders["rgb"]
    state = {f"student_rgb.encoder.{name}": x for name, x in student.state_dict().items()}
    meta = {"kind": "distill", "encoders": {"student_rgb": to_plain(student.config)}, "teachers": sources}
    save_torch({"state_dict": state, "mmdistill": meta}, tmp_path / "student.ckpt")
    test = distill_config(*data, "train=False", "ckpt_path=x", "baselines=[]")
    assert load_networks(test, open_checkpoint(tmp_path / "student.ckpt"))[0][0].learned == (learned,)
    with pytest.raises(FewshotError, match=rf"student_rgb {message}"):
        evaluate_checkpoint(test, str(tmp_path / "student.ckpt"), tmp_path / "out")
