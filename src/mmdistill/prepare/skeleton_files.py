"""Skeletons of other programs, converted to one pickle file per video and an annotation file.

Shapes: M persons, T frames, J joints.
"""

import json
import pickle
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmdistill.data.annotations.base import UNKNOWN_FPS, Event, Rally, is_safe_name, read_json, whole_number
from mmdistill.data.annotations.f3set import to_json
from mmdistill.data.readers.safe_pickle import load_pickle
from mmdistill.data.readers.skeleton_format import SkeletonFormat
from mmdistill.errors import InputError, format_count
from mmdistill.files import atomic_write_bytes
from mmdistill.prepare.outputs import SKELETON_DIR

ANNOTATION_FILE = "annotations.json"
_FILE_KEYS = ("keypoint", "keypoint_score", "total_frames", "img_shape")
_OPENPOSE_FILE = re.compile(r"(?:(.*)_)?(\d+)_keypoints\.json")
_OPENPOSE_LAYOUTS = {18: "openpose18", 25: "openpose25"}


def convert_skeletons(source: Path, output: Path, image_size: tuple[int, int] | None = None) -> dict[Path, list[Rally]]:
    """Write `SKELETON_DIR`/{video}.pkl for each video of `source`, and annotation files, into `output`.

    `source` is a dataset file of mmaction2 or PYSKL, ``{"split", "annotations"}`` or the list of annotations, or a
    folder of OpenPose JSON files. The label of a video becomes one event in its middle. `ANNOTATION_FILE` lists all
    videos; a file per split of the dataset lists those of the split.

    Args:
        source: file or folder.
        output: folder.
        image_size: (height, width) in px, of OpenPose files, which do not contain it.

    Returns:
        the rallies of each annotation file.

    Raises:
        InputError: an entry or a file is invalid; names it.
    """
    if source.is_dir():
        entries: list[Any] = list(_read_openpose(source, image_size))
        splits: dict[str, Sequence[str]] = {}
    else:
        entries, splits = _read_dataset(source)
    rallies: dict[str, Rally] = {}
    for number, entry in enumerate(entries):
        try:
            rally = _to_rally(entry)
            if rally.video in rallies:
                raise ValueError(f"frame_dir={rally.video} occurs twice")
        except ValueError as error:
            raise InputError(f"{source}: video {number}: {error}") from error
        rallies[rally.video] = rally
        content = pickle.dumps({key: entry[key] for key in _FILE_KEYS if key in entry}, protocol=4)
        atomic_write_bytes(output / SKELETON_DIR / f"{rally.video}.pkl", content)
    files = {output / ANNOTATION_FILE: list(rallies.values())}
    for name, videos in splits.items():
        absent = [video for video in videos if video not in rallies]
        if absent or not is_safe_name(name):
            raise InputError(f"{source}: split {name!r}: {', '.join(map(str, absent[:3])) or 'no file name'} not found")
        files[output / f"{name}.json"] = [rallies[video] for video in videos]
    for path, listed in files.items():
        atomic_write_bytes(path, (json.dumps(to_json(listed)) + "\n").encode())
    return files


def _read_dataset(path: Path) -> tuple[list[Any], dict[str, Sequence[str]]]:
    content = load_pickle(path)
    splits = content.get("split") if isinstance(content, dict) else None
    entries = content.get("annotations") if isinstance(content, dict) else content
    if not isinstance(entries, list) or not entries:
        raise InputError(f"{path}: expected a dict with a list 'annotations', or a list, with one dict per video")
    return entries, splits if isinstance(splits, dict) else {}


def _to_rally(entry: Any) -> Rally:
    """A video with its label, as one event in the middle; without a label no event."""
    if not isinstance(entry, dict):
        raise ValueError(f"expected a dict, got {type(entry).__name__}")
    video, label = entry.get("frame_dir"), entry.get("label")
    if not is_safe_name(video):
        raise ValueError(f"frame_dir={video!r} is not a file name")
    if label is not None and not isinstance(label, str):
        label = whole_number(label.item() if isinstance(label, np.generic) else label)
        if label is None:
            raise ValueError(f"label={entry['label']!r} is neither a number nor text")
    shape = np.shape(entry.get("keypoint", ()))
    if len(shape) not in (3, 4):
        raise ValueError(f"keypoint of {video} has shape {shape}, expected (M, T, J, 2) or (T, J, 2)")
    num_frames = shape[-3]
    events = () if label is None else (Event(num_frames // 2, str(label)),)
    return Rally(str(video), num_frames, UNKNOWN_FPS, events)


def _read_openpose(folder: Path, image_size: tuple[int, int] | None) -> Iterator[dict[str, Any]]:
    """Each video below a folder of ``{video}_{frame}_keypoints.json`` or ``{video}/{frame}_keypoints.json``.

    Frames are numbered from 0 or 1. OpenPose does not follow persons, so those of a frame are ordered by their scores.
    """
    if image_size is None:
        raise InputError("OpenPose files do not contain the size of the image; give --image-size HEIGHT WIDTH")
    videos: dict[str, dict[int, Path]] = {}
    for path in sorted(folder.rglob("*_keypoints.json")):
        match = _OPENPOSE_FILE.fullmatch(path.name)
        video = str(path.parent.relative_to(folder)) if path.parent != folder else match and match[1]
        if not match or not video:
            raise InputError(f"{path}: expected VIDEO_FRAME_keypoints.json, or VIDEO/FRAME_keypoints.json")
        frames = videos.setdefault(video, {})
        if int(match[2]) in frames:
            raise InputError(f"{path}: frame {int(match[2])} of {video} is also in {frames[int(match[2])]}")
        frames[int(match[2])] = path
    if not videos:
        raise InputError(f"{folder}: contains no file *_keypoints.json of OpenPose")
    for video, frames in videos.items():
        first = min(frames)
        missing = sorted(set(range(first, first + len(frames))) - set(frames))
        if first > 1 or missing:
            gap = f"frame {missing[0]} has no file" if missing else f"the first frame is {first}, expected 0 or 1"
            raise InputError(f"{folder}: {video}: {gap}")
        persons = [_read_openpose_frame(frames[number]) for number in sorted(frames)]
        rows = np.zeros((max(1, *map(len, persons)), len(persons), 17, 3), np.float32)
        for k, found in enumerate(persons):
            rows[: len(found), k] = found
        yield {
            "frame_dir": video, "keypoint": rows[..., :2], "keypoint_score": rows[..., 2], "img_shape": image_size,
            "total_frames": len(persons),
        }  # fmt: skip


def _read_openpose_frame(path: Path) -> np.ndarray:
    """The persons of a frame with the largest sum of scores first, float32 (M, 17, 3)."""
    content = read_json(path)
    try:
        people = [np.array(person["pose_keypoints_2d"], np.float32).reshape(-1, 3) for person in content["people"]]
        persons = []
        for joints in people:
            if len(joints) not in _OPENPOSE_LAYOUTS:
                raise ValueError(f"{format_count(len(joints), 'joint')}, expected 18 or 25")
            positions = SkeletonFormat(_OPENPOSE_LAYOUTS[len(joints)]).joint_positions(len(joints))
            persons.append(joints[list(positions)])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: not a file of OpenPose with people[].pose_keypoints_2d ({error})") from error
    persons.sort(key=lambda joints: -float(joints[:, 2].sum()))
    return np.array(persons, np.float32).reshape(-1, 17, 3)
