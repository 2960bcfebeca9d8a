"""What happens when a loss or a gradient is not finite: one policy, on which all ranks agree.

The mean loss over all ranks is checked before the backward pass. A NaN on one rank is therefore known to all ranks
before any weight changes. A gradient can overflow although the loss is finite: its norm is checked before the optimizer
step.

A skipped step changes no weight, no moment and no average. The schedule and the step count advance. Under
``precision=16`` an overflow is how the loss scale is found: such steps are counted as ``overflow_steps`` and do not
count towards ``trainer.max_skipped_steps``, unless the scale is already 1.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from mmdistill.distributed.collectives import all_gather_objects
from mmdistill.errors import MMDistillError, format_count

MIN_LOSS_SCALE = 1.0  # a gradient that overflows at this loss scale is not finite by itself


class NonFiniteError(MMDistillError, FloatingPointError):
    """A loss or gradient that is not finite. The message names step and clips; the weights are as before the step."""

    raised_on_all_ranks = True


class NonFiniteGuard:
    """The policy of one run.

    Args:
        on_nonfinite: ``raise``, or ``skip`` the step.
        max_skipped_steps: steps that may be skipped before a further one raises too.
        rank_zero_info: prints a line on rank 0.

    Attributes:
        skipped_steps: steps skipped so far. Stored in checkpoints, because the limit is that of the whole training.
    """

    def __init__(self, on_nonfinite: str, max_skipped_steps: int, rank_zero_info: Callable[[str], None]) -> None:
        self.on_nonfinite, self.max_skipped_steps = on_nonfinite, max_skipped_steps
        self.rank_zero_info = rank_zero_info
        self.skipped_steps = 0
        self._clips: list[str] = []  # clips of this step whose loss is not finite

    def check_loss(self, loss: torch.Tensor, mean: float, clips: Sequence[str], step_name: str) -> bool:
        """Whether the loss of a batch is finite on all ranks. Collective; all ranks pass the same `mean`.

        Args:
            loss: this rank's loss.
            mean: the mean loss over all ranks.
            clips: ids of this rank's clips.
            step_name: step and epoch, for messages.

        Returns:
            False if it is not finite and the policy is ``skip``; then call `skip_step` once per skipped step.

        Raises:
            NonFiniteError: the same on every rank; it names the clips of the ranks whose loss is not finite.
        """
        if math.isfinite(mean):
            return True
        is_finite = bool(torch.isfinite(loss))
        by_rank = all_gather_objects([] if is_finite else list(clips))
        nonfinite_clips = [clip for rank_clips in by_rank for clip in rank_clips]
        self._clips += nonfinite_clips
        if self.on_nonfinite == "raise":
            raise NonFiniteError(
                f"loss is {mean} at {step_name}; weights were not changed. Clips: {', '.join(nonfinite_clips)}. Lower "
                "trainer.lr, set trainer.clip_grad, check these clips, or set trainer.on_nonfinite=skip"
            )
        return False

    def skip_step(self, step_name: str, *, reason: str = "loss is not finite") -> None:
        """Count and log a skipped step.

        Raises:
            NonFiniteError: the policy is ``raise``, or more than `max_skipped_steps` are skipped.
        """
        clips, self._clips = self._clips, []
        clip_list = f" Clips: {', '.join(clips)}." if clips else ""
        if self.on_nonfinite == "raise":
            raise NonFiniteError(
                f"{reason} at {step_name}; weights were not changed. Lower trainer.lr or set trainer.clip_grad"
            )
        self.skipped_steps += 1
        if self.skipped_steps > self.max_skipped_steps:
            raise NonFiniteError(
                f"{reason} at {step_name}: {format_count(self.skipped_steps, 'step')} skipped, "
                f"trainer.max_skipped_steps={self.max_skipped_steps} allows no more; weights were not changed."
                f"{clip_list} Lower trainer.lr or check these clips"
            )
        count = f"{self.skipped_steps} of at most {self.max_skipped_steps}"
        self.rank_zero_info(f"skipped step {count}: {reason} at {step_name}.{clip_list}")


def zero_loss(parameters: Sequence[torch.Tensor]) -> torch.Tensor:
    """A loss whose gradient is exactly zero for every parameter: all ranks run the same backward pass."""
    return torch.stack([(p * 0).sum() for p in parameters if p.requires_grad]).sum()


@contextmanager
def skip_optimizer_step(optimizer: Any) -> Iterator[None]:
    """Turn `optimizer.step` into a no-op; of a DeepSpeed optimizer, the step of the optimizer that it wraps.

    Zero gradients would not do: Adam's moments would decay and its step count would increase.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    inner.step = lambda *_, **__: None  # shadows the method of the class
    try:
        yield
    finally:
        del inner.step


def grad_norm(parameters: Sequence[torch.Tensor]) -> float:
    """Norm of all gradients together; 0 if there is none."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    return float(torch.nn.utils.get_total_norm(gradients)) if gradients else 0.0
