"""Encode clips: each clip is read once, and encoded once per network and masked view.

Shapes: B batch, N clips, V views, L tokens, Lv visible tokens, D width.
"""

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmdistill.console import progress
from mmdistill.data.clips import Clip, ClipIndex
from mmdistill.data.masking import sample_visible_tokens
from mmdistill.distributed.collectives import broadcast_object, get_rank, run_on_all_ranks
from mmdistill.errors import format_count
from mmdistill.fewshot.errors import FeatureError, FewshotError
from mmdistill.fewshot.features import Features, cache_key, merge_features, read_cache, write_cache
from mmdistill.fewshot.logistic import FloatArray
from mmdistill.modalities import ModalitySpec, preprocess_clips
from mmdistill.models.videomae import Encoder
from mmdistill.randomness import text_rng

log = logging.getLogger(__name__)

Encode = Callable[[Mapping[str, Tensor], Tensor | None], Tensor]
"""(batch of the loader, visible int64 (B, Lv) or None for all tokens) -> features (B, D)"""


@dataclass(frozen=True)
class EvalMasks:
    """The input mode of an evaluation: whole clips or masked views (MM-CDFSL section 3.4: ensemble over masks).

    Attributes:
        n_masks: number of masked views per clip; 0: one view, the whole clip.
        eval_mask_ratio: fraction of the tokens that is removed from each view.
        mask_type: "tube" or "random".
        shared_masks: True: a mask depends on (seed, view) and is the same for all clips. False: it depends on (seed,
            clip id, view), as in the paper. It never depends on the batch, the order or the number of processes.
        seed: seed of the masks.
    """

    n_masks: int = 0
    eval_mask_ratio: float = 0.75
    mask_type: str = "tube"
    shared_masks: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.n_masks < 0:
            raise FewshotError(f"n_masks={self.n_masks} must be at least 0")
        if self.n_masks and not 0 <= self.eval_mask_ratio < 1:
            raise FewshotError(f"eval_mask_ratio={self.eval_mask_ratio} must lie in [0, 1)")

    @property
    def num_views(self) -> int:
        """V, the number of encodings per clip."""
        return max(1, self.n_masks)

    @property
    def eval_masks(self) -> str:
        """The value of ``data_module.eval_masks``; "none" for whole clips."""
        if self.n_masks == 0:
            return "none"
        return "shared" if self.shared_masks else "per_clip"

    @property
    def input_mode(self) -> str:
        """Description for tables."""
        if self.n_masks == 0:
            return "whole clips"
        kind = "shared" if self.shared_masks else "per clip"
        return f"{format_count(self.n_masks, f'{self.mask_type} mask')}, {self.eval_mask_ratio:.0%} removed, {kind}"

    def input_modes(self) -> tuple["EvalMasks", ...]:
        """This input mode first, then the other two of: whole clips, shared masks, masks per clip."""
        masked = replace(self, n_masks=self.n_masks or 2)
        modes = (replace(self, n_masks=0), replace(masked, shared_masks=True), replace(masked, shared_masks=False))
        return (self, *(mode for mode in modes if mode.input_mode != self.input_mode))

    def require_visible_tokens(self, grid: tuple[int, int, int]) -> None:
        """Raise `FewshotError` if the masks leave no token of this grid visible."""
        try:
            self.visible_tokens([Clip("", "", (), -1, "")], 0, grid)
        except ValueError as error:
            raise FewshotError(f"{self.input_mode}: {error}") from error

    def visible_tokens(self, clips: Sequence[Clip], view: int, grid: tuple[int, int, int]) -> Tensor | None:
        """Visible tokens of one view. int64 (B, Lv), or None for all tokens."""
        if self.n_masks == 0:
            return None
        owners = [""] if self.shared_masks else [clip.id for clip in clips]
        masks = np.stack([self._mask(owner, view, grid) for owner in owners])
        return torch.from_numpy(masks).expand(len(clips), -1)

    def _mask(self, owner: str, view: int, grid: tuple[int, int, int]) -> np.ndarray[Any, np.dtype[np.int64]]:
        rng = text_rng(f"view mask/{self.seed}/{view}/{owner}")
        return sample_visible_tokens(grid, ratio=self.eval_mask_ratio, mask_type=self.mask_type, rng=rng)

    def cache_settings(self) -> dict[str, Any]:
        """The values that features depend on, for the cache key. Features of whole clips do not depend on the masks."""
        return asdict(self) if self.n_masks else {"n_masks": 0}


@dataclass(frozen=True)
class EncodingJob:
    """One network in one input mode.

    Attributes:
        network: name of the network in every output, for example "student_rgb".
        encode: see `Encode`; runs without gradients.
        grid: tokens (t, h, w), for the masks.
        masks: the input mode.
        weights: digest of the weights (`weights_digest`), for the cache. Features with "" are never cached.
        info: further plain values for the outputs: checkpoint, modality ...
    """

    network: str
    encode: Encode
    grid: tuple[int, int, int]
    masks: EvalMasks = field(default_factory=EvalMasks)
    weights: str = ""
    info: Mapping[str, Any] = field(default_factory=dict)

    def cache_key(self, data: str | Mapping[str, str]) -> str:
        """Cache key of the features of clips with this fingerprint (`data.fingerprint.data_fingerprint`; by modality).

        Episodes, shots and classifiers are not part of it, because features do not depend on them.
        """
        data = data if isinstance(data, str) else data[str(self.info.get("modality"))]
        settings = {**self.masks.cache_settings(), "grid": list(self.grid), "modality": self.info.get("modality")}
        return cache_key(weights=self.weights, data=data, settings=settings)

    def features_info(self) -> dict[str, Any]:
        """Origin of the features, for `Features.info`."""
        return {
            **self.info,
            "network": self.network,
            "input_mode": self.masks.input_mode,
            "eval_masks": self.masks.eval_masks,
            "n_masks": self.masks.n_masks,
            "eval_mask_ratio": self.masks.eval_mask_ratio if self.masks.n_masks else 0.0,
        }


class ClipEncoder:
    """The `Encode` function of an `Encoder`: raw clips to clip features.

    Args:
        encoder: moved to `device` and put into eval mode.
        spec: its modality: key of the batch and statistics.
        device: where the encoder runs.
        autocast: returns the context of the encoding (precision).
    """

    def __init__(
        self,
        encoder: Encoder,
        spec: ModalitySpec,
        *,
        device: torch.device | str = "cpu",
        autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        self.encoder, self.spec, self.device, self.autocast = encoder.to(device).eval(), spec, device, autocast
        self._clip: Tensor | None = None
        self._x: Tensor | None = None

    def __call__(self, batch: Mapping[str, Tensor], visible: Tensor | None) -> Tensor:
        """(B, D) float32."""
        clip = batch[self.spec.name]
        if self._x is None or self._clip is not clip:  # all views of a batch use the same preprocessed clips
            size = (self.encoder.config.height, self.encoder.config.width)
            x = preprocess_clips(clip.to(self.device), batch["crop_box"].to(self.device), self.spec, size)
            self._clip, self._x = clip, x
        with self.autocast():
            features = self.encoder.embed(self._x, None if visible is None else visible.to(self.device))
        return features.float()


def encode_clips(
    jobs: Sequence[EncodingJob],
    loader: Iterable[Mapping[str, Tensor]],
    index: ClipIndex,
    *,
    show_progress: bool = True,
) -> list[Features]:
    """Encode the clips of a loader for all jobs. Each clip is read once.

    Args:
        jobs: networks and input modes.
        loader: batches with the modalities' clips, `crop_box`, and `index` int64 (B,), the position of each clip in
            ``index.clips``; in any order. With several ranks each loader may contain a part of the clips.
        index: the clips.
        show_progress: show a progress bar.

    Returns:
        For each job the features of the loader's clips, in the order of `index`.

    Raises:
        FeatureError: a network returned NaN or infinite values (the message names it and the clips), or a clip occurs
            twice.
    """
    jobs = list(jobs)
    blocks: list[list[FloatArray]] = [[] for _ in jobs]
    seconds = [0.0] * len(jobs)
    order: list[int] = []
    names = ", ".join(dict.fromkeys(job.network for job in jobs))
    with torch.inference_mode(), progress(f"encoding {names}", len(index.clips), enabled=show_progress) as advance:
        for batch in loader:
            rows = batch["index"].tolist()
            clips = [index.clips[i] for i in rows]
            for number, job in enumerate(jobs):
                start = time.perf_counter()
                blocks[number].append(_encode_batch(job, batch, clips))
                seconds[number] += time.perf_counter() - start
            order += rows
            advance(len(rows))
    if len(set(order)) != len(order):
        raise FeatureError(
            f"the loader returned {format_count(len(order), 'clip')}, of which {len(set(order))} are distinct"
        )
    if not order:
        raise FeatureError("the loader returned no clip")
    return [_make_features(job, block, order, index, s) for job, block, s in zip(jobs, blocks, seconds, strict=True)]


def _encode_batch(job: EncodingJob, batch: Mapping[str, Tensor], clips: Sequence[Clip]) -> FloatArray:
    """All views of one batch. float32 (B, V, D)."""
    views = []
    for view in range(job.masks.num_views):
        out = job.encode(batch, job.masks.visible_tokens(clips, view, job.grid)).float().cpu()
        if out.ndim != 2 or len(out) != len(clips):
            raise FeatureError(
                f"{job.network}: features of {format_count(len(clips), 'clip')} must be (B, D), got {tuple(out.shape)}"
            )
        bad = ~out.isfinite().all(dim=1)
        if bool(bad.any()):
            bad_ids = [clip.id for clip, is_bad in zip(clips, bad.tolist(), strict=True) if is_bad]
            raise FeatureError(
                f"{job.network}: NaN or infinite features of {len(bad_ids)} of {format_count(len(clips), 'clip')} "
                f"in this batch, for example {', '.join(bad_ids[:3])}; the weights or these clips are invalid"
            )
        views.append(out)
    features: FloatArray = torch.stack(views, dim=1).numpy()
    return features


def _make_features(
    job: EncodingJob, blocks: Sequence[FloatArray], order: list[int], index: ClipIndex, seconds: float
) -> Features:
    positions = np.argsort(order)
    x = np.concatenate(blocks)[positions]
    clips = [index.clips[order[p]] for p in positions]
    if len(x) > 1 and float(np.ptp(x, axis=0).max()) == 0.0:
        log.warning("%s: all %d clips have the same features (representation collapse)", job.network, len(x))
    labels = np.array([clip.label for clip in clips], dtype=np.int64)
    ids, groups = tuple(clip.id for clip in clips), tuple(clip.group for clip in clips)
    return Features(x, labels, ids, groups, index.classes, {**job.features_info(), "seconds": seconds})


def encode_cached(
    jobs: Sequence[EncodingJob],
    loader: Callable[[], Iterable[Mapping[str, Tensor]]],
    index: ClipIndex,
    *,
    data: str | Mapping[str, str],
    cache: str | Path | None,
    show_progress: bool = True,
    collect_info: Callable[[], Mapping[str, Any]] = dict,
) -> list[Features]:
    """`encode_clips` with a cache, over all ranks of a process group.

    Args:
        jobs: networks and input modes. Cached ones are not encoded.
        loader: called only if clips must be encoded. With several ranks each rank's loader contains its part.
        index: all clips.
        data: fingerprint of the clips (`data.fingerprint.data_fingerprint`), one for all or by modality.
        cache: folder of the cache, or None.
        show_progress: show a progress bar.
        collect_info: called on every rank after encoding; returns plain values that are stored in `Features.info`.

    Returns:
        Features of all clips for each job, the same on every rank. ``info["cached"]`` is True for cached ones.
    """
    keys = [job.cache_key(data) for job in jobs]
    is_cacheable = [cache is not None and job.weights != "" for job in jobs]
    found: list[Features | None] = [None] * len(jobs)
    if get_rank() == 0 and cache is not None:
        found = [read_cache(cache, key) if use else None for key, use in zip(keys, is_cacheable, strict=True)]
    found = broadcast_object(found)
    missing = [i for i, features in enumerate(found) if features is None]
    if missing:
        ids = [clip.id for clip in index.clips]
        pending = [jobs[i] for i in missing]
        parts = run_on_all_ranks(
            lambda: encode_clips(pending, loader(), index, show_progress=show_progress), error_class=None
        )
        info = dict(collect_info())
        for number, i in enumerate(missing):
            merged = merge_features([part[number] for part in parts], ids)
            found[i] = merged = replace(merged, info={**merged.info, **info})
            if is_cacheable[i] and cache is not None and get_rank() == 0:
                try:
                    write_cache(cache, keys[i], merged)
                except OSError as error:
                    log.warning(
                        "cannot write the feature cache, so the next evaluation encodes the clips again: %s", error
                    )
    # The name of a network may differ from that of the run that filled the cache.
    return [
        replace(features, info={**features.info, **job.features_info(), "cached": i not in missing})
        for i, (features, job) in enumerate(zip(found, jobs, strict=True))
        if features is not None
    ]
