"""Teachers that are files of features, from any program: ``trainer.ckpt_path.NAME.file``.

A `.safetensors` file contains either one tensor (D,) per clip, named by the clip's id, or a tensor ``features`` (N, D)
with the ids as a JSON list in the metadata entry ``ids``. The `.safetensors` files of `mmdistill features` are of the
second kind, with one view: (N, 1, D). Its `.npz` files are read as well, and others with ``features`` and ``ids``.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mmdistill.checkpoint import CheckpointError
from mmdistill.checkpoint.references import LABELED_SOURCES
from mmdistill.errors import format_count, format_first, quote_name
from mmdistill.fewshot.errors import FeatureError
from mmdistill.fewshot.features import load_features

_MAX_LISTED = 3


class FeatureFileError(CheckpointError):
    """A file of features that cannot be a teacher. The message names the file and the fix."""

    exit_status = 2


@dataclass(frozen=True)
class FeatureFile:
    """Features of clips.

    Attributes:
        path: of the file, absolute.
        sha256: of its bytes.
        rows: float32 (N, D), finite.
        positions: row of each clip, by its id.
        sources: the labeled sources of the network that computed them, see `labeled_sources`.
    """

    path: Path
    sha256: str
    rows: Tensor
    positions: dict[str, int]
    sources: tuple[dict[str, Any], ...] = ()

    @property
    def width(self) -> int:
        """D."""
        return self.rows.shape[1]

    def missing(self, ids: Sequence[str]) -> list[str]:
        """The clips without features."""
        return [clip for clip in ids if clip not in self.positions]

    def select(self, ids: Sequence[str]) -> Tensor:
        """The features of clips, float32 (len(ids), D).

        Raises:
            FeatureFileError: a clip has none; gives their number and the first ones.
        """
        if missing := self.missing(ids):
            raise FeatureFileError(
                f"{self.path}: no feature of {len(missing)} of {format_count(len(ids), 'clip')}: "
                f"{format_first([quote_name(clip) for clip in missing], _MAX_LISTED)}; the first id of the file is "
                f"{quote_name(next(iter(self.positions), 'none'))}; compute them, or train on the clips that the file "
                "has (data_module.unlabel_json_path, train_clips, window_stride)"
            )
        return self.rows[[self.positions[clip] for clip in ids]]


def read_feature_file(path: str | Path) -> FeatureFile:
    """Read and check a file.

    Raises:
        FeatureFileError: it does not exist, is of another format, repeats an id, or has a feature of another shape, or
            one that is not finite.
    """
    file = Path(path).expanduser().absolute()
    if not file.is_file():
        raise FeatureFileError(f"{path}: there is no such file of features")
    try:
        ids, rows, info = _read_rows(file)
    except (SafetensorError, json.JSONDecodeError, OSError) as error:
        raise FeatureFileError(f"{path}: not a readable .safetensors file ({error}); write it again") from error
    except FeatureFileError as error:
        raise FeatureFileError(f"{path}: {error}") from error
    except FeatureError as error:  # it names the file
        raise FeatureFileError(str(error)) from error
    finite = torch.isfinite(rows).all(dim=1).tolist()
    if invalid := [clip for clip, is_finite in zip(ids, finite, strict=True) if not is_finite]:
        raise FeatureFileError(
            f"{path}: the features of {format_count(len(invalid), 'clip')} are not finite: "
            f"{format_first([quote_name(clip) for clip in invalid], _MAX_LISTED)}; compute them again"
        )
    positions = {clip: row for row, clip in enumerate(ids)}
    if len(positions) != len(ids):
        raise FeatureFileError(f"{path}: {len(ids) - len(positions)} of the ids are repeated; write each clip once")
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    return FeatureFile(file, digest, rows, positions, tuple(info.get(LABELED_SOURCES, [])))


def _read_rows(path: Path) -> tuple[list[str], Tensor, dict[str, Any]]:
    """Ids and float32 features (N, D), in the order of the file, and the info of a file of mmdistill."""
    if path.suffix == ".npz":
        features = load_features(path, required=("features", "ids"))
        ids = list(features.ids)
        return ids, _as_rows(torch.from_numpy(features.features), ids), features.info
    with safe_open(str(path), framework="pt") as file:
        names, metadata = list(file.keys()), file.metadata() or {}
        if "features" in names and "ids" in metadata:
            ids = json.loads(metadata["ids"])
            if not isinstance(ids, list):
                raise FeatureFileError("the metadata entry ids is no JSON list")
            rows, info = _as_rows(file.get_tensor("features"), ids), json.loads(metadata.get("info", "{}"))
            return [str(clip) for clip in ids], rows, info if isinstance(info, dict) else {}
        tensors = [file.get_tensor(name) for name in names]
    shapes = {tuple(tensor.shape): name for name, tensor in zip(names, tensors, strict=True)}  # an id of each
    if len(shapes) != 1 or len(next(iter(shapes))) != 1:
        listed = [f"{list(shape)} ({quote_name(shapes[shape])})" for shape in sorted(shapes)]
        sizes = format_first(listed, _MAX_LISTED) or "none"
        raise FeatureFileError(
            f"expected one tensor (D,) per clip, named by its id, or a tensor features (N, D) with the metadata entry "
            f"ids; found {format_count(len(names), 'tensor')} of the shapes {sizes}"
        )
    return names, torch.stack(tensors).float(), {}


def _as_rows(features: Tensor, ids: Sequence[object]) -> Tensor:
    """(N, D) or (N, 1, D) -> float32 (N, D). Raises `FeatureFileError` for another shape or number of ids."""
    rows = features[:, 0] if features.ndim == 3 and features.shape[1] == 1 else features
    if rows.ndim != 2 or len(ids) != len(rows):
        raise FeatureFileError(
            f"features has shape {list(features.shape)} for {format_count(len(ids), 'id')}; expected one feature (D,) "
            "per id"
        )
    return rows.float()
