"""Classes that a network has learned from labels are rejected in its evaluation."""

import re
from pathlib import Path
from typing import Any

import pytest

from mmdistill.checkpoint import open_checkpoint, save_torch
from mmdistill.checkpoint.export import export_student
from mmdistill.checkpoint.references import labeled_sources
from mmdistill.cli import evaluate_features, extract_features
from mmdistill.config import ConfigError, DistillConfig, modality_specs, to_plain
from mmdistill.config.parsing import stored_config
from mmdistill.data.clips import Clip, ClipIndex, ClipSource
from mmdistill.distill.teachers import load_feature_files, load_teachers
from mmdistill.distill.trainer import distill
from mmdistill.evaluation.networks import load_networks
from mmdistill.evaluation.run import check_evaluation, evaluate_checkpoint
from mmdistill.fewshot.errors import FewshotError
from mmdistill.fewshot.novel_classes import check_novel_classes
from mmdistill.pretrain.trainer import pretrain
from tests.configs import distill_config, pretrain_config
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


SOURCE: dict[str, Any] = {
    "dataset": "base",
    "label_fields": None,
    "classes": ["near_deuce_stroke_fh_gs_W_-_in"],
    "statistics": {},
}
LEARNED = {key: SOURCE[key] for key in ("dataset", "label_fields", "classes")}
MESSAGE = r"was pretrained with labels of 1 class of the evaluation, of its source base: near_deuce_stroke_fh_gs_W"


@pytest.fixture(scope="module")
def joint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An RGB checkpoint that has learned one of the evaluated classes."""
    return write_teacher(tmp_path_factory.mktemp("joint") / "rgb", "rgb", 0, source=SOURCE)


def _evaluate(data: list[str], checkpoint: Path, tmp_path: Path) -> None:
    config = distill_config(*data, "train=False", "ckpt_path=x", "baselines=[]")
    with pytest.raises(FewshotError, match=MESSAGE):
        evaluate_checkpoint(config, str(checkpoint), tmp_path / "out")


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.usefixtures("single_process_env")
def test_features_keep_the_classes(
    data: list[str], joint: Path, suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """For `mmdistill evaluate-features`, and for a distillation with the file as a teacher."""
    file = tmp_path / f"f{suffix}"
    options = [o for o in data if not o.startswith(("trainer", "feature_cache"))]
    assert extract_features.main([str(joint), "--output", str(file), *options]) == 0
    assert evaluate_features.main([str(file), "--n-way", "3", "--q-sample", "3", "--episodes", "2"]) == 2
    assert re.search(MESSAGE, capsys.readouterr().err)
    given = ["trainer.teachers=[rgb,other]", f"trainer.ckpt_path={{rgb: {joint}, other: {{file: {file}}}}}"]
    plain = to_plain(distill_config(*data))
    plain["trainer"]["ckpt_path"] = None  # its default is a list, which no mapping replaces
    _, sources = load_feature_files(stored_config(plain, DistillConfig, given), None)
    assert sources["teacher_other"]["sources"] == [LEARNED]


@pytest.mark.parametrize("to", ["safetensors", "hf"])
def test_exports_keep_the_classes(data: list[str], joint: Path, to: str, tmp_path: Path) -> None:
    meta = {"statistics": {"rgb": {"mean": [0.5] * 3, "std": [0.5] * 3}}}
    source = write_teacher(tmp_path / "rgb", "rgb", 0, source=SOURCE, **meta)
    export = export_student(source, tmp_path / "export", to=to)
    assert labeled_sources(open_checkpoint(export).meta) == [LEARNED]
    again = export_student(export, tmp_path / "again", to="safetensors")
    _evaluate(data, again, tmp_path)


def test_initial_weights_of_a_pretraining_keep_the_classes(data: list[str], joint: Path, tmp_path: Path) -> None:
    """Also if the training is resumed; its validation has no few-shot score."""
    options = [o for o in data if o.startswith(("data_module", "num_workers", "batch_size", "trainer", "logger"))]
    sizes = [
        "model.dim=16",
        "model.depth=1",
        "model.heads=2",
        "model.head_dim=8",
        "model.mlp_ratio=2",
        "model.pos_embed=sincos",
    ]
    sizes += ["model.decoder_dim=16", "model.decoder_depth=1", "model.decoder_heads=1", "trainer.save_ckpt_freq=1"]
    more = [*options, *sizes, "modality=rgb", "accelerator=cpu", "trainer.image_every_n_epochs=0"]
    first = [f"init_from={joint}", "trainer.epochs=1", "trainer.check_val_every_n_epoch=1"]
    checkpoint = pretrain(pretrain_config(*more, *first), tmp_path / "run")
    assert f"no val_top1_action: the network {MESSAGE}" in (tmp_path / "run" / "run.log").read_text()
    _evaluate(data, checkpoint, tmp_path)
    resumed = pretrain(pretrain_config(*more, "trainer.epochs=2", "resume=auto"), tmp_path / "run")
    assert resumed != checkpoint
    assert labeled_sources(open_checkpoint(resumed).meta) == [LEARNED]


def test_an_initial_student_keeps_the_classes(data: list[str], joint: Path, tmp_path: Path) -> None:
    """The error comes before the training; without the evaluation, and with a validation, the checkpoint has them."""
    flow = write_teacher(tmp_path / "flow", "flow", 1)
    given = ["trainer.teachers=[flow]", f"trainer.ckpt_path=[{flow}]", f"student={joint}", "baselines=[]"]
    with pytest.raises(ConfigError, match=f"{joint} {MESSAGE}.*; or set test=False"):
        check_evaluation(distill_config(*data, *given))
    more = ["test=False", "trainer.epochs=1", "trainer.check_val_every_n_epoch=1"]
    checkpoint = distill(distill_config(*data, *given, *more), tmp_path / "run")
    assert f"no val_top1_action: the network {MESSAGE}" in (tmp_path / "run" / "run.log").read_text()
    _evaluate(data, checkpoint, tmp_path)


def test_a_validation_that_is_needed_rejects_classes_of_the_teachers(
    data: list[str], joint: Path, tmp_path: Path
) -> None:
    """`trainer.monitor` needs it."""
    more = ["test=False", "trainer.check_val_every_n_epoch=1", "trainer.monitor=val_top1_action"]
    given = ["trainer.teachers=[rgb]", f"trainer.ckpt_path=[{joint}]"]
    with pytest.raises(FewshotError, match=f"the network {MESSAGE}"):
        distill(distill_config(*data, *given, *more), tmp_path)


def test_the_report_states_that_labels_were_used(data: list[str], tmp_path: Path) -> None:
    """Once, for all networks with the same source."""
    classes = {**SOURCE, "classes": ["near_deuce_stroke_bh_gs_W_-_in", "x"]}
    checkpoint, other = (write_teacher(tmp_path / name, "rgb", 0, source=classes) for name in "ab")
    config = distill_config(*data, "train=False", "ckpt_path=x", f"baselines=[random,{other}]")
    evaluate_checkpoint(config, str(checkpoint), tmp_path / "out")
    line = "the training of pretrained_rgb, .* used labels of a source: 2 classes of base; no evaluated class has"
    assert len(re.findall(line, (tmp_path / "out" / "report.html").read_text())) == 1
