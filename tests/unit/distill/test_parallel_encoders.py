"""Encoders side by side compute what they compute one after another."""

import threading
from collections.abc import Iterator

import pytest
import torch

from mmdistill.distill import module
from mmdistill.distill import parallel_encoders as beside
from mmdistill.distill.module import MMDistill
from mmdistill.distill.parallel_encoders import run_in_parallel
from mmdistill.modalities import get_modality
from mmdistill.models.videomae import Encoder, EncoderConfig
from mmdistill.ops import cpu
from mmdistill.training.optim import LearningRates


@pytest.fixture(params=[2, 8])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """So many of torch's threads, whatever the machine has."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_jobs_share_the_threads_and_keep_their_order(threads: int) -> None:
    together = threading.Barrier(2, timeout=60)

    def job(number: int) -> torch.Tensor:
        if number < 2:
            together.wait()  # passed only if two of them run at once
        return torch.tensor([number, torch.get_num_threads(), torch.is_grad_enabled()])

    rows = torch.stack(run_in_parallel([lambda n=n: job(n) for n in range(4)]))
    assert rows[:, 0].tolist() == [0, 1, 2, 3]
    assert set(rows[:, 1].tolist()) == {threads // min(threads, 4)}
    assert rows[:, 2].all()
    assert torch.get_num_threads() == threads
    with torch.no_grad():
        assert not torch.stack(run_in_parallel([lambda: job(2), lambda: job(3)]))[:, 2].any()


def test_denormals_are_flushed_there_too(threads: int) -> None:
    torch.set_flush_denormal(False)  # threads begin with their creator's
    beside._pool.cache_clear()
    tiny = torch.full((4,), 1e-30)
    assert (tiny * 1e-12).any()
    assert not any(out.any() for out in run_in_parallel([lambda: tiny * 1e-12] * 4))


def test_threads_that_cannot_be_shared_out_are_not(monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    monkeypatch.setattr(beside, "_pool", None)
    assert len(run_in_parallel([lambda: torch.zeros(1)] * 3)) == 3


def test_an_error_comes_through(threads: int) -> None:
    def fail() -> torch.Tensor:
        raise ValueError("this one")

    with pytest.raises(ValueError, match="this one"):
        run_in_parallel([lambda: torch.zeros(1), fail])


def test_one_by_one_with_one_thread_and_under_autocast(monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    def refused(*_: int) -> None:
        raise AssertionError("threads were used")

    monkeypatch.setattr(beside, "_pool", refused)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert run_in_parallel([lambda: torch.zeros(2, 2) @ torch.zeros(2, 2)] * 2)[0].dtype == torch.bfloat16
    torch.set_num_threads(1)
    assert len(run_in_parallel([lambda: torch.zeros(1)] * 2)) == 2


def _module() -> MMDistill:
    torch.manual_seed(0)
    teachers = {
        m: Encoder(EncoderConfig(s.channels, 4, 32 // s.scale, 32 // s.scale, 8 // s.scale, 2, 16, 2, 2, 8, 32))
        for m, s in get_modality.items()
    }
    return MMDistill(
        teachers, get_modality, rates=LearningRates(1e-3, 0, 0), weight_decay=0.05, betas=(0.9, 0.95),
        warmup_steps=0, total_steps=1, meta={},
    ).train()  # fmt: skip


def _batch() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {
        "rgb": torch.randint(0, 256, (2, 4, 36, 40, 3), dtype=torch.uint8),
        "flow": torch.randn(2, 4, 2, 36, 40).half(),
        "skeleton": torch.rand(2, 4, 1, 17, 3) * 32,
        "visible": torch.stack([torch.randperm(32)[:8].sort().values for _ in range(2)]),
        "crop_box": torch.tensor([[0.0, 7, 32, 32, 0], [2, 1, 32, 32, 1]]),
        "index": torch.arange(2),
    }


def test_a_step_is_the_same_side_by_side(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[int] = []
    monkeypatch.setattr(module, "run_in_parallel", lambda jobs: used.append(len(jobs)) or run_in_parallel(jobs))
    found = []
    for most in (0, 16):
        monkeypatch.setattr(module, "MAX_TOKENS_FOR_THREADING", most)
        net = _module()
        losses = net.losses(_batch())
        torch.stack([loss for loss, _ in losses.values()]).sum().backward()
        assert all(p.grad is None for m in net.modalities for p in net.teacher(m).parameters())
        found.append(([v.detach() for pair in losses.values() for v in pair],
                      [p.grad for p in net.parameters() if p.grad is not None]))  # fmt: skip
    assert used == [4]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_recomputed_blocks_run_alone(monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    """The number of threads decides how long clips' attention is shared out: it must be the same both times."""
    monkeypatch.setattr(cpu, "SHORT_CLIP_TOKENS", 4)
    monkeypatch.setattr(cpu, "MAX_SAVED_PROBABILITIES", 0)
    monkeypatch.setattr(cpu, "MIN_CHUNK_QUERIES", 2)
    net = _module()
    net.student.checkpoint_activations = True
    torch.stack([loss for loss, _ in net.losses(_batch()).values()]).sum().backward()
    assert all(p.grad is not None for p in net.student.parameters())
