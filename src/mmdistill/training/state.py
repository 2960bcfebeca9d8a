"""The position and the sums of a training, which are saved with its weights."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class TrainingState:
    """What a training continues from, apart from weights and optimizer; equal on all ranks and saved as a whole.

    Attributes:
        epoch, batch: current epoch, and batches done in it.
        step: optimizer steps done.
        sums: by name, the sum of each loss of the current epoch times the clips of its batch, over all ranks.
        num_clips: clips in `sums`; those of batches with a finite loss.
        losses, validations: mean loss and ``val_top1_action`` of the existing checkpoints of this training at the
            end of an epoch, by absolute path.
        skipped_steps, overflow_steps: see `NonFiniteGuard`; of the whole training.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    num_clips: int = 0
    losses: dict[str, float] = field(default_factory=dict)
    validations: dict[str, float] = field(default_factory=dict)
    skipped_steps: int = 0
    overflow_steps: int = 0

    @property
    def means(self) -> dict[str, float]:
        """Mean losses of the epoch so far; empty before the first finite batch."""
        return {name: total / self.num_clips for name, total in self.sums.items()}

    def add_batch(self, losses: Mapping[str, float], num_clips: int) -> None:
        """Count a batch of `num_clips` over all ranks. `losses` are means over its clips; empty: not finite."""
        self.batch += 1
        self.num_clips += num_clips if losses else 0
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + value * num_clips

    def start_epoch(self, epoch: int) -> None:
        """Move to the first batch of an epoch."""
        self.epoch, self.batch, self.sums, self.num_clips = epoch, 0, {}, 0

    def forget_checkpoints(self, paths: Iterable[str]) -> None:
        """Remove the loss and the validation of checkpoints that no longer exist."""
        for path in paths:
            self.losses.pop(path, None)
            self.validations.pop(path, None)

    def state_dict(self) -> dict[str, Any]:
        """A copy of all attributes."""
        return asdict(self)

    def load_state_dict(self, stored: Mapping[str, Any]) -> None:
        """Set the attributes that `stored` contains."""
        vars(self).update({name: stored[name] for name in self.state_dict() if name in stored})
