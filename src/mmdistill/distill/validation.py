"""Few-shot validation during a distillation: ``val_top1_action`` on a small fixed set of episodes.

Lightning runs it every `trainer.check_val_every_n_epoch` epochs, and in `Trainer.validate`. `ModelCheckpoint` and
`EarlyStopping` can monitor it; in epochs without a validation Lightning passes them the last value.

Shapes: B batch, N clips of the episodes, D width.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Subset

from mmdistill.builders import load_clip_sources, make_clip_dataset, make_clip_loader
from mmdistill.config import DistillConfig, as_ints
from mmdistill.data.dataset import ClipDataset
from mmdistill.distributed.collectives import all_gather_objects
from mmdistill.distributed.process import Process
from mmdistill.errors import format_count
from mmdistill.fewshot.episodes import Episodes, EpisodeSpec, FloatArray, disjoint_groups, sample_episodes
from mmdistill.fewshot.scores import evaluate_episodes
from mmdistill.modalities import STUDENT_MODALITY

METRIC = "val_top1_action"
CLASSIFIER = "centroid"


class Validation(pl.Callback):
    """Collect the student's features that `MMDistill.validation_step` returns, and score the episodes with them.

    Each rank encodes its share of the clips. All ranks score the same episodes and log the same number.

    Args:
        dataset: evaluation clips (rgb).
        episodes: positions in the dataset; only their clips are read.
        process: this process.
        make_loader: creates a loader of a dataset.
        log: prints a line on rank 0.
    """

    def __init__(
        self,
        dataset: ClipDataset,
        episodes: Episodes,
        process: Process,
        *,
        make_loader: Callable[..., DataLoader[Any]],
        log: Callable[[str], None],
    ) -> None:
        self.dataset, self.episodes, self._make_loader, self._log = dataset, episodes, make_loader, log
        self.clips = np.unique(np.concatenate((episodes.support.ravel(), episodes.query.ravel())))
        clips_per_rank = math.ceil(len(self.clips) / process.world_size)
        padded = np.resize(self.clips, clips_per_rank * process.world_size)  # repeats clips: ranks need equal numbers
        self.own_clips = padded[process.rank :: process.world_size].tolist()
        self._features: dict[int, FloatArray] = {}

    def dataloader(self) -> DataLoader[Any]:
        """A loader of this rank's clips."""
        return self._make_loader(Subset(self.dataset, self.own_clips))

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Clear the features."""
        self._features = {}

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        """Store the features of a batch, float32 (B, D)."""
        features = outputs.float().cpu().numpy()
        self._features.update(zip(batch["index"].tolist(), features, strict=True))

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log the mean accuracy of the episodes.

        Raises:
            FeatureError: the student's features are not finite; on every rank.
        """
        features = {i: row for part in all_gather_objects(self._features) for i, row in part.items()}
        value = self.score(features)
        pl_module.log(METRIC, torch.tensor(value, device=pl_module.device), sync_dist=True)  # the same on every rank
        e = self.episodes
        setting = f"{format_count(len(e), 'episode')}, {e.n_way}-way {e.k_shot}-shot, {CLASSIFIER}"
        self._log(f"epoch {trainer.current_epoch}: {METRIC} {value:.4f} ({setting})")

    def score(self, features: Mapping[int, FloatArray]) -> float:
        """Mean accuracy as a fraction. `features` are float32 (D,) by position in the dataset."""
        rows = np.stack([features[i] for i in self.clips.tolist()])
        e = self.episodes
        own_episodes = replace(
            e, support=np.searchsorted(self.clips, e.support), query=np.searchsorted(self.clips, e.query)
        )  # positions in `rows`
        return float(evaluate_episodes(rows, own_episodes, CLASSIFIER).accuracy.mean())


def make_validation(config: DistillConfig, process: Process, log: Callable[[str], None]) -> Validation | None:
    """The validation callback, which prints lines with `log`; None if `trainer.check_val_every_n_epoch` is not set.

    Raises:
        EpisodeError: there are too few validation clips for the episodes.
    """
    data, trainer = config.data_module, config.trainer
    if not trainer.check_val_every_n_epoch:
        return None
    val_data = replace(data, fewshot_eval_json_path=data.val_json_path or data.fewshot_eval_json_path)
    dataset = make_clip_dataset(
        val_data, (STUDENT_MODALITY,), training=False, seed=config.seed, needs_motion=config.pooling == "motion"
    )
    clips = dataset.index.clips
    n_way, k_shot = as_ints("data_module.n_way", data.n_way)[0], as_ints("data_module.k_shot", data.k_shot)[0]
    labels, sources = [c.label for c in clips], load_clip_sources(val_data, dataset.index, training=False)
    episodes = sample_episodes(
        labels,
        EpisodeSpec(n_way, k_shot, data.q_sample, data.disjoint),
        episodes=trainer.val_episodes,
        seed=config.seed,
        groups=disjoint_groups(data.disjoint, [c.group for c in clips], sources, labels),
        names=dataset.index.classes,
    )
    make_loader = partial(
        make_clip_loader,
        num_workers=config.num_workers,
        pin_memory=process.device.type == "cuda",
        batch_size=config.batch_size,
        timeout_s=config.loader_timeout_s,
    )
    return Validation(dataset, episodes, process, make_loader=make_loader, log=log)


def validation_summary(validation: Validation, config: DistillConfig) -> str:
    """The log line about the validation at the start of a run."""
    data, every = config.data_module, config.trainer.check_val_every_n_epoch
    source = data.val_json_path or f"{data.fewshot_eval_json_path} (the test clips; see data_module.val_json_path)"
    return (
        f"{METRIC} every {format_count(every or 0, 'epoch')} on {format_count(len(validation.clips), 'clip')} of "
        f"{source}"
    )
