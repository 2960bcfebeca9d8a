"""Files of features as teachers: both layouts, invalid files, and a training with a student of another size."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mmdistill.builders import make_clip_index
from mmdistill.checkpoint import CheckpointError, load_torch, load_weights, open_checkpoint
from mmdistill.checkpoint.convert import convert_checkpoint
from mmdistill.checkpoint.export import export_student
from mmdistill.checkpoint.inspect import inspect_checkpoint
from mmdistill.config import ConfigError, DistillConfig, feature_files, stored_config, to_plain
from mmdistill.distill import distill
from mmdistill.distill.feature_file import FeatureFileError, read_feature_file
from mmdistill.distill.teachers import check_paths, load_initial_student
from mmdistill.evaluation.run import evaluate_checkpoint
from mmdistill.fewshot.features import Features, save_features
from mmdistill.modalities import get_modality
from tests.configs import distill_config
from tests.tiny_data import EVAL, make_tiny, overrides, write_teacher

ROWS = torch.arange(12.0).reshape(3, 4)
IDS = ["a:000000", "a:000003", "b#0@6"]


def _configure(*changes: str) -> DistillConfig:
    """As `distill_config`, but `trainer.ckpt_path` may become a mapping."""
    plain = to_plain(distill_config())
    return stored_config({**plain, "trainer": {**plain["trainer"], "ckpt_path": None}}, DistillConfig, changes)


def test_both_layouts_give_the_same_features(tmp_path: Path) -> None:
    save_file(dict(zip(IDS, ROWS.unbind(), strict=True)), tmp_path / "one.safetensors")
    save_file({"features": ROWS.half()}, tmp_path / "two.safetensors", {"ids": json.dumps(IDS)})
    labels = np.zeros(3, np.int64)
    features = Features(ROWS[:, None].numpy(), labels, tuple(IDS), ("a", "a", "b"), ("x",))
    for suffix in ("safetensors", "npz"):
        save_features(features, tmp_path / f"own.{suffix}")  # as `mmdistill features` does
    np.savez(tmp_path / "plain.npz", features=ROWS.numpy(), ids=np.array(IDS))  # no labels: a teacher needs none
    for name in ("one.safetensors", "two.safetensors", "own.safetensors", "own.npz", "plain.npz"):
        file = read_feature_file(tmp_path / name)
        assert torch.equal(file.select([IDS[2], IDS[0]]), ROWS[[2, 0]])
        assert (file.width, file.rows.dtype) == (4, torch.float32)
        assert file.sha256 == hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()


def test_missing_clips_are_counted_and_the_first_three_are_named(tmp_path: Path) -> None:
    save_file(dict(zip(IDS, ROWS.unbind(), strict=True)), tmp_path / "f.safetensors")
    file = read_feature_file(tmp_path / "f.safetensors")
    with pytest.raises(FeatureFileError, match=r"4 of 5 clips: c, d, e and 1 more; the first id .* is a:000000; "):
        file.select(["c", "a:000003", "d", "e", "f"])


@pytest.mark.parametrize(
    ("tensors", "ids", "message"),
    [
        ({"a": ROWS[0], "b": ROWS[0, :3]}, None, r"2 tensors of the shapes \[3\] \(b\), \[4\] \(a\)"),
        ({"a": ROWS}, None, r"1 tensor of the shapes \[3, 4\] \(a\)"),
        ({"features": ROWS}, IDS[:2], r"shape \[3, 4\] for 2 ids"),
        ({"features": torch.zeros(3, 2, 4)}, IDS, r"shape \[3, 2, 4\]"),
        ({"features": ROWS}, ["a", "b", "a"], "1 of the ids are repeated"),
        ({"features": ROWS.where(ROWS != 5, torch.nan)}, IDS, "features of 1 clip are not finite: a:000003"),
    ],
)
def test_invalid_files_raise(
    tmp_path: Path, tensors: dict[str, torch.Tensor], ids: list[str] | None, message: str
) -> None:
    path = tmp_path / "f.safetensors"
    save_file({k: v.clone() for k, v in tensors.items()}, path, {"ids": json.dumps(ids)} if ids else None)
    with pytest.raises(FeatureFileError, match=message) as error:
        read_feature_file(path)
    assert str(path) in str(error.value)


def test_two_files_of_features_are_merged_as_documented(tmp_path: Path) -> None:
    """The lines of docs/runs.md, for the R² of a file."""
    for name, rows in (("train", slice(0, 2)), ("held_out", slice(2, 3))):
        ids = tuple(IDS[rows])
        part = Features(ROWS[rows, None].numpy(), np.zeros(len(ids), np.int64), ids, ids, ("a",))
        save_features(part, tmp_path / f"{name}.npz")
    parts = [np.load(tmp_path / name) for name in ("train.npz", "held_out.npz")]
    merged = {key: np.concatenate([part[key] for part in parts]) for key in ("features", "ids")}
    np.savez(tmp_path / "teacher.npz", **merged)
    assert torch.equal(read_feature_file(tmp_path / "teacher.npz").select(IDS), ROWS)


def test_npz_without_ids_raises(tmp_path: Path) -> None:
    np.savez(tmp_path / "f.npz", features=ROWS.numpy(), labels=np.zeros(3, np.int64))
    with pytest.raises(FeatureFileError, match="it has no array ids; it has features, labels"):
        read_feature_file(tmp_path / "f.npz")


def test_missing_file_is_reported_with_its_key() -> None:
    with pytest.raises(CheckpointError, match=r"^trainer\.ckpt_path\.d\.file: "):
        check_paths(_configure("student=tiny", "trainer.teachers=[d]", "trainer.ckpt_path={d: {file: /nowhere/x.npz}}"))


def test_file_of_another_format_raises(tmp_path: Path) -> None:
    (tmp_path / "f.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(FeatureFileError, match=r"not a readable \.safetensors file"):
        read_feature_file(tmp_path / "f.safetensors")
    with pytest.raises(FeatureFileError, match="there is no such file"):
        read_feature_file(tmp_path / "absent.safetensors")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ("trainer.teachers=[flow] trainer.ckpt_path={flow: {file: x}}", "flow is a modality; choose another name"),
        (
            "trainer.teachers=[d] trainer.ckpt_path={d: {path: x}}",
            r"path of a checkpoint, or \{file: PATH\}",
        ),
        ("trainer.teachers=[rgb] trainer.ckpt_path={rgb: y, d: {file: x}}", r"add d to trainer\.teachers"),
        ("trainer.teachers=[d.e] trainer.ckpt_path={d.e: {file: x}}", "use letters, digits and _"),
        ("trainer.teachers=[d,d] trainer.ckpt_path={d: {file: x}}", "each of them once"),
        ("trainer.teachers=[d] trainer.ckpt_path={e: {file: x}}", r"add e to trainer\.teachers"),
        (
            "trainer.teachers=[d] trainer.ckpt_path={d: x.npz}",
            r"teachers=d is not one of rgb, flow, skeleton; for a file of features write "
            r"trainer\.ckpt_path=\{d:\{file:x\.npz\}\}",
        ),
    ],
)
def test_invalid_settings_raise(changes: str, message: str) -> None:
    parts = changes.replace(" trainer", "|trainer").split("|")
    with pytest.raises(ConfigError, match=message):
        _configure("student=tiny", *parts)


def test_rgb_teacher_may_be_absent_only_with_a_student() -> None:
    given = ["trainer.teachers=[d]", "trainer.ckpt_path={d: {file: x}}"]
    assert feature_files(_configure("student=tiny", *given).trainer) == {"d": "x"}
    with pytest.raises(ConfigError, match="or set student"):
        _configure(*given)


def test_unknown_student_raises() -> None:
    with pytest.raises(ConfigError, match=r"student=smull is neither one of base, .* nor a checkpoint.*mean small\?"):
        check_paths(distill_config("student=smull"))


def _config(root: Path, *more: str) -> DistillConfig:
    given = ["trainer.teachers=[flow,dinov3]", "student=tiny", "baselines=[random,teacher_flow]", "accelerator=cpu"]
    teachers = f"trainer.ckpt_path={{flow: {root / 'flow'}, dinov3: {{file: {root / 'dinov3.safetensors'}}}}}"
    return _configure(*overrides(root / "data"), *EVAL, *given, teachers, "feature_cache=null", *more)


def _write_features(config: DistillConfig, path: Path, seed: int = 0) -> None:
    rows = np.random.default_rng(seed)
    ids = [clip.id for clip in make_clip_index(config.data_module, training=True).clips]
    features = torch.tensor(rows.normal(size=(len(ids), 24)), dtype=torch.float32)
    save_file({"features": features}, path, {"ids": json.dumps(ids)})


def test_file_teacher_trains_a_student_of_another_size(tmp_path: Path) -> None:
    make_tiny(tmp_path / "data", per_class=4)
    write_teacher(tmp_path / "flow", "flow", 1)
    config = _config(tmp_path, "trainer.standardize_targets=true", "trainer.cache_teacher_epochs=1")
    file = tmp_path / "dinov3.safetensors"
    save_file({"a": ROWS[0].clone()}, file)
    with pytest.raises(FeatureFileError, match=r"^trainer\.ckpt_path\.dinov3\.file: .* first id of the file is a; "):
        distill(config, tmp_path / "run")
    _write_features(config, file)
    last = distill(config, tmp_path / "run")
    log = (tmp_path / "run" / "run.log").read_text()
    assert f"teacher dinov3: features of width 24 of 48 clips from {file}" in log
    assert "R2 of dinov3 is unknown: 16 of 16 held-out clips have no feature in" in log
    content = load_torch(last)
    meta, state = content["mmdistill"], content["state_dict"]
    source = {"path": str(file), "sha256": hashlib.sha256(file.read_bytes()).hexdigest(), "kind": "file"}
    assert meta["teachers"]["teacher_dinov3"] == source
    assert state["cmt.mlp_to_dinov3.2.weight"].shape == (24, 128)
    assert not any(name.startswith("teacher_rgb") for name in state)
    assert meta["encoders"]["student_rgb"]["dim"] == 128  # model=tiny; the flow teacher has width 16
    assert set(meta["ledger"]["teachers"]) == {"flow", "dinov3"}
    assert meta["ledger"]["teachers"]["dinov3"]["gradient_share"] > 0

    converted = convert_checkpoint(last, tmp_path / "converted.safetensors")
    statistics = {name: v for name, v in state.items() if name.startswith("target_statistics.")}
    assert len(statistics) == 6  # count, mean and scatter of two teachers
    assert all(torch.equal(open_checkpoint(converted).state_dict[name], v) for name, v in statistics.items())
    report = load_weights(open_checkpoint(last).encoder(), last)
    assert report.ignored_keys["target_statistics"] == 6
    assert any("a file of features" in line for line in inspect_checkpoint(last)["missing"])
    found = evaluate_checkpoint(config, str(last), tmp_path / "test")
    assert set(found["ledger"]["teachers"]) == {"flow", "dinov3"}
    export_student(last, tmp_path / "student.safetensors", to="safetensors")
    assert open_checkpoint(tmp_path / "student.safetensors").encoder().config.dim == 128

    more = _config(tmp_path, "trainer.standardize_targets=true", "trainer.epochs=3", f"resume={last}")
    _write_features(config, file, seed=1)
    with pytest.raises(CheckpointError, match=r"trainer\.ckpt_path\.dinov3\.file: .* its sha256 is .* was distilled"):
        distill(more, tmp_path / "other")
    _write_features(config, file)
    resumed = distill(more, tmp_path / "other")
    assert load_torch(resumed)["epoch"] == 2


def test_student_of_a_checkpoint_and_of_a_preset(tmp_path: Path) -> None:
    spec = get_modality("rgb").spec()
    write_teacher(tmp_path / "rgb", "rgb", 3)
    given = overrides(Path("nowhere"))
    teacher = open_checkpoint(tmp_path / "rgb").encoder()
    from_file = load_initial_student(distill_config(*given, f"student={tmp_path / 'rgb'}"), spec, None, None)
    assert from_file is not None
    assert all(torch.equal(v, teacher.state_dict()[k]) for k, v in from_file.state_dict().items())
    presets = [load_initial_student(distill_config(*given, "student=tiny"), spec, None, teacher) for _ in range(2)]
    first, second = (preset.state_dict() for preset in presets if preset is not None)
    assert all(torch.equal(first[name], second[name]) for name in first)  # seeded
    assert load_initial_student(distill_config(*given), spec, None, teacher) is None
    write_teacher(tmp_path / "flow", "flow", 3)
    with pytest.raises(ConfigError, match=r"student: .* is a flow checkpoint, but is listed as the rgb student"):
        load_initial_student(distill_config(*given, f"student={tmp_path / 'flow'}"), spec, None, None)
