"""Motion masks and pooling from the distillation to the evaluation, in this process."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmdistill import load_student
from mmdistill.checkpoint import CheckpointError
from mmdistill.checkpoint.export import export_student
from mmdistill.config import ConfigError, DistillConfig
from mmdistill.data.readers.rgb import RgbReader
from mmdistill.distill import trainer as run
from mmdistill.evaluation.report import write
from mmdistill.evaluation.run import evaluate_checkpoint
from mmdistill.fewshot.features import load_features
from tests.configs import distill_config
from tests.tiny_data import EVAL, make_tiny, overrides, write_teacher

MOTION = ["data_module.mask_type=motion", "data_module.mask_temperature=0.5", "pooling=motion"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny data, three teachers, and a student that was distilled with motion masks and pooling for an epoch."""
    root = tmp_path_factory.mktemp("focus")
    make_tiny(root / "data", per_class=4)
    for seed, name in enumerate(("rgb", "flow", "skeleton")):
        write_teacher(root / name, name, seed)
    validation = ["trainer.check_val_every_n_epoch=1", "trainer.val_episodes=2"]
    run.distill(_config(root, *MOTION, *validation, "trainer.cache_teacher_epochs=1", "trainer.epochs=2"), root / "run")
    return root


def _config(folder: Path, *more: str) -> DistillConfig:
    teachers = ",".join(str(folder / name) for name in ("rgb", "flow", "skeleton"))
    fixed = [f"trainer.ckpt_path=[{teachers}]", "accelerator=cpu", "trainer.save_ckpt_freq=1", "classifier=centroid"]
    stride = "data_module.modalities.skeleton.input_stride=2"
    return distill_config(*overrides(folder / "data"), *EVAL, "data_module.q_sample=2", *fixed, stride, *more)


def _evaluate(folder: Path, out: Path, *more: str) -> dict[str, Any]:
    test = ["train=False", "ckpt_path=x", f"feature_cache={out / 'cache'}", *more]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(write, "render_page", lambda *_, **__: "")
        return evaluate_checkpoint(_config(folder, *test), str(folder / "run/checkpoints/last.ckpt"), out)


def test_the_evaluation_uses_the_pooling_of_the_training(folder: Path, tmp_path: Path) -> None:
    """Of frames only; the features equal those of `load_student`, also with motion masks in the evaluation."""
    out = _evaluate(folder, tmp_path, "data_module.mask_type=motion", "baselines=[random,teacher_flow]")
    mode = "whole clips, pooling motion"
    masked = "student_rgb (2 motion masks, 75% removed, per clip, pooling motion)"
    assert list(out["settings"][0]["rows"]) == ["student_rgb", masked, "random", "teacher_flow"]
    assert {row["input_mode"] for name, row in out["settings"][0]["rows"].items() if name != masked} == {mode}
    assert all(row["seconds"] > 0 for row in out["settings"][0]["rows"].values())
    features = load_features(out["files"][0])
    student = load_student(folder / "run/checkpoints/last.ckpt")
    reader = RgbReader(folder / "data/frames", frame_size=(32, 36))
    for row in (0, 7):
        video = features.groups[row]
        frames = reader.read(video, range(4, 8))  # the event at frame 6 is in the center of the clip
        np.testing.assert_allclose(student(frames), features.features[row, 0], atol=1e-5)
    mean = _evaluate(folder, tmp_path / "mean", "pooling=mean", "data_module.input_modes=configured")
    assert mean["input_mode"] == "whole clips"
    assert not np.allclose(load_features(mean["files"][0]).features, features.features, atol=1e-3)


def test_person_pooling_is_the_mean_in_an_evaluation(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = _evaluate(folder, tmp_path, "pooling=person", "data_module.input_modes=configured")
    assert out["input_mode"] == "whole clips"
    assert "pooling=person applies to the training; the evaluation, which reads no skeletons" in capsys.readouterr().out


def test_a_concatenated_feature_is_wider(folder: Path, tmp_path: Path) -> None:
    out = _evaluate(folder, tmp_path, "pooling=halves", "data_module.input_modes=configured", "baselines=[]")
    assert load_features(out["files"][0]).features.shape[2] == 2 * 16
    for pooling, message in (
        ("segments", "pooling=segments: student_rgb: needs at least 3 tokens along time, and the clips have 2"),
        ("last_k", "needs 4 blocks, and the encoder has 1; set pooling_last_k to 1 or less"),
    ):
        with pytest.raises(ConfigError, match=message):
            _evaluate(folder, tmp_path, f"pooling={pooling}")


@pytest.mark.parametrize("pooling", ["mean", "halves"])
def test_another_pooling_is_rejected_on_resume(folder: Path, pooling: str) -> None:
    """Also one whose features, and therefore the transfer head, have another width."""
    checkpoint = folder / "run/checkpoints/last.ckpt"
    config = _config(folder, "trainer.epochs=3", f"resume={checkpoint}", f"pooling={pooling}")
    with pytest.raises(ConfigError, match=f"other settings.*: pooling motion / {pooling}; use the same settings"):
        run.distill(config, folder / "other")


def test_exports_keep_the_pooling_or_are_rejected(folder: Path, tmp_path: Path) -> None:
    checkpoint = folder / "run/checkpoints/last.ckpt"
    exported = export_student(checkpoint, tmp_path / "student.safetensors", to="safetensors")
    frames = np.random.default_rng(0).integers(0, 256, (4, 32, 36, 3), dtype=np.uint8)
    assert load_student(exported)(frames).tolist() == load_student(checkpoint)(frames).tolist()
    with pytest.raises(CheckpointError, match="pooling=motion, and VideoMAEModel has the mean only; use --to safeten"):
        export_student(checkpoint, tmp_path / "hf", to="hf")
    with pytest.raises(CheckpointError, match="pooling=motion, and an exported program has no input for the weights"):
        export_student(checkpoint, tmp_path / "student.pt2", to="torch_export")


def test_attentive_probe_appears_with_its_time(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each network has one probe, on whole clips; the file with the tokens is removed."""
    monkeypatch.setattr("mmdistill.fewshot.attentive_probe.EPOCHS", 2)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    out = _evaluate(folder, tmp_path, "probe=attentive", "baselines=[random]")
    student, masked, *_, random = out["probes"]
    assert 0 <= student["attentive_top1"] <= 1
    assert min(student["attentive_train_seconds"], random["attentive_encode_seconds"]) > 0
    assert "attentive_top1" not in masked
    assert "attentive" in capsys.readouterr().out
    assert not list(tmp_path.rglob("tokens.npy"))


def test_each_pooling_trains(folder: Path, tmp_path: Path) -> None:
    """One epoch of the poolings that need nothing, and of the one that needs skeletons."""
    for pooling in ("person", "halves"):
        more = [f"pooling={pooling}", "trainer.epochs=1", "test=False"]
        checkpoint = run.distill(_config(folder, *more), tmp_path / pooling)
        assert load_student(checkpoint).width == 16 * (2 if pooling == "halves" else 1)
