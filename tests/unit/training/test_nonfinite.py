"""The policy for a loss or gradient that is not finite."""

from typing import Any

import pytest
import torch

from mmdistill.training.nonfinite import NonFiniteError, NonFiniteGuard, grad_norm, skip_optimizer_step, zero_loss
from mmdistill.training.state import TrainingState

NAN, INF = float("nan"), float("inf")
CLIPS = torch.tensor([0, 1])  # a and b


def _guard(on_nonfinite: str, max_skipped_steps: int = 0, messages: list[str] | None = None) -> NonFiniteGuard:
    return NonFiniteGuard(
        on_nonfinite, max_skipped_steps, state=TrainingState(step=3), clip_id="ab".__getitem__,
        log=([] if messages is None else messages).append,
    )  # fmt: skip


def _check(guard: NonFiniteGuard, loss: float = 1.0, mean: float | None = None, **options: Any) -> bool:
    mean = loss if mean is None else mean
    return guard.before_backward(torch.tensor(loss), mean, CLIPS, **{"is_first": True, **options})


def test_finite_step_passes() -> None:
    guard = _guard("raise")
    assert _check(guard)
    assert not guard.before_step(2.0)
    assert (guard.grad_norm, guard.was_skipped) == (2.0, False)


def test_raise_names_step_and_clips() -> None:
    guard = _guard("raise")
    with pytest.raises(NonFiniteError, match=r"loss is nan at step 3 .*trainer\.on_nonfinite=skip\. Clips: a, b$"):
        _check(guard, NAN)
    assert _check(guard)
    with pytest.raises(NonFiniteError, match="gradient is not finite at step 3"):
        guard.before_step(INF)
    assert guard.state.skipped_steps == 0


def test_an_error_names_the_first_clips_after_the_fix() -> None:
    """Names with blanks are quoted."""
    clips = ["a 1:000", "b", "c", "d", "e"]
    guard = NonFiniteGuard("raise", 0, state=TrainingState(step=3), clip_id=clips.__getitem__, log=[].append)
    with pytest.raises(NonFiniteError, match=r"on_nonfinite=skip\. Clips: 'a 1:000', b, c, d and 1 more$"):
        guard.before_backward(torch.tensor(NAN), NAN, torch.arange(5), is_first=True)
    guard = NonFiniteGuard("skip", 0, state=TrainingState(step=3), clip_id=clips.__getitem__, log=[].append)
    assert not guard.before_backward(torch.tensor(NAN), NAN, torch.arange(5), is_first=True)
    with pytest.raises(NonFiniteError, match=r"Lower trainer\.lr .*\. Clips: 'a 1:000', b, c, d and 1 more$"):
        guard.before_step(0.0)


def test_only_clips_of_nonfinite_ranks_are_named() -> None:
    """The mean is NaN because of another rank; this rank's loss is finite."""
    messages: list[str] = []
    guard = _guard("skip", 1, messages)
    assert not _check(guard, 1.0, mean=NAN)
    assert guard.before_step(0.0)
    assert messages == ["skipped step 1 of at most 1: loss is not finite at step 3 (epoch 0)."]


def test_skip_counts_until_the_limit() -> None:
    messages: list[str] = []
    guard = _guard("skip", 1, messages)
    assert not _check(guard, INF)
    assert guard.before_step(0.0)
    assert messages == ["skipped step 1 of at most 1: loss is not finite at step 3 (epoch 0). Clips: a, b."]
    assert _check(guard)
    with pytest.raises(NonFiniteError, match=r"trainer\.max_skipped_steps=1 allows no more") as raised:
        guard.before_step(INF)
    assert "Clips" not in str(raised.value)  # those of the step before were reported
    assert guard.state.skipped_steps == 2


def test_one_finite_batch_is_enough_for_a_step() -> None:
    guard = _guard("skip", 1)
    assert _check(guard)
    assert not _check(guard, NAN, is_first=False)
    assert not guard.before_step(1.0)
    assert not _check(guard, NAN)  # the first batch of the next step
    assert guard.before_step(1.0)


def test_step_that_the_optimizer_skips_is_counted_after_it() -> None:
    guard = _guard("skip", 1)
    assert _check(guard)
    assert not guard.before_step()
    guard.after_step(4.0, was_skipped=False)
    assert (guard.grad_norm, guard.was_skipped) == (4.0, False)
    assert not guard.before_step()
    guard.after_step(None, was_skipped=True)
    assert (guard.was_skipped, guard.state.skipped_steps) == (True, 1)
    assert not _check(guard, NAN)
    with pytest.raises(NonFiniteError):
        guard.before_step()


@pytest.mark.parametrize("is_after", [False, True])
def test_overflow_is_counted_separately_until_the_scale_is_1(is_after: bool) -> None:
    guard = _guard("raise")
    assert _check(guard)

    def step(loss_scale: float) -> None:
        if is_after:
            assert not guard.before_step()
            guard.after_step(INF, was_skipped=True, loss_scale=loss_scale)
        else:
            assert guard.before_step(INF, loss_scale)

    step(2.0)
    assert (guard.was_skipped, guard.state.skipped_steps, guard.state.overflow_steps) == (True, 0, 1)
    with pytest.raises(NonFiniteError, match="gradient is not finite"):
        step(1.0)


def test_zero_loss_has_zero_gradients() -> None:
    parameters = [torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(3), requires_grad=False)]
    zero_loss(parameters).backward()
    assert parameters[0].grad is not None
    assert not parameters[0].grad.any()
    assert parameters[1].grad is None


@pytest.mark.parametrize("is_wrapped", [False, True])
def test_skipped_optimizer_step_changes_no_state(is_wrapped: bool) -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    inner = torch.optim.AdamW([parameter], lr=1.0)
    wrapper = type("Wrapper", (), {"optimizer": inner, "step": lambda self: self.optimizer.step()})()
    optimizer = wrapper if is_wrapped else inner
    parameter.grad = torch.ones(2)
    with skip_optimizer_step(optimizer):
        optimizer.step()
    assert torch.equal(parameter, torch.ones(2))
    assert not inner.state
    optimizer.step()
    assert (parameter < 1).all()


def test_grad_norm() -> None:
    a, b, c = (torch.nn.Parameter(torch.zeros(1)) for _ in range(3))
    assert grad_norm([a, b]) == 0
    a.grad, b.grad = torch.tensor([3.0]), torch.tensor([4.0])
    assert grad_norm([a, b, c]) == pytest.approx(5)
