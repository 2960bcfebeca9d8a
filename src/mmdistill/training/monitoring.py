"""What both trainings report about the encoder on held-out clips. docs/method.md has the equations.

Held-out clips are those of `data_module.val_json_path`, else of `data_module.fewshot_eval_json_path`. Nothing here
changes a weight or depends on the state of a random generator. All functions that read clips are collective.

Shapes: N clips, D width of a feature.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Subset

from mmdistill.builders import load_clip_sources, make_clip_dataset, make_clip_loader
from mmdistill.config import DataModuleConfig, DistillConfig, PretrainConfig, as_ints
from mmdistill.data.dataset import ClipDataset
from mmdistill.distributed.collectives import all_gather_objects, get_rank, get_world_size
from mmdistill.errors import MMDistillError, format_count
from mmdistill.fewshot.episodes import Episodes, EpisodeSpec, FloatArray, disjoint_groups, sample_episodes
from mmdistill.fewshot.novel_classes import check_novel_classes
from mmdistill.fewshot.scores import evaluate_episodes
from mmdistill.training.run_logger import baseline_ratio

METRIC = "val_top1_action"
CLASSIFIER = "centroid"
NUM_CLIPS = 128  # largest number of held-out clips of a loss; less than 1 % of the time of `make demo`
_T = TypeVar("_T")


def mean_std(features: Tensor) -> float:
    """The mean over dimensions of the standard deviation over clips of features (N, D)."""
    return float(features.double().std(dim=0, unbiased=False).mean())


def effective_rank(features: Tensor) -> float:
    """The effective rank of features (N, D): the exponential of the entropy of their normalized singular values.

    Roy and Vetterli, EUSIPCO 2007, of the features minus their mean over clips. It lies between 1 and
    min(N - 1, D), and is 0 if all features are equal. NaN if a value is not finite.
    """
    x = features.double()
    if not bool(x.isfinite().all()):
        return math.nan
    values = torch.linalg.svdvals(x - x.mean(dim=0))
    if not float(values.sum()):
        return 0.0
    shares = values / values.sum()
    return float(torch.special.entr(shares).sum().exp())


def held_out_metrics(features: Tensor, losses: tuple[float, float] | None) -> dict[str, float]:
    """The metrics of held-out clips: of their features (N, D), and their loss with its constant baseline, if known."""
    metrics = {"feature_std": mean_std(features), "effective_rank": effective_rank(features)}
    if losses is None:
        return metrics
    return {"held_out_loss": losses[0], "held_out_constant_baseline_loss": losses[1], **metrics}


def describe_held_out(metrics: Mapping[str, float]) -> str:
    """The result of `held_out_metrics` for the log."""
    text = f"feature std {metrics['feature_std']:.3g}, effective rank {metrics['effective_rank']:.1f}"
    if "held_out_loss" not in metrics:
        return text
    loss, baseline = metrics["held_out_loss"], metrics["held_out_constant_baseline_loss"]
    ratio = f"ratio {baseline_ratio(loss, baseline):.3f}" if baseline else "constant target"
    return f"held-out loss {loss:.4f} (constant baseline {baseline:.4f}, {ratio}), {text}"


def select_positions(num_clips: int) -> list[int]:
    """At most `NUM_CLIPS` of the clips, at equal distances."""
    positions: list[int] = np.linspace(0, num_clips - 1, min(num_clips, NUM_CLIPS)).round().astype(int).tolist()
    return positions


def held_out_data(data: DataModuleConfig) -> DataModuleConfig:
    """The settings whose evaluation clips are the held-out clips."""
    return replace(data, fewshot_eval_json_path=data.val_json_path or data.fewshot_eval_json_path)


def try_on_all_ranks(make: Callable[[], _T]) -> _T | str:
    """The result of `make`, or why it fails on a rank, the same on all ranks. Collective."""
    value, problem = None, ""
    try:
        value = make()
    except MMDistillError as error:
        problem = str(error)
    problems = [text for text in all_gather_objects(problem) if text]
    return problems[0] if problems else value  # type: ignore[return-value]


def encode_clips(
    dataset: ClipDataset,
    positions: Sequence[int],
    encode: Callable[[Mapping[str, Tensor]], Iterable[Tensor]],
    *,
    batch_size: int,
    num_workers: int | None = 0,
) -> list[Tensor] | str:
    """Encode clips, each rank its share; all ranks call `encode` equally often, which ZeRO stage 3 needs. Collective.

    Args:
        dataset: the clips.
        positions: those that are read.
        encode: from a batch on the CPU to tensors with a row per clip.
        batch_size: clips per batch.
        num_workers: see `make_clip_loader`.

    Returns:
        The tensors with the rows of all `positions`, float32 on the CPU; or why a clip cannot be read. The same on all
        ranks.
    """
    clips_per_rank = math.ceil(len(positions) / get_world_size())
    padded = np.resize(positions, clips_per_rank * get_world_size())  # repeats clips
    own = padded[get_rank() :: get_world_size()].tolist()
    loader = make_clip_loader(Subset(dataset, own), num_workers=num_workers, pin_memory=False, batch_size=batch_size)
    batches = iter(loader)
    rows: dict[int, list[Tensor]] = {}
    with torch.no_grad():
        for start in range(0, len(own), batch_size):
            batch = try_on_all_ranks(lambda: next(batches))
            if isinstance(batch, str):
                return batch
            columns = [x.float().cpu() for x in encode(batch)]
            rows |= {n: [column[i] for column in columns] for i, n in enumerate(own[start : start + batch_size])}
    merged = {number: columns for part in all_gather_objects(rows) for number, columns in part.items()}
    return [torch.stack(column) for column in zip(*(merged[i] for i in positions), strict=True)]


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Eval mode, then the mode before."""
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)


class FewshotClips:
    """A small fixed set of episodes for the few-shot validation.

    Attributes:
        dataset: evaluation clips.
        episodes: positions in the dataset; only their clips are read.
        clips: these positions, sorted.
    """

    def __init__(self, dataset: ClipDataset, episodes: Episodes) -> None:
        self.dataset, self.episodes = dataset, episodes
        self.clips = np.unique(np.concatenate((episodes.support.ravel(), episodes.query.ravel())))

    def score(self, features: Mapping[int, FloatArray]) -> float:
        """Mean accuracy as a fraction. `features` are float32 (D,) by position in the dataset.

        Raises:
            FeatureError: a feature is not finite.
        """
        rows = np.stack([features[i] for i in self.clips.tolist()])
        e = self.episodes
        own_episodes = replace(
            e, support=np.searchsorted(self.clips, e.support), query=np.searchsorted(self.clips, e.query)
        )  # positions in `rows`
        return float(evaluate_episodes(rows, own_episodes, CLASSIFIER).accuracy.mean())

    def describe(self, value: float) -> str:
        """A score for the log."""
        e = self.episodes
        setting = f"{format_count(len(e), 'episode')}, {e.n_way}-way {e.k_shot}-shot, {CLASSIFIER}"
        return f"{METRIC} {value:.4f} ({setting})"

    def summary(self, config: PretrainConfig | DistillConfig) -> str:
        """What is scored, and how often, for the log at the start of a run."""
        data, every = config.data_module, config.trainer.check_val_every_n_epoch
        source = data.val_json_path or f"{data.fewshot_eval_json_path} (the test clips; see data_module.val_json_path)"
        return (
            f"{METRIC} every {format_count(every or 0, 'epoch')} on {format_count(len(self.clips), 'clip')} of {source}"
        )


def make_fewshot_clips(
    config: PretrainConfig | DistillConfig, modality: str, learned: Iterable[Mapping[str, Any]] = ()
) -> FewshotClips:
    """The episodes of the few-shot validation: `trainer.val_episodes` of the first N-way K-shot of the config.

    Args:
        config: of the training.
        modality: of the clips.
        learned: the sources whose labels the network learns or its weights have learned, see `labeled_sources`.

    Raises:
        FewshotError: a class of the clips is one of `learned`.
        EpisodeError: there are too few labeled clips for the episodes.
        ConfigError, AnnotationError: the clips cannot be found.
    """
    data = held_out_data(config.data_module)
    dataset = make_clip_dataset(
        data, (modality,), training=False, seed=config.seed, needs_motion=config.pooling == "motion"
    )
    clips = dataset.index.clips
    n_way, k_shot = as_ints("data_module.n_way", data.n_way)[0], as_ints("data_module.k_shot", data.k_shot)[0]
    labels, sources = [c.label for c in clips], load_clip_sources(data, dataset.index, training=False)
    check_novel_classes("the network", learned, data.name, dataset.index, sources)
    episodes = sample_episodes(
        labels,
        EpisodeSpec(n_way, k_shot, data.q_sample, data.disjoint),
        episodes=config.trainer.val_episodes,
        seed=config.seed,
        groups=disjoint_groups(data.disjoint, [c.group for c in clips], sources, labels),
        names=dataset.index.classes,
    )
    return FewshotClips(dataset, episodes)


def is_due(every: int | None, epoch: int) -> bool:
    """Whether the epoch, counted from 0, is one of every `every` epochs; None or 0: never."""
    return bool(every) and (epoch + 1) % (every or 1) == 0
