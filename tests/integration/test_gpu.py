"""Tests that need a GPU: the CPU's numbers in float32, trainings in bf16 and fp16, NCCL."""

import csv
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from mmdistill.checkpoint import read_checkpoint
from mmdistill.distributed.launch import INTERRUPTED_EXIT_CODE
from mmdistill.modalities import BUILTIN_MODALITIES, get_modality, preprocess_clips
from mmdistill.models.targets import patch_targets, reconstruction_loss
from mmdistill.models.videomae import DecoderConfig, EncoderConfig, VideoMAE, masked_indices
from tests.commands import ROOT, environment, run_python
from tests.tiny_data import EVAL, MODEL, SCORE_STEP, make_tiny, overrides, write_teacher

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
GPU, CPU = ("accelerator=gpu",), ("accelerator=cpu",)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return overrides(make_tiny(tmp_path_factory.mktemp("tiny") / "data"))


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("teachers")
    given = [str(write_teacher(root / m, m, i)) for i, m in enumerate(("rgb", "flow", "skeleton"))]
    return f"trainer.ckpt_path=[{','.join(given)}]"


def _rows(run: Path) -> list[dict[str, float]]:
    with (run / "metrics.csv").open(newline="") as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


def _losses(run: Path, name: str) -> list[float]:
    return [row[name] for row in _rows(run) if name in row]


def _pretrain(run: Path, data: list[str], *arguments: str, expect: int = 0) -> list[float]:
    """Epoch losses of a pretraining."""
    given = ["modality=flow", *data, *MODEL, *arguments, f"hydra.run.dir={run}"]
    run_python("pretrain_main.py", *given, expect=expect, gpus=True)
    return _losses(run, "loss")


def _distill(run: Path, data: list[str], teachers: str, *arguments: str) -> list[float]:
    """Epoch losses of a distillation."""
    given = [teachers, *data, "test=False", *arguments, f"hydra.run.dir={run}"]
    run_python("lit_main_mmdistill.py", *given, gpus=True)
    return _losses(run, "train_loss")


def _weights(run: Path, epoch: int) -> dict[str, torch.Tensor]:
    """The weights that a pretraining saved at an epoch's end."""
    ends = [path for path in (run / "checkpoints").glob(f"epoch={epoch:02d}-*") if "-step=" not in path.name]
    (path,) = ends
    return read_checkpoint(path).state_dict


# The CPU's numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("modality", BUILTIN_MODALITIES)
def test_inputs_loss_and_gradients_equal_the_cpus(modality: str) -> None:
    """From raw clips to the gradient of each weight, in float32."""
    torch.manual_seed(0)
    spec = get_modality(modality).spec()
    size, patch = 64 // spec.input_stride, 16 // spec.input_stride
    model = VideoMAE(
        EncoderConfig(spec.channels, 4, size, size, patch, 2, 32, 2, 2, 16, 64), DecoderConfig(32, 2, 2, 16, 64)
    )
    raw = {
        "rgb": torch.randint(0, 256, (2, 4, 70, 80, 3), dtype=torch.uint8),
        "flow": torch.randn(2, 4, 2, 70, 80).half(),
        "skeleton": torch.rand(2, 4, 2, 17, 3) * torch.tensor([80.0, 70.0, 1.0]),
    }[modality]
    crop_box = torch.tensor([[3.0, 5.0, 64.0, 64.0, 1.0], [0.5, 2.0, 50.0, 60.0, 0.0]])
    visible = torch.stack([torch.randperm(32)[:8].sort().values for _ in range(2)])
    found = []
    for device in ("cpu", "cuda"):
        model.to(device).zero_grad()
        x = preprocess_clips(raw.to(device), crop_box.to(device), spec, (size, size))
        prediction, index = model(x, visible.to(device))
        assert index.equal(masked_indices(visible, 32).to(device))
        loss = reconstruction_loss(prediction, patch_targets(x, index, model.encoder.config.grid, target="norm_pix"))
        loss.backward()
        found.append((x.cpu(), loss.item(), [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    (x, loss, gradients), (x_gpu, loss_gpu, gradients_gpu) = found
    torch.testing.assert_close(x_gpu, x, rtol=1e-4, atol=1e-4)
    assert loss_gpu == pytest.approx(loss, rel=1e-5)
    scale = max(float(g.abs().max()) for g in gradients)
    for ours, theirs in zip(gradients_gpu, gradients, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs.cpu(), rtol=1e-3, atol=1e-4 * scale)


def test_float32_pretraining_has_the_cpus_losses(data: list[str], tmp_path: Path) -> None:
    on_cpu = _pretrain(tmp_path / "cpu", data, *CPU)
    on_gpu = _pretrain(tmp_path / "gpu", data, *GPU, "precision=32")
    assert on_gpu == pytest.approx(on_cpu, rel=1e-4)
    assert torch.cuda.get_device_name() in (tmp_path / "gpu" / "run.json").read_text()


def test_float32_distillation_has_the_cpus_losses(data: list[str], teachers: str, tmp_path: Path) -> None:
    on_cpu = _distill(tmp_path / "cpu", data, teachers, *CPU)
    on_gpu = _distill(tmp_path / "gpu", data, teachers, *GPU, "precision=32")
    assert on_gpu == pytest.approx(on_cpu, rel=1e-4)


def assert_same_scores(found: dict[str, float], expected: dict[str, float]) -> None:
    """Accuracies as fractions; rounding may change the class of two queries."""
    assert found == pytest.approx(expected, abs=2.5 * SCORE_STEP)


def test_evaluation_scores_equal_the_cpus(data: list[str], teachers: str, tmp_path: Path) -> None:
    """A student that was trained on the GPU, evaluated on both."""
    _distill(tmp_path / "run", data, teachers, *GPU)
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    common = [*data, *EVAL, "train=False", f"ckpt_path={last}", "baselines=[random]", "feature_cache=null"]
    found = []
    for name, where in (("cpu", (*CPU, "precision=32")), ("gpu", (*GPU, "precision=32"))):
        run_python("lit_main_mmdistill.py", *common, *where, f"hydra.run.dir={tmp_path / name}", gpus=True)
        rows = json.loads((tmp_path / name / "fewshot.json").read_text())["settings"][0]["rows"]
        found.append({row: values["top1_action_ensemble"] for row, values in rows.items()})
    assert_same_scores(found[1], found[0])


# Precision, ZeRO, keys ------------------------------------------------------------------------------------------------

STAGES = ("0", "1", "1_offload", "2", "2_offload", "3", "3_offload")
KINDS = [*(("bf16", stage) for stage in STAGES), ("32", "0"), ("32", "2"), ("32", "3_offload"),
         ("16", "0"), ("16", "2_offload")]  # fmt: skip


@pytest.fixture(scope="module")
def exact(data: list[str], tmp_path_factory: pytest.TempPathFactory) -> float:
    """The CPU's loss in float32 after one epoch."""
    (loss,) = _pretrain(tmp_path_factory.mktemp("exact"), data, *CPU, "trainer.epochs=1")
    return loss


@pytest.mark.parametrize(("precision", "stage"), KINDS)
def test_every_stage_trains(precision: str, stage: str, data: list[str], exact: float, tmp_path: Path) -> None:
    """The CPU's loss up to 16-bit rounding, and up to fp16's first steps, which find the loss scale."""
    given = (*GPU, f"precision={precision}", f"strategy=deepspeed_stage_{stage}", "trainer.epochs=1")
    (loss,) = _pretrain(tmp_path, data, *given)
    assert loss == pytest.approx(exact, rel={"32": 1e-4, "bf16": 0.02, "16": 0.1}[precision])
    assert all(t.isfinite().all() for t in _weights(tmp_path, 0).values())


def test_auto_is_bf16(data: list[str], tmp_path: Path) -> None:
    if not torch.cuda.is_bf16_supported():
        pytest.skip("this GPU has no bf16")
    _pretrain(tmp_path, data, "accelerator=auto", "precision=auto", "trainer.epochs=1")
    assert "precision bf16, " in (tmp_path / "run.log").read_text()


@pytest.mark.parametrize(
    "keys",
    [
        ("precision=auto",),
        ("precision=16",),
        ("precision=32", "strategy=deepspeed_stage_1_offload"),
        ("precision=bf16", "strategy=deepspeed_stage_2"),
        ("precision=bf16", "strategy=deepspeed_stage_2_offload"),
        ("precision=bf16", "strategy=ddp"),
        ("precision=bf16", "compile=true"),
        (
            "precision=32",
            "trainer.ema=0.9",
            "trainer.activation_checkpointing=true",
            "trainer.accumulate_grad_batches=2",
        ),
        ("precision=32", "trainer.cache_teacher_epochs=1"),
    ],
    ids=" ".join,
)
def test_distillation_runs_with(keys: tuple[str, ...], data: list[str], teachers: str, tmp_path: Path) -> None:
    losses = _distill(tmp_path / "run", data, teachers, *GPU, *keys)
    plain = [k for k in keys if "accumulate" in k or "cache_teacher" in k]
    exact = _distill(tmp_path / "cpu", data, teachers, *CPU, *plain)
    assert losses == pytest.approx(exact, rel=1e-3 if "precision=32" in keys else 0.02)


def test_compiled_pretraining(data: list[str], tmp_path: Path) -> None:
    compiled = _pretrain(tmp_path / "compiled", data, *GPU, "precision=32", "compile=true")
    assert compiled == pytest.approx(_pretrain(tmp_path / "plain", data, *GPU, "precision=32"), rel=1e-3)


# Stop and resume ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["32", "bf16"])
def test_stopped_pretraining_resumes(precision: str, data: list[str], tmp_path: Path) -> None:
    """Equal up to rounding: a GPU's sums have no fixed order."""
    given = (*GPU, f"precision={precision}", "trainer.epochs=12")
    full = _pretrain(tmp_path / "full", data, *given)
    command = [sys.executable, "pretrain_main.py", "modality=flow", *data, *MODEL, *given]
    run = tmp_path / "parts"
    environ = environment(gpus=True, PYTHONUNBUFFERED="1")
    process = subprocess.Popen([*command, f"hydra.run.dir={run}"], cwd=ROOT, env=environ, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not (run / "metrics.csv").exists() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == INTERRUPTED_EXIT_CODE
    parts = _pretrain(run, data, *given, "resume=auto")
    assert len(parts) == 12
    assert parts == pytest.approx(full, rel=1e-3 if precision == "32" else 5e-2)


def test_zero_distillation_resumes(data: list[str], teachers: str, tmp_path: Path) -> None:
    """From the end of its first epoch, with the optimizer state on the optimizer's device."""
    given = (*GPU, "precision=32", "strategy=deepspeed_stage_2", "trainer.save_ckpt_freq=1")
    full = _distill(tmp_path / "full", data, teachers, *given)
    (first,) = (tmp_path / "full" / "checkpoints").glob("epoch=00-*")
    assert _distill(tmp_path / "rest", data, teachers, *given, f"resume='{first}'")[-1:] == pytest.approx(
        full[-1:], rel=1e-3
    )


def test_torchrun_on_all_gpus(data: list[str], exact: float, tmp_path: Path) -> None:
    """A real NCCL group."""
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={torch.cuda.device_count()}",
    ]
    given: list[Any] = ["pretrain_main.py", "modality=flow", *data, *MODEL, *GPU, "precision=32", "trainer.epochs=1"]
    given.append(f"batch_size={8 // torch.cuda.device_count()}")
    done = subprocess.run(
        [*torchrun, *given, f"hydra.run.dir={tmp_path / 'run'}"],
        cwd=ROOT, env=environment(gpus=True), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert _losses(tmp_path / "run", "loss") == pytest.approx([exact], rel=1e-4)
