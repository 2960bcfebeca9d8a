"""Few-shot validation while the student is trained: `val_top1_action`, on a small fixed set of episodes.

Lightning calls it every `trainer.check_val_every_n_epoch` epochs, or at `Trainer.validate`. Any `ModelCheckpoint` or
`EarlyStopping` may monitor it; in epochs without a validation Lightning shows them the last value.

Shapes: B batch, N clips of the episodes, D width.
"""

import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Subset

from mmdistill.builders import make_clip_dataset, make_clip_loader
from mmdistill.config import DistillConfig, as_ints
from mmdistill.data.dataset import ClipDataset
from mmdistill.distributed.collectives import all_gather_objects
from mmdistill.distributed.process import Process
from mmdistill.fewshot.episodes import Episodes, sample_episodes
from mmdistill.fewshot.logistic import FloatArray
from mmdistill.fewshot.scores import evaluate_episodes
from mmdistill.modalities import STUDENT_MODALITY

METRIC = "val_top1_action"
HEAD = "centroid"


class Validation(pl.Callback):
    """Collects the student's features of the episodes' clips, which `MMDistill.validation_step` makes, and scores them.

    Each rank encodes its share of the clips; all score the same episodes and log the same number.

    Args:
        dataset: evaluation clips (rgb).
        episodes: over their positions; only their clips are read.
        loader: arguments of `make_clip_loader`.
        rank, world_size: this process among all.
    """

    def __init__(
        self, dataset: ClipDataset, episodes: Episodes, *, loader: Mapping[str, Any], rank: int, world_size: int
    ) -> None:
        self.dataset, self.episodes, self._loader = dataset, episodes, dict(loader)
        self.clips = np.unique(np.concatenate((episodes.support.ravel(), episodes.query.ravel())))
        each = -(-len(self.clips) // world_size)
        shares = np.resize(self.clips, each * world_size)  # as many for each rank: what is too much occurs twice
        self.mine = shares[rank::world_size].tolist()
        self._features: dict[int, FloatArray] = {}

    def dataloader(self) -> DataLoader[Any]:
        """This rank's clips."""
        return make_clip_loader(Subset(self.dataset, self.mine), **self._loader)

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Nothing seen yet."""
        self._features = {}

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        """Keep the features of a batch, float32 (B, D)."""
        features = outputs.float().cpu().numpy()
        self._features.update(zip(batch["index"].tolist(), features, strict=True))

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the mean accuracy of the episodes.

        Raises:
            FeatureError: the student's features are not finite; on every rank.
        """
        value = self.score(_gathered(self._features))
        self.log(METRIC, torch.tensor(value, device=pl_module.device), sync_dist=True)  # the same on every rank
        if trainer.is_global_zero:
            e = self.episodes
            asked = f"{len(e)} episodes, {e.n_way}-way {e.k_shot}-shot, {HEAD}"
            print(f"epoch {trainer.current_epoch}: {METRIC} {value:.4f} ({asked})", file=sys.stderr)

    def score(self, features: Mapping[int, FloatArray]) -> float:
        """Mean accuracy, a fraction, of float32 (D,) features by position in the dataset."""
        rows = np.stack([features[i] for i in self.clips.tolist()])
        e = self.episodes
        within = replace(
            e, support=np.searchsorted(self.clips, e.support), query=np.searchsorted(self.clips, e.query)
        )  # positions in `rows`
        return float(evaluate_episodes(rows, within, HEAD).accuracy.mean())


def _gathered(features: dict[int, FloatArray]) -> dict[int, FloatArray]:
    return {i: row for part in all_gather_objects(features) for i, row in part.items()}


def make_validation(config: DistillConfig, process: Process) -> Validation | None:
    """The validation that the config asks for, or None.

    Raises:
        EpisodeError: the validation clips do not hold the episodes.
    """
    data, trainer = config.data_module, config.trainer
    if not trainer.check_val_every_n_epoch:
        return None
    source = replace(data, fewshot_eval_json_path=data.val_json_path or data.fewshot_eval_json_path)
    dataset = make_clip_dataset(source, (STUDENT_MODALITY,), training=False, seed=config.seed)
    clips = dataset.index.clips
    episodes = sample_episodes(
        [c.label for c in clips],
        n_way=as_ints("data_module.n_way", data.n_way)[0],
        k_shot=as_ints("data_module.k_shot", data.k_shot)[0],
        q_sample=data.q_sample,
        episodes=trainer.val_episodes,
        seed=config.seed,
        groups=[c.group for c in clips],
        disjoint=data.disjoint,
        names=dataset.index.classes,
    )
    loader = {
        "num_workers": config.num_workers,
        "pin": process.device.type == "cuda",
        "batch_size": config.batch_size,
        "timeout_s": config.loader_timeout_s,
    }
    return Validation(dataset, episodes, loader=loader, rank=process.rank, world_size=process.world_size)


def validation_line(validation: Validation, config: DistillConfig) -> str:
    """What a run says about it at its start."""
    data, every = config.data_module, config.trainer.check_val_every_n_epoch
    source = data.val_json_path or f"{data.fewshot_eval_json_path}, which are those of the test"
    return f"{METRIC} every {every} epochs on {len(validation.clips)} clips of {source}"
