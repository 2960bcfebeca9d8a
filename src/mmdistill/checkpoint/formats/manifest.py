"""`manifest.json`: what a complete directory of ours consists of. Written last, so a torso has none."""

import hashlib
import json
import zipfile
from pathlib import Path
from typing import Any

from mmdistill.checkpoint.errors import CorruptCheckpointError
from mmdistill.checkpoint.formats.names import MANIFEST, MODEL_STATES, OPTIM_STATES
from mmdistill.checkpoint.formats.torch_zip import directory_digest, is_zip, sha256_file, verify_zip
from mmdistill.checkpoint.locate import read_json

VERSION = 1
_SELF = "manifest_sha256"


def describe(path: Path, sha256: str | None = None) -> dict[str, Any]:
    """A manifest's entry for one file: bytes, and its sha256 or, of an archive, that of its directory.

    The directory holds the CRC-32 of every record, which torch has computed anyway. Comparing the digest and the CRCs
    finds any flipped bit at several times the speed of a sha256 of the whole, and also tells another good file that was
    put in its place. (Manifests of older versions also hold an archive's whole sha256.)
    """
    entry: dict[str, Any] = {"bytes": path.stat().st_size}
    if is_zip(path):
        entry["zip_directory_sha256"] = directory_digest(path)
    else:
        entry["sha256"] = sha256 or sha256_file(path)
    return entry


def _own_digest(content: dict[str, Any]) -> str:
    rest = {key: value for key, value in content.items() if key != _SELF}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def manifest_bytes(files: dict[str, dict[str, Any]], **facts: Any) -> bytes:
    """The manifest as it goes to disk. `facts`: world_size, stage, step, epoch, loss."""
    content = {"version": VERSION, **facts, "files": files}
    content[_SELF] = _own_digest(content)
    return (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()


def read_manifest(root: Path) -> dict[str, Any] | None:
    """The manifest, or None where the directory has none (written by others).

    Raises:
        CorruptCheckpointError: it is there and damaged.
    """
    path = root / MANIFEST
    if not path.exists():
        return None
    content = read_json(path)
    if content.get(_SELF) != _own_digest(content) or not isinstance(content.get("files"), dict):
        raise CorruptCheckpointError(
            f"{path}: corrupt: checksum does not match; use another checkpoint or copy it again"
        )
    return content


def _verify_file(path: Path, entry: dict[str, Any], payload: bool, full: bool) -> None:
    if not path.is_file():
        raise CorruptCheckpointError(
            f"{path}: missing, and the manifest names it; copy the checkpoint again or use another"
        )
    size = path.stat().st_size
    if size != entry["bytes"]:
        word = "truncated" if size < entry["bytes"] else "corrupt"
        raise CorruptCheckpointError(
            f"{path}: {word}: {size} bytes on disk, {entry['bytes']} expected; use another checkpoint"
        )
    digest = entry.get("zip_directory_sha256")
    if digest and not (full and "sha256" in entry):
        try:
            good = directory_digest(path) == digest
        except (zipfile.BadZipFile, OSError, ValueError, LookupError, NotImplementedError) as error:
            raise CorruptCheckpointError(f"{path}: corrupt: checksum of its directory ({error})") from error
        if good and (payload or full):
            verify_zip(path)
    else:
        good = sha256_file(path) == entry["sha256"]
    if not good:
        raise CorruptCheckpointError(f"{path}: corrupt: checksum does not match its manifest; use another checkpoint")


def verify_manifest(
    root: Path, *, payload: bool = True, full: bool = False, rank: int = 0, world_size: int = 1
) -> dict[str, Any] | None:
    """Compare a directory with its manifest; None if it has none.

    Args:
        root: the checkpoint directory.
        payload: also check the CRC of every record; False leaves that to whoever reads the file.
        full: every byte of every file, whatever `payload` and `rank` leave to others; sha256 where there is one.
        rank, world_size: payloads are divided between processes that call this together.

    Raises:
        CorruptCheckpointError: the first file that is missing, too short, too long or different.
    """
    content = read_manifest(root)
    if content is None:
        return None
    for index, (name, entry) in enumerate(sorted(content["files"].items())):
        _verify_file(root / name, entry, payload and index % world_size == rank, full)
    known = {str(Path(name)) for name in content["files"]}
    for tag in {Path(name).parent for name in known if "/" in name}:
        for file in (root / tag).iterdir():
            if file.name.endswith((MODEL_STATES, OPTIM_STATES)) and str(tag / file.name) not in known:
                raise CorruptCheckpointError(f"{file}: not in the manifest: a mix of two saves; use another checkpoint")
    return content
