"""Slim checkpoints: the teachers they name are read again, and only if they are still the same."""

import shutil
from pathlib import Path

import pytest
import torch

from mmdistill.checkpoint import (
    CheckpointError,
    load_encoder,
    open_checkpoint,
    read_checkpoint,
    save_torch,
)
from mmdistill.checkpoint.references import load_referenced_teacher, weights_digest
from mmdistill.config import ConfigError, DistillConfig, modality_specs, to_plain
from mmdistill.config.compose import load_config
from mmdistill.distill.teachers import check_teacher_digests, load_teachers, read_teacher
from mmdistill.evaluation.networks import load_networks
from mmdistill.models.videomae import Encoder, EncoderConfig
from tests.tiny_data import overrides, write_teacher

MODALITIES = ("rgb", "flow", "skeleton")


def configure(*more: str) -> DistillConfig:
    return load_config(DistillConfig, "config_mmdistill", [*overrides(Path("nowhere")), *more])


@pytest.fixture
def student_only(tmp_path: Path) -> Path:
    """Path of a student-only checkpoint in the folder of the three teachers that it references."""
    state, encoders, named = {}, {}, {}
    for i, modality in enumerate(MODALITIES):
        path = write_teacher(tmp_path / modality, modality, i)
        checkpoint = read_checkpoint(path)
        encoders[f"teacher_{modality}"] = checkpoint.meta["encoders"]["encoder"]
        named[f"teacher_{modality}"] = {"path": str(path), "sha256": weights_digest(load_encoder(checkpoint))}
        if modality == "rgb":
            encoders["student_rgb"] = encoders["teacher_rgb"]
            state = {f"student_rgb.{k}": v + 1.0 for k, v in checkpoint.state_dict.items()}
    meta = {"kind": "distill", "encoders": encoders, "teachers": named, "epoch": 0, "step": 3}
    content = {"state_dict": state, "global_step": 3, "pytorch-lightning_version": "2", "mmdistill": meta}
    save_torch(content, tmp_path / "student_only.ckpt")
    return tmp_path / "student_only.ckpt"


def test_resume_reads_the_named_teachers(student_only: Path) -> None:
    config = configure("resume=auto")
    teachers, sources = load_teachers(config, modality_specs(config.data_module), open_checkpoint(student_only))
    assert list(teachers) == list(MODALITIES)
    assert sources == read_checkpoint(student_only).meta["teachers"]
    assert teachers["flow"].config.channels == 2


@pytest.mark.parametrize("has_paths", [True, False])
def test_resume_loads_each_teacher_once(
    student_only: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, has_paths: bool
) -> None:
    """The checkpoint contains the teachers, and trainer.ckpt_path of the same command names them again."""
    checkpoint = read_checkpoint(student_only)
    state = dict(checkpoint.state_dict)
    for modality in MODALITIES:
        teacher = read_checkpoint(tmp_path / modality).state_dict
        state |= {f"teacher_{modality}.{name}": tensor for name, tensor in teacher.items()}
    save_torch({"state_dict": state, "mmdistill": checkpoint.meta}, tmp_path / "last.ckpt")
    paths = [str(tmp_path / (modality if has_paths else f"absent_{modality}")) for modality in MODALITIES]
    config = configure("resume=auto", f"trainer.ckpt_path=[{','.join(paths)}]")
    caplog.set_level("INFO")
    teachers, sources = load_teachers(
        config, modality_specs(config.data_module), open_checkpoint(tmp_path / "last.ckpt")
    )
    loaded = [record.message for record in caplog.records if record.message.startswith("loaded ")]
    assert len(loaded) == 3
    assert sources == checkpoint.meta["teachers"]
    assert {f"teacher_{m}": weights_digest(encoder) for m, encoder in teachers.items()} == {
        component: source["sha256"] for component, source in sources.items()
    }
    write_teacher(tmp_path / "other", "flow", 7)
    config = configure("resume=auto", f"trainer.ckpt_path=[{paths[0]},{tmp_path / 'other'},{paths[2]}]")
    with pytest.raises(CheckpointError, match="the sha256 of its weights is"):
        load_teachers(config, modality_specs(config.data_module), open_checkpoint(tmp_path / "last.ckpt"))


def test_another_sampling_rate_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    config = configure("resume=auto", "data_module.sampling_rate=2")
    data, spec = config.data_module, modality_specs(config.data_module)["flow"]
    for stored, num_lines in ((2, 0), (4, 1)):
        path = write_teacher(tmp_path / str(stored), "flow", 0, config={"data_module": {"sampling_rate": stored}})
        caplog.clear()
        read_teacher(str(path), "flow", spec, data)
        lines = [record.message for record in caplog.records if "sampling_rate=2, but" in record.message]
        assert len(lines) == num_lines
    assert lines[0].endswith(f"{path} was trained with 4: the clips show motion at a different speed than in training")


def test_moved_teachers_need_a_path(student_only: Path, tmp_path: Path) -> None:
    (tmp_path / "flow").rename(tmp_path / "elsewhere")
    config = configure("resume=auto")
    with pytest.raises(
        CheckpointError, match=r"flow: does not exist; the student-only checkpoint .* teacher_flow \(sha256 \w{64}"
    ):
        load_teachers(config, modality_specs(config.data_module), open_checkpoint(student_only))
    paths = ",".join(str(tmp_path / m) for m in ("rgb", "elsewhere", "skeleton"))
    config = configure("resume=auto", f"trainer.ckpt_path=[{paths}]")
    sources = load_teachers(config, modality_specs(config.data_module), open_checkpoint(student_only))[1]
    assert sources["teacher_flow"]["path"].endswith("where")


def test_changed_teachers_raise_with_both_digests(student_only: Path, tmp_path: Path) -> None:
    expected = read_checkpoint(student_only).meta["teachers"]["teacher_flow"]["sha256"]
    shutil.rmtree(tmp_path / "flow")
    found = weights_digest(load_encoder(write_teacher(tmp_path / "flow", "flow", 7)))
    config = configure("resume=auto")
    with pytest.raises(CheckpointError, match="the sha256 of its weights is") as raised:
        load_teachers(config, modality_specs(config.data_module), open_checkpoint(student_only))
    assert all(part in str(raised.value) for part in (str(tmp_path / "flow"), expected, found, "student_only.ckpt"))
    with pytest.raises(CheckpointError, match=f"{expected}.*{found}"):
        check_teacher_digests(
            {"teacher_flow": {"sha256": expected}}, {"teacher_flow": {"sha256": found}}, ["teacher_flow"]
        )


def test_other_teachers_than_the_checkpoints_raise(student_only: Path) -> None:
    config = configure("resume=auto", "trainer.teachers=[rgb]")
    with pytest.raises(ConfigError, match="was distilled from teacher_rgb, teacher_flow, teacher_skeleton"):
        load_teachers(config, modality_specs(config.data_module), open_checkpoint(student_only))


def test_new_run_needs_paths() -> None:
    with pytest.raises(ConfigError, match=r"trainer\.ckpt_path must name"):
        configure()
    config = configure("resume=auto")  # and so does the first start of a requeued job
    with pytest.raises(ConfigError, match=r"trainer\.ckpt_path must name"):
        load_teachers(config, modality_specs(config.data_module), None)


def test_evaluation_of_a_student_only_checkpoint(student_only: Path, tmp_path: Path) -> None:
    config = configure("train=False", f"ckpt_path={student_only}", "baselines=[random,teacher_rgb,teacher_flow]")
    rows = {n.name: n for n in load_networks(config, read_checkpoint(student_only))[0]}
    assert list(rows) == ["student_rgb", "random", "teacher_rgb", "teacher_flow"]
    assert rows["teacher_flow"].checkpoint == str(tmp_path / "flow")
    assert torch.equal(rows["student_rgb"].encoder.norm.weight, rows["teacher_rgb"].encoder.norm.weight + 1)
    shutil.rmtree(tmp_path / "flow")
    networks, (message,) = load_networks(config, read_checkpoint(student_only))
    assert [n.name for n in networks] == ["student_rgb", "random", "teacher_rgb"]
    assert message.startswith(f"baselines: skipping teacher_flow: {student_only} is a student-only checkpoint: ")
    with pytest.raises(CheckpointError, match="no component 'student_flow'"):
        load_networks(
            configure("train=False", f"ckpt_path={student_only}", "baselines=[student_flow]"),
            read_checkpoint(student_only),
        )


def test_teachers_without_metadata_take_the_input_size_of_the_data(tmp_path: Path) -> None:
    """No metadata, as in older checkpoints of the method; skeletons may have been trained at the pixels' resolution."""
    paths = []
    for modality, channels in (("rgb", 3), ("flow", 2), ("skeleton", 17)):
        geometry = EncoderConfig(channels, 4, 32, 48, 16, 2, dim=384, depth=1, heads=6, head_dim=64, mlp_dim=384)
        state = {f"encoder.{k}": v for k, v in Encoder(geometry).state_dict().items()}
        (tmp_path / modality / "checkpoint").mkdir(parents=True)
        torch.save({"module": state}, tmp_path / modality / "checkpoint" / "mp_rank_00_model_states.pt")
        paths.append(str(tmp_path / modality))
    given = (
        f"trainer.ckpt_path=[{','.join(paths)}]",
        "data_module.num_frames=4",
        "data_module.crop_size=[32,48]",
        "data_module.frame_size=[32,48]",
        "data_module.patch_size=16",
    )
    config = configure(*given, "data_module.modalities.skeleton.input_stride=1")
    teachers, sources = load_teachers(config, modality_specs(config.data_module), None)
    for encoder in teachers.values():
        g = encoder.config
        assert (g.num_frames, g.height, g.width, g.patch) == (4, 32, 48, 16)

    encoders = {f"teacher_{m}": to_plain(e.config) for m, e in teachers.items()}
    meta = {"kind": "distill", "encoders": encoders, "teachers": sources}
    save_torch({"state_dict": {}, "mmdistill": meta}, tmp_path / "student_only.ckpt")
    student_only = open_checkpoint(tmp_path / "student_only.ckpt")
    assert load_referenced_teacher(student_only, "teacher_flow").state_dict

    config = configure(*given, "data_module.modalities.skeleton.input_stride=4")
    with pytest.raises(ConfigError, match=r"patch 16 / 4; set data_module\.modalities\.skeleton\.input_stride=1"):
        load_teachers(config, modality_specs(config.data_module), None)
