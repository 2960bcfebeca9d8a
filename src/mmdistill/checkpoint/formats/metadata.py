"""Metadata of a checkpoint, read without its tensors. Imports no torch, so that listing checkpoints is fast."""

import json
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open

from mmdistill.checkpoint.formats.names import META, METADATA_KEY


class _Placeholder:
    """Replaces every class and function of a pickle. Holds nothing and executes nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return OrderedDict if (module, name) == ("collections", "OrderedDict") else _Placeholder

    def persistent_load(self, pid: Any) -> None:
        """A tensor's storage, which is not read."""


def _read_zip_meta(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
        with archive.open(name) as file:
            content = _Unpickler(file).load()
    return content.get(METADATA_KEY)


def _read_safetensors_meta(path: Path) -> Any:
    with safe_open(path, framework="numpy") as file:
        return json.loads((file.metadata() or {}).get(METADATA_KEY, "{}"))


def read_stored_meta(path: Path) -> dict[str, Any]:
    """Metadata that mmdistill has stored in a file or DeepSpeed directory; empty if it has none or cannot be read."""
    try:
        if path.is_dir():
            meta = json.loads((path / META).read_text(encoding="utf-8"))
        else:
            meta = _read_safetensors_meta(path) if path.suffix == ".safetensors" else _read_zip_meta(path)
    except Exception:  # a damaged pickle may raise anything
        return {}
    return meta if isinstance(meta, dict) else {}


def exported_student(meta: Mapping[str, Any]) -> str | None:
    """The component of a distilled checkpoint that a file of `export_student` contains; None for other files."""
    component = str(meta.get("component"))
    return component if component.startswith("student_") else None
