"""The user's description of the checkpoint formats: every command, path and file name in it works as written."""

import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from mmdistill.checkpoint import load_torch, read_checkpoint
from mmdistill.config import DistillConfig
from mmdistill.config.compose import CONFIGS, load_config
from mmdistill.models.videomae import DecoderConfig, EncoderConfig, VideoMAE
from tests.commands import run_python
from tests.tiny_data import EVAL, make_tiny, overrides

# The commands and the configuration as the text has them.
FIND = "python3 find_checkpoints.py /mnt/ssd2/lingyu/Tennis/output"
EVALUATE = r"""python3 lit_main_mmdistill.py \
    --config-name=config_mmdistill_tennis \
    train=False \
    test=True \
    ckpt_path=/path/to/epoch=49-train_loss=0.0081.ckpt
"""
TRAINER_FILE = "configs/trainer/mm_distill_trainer_tennis.yaml"
TEACHERS = """ckpt_path: [
  /path/to/pretrain_rgb/checkpoints/epoch=49-loss=0.6095,  # DeepSpeed 格式
  /path/to/pretrain_flow/checkpoints/epoch=49-loss=0.9503,
  /path/to/pretrain_skeleton/checkpoints/epoch=49-loss=0.0141,
]
"""
OUTPUT = "/mnt/ssd2/lingyu/Tennis/output"
PRETRAINED = OUTPUT + "/2026-01-09/15-29-49/pretrain_rgb/checkpoints/epoch=49-loss=0.6095"
DISTILLED = (
    OUTPUT + "/2026-01-10/12-30-45/mmdistill_tennis/checkpoints/epoch=49-train_loss=0.0081.ckpt",
    OUTPUT + "/2026-01-10/12-30-45/mmdistill_tennis/checkpoints/last.ckpt",
)
MODEL_STATES = "checkpoint/mp_rank_00_model_states.pt"
LIGHTNING_KEYS = {"state_dict", "epoch", "global_step", "lr_schedulers", "optimizer_states"}
CHANNELS = {"rgb": 3, "flow": 2, "skeleton": 17}


def _pretrained(modality: str) -> dict[str, torch.Tensor]:
    """Weights of a small autoencoder for the tiny dataset.

    Skeletons are rendered at a quarter of the size. As in the user's models, heads * head_dim is not the width.
    """
    torch.manual_seed(0)
    side, patch = (8, 2) if modality == "skeleton" else (32, 8)
    encoder = EncoderConfig(
        channels=CHANNELS[modality], num_frames=4, height=side, width=side, patch=patch, tubelet=2,
        dim=32, depth=1, heads=12, head_dim=2, mlp_dim=64,
    )  # fmt: skip
    decoder = DecoderConfig(dim=16, depth=1, heads=12, head_dim=1, mlp_dim=32)
    return VideoMAE(encoder, decoder).state_dict()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stands for ``/`` of the text: its checkpoint folders, with the contents that it gives and nothing else."""
    root = tmp_path_factory.mktemp("user")
    for line in TEACHERS.splitlines()[1:-1]:
        path = line.split(",")[0].strip()
        modality = path.split("/pretrain_")[1].split("/")[0]
        folder = root / PRETRAINED.strip("/").replace("pretrain_rgb", f"pretrain_{modality}")
        folder = folder.with_name(Path(path).name)
        (folder / "checkpoint").mkdir(parents=True)
        torch.save({"module": _pretrained(modality)}, folder / MODEL_STATES)
        link = root / path.strip("/")
        link.parent.mkdir(parents=True)
        link.symlink_to(folder)
    return root


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return [*overrides(make_tiny(tmp_path_factory.mktemp("tiny") / "data", per_class=4)), *EVAL]


def _at(root: Path, text: str) -> str:
    """The text with its absolute paths below `root`."""
    return text.replace("/mnt/", f"{root}/mnt/").replace("/path/to/", f"{root}/path/to/")


@pytest.fixture(scope="module")
def student(root: Path, data: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The distilled checkpoint, trained with the teachers in the trainer's file as the text gives them."""
    configs = tmp_path_factory.mktemp("configs") / "configs"
    shutil.copytree(CONFIGS, configs)
    with (configs.parent / TRAINER_FILE).open("a") as file:
        file.write(_at(root, TEACHERS))
    run = root / Path(DISTILLED[0].strip("/")).parents[1]
    run_python(
        "lit_main_mmdistill.py", f"--config-path={configs}", "--config-name=config_mmdistill_tennis", "test=False",
        *data, "trainer.epochs=1", f"hydra.run.dir={run}",
    )  # fmt: skip
    saved = next((run / "checkpoints").glob("epoch=00-train_loss=?.????.ckpt"))
    target = root / DISTILLED[0].strip("/")
    saved.rename(target)
    (root / "path" / "to").mkdir(exist_ok=True, parents=True)
    (root / "path" / "to" / target.name).symlink_to(target)
    return target


def test_trainer_file_contains_the_commented_list_and_is_used() -> None:
    text = (CONFIGS.parent / TRAINER_FILE).read_text()
    block = text[text.index("# ckpt_path: [") :]
    paths = yaml.safe_load(TEACHERS)["ckpt_path"]
    assert yaml.safe_load("\n".join(line.removeprefix("# ") for line in block.splitlines()))["ckpt_path"] == paths
    assert "override trainer: mm_distill_trainer_tennis" in (CONFIGS / "config_mmdistill_tennis.yaml").read_text()
    config = load_config(DistillConfig, "config_mmdistill_tennis", ["train=False", "test=False"])
    assert (config.trainer.epochs, config.trainer.ckpt_path, config.run_name) == (50, None, "mmdistill_tennis")


def test_distilled_file_has_the_described_contents(student: Path) -> None:
    content = load_torch(student)
    assert set(content) >= LIGHTNING_KEYS
    assert {
        "student_rgb.encoder.patch_embed.proj.weight",
        "teacher_flow.encoder.blocks.0.norm1.weight",
        "cmt.mlp_to_rgb.0.weight",
    } <= set(content["state_dict"])
    assert (student.parent / "last.ckpt").is_file()


def test_find_checkpoints_lists_both_formats(root: Path, student: Path) -> None:
    program, *arguments = shlex.split(_at(root, FIND))
    assert program == "python3"
    done = run_python(*arguments)
    for path in (PRETRAINED, *DISTILLED):
        assert f"  complete    {root}{path}\n" in done.stdout
    assert f'"{root}{PRETRAINED}",  # rgb, deepspeed' in done.stdout
    assert "--config-name=config_mmdistill_tennis" in done.stdout


def test_evaluation_command_works_as_written(root: Path, student: Path, data: list[str], tmp_path: Path) -> None:
    program, *arguments = shlex.split(_at(root, EVALUATE).replace("\\\n", " "))
    assert program == "python3"
    run_python(*arguments, *data, "baselines=[random]", "feature_cache=null", f"hydra.run.dir={tmp_path}")
    result = json.loads((tmp_path / "fewshot.json").read_text())
    assert result["checkpoint"] == f"{root}/path/to/epoch=49-train_loss=0.0081.ckpt"
    assert {"top1_action_ensemble", "ci95"} <= set(result)


def test_both_formats_are_recognized(root: Path, student: Path) -> None:
    assert read_checkpoint(f"{root}{PRETRAINED}").format == "deepspeed"
    assert read_checkpoint(student).format == "lightning"
