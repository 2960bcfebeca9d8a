"""Checkpoint files without a training."""

import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from mmdistill.checkpoint import save_torch
from mmdistill.checkpoint.convert import write_deepspeed
from mmdistill.models.videomae import Encoder, EncoderConfig

STUDENT_CONFIG = EncoderConfig(3, 4, 8, 12, 4, 2, 16, 2, 4, 4, 32)
STATE = {"encoder.norm.weight": torch.zeros(2)}


class Record(NamedTuple):
    """A stored file of a zip archive and the position of its bytes."""

    name: str
    start: int
    size: int


def zip_records(path: Path) -> list[Record]:
    """The records of an archive. A local header has 30 bytes; the name and the extra field follow."""
    data, records = path.read_bytes(), []
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            lengths = struct.unpack("<HH", data[info.header_offset + 26 : info.header_offset + 30])
            records.append(Record(info.filename, info.header_offset + 30 + sum(lengths), info.file_size))
    return records


def write_native(path: Path, **meta: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_deepspeed(STATE, path, {"kind": "pretrain", **meta})
    return path


def write_lightning(path: Path, epoch: int) -> Path:
    save_torch({"epoch": epoch, "global_step": 10 * epoch, "pytorch-lightning_version": "2", "state_dict": STATE}, path)
    return path


def write_output(root: Path) -> Path:
    """Single runs, a multirun, a directory of stock DeepSpeed, a truncated file and a temporary directory."""
    day = root / "2026-01-09"
    write_native(day / "15-29-49/pretrain_rgb/checkpoints/epoch=09-loss=0.7000", epoch=9, loss=0.7, modality="rgb")
    write_native(day / "15-29-49/pretrain_rgb/checkpoints/epoch=49-loss=0.6095", epoch=49, loss=0.6095, modality="rgb")
    write_native(
        root / "multirun/2026-01-10/09-00-00/1/pretrain_flow/checkpoints/epoch=49-loss=0.9503", modality="flow"
    )
    stock = root / "2026-01-08/10-00-00/pretrain_skeleton/checkpoints/epoch=49-loss=0.0141/checkpoint"
    stock.mkdir(parents=True)
    torch.save({"module": STATE}, stock / "mp_rank_00_model_states.pt")
    distill = root / "2026-01-10/12-30-45/mmdistill_tennis/checkpoints"
    write_lightning(distill / "epoch=49-train_loss=0.0081.ckpt", 49)
    write_lightning(distill / "epoch=20-train_loss=0.0070.ckpt", 20)
    write_lightning(distill / "last.ckpt", 49)
    truncated = write_lightning(distill / "epoch=48-train_loss=0.0001.ckpt", 48)
    truncated.write_bytes(truncated.read_bytes()[:-100])
    (distill / ".tmp-epoch=50").mkdir()
    return root


def write_distilled(
    path: Path, config: EncoderConfig = STUDENT_CONFIG, more: Mapping[str, object] | None = None
) -> Encoder:
    """Write a small distilled Lightning file with metadata, to which `more` is added; its student."""
    torch.manual_seed(0)
    student, teacher = Encoder(config), Encoder(config)
    for encoder in (student, teacher):
        for parameter in encoder.parameters():
            parameter.data.uniform_(-0.3, 0.3)
    state = {}
    for component, encoder in (("student_rgb", student), ("teacher_rgb", teacher)):
        state |= {f"{component}.encoder.{k}": v for k, v in encoder.state_dict().items()}
    state["cmt.mlp_to_rgb.0.weight"] = torch.randn(16, 16)
    meta = {
        "kind": "distill",
        "encoders": {"student_rgb": vars(config), "teacher_rgb": vars(config)},
        "statistics": {"rgb": {"mean": [0.5], "std": [0.2]}, "flow": {"mean": [0.0], "std": [1.0]}},
    }
    content = {"state_dict": state, "pytorch-lightning_version": "2.6.6", "epoch": 3, "global_step": 40}
    save_torch({**content, "mmdistill": {**meta, **(more or {})}}, path)
    return student
