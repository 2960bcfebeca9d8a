"""One pass over the clips: every clip is encoded once per network and mask view, whatever is evaluated afterwards.

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
from mmdistill.fewshot.errors import FeatureError, FewshotError
from mmdistill.fewshot.features import Features, cache_key, merge_features, read_cache, write_cache
from mmdistill.modalities import ModalitySpec, preprocess_clips
from mmdistill.models.videomae import Encoder
from mmdistill.randomness import text_rng

log = logging.getLogger(__name__)

Encode = Callable[[Mapping[str, Tensor], Tensor | None], Tensor]
"""(batch as the loader gives it, visible int64 (B, Lv) or None for all tokens) -> features (B, D)"""


@dataclass(frozen=True)
class Views:
    """How clips are shown to the network (MM-CDFSL section 3.4: ensemble inference over masks).

    Attributes:
        n_masks: masked views per clip; 0: one view, the whole clip.
        ratio: fraction of tokens removed in each view.
        kind: "tube" or "random".
        sharing: "per_clip": masks depend on (seed, clip id, view), as in the paper; "shared": on (seed, view), the same
            for all clips. Never on the batch, the order or the number of processes.
        seed: of the masks.
    """

    n_masks: int = 0
    ratio: float = 0.75
    kind: str = "tube"
    sharing: str = "shared"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.n_masks < 0:
            raise FewshotError(f"n_masks={self.n_masks} must be at least 0")
        if self.sharing not in ("shared", "per_clip"):
            raise FewshotError(f"views={self.sharing!r} is not one of shared, per_clip")
        if self.n_masks and not 0 <= self.ratio < 1:
            raise FewshotError(f"eval_mask_ratio={self.ratio} must lie in [0, 1)")

    @property
    def count(self) -> int:
        """V, how often each clip is encoded."""
        return max(1, self.n_masks)

    @property
    def input_mode(self) -> str:
        """For tables."""
        if self.n_masks == 0:
            return "whole clip"
        return f"{self.n_masks} {self.kind} masks, {self.ratio:.0%} removed, {self.sharing.replace('_', ' ')}"

    def alternatives(self) -> tuple["Views", ...]:
        """This and the other two of: the whole clip, shared masks, masks per clip. To be shown beside each other."""
        masked = replace(self, n_masks=self.n_masks or 2)
        ways = [replace(masked, n_masks=0), replace(masked, sharing="shared"), replace(masked, sharing="per_clip")]
        return (self, *(way for way in ways if way.input_mode != self.input_mode))

    def settings(self) -> dict[str, Any]:
        """What features depend on, for the cache key: nothing but the number of views where nothing is masked."""
        return asdict(self) if self.n_masks else {"n_masks": 0}

    def check(self, grid: tuple[int, int, int]) -> None:
        """Raise `FewshotError` unless the masks leave a token of this grid visible."""
        try:
            self.visible([Clip("", "", (), -1, "")], 0, grid)
        except ValueError as error:
            raise FewshotError(f"{self.input_mode}: {error}") from error

    def visible(self, clips: Sequence[Clip], view: int, grid: tuple[int, int, int]) -> Tensor | None:
        """Visible tokens of one view. int64 (B, Lv), or None for all tokens."""
        if self.n_masks == 0:
            return None
        owners = [clip.id for clip in clips] if self.sharing == "per_clip" else [""]
        masks = np.stack([self._mask(owner, view, grid) for owner in owners])
        return torch.from_numpy(masks).expand(len(clips), -1)

    def _mask(self, owner: str, view: int, grid: tuple[int, int, int]) -> np.ndarray[Any, np.dtype[np.int64]]:
        rng = text_rng(f"view mask/{self.seed}/{view}/{owner}")
        return sample_visible_tokens(grid, ratio=self.ratio, mask_type=self.kind, rng=rng)


@dataclass(frozen=True)
class EncodingJob:
    """One network read out in one way.

    Attributes:
        network: name in every output, such as "student_rgb".
        encode: see `Encode`; runs without gradients.
        grid: tokens (t, h, w), for the masks.
        views: how clips are shown.
        weights: digest of the weights (`weights_digest`), for the cache; "" is never cached.
        info: further plain values for the outputs: checkpoint, modality ...
    """

    network: str
    encode: Encode
    grid: tuple[int, int, int]
    views: Views = field(default_factory=Views)
    weights: str = ""
    info: Mapping[str, Any] = field(default_factory=dict)

    def key(self, data: str | Mapping[str, str]) -> str:
        """Cache key for clips of this version (`data.version.data_fingerprint`; by modality).

        Episodes, shots and heads do not belong here: they change nothing about the features.
        """
        data = data if isinstance(data, str) else data[str(self.info.get("modality"))]
        settings = {**self.views.settings(), "grid": list(self.grid), "modality": self.info.get("modality")}
        return cache_key(weights=self.weights, data=data, settings=settings)


class ClipEncoder:
    """The `Encode` of an `Encoder`: raw clips in, clip features out.

    Args:
        encoder: put into eval mode.
        spec: its modality: key of the batch and statistics.
        device: where it is and runs.
        autocast: makes the context of the encoding (precision).
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
        if self._x is None or self._clip is not clip:  # further views of the batch at hand are prepared already
            g = self.encoder.config
            x = preprocess_clips(
                clip.to(self.device), batch["crop_box"].to(self.device), self.spec, (g.height, g.width)
            )
            self._clip, self._x = clip, x
        with self.autocast():
            features = self.encoder.embed(self._x, None if visible is None else visible.to(self.device))
        return features.float()


def encode_clips(
    jobs: Sequence[EncodingJob], loader: Iterable[Mapping[str, Tensor]], index: ClipIndex, *, show_progress: bool = True
) -> list[Features]:
    """Encode the clips of a loader for all jobs, reading each clip once.

    Args:
        jobs: networks and views.
        loader: batches with the modalities' clips, `view` and `index` int64 (B,), the position of each clip in
            ``index.clips``; in any order. On one of several ranks it may hold a part of the clips.
        index: the clips.

    Returns:
        for each job the features of the clips that the loader held, in the order of `index`.

    Raises:
        FeatureError: a network gave NaN or infinite values (naming it and the clips), or a clip came twice.
    """
    jobs = list(jobs)
    blocks: list[list[np.ndarray[Any, np.dtype[np.float32]]]] = [[] for _ in jobs]
    seconds = [0.0] * len(jobs)
    order: list[int] = []
    names = ", ".join(dict.fromkeys(job.network for job in jobs))
    with torch.inference_mode(), progress(f"encoding {names}", len(index.clips), enabled=show_progress) as advance:
        for batch in loader:
            rows = batch["index"].tolist()
            clips = [index.clips[i] for i in rows]
            for number, job in enumerate(jobs):
                start = time.perf_counter()
                blocks[number].append(_encode(job, batch, clips))
                seconds[number] += time.perf_counter() - start
            order += rows
            advance(len(rows))
    if len(set(order)) != len(order):
        raise FeatureError(f"the loader gave {len(order)} clips, of which only {len(set(order))} are distinct")
    if not order:
        raise FeatureError("the loader gave no clip")
    return [_features(job, block, order, index, s) for job, block, s in zip(jobs, blocks, seconds, strict=True)]


def _encode(
    job: EncodingJob, batch: Mapping[str, Tensor], clips: Sequence[Clip]
) -> np.ndarray[Any, np.dtype[np.float32]]:
    """All views of one batch. float32 (B, V, D)"""
    views = []
    for view in range(job.views.count):
        out = job.encode(batch, job.views.visible(clips, view, job.grid)).float().cpu()
        if out.ndim != 2 or len(out) != len(clips):
            raise FeatureError(f"{job.network}: features of {len(clips)} clips must be (B, D), got {tuple(out.shape)}")
        bad = ~out.isfinite().all(dim=1)
        if bool(bad.any()):
            which = [clip.id for clip, is_bad in zip(clips, bad.tolist(), strict=True) if is_bad]
            raise FeatureError(
                f"{job.network}: NaN or infinite features of {len(which)} of {len(clips)} clips in this batch, such as "
                f"{', '.join(which[:3])}; its weights or these clips are broken"
            )
        views.append(out)
    return torch.stack(views, dim=1).numpy()


def _features(
    job: EncodingJob,
    blocks: Sequence[np.ndarray[Any, np.dtype[np.float32]]],
    order: list[int],
    index: ClipIndex,
    seconds: float,
) -> Features:
    positions = np.argsort(order)
    x = np.concatenate(blocks)[positions]
    clips = [index.clips[order[p]] for p in positions]
    if len(x) > 1 and float(np.ptp(x, axis=0).max()) == 0.0:
        log.warning("%s: all %d clips have the same features; it has collapsed", job.network, len(x))
    info = {**_describe(job), "seconds": seconds}
    labels = np.array([clip.label for clip in clips], dtype=np.int64)
    ids, groups = tuple(clip.id for clip in clips), tuple(clip.group for clip in clips)
    return Features(x, labels, ids, groups, index.classes, info)


def _describe(job: EncodingJob) -> dict[str, Any]:
    return {
        **job.info,
        "network": job.network,
        "input_mode": job.views.input_mode,
        "views": job.views.sharing if job.views.n_masks else "whole",
        "n_masks": job.views.n_masks,
        "mask_ratio": job.views.ratio if job.views.n_masks else 0.0,
    }


def encode_cached(
    jobs: Sequence[EncodingJob],
    loader: Callable[[], Iterable[Mapping[str, Tensor]]],
    index: ClipIndex,
    *,
    data: str | Mapping[str, str],
    cache: str | Path | None,
    show_progress: bool = True,
    note: Callable[[], Mapping[str, Any]] = dict,
) -> list[Features]:
    """`encode_clips` with a cache, over all ranks of a process group where there is one.

    Args:
        jobs: networks and views; those found in the cache are not encoded.
        loader: called only if something must be encoded; on several ranks each rank's loader holds its part.
        index: all clips.
        data: version of the clips' pixels, one for all or by modality (`data.version.data_fingerprint`).
        cache: folder, or None for no cache.
        note: called on every rank after clips were encoded: plain values that stay with their features, as ``info``.

    Returns:
        features of all clips for each job, the same on every rank. ``info["cached"]`` says where they came from.
    """
    keys = [job.key(data) for job in jobs]
    usable = [cache is not None and job.weights != "" for job in jobs]
    found: list[Features | None] = [None] * len(jobs)
    if get_rank() == 0:
        found = [read_cache(cache, key) if use and cache else None for key, use in zip(keys, usable, strict=True)]
    found = broadcast_object(found)
    missing = [i for i, features in enumerate(found) if features is None]
    if missing:
        ids = [clip.id for clip in index.clips]
        wanted = [jobs[i] for i in missing]
        parts = run_on_all_ranks(
            lambda: encode_clips(wanted, loader(), index, show_progress=show_progress), error_class=None
        )
        noted = dict(note())
        for number, i in enumerate(missing):
            whole = merge_features([part[number] for part in parts], ids)
            whole = replace(whole, info={**whole.info, **noted})
            found[i] = whole
            if usable[i] and cache is not None and get_rank() == 0:
                try:
                    write_cache(cache, keys[i], whole)
                except OSError as error:
                    log.warning("features are not kept in the cache, the next evaluation encodes again: %s", error)
    made = set(missing)
    return [_note(f, job, i not in made) for i, (f, job) in enumerate(zip(found, jobs, strict=True)) if f is not None]


def _note(features: Features, job: EncodingJob, cached: bool) -> Features:
    """Cached features carry the name that this run gives the network, which may differ from the one that made them."""
    return replace(features, info={**features.info, **_describe(job), "cached": cached})
