"""Check of prepared data before training: read every file of every rally in the way the training reads it."""

import itertools
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import as_completed
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np

from mmdistill.data.annotations.base import Rally
from mmdistill.data.process_pool import process_pool
from mmdistill.data.readers.base import FrameError, FrameSizeError, KeypointReader, Reader, outside_share
from mmdistill.errors import format_count, format_first
from mmdistill.modalities import get_modality

MAX_MESSAGES = 5  # about files that cannot be used, per rally and modality
PLAYERS = ("near", "far")
MAX_FILES_SHOWN = 3  # missing files, per rally and modality
MAX_PERSON_OUTSIDE_SHARE = 0.1  # of the joints of a person; a person at the border of the image has fewer outside
MIN_FRAME_SHARE = 0.02  # of the height or the width of the image, of a person in a frame
# Smallest parts of the height and the width of the image that joints occupy in all frames of a video together. The
# joints of a far player of a broadcast, who stands still, occupy 6.5 % of the height.
MIN_FILE_SHARE, MIN_PERSON_SHARE = 0.06, 0.03


@dataclass
class ModalityCoverage:
    """Files of one modality of one rally."""

    expected_frames: int  # frames that the annotation requires
    missing_frames: int = 0  # frames without a file or row
    unreadable_frames: int = 0  # frames whose file or row is damaged or not finite
    wrong_size_frames: int = 0  # frames of another size than the reader expects
    # frames after the last annotated one. Of modalities with one file per frame, only the first such frame is
    # looked up, so the value is 0 or 1
    extra_frames: int = 0
    has_wrong_scale: bool = False  # whether the joints occupy too small a part of the image, or lie outside of it
    messages: list[str] = field(default_factory=list)  # text of each problem

    def try_to_read(self, reader: Reader, video: str, frame: int) -> None:
        """Count the frame if it cannot be read."""
        try:
            reader.read(video, [frame])
        except FrameError as error:
            if isinstance(error, FrameSizeError):
                self.wrong_size_frames += 1
            else:
                self.unreadable_frames += 1
            if len(self.messages) < MAX_MESSAGES:
                self.messages.append(str(error))


@dataclass
class RallyCoverage:
    """Files of one rally."""

    video: str
    modalities: dict[str, ModalityCoverage]  # by name
    # frames in which person 0 (near) and person 1 (far) have a joint with a score; one value for max_persons=1
    players: tuple[int, ...] = ()
    person_frames: int = 0  # frames in which persons are expected; 0 if no keypoint file could be read
    unused_persons: str = ""  # the file with more persons than are used, and their number


def check_rally(rally: Rally, readers: Mapping[str, Reader], *, every: int = 1) -> RallyCoverage:
    """Read the files of a rally. `every` > 1 opens only each n-th existing file; missing files are always counted."""
    cv2.setNumThreads(0)
    result = RallyCoverage(rally.video, {})
    for name, reader in readers.items():
        count = rally.num_frames - get_modality(name).is_frame_pair
        coverage = result.modalities[name] = ModalityCoverage(count)
        last = rally.num_frames - 1  # some datasets have a flow file for the last frame too
        try:
            absent = reader.missing_frames(rally.video, range(last + 2))
        except FrameError as error:  # one file contains all frames
            coverage.unreadable_frames = count
            coverage.messages.append(str(error))
            continue
        missing = [frame for frame in absent if frame < count]
        coverage.missing_frames = len(missing)
        if missing:
            files = reader.files(rally.video, missing)
            absent_files = [path for path in files if not os.path.exists(path)] or files  # one file may have all frames
            coverage.messages.append(f"missing {reader.name} files: {format_first(absent_files, MAX_FILES_SHOWN)}")
        if isinstance(reader, KeypointReader):
            if not missing:
                _check_keypoints(rally, reader, coverage, result)
            continue
        if last + 1 not in absent:
            coverage.extra_frames = 1
            coverage.messages.append(f"{rally.video}: {name} has a file after frame {last}, the last annotated frame")
        for frame in sorted(set(range(0, count, every)).difference(missing)):
            coverage.try_to_read(reader, rally.video, frame)
    return result


def _check_keypoints(rally: Rally, reader: KeypointReader, coverage: ModalityCoverage, result: RallyCoverage) -> None:
    """Check the keypoint files of a rally and count the frames in which the near and the far player were found."""
    path = reader.path(rally.video)
    if reader.extra is not None:
        _check_rows(rally, reader.extra, coverage)
    rows = _check_rows(rally, reader, coverage)
    if rows is None:
        return
    for person in range(rows.shape[1]):
        if (share := outside_share(rows[:, person], reader.frame_size)) > MAX_PERSON_OUTSIDE_SHARE:
            coverage.messages.append(
                f"{path}: {100 * share:.1f} % of the joints of person {person} lie outside the image; correct "
                "img_shape, or the scale of keypoint"
            )
            coverage.has_wrong_scale = True
    _check_scale(path, rows, reader.frame_size, coverage)
    if (persons := reader.num_persons(rally.video)) > reader.max_persons:
        result.unused_persons = f"{path}: {persons} persons, {reader.max_persons} used"
    found = (np.nan_to_num(rows[..., 2]) > 0).any(axis=2).sum(axis=0)  # (M,)
    result.players = tuple(int(count) for count in found[:2])
    result.person_frames = coverage.expected_frames


def _check_rows(rally: Rally, reader: KeypointReader, coverage: ModalityCoverage) -> np.ndarray | None:
    """The rows of a keypoint file, whose number, values and positions are checked; None if it cannot be read."""
    path = reader.path(rally.video)
    try:
        rows = reader.load_video(rally.video)
    except FrameError as error:
        coverage.unreadable_frames = coverage.expected_frames
        coverage.messages.append(str(error))
        return None
    coverage.missing_frames = max(coverage.missing_frames, coverage.expected_frames - len(rows))
    coverage.extra_frames = max(coverage.extra_frames, len(rows) - coverage.expected_frames)
    if len(rows) != coverage.expected_frames:
        coverage.messages.append(
            f"{path}: {format_count(len(rows), 'row')}, but the annotation has "
            f"{format_count(coverage.expected_frames, 'frame')}"
        )
    for frame in np.flatnonzero(np.isnan(rows).any(axis=(1, 2, 3))):
        coverage.try_to_read(reader, rally.video, int(frame))
    if share := outside_share(rows, reader.frame_size):
        coverage.messages.append(f"{path}: {100 * share:.1f} % of the joints with a score lie outside the image")
    return rows


def _check_scale(path: str, rows: np.ndarray, frame_size: tuple[int, int], coverage: ModalityCoverage) -> None:
    """Report joints, (T, M, J, 3) in px of the frame, that occupy too small a part of the image.

    Only frames in which most joints of a person are found count.
    """
    is_whole = (rows[..., 2] > 0).mean(axis=2) > 0.5  # (T, M)
    persons = {f"the joints of person {m}": rows[is_whole[:, m], m] for m in range(rows.shape[1])}
    for name, found in ({"all joints": rows[is_whole]} | persons).items():
        if not len(found):
            continue
        joints = found[found[..., 2] > 0][:, :2]
        width, height = np.ptp(joints, axis=0) / frame_size[::-1]
        if max(width, height) < (MIN_PERSON_SHARE if name in persons else MIN_FILE_SHARE):
            coverage.messages.append(
                f"{path}: {name} lie within {100 * height:.1f} % of the height and {100 * width:.1f} % of the width of "
                "the image in all frames; correct img_shape, or the scale of keypoint"
            )
            coverage.has_wrong_scale |= name not in persons
            return
    joints = np.where(rows[..., 2:] > 0, rows[..., :2], np.nan)[is_whole]  # (n, J, 2)
    sizes = (np.nanmax(joints, axis=1) - np.nanmin(joints, axis=1)) / frame_size[::-1]  # (n, 2)
    count = int((sizes.max(axis=1, initial=0) < MIN_FRAME_SHARE).sum())
    if 0 < count < len(sizes):  # a part of the frames has another scale
        coverage.messages.append(
            f"{path}: {format_count(count, 'skeleton')} smaller than {MIN_FRAME_SHARE:.0%} of the image; correct the "
            "scale of keypoint in these frames"
        )
        coverage.has_wrong_scale = True


def check_all(
    rallies: Sequence[Rally],
    readers: Mapping[str, Reader],
    *,
    workers: int,
    every: int = 1,
    progress: Callable[[RallyCoverage], None] = lambda _: None,
) -> dict[str, Any]:
    """Check every rally in `workers` processes and return the totals; see `summarize`."""
    results = []
    if workers <= 1:
        for rally in rallies:
            results.append(check_rally(rally, readers, every=every))
            progress(results[-1])
    else:
        with process_pool(workers) as pool:
            for job in as_completed([pool.submit(check_rally, rally, readers, every=every) for rally in rallies]):
                results.append(job.result())
                progress(results[-1])
    return summarize(sorted(results, key=lambda r: r.video))


def summarize(results: Sequence[RallyCoverage]) -> dict[str, Any]:
    """Totals per modality and player, and each rally with a gap, in containers that JSON can store.

    ``complete`` is true if no frame is missing, unreadable or of a wrong size, no rally is longer than annotated, and
    no keypoint file has a wrong scale.
    """
    totals: dict[str, Counter[str]] = {}
    gaps: dict[str, Any] = {}
    without_players: list[str] = []  # rallies with a player in less than half of the frames
    for result in results:
        for name, coverage in result.modalities.items():
            counted = ("missing_frames", "unreadable_frames", "wrong_size_frames")
            gap = {key: getattr(coverage, key) for key in counted}
            totals.setdefault(name, Counter()).update(
                expected_frames=coverage.expected_frames,
                **gap,
                rallies=1,
                rallies_without_files=coverage.missing_frames == coverage.expected_frames,
                rallies_longer_than_annotated=coverage.extra_frames > 0,
            )
            if any(gap.values()) or coverage.extra_frames or coverage.has_wrong_scale:
                scale = {"wrong_scale": True} if coverage.has_wrong_scale else {}
                longer = {"longer_than_annotated": coverage.extra_frames > 0}
                gaps.setdefault(result.video, {})[name] = {**gap, **longer, **scale}
        if result.players and 2 * min(result.players) < result.person_frames:
            found = dict(zip(PLAYERS, result.players, strict=False))
            gaps.setdefault(result.video, {})["players"] = found
            shown = " and ".join(f"the {name} player in {count}" for name, count in found.items())
            without_players.append(
                f"{result.video}: {shown} of {format_count(result.person_frames, 'frame')}; data with one "
                "player need data_module.max_persons=1"
            )
    unused = [result.unused_persons for result in results if result.unused_persons]
    frames = sum(result.person_frames for result in results)
    messages = [coverage.messages for result in results for coverage in result.modalities.values()]
    by_player = zip(*(result.players for result in results if result.players), strict=True)
    players = dict(zip(PLAYERS, map(sum, by_player), strict=False))
    return {
        "complete": not gaps,
        "rallies": len(results),
        "modalities": {name: {key: int(count) for key, count in counts.items()} for name, counts in totals.items()},
        "players": {
            name: {"found_frames": found, "expected_frames": frames, "share": found / frames}
            for name, found in players.items()
        },
        "rallies_with_gaps": gaps,
        "messages": [*itertools.chain.from_iterable(messages), *without_players, *unused],
    }
