"""A fourth modality in a few lines outside the package: pretraining, distillation and evaluation with it."""

import inspect
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import cv2
import numpy as np
import pytest
from torch import Tensor

from mmdistill.checkpoint import load_encoder, read_checkpoint
from mmdistill.config import DistillConfig, PretrainConfig
from mmdistill.config.compose import load_config
from mmdistill.data.readers.base import FrameError, FrameFileReader, Reader
from mmdistill.distill import distill
from mmdistill.evaluation.browse import BrowseOptions, BrowsePage
from mmdistill.evaluation.run import evaluate_checkpoint
from mmdistill.modalities import MODALITIES, Modality, ModalitySpec, ReaderOptions, register_modality
from mmdistill.models.preprocessing import crop_resize_flip, normalize
from mmdistill.pretrain import pretrain
from tests.contracts.reader_contract import ReaderContract
from tests.synthetic_dots import write_dot_video
from tests.tiny_data import EVAL, MODEL, make_tiny, overrides

T = TypeVar("T", PretrainConfig, DistillConfig)
DATASET = """
# @package data_module
defaults: [demo, _self_]
modalities:
  edges: {dir: frames, input_stride: 1, mean: [0.0], std: [0.1], target: pixel}
"""


class EdgeReader(FrameFileReader):
    """Brightness gradients (x, y) of JPEG frames, float32 (T, 2, H, W)."""

    name = "edges"
    pattern = "{video}/{frame:06d}.jpg"

    def read(self, video: str, frames: Sequence[int]) -> np.ndarray:
        images = [cv2.imread(self.path(video, k), cv2.IMREAD_GRAYSCALE) for k in frames]
        for frame, image in zip(frames, images, strict=True):
            if image is None or not Path(self.path(video, frame)).read_bytes().endswith(b"\xff\xd9"):
                raise FrameError(f"{self.path(video, frame)}: missing or damaged")
        return np.stack([np.gradient(image.astype(np.float32) / 255)[::-1] for image in images])


class EdgeModality(Modality):
    """A horizontal flip negates the x component."""

    name = "edges"
    channels = 2
    std = (0.1,)
    target = "pixel"

    def open_reader(self, root: Path, options: ReaderOptions) -> Reader:
        return EdgeReader(root, frame_size=options.frame_size, pattern=options.pattern)

    def preprocess(self, clips: Tensor, crop_boxes: Tensor, spec: ModalitySpec, size: tuple[int, int]) -> Tensor:
        x = crop_resize_flip(clips.transpose(1, 2), crop_boxes, size)  # (B, 2, T, h, w)
        x[:, 0] *= (1 - 2 * crop_boxes[:, 4].to(x.device)).view(-1, 1, 1, 1)
        return normalize(x, spec.mean, spec.std)


class TestEdgeReaderContract(ReaderContract):
    frame_shape = (2, 64, 96)
    dtype = "float32"

    def write_video(self, root: Path, video: str, num_frames: int) -> None:
        write_dot_video(root, video=video, frames=num_frames)

    def open_reader(self, root: Path) -> Reader:
        return EdgeReader(root / "frames", frame_size=(64, 96))


@pytest.fixture(scope="module", autouse=True)
def _edges_registered() -> Iterator[None]:
    register_modality(EdgeModality())
    yield
    MODALITIES.unregister("edges")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny data, and a dataset config that adds the modality."""
    folder = tmp_path_factory.mktemp("custom")
    make_tiny(folder / "data", per_class=4)
    (folder / "dataset").mkdir()
    (folder / "dataset" / "tiny_edges.yaml").write_text(DATASET)
    return folder


def _compose(schema: type[T], config_name: str, folder: Path, *changes: str) -> T:
    fixed = ["dataset=tiny_edges", "trainer.epochs=1", "accelerator=cpu", "precision=32"]
    return load_config(schema, config_name, [*overrides(folder / "data"), *fixed, *changes], config_dir=folder)


@pytest.fixture(scope="module")
def teachers(folder: Path) -> dict[str, Path]:
    """Pretrained checkpoints by modality."""
    return {
        name: pretrain(
            _compose(
                PretrainConfig, "config_pretrain", folder, *MODEL, "trainer.image_every_n_epochs=1", f"modality={name}"
            ),
            folder / name,
        )
        for name in ("rgb", "edges")
    }


def test_modality_needs_less_than_40_lines() -> None:
    sources = [inspect.getsource(part) for part in (EdgeReader, EdgeModality)]
    assert sum(len(source.splitlines()) for source in sources) < 40


def test_pretraining_stores_the_modality(teachers: dict[str, Path]) -> None:
    meta = read_checkpoint(teachers["edges"]).meta
    assert meta["modality"] == "edges"
    assert load_encoder(teachers["edges"]).config.channels == 2
    assert (teachers["edges"].parents[1] / "images").is_dir()


def test_modality_is_drawn_over_the_frames(folder: Path) -> None:
    config = _compose(DistillConfig, "config_mmdistill", folder, "train=False", "test=False")
    text, _ = BrowsePage(config, BrowseOptions(clips=1)).render()
    assert "Rows of a picture: input, flow, skeleton, edges, mask." in text
    assert text.count('<figure id="clip-') == 1


def test_modality_is_a_teacher_and_a_baseline(folder: Path, teachers: dict[str, Path], tmp_path: Path) -> None:
    paths = ",".join(f'{name}:"{path}"' for name, path in teachers.items())
    changes = ["trainer.teachers=[rgb,edges]", f"trainer.ckpt_path={{{paths}}}", "baselines=[teacher_edges]"]
    config = _compose(DistillConfig, "config_mmdistill", folder, *EVAL, *changes, "feature_cache=null")
    checkpoint = distill(config, tmp_path / "distill")
    assert {"cmt.mlp_to_rgb.0.weight", "cmt.mlp_to_edges.0.weight"} <= set(read_checkpoint(checkpoint).state_dict)
    evaluate_checkpoint(config, str(checkpoint), tmp_path / "evaluate")
    scores = json.loads((tmp_path / "evaluate/fewshot.json").read_text())
    assert scores["network"] == "student_rgb"
    assert any("teacher_edges" in name for name in scores["settings"][0]["rows"])
