"""`manifest.json`: the files of a complete checkpoint directory. Written last: an incomplete checkpoint has none."""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mmdistill.checkpoint.errors import CorruptCheckpointError
from mmdistill.checkpoint.formats.names import LATEST, MANIFEST, META, MODEL_STATES, OPTIM_STATES, TAG
from mmdistill.checkpoint.formats.torch_zip import directory_digest, is_zip, sha256_file, verify_zip
from mmdistill.checkpoint.locate import read_json
from mmdistill.checkpoint.write import fsync_path, write_bytes
from mmdistill.errors import format_count

VERSION = 1
_DIGEST_KEY = "manifest_sha256"


def manifest_entry(path: Path) -> dict[str, Any]:
    """Return the manifest entry of a file: its size, and its sha256 or, for a zip archive, that of its directory.

    The zip directory holds the CRC-32 of every record, which torch computes in any case. Comparing the digest and the
    CRCs detects every flipped bit, several times faster than a sha256 of all bytes, and also detects a valid file of
    another save. (Manifests of older versions also hold the sha256 of all bytes of an archive.)
    """
    digest = {"zip_directory_sha256": directory_digest(path)} if is_zip(path) else {"sha256": sha256_file(path)}
    return {"bytes": path.stat().st_size, **digest}


def _digest_of(content: dict[str, Any]) -> str:
    rest = {key: value for key, value in content.items() if key != _DIGEST_KEY}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def manifest_bytes(files: dict[str, dict[str, Any]], **summary: Any) -> bytes:
    """Serialize a manifest. `summary`: world_size, stage, step, epoch, loss."""
    content = {"version": VERSION, **summary, "files": files}
    content[_DIGEST_KEY] = _digest_of(content)
    return (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()


def complete_directory(staged: Path, files: Iterable[Path], meta: Mapping[str, Any], **counts: int) -> None:
    """Write ``latest``, ``meta.json`` and then the manifest to a staged directory, and sync it.

    Args:
        staged: the directory, whose tag directory contains `files`.
        files: the synced files of all ranks.
        meta: JSON metadata. The manifest repeats epoch, kind, modality and a finite loss.
        counts: world_size, stage and step, for the manifest.
    """
    write_bytes(staged / LATEST, TAG.encode())
    write_bytes(staged / META, (json.dumps(dict(meta), indent=1, sort_keys=True) + "\n").encode())
    fsync_path(staged / TAG)
    entries = {
        file.relative_to(staged).as_posix(): manifest_entry(file) for file in (*files, staged / LATEST, staged / META)
    }
    summary = {key: meta.get(key) for key in ("epoch", "kind", "modality", "loss")}
    if summary["loss"] is not None and not math.isfinite(summary["loss"]):
        summary["loss"] = None
    write_bytes(staged / MANIFEST, manifest_bytes(entries, **counts, **summary))
    fsync_path(staged)


def read_manifest(root: Path) -> dict[str, Any] | None:
    """Read the manifest; None if the directory has none (written by another program).

    Raises:
        CorruptCheckpointError: the manifest is damaged.
    """
    path = root / MANIFEST
    if not path.exists():
        return None
    content = read_json(path)
    if content.get(_DIGEST_KEY) != _digest_of(content) or not isinstance(content.get("files"), dict):
        raise CorruptCheckpointError(
            f"{path}: corrupt: checksum does not match; use another checkpoint or copy it again"
        )
    return content


def _verify_file(path: Path, entry: dict[str, Any], payload: bool, full: bool) -> None:
    if not path.is_file():
        raise CorruptCheckpointError(
            f"{path}: missing, but listed in the manifest; copy the checkpoint again or use another"
        )
    size = path.stat().st_size
    if size != entry["bytes"]:
        word = "truncated" if size < entry["bytes"] else "corrupt"
        raise CorruptCheckpointError(
            f"{path}: {word}: {format_count(size, 'byte')} on disk, {entry['bytes']} expected; use another checkpoint"
        )
    digest = entry.get("zip_directory_sha256")
    if digest and not (full and "sha256" in entry):
        matches = directory_digest(path) == digest
        if matches and (payload or full):
            verify_zip(path)
    else:
        matches = sha256_file(path) == entry["sha256"]
    if not matches:
        raise CorruptCheckpointError(f"{path}: corrupt: checksum does not match its manifest; use another checkpoint")


def verify_manifest(
    root: Path, *, payload: bool = True, full: bool = False, rank: int = 0, world_size: int = 1
) -> dict[str, Any] | None:
    """Compare a directory with its manifest and return the manifest; None if it has none.

    Args:
        root: the checkpoint directory.
        payload: also check the CRC of every record; with False the reader of a file does this.
        full: check every byte of every file, regardless of `payload` and `rank`; use the sha256 where there is one.
        rank: index of this process among those that call this together; payloads are divided between them.
        world_size: number of those processes.

    Raises:
        CorruptCheckpointError: a file is missing, too short, too long or different; names the first one.
    """
    content = read_manifest(root)
    if content is None:
        return None
    for index, (name, entry) in enumerate(sorted(content["files"].items())):
        _verify_file(root / name, entry, payload and index % world_size == rank, full)
    known = {root / name for name in content["files"]}
    for tag in {file.parent for file in known} - {root}:
        for file in tag.iterdir():
            if file.name.endswith((MODEL_STATES, OPTIM_STATES)) and file not in known:
                raise CorruptCheckpointError(f"{file}: not in the manifest: a mix of two saves; use another checkpoint")
    return content
