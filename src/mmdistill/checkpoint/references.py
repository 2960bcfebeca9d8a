"""Teachers that a student-only checkpoint references by path and by the digest of their weights."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from torch import nn

from mmdistill.checkpoint.errors import CheckpointError
from mmdistill.checkpoint.formats.safetensors_file import tensor_bytes
from mmdistill.checkpoint.read import Checkpoint, open_checkpoint

LABELED_SOURCES = "labeled_sources"  # entry of metadata and of files of features, see `labeled_sources`
# Fields added after the first student-only checkpoints: their defaults are not part of the digest.
_LATER_FIELDS = {"final_norm": True, "layer_norm_eps": 1e-6}


def weights_digest(module: nn.Module) -> str:
    """sha256 of a module's config (the values of its fields) and of the names, dtypes, shapes and values of its state.

    Class names are not included, so that renaming a class does not change the digest.
    """
    config = getattr(module, "config", None)
    digest = hashlib.sha256()
    if is_dataclass(config) and not isinstance(config, type):
        fields = {name: value for name, value in asdict(config).items() if _LATER_FIELDS.get(name) != value}
        digest.update(json.dumps(fields, sort_keys=True).encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def labeled_sources(meta: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The sources of joint pretrainings whose labels a checkpoint with these metadata has learned, each once.

    A distilled checkpoint has those of its teachers. The entry ``labeled_sources`` has those of the weights that a
    training started from, or of the checkpoint of an export. Each has ``dataset``, ``label_fields`` and ``classes``.
    """
    found = [meta["source"]] if meta.get("source") else []
    for origin in (meta.get("teachers") or {}).values():
        found += origin.get("sources", [])
    found += meta.get(LABELED_SOURCES) or []
    unique: list[dict[str, Any]] = []
    for source in found:
        record = {key: source[key] for key in ("dataset", "label_fields", "classes")}
        if record["classes"] and record not in unique:
            unique.append(record)
    return unique


def labeled_sources_entry(sources: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The entry ``labeled_sources`` of metadata; none without a source."""
    found = [dict(source) for source in sources]
    return {LABELED_SOURCES: found} if found else {}


def inherited_sources(path: str | Path | None, resumed: Checkpoint | None) -> list[dict[str, Any]]:
    """The labeled sources of the weights at `path` that a training starts from; of a resumed one those it stored."""
    if resumed is not None:
        return list(resumed.stored_meta.get(LABELED_SOURCES) or [])
    return [] if path is None else labeled_sources(open_checkpoint(path, verify=False).stored_meta)


def load_referenced_teacher(source: Checkpoint, component: str) -> Checkpoint:
    """Open the checkpoint that a student-only checkpoint references as its teacher `component`; compare its digest.

    Raises:
        CheckpointError: there is no reference, or the referenced checkpoint is missing, unreadable or has changed.
    """
    reference = (source.meta.get("teachers") or {}).get(component)
    if not reference:
        raise CheckpointError(
            f"{source.path}: no {component}, neither in the file nor as a reference; use one of "
            f"{', '.join(source.components)}"
        )
    path = reference["path"]
    require_exists(path, component, reference, source.path)
    checkpoint = open_checkpoint(path)
    config = {} if checkpoint.meta.get("encoders") else (source.meta.get("encoders") or {}).get(component, {})
    size = {name: config[name] for name in ("num_frames", "height", "width") if name in config}
    require_same_digest(path, weights_digest(checkpoint.encoder(**size)), component, reference, source.path)
    return checkpoint


def require_exists(path: str, component: str, reference: dict[str, Any], source: object) -> None:
    """Raise `CheckpointError` if `path` of the teacher that the student-only `source` references does not exist."""
    if not Path(path).expanduser().exists():
        raise CheckpointError(
            f"{path}: does not exist; the student-only checkpoint {source} references it as its {component} (sha256 "
            f"{reference['sha256']}); restore it, or set trainer.ckpt_path to a checkpoint with these weights"
        )


def require_same_digest(path: str, digest: str, component: str, reference: dict[str, Any], source: object) -> None:
    """Raise `CheckpointError` if `digest`, of the weights at `path`, is not the one that `source` references."""
    if digest != reference["sha256"]:
        raise CheckpointError(
            f"{path}: the sha256 of its weights is {digest}, but {source} was distilled with a {component} of sha256 "
            f"{reference['sha256']}, read from {reference['path']}; set trainer.ckpt_path to a checkpoint with those "
            "weights"
        )
