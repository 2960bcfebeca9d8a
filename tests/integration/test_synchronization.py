"""No training step waits for the GPU: it reads no value of a tensor on the device.

Fake tensors have the device ``cuda`` without a GPU. torch runs the same operations on them, without their values.
"""

import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pytorch_lightning.loops.training_epoch_loop import _TrainingEpochLoop
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from mmdistill.distill import trainer as distill_trainer
from mmdistill.distill.module import MMDistill, StudentOptions, TargetOptions
from mmdistill.modalities import BUILTIN_MODALITIES, KEYPOINT_LAYOUTS, StoredHeatmaps, get_modality, preprocess_clips
from mmdistill.models.pooling import Pooling
from mmdistill.models.videomae import DecoderConfig, Encoder, EncoderConfig, VideoMAE
from mmdistill.pretrain.trainer import PretrainTrainer, pretrain
from mmdistill.training.optim import Optimization, make_optimizer
from tests.configs import distill_config, pretrain_config
from tests.tiny_data import MODEL, make_tiny, overrides, write_teacher

aten = torch.ops.aten
READS = {aten._local_scalar_dense, aten.is_nonzero, aten.item, aten.equal, aten.nonzero, aten.masked_select,
         aten._unique2, aten.unique_dim}  # fmt: skip
COPIES = {aten._to_copy, aten.copy_}
GPU = torch.device("cuda")


class DeviceReads(TorchDispatchMode):
    """Raises `AssertionError` if the CPU waits for a value of the GPU, or for a copy to or from it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [a for a in args if isinstance(a, torch.Tensor)]
        devices = {a.device.type for a in given} | ({kwargs["device"].type} if "device" in (kwargs or {}) else set())
        if func.overloadpacket in READS:
            assert "cuda" not in devices, f"{func} reads a value of the GPU"
        if func.overloadpacket in COPIES and len(devices) == 2:
            assert kwargs.get("non_blocking") or True in args[2:], f"{func} waits for a copy between CPU and GPU"
        if func.overloadpacket is aten.index:
            indices = {i.device.type for i in args[1] if i is not None}
            assert indices <= devices, f"{func} waits for the copy of an index to the GPU"
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module", autouse=True)
def autograd_without_gpu() -> None:
    """The first backward pass of a process starts a thread per GPU, and fake tensors count as one.

    Tests that run later in this process could then not fork.
    """
    torch.ones(1, requires_grad=True).sum().backward()


def _on_gpu(values: torch.Tensor) -> torch.Tensor:
    return values.to(GPU, non_blocking=True)


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.isfinite().all()),
        lambda x: x.tolist(),
        lambda x: x.nonzero(),
        lambda x: x.equal(x),
        lambda x: x.cpu(),
        lambda x: x[:, [1, 0]],
        lambda x: x[:, torch.tensor([1, 0])],
        lambda x: x * torch.tensor([1.0, 2.0], device=x.device),
        lambda x: x.copy_(torch.ones(2, 2)),
    ],
)
def test_waiting_for_the_gpu_is_noticed(read: Callable[[torch.Tensor], Any]) -> None:
    with FakeTensorMode():
        x = _on_gpu(torch.ones(2, 2))
        with DeviceReads(), pytest.raises(AssertionError, match="GPU"):
            read(x)


RAW = {
    "rgb": lambda: torch.zeros(2, 4, 36, 40, 3, dtype=torch.uint8),
    "flow": lambda: torch.zeros(2, 4, 2, 36, 40).half(),
    "skeleton": lambda: torch.zeros(2, 4, 1, 17, 3),
}
BOXES = {"copied": [0.0, 7, 32, 32, 1], "sampled": [2.0, 1, 20, 30, 1]}  # how a crop is made


def _spec(name: str) -> Any:
    spec = get_modality(name).spec()
    return replace(spec, compensate="median") if name == "flow" else spec


@pytest.mark.parametrize("box", BOXES)
@pytest.mark.parametrize("case", [*BUILTIN_MODALITIES, "limbs", "heatmaps"])
def test_preprocessing_reads_no_value_of_the_gpu(case: str, box: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = case if case in RAW else "skeleton"
    spec, make = _spec(name), RAW[name]
    if case == "limbs":
        layout = replace(KEYPOINT_LAYOUTS["coco17"], limb_channels=True)
        spec = get_modality("skeleton").spec(keypoints=layout, channels=len(layout.channel_names))
    if case == "heatmaps":
        spec = replace(spec, heatmaps=StoredHeatmaps((9, 10), (36, 40)))
        make = lambda: torch.zeros(2, 4, 17, 9, 10)  # noqa: E731
    boxes, size = torch.tensor([BOXES[box]] * 2), 32 // spec.input_stride  # decide, so they are not fake
    if spec.heatmaps is not None:
        scaled = spec.heatmaps.scale_boxes(boxes)
        monkeypatch.setattr(StoredHeatmaps, "scale_boxes", lambda *_: scaled)
    with FakeTensorMode(allow_non_fake_inputs=True):
        clips = _on_gpu(make())
        with DeviceReads():
            x = preprocess_clips(clips, boxes, spec, (size, size))
    assert (x.device.type, x.shape) == ("cuda", (2, spec.channels, 4, size, size))


def _encoder_config(name: str) -> EncoderConfig:
    spec = _spec(name)
    size, patch = 32 // spec.input_stride, 8 // spec.input_stride
    return EncoderConfig(spec.channels, 4, size, size, patch, 2, 16, 2, 2, 8, 32)


def _batch(*names: str) -> dict[str, torch.Tensor]:
    """Fake tensors on the CPU, with the exception of what the CPU reads."""
    return {name: RAW[name]() for name in names} | {"visible": torch.zeros(2, 8, dtype=torch.long)} | CPU_VALUES


CPU_VALUES = {"crop_box": torch.tensor([BOXES["copied"], BOXES["sampled"]]), "index": torch.arange(2)}


@pytest.mark.parametrize("decoder_mask_ratio", [0.0, 0.5])
@pytest.mark.parametrize("name", BUILTIN_MODALITIES)
def test_pretraining_step_reads_no_value_of_the_gpu(
    name: str, decoder_mask_ratio: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward pass, clipping and AdamW. torch's backward pass needs a real GPU."""
    monkeypatch.setattr(torch.nn.init, "trunc_normal_", lambda x, **_: x)  # reads values
    config = SimpleNamespace(modality=name, decoder_mask_ratio=decoder_mask_ratio, seed=0)
    with FakeTensorMode(allow_non_fake_inputs=True):
        with GPU:
            model = VideoMAE(_encoder_config(name), DecoderConfig(16, 1, 2, 8, 32))
        optimizer = make_optimizer(model, Optimization(1e-3))
        trainer: Any = SimpleNamespace(
            config=config, engine=_Engine(model), spec=_spec(name), joint=None,
            encoder_config=model.encoder.config, run=SimpleNamespace(process=SimpleNamespace(device=GPU)),
            state=SimpleNamespace(epoch=0),
        )  # fmt: skip
        trainer._decoder_targets = lambda *args: PretrainTrainer._decoder_targets(trainer, *args)
        batch = _batch(name)
        with DeviceReads():
            loss, values = PretrainTrainer.losses(trainer, batch)
            _step(model, optimizer)
    assert {loss.device.type, *(value.device.type for value in values.values())} == {"cuda"}


def _step(module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    optimizer.step()


class _Engine:
    """The part of DeepSpeed's engine that the forward pass uses."""

    def __init__(self, module: VideoMAE) -> None:
        self.module = module

    def __call__(self, *args: Any) -> Any:
        return self.module(*args)


@pytest.mark.parametrize("pooling", ["mean", "segments", "person"])
def test_distillation_step_reads_no_value_of_the_gpu(pooling: str) -> None:
    """Transfer of the batch, forward pass with standardized targets and a file as a teacher, clipping, AdamW."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        specs = {name: _spec(name) for name in BUILTIN_MODALITIES}
        targets = TargetOptions("standard", files={"dino": torch.zeros(2, 8)})
        with GPU:
            teachers = {name: Encoder(_encoder_config(name)) for name in BUILTIN_MODALITIES}
            student = StudentOptions(Encoder(_encoder_config("rgb")), pooling=Pooling(pooling))
            net = MMDistill(teachers, specs, Optimization(1e-3), targets=targets, student=student).train()
        optimizer = net.configure_optimizers()["optimizer"]
        with DeviceReads():
            batch = net.transfer_batch_to_device(_batch(*RAW), GPU, 0)
            loss = torch.stack([loss for loss, _ in net.losses(batch).values()]).sum()
            _step(net, optimizer)
    assert {key for key, value in batch.items() if value.device.type == "cpu"} == CPU_VALUES.keys()
    assert loss.device.type == "cuda"


class CountReads(TorchDispatchMode):
    """Counts the reads of values by the innermost function that is not torch's."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in READS:
            own = (Path(torch.__file__).parent, Path(__file__))
            frames = [f for f in traceback.extract_stack() if not any(Path(f.filename).is_relative_to(p) for p in own)]
            self.counts[frames[-1].name] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("tiny") / "data", per_class=1)  # 12 clips


COMMON = ("accelerator=cpu", "batch_size=2", "trainer.epochs=1", "trainer.clip_grad=1", "trainer.ema=0.9")
STEPS = 6


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ([], {"grad_norm": 1}),
        # functions of DeepSpeed's optimizer; `get_weight_norm` for each of the two groups of parameters
        (["precision=bf16"], {"has_nonfinite_gradient": 1, "has_overflow": 1, "get_weight_norm": 4}),
    ],
)
def test_reads_of_a_pretraining_step(
    more: list[str], expected: dict[str, int], data: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """All reads of a step on a CPU, with the policy for non-finite values."""
    count, train_epoch = CountReads(), PretrainTrainer.train_epoch

    def counted(self: Any) -> None:
        with count:
            train_epoch(self)

    monkeypatch.setattr(PretrainTrainer, "train_epoch", counted)
    pretrain(pretrain_config(*overrides(data), *MODEL, "modality=flow", *COMMON, *more), tmp_path)
    assert count.counts.pop("_get_iterator") == 1  # of the loader, on the CPU
    assert count.counts == {name: STEPS * number for name, number in expected.items()}


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ([], {"grad_norm": 1}),
        (["precision=bf16", "trainer.standardize_targets=standard"], {"grad_norm": 1}),
    ],
)
def test_reads_of_a_distillation_step(
    more: list[str], expected: dict[str, int], data: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """All reads of a step on a CPU, with Lightning and all callbacks."""
    count, advance = CountReads(), _TrainingEpochLoop.advance

    def counted(self: Any, *args: Any) -> None:
        with count:
            advance(self, *args)

    monkeypatch.setattr(_TrainingEpochLoop, "advance", counted)
    monkeypatch.setattr("mmdistill.distill.module.MAX_TOKENS_FOR_THREADING", 0)  # other threads are not counted
    paths = [write_teacher(tmp_path / m, m, i) for i, m in enumerate(("rgb", "flow", "skeleton"))]
    teachers = f"trainer.ckpt_path=[{','.join(map(str, paths))}]"
    distill_trainer.distill(distill_config(*overrides(data), *COMMON, teachers, "test=False", *more), tmp_path / "run")
    assert count.counts == {name: STEPS * number for name, number in expected.items()}
