"""Clips as samples: raw arrays, the tokens that are visible, and one view that all modalities share."""

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import cv2
import numpy as np
import torch
from torch.utils.data import Dataset

from mmdistill.data.clips import Clip, ClipIndex
from mmdistill.data.masking import sample_visible_tokens
from mmdistill.data.readers.base import FrameError, Reader
from mmdistill.randomness import seeded_rng

ON_MISSING = ("error", "repeat", "skip")
REPLACEMENTS = 8  # other clips tried in place of one that cannot be read


class ClipDataset(Dataset[dict[str, Any]]):
    """``ds[(epoch, i)]`` is clip i as it looks in that epoch; ``ds[i]`` means epoch 0.

    A sample depends on (seed, epoch, clip id) and the files alone, never on what was read before or by which worker.

    What cannot be read is a policy:

    - ``error``: raise, naming the file.
    - ``repeat``: an unreadable frame shows the nearest readable one of its clip. Clips without any are left out.
    - ``skip``: clips that lack a file are left out of `index` from the start.

    What is found unreadable only later (a truncated JPEG, say) is replaced by another, seeded clip in training, and
    raises in evaluation, where each clip counts. `missing_report` says what was done.

    Args:
        index: the clips. ``self.index`` is without those left out.
        readers: by modality; each becomes a key of the sample.
        grid: tokens (t, h, w).
        crop_size: (height, width) of the view, in px of the stored frame.
        frame_size: (height, width) of the stored frames.
        mask_type, mask_ratio: see `sample_visible_tokens`.
        augment: training: draw view and flip. Otherwise the centre crop.
        random_crop_min_scale: smallest view, as a fraction of `crop`.
        hflip_prob: probability of a horizontal flip.
        cached_epochs: with N > 0, epoch e looks like epoch ``e % N``, and from epoch N on only `always_decoded` modalities
            are read: the others' features are kept, see `mmdistill.distill.teacher_cache`.
        always_decoded: see `cached_epochs`.
        max_replaced_fraction: largest share of clips that may be replaced before that is an error.

    Raises:
        ValueError: naming the argument; `FrameError` from ``ds[...]`` for files.
    """

    def __init__(
        self,
        index: ClipIndex,
        readers: Mapping[str, Reader],
        *,
        grid: tuple[int, int, int],
        crop_size: tuple[int, int],
        frame_size: tuple[int, int],
        mask_type: str = "tube",
        mask_ratio: float = 0.0,
        seed: int = 0,
        augment: bool = False,
        random_crop_min_scale: float = 1.0,
        hflip_prob: float = 0.0,
        on_missing: str = "error",
        max_replaced_fraction: float = 0.05,
        cached_epochs: int = 0,
        always_decoded: tuple[str, ...] = ("rgb",),
    ) -> None:
        if on_missing not in ON_MISSING:
            raise ValueError(f"on_missing={on_missing!r} is not one of {', '.join(ON_MISSING)}")
        if crop_size[0] > frame_size[0] or crop_size[1] > frame_size[1]:
            raise ValueError(f"crop_size={crop_size} is larger than the stored frame {frame_size}")
        if not 0 < random_crop_min_scale <= 1:
            raise ValueError(f"random_crop_min_scale={random_crop_min_scale} must lie in (0, 1]")
        sample_visible_tokens(
            grid, ratio=mask_ratio, mask_type=mask_type, rng=np.random.default_rng(0)
        )  # refuse a bad mask now
        self.readers = dict(readers)
        self.grid, self.crop_size, self.frame_size = grid, crop_size, frame_size
        self.mask_type, self.mask_ratio = mask_type, mask_ratio
        self.seed, self.augment, self.random_crop_min_scale, self.hflip_prob = (
            seed,
            augment,
            random_crop_min_scale,
            hflip_prob,
        )
        self.on_missing, self.max_replaced_fraction = on_missing, max_replaced_fraction
        self.cached_epochs, self.always_decoded = cached_epochs, always_decoded
        self._left_out: dict[str, Counter[str]] = {name: Counter() for name in self.readers}
        self.index = index if on_missing == "error" else self._drop_missing(index)
        # Workers write here what they did, one cell per clip and modality; the last column: clip replaced. Writing a
        # cell again gives the same value, so no lock is needed, and the main process sees it.
        self._seen = torch.zeros(len(self.index.clips), len(self.readers) + 1, dtype=torch.int16).share_memory_()

    def __len__(self) -> int:
        return len(self.index.clips)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        epoch, i = key if isinstance(key, tuple) else (0, key)
        if not -len(self) <= i < len(self):
            raise IndexError(f"clip {i} of {len(self)}")
        i %= len(self)
        cached = 0 < self.cached_epochs <= epoch
        epoch = epoch % self.cached_epochs if self.cached_epochs else epoch
        if cached and self._seen[i, -1]:  # replaced when all of it was read: its features are not there
            return self._replacement(epoch, i, FrameError("its files could not be read"), cached)
        try:
            return self._sample(epoch, i, cached)
        except FrameError as error:
            if self.on_missing == "error" or not self.augment:
                raise FrameError(f"clip {self.index.clips[i].id}: {error}") from error
            return self._replacement(epoch, i, error, cached)

    def crop_box(self, epoch: int, clip: Clip) -> np.ndarray:
        """float32 [5]: top, left, height, width of the crop in px of the stored frame, and 1 for a flip."""
        (rows, columns), (height, width) = self.frame_size, self.crop_size
        if not self.augment:
            return np.array([(rows - height) // 2, (columns - width) // 2, height, width, 0], np.float32)
        rng = seeded_rng(self.seed, epoch, clip.id, "view")
        scale = rng.uniform(self.random_crop_min_scale, 1.0)
        height, width = max(1, round(height * scale)), max(1, round(width * scale))
        top, left = rng.integers(rows - height + 1), rng.integers(columns - width + 1)
        return np.array([top, left, height, width, rng.random() < self.hflip_prob], np.float32)

    @property
    def stats_tensor(self) -> torch.Tensor:
        """int16 [clips, modalities + 1]: frames repeated of each clip, and whether it was replaced; a copy."""
        return self._seen.clone()

    def missing_report(self, stats: torch.Tensor | None = None) -> dict[str, Any]:
        """What the policy did so far, counted per modality and rally, all workers together.

        `stats` are those of several processes, merged; None: of this one.

        ``clips_skipped`` and ``frames_repeated`` are {modality: {rally: count}}, ``clips_replaced`` {rally: count};
        each clip counts once, however often it was read.
        """
        repeated: dict[str, Counter[str]] = {name: Counter() for name in self.readers}
        replaced: Counter[str] = Counter()
        done = self._seen if stats is None else stats
        for i in done.any(dim=1).nonzero().flatten().tolist():
            video = self.index.clips[i].video
            *frames, whole = done[i].tolist()
            for name, count in zip(self.readers, frames, strict=True):
                if count:
                    repeated[name][video] += count
            if whole:
                replaced[video] += 1
        return {
            "policy": self.on_missing,
            "clips": len(self),
            "clips_skipped": {name: dict(c) for name, c in self._left_out.items() if c},
            "frames_repeated": {name: dict(c) for name, c in repeated.items() if c},
            "clips_replaced": dict(replaced),
        }

    def _sample(self, epoch: int, i: int, cached: bool = False) -> dict[str, Any]:
        clip = self.index.clips[i]
        sample: dict[str, Any] = {}
        for column, (name, reader) in enumerate(self.readers.items()):
            if cached and name not in self.always_decoded:
                continue
            if self.on_missing == "repeat":
                sample[name], repeated = reader.read_with_repeats(clip.video, clip.frames)
                if repeated:
                    self._seen[i, column] = len(repeated)
            else:
                sample[name] = reader.read(clip.video, clip.frames)
        rng = seeded_rng(self.seed, epoch, clip.id, "mask")
        sample["visible"] = sample_visible_tokens(self.grid, ratio=self.mask_ratio, mask_type=self.mask_type, rng=rng)
        sample["crop_box"] = self.crop_box(epoch, clip)
        sample["label"], sample["index"] = np.int64(clip.label), np.int64(i)
        return sample

    def _replacement(self, epoch: int, i: int, error: FrameError, cached: bool = False) -> dict[str, Any]:
        """Another clip in place of one that cannot be read."""
        self._seen[i, -1] = 1
        allowed = max(1, math.ceil(self.max_replaced_fraction * len(self)))
        if int(self._seen[:, -1].sum()) <= allowed:
            rng = seeded_rng(self.seed, epoch, self.index.clips[i].id, "replacement")
            for other in rng.integers(len(self), size=REPLACEMENTS).tolist():
                if cached and self._seen[other, -1]:
                    continue
                try:
                    return self._sample(epoch, other, cached)
                except FrameError:
                    self._seen[other, -1] = 1
        raise FrameError(
            f"more than {allowed} of {len(self)} clips cannot be read, the last one {self.index.clips[i].id}: {error}. "
            "Run scripts/check_data.py"
        ) from error

    def _drop_missing(self, index: ClipIndex) -> ClipIndex:
        """Without the clips that the policy leaves out."""
        wanted: dict[str, set[int]] = {}
        for clip in index.clips:
            wanted.setdefault(clip.video, set()).update(clip.frames)
        absent = {
            (name, video): set(reader.missing_frames(video, sorted(frames)))
            for name, reader in self.readers.items()
            for video, frames in wanted.items()
        }
        kept = []
        for clip in index.clips:
            limit = len(clip.frames) if self.on_missing == "repeat" else 1
            lacking = [n for n in self.readers if len(absent[n, clip.video].intersection(clip.frames)) >= limit]
            for name in lacking:
                self._left_out[name][clip.video] += 1
            if not lacking:
                kept.append(clip)
        report = {**index.report, "skipped_as_missing": len(index.clips) - len(kept)}
        return ClipIndex(tuple(kept), index.classes, report)


def init_worker(_worker: int) -> None:
    """One thread per loader worker: the workers are the parallelism. Denormals are flushed here too."""
    torch.set_flush_denormal(True)
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
