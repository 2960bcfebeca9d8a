"""Options for speed, memory and averaging: layer decay, EMA, accumulation, compile, teacher cache."""

import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mmdistill.checkpoint import CheckpointError, load_encoder, load_torch, save_torch
from mmdistill.config import (
    ConfigError,
    DistillConfig,
    modality_specs,
    to_plain,
)
from mmdistill.distill import trainer as run
from mmdistill.distill.module import MMDistill
from mmdistill.distill.teacher_cache import TeacherCache
from mmdistill.models.videomae import Encoder, EncoderConfig
from tests.configs import distill_config, pretrain_config
from tests.tiny_data import MODEL, make_tiny, overrides


def _config(folder: Path, *more: str) -> DistillConfig:
    teachers = ",".join(f"{folder / m}.ckpt" for m in ("rgb", "flow", "skeleton"))
    fixed = [f"trainer.ckpt_path=[{teachers}]", "accelerator=cpu", "test=False", "trainer.lr=0.3"]
    return distill_config(*overrides(folder / "data"), *fixed, *more)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny data, 72 clips, and three teachers with random weights, of different widths."""
    root = tmp_path_factory.mktemp("cost")
    make_tiny(root / "data")
    specs = modality_specs(_config(root).data_module)
    for number, (name, spec) in enumerate(specs.items()):
        torch.manual_seed(number)
        size, width = 32 // spec.input_stride, 16 * (1 + (name == "flow"))
        geometry = EncoderConfig(spec.channels, 4, size, size, 8 // spec.input_stride, 2, width, 2, 2, width // 2, 32)
        state = {f"encoder.{k}": v for k, v in Encoder(geometry).state_dict().items()}
        meta = {"kind": "pretrain", "modality": name, "encoders": {"encoder": to_plain(geometry)}}
        save_torch({"state_dict": state, "mmdistill": meta}, root / f"{name}.ckpt")
    return root


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What each training step saw: epoch, clips, masks, loss, and the student's weights after it."""
    records: list[dict[str, Any]] = []
    end = MMDistill.on_train_batch_end

    def note(self: MMDistill, outputs: Any, batch: Any, index: int) -> None:
        end(self, outputs, batch, index)
        weights = torch.cat([p.detach().flatten() for p in self.student_rgb.parameters()])
        records.append(
            {"epoch": self.current_epoch, "clips": batch["index"].tolist(), "visible": batch["visible"].clone(),
             "loss": float(outputs["loss"].detach()), "weights": weights.clone(), "step": self.global_step}
        )  # fmt: skip

    monkeypatch.setattr(MMDistill, "on_train_batch_end", note)
    return records


def _state(run_dir: Path, part: str) -> dict[str, torch.Tensor]:
    state = load_torch(run_dir / "checkpoints" / "last.ckpt")["state_dict"]
    return {k.removeprefix(part + "."): v for k, v in state.items() if k.startswith(part + ".")}


# The student's average ------------------------------------------------------------------------------------------------


def test_ema_averages_the_student_without_changing_it(folder: Path, steps: list, tmp_path: Path) -> None:
    config = _config(folder, "trainer.ema=0.7", "trainer.accumulate_grad_batches=2")
    run.distill(config, tmp_path / "ema")
    averaged = list(steps)
    steps.clear()
    run.distill(_config(folder, "trainer.accumulate_grad_batches=2"), tmp_path / "plain")
    assert [s["loss"] for s in averaged] == [s["loss"] for s in steps]
    assert torch.equal(averaged[-1]["weights"], steps[-1]["weights"])
    start = load_encoder(folder / "rgb.ckpt")
    expected = torch.cat([p.detach().flatten() for p in start.parameters()])
    after = {s["step"]: s["weights"] for s in averaged}  # the last batch of each step
    for step in sorted(after)[:]:
        if step:
            expected = 0.7 * expected + 0.3 * after[step]
    saved = load_encoder(tmp_path / "ema" / "checkpoints" / "last.ckpt", part="student_ema_rgb")
    found = torch.cat([p.detach().flatten() for p in saved.parameters()])
    assert torch.allclose(found, expected, atol=1e-6)
    assert not torch.allclose(found, averaged[-1]["weights"], atol=1e-4)
    assert not _state(tmp_path / "plain", "student_ema_rgb")


def test_ema_resume_is_bit_identical_and_rejects_another_setting(folder: Path, tmp_path: Path) -> None:
    options = ["trainer.ema=0.7", "trainer.save_ckpt_freq=1"]
    run.distill(_config(folder, *options), tmp_path / "full")
    first = next((tmp_path / "full" / "checkpoints").glob("epoch=00-*"))
    run.distill(_config(folder, *options, f"resume='{first}'"), tmp_path / "rest")
    for part in ("student_rgb", "student_ema_rgb"):
        a, b = (_state(tmp_path / name, part) for name in ("full", "rest"))
        assert a
        assert all(torch.equal(a[k], b[k]) for k in a)
    with pytest.raises(CheckpointError, match=r"student_ema_rgb.*trainer\.ema=null"):
        run.distill(_config(folder, f"resume='{first}'"), tmp_path / "other")


# Accumulation, clipping, activation checkpointing ---------------------------------------------------------------------


def test_two_half_batches_are_one_batch(folder: Path, steps: list, tmp_path: Path) -> None:
    run.distill(_config(folder, "trainer.epochs=1"), tmp_path / "full")
    full = list(steps)
    steps.clear()
    run.distill(
        _config(folder, "trainer.epochs=1", "batch_size=4", "trainer.accumulate_grad_batches=2"), tmp_path / "halves"
    )
    assert full[0]["clips"] == steps[0]["clips"] + steps[1]["clips"]
    assert len(steps) == 2 * len(full)
    assert torch.allclose(full[-1]["weights"], steps[-1]["weights"], atol=2e-4)


def test_clip_grad_bounds_the_norm_at_the_optimizer_step(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    norms: list[float] = []
    step = torch.optim.AdamW.step

    def note(self: torch.optim.AdamW, closure: Any = None) -> Any:
        loss = closure() if closure else None
        grads = [p.grad.norm() for g in self.param_groups for p in g["params"] if p.grad is not None]
        norms.append(float(torch.stack(grads).norm()))
        step(self)
        return loss

    monkeypatch.setattr(torch.optim.AdamW, "step", note)
    run.distill(_config(folder, "trainer.epochs=1"), tmp_path / "free")
    assert max(norms) > 0.02
    norms.clear()
    run.distill(_config(folder, "trainer.epochs=1", "trainer.clip_grad=0.01"), tmp_path / "clipped")
    assert norms
    assert max(norms) == pytest.approx(0.01, rel=1e-3)


def test_activation_checkpointing_recomputes_blocks_and_keeps_gradients() -> None:
    found, calls = [], []
    for is_enabled in (False, True):
        torch.manual_seed(0)
        encoder = Encoder(EncoderConfig(3, 4, 16, 16, 8, 2, 16, 2, 2, 8, 32)).train()
        encoder.set_activation_checkpointing(is_enabled)
        count = [0]
        encoder.blocks[0].register_forward_pre_hook(lambda *_, c=count: c.__setitem__(0, c[0] + 1))
        encoder(torch.ones(1, 3, 4, 16, 16)).square().sum().backward()
        found.append([p.grad.clone() for p in encoder.parameters()])
        calls.append(count[0])
    assert calls == [1, 2]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# Compiling ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """What was compiled; by tracing alone, without a compiler, which would take a minute each."""
    modules: list[nn.Module] = []
    original = nn.Module.compile

    def note(self: nn.Module, **options: Any) -> None:
        modules.append(self)
        original(self, **options, backend="eager")

    monkeypatch.setattr(nn.Module, "compile", note)
    return modules


def test_compile_covers_student_and_teachers(folder: Path, steps: list, compiled: list, tmp_path: Path) -> None:
    from torch._dynamo.utils import counters

    run.distill(_config(folder, "trainer.epochs=1"), tmp_path / "plain")
    plain = [s["loss"] for s in steps]
    assert not compiled
    steps.clear()
    counters.clear()
    run.distill(_config(folder, "trainer.epochs=1", "compile=true"), tmp_path / "compiled")
    assert len(compiled) == 4
    assert counters["stats"]["unique_graphs"] >= 4
    assert not counters["graph_break"]
    assert [s["loss"] for s in steps] == pytest.approx(plain, rel=1e-5)
    assert _state(tmp_path / "compiled", "student_rgb").keys() == _state(tmp_path / "plain", "student_rgb").keys()


def test_pretraining_compiles_encoder_and_decoder(folder: Path, compiled: list, tmp_path: Path) -> None:
    from mmdistill.pretrain import pretrain

    names = []
    for is_enabled in (False, True):
        arguments = ["modality=rgb", *overrides(folder / "data"), *MODEL, "trainer.epochs=1", f"compile={is_enabled}"]
        names.append(pretrain(pretrain_config(*arguments), tmp_path / str(is_enabled)).name)
    encoder, decoder = compiled
    assert isinstance(encoder, Encoder)
    assert not isinstance(decoder, Encoder)
    assert names[0] == names[1]  # the loss to four digits
    with pytest.raises(ConfigError, match="stage 3"):
        pretrain_config("modality=rgb", "compile=true", "strategy=deepspeed_stage_3")


def test_inductor_agrees_with_eager() -> None:
    """The real compiler, forward and backward, on one small block."""
    torch.manual_seed(0)
    encoder = Encoder(EncoderConfig(3, 4, 16, 16, 8, 2, 16, 1, 2, 8, 32))
    x, visible = torch.randn(2, 3, 4, 16, 16), torch.tensor([[0, 3, 5], [1, 2, 7]])
    encoder.embed(x, visible).sum().backward()
    eager = [p.grad.clone() for p in encoder.parameters()]
    names = list(encoder.state_dict())
    encoder.zero_grad()
    encoder.compile(dynamic=False)
    encoder.embed(x, visible).sum().backward()
    assert list(encoder.state_dict()) == names
    for a, p in zip(eager, encoder.parameters(), strict=True):
        assert torch.allclose(a, p.grad, atol=1e-4)


# The teacher cache ----------------------------------------------------------------------------------------------------


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, list[int]]]:
    """Clips read of each modality, per epoch; the loader runs in this process."""
    counts: dict[str, list[int]] = {}
    make = run._make_trainer

    def count_reads(config: Any, training: Any, callbacks: Any) -> Any:
        trainer = make(config, training, callbacks)
        for name, reader in training.data.dataset.readers.items():
            counts[name] = [0] * config.trainer.epochs

            def read(*args: Any, original: Any = reader.read, row: list[int] = counts[name]) -> Any:
                row[trainer.current_epoch] += 1
                return original(*args)

            reader.read = read
        return trainer

    monkeypatch.setattr(run, "_make_trainer", count_reads)
    return counts


CACHED = ["trainer.cache_teacher_epochs=2", "trainer.epochs=5", "trainer.save_ckpt_freq=1", "batch_size=7"]


def _uncached(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same masks, but teachers run in every epoch."""
    make = run._make_trainer

    def decode_all(config: Any, training: Any, callbacks: Any) -> Any:
        assert training.data.dataset.always_decoded == ("rgb",)
        training.data.dataset.always_decoded = ("rgb", "flow", "skeleton")
        return make(config, training, callbacks)

    monkeypatch.setattr(run, "_make_trainer", decode_all)
    monkeypatch.setattr(TeacherCache, "is_cached", lambda self, epoch: False)


def test_cached_features_give_the_same_losses_without_reading_flow(
    folder: Path, steps: list, reads: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.distill(_config(folder, *CACHED), tmp_path / "cached")
    cached = list(steps)
    assert reads["rgb"][:2] == reads["flow"][:2] == reads["skeleton"][:2] == [70, 70]
    assert reads["flow"][2:] == reads["skeleton"][2:] == [2, 2, 0]  # the two clips that each draw's epoch dropped
    assert reads["rgb"][2:] == [72, 72, 70]
    steps.clear()
    _uncached(monkeypatch)
    run.distill(_config(folder, *CACHED), tmp_path / "uncached")
    assert reads["flow"] == [70] * 5
    assert [s["clips"] for s in cached] == [s["clips"] for s in steps]
    assert all(torch.equal(a["visible"], b["visible"]) for a, b in zip(cached, steps, strict=True))
    assert [s["loss"] for s in cached] == pytest.approx([s["loss"] for s in steps], rel=1e-5)
    assert torch.allclose(cached[-1]["weights"], steps[-1]["weights"], atol=1e-4)
    by_epoch: list[dict[int, torch.Tensor]] = [{} for _ in range(5)]
    for s in cached:
        by_epoch[s["epoch"]].update(zip(s["clips"], s["visible"], strict=True))
    both = by_epoch[0].keys() & by_epoch[2].keys()
    assert all(torch.equal(by_epoch[0][c], by_epoch[2][c]) for c in both)
    assert not all(torch.equal(by_epoch[0][c], by_epoch[1][c]) for c in by_epoch[0].keys() & by_epoch[1].keys())


def test_cache_is_filled_under_bf16_by_the_main_process(folder: Path, steps: list, tmp_path: Path) -> None:
    """Autocast cannot collate all dtypes of a sample."""
    run.distill(_config(folder, *CACHED, "precision=bf16", "num_workers=0"), tmp_path / "bf16")
    assert all(math.isfinite(s["loss"]) for s in steps)


def test_resume_uses_or_recomputes_the_cache(folder: Path, steps: list, reads: dict, tmp_path: Path) -> None:
    run.distill(_config(folder, *CACHED), tmp_path / "full")
    final = steps[-1]["weights"]
    source = next((tmp_path / "full" / "checkpoints").glob("epoch=02-*"))
    kept, lost = tmp_path / "kept", tmp_path / "lost"
    shutil.copytree(tmp_path / "full" / "teacher_features", kept / "teacher_features")
    for run_dir, computed in ((kept, 0), (lost, 72)):
        run.distill(_config(folder, *CACHED, f"resume='{source}'"), run_dir)
        assert reads["flow"][3:] == [computed, computed]
        assert torch.allclose(steps[-1]["weights"], final, atol=1e-4)
    assert torch.equal(_weights(kept), _weights(tmp_path / "full"))


def _weights(run_dir: Path) -> torch.Tensor:
    return torch.cat([v.flatten() for v in _state(run_dir, "student_rgb").values()])


def test_another_mask_ratio_gets_another_cache(folder: Path, reads: dict, tmp_path: Path) -> None:
    options = ["trainer.cache_teacher_epochs=1", "trainer.epochs=1"]
    run.distill(_config(folder, *options), tmp_path)
    shutil.rmtree(tmp_path / "checkpoints")
    run.distill(_config(folder, *options, "data_module.mask_ratio=0.5"), tmp_path)
    assert len(list((tmp_path / "teacher_features").iterdir())) == 2
