"""Clips as samples: raw arrays, visible tokens, and one crop box that all modalities share."""

import itertools
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import cv2
import numpy as np
import torch
from torch.utils.data import Dataset

from mmdistill.data.clips import Clip, ClipIndex, ClipTable, required_frames, select_clips
from mmdistill.data.masking import MaskSpec
from mmdistill.data.motion import token_weights
from mmdistill.data.readers.base import FrameError, MissingFileError, Reader
from mmdistill.errors import format_count, quote_name
from mmdistill.randomness import seeded_rng

ON_MISSING = ("error", "repeat", "skip")
MAX_REPLACED_FRACTION = 0.05  # of the clips; more that cannot be read are an error
MAX_REPLACEMENT_TRIES = 8  # clips tried in place of one that cannot be read


@dataclass(frozen=True)
class CropSpec:
    """The crop of a clip. Sizes are (height, width) in px of the stored frame.

    Raises:
        ValueError: a value is invalid; names it.
    """

    frame_size: tuple[int, int]  # size of the stored frames
    crop_size: tuple[int, int]  # size of the model input, and of a crop at scale 1
    augment: bool = False  # True (training): random crop and flip. False: center crop
    random_crop_min_scale: float = 1.0  # smallest random crop, as a fraction of `crop_size`
    hflip_prob: float = 0.0  # probability of a horizontal flip
    resize: str = "crop"  # crop: the input is a crop of its size. squash: it is the whole frame, resized per axis

    def __post_init__(self) -> None:
        if self.resize not in ("crop", "squash"):
            raise ValueError(f"resize={self.resize!r} is not one of crop, squash")
        is_larger = self.crop_size[0] > self.frame_size[0] or self.crop_size[1] > self.frame_size[1]
        if is_larger and self.resize == "crop":
            raise ValueError(f"crop_size={self.crop_size} is larger than the stored frame {self.frame_size}")
        if not 0 < self.random_crop_min_scale <= 1:
            raise ValueError(f"random_crop_min_scale={self.random_crop_min_scale} must lie in (0, 1]")
        if not 0 <= self.hflip_prob <= 1:
            raise ValueError(f"hflip_prob={self.hflip_prob} must lie in [0, 1]")

    def draw_box(self, rng: np.random.Generator) -> np.ndarray:
        """float32 [5]: top, left, height, width of the crop, and 1 for a horizontal flip."""
        frame_height, frame_width = self.frame_size
        height, width = self.crop_size if self.resize == "crop" else self.frame_size
        if not self.augment:
            return np.array([(frame_height - height) // 2, (frame_width - width) // 2, height, width, 0], np.float32)
        scale = rng.uniform(self.random_crop_min_scale, 1.0)
        height, width = max(1, round(height * scale)), max(1, round(width * scale))
        top, left = rng.integers(frame_height - height + 1), rng.integers(frame_width - width + 1)
        return np.array([top, left, height, width, rng.random() < self.hflip_prob], np.float32)


class ClipDataset(Dataset[dict[str, Any]]):
    """``ds[(epoch, i)]`` is the sample of clip i in that epoch. ``ds[i]`` is its sample in epoch 0.

    A sample is a pure function of the seed, the epoch, the clip id and the files. Its keys are the modalities (raw
    arrays, see their readers), ``visible`` (int64 [L_vis], sorted indices of visible tokens), ``crop_box`` (see
    `CropSpec.draw_box`), ``label`` and ``index`` (int64).

    Policies for missing or unreadable files:

    - ``error``: raise an error that names the file.
    - ``repeat``: replace an unreadable frame by the nearest readable one of its clip. Clips without any are skipped.
    - ``skip``: remove clips with a missing file from `index` at the start.

    With ``repeat`` and ``skip``, a file may turn out to be unreadable only when it is read, for example a truncated
    JPEG. In training the clip is then replaced by another, seeded one, up to `MAX_REPLACED_FRACTION` of all clips. In
    evaluation it raises, because each clip counts. `missing_report` counts all of these.

    Args:
        index: the clips. ``self.index`` does not contain the skipped ones.
        readers: readers by modality.
        crop: the crop; ``crop.augment`` distinguishes training from evaluation.
        mask: the token mask.
        seed: seed of crops, flips, masks and replacements.
        on_missing: the policy.
        cached_epochs: N > 0: epoch e has the samples of epoch ``e % N``. From epoch N on only the modalities in
            `always_decoded` are read, because `mmdistill.distill.teacher_cache` has the features of the others.
        always_decoded: see `cached_epochs`.
        motion_source: modality whose motion gives ``motion``, float32 [L], the weights of the tokens for
            ``mask.mask_type="motion"`` and for pooling (see `data.motion.token_weights`); None: samples have none.

    Raises:
        ValueError: an argument is invalid; names it.
        FrameError: raised by ``ds[...]`` if a file cannot be read.
    """

    def __init__(
        self,
        index: ClipIndex,
        readers: Mapping[str, Reader],
        crop: CropSpec,
        mask: MaskSpec,
        *,
        seed: int = 0,
        on_missing: str = "error",
        cached_epochs: int = 0,
        always_decoded: tuple[str, ...] = (),
        motion_source: str | None = None,
    ) -> None:
        if on_missing not in ON_MISSING:
            raise ValueError(f"on_missing={on_missing!r} is not one of {', '.join(ON_MISSING)}")
        self.readers, self.crop, self.mask = dict(readers), crop, mask
        if motion_source and type(self.readers[motion_source]).motion_energy is Reader.motion_energy:
            raise ValueError(f"the modality {motion_source} defines no motion, which mask_type=motion and pooling need")
        self.seed, self.on_missing, self.motion_source = seed, on_missing, motion_source
        self.cached_epochs, self.always_decoded = cached_epochs, always_decoded
        self._skipped: dict[str, Counter[str]] = {name: Counter() for name in self.readers}
        self.index = index if on_missing == "error" else self._drop_missing(index)
        if isinstance(self.index.clips, ClipTable):
            table = self.index.clips
            self.index = replace(self.index, clips=replace(table, rows=torch.as_tensor(table.rows)))
        # Frames repeated per clip and modality; last column: clip was replaced. Workers write to it (`share_memory`).
        # A cell always gets the same value, so no lock is needed.
        self._seen = torch.zeros(len(self.index.clips), len(self.readers) + 1, dtype=torch.int16)

    def share_memory(self) -> None:
        """Move the counts to shared memory, to which loader workers write. `ClipLoader` calls it if it has workers."""
        self._seen.share_memory_()

    def __len__(self) -> int:
        return len(self.index.clips)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        epoch, i = key if isinstance(key, tuple) else (0, key)
        if not -len(self) <= i < len(self):
            raise IndexError(f"clip {i} of {len(self)}")
        i %= len(self)
        cached = 0 < self.cached_epochs <= epoch
        epoch = epoch % self.cached_epochs if self.cached_epochs else epoch
        if cached and self._seen[i, -1]:  # it was replaced when all modalities were read, so the cache has no features
            return self._replacement(epoch, i, FrameError("its files could not be read"), cached)
        try:
            return self._sample(epoch, i, cached)
        except FrameError as error:
            if self.on_missing == "error" or not self.crop.augment:
                raise FrameError(f"clip {quote_name(self.index.clips[i].id)}: {error}; {self._fix(error)}") from error
            return self._replacement(epoch, i, error, cached)

    def _fix(self, error: FrameError) -> str:
        """What to do about a frame that cannot be read."""
        if not isinstance(error, MissingFileError):
            return "replace this file; `mmdistill check-data` lists all invalid files"
        policy = ", or set data_module.on_missing=repeat or skip" if self.on_missing == "error" else ""
        return f"add the missing file{policy}; `mmdistill check-data` lists all missing files"

    def crop_box(self, epoch: int, clip: Clip) -> np.ndarray:
        """The crop box of a clip in an epoch; see `CropSpec.draw_box`."""
        return self.crop.draw_box(seeded_rng(self.seed, epoch, clip.id, "view"))

    @property
    def stats_tensor(self) -> torch.Tensor:
        """int16 [clips, modalities + 1], copied: frames repeated per clip and modality; last column: clip replaced."""
        return self._seen.clone()

    def missing_report(self, stats: torch.Tensor | None = None) -> dict[str, Any]:
        """Counts of skipped clips, repeated frames and replaced clips.

        Args:
            stats: `stats_tensor` merged over several processes; None: that of this process and its workers.

        Returns:
            ``clips_skipped`` and ``frames_repeated``: {modality: {rally: count}}; ``clips_replaced``: {rally: count}. A
            clip is counted once, however often it is read.
        """
        stats = self._seen if stats is None else stats
        counts: dict[str, Counter[str]] = {name: Counter() for name in (*self.readers, "")}  # "": replaced clips
        for i, column in stats.nonzero().tolist():
            name = (*self.readers, "")[column]
            counts[name][self.index.clips[i].video] += int(stats[i, column]) if name else 1
        replaced = counts.pop("")
        return {
            "policy": self.on_missing,
            "clips": len(self),
            "clips_skipped": {name: dict(c) for name, c in self._skipped.items() if c},
            "frames_repeated": {name: dict(c) for name, c in counts.items() if c},
            "clips_replaced": dict(replaced),
        }

    def _sample(self, epoch: int, i: int, cached: bool) -> dict[str, Any]:
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
        crop_box = self.crop_box(epoch, clip)
        if self.motion_source:
            energy = self.readers[self.motion_source].motion_energy(sample[self.motion_source])
            sample["motion"] = token_weights(energy, crop_box, self.mask.grid)
        sample["visible"] = self.mask.sample(seeded_rng(self.seed, epoch, clip.id, "mask"), sample.get("motion"))
        sample["crop_box"] = crop_box
        sample["label"], sample["index"] = np.int64(clip.label), np.int64(i)
        return sample

    def _replacement(self, epoch: int, i: int, error: FrameError, cached: bool) -> dict[str, Any]:
        """The sample of another clip, in place of one that cannot be read."""
        self._seen[i, -1] = 1
        allowed = max(1, math.ceil(MAX_REPLACED_FRACTION * len(self)))
        if int(self._seen[:, -1].sum()) <= allowed:
            rng = seeded_rng(self.seed, epoch, self.index.clips[i].id, "replacement")
            for other in rng.integers(len(self), size=MAX_REPLACEMENT_TRIES).tolist():
                if cached and self._seen[other, -1]:
                    continue
                try:
                    return self._sample(epoch, other, cached)
                except FrameError:
                    self._seen[other, -1] = 1
        raise FrameError(
            f"more than {allowed} of {format_count(len(self), 'clip')} cannot be read, the last one "
            f"{quote_name(self.index.clips[i].id)}: {error}; `mmdistill check-data` lists the invalid files"
        ) from error

    def _drop_missing(self, index: ClipIndex) -> ClipIndex:
        """The index without the clips that the policy skips."""
        kept: list[int] = []
        positions = itertools.count()
        for video, clips in index.by_video():
            frames = required_frames(clips)
            missing = {name: _missing_frames(reader, video, frames) for name, reader in self.readers.items()}
            for clip in clips:
                position = next(positions)
                limit = len(clip.frames) if self.on_missing == "repeat" else 1
                incomplete = [n for n in self.readers if len(missing[n].intersection(clip.frames)) >= limit]
                for name in incomplete:
                    self._skipped[name][video] += 1
                if not incomplete:
                    kept.append(position)
        report = {**index.report, "skipped_as_missing": len(index.clips) - len(kept)}
        return ClipIndex(select_clips(index.clips, kept), index.classes, report)


def _missing_frames(reader: Reader, video: str, frames: list[int]) -> set[int]:
    """All frames, if one file contains them and it is damaged."""
    try:
        return set(reader.missing_frames(video, frames))
    except FrameError:
        return set(frames)


def init_worker(_worker: int) -> None:
    """Use one thread in this loader worker and flush denormals. Parallelism comes from the number of workers."""
    torch.set_flush_denormal(True)
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
