"""Features of clips, their files (`.safetensors`, `.npz`), and the feature cache.

Shapes: N clips, V mask views, D width.
"""

import hashlib
import io
import json
import logging
import zipfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import astuple, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as safetensors_bytes

from mmdistill.data.annotations.f3set import match_name
from mmdistill.data.clips import ClipSource
from mmdistill.errors import format_count
from mmdistill.fewshot.episodes import FloatArray, IntArray
from mmdistill.fewshot.errors import FeatureError
from mmdistill.fewshot.scores import as_views
from mmdistill.files import atomic_write_bytes

log = logging.getLogger(__name__)

_SOURCE_ARRAYS = {"matches": "match", "event_labels": "label", "players": "player", "hands": "hand"}  # in .npz files
_WRITE_FEATURES = "`mmdistill features` writes the features of a checkpoint to a file"


@dataclass(frozen=True)
class Features:
    """Features of one network on one set of clips.

    Attributes:
        features: float32 (N, V, D), finite.
        labels: int64 (N,), positions in `classes`; -1: no label.
        ids: N clip ids, distinct.
        groups: N names of the videos (rallies) of the clips.
        classes: names of the label values.
        info: plain values that describe their origin: network, checkpoint, modality, input_mode, seconds ...
        sources: N sources of the clips; empty: unknown.
    """

    features: FloatArray
    labels: IntArray
    ids: tuple[str, ...]
    groups: tuple[str, ...]
    classes: tuple[str, ...]
    info: dict[str, Any] = field(default_factory=dict)
    sources: tuple[ClipSource, ...] = ()

    def __post_init__(self) -> None:
        n = len(self.features)
        if self.features.ndim != 3 or self.features.dtype != np.float32:
            raise FeatureError(f"features must be float32 (clips, views, D), got {self.features.shape}")
        if not n == len(self.labels) == len(self.ids) == len(self.groups):
            counts = {"feature": n, "label": len(self.labels), "id": len(self.ids), "group": len(self.groups)}
            sizes = ", ".join(format_count(count, noun) for noun, count in counts.items())
            raise FeatureError(f"the arrays differ in length: {sizes}")
        if self.sources and len(self.sources) != n:
            raise FeatureError(
                f"{format_count(n, 'feature')}, but {format_count(len(self.sources), 'source')} of clips"
            )
        if len(set(self.ids)) != n:
            raise FeatureError("ids: two clips have the same id")
        if n and not -1 <= int(self.labels.min()) <= int(self.labels.max()) < len(self.classes):
            raise FeatureError(
                f"labels are in [{self.labels.min()}, {self.labels.max()}], but the number of classes is "
                f"{len(self.classes)}"
            )

    @property
    def network(self) -> str:
        """Name of the network that computed them."""
        return str(self.info.get("network", "features"))

    @property
    def input_mode(self) -> str:
        """What the network received, see docs/glossary.md."""
        return str(self.info.get("input_mode", f"{self.features.shape[1]} view" + "s" * (self.features.shape[1] != 1)))

    def has_same_clips(self, other: "Features") -> bool:
        """Whether episodes that were drawn for one are valid for the other."""
        return self.ids == other.ids and np.array_equal(self.labels, other.labels) and self.classes == other.classes


def save_features(features: Features, path: str | Path) -> Path:
    """Write a `.safetensors` or `.npz` file atomically. Raises `FeatureError` for another suffix.

    ids, groups, classes, info and sources are string arrays in the `.npz` and JSON in the metadata of the
    `.safetensors`, which also has a checksum.
    """
    path = Path(path)
    texts = {"ids": features.ids, "groups": features.groups, "classes": features.classes}
    arrays: dict[str, NDArray[Any]] = {"features": np.ascontiguousarray(features.features), "labels": features.labels}
    if path.suffix == ".safetensors":
        metadata = {name: json.dumps(values) for name, values in {**texts, "info": features.info}.items()}
        if features.sources:
            metadata["sources"] = json.dumps([astuple(source) for source in features.sources])
        metadata["sha256"] = _checksum(arrays["features"], arrays["labels"], metadata)
        data = safetensors_bytes(arrays, metadata)
    elif path.suffix == ".npz":
        if features.sources:
            texts |= {k: tuple(getattr(s, name) for s in features.sources) for k, name in _SOURCE_ARRAYS.items()}
        text_arrays = {name: np.array(values, dtype=np.str_) for name, values in texts.items()}
        buffer = io.BytesIO()
        np.savez(buffer, **arrays, **text_arrays, info=np.array(json.dumps(features.info)))  # type: ignore[arg-type]
        data = buffer.getvalue()
    else:
        raise FeatureError(f"{path}: unsupported file type; use a name that ends in .safetensors or .npz")
    atomic_write_bytes(path, data, fsync=True)
    return path


def load_features(path: str | Path, *, required: Collection[str] = ("features", "labels")) -> Features:
    """Read features that `save_features` or another program wrote.

    An `.npz` has `features` (N, D) or (N, V, D), `labels` (N,) of integers or names, `groups`, `ids`, `classes`,
    `matches`, `players`, `hands` and `event_labels`; it needs those that are `required`. Nothing in it is unpickled.

    Raises:
        FeatureError: an array is missing, not finite or of another shape, or the file is corrupt.
    """
    path = Path(path)
    if not path.exists():
        raise FeatureError(f"{path} does not exist")
    if path.suffix not in (".safetensors", ".npz") or path.is_dir():
        raise FeatureError(f"{path}: not a feature file (.safetensors or .npz); {_WRITE_FEATURES}")
    try:
        if path.suffix == ".safetensors":
            return _load_safetensors(path)
        return _load_npz(path, required)
    except (SafetensorError, zipfile.BadZipFile, json.JSONDecodeError, EOFError, OSError) as error:
        raise FeatureError(f"{path} is corrupt: {error}") from error
    except FeatureError as error:
        raise FeatureError(f"{path}: {error}") from error
    except ValueError as error:  # NumPy, about a file of another kind; its text advises to unpickle it
        raise FeatureError(f"{path}: not an .npz file of arrays; write it again") from error


def _load_safetensors(path: Path) -> Features:
    with safe_open(str(path), framework="numpy") as file:
        metadata = dict(file.metadata() or {})
        missing = {"features", "labels"} - set(file.keys()) | {"ids", "groups", "classes"} - set(metadata)
        if any(name.endswith("patch_embed.proj.weight") for name in file.keys()):  # noqa: SIM118 - it is no dictionary
            raise FeatureError(f"a checkpoint, not a feature file; {_WRITE_FEATURES}")
        if missing:
            raise FeatureError(f"it has no {', '.join(sorted(missing))}; mmdistill did not write it")
        x, labels = file.get_tensor("features"), file.get_tensor("labels")
    expected = metadata.pop("sha256", None)
    if expected is not None and expected != _checksum(x, labels, metadata):
        raise FeatureError("corrupt: the checksum does not match; copy it again")
    ids, groups, classes = (tuple(json.loads(metadata[name])) for name in ("ids", "groups", "classes"))
    sources = tuple(ClipSource(*texts) for texts in json.loads(metadata.get("sources", "[]")))
    info = json.loads(metadata.get("info", "{}"))
    return Features(as_views(x), labels.astype(np.int64), ids, groups, classes, info, sources)


def _load_npz(path: Path, required: Collection[str]) -> Features:
    with np.load(path, allow_pickle=False) as file:
        missing = set(required) - set(file.files)
        if missing:
            raise FeatureError(
                f"it has no array {', '.join(sorted(missing))}; it has {', '.join(file.files) or 'none'}"
            )
        try:
            found = {name: file[name] for name in file.files}
        except ValueError as error:
            raise FeatureError("it contains Python objects, which are not supported; save plain arrays") from error
    x = as_views(found["features"])
    unlabeled = np.full(len(x), -1)
    labels, classes = _parse_labels(found.get("labels", unlabeled), found.get("classes"))
    ids, groups = (found.get(name, np.arange(len(x))) for name in ("ids", "groups"))  # default: one group per clip
    info = json.loads(str(found["info"])) if "info" in found else {"network": path.stem}
    if not isinstance(info, dict):
        raise FeatureError("info is not a JSON object")
    info.setdefault("has_groups", "groups" in found)
    videos = tuple(map(str, groups))
    return Features(x, labels, tuple(map(str, ids)), videos, classes, info, _parse_sources(found, videos))


def _parse_sources(arrays: Mapping[str, NDArray[Any]], videos: Sequence[str]) -> tuple[ClipSource, ...]:
    """The sources of the clips; without an array `matches` from the names of their videos; () without any array."""
    texts: dict[str, list[str]] = {}
    for key, name in _SOURCE_ARRAYS.items():
        if key in arrays:
            if arrays[key].shape != (len(videos),):
                raise FeatureError(f"{key}: expected one text for each of {format_count(len(videos), 'clip')}")
            texts[name] = arrays[key].astype(np.str_).tolist()
    if not texts:
        return ()
    texts.setdefault("match", [match_name(video) for video in videos])
    return tuple(ClipSource(**dict(zip(texts, row, strict=True))) for row in zip(*texts.values(), strict=True))


def _parse_labels(labels: NDArray[Any], names: NDArray[Any] | None) -> tuple[IntArray, tuple[str, ...]]:
    """Integer labels and their names. Labels that are names are numbered alphabetically."""
    if labels.ndim != 1 or labels.dtype.kind not in "iuU":
        raise FeatureError(f"labels must be a vector of integers or names, got {labels.dtype} of shape {labels.shape}")
    if labels.dtype.kind == "U":
        values, numbers = np.unique(labels, return_inverse=True)
        return numbers.astype(np.int64), tuple(map(str, values))
    labels = np.maximum(labels.astype(np.int64), -1)
    if names is None:  # other programs may use any integers
        names, numbers = np.unique(labels[labels >= 0], return_inverse=True)
        labels[labels >= 0] = numbers
    return labels, tuple(map(str, names))


def _checksum(x: NDArray[Any], labels: NDArray[Any], metadata: Mapping[str, str]) -> str:
    digest = hashlib.sha256(np.ascontiguousarray(x).data)
    digest.update(np.ascontiguousarray(labels).data)
    digest.update(json.dumps(sorted(metadata.items())).encode())
    return digest.hexdigest()


def cache_path(folder: str | Path, key: str) -> Path:
    """The file of the features with this key."""
    return Path(folder) / key[:24] / "features.safetensors"


def read_cache(folder: str | Path, key: str) -> Features | None:
    """Cached features with this key, or None. A corrupt file is logged and ignored."""
    path = cache_path(folder, key)
    if not path.exists():
        return None
    try:
        found = load_features(path)
    except FeatureError as error:
        log.warning("%s; encoding the clips again", error)
        return None
    return found if found.info.get("key") == key else None


def write_cache(folder: str | Path, key: str, features: Features) -> Path:
    """Store features under this key."""
    return save_features(replace(features, info={**features.info, "key": key}), cache_path(folder, key))


def merge_features(parts: Sequence[Features], ids: Sequence[str]) -> Features:
    """Features of several ranks, in the order of `ids`. Raises `FeatureError` if a clip is missing or occurs twice."""
    merged = [clip for part in parts for clip in part.ids]
    row = {clip: i for i, clip in enumerate(merged)}
    if len(row) != len(merged) or set(row) != set(ids):
        missing = sorted(set(ids) - set(row))
        raise FeatureError(
            f"{format_count(len(merged), 'feature')}, {len(row)} distinct, for {format_count(len(ids), 'clip')}; "
            f"missing {missing[:5]}"
        )
    order = [row[clip] for clip in ids]
    x, labels, groups = (
        np.concatenate([getattr(p, n) for p in parts])[order] for n in ("features", "labels", "groups")
    )
    info = {**parts[0].info, "seconds": max(float(part.info.get("seconds", 0.0)) for part in parts)}
    return Features(x, labels, tuple(ids), tuple(groups.tolist()), parts[0].classes, info)
