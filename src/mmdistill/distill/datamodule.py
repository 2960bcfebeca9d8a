"""Training and validation data of a distillation."""

from typing import Any

import pytorch_lightning as pl

from mmdistill.builders import make_clip_dataset, make_clip_loader
from mmdistill.config import ConfigError, DistillConfig
from mmdistill.data.dataloader import ClipLoader
from mmdistill.data.sampler import EpochBatchSampler, batch_order_mismatch
from mmdistill.distill.module import training_position
from mmdistill.distill.validation import make_validation
from mmdistill.distributed.process import Process
from mmdistill.errors import format_count
from mmdistill.training.compatibility import data_order, diff_settings, read_data_order


class ResumableLoader(ClipLoader):
    """A loader with the two methods that Lightning requires for a resume inside an epoch.

    They do nothing, because `DistillData` sets the sampler's position.
    """

    def state_dict(self) -> dict[str, Any]:
        """An empty dict."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Ignored."""


class DistillData(pl.LightningDataModule):
    """The training clips in their fixed order. The position in it, (epoch, batch), is part of every checkpoint."""

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
                f"{format_count(len(self.dataset), 'clip')} cannot fill one batch of "
                f"batch_size={config.batch_size}; lower it"
            )
        self._data_order = data_order(
            seed=config.seed,
            num_clips=len(self.dataset),
            global_batch=config.batch_size * process.world_size,
            accumulate_grad_batches=config.trainer.accumulate_grad_batches,
        )
        self._config, self._pin_memory = config, process.device.type == "cuda"
        self._start_position: tuple[int, int] | None = None

    def state_dict(self) -> dict[str, Any]:
        """The position, and the settings that decide the order."""
        epoch, batch = training_position(self.trainer) if self.trainer else (0, 0)
        return {**self._data_order, "epoch": epoch, "batch": batch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue at the stored position.

        Raises:
            ConfigError: it is inside an epoch whose batches differ from this run's.
        """
        self._start_position = (int(state_dict["epoch"]), int(state_dict["batch"]))
        difference = diff_settings(read_data_order(state_dict), self._data_order)
        if self._start_position[1] and difference:
            raise ConfigError(batch_order_mismatch(self._start_position[0], difference))

    def train_dataloader(self) -> Any:
        """The loader, at the position where the run starts: its workers start to read as soon as it is created."""
        fit_loop: Any = self.trainer.fit_loop if self.trainer else None
        epochs_done = fit_loop.epoch_progress.current.processed if fit_loop else 0
        # a checkpoint without a position was written at the end of an epoch
        self.sampler.set_state(*(self._start_position or (epochs_done, 0)))
        return make_clip_loader(
            self.dataset,
            num_workers=self._config.num_workers,
            pin_memory=self._pin_memory,
            batch_sampler=self.sampler,
            timeout_s=self._config.loader_timeout_s,
            loader_class=ResumableLoader,
        )

    def val_dataloader(self) -> Any:
        """The clips of the validation episodes; an empty list without validation."""
        return self.validation.dataloader() if self.validation else []
