"""What is there and what is not, before training: every file of every rally, read the way training reads it."""

import multiprocessing
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np

from mmdistill.data.annotations.base import Rally
from mmdistill.data.readers.base import FrameError, KeypointReader, Reader
from mmdistill.modalities import get_modality

EXAMPLES = 5  # of each kind of problem, kept by name


@dataclass
class ModalityCoverage:
    """One modality of one rally: frames expected, absent (no file), unreadable (a file, but not usable)."""

    expected: int
    absent: int = 0
    unreadable: int = 0
    surplus: int = 0
    messages: list[str] = field(default_factory=list)


@dataclass
class RallyCoverage:
    """One rally.

    Attributes:
        players: frames in which person 0 (near) and person 1 (far) have a joint with a score.
        person_frames: frames in which persons are expected; 0 without a keypoint modality.
    """

    video: str
    modalities: dict[str, ModalityCoverage]
    players: tuple[int, int] = (0, 0)
    person_frames: int = 0


def check_rally(rally: Rally, readers: Mapping[str, Reader], *, every: int = 1) -> RallyCoverage:
    """Read a rally's files. `every` > 1 opens only each n-th of the files that are there (absence is always exact)."""
    cv2.setNumThreads(0)
    result = RallyCoverage(rally.video, {})
    for name, reader in readers.items():
        count = rally.num_frames - get_modality(name).is_frame_pair
        entry = result.modalities[name] = ModalityCoverage(count)
        if isinstance(reader, KeypointReader):
            result.players, result.person_frames = _check_skeleton(rally, reader, entry), count
            continue
        absent = set(reader.missing_frames(rally.video, range(count)))
        entry.absent = len(absent)
        last = rally.num_frames - 1  # of which some datasets have a flow file too
        entry.surplus = 0 if reader.missing_frames(rally.video, [last + 1]) else 1
        if entry.surplus:
            entry.messages.append(f"{rally.video}: {name} goes on after frame {last}, the annotation's last")
        for frame in range(0, count, every):
            if frame not in absent:
                _try(lambda r=reader, k=frame: r.read(rally.video, [k]), entry)
    return result


def _try(read: Callable[[], Any], entry: ModalityCoverage) -> None:
    try:
        read()
    except FrameError as error:
        entry.unreadable += 1
        if len(entry.messages) < EXAMPLES:
            entry.messages.append(str(error))


def _check_skeleton(rally: Rally, reader: KeypointReader, entry: ModalityCoverage) -> tuple[int, int]:
    if reader.missing_frames(rally.video, [0]):
        entry.absent = entry.expected
        return 0, 0
    try:
        rows = reader.load_video(rally.video)
    except FrameError as error:
        entry.unreadable = entry.expected
        entry.messages.append(str(error))
        return 0, 0
    entry.absent = max(0, entry.expected - len(rows))
    if len(rows) != entry.expected:
        entry.surplus = max(0, len(rows) - entry.expected)
        entry.messages.append(
            f"{reader.path(rally.video)}: {len(rows)} rows, but the annotation has {entry.expected} frames"
        )
    for frame in np.flatnonzero(np.isnan(rows).any(axis=(1, 2, 3))):
        _try(lambda k=int(frame): reader.read(rally.video, [k]), entry)
    present = (np.nan_to_num(rows[..., 2]) > 0).any(axis=2).sum(axis=0)  # (M,)
    return int(present[0]), int(present[1]) if len(present) > 1 else 0


def check_all(
    rallies: Sequence[Rally],
    readers: Mapping[str, Reader],
    *,
    workers: int,
    every: int = 1,
    progress: Callable[[RallyCoverage], None] = lambda _: None,
) -> dict[str, Any]:
    """Check every rally, in parallel, and sum up; see `summarise`."""
    results = []
    if workers <= 1:
        for rally in rallies:
            results.append(check_rally(rally, readers, every=every))
            progress(results[-1])
    else:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(max_workers=workers, mp_context=context) as pool:
            jobs = [pool.submit(check_rally, rally, readers, every=every) for rally in rallies]
            for job in as_completed(jobs):
                results.append(job.result())
                progress(results[-1])
    return summarise(sorted(results, key=lambda r: r.video))


def summarise(results: Sequence[RallyCoverage]) -> dict[str, Any]:
    """Plain containers: totals per modality and player, and every rally that has a gap, by name.

    ``complete`` is true if nothing is absent, unreadable or of another length than the annotation says.
    """
    totals: dict[str, Counter[str]] = {}
    gaps: dict[str, Any] = {}
    messages: list[str] = []
    players: Counter[str] = Counter()
    for result in results:
        for name, entry in result.modalities.items():
            counts = totals.setdefault(name, Counter())
            counts.update(frames=entry.expected, absent=entry.absent, unreadable=entry.unreadable)
            counts.update(rallies=1, rallies_without=int(entry.absent == entry.expected))
            counts.update(rallies_of_another_length=int(entry.surplus > 0))
            messages += entry.messages
            if entry.absent or entry.unreadable or entry.surplus:
                gaps.setdefault(result.video, {})[name] = {
                    "absent": entry.absent,
                    "unreadable": entry.unreadable,
                    "longer_than_annotated": bool(entry.surplus),
                }
        players.update(near=result.players[0], far=result.players[1])
    frames = sum(result.person_frames for result in results)
    return {
        "complete": not gaps,
        "rallies": len(results),
        "modalities": {name: dict(counts) for name, counts in totals.items()},
        "players": {who: {"frames": players[who], "share": players[who] / frames} for who in ("near", "far")}
        if frames
        else {},
        "rallies_with_gaps": gaps,
        "messages": messages,
    }
