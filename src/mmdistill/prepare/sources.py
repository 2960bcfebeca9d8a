"""Sources of frames: video files, and folders of numbered JPEG files, such as the frames of F3Set and EPIC-Kitchens."""

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import cv2

from mmdistill.console import log_once
from mmdistill.data.readers.image_file import decode_image
from mmdistill.errors import InputError, format_count, format_first
from mmdistill.prepare import video
from mmdistill.prepare.outputs import FLOW_DIR, FRAME_DIR, RECORD_DIR, SHEET_DIR, SKELETON_DIR
from mmdistill.prepare.video import NO_PIXELS, Frame, Header, VideoError

VIDEO_SUFFIXES = (
    ".mp4", ".avi", ".mkv", ".mov", ".webm", ".m4v", ".mpg", ".mpeg", ".ts", ".mts", ".m2ts", ".wmv", ".3gp",
    ".3g2", ".asf", ".divx", ".dv", ".f4v", ".flv", ".m2t", ".m2v", ".mod", ".mts2", ".mxf", ".ogm", ".ogv", ".qt",
    ".rm", ".rmvb", ".tod", ".vob",
)  # fmt: skip
MACOS_PREFIX, MACOS_FOLDER_FILE = (
    "._",
    ".DS_Store",
)  # of files with the attributes of another file, which macOS writes on foreign disks
FINGERPRINT_BYTES = 1 << 20  # read from the start and from the end of a file
_FRAME_NAME = re.compile(r"(.*?)(\d+)\.jpe?g", re.IGNORECASE)


def find_videos(source: Path) -> dict[str, Path]:
    """Videos below a folder, or the single video `source`, sorted by path.

    A video is a file with a suffix of `VIDEO_SUFFIXES`, named by its file name without suffix, or a folder of numbered
    JPEGs, named by its path relative to `source`. Linked folders are followed. The outputs of an earlier preparation
    are not searched. The log counts the files of a folder that are no videos, and the files that macOS writes
    (``._NAME``, ``.DS_Store``).

    Raises:
        VideoError: there is no video, or two videos have the same name.
    """
    if source.is_file():
        return {source.stem: source}
    if not source.is_dir():
        raise VideoError(f"{source}: no such file or folder")
    candidates: list[tuple[str, Path]] = []
    skipped: dict[str, list[str]] = {"of macOS": [], "without the suffix of a video": []}
    for folder, names in sorted(_walk(source)):
        has_frames = _are_numbered_frames(names)
        if has_frames:
            name = source.resolve().name if folder == source else folder.relative_to(source).as_posix()
            candidates.append((name, folder))
        for path in (folder / name for name in sorted(names)):
            if path.name.startswith(MACOS_PREFIX) or path.name == MACOS_FOLDER_FILE:
                skipped["of macOS"].append(path.name)
            elif path.suffix.lower() in VIDEO_SUFFIXES:
                candidates.append((path.stem, path))
            elif not has_frames:
                skipped["without the suffix of a video"].append(path.name)
    found: dict[str, Path] = {}
    for name, path in candidates:
        if name in found:
            raise VideoError(
                f"{path} and {found[name]} have the same name; rename one, because output files are named after it"
            )
        found[name] = path
    for kind, files in skipped.items():
        if files:
            log_once(f"{source}: skipping {format_count(len(files), 'file')} {kind} ({format_first(files, 3)})")
    if not found:
        suffixes = ", ".join(VIDEO_SUFFIXES)
        raise VideoError(f"{source}: no video file ({suffixes}), and no folder of numbered JPEGs")
    return found


def _walk(source: Path) -> Iterator[tuple[Path, list[str]]]:
    """Each folder below `source` once, also linked ones, with the names of its files."""
    visited = set()
    for folder, names, files in os.walk(source, followlinks=True):
        real = os.path.realpath(folder)
        if real in visited:
            names.clear()
            continue
        visited.add(real)
        if RECORD_DIR in names:  # the output folder of an earlier preparation
            outputs = {FRAME_DIR, FLOW_DIR, SHEET_DIR, RECORD_DIR, Path(SKELETON_DIR).parts[0]}
            names[:] = [name for name in names if name not in outputs]
        yield Path(folder), [name for name in files if Path(folder, name).is_file()]


def _are_numbered_frames(names: Sequence[str]) -> bool:
    """Whether the files of a folder are frames of one video: two or more JPEGs, numbered after one prefix, no video."""
    visible = [Path(name) for name in names if not name.startswith(MACOS_PREFIX)]
    images = [path.name for path in visible if path.suffix.lower() in (".jpg", ".jpeg")]
    prefixes = {match[1] if (match := _FRAME_NAME.fullmatch(name)) else None for name in images}
    has_video = any(path.suffix.lower() in VIDEO_SUFFIXES for path in visible)
    return len(images) > 1 and len(prefixes) == 1 and None not in prefixes and not has_video


def list_frames(folder: Path) -> list[Path]:
    """The JPEGs of a folder in the order of their numbers.

    Raises:
        VideoError: a number is missing or occurs twice, or the first number is not 0 or 1.
    """
    numbers: dict[int, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(MACOS_PREFIX) or not (match := _FRAME_NAME.fullmatch(path.name)):
            continue
        number = int(match[2])
        if number in numbers:
            raise VideoError(f"{folder}: {numbers[number].name} and {path.name} have the same number; remove one")
        numbers[number] = path
    if not numbers:
        raise VideoError(f"{folder}: contains no numbered JPEG")
    if missing := [number for number in range(1, max(numbers)) if number not in numbers]:
        raise VideoError(
            f"{folder}: {format_count(len(missing), 'frame')} missing ({format_first(missing, 3)}), the numbers begin "
            f"at 0 or 1 and end at {max(numbers)}; copy the folder again"
        )
    return [numbers[number] for number in sorted(numbers)]


def _decode_folder(folder: Path, needs_pixels: Callable[[int], bool]) -> Iterator[Frame]:
    """The frames of a folder of numbered JPEGs, like `decode_frames`.

    Raises:
        VideoError: see `list_frames`, or the frame size changes.
        FrameError: a file is truncated or damaged.
    """
    size: tuple[int, ...] = ()
    for number, path in enumerate(list_frames(folder)):
        if not needs_pixels(number):
            yield Frame(number, 0.0, NO_PIXELS)
            continue
        data = path.read_bytes()
        pixels = decode_image(str(path), data, ["JPEG"], cv2.IMREAD_COLOR)
        size = size or pixels.shape
        if pixels.shape != size:
            raise VideoError(f"{path}: the frame size changes at frame {number}; all frames of a video have one size")
        yield Frame(number, 0.0, pixels, jpeg=data)


def decode_frames(path: Path, needs_pixels: Callable[[int], bool] = lambda _: True) -> Iterator[Frame]:
    """The frames of a video file or a folder of JPEGs; see `video.decode_frames`."""
    return _decode_folder(path, needs_pixels) if path.is_dir() else video.decode_frames(path, needs_pixels)


def read_header(path: Path) -> Header:
    """What a container declares, or the number and the size of the frames of a folder of JPEGs."""
    if not path.is_dir():
        return video.read_header(path)
    with suppress(InputError, OSError):
        files = list_frames(path)
        height, width = decode_image(str(files[0]), files[0].read_bytes(), ["JPEG"], cv2.IMREAD_COLOR).shape[:2]
        return Header(len(files), frame_size=(height, width))
    return Header()


def read_frames(path: Path, fps: float | None = None) -> Iterator[Frame]:
    """Yield the frames of `decode_frames`, or with `fps` the nearest frame to each multiple of 1 / fps seconds.

    Raises:
        VideoError: a folder of JPEGs has no timestamps, so that `fps` must be None; or see `decode_frames`.
    """
    if fps is None:
        yield from decode_frames(path)
        return
    if path.is_dir():
        raise VideoError(f"{path}: a folder of JPEGs has no timestamps; omit --fps")
    number, previous = 0, None
    for frame in decode_frames(path):
        while previous is not None and number / fps < (previous.seconds + frame.seconds) / 2:
            yield replace(previous, number=number, seconds=number / fps)
            number += 1
        previous = frame
    while previous is not None and number / fps <= previous.seconds + 1e-6:
        yield replace(previous, number=number, seconds=number / fps)
        number += 1


def fingerprint(path: Path) -> str:
    """Hash of a video file, from its size, start and end; of a folder, from the names and sizes of its JPEGs too."""
    if not path.is_dir():
        return _hash_file(path)
    files = list_frames(path)
    digest = hashlib.sha256("".join(f"{file.name}:{file.stat().st_size}\n" for file in files).encode())
    digest.update("".join(_hash_file(file) for file in (files[0], files[-1])).encode())
    return f"{len(files)} files:{digest.hexdigest()}"


def _hash_file(path: Path) -> str:
    size = path.stat().st_size
    with path.open("rb") as file:
        digest = hashlib.sha256(file.read(FINGERPRINT_BYTES))
        file.seek(max(0, size - FINGERPRINT_BYTES))
        digest.update(file.read(FINGERPRINT_BYTES))
    return f"{size}:{digest.hexdigest()}"
