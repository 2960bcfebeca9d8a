"""The policy for a loss or gradient that is not finite."""

import pytest
import torch

from mmdistill.training.nonfinite import NonFiniteError, NonFiniteGuard, grad_norm, skip_optimizer_step, zero_loss

NAN, INF = float("nan"), float("inf")


def test_finite_loss_passes() -> None:
    assert NonFiniteGuard("raise", 0, print).check_loss(torch.tensor(1.0), 1.0, ["a"], "step 0")


def test_raise_names_step_and_clips() -> None:
    guard = NonFiniteGuard("raise", 0, print)
    with pytest.raises(NonFiniteError, match=r"loss is nan at step 3; .*Clips: a, b\. .*trainer\.on_nonfinite=skip"):
        guard.check_loss(torch.tensor(NAN), NAN, ["a", "b"], "step 3")
    with pytest.raises(NonFiniteError, match="gradient is not finite at step 4"):
        guard.skip_step("step 4", reason="gradient is not finite")
    assert guard.skipped_steps == 0


def test_only_clips_of_nonfinite_ranks_are_named() -> None:
    """The mean is NaN because of another rank; this rank's loss is finite."""
    messages: list[str] = []
    guard = NonFiniteGuard("skip", 1, messages.append)
    assert not guard.check_loss(torch.tensor(1.0), NAN, ["a", "b"], "step 1")
    guard.skip_step("step 1")
    assert messages == ["skipped step 1 of at most 1: loss is not finite at step 1."]


def test_skip_counts_until_the_limit() -> None:
    messages: list[str] = []
    guard = NonFiniteGuard("skip", 1, messages.append)
    assert not guard.check_loss(torch.tensor(INF), INF, ["a", "b"], "step 1")
    guard.skip_step("step 1")
    assert messages == ["skipped step 1 of at most 1: loss is not finite at step 1. Clips: a, b."]
    with pytest.raises(NonFiniteError, match=r"trainer\.max_skipped_steps=1 allows no more") as raised:
        guard.skip_step("step 2", reason="gradient is not finite")
    assert "Clips" not in str(raised.value)  # those of step 1 were reported
    assert guard.skipped_steps == 2


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
