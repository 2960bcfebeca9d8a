"""What happens when a loss or a gradient is not finite: one policy, on which all ranks agree.

The mean loss over all ranks is checked before the backward pass. A NaN on one rank is therefore known to all ranks
before any weight changes. A gradient can overflow although the loss is finite: its norm is checked before the optimizer
step or, where only the optimizer knows it, after the step that the optimizer has skipped.

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
from mmdistill.errors import MMDistillError, format_count, format_first, quote_name
from mmdistill.training.state import TrainingState

MIN_LOSS_SCALE = 1.0  # a gradient that overflows at this loss scale is not finite by itself
_MAX_LISTED = 4  # clips named in an error


class NonFiniteError(MMDistillError, FloatingPointError):
    """A loss or gradient that is not finite. The message names step and clips; the weights are as before the step."""

    raised_on_all_ranks = True


class NonFiniteGuard:
    """The policy of one training, which calls `before_backward`, `before_step` and, where needed, `after_step`.

    Args:
        on_nonfinite: ``raise``, or ``skip`` the step.
        max_skipped_steps: steps that may be skipped in the whole training before a further one raises too.
        state: position, and the numbers of skipped and overflown steps.
        clip_id: the id of a clip of the dataset by its number, for messages.
        log: prints a line on rank 0.

    Attributes:
        grad_norm: norm of the gradient of the last step, before clipping.
        was_skipped: whether the last step changed no weight.

    Raises:
        NonFiniteError: by each method, if the policy does not allow to skip the step; the same on every rank.
    """

    def __init__(
        self,
        on_nonfinite: str,
        max_skipped_steps: int,
        *,
        state: TrainingState,
        clip_id: Callable[[int], str],
        log: Callable[[str], None],
    ) -> None:
        self.on_nonfinite, self.max_skipped_steps = on_nonfinite, max_skipped_steps
        self.state, self.clip_id, self.log = state, clip_id, log
        self.grad_norm, self.was_skipped = 0.0, False
        self._num_finite_batches = 0  # of this step
        self._clips: list[str] = []  # clips of this step whose loss is not finite

    def before_backward(self, loss: torch.Tensor, mean: float, index: torch.Tensor, *, is_first: bool) -> bool:
        """Whether the loss of a batch is finite on all ranks. If not, run the backward pass on `zero_loss`. Collective.

        Args:
            loss: this rank's loss.
            mean: the mean loss over all ranks, the same on all ranks.
            index: numbers of this rank's clips (B,).
            is_first: whether the batch is the first one of its optimizer step.
        """
        if is_first:
            self._num_finite_batches, self._clips = 0, []
        if math.isfinite(mean):
            self._num_finite_batches += 1
            return True
        own_clips = [] if bool(torch.isfinite(loss)) else [self.clip_id(i) for i in index.tolist()]
        clips = [clip for rank_clips in all_gather_objects(own_clips) for clip in rank_clips]
        self._clips += clips
        if self.on_nonfinite == "raise":
            raise NonFiniteError(
                f"loss is {mean} at {self._step_name}; weights were not changed. Lower trainer.lr, set "
                "trainer.clip_grad, check the clips of the step, or set trainer.on_nonfinite=skip. Clips: "
                f"{_first_names(clips)}"
            )
        return False

    def before_step(self, grad_norm: float | None = None, loss_scale: float | None = None) -> bool:
        """Whether the optimizer step must be skipped.

        Args:
            grad_norm: None if only the optimizer knows it; then call `after_step`.
            loss_scale: of a scaler that skips a step with a gradient that is not finite by itself.
        """
        self.was_skipped = False
        if not self._num_finite_batches:
            self._skip_step("loss is not finite")
        elif grad_norm is not None:
            self._check_gradient(grad_norm, not math.isfinite(grad_norm), loss_scale)
        return self.was_skipped

    def after_step(self, grad_norm: float | None, *, was_skipped: bool, loss_scale: float | None = None) -> None:
        """Handle the step of an optimizer that computes the norm, and skips a step whose norm is not finite."""
        if self._num_finite_batches:
            self._check_gradient(grad_norm or 0.0, was_skipped, loss_scale)

    def _check_gradient(self, grad_norm: float, is_nonfinite: bool, loss_scale: float | None) -> None:
        self.grad_norm, self.was_skipped = float(grad_norm), is_nonfinite
        if is_nonfinite:
            self.state.overflow_steps += loss_scale is not None
            if loss_scale is None or loss_scale <= MIN_LOSS_SCALE:
                self._skip_step("gradient is not finite")

    def _skip_step(self, reason: str) -> None:
        """Count and log a skipped step, or raise."""
        self.was_skipped, where = True, f"{reason} at {self._step_name}"
        if self.on_nonfinite == "raise":
            raise NonFiniteError(f"{where}; weights were not changed. Lower trainer.lr or set trainer.clip_grad")
        self.state.skipped_steps += 1
        skipped = self.state.skipped_steps
        if skipped > self.max_skipped_steps:
            raise NonFiniteError(
                f"{where}: {format_count(skipped, 'step')} skipped, trainer.max_skipped_steps={self.max_skipped_steps} "
                "allows no more; weights were not changed. Lower trainer.lr or check the clips of the step"
                + (f". Clips: {_first_names(self._clips)}" if self._clips else "")
            )
        clip_list = f" Clips: {', '.join(map(quote_name, self._clips))}." if self._clips else ""
        self.log(f"skipped step {skipped} of at most {self.max_skipped_steps}: {where}.{clip_list}")

    @property
    def _step_name(self) -> str:
        return f"step {self.state.step} (epoch {self.state.epoch})"


def _first_names(clips: Sequence[str]) -> str:
    return format_first([quote_name(clip) for clip in clips], _MAX_LISTED)


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
