"""Find the checkpoints below a folder by names, small JSON files and the ends of archives. No tensor is read."""

import datetime
import json
import math
import os
import re
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmdistill.checkpoint.errors import CheckpointError
from mmdistill.checkpoint.formats.names import (
    FILE_SUFFIXES,
    LATEST,
    MANIFEST,
    MODEL_STATES,
    OPTIM_STATES,
    CheckpointFormat,
)
from mmdistill.errors import format_count
from mmdistill.modalities import modality_names

DISTILLED = "distilled"  # group of the distillation checkpoints; the other groups are modalities
UNKNOWN = "unknown"
_EPOCH = re.compile(r"epoch=(\d+)")
_LOSS = re.compile(r"(?:^|[-_])(?:\w+_)?loss=(-?\d+(?:\.\d+)?(?:e[-+]?\d+)?)")
_RUN_TIME = re.compile(r"(\d{4}-\d\d-\d\d)/(\d\d-\d\d-\d\d)(?:/|$)")
_PICKLED_EPOCH = re.compile(rb"X\x05\x00\x00\x00epoch(?:q.|r.{4})?(?:K(.)|M(..)|J(.{4}))", re.DOTALL)
_SEARCHED_BYTES = 1 << 17  # start of a file that is searched for the epoch
_ZIP_END_RECORD_BYTES = 22


@dataclass(frozen=True)
class CheckpointInfo:
    """One checkpoint on disk.

    Attributes:
        path: absolute.
        format: ``deepspeed``, ``lightning`` or ``weights``.
        modality: ``rgb``, ``flow``, ``skeleton``, ``distilled`` or ``unknown``.
        epoch, loss: from the manifest or the name; None if neither contains it.
        size: bytes.
        complete: all files exist with their full length (`inspect_checkpoint` also reads the contents).
        problem: why the checkpoint is not complete.
        modified: seconds since 1970.
        started: start of the run in seconds since 1970, from its folder's name if that is a date, else `modified`.
    """

    path: Path
    format: str
    modality: str
    epoch: int | None
    loss: float | None
    size: int
    complete: bool
    problem: str
    modified: float
    started: float


def _infer_modality(path: str, kind: str | None = None, modality: str | None = None) -> str:
    if kind == "distill":
        return DISTILLED
    if modality in modality_names():
        return modality
    for field in reversed(path.split(os.sep)[:-1]):
        lowered = field.lower()
        if "distill" in lowered:
            return DISTILLED
        for name in modality_names():
            if lowered == name or lowered.endswith("_" + name) or lowered.startswith(name + "_"):
                return name
    return _modality_of_run(path)


def _modality_of_run(path: str) -> str:
    """Group of a checkpoint by the ``run.json`` of its run, for a run folder whose name does not tell it."""
    try:
        with open(os.path.join(os.path.dirname(os.path.dirname(path)), "run.json"), encoding="utf-8") as file:
            config = json.load(file)[-1]["config"]
        modality = config.get("modality")
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return UNKNOWN
    if modality is None:
        return DISTILLED
    return modality if modality in modality_names() else UNKNOWN


def _run_start_time(path: str, modified: float) -> float:
    matches = _RUN_TIME.findall(path.replace(os.sep, "/"))
    if matches:
        try:
            return datetime.datetime.strptime(" ".join(matches[-1]), "%Y-%m-%d %H-%M-%S").timestamp()
        except ValueError:
            return modified
    return modified


def _parse_name(name: str) -> tuple[int | None, float | None]:
    epoch, losses = _EPOCH.search(name), _LOSS.findall(name)
    loss = float(losses[-1]) if losses else None
    return int(epoch[1]) if epoch else None, loss if loss is not None and math.isfinite(loss) else None


def _archive_problem(path: str, size: int) -> str:
    """Problem of a torch file: empty or without the end record of a zip. Legacy pickles have none and pass."""
    if size == 0:
        return f"{os.path.basename(path)} is empty"
    with open(path, "rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return ""
        file.seek(max(0, size - _ZIP_END_RECORD_BYTES))
        has_end_record = file.read(4) == b"PK\x05\x06"
    return "" if has_end_record else f"{os.path.basename(path)} is truncated at {format_count(size, 'byte')}"


def _safetensors_header(path: str) -> tuple[int, Any]:
    """Length of a ``.safetensors`` header in bytes, and its JSON content.

    Raises:
        EOFError: the file is too short for the length.
        ValueError: the header is no JSON.
    """
    with open(path, "rb") as file:
        head = file.read(8)
        if len(head) < 8:
            raise EOFError(path)
        length = int(struct.unpack("<Q", head)[0])
        return length, json.loads(file.read(min(length, 1 << 26)))


def _safetensors_problem(path: str, size: int) -> str:
    try:
        length, header = _safetensors_header(path)
        header.pop("__metadata__", None)
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except EOFError:
        return "truncated"
    except (ValueError, KeyError, TypeError, AttributeError):
        return "its header is damaged"
    expected = 8 + length + int(end)
    return "" if expected == size else f"{format_count(size, 'byte')}, {expected} expected"


def _is_feature_file(path: str) -> bool:
    """Whether a file is a ``.safetensors`` file of clip features, as `mmdistill.fewshot.features` writes them."""
    if not path.endswith(".safetensors"):
        return False
    try:
        header = _safetensors_header(path)[1]
    except (EOFError, ValueError):
        return False
    return isinstance(header, dict) and set(header) - {"__metadata__"} == {"features", "labels"}


def _pickled_epoch(path: str) -> int | None:
    """Epoch of a Lightning file whose name has none, from the first bytes of its pickle."""
    with open(path, "rb") as file:
        match = _PICKLED_EPOCH.search(file.read(_SEARCHED_BYTES))
    if not match:
        return None
    return int.from_bytes(next(group for group in match.groups() if group is not None), "little")


def _describe_file(entry: os.DirEntry[str]) -> CheckpointInfo:
    stat = entry.stat()
    epoch, loss = _parse_name(entry.name)
    if entry.name.endswith(".safetensors"):
        problem, format_ = _safetensors_problem(entry.path, stat.st_size), CheckpointFormat.WEIGHTS
    else:
        problem = _archive_problem(entry.path, stat.st_size)
        format_ = CheckpointFormat.LIGHTNING if entry.name.endswith(".ckpt") else CheckpointFormat.WEIGHTS
        if epoch is None and not problem:
            epoch = _pickled_epoch(entry.path)
    return CheckpointInfo(
        Path(entry.path),
        str(format_),
        _infer_modality(entry.path),
        epoch,
        loss,
        stat.st_size,
        not problem,
        problem,
        stat.st_mtime,
        _run_start_time(entry.path, stat.st_mtime),
    )


def _describe_directory(path: str) -> CheckpointInfo:
    """Describe a DeepSpeed directory by its manifest, or by its files if it has none."""
    epoch, loss = _parse_name(os.path.basename(path))
    kind = modality = None
    problem, size = "", 0
    modified = os.stat(path).st_mtime
    try:
        with open(os.path.join(path, MANIFEST), "rb") as file:
            manifest = json.loads(file.read())
            modified = os.fstat(file.fileno()).st_mtime
        epoch = manifest.get("epoch") if manifest.get("epoch") is not None else epoch
        loss = manifest.get("loss") if manifest.get("loss") is not None else loss
        kind, modality = manifest.get("kind"), manifest.get("modality")
        for name, entry in manifest["files"].items():
            try:
                num_bytes = os.stat(os.path.join(path, name)).st_size
            except FileNotFoundError:
                num_bytes = -1
            size += max(num_bytes, 0)
            if num_bytes != entry["bytes"] and not problem:
                mismatch = f"{name}: {format_count(num_bytes, 'byte')}, {entry['bytes']} expected"
                problem = f"{name} is missing" if num_bytes < 0 else mismatch
    except FileNotFoundError:
        size, problem = _check_without_manifest(path)
    except (ValueError, KeyError, TypeError, AttributeError):
        problem = f"{MANIFEST} is damaged"
    return CheckpointInfo(
        Path(path),
        str(CheckpointFormat.DEEPSPEED),
        _infer_modality(path, kind, modality),
        epoch,
        loss,
        size,
        not problem,
        problem,
        modified,
        _run_start_time(path, modified),
    )


def _check_without_manifest(path: str) -> tuple[int, str]:
    """Size and problem of a directory without manifest."""
    tag = "checkpoint"
    try:
        with open(os.path.join(path, LATEST), encoding="utf-8") as file:
            tag = file.read().strip()
        if not tag:
            return 0, f"{LATEST} is empty"
    except (FileNotFoundError, UnicodeDecodeError):
        tags = [e.name for e in os.scandir(path) if e.is_dir() and _is_tag(e.path)]
        tag = tags[0] if len(tags) == 1 else tag
    size, problem, num_models = 0, "", 0
    try:
        for entry in os.scandir(os.path.join(path, tag)):
            num_bytes = entry.stat().st_size
            size += num_bytes
            if entry.name.endswith((MODEL_STATES, OPTIM_STATES)):
                num_models += entry.name.endswith(MODEL_STATES)
                problem = problem or _archive_problem(entry.path, num_bytes)
    except (FileNotFoundError, NotADirectoryError):
        return 0, f"its tag '{tag}' is missing"
    return size, problem if num_models else f"no *{MODEL_STATES} in {tag}"


def _is_tag(path: str) -> bool:
    try:
        return any(name.endswith(MODEL_STATES) for name in os.listdir(path))
    except OSError:
        return False


def _is_checkpoint(names: set[str], path: str) -> bool:
    if MANIFEST in names or LATEST in names:
        return True
    return "checkpoint" in names and _is_tag(os.path.join(path, "checkpoint"))


def _is_new_link_target(path: str, linked: set[str]) -> bool:
    """Whether a link points to a folder that was not visited and is not above the link."""
    real = os.path.realpath(path)
    if real in linked or any(
        other.startswith(real + os.sep) for other in (*linked, os.path.realpath(os.path.dirname(path)))
    ):
        return False
    linked.add(real)
    return True


def _iterate_checkpoints(root: str, unreadable: list[str]) -> Iterator[CheckpointInfo]:
    pending, linked = [root], {os.path.realpath(root)}
    while pending:
        folder = pending.pop()
        try:
            with os.scandir(folder) as scan:
                entries = list(scan)
            if _is_checkpoint({entry.name for entry in entries}, folder):
                yield _describe_directory(folder)
                continue
        except OSError as error:
            unreadable.append(f"{folder}: {error.strerror or error}")
            continue
        in_checkpoints_dir = os.path.basename(folder) == "checkpoints"
        suffixes = FILE_SUFFIXES if in_checkpoints_dir else (".ckpt", ".safetensors")
        for entry in entries:
            if entry.name.startswith("."):
                continue
            try:
                if entry.is_dir():
                    if not entry.is_symlink() or _is_new_link_target(entry.path, linked):
                        pending.append(entry.path)
                elif entry.name.endswith(suffixes) and not _is_feature_file(entry.path):
                    yield _describe_file(entry)
            except OSError as error:
                unreadable.append(f"{entry.path}: {error.strerror or error}")


def find_checkpoints(root: str | os.PathLike[str], *, unreadable: list[str] | None = None) -> list[CheckpointInfo]:
    """Find all checkpoints below a folder, newest first.

    Args:
        root: a folder at any level above the runs, or a checkpoint.
        unreadable: a list to which a line is appended for each folder or file that could not be read.

    Raises:
        CheckpointError: `root` is not a directory.
    """
    top = Path(root).expanduser().absolute()
    if not top.is_dir():
        raise CheckpointError(f"{root}: no such directory")
    found = list(_iterate_checkpoints(str(top), unreadable if unreadable is not None else []))
    if any(os.path.islink(parent) for parent in {p for info in found for p in info.path.parents if top in p.parents}):
        found = list({os.path.realpath(info.path): info for info in found}.values())
    return sorted(found, key=lambda i: (i.started, -1 if i.epoch is None else i.epoch, i.modified), reverse=True)


def select_checkpoints(found: Iterable[CheckpointInfo], *, best: bool = False) -> dict[str, CheckpointInfo]:
    """Select the newest complete checkpoint of each modality, or with `best` the one of lowest loss."""
    selected: dict[str, CheckpointInfo] = {}
    for info in found:
        previous = selected.get(info.modality)
        if not info.complete or (best and info.loss is None):
            continue
        if previous is None or (best and (info.loss or 0.0) < (previous.loss or 0.0)):
            selected[info.modality] = info
    return selected
