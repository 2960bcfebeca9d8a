"""Slim checkpoints: the teachers they name are read again, and only if they are still the same."""

import shutil
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

from mmdistill import config as schema
from mmdistill.checkpoint import CheckpointError, load_encoder, read_checkpoint, save_torch
from mmdistill.config import ConfigError, DistillConfig, modality_specs, parse
from mmdistill.evaluate import _networks
from mmdistill.fewshot.embed import weights_digest
from mmdistill.overrides import quote_overrides
from mmdistill.teachers import check_teachers, load_teachers
from tests.test_resume import ROOT, teacher
from tests.tiny_data import overrides

MODALITIES = ("rgb", "flow", "skeleton")


def configure(*more: str) -> DistillConfig:
    schema.register_schemas()
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "configs")):
        values = quote_overrides([*overrides(Path("nowhere")), *more])
        return parse(compose("config_mmdistill", overrides=values), DistillConfig)


@pytest.fixture
def slim(tmp_path: Path) -> Path:
    """A slim file beside the three teachers that it names."""
    state, encoders, named = {}, {}, {}
    for i, modality in enumerate(MODALITIES):
        path = teacher(tmp_path / modality, modality, i)
        checkpoint = read_checkpoint(path)
        encoders[f"teacher_{modality}"] = checkpoint.meta["encoders"]["encoder"]
        named[f"teacher_{modality}"] = {"path": str(path), "sha256": weights_digest(load_encoder(checkpoint))}
        if modality == "rgb":
            encoders["student_rgb"] = encoders["teacher_rgb"]
            state = {f"student_rgb.{k}": v + 1.0 for k, v in checkpoint.state_dict.items()}
    meta = {"kind": "distill", "encoders": encoders, "teachers": named, "epoch": 0, "step": 3}
    content = {"state_dict": state, "global_step": 3, "pytorch-lightning_version": "2", "mmdistill": meta}
    save_torch(content, tmp_path / "slim.ckpt")
    return tmp_path / "slim.ckpt"


def test_resume_reads_the_named_teachers(slim: Path) -> None:
    config = configure("resume=auto")
    teachers, sources = load_teachers(config, modality_specs(config.data_module), slim)
    assert list(teachers) == list(MODALITIES)
    assert sources == read_checkpoint(slim).meta["teachers"]
    assert teachers["flow"].geometry.channels == 2


def test_moved_teachers_are_given_by_path(slim: Path, tmp_path: Path) -> None:
    (tmp_path / "flow").rename(tmp_path / "elsewhere")
    config = configure("resume=auto")
    with pytest.raises(ConfigError, match=r"flow: does not exist; .*is slim .* teacher_flow \(sha256 \w{64}"):
        load_teachers(config, modality_specs(config.data_module), slim)
    paths = ",".join(str(tmp_path / m) for m in ("rgb", "elsewhere", "skeleton"))
    config = configure("resume=auto", f"trainer.ckpt_path=[{paths}]")
    assert load_teachers(config, modality_specs(config.data_module), slim)[1]["teacher_flow"]["path"].endswith("where")


def test_changed_teachers_are_refused_with_both_digests(slim: Path, tmp_path: Path) -> None:
    wanted = read_checkpoint(slim).meta["teachers"]["teacher_flow"]["sha256"]
    shutil.rmtree(tmp_path / "flow")
    found = weights_digest(load_encoder(teacher(tmp_path / "flow", "flow", 7)))
    config = configure("resume=auto")
    with pytest.raises(ConfigError, match="its weights have sha256") as raised:
        load_teachers(config, modality_specs(config.data_module), slim)
    assert all(part in str(raised.value) for part in (str(tmp_path / "flow"), wanted, found, "slim.ckpt"))
    with pytest.raises(CheckpointError, match=f"{wanted}.*{found}"):
        check_teachers({"teacher_flow": {"sha256": wanted}}, {"teacher_flow": {"sha256": found}}, ["teacher_flow"])


def test_other_teachers_than_the_files_are_refused(slim: Path) -> None:
    config = configure("resume=auto", "trainer.teachers=[rgb]")
    with pytest.raises(ConfigError, match="was distilled from teacher_rgb, teacher_flow, teacher_skeleton"):
        load_teachers(config, modality_specs(config.data_module), slim)


def test_a_fresh_run_needs_paths() -> None:
    with pytest.raises(ConfigError, match=r"trainer\.ckpt_path must name"):
        configure()
    config = configure("resume=auto")  # and so does the first start of a requeued job
    with pytest.raises(ConfigError, match=r"trainer\.ckpt_path must name"):
        load_teachers(config, modality_specs(config.data_module), None)


def test_evaluation_of_a_slim_file(slim: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = configure("train=False", f"ckpt_path={slim}", "compare=[random,teacher_rgb,teacher_flow]")
    rows = {n.name: n for n in _networks(config, str(slim))}
    assert list(rows) == ["student_rgb", "random", "teacher_rgb", "teacher_flow"]
    assert rows["teacher_flow"].checkpoint == str(tmp_path / "flow")
    assert torch.equal(rows["student_rgb"].encoder.norm.weight, rows["teacher_rgb"].encoder.norm.weight + 1)
    shutil.rmtree(tmp_path / "flow")
    assert [n.name for n in _networks(config, str(slim))] == ["student_rgb", "random", "teacher_rgb"]
    said = capsys.readouterr().out
    assert f"teacher_flow is not in {slim}, a slim file; this row is left out" in said
    with pytest.raises(ConfigError, match="no part 'student_flow'"):
        _networks(configure("train=False", f"ckpt_path={slim}", "compare=[student_flow]"), str(slim))
