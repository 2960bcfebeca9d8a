"""What happens when a loss or a gradient is not finite: one policy, on which all ranks agree.

The mean loss over all ranks is looked at before the backward pass, so NaN on one rank is known to all and no weight has
been touched. A gradient can overflow under a finite loss: its norm is looked at before the optimiser's step.

A skipped step changes neither weights nor moments nor averages; the schedule and the count of steps go on. Under
``precision=16`` an overflow is how the loss scale is found: such steps are counted apart, as ``overflow_steps``, and
cost none of the budget, unless the scale is at 1 already.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from mmdistill.distributed.collectives import all_gather_objects
from mmdistill.errors import MMDistillError

POLICIES = ("raise", "skip")
MIN_LOSS_SCALE = 1.0  # a gradient that overflows under this loss scale is not finite by itself


class NonFiniteError(MMDistillError, FloatingPointError):
    """A loss or gradient that is not finite; the message names step and clips. The weights are as before the step."""


class NonFiniteGuard:
    """The policy of one run.

    Args:
        policy: ``raise``, or ``skip`` the step.
        budget: steps that may be skipped before that is an error too.
        say: prints a line, once for all ranks.

    Attributes:
        skipped: steps skipped so far; to be kept with a checkpoint, for the budget is the whole training's.
    """

    def __init__(self, policy: str, budget: int, say: Callable[[str], None]) -> None:
        self.policy, self.budget, self.say = policy, budget, say
        self.skipped = 0
        self.clips: list[str] = []  # of the losses in this step that were not finite

    def check_loss(self, own: torch.Tensor, mean: float, clips: Sequence[str], where: str) -> bool:
        """Whether the loss of a batch may be used. All ranks call this with the same `mean`.

        Args:
            own: this rank's loss.
            mean: the average over all ranks.
            clips: ids of this rank's clips.
            where: step and epoch, for messages.

        Returns:
            False if it is not finite and the policy is to go on without it; call `skip` once per skipped step.

        Raises:
            NonFiniteError: the same on every rank, naming the clips of the ranks whose loss is not finite.
        """
        if math.isfinite(mean):
            return True
        finite = bool(torch.isfinite(own))
        named = [name for names in all_gather_objects(None if finite else list(clips)) if names for name in names]
        self.clips += named
        if self.policy == "raise":
            raise NonFiniteError(
                f"loss is {mean} at {where}; weights were not changed. Clips: {', '.join(named)}. Lower trainer.lr, "
                "set trainer.clip_grad, look at these clips, or set trainer.on_nonfinite=skip"
            )
        return False

    def skip(self, where: str, *, reason: str = "loss is not finite") -> None:
        """Count a skipped step and say so.

        Raises:
            NonFiniteError: the policy is to raise, or the budget is used up.
        """
        clips, self.clips = self.clips, []
        names = f" Clips: {', '.join(clips)}." if clips else ""
        if self.policy == "raise":
            raise NonFiniteError(
                f"{reason} at {where}; weights were not changed. Lower trainer.lr or set trainer.clip_grad"
            )
        self.skipped += 1
        if self.skipped > self.budget:
            raise NonFiniteError(
                f"{reason} at {where}: {self.skipped} steps skipped, trainer.max_skipped_steps={self.budget} allows no "
                f"more; weights were not changed.{names} Lower trainer.lr or look at these clips"
            )
        self.say(f"skipped step {self.skipped} of at most {self.budget}: {reason} at {where}.{names}")


def zero_loss(parameters: Sequence[torch.Tensor]) -> torch.Tensor:
    """A loss whose gradient is exactly zero for every parameter, so that ranks stay in step through a backward pass."""
    return torch.stack([(p * 0).sum() for p in parameters if p.requires_grad]).sum()


@contextmanager
def frozen(optimizer: Any) -> Iterator[None]:
    """While open, a step of the optimiser, or of the one that DeepSpeed has wrapped, changes nothing.

    A step with zero gradients would let Adam's moments fade, and count.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    inner.step = lambda *_, **__: None  # shadows the method of the class
    try:
        yield
    finally:
        del inner.step


def grad_norm(parameters: Sequence[torch.Tensor]) -> float:
    """Norm of all gradients together; 0 where there is none."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    return float(torch.nn.utils.get_total_norm(gradients)) if gradients else 0.0
