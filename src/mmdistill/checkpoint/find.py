"""Find the checkpoints below a folder by names, small JSON files and the ends of archives. No tensor is read."""

import contextlib
import datetime
import itertools
import json
import math
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from mmdistill.checkpoint.errors import CheckpointError
from mmdistill.checkpoint.formats.metadata import exported_student, read_stored_meta
from mmdistill.checkpoint.formats.names import (
    FILE_SUFFIXES,
    HUGGINGFACE_WEIGHTS,
    LATEST,
    MANIFEST,
    METADATA_KEY,
    SHARD_INDEX_SUFFIX,
    TAG,
    CheckpointFormat,
    is_tag,
    state_files,
)
from mmdistill.checkpoint.locate import locate
from mmdistill.errors import format_count
from mmdistill.modalities import modality_names

DISTILLED = "distilled"  # group of the distillation checkpoints; the other groups are modalities
UNKNOWN = "unknown"
_EPOCH = re.compile(r"epoch=(\d+)")
_LOSS = re.compile(r"(?:^|[-_])(?:\w+_)?loss=(-?\d+(?:\.\d+)?(?:e[-+]?\d+)?)")
_RUN_TIME = re.compile(r"(\d{4}-\d\d-\d\d)/(\d\d-\d\d-\d\d)(?:/|$)")
_PICKLED_EPOCH = re.compile(rb"X\x05\x00\x00\x00epoch(?:q.|r.{4})?(?:K(.)|M(..)|J(.{4}))", re.DOTALL)
_PICKLED_MODALITY = re.compile(rb"X\x08\x00\x00\x00modality(?:q.|r.{4})?(?:h(.)|j(.{4})|(?=X))", re.DOTALL)
_SEARCHED_BYTES = 1 << 17  # start of a file that is searched for the epoch and the kind
_ZIP_END_RECORD_BYTES = 22


@dataclass(frozen=True)
class CheckpointInfo:
    """One checkpoint on disk.

    Attributes:
        path: absolute.
        format: value of a `CheckpointFormat`.
        modality: ``rgb``, ``flow``, ``skeleton``, ``distilled`` or ``unknown``.
        epoch, loss: from the manifest, the name or the metadata; None if none of them contains it.
        size: bytes.
        complete: all files exist with their full length (`inspect_checkpoint` also reads the contents).
        problem: why the checkpoint is not complete.
        is_inside_epoch: whether a stop signal ended the epoch; the loss is that of a part of the epoch.
        modified: seconds since 1970.
        started: start of the run in seconds since 1970: from its ``run.json``, else from a date in the path, else the
            first `modified` of its checkpoints. A copy of a run keeps the first two.
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
    is_inside_epoch: bool = False


def _infer_modality(path: str, kind: str | None = None, modality: str | None = None) -> str:
    """Group of a checkpoint by its metadata, else by the ``run.json`` of its run, else by the names of its folders."""
    if group := _known_group(kind, modality) or _modality_of_run(path):
        return group
    for field in reversed(path.split(os.sep)[:-1]):
        lowered = field.lower()
        if "distill" in lowered:
            return DISTILLED
        for name in modality_names():
            if lowered == name or lowered.endswith("_" + name) or lowered.startswith(name + "_"):
                return name
    return UNKNOWN


def _first_record(path: str) -> dict[str, Any]:
    """The record of the first start in the ``run.json`` of a checkpoint's run; empty if there is none."""
    try:
        with open(os.path.join(os.path.dirname(os.path.dirname(path)), "run.json"), encoding="utf-8") as file:
            record = json.load(file)[0]
    except (OSError, ValueError, LookupError, TypeError):
        return {}
    return record if isinstance(record, dict) else {}


def _modality_of_run(path: str) -> str | None:
    """Group of a checkpoint by the ``run.json`` of its run."""
    config = _first_record(path).get("config")
    if not isinstance(config, dict):
        return None
    return _known_group(None if "modality" in config else "distill", config.get("modality"))


def _known_group(kind: str | None, modality: str | None) -> str | None:
    return DISTILLED if kind == "distill" else modality if modality in modality_names() else None


def _run_start_time(path: str, modified: float) -> float:
    with contextlib.suppress(KeyError, TypeError, ValueError):
        return datetime.datetime.fromisoformat(_first_record(path)["started"]).timestamp()
    with contextlib.suppress(IndexError, ValueError):  # no date, or an invalid one
        text = " ".join(_RUN_TIME.findall(path.replace(os.sep, "/"))[-1])
        return datetime.datetime.strptime(text, "%Y-%m-%d %H-%M-%S").timestamp()
    return modified


def _with_run_starts(found: list[CheckpointInfo]) -> list[CheckpointInfo]:
    """`found`, where all checkpoints of a folder have the earliest `started` of them."""
    first: dict[Path, float] = {}
    for info in found:
        first[info.path.parent] = min(info.started, first.get(info.path.parent, math.inf))
    return [replace(info, started=first[info.path.parent]) for info in found]


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


def _read_head(path: str) -> bytes:
    """The start of a torch file, which contains the pickle with the names of the tensors and the metadata."""
    with open(path, "rb") as file:
        return file.read(_SEARCHED_BYTES)


def _pickled_epoch(head: bytes) -> int | None:
    """Epoch of a Lightning file whose name has none, from the start of its pickle."""
    match = _PICKLED_EPOCH.search(head)
    return int.from_bytes(next(group for group in match.groups() if group is not None), "little") if match else None


def _pickled_kind(head: bytes) -> tuple[str | None, str | None]:
    """Kind and modality in the start of a torch file: of a distillation by its tensors, else from the metadata."""
    if b"student_rgb." in head or b"cmt.mlp_to_" in head:
        return "distill", None
    if match := _PICKLED_MODALITY.search(head):
        short, long = match.groups()  # reference to an earlier string
        mark = b"q" + short if short else b"r" + long if long else None
        for name in modality_names():
            text = b"X" + len(name).to_bytes(4, "little") + name.encode()
            if head.startswith(text, match.end()) if mark is None else text + mark in head:
                return "pretrain", name
    return None, None


def _check_safetensors(path: str) -> tuple[str, dict[str, Any], set[str]]:
    """Problem, metadata of mmdistill and names of the tensors of a file. Its header is compared with its size."""
    try:
        with safe_open(path, framework="numpy") as file:
            names = set(file.keys())
            meta = json.loads((file.metadata() or {}).get(METADATA_KEY, "{}"))
    except (SafetensorError, ValueError) as error:
        size = format_count(os.path.getsize(path), "byte")
        return f"{os.path.basename(path)} is truncated or damaged at {size} ({error})", {}, set()
    meta = meta if isinstance(meta, dict) else {}
    if any(name.startswith(("student_rgb.", "cmt.")) for name in names):
        return "", {"kind": "distill", **meta}, names
    is_student = exported_student(meta) is not None  # which is no teacher
    return "", {**meta, "kind": "distill"} if is_student else meta, names


def _describe_file(entry: os.DirEntry[str]) -> CheckpointInfo | None:
    """Describe a file; None for a file of clip features, as `mmdistill.fewshot.features` writes them."""
    stat = entry.stat()
    epoch, loss = _parse_name(entry.name)
    format_ = CheckpointFormat.LIGHTNING if entry.name.endswith(".ckpt") else CheckpointFormat.WEIGHTS
    if entry.name.endswith(".safetensors"):
        format_ = CheckpointFormat.SAFETENSORS
        problem, meta, names = _check_safetensors(entry.path)
        if names == {"features", "labels"}:
            return None
        epoch = meta.get("epoch") if epoch is None else epoch
        kind, modality = meta.get("kind"), meta.get("modality")
    else:
        problem, head = _archive_problem(entry.path, stat.st_size), _read_head(entry.path)
        kind, modality = _pickled_kind(head)
        epoch = _pickled_epoch(head) if epoch is None and not problem else epoch
    return CheckpointInfo(
        path=Path(entry.path),
        format=str(format_),
        modality=_infer_modality(entry.path, kind, modality),
        epoch=epoch,
        loss=loss,
        size=stat.st_size,
        complete=not problem,
        problem=problem,
        modified=stat.st_mtime,
        started=_run_start_time(entry.path, stat.st_mtime),
    )


def _describe_huggingface_folder(folder: str, weights: str) -> CheckpointInfo:
    """Describe a folder of `save_pretrained`: all its shards are one checkpoint. `weights`: file or index."""
    files, problem = [weights], ""
    if weights.endswith(SHARD_INDEX_SUFFIX):
        try:
            with open(os.path.join(folder, weights), encoding="utf-8") as file:
                files = sorted(set(json.load(file)["weight_map"].values()))
        except (ValueError, LookupError, TypeError, AttributeError):
            files, problem = [], f"{weights} is damaged"
    paths = [os.path.join(folder, name) for name in files]
    present = [path for path in paths if os.path.isfile(path)]
    kind = modality = None
    for path in present:
        if path.endswith(".safetensors"):
            damage, meta, _ = _check_safetensors(path)
            kind, modality = kind or meta.get("kind"), modality or meta.get("modality")
        else:
            damage = _archive_problem(path, os.path.getsize(path))
        problem = problem or damage
    if missing := [os.path.basename(path) for path in paths if path not in present]:
        problem = f"{missing[0]} is missing"
    modified = os.stat(os.path.join(folder, weights)).st_mtime
    return CheckpointInfo(
        path=Path(folder),
        format=str(CheckpointFormat.SAFETENSORS if ".safetensors" in weights else CheckpointFormat.WEIGHTS),
        modality=_infer_modality(os.path.join(folder, weights), kind, modality),
        epoch=None,
        loss=None,
        size=sum(map(os.path.getsize, present)),
        complete=not problem,
        problem=problem,
        modified=modified,
        started=_run_start_time(folder, modified),
    )


def _describe_directory(path: str) -> CheckpointInfo:
    """Describe a DeepSpeed directory by its manifest, or by its files if it has none."""
    epoch, loss = _parse_name(os.path.basename(path))
    modified = os.stat(path).st_mtime
    manifest: dict[str, Any] = {}
    size, problem = 0, ""
    try:
        with open(os.path.join(path, MANIFEST), "rb") as file:
            manifest = json.loads(file.read())
            modified = os.fstat(file.fileno()).st_mtime
        epoch = manifest.get("epoch") if manifest.get("epoch") is not None else epoch
        loss = manifest.get("loss") if manifest.get("loss") is not None else loss
        for name, entry in manifest["files"].items():
            file_path = os.path.join(path, name)
            num_bytes = os.path.getsize(file_path) if os.path.exists(file_path) else None
            size += num_bytes or 0
            if num_bytes != entry["bytes"] and not problem:
                found = "is missing" if num_bytes is None else f"has {format_count(num_bytes, 'byte')}"
                problem = f"{name} {found}, {entry['bytes']} expected"
    except FileNotFoundError:
        size, problem = _check_without_manifest(path)
    except (ValueError, KeyError, TypeError, AttributeError):
        manifest, problem = {}, f"{MANIFEST} is damaged"
    return CheckpointInfo(
        path=Path(path),
        format=str(CheckpointFormat.DEEPSPEED),
        modality=_infer_modality(path, manifest.get("kind"), manifest.get("modality")),
        epoch=epoch,
        loss=loss,
        size=size,
        complete=not problem,
        problem=problem,
        modified=modified,
        started=_run_start_time(path, modified),
        is_inside_epoch="-step=" in os.path.basename(path),
    )


def _check_without_manifest(path: str) -> tuple[int, str]:
    """Size and problem of a directory without manifest."""
    try:
        tag = locate(path)[1]
    except CheckpointError as error:
        return 0, str(error)
    sizes = {str(file): file.stat().st_size for file in state_files(tag or Path(path))}
    return sum(sizes.values()), next(filter(None, itertools.starmap(_archive_problem, sizes.items())), "")


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
            names = {entry.name for entry in entries}
            if names & {MANIFEST, LATEST} or (TAG in names and is_tag(os.path.join(folder, TAG))):
                yield _describe_directory(folder)
                continue
        except OSError as error:
            unreadable.append(f"{folder}: {error.strerror or error}")
            continue
        weights = next((name for name in HUGGINGFACE_WEIGHTS if name in names), None)
        is_huggingface = weights is not None and ("config.json" in names or weights.endswith(SHARD_INDEX_SUFFIX))
        if weights and is_huggingface:
            try:
                yield _describe_huggingface_folder(folder, weights)
            except OSError as error:
                unreadable.append(f"{folder}: {error.strerror or error}")
        in_checkpoints_dir = os.path.basename(folder) == "checkpoints"
        suffixes = FILE_SUFFIXES if in_checkpoints_dir else (".ckpt", ".safetensors")
        for entry in entries:
            if entry.name.startswith("."):
                continue
            try:
                if entry.is_dir():
                    if not entry.is_symlink() or _is_new_link_target(entry.path, linked):
                        pending.append(entry.path)
                elif not is_huggingface and entry.name.endswith(suffixes) and (info := _describe_file(entry)):
                    yield info
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
    if top.is_file():
        raise CheckpointError(f"{root}: is a file; give a folder, or use `mmdistill inspect` for one checkpoint")
    if not top.is_dir():
        raise CheckpointError(f"{root}: no such directory")
    found = list(_iterate_checkpoints(str(top), unreadable if unreadable is not None else []))
    if any(map(os.path.islink, _folders_below(str(top), found))):
        found = list({os.path.realpath(info.path): info for info in found}.values())
    found = [_with_stored_loss(info) for info in _complete_last(found)]
    return sorted(_with_run_starts(found), key=_age_key, reverse=True)


def _folders_below(top: str, found: Iterable[CheckpointInfo]) -> set[str]:
    """The folders between `top` and the checkpoints, each once: there can be thousands of runs."""
    folders: set[str] = set()
    for info in found:
        folder = os.path.dirname(info.path)
        while folder not in ("", top) and folder not in folders:
            folders.add(folder)
            folder = os.path.dirname(folder)
    return folders


def _complete_last(found: list[CheckpointInfo]) -> list[CheckpointInfo]:
    """`found`, where each ``last.ckpt`` has epoch and loss of the checkpoint that it is a link to."""
    named = {(i.path.parent, i.size, i.modified): i for i in found if i.loss is not None}
    links = {i.path: named.get((i.path.parent, i.size, i.modified)) for i in found if i.path.stem == "last"}
    return [replace(i, epoch=twin.epoch, loss=twin.loss) if (twin := links.get(i.path)) else i for i in found]


def _with_stored_loss(info: CheckpointInfo) -> CheckpointInfo:
    """`info` with the loss in the metadata, for a complete file whose name has none, such as a renamed copy."""
    if info.loss is not None or not info.complete or info.path.is_dir():
        return info
    loss = read_stored_meta(info.path).get("loss")
    return replace(info, loss=loss) if isinstance(loss, float) and math.isfinite(loss) else info


def _age_key(info: CheckpointInfo) -> tuple[float, int, float, bool]:
    return info.started, -1 if info.epoch is None else info.epoch, info.modified, info.path.stem == "last"


def select_checkpoints(found: Iterable[CheckpointInfo], *, best: bool = False) -> dict[str, CheckpointInfo]:
    """Select the newest complete checkpoint of each modality, or with `best` the one of lowest loss.

    A checkpoint inside an epoch is selected only if the modality has no other.
    """
    selected: dict[str, CheckpointInfo] = {}
    for info in sorted(found, key=lambda info: info.is_inside_epoch):
        previous = selected.get(info.modality)
        if not info.complete or (best and info.loss is None):
            continue
        is_better = best and previous is not None and (info.loss or 0.0) < (previous.loss or 0.0)
        if previous is None or (is_better and info.is_inside_epoch == previous.is_inside_epoch):
            selected[info.modality] = info
    return selected
