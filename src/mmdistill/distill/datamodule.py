"""Training and validation data of a distillation."""

from typing import Any

import pytorch_lightning as pl

from mmdistill.builders import make_clip_dataset, make_clip_loader
from mmdistill.config import ConfigError, DistillConfig
from mmdistill.data.dataloader import ClipLoader
from mmdistill.data.sampler import EpochBatchSampler, batch_order_mismatch
from mmdistill.distill.module import position
from mmdistill.distill.validation import make_validation
from mmdistill.distributed.process import Process


class ResumableLoader(ClipLoader):
    """Tells Lightning that it can resume inside an epoch: `DistillData` puts its sampler in place."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing of its own."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to do."""


class DistillData(pl.LightningDataModule):
    """The training clips in their fixed order; its place in it, (epoch, batch), is part of every checkpoint."""

    def __init__(self, config: DistillConfig, modalities: tuple[str, ...], process: Process) -> None:
        super().__init__()
        self.validation = make_validation(config, process)
        self.dataset = make_clip_dataset(config.data_module, modalities, training=True, seed=config.seed)
        self.sampler = EpochBatchSampler(
            len(self.dataset),
            batch_size=config.batch_size,
            seed=config.seed,
            rank=process.rank,
            world_size=process.world_size,
        )
        if len(self.sampler) == 0:
            raise ConfigError(
                f"{len(self.dataset)} clips are fewer than one batch of batch_size={config.batch_size}; lower it"
            )
        # what decides which clips the batches before a place held
        self._order = {
            "seed": config.seed,
            "clips": len(self.dataset),
            "global_batch": config.batch_size * process.world_size,
            "accumulate": config.trainer.accumulate_grad_batches,
        }
        self._config, self._pin = config, process.device.type == "cuda"
        self._start: tuple[int, int] | None = None

    def state_dict(self) -> dict[str, Any]:
        """The place in the order, and what the order depends on."""
        epoch, batch = position(self.trainer) if self.trainer else (0, 0)
        return {**self._order, "epoch": epoch, "batch": batch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on at a place.

        Raises:
            ConfigError: it is inside an epoch, and this run's batches are others.
        """
        self._start = (int(state_dict["epoch"]), int(state_dict["batch"]))
        other = {k: (state_dict[k], v) for k, v in self._order.items() if state_dict[k] != v}
        if self._start[1] and other:
            raise ConfigError(batch_order_mismatch(self._start[0], other))

    def train_dataloader(self) -> Any:
        """The loader, at the place where the run starts: its workers fetch as soon as it is made."""
        done = self.trainer.fit_loop.epoch_progress.current.processed if self.trainer else 0
        self.sampler.set_state(*(self._start or (done, 0)))  # a file without a place was written at an epoch's end
        return make_clip_loader(
            self.dataset,
            num_workers=self._config.num_workers,
            pin_memory=self._pin,
            batch_sampler=self.sampler,
            timeout_s=self._config.loader_timeout_s,
            loader_class=ResumableLoader,
        )

    def val_dataloader(self) -> Any:
        """The clips of the validation's episodes; nothing where there is none."""
        return self.validation.dataloader() if self.validation else []
