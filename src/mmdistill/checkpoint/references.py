"""Teachers that a student-only checkpoint references by path and digest."""

from pathlib import Path
from typing import Any

from mmdistill.checkpoint import Checkpoint, load_encoder, read_checkpoint
from mmdistill.checkpoint.digest import weights_digest
from mmdistill.checkpoint.errors import CheckpointError


def load_referenced_teacher(source: Checkpoint, part: str) -> Checkpoint:
    """The checkpoint that a slim file names as its teacher `part`, read and compared.

    Raises:
        CheckpointError: the file names none, or what it names is missing or has changed.
        CheckpointError: what it names cannot be read.
    """
    named = (source.meta.get("teachers") or {}).get(part)
    if not named:
        raise CheckpointError(f"{source.path} holds {', '.join(source.parts)} and names no {part}")
    require_exists(named["path"], part, named, source.path)
    checkpoint = read_checkpoint(named["path"])
    own = {} if checkpoint.meta.get("encoders") else (source.meta.get("encoders") or {}).get(part, {})
    size = {name: own[name] for name in ("num_frames", "height", "width") if name in own}
    require_same_digest(named["path"], weights_digest(load_encoder(checkpoint, **size)), part, named, source.path)
    return checkpoint


def require_exists(path: str, part: str, named: dict[str, Any], slim: object) -> None:
    if not Path(path).expanduser().exists():
        raise CheckpointError(
            f"{path}: does not exist; {slim} is slim and was distilled with this {part} (sha256 {named['sha256']}): "
            "put it back, or give a checkpoint with these weights in trainer.ckpt_path"
        )


def require_same_digest(path: str, digest: str, part: str, named: dict[str, Any], slim: object) -> None:
    if digest != named["sha256"]:
        raise CheckpointError(
            f"{path}: its weights have sha256 {digest}, but {slim} was distilled with {part} of sha256 "
            f"{named['sha256']} (then at {named['path']}); give a checkpoint with those weights in trainer.ckpt_path"
        )
