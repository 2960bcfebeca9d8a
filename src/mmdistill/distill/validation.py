"""Few-shot validation during a distillation: ``val_top1_action`` on a small fixed set of episodes.

Lightning runs it every `trainer.check_val_every_n_epoch` epochs, and in `Trainer.validate`. `ModelCheckpoint` and
`EarlyStopping` can monitor it; in epochs without a validation Lightning passes them the last value.

Shapes: B batch, N clips of the episodes, D width.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Subset

from mmdistill.builders import make_clip_loader
from mmdistill.config import DistillConfig
from mmdistill.data.dataset import ClipDataset
from mmdistill.distributed.collectives import all_gather_objects
from mmdistill.distributed.process import Process
from mmdistill.fewshot.episodes import Episodes, FloatArray
from mmdistill.modalities import STUDENT_MODALITY
from mmdistill.training.monitoring import METRIC, FewshotClips, make_fewshot_clips, try_on_all_ranks


class Validation(FewshotClips, pl.Callback):
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
        super().__init__(dataset, episodes)
        self._make_loader, self._log = make_loader, log
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
        self._log(f"epoch {trainer.current_epoch}: {self.describe(value)}")


def make_validation(
    config: DistillConfig, process: Process, log: Callable[[str], None], learned: Sequence[Mapping[str, Any]] = ()
) -> Validation | str | None:
    """The validation callback, which prints lines with `log`. Collective. `learned`: see `make_fewshot_clips`.

    None if `trainer.check_val_every_n_epoch` is not set; why there is none, if labels or files are
    missing or the labels are those of a source.

    Raises:
        FewshotError, ConfigError, AnnotationError: there is none for such a reason, and `trainer.monitor` needs them.
    """
    if not config.trainer.check_val_every_n_epoch:
        return None
    if config.trainer.monitor == METRIC:
        clips: FewshotClips | str = make_fewshot_clips(config, STUDENT_MODALITY, learned)
    else:
        clips = try_on_all_ranks(lambda: make_fewshot_clips(config, STUDENT_MODALITY, learned))
    if isinstance(clips, str):
        return clips
    make_loader = partial(
        make_clip_loader,
        num_workers=config.num_workers,
        pin_memory=process.device.type == "cuda",
        batch_size=config.batch_size,
        timeout_s=config.loader_timeout_s,
    )
    return Validation(clips.dataset, clips.episodes, process, make_loader=make_loader, log=log)
