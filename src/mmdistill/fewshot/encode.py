"""Encode clips: each clip is read once, and encoded once per network and masked view (the first one: warm-up, twice).

Shapes: B batch, N clips, V views, L tokens, Lv visible tokens, D width.
"""

import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmdistill.console import progress
from mmdistill.data.clips import Clip, ClipIndex
from mmdistill.data.masking import MaskSpec
from mmdistill.distributed.collectives import broadcast_object, get_rank, run_on_all_ranks
from mmdistill.distributed.device import autocast
from mmdistill.errors import format_count
from mmdistill.fewshot.episodes import FloatArray
from mmdistill.fewshot.errors import FeatureError, FewshotError
from mmdistill.fewshot.features import Features, merge_features, read_cache, write_cache
from mmdistill.modalities import ModalitySpec, preprocess_clips
from mmdistill.models.pooling import Pooling
from mmdistill.models.videomae import Encoder
from mmdistill.randomness import text_rng

log = logging.getLogger(__name__)

_CACHE_FORMAT = 2  # increase it when the meaning of cached numbers changes

Encode = Callable[[Mapping[str, Tensor], Tensor | None], Tensor]
"""(batch of the loader, visible int64 (B, Lv) or None for all tokens) -> features (B, D)"""


@dataclass(frozen=True)
class EvalMasks:
    """The input mode of an evaluation: whole clips or masked views (MM-CDFSL section 3.4: ensemble over masks).

    Attributes:
        n_masks: number of masked views per clip; 0: one view, the whole clip.
        eval_mask_ratio: fraction of the tokens that is removed from each view.
        mask_type: "tube", "random" or "motion".
        shared_masks: whether a mask depends on (seed, view) only. Otherwise it depends on (seed, clip id, view), as in
            the paper. It never depends on the batch, the order or the number of processes. A motion mask also depends
            on the frames of the clip, so it cannot be shared.
        mask_temperature: of motion masks.
    """

    n_masks: int = 0
    eval_mask_ratio: float = 0.75
    mask_type: str = "tube"
    shared_masks: bool = True
    seed: int = 0
    mask_temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.n_masks and self.mask_type == "motion" and self.shared_masks:
            raise FewshotError("mask_type=motion depends on the clip; use eval_masks=per_clip (--eval-masks per_clip)")
        if self.n_masks < 0:
            raise FewshotError(f"n_masks={self.n_masks} must be at least 0")
        if self.n_masks and not 0 <= self.eval_mask_ratio < 1:
            raise FewshotError(f"eval_mask_ratio={self.eval_mask_ratio} must lie in [0, 1)")

    @property
    def eval_masks(self) -> str:
        """The value of ``data_module.eval_masks``; "none" for whole clips."""
        return "none" if self.n_masks == 0 else "shared" if self.shared_masks else "per_clip"

    @property
    def input_mode(self) -> str:
        """Description for tables."""
        if self.n_masks == 0:
            return "whole clips"
        removed = f"{self.eval_mask_ratio:.0%} removed"
        return f"{format_count(self.n_masks, f'{self.mask_type} mask')}, {removed}, {self.eval_masks.replace('_', ' ')}"

    def input_modes(self) -> tuple["EvalMasks", ...]:
        """This input mode first, then the others of: whole clips, shared masks (not of motion), masks per clip."""
        n_masks = self.n_masks or 2
        shared = () if self.mask_type == "motion" else (replace(self, n_masks=n_masks, shared_masks=True),)
        modes = (replace(self, n_masks=0), *shared, replace(self, n_masks=n_masks, shared_masks=False))
        return (self, *(mode for mode in modes if mode.input_mode != self.input_mode))

    def require_visible_tokens(self, grid: tuple[int, int, int]) -> None:
        """Raise `FewshotError` if the masks leave no token of this grid visible."""
        try:
            self.visible_tokens([Clip("", "", (), -1, "")], 0, grid, torch.ones(1, math.prod(grid)))
        except ValueError as error:
            raise FewshotError(f"{self.input_mode}: {error}") from error

    @property
    def settings(self) -> dict[str, Any]:
        """The values that determine the masks, for cache keys."""
        if self.n_masks == 0:
            return {"n_masks": 0}
        values = asdict(self)
        if self.mask_type != "motion":
            values.pop("mask_temperature")
        return values

    def visible_tokens(
        self, clips: Sequence[Clip], view: int, grid: tuple[int, int, int], motion: Tensor | None = None
    ) -> Tensor | None:
        """Visible tokens of one view. int64 (B, Lv), or None for all tokens. `motion`: weights (B, L) of the tokens."""
        if self.n_masks == 0:
            return None

        owners = [""] if self.shared_masks else [clip.id for clip in clips]
        weights = [None] * len(owners) if motion is None else list(motion.numpy())
        spec = MaskSpec(grid, self.mask_type, self.eval_mask_ratio, self.mask_temperature)
        rngs = (text_rng(f"view mask/{self.seed}/{view}/{owner}") for owner in owners)
        masks = np.stack([spec.sample(rng, row) for rng, row in zip(rngs, weights, strict=False)])
        return torch.from_numpy(masks).expand(len(clips), -1)


@dataclass(frozen=True)
class EncodingJob:
    """One network in one input mode.

    Attributes:
        network: name of the network in every output, for example "student_rgb".
        encode: see `Encode`; runs without gradients.
        grid: tokens (t, h, w), for the masks.
        masks: the input mode.
        weights: digest of everything that determines `encode`. Features with "" are never cached.
        info: further plain values for the outputs: checkpoint, modality ...
        pooling: that of `encode`.
    """

    network: str
    encode: Encode
    grid: tuple[int, int, int]
    masks: EvalMasks = field(default_factory=EvalMasks)
    weights: str = ""
    info: Mapping[str, Any] = field(default_factory=dict)
    pooling: Pooling = field(default_factory=Pooling)

    def cache_key(self, data: str | Mapping[str, str]) -> str:
        """Cache key of the features of clips with this fingerprint (of `data_fingerprint`; or one by modality)."""
        modality = self.info.get("modality")
        data = data if isinstance(data, str) else data[str(modality)]
        settings = {**self.masks.settings, "grid": list(self.grid), "modality": modality}
        if self.pooling.name != "mean":  # the keys of earlier versions stay valid
            settings["pooling"] = str(self.pooling)
        parts = {"format": _CACHE_FORMAT, "weights": self.weights, "data": data, "settings": settings}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def features_info(self) -> dict[str, Any]:
        """Origin of the features, for `Features.info`."""
        pooling = "" if self.pooling.name == "mean" else f", pooling {self.pooling}"
        return {
            **self.info,
            "network": self.network,
            "input_mode": self.masks.input_mode + pooling,
            "eval_masks": self.masks.eval_masks,
            "n_masks": self.masks.n_masks,
            "eval_mask_ratio": self.masks.eval_mask_ratio if self.masks.n_masks else 0.0,
        }


class ClipEncoder:
    """The `Encode` function of an encoder: raw clips to clip features.

    It moves the encoder to `device` and puts it into eval mode. `precision` is "32", "bf16" or "16" (autocast). Motion
    pooling needs ``motion`` in the batches.
    """

    def __init__(
        self,
        encoder: Encoder,
        spec: ModalitySpec,
        *,
        device: torch.device | str = "cpu",
        precision: str = "32",
        pooling: Pooling | None = None,
    ) -> None:
        self.pooling = pooling or Pooling()
        self.encoder, self.spec = encoder.to(device).eval(), spec
        self.device, self.precision = torch.device(device), precision
        self._last: tuple[Tensor, Tensor] | None = None  # raw and preprocessed clips, for all views of a batch

    def __call__(self, batch: Mapping[str, Tensor], visible: Tensor | None) -> Tensor:
        """(B, D) float32."""
        clips = batch[self.spec.name]
        if self._last is None or self._last[0] is not clips:
            size = (self.encoder.config.height, self.encoder.config.width)
            x = preprocess_clips(clips.to(self.device), batch["crop_box"], self.spec, size)
            self._last = clips, x
        visible = None if visible is None else visible.to(self.device)
        with autocast(self.precision, self.device):
            features = self.encoder.embed(self._last[1], visible, self.pooling, batch.get("motion"))
        return features.float()


def encode_clips(
    jobs: Sequence[EncodingJob],
    loader: Iterable[Mapping[str, Tensor]],
    index: ClipIndex,
    *,
    show_progress: bool = True,
) -> list[Features]:
    """Encode the clips of a loader for all jobs. Each clip is read once.

    The batches of `loader` contain the modalities' clips, `crop_box`, and `index` int64 (B,), the position of each clip
    in ``index.clips``. They may be in any order, and contain a part of the clips. Returns the features of these clips
    for each job, in the order of `index`.

    Raises:
        FeatureError: a network returned NaN or infinite values (the message names it and the clips), or a clip occurs
            twice.
    """
    blocks: list[list[FloatArray]] = [[] for _ in jobs]
    seconds = [0.0] * len(jobs)
    order: list[int] = []
    names = ", ".join(dict.fromkeys(job.network for job in jobs))
    with torch.inference_mode(), progress(f"encoding {names}", len(index.clips), enabled=show_progress) as advance:
        for batch in loader:
            rows = batch["index"].tolist()
            if not order:
                _warm_up(jobs, batch, index.clips[rows[0]])
            for number, job in enumerate(jobs):
                start = time.perf_counter()
                blocks[number].append(_encode_batch(job, batch, [index.clips[i] for i in rows]))
                seconds[number] += time.perf_counter() - start
            order += rows
            advance(len(rows))
    if len(set(order)) != len(order):
        raise FeatureError(
            f"the loader returned {format_count(len(order), 'clip')}, of which {len(set(order))} are distinct"
        )
    if not order:
        raise FeatureError("the loader returned no clip")
    clips = [index.clips[i] for i in sorted(order)]
    labels = np.array([clip.label for clip in clips], dtype=np.int64)
    ids, groups = tuple(clip.id for clip in clips), tuple(clip.group for clip in clips)
    found = []
    for job, block, duration in zip(jobs, blocks, seconds, strict=True):
        x = np.concatenate(block)[np.argsort(order)]
        if len(x) > 1 and float(np.ptp(x, axis=0).max()) == 0.0:
            log.warning("%s: all %d clips have the same features (representation collapse)", job.network, len(x))
        found.append(Features(x, labels, ids, groups, index.classes, {**job.features_info(), "seconds": duration}))
    return found


def _warm_up(jobs: Sequence[EncodingJob], batch: Mapping[str, Tensor], clip: Clip) -> None:
    """Encode the first clip of a batch with each job: the first call also initializes threads and kernels."""
    first = {name: values[:1] for name, values in batch.items()}
    for job in jobs:
        job.encode(first, job.masks.visible_tokens([clip], 0, job.grid, first.get("motion")))


def _encode_batch(job: EncodingJob, batch: Mapping[str, Tensor], clips: Sequence[Clip]) -> FloatArray:
    """All views of one batch. float32 (B, V, D)."""
    views = []
    for view in range(max(1, job.masks.n_masks)):
        visible = job.masks.visible_tokens(clips, view, job.grid, batch.get("motion"))
        out = job.encode(batch, visible).float().cpu()
        if out.ndim != 2 or len(out) != len(clips):
            raise FeatureError(
                f"{job.network}: features of {format_count(len(clips), 'clip')} must be (B, D), got {tuple(out.shape)}"
            )
        bad_ids = [clip.id for clip, is_finite in zip(clips, out.isfinite().all(dim=1), strict=True) if not is_finite]
        if bad_ids:
            raise FeatureError(
                f"{job.network}: NaN or infinite features of {len(bad_ids)} of {format_count(len(clips), 'clip')} in "
                f"this batch, for example {', '.join(bad_ids[:3])}; the weights or these clips are invalid"
            )
        views.append(out)
    features: FloatArray = torch.stack(views, dim=1).numpy()
    return features


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
        loader: called only if clips must be encoded. Each rank's loader contains its part of the clips.
        index: all clips.
        data: fingerprint of the clips (`data.fingerprint.data_fingerprint`), one for all or by modality.
        cache: folder of the cache, or None.
        show_progress: show a progress bar.
        collect_info: called on every rank after encoding; returns plain values for `Features.info`.

    Returns:
        Features of all clips for each job, the same on every rank. ``info["cached"]`` is True for cached ones.
    """
    keys = [job.cache_key(data) if cache is not None and job.weights else None for job in jobs]
    found: list[Features | None] = [None] * len(jobs)
    if get_rank() == 0 and cache is not None:
        found = [read_cache(cache, key) if key else None for key in keys]
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
            key = keys[i]
            if key and cache is not None and get_rank() == 0:
                try:
                    write_cache(cache, key, merged)
                except OSError as error:
                    log.warning("cannot write the feature cache, so the next evaluation encodes again: %s", error)
    # The name of a network may differ from that of the run that filled the cache.
    return [
        replace(features, info={**features.info, **job.features_info(), "cached": i not in missing})
        for i, (features, job) in enumerate(zip(found, jobs, strict=True))
        if features is not None
    ]
