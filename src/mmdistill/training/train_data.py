"""The training clips of a run: dataset, order and loader."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mmdistill.builders import make_clip_dataset, make_clip_loader, make_demo_data, make_source_dataset
from mmdistill.config import ConfigError, DistillConfig, PretrainConfig
from mmdistill.data.dataloader import ClipLoader
from mmdistill.data.dataset import ClipDataset
from mmdistill.data.joint import JointBatchSampler, JointDataset
from mmdistill.data.sampler import EpochBatchSampler
from mmdistill.distributed.collectives import barrier
from mmdistill.distributed.process import Process
from mmdistill.errors import format_count
from mmdistill.training.state import TrainingState


@dataclass(frozen=True)
class TrainData:
    """The clips, their order, and how many batches and optimizer steps an epoch has.

    Attributes:
        dataset, sampler, loader: the clips, and the batches of this rank; `sampler` has the position.
        batches_per_epoch: batches of each rank.
        accumulate_grad_batches: batches per optimizer step. The last step of an epoch may have fewer.
        global_batch: clips per batch over all ranks.
        source: labeled clips of a joint pretraining; each batch has as many of them as clips of `dataset`.
    """

    dataset: ClipDataset
    sampler: EpochBatchSampler
    loader: ClipLoader
    batches_per_epoch: int
    accumulate_grad_batches: int
    global_batch: int
    source: ClipDataset | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps per epoch."""
        return math.ceil(self.batches_per_epoch / self.accumulate_grad_batches)

    def schedule_step(self, state: TrainingState) -> int:
        """Position in the learning rate schedule, if all earlier epochs had as many steps as this run's."""
        is_end = state.batch >= self.batches_per_epoch
        in_epoch = self.steps_per_epoch if is_end else state.batch // self.accumulate_grad_batches
        return state.epoch * self.steps_per_epoch + in_epoch

    @property
    def order(self) -> dict[str, int]:
        """The settings that decide which clips are in the batches before a position in an epoch."""
        order = {"seed": self.sampler.seed, "num_clips": len(self.dataset), "global_batch": self.global_batch}
        source = {} if self.source is None else {"num_source_clips": len(self.source)}
        return {**order, "accumulate_grad_batches": self.accumulate_grad_batches, **source}

    def clip_numbers(self, batch: Mapping[str, Any]) -> Tensor:
        """The numbers of the clips of a batch for `clip_id`, int64 (B,) or, with a source, (2 * B,)."""
        index: Tensor = batch["index"]
        return index if self.source is None else torch.cat((index, batch["source"]["index"] + len(self.dataset)))

    def clip_id(self, number: int) -> str:
        """The id of a clip. Numbers from ``len(dataset)`` on are those of the source."""
        if self.source is not None and number >= len(self.dataset):
            return f"source {self.source.index.clips[number - len(self.dataset)].id}"
        return self.dataset.index.clips[number].id

    @property
    def summary(self) -> str:
        """Numbers of clips and batches, for the log."""
        num_skipped = len(self.dataset) - self.batches_per_epoch * self.global_batch
        source = ""
        if self.source is not None:
            classes = format_count(len(self.source.index.classes), "class")
            source = f", source of {format_count(len(self.source), 'clip')} of {classes}"
        return (
            f"{format_count(len(self.dataset), 'clip')}, {format_count(self.batches_per_epoch, 'batch')} of "
            f"{self.sampler.batch_size} per process and epoch ({format_count(num_skipped, 'clip')} skipped each epoch)"
            f"{source}"
        )


def make_train_data(
    config: PretrainConfig | DistillConfig,
    modalities: tuple[str, ...],
    process: Process,
    *,
    whole_steps: bool = False,
    cached_epochs: int = 0,
    needs_motion: bool = False,
    loader_class: type[ClipLoader] = ClipLoader,
) -> TrainData:
    """The training clips of a run. With `whole_steps` an epoch ends after its last complete optimizer step.

    With a source (`PretrainConfig.source`) the batches are those of `JointDataset`.
    `cached_epochs` and `needs_motion`: see `make_clip_dataset`.

    Raises:
        ConfigError: there are fewer clips than one batch or, with `whole_steps`, than one optimizer step needs.
    """
    source_config = config.source if isinstance(config, PretrainConfig) else None
    if process.is_main:
        make_demo_data(config.data_module)
        if source_config is not None:
            make_demo_data(source_config)
    barrier()
    dataset = make_clip_dataset(
        config.data_module,
        modalities,
        training=True,
        seed=config.seed,
        cached_epochs=cached_epochs,
        needs_motion=needs_motion,
    )
    sampler = EpochBatchSampler(
        len(dataset), batch_size=config.batch_size, seed=config.seed, rank=process.rank, world_size=process.world_size
    )
    accumulate, global_batch = config.trainer.accumulate_grad_batches, config.batch_size * process.world_size
    num_batches = len(sampler) - (len(sampler) % accumulate if whole_steps else 0)
    if num_batches == 0:
        needed = global_batch * (accumulate if whole_steps else 1)
        raise ConfigError(
            f"{format_count(len(dataset), 'clip')} cannot fill one training step of {format_count(needed, 'clip')}; "
            f"lower batch_size={config.batch_size}"
        )
    source, joint_dataset, joint_sampler = None, None, None
    if source_config is not None:
        source = make_source_dataset(
            replace(source_config, resize=config.data_module.resize), modalities[0], seed=config.seed
        )
        joint_dataset = JointDataset(dataset, source)
        joint_sampler = JointBatchSampler(sampler, len(source), clips_per_epoch=num_batches * global_batch)
    loader = make_clip_loader(
        joint_dataset or dataset,
        num_workers=config.num_workers,
        pin_memory=process.device.type == "cuda",
        batch_sampler=joint_sampler or sampler,
        timeout_s=config.loader_timeout_s,
        loader_class=loader_class,
    )
    return TrainData(dataset, sampler, loader, num_batches, accumulate, global_batch, source)
