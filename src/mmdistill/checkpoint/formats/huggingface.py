"""Folders of ``transformers``: the index of weights in several files, and ``config.json``."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmdistill.checkpoint.errors import CheckpointError, CorruptCheckpointError
from mmdistill.checkpoint.locate import read_json
from mmdistill.errors import format_count

CONFIG = "config.json"
# Values of VideoMAEConfig in transformers, for keys that a ``config.json`` of this model type omits.
_VIDEOMAE_DEFAULTS = {
    "image_size": 224,
    "num_frames": 16,
    "num_attention_heads": 12,
    "decoder_num_attention_heads": 6,
    "layer_norm_eps": 1e-12,
    "use_mean_pooling": True,
}
# Names of VideoMAE V2's ``model_config`` (OpenGVLab/VideoMAEv2-*) -> those of transformers.
_V2_NAMES = {
    "img_size": "image_size",
    "num_heads": "num_attention_heads",
    "embed_dim": "hidden_size",
    "depth": "num_hidden_layers",
    "in_chans": "num_channels",
}
# Keys whose value the tensors determine -> field of `EncoderConfig`. They must agree.
_TENSOR_SIZES = {
    "hidden_size": "dim",
    "num_hidden_layers": "depth",
    "intermediate_size": "mlp_dim",
    "num_channels": "channels",
    "patch_size": "patch",
    "tubelet_size": "tubelet",
}


@dataclass(frozen=True)
class ModelSettings:
    """Settings of a model that its tensors do not determine; None: unknown. Sizes in frames and pixels.

    Attributes:
        has_mean_pooling: whether the classifier reads the mean of the tokens, without a norm after the last block.
        tensor_sizes: field of `EncoderConfig` -> stated value, to compare with the tensors.
    """

    heads: int | None = None
    decoder_heads: int | None = None
    num_frames: int | None = None
    height: int | None = None
    width: int | None = None
    layer_norm_eps: float = 1e-6
    has_mean_pooling: bool | None = None
    tensor_sizes: Mapping[str, int] = field(default_factory=dict)


def read_model_settings(folder: Path) -> ModelSettings | None:
    """Read ``config.json`` of VideoMAE or VideoMAE V2 in a folder; None if there is none, or of another model.

    Raises:
        CheckpointError: a value is invalid, or the model computes something that `Encoder` does not.
    """
    path = folder / CONFIG
    if not path.is_file():
        return None
    content = read_json(path)
    if content.get("model_type") == "videomae":
        content = {**_VIDEOMAE_DEFAULTS, **content}
    elif isinstance(content.get("model_config"), dict):
        content = {_V2_NAMES.get(key, key): value for key, value in content["model_config"].items()}
    else:
        return None
    if content.get("hidden_act", "gelu") != "gelu" or content.get("cos_attn") or content.get("init_values"):
        raise CheckpointError(
            f"{path}: hidden_act other than gelu, cos_attn and init_values are not supported; use another checkpoint"
        )
    try:
        return _parse_settings(content)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: invalid or missing value ({error!r}); copy the original file") from error


def _parse_settings(content: Mapping[str, Any]) -> ModelSettings:
    def first(value: Any) -> Any:
        return value[0] if isinstance(value, list) else value

    size = content["image_size"]
    height, width = size if isinstance(size, list) else (size, size)
    decoder_heads = content.get("decoder_num_attention_heads")
    return ModelSettings(
        heads=int(content["num_attention_heads"]),
        decoder_heads=None if decoder_heads is None else int(decoder_heads),
        num_frames=int(content["num_frames"]),
        height=int(height),
        width=int(width),
        layer_norm_eps=float(content.get("layer_norm_eps", 1e-6)),
        has_mean_pooling=bool(content["use_mean_pooling"]),
        tensor_sizes={name: int(first(content[key])) for key, name in _TENSOR_SIZES.items() if key in content},
    )


def read_shard_index(index: Path) -> dict[Path, list[str]]:
    """Read ``*.index.json``: the file of each shard and the names of the tensors that it must contain.

    Raises:
        CorruptCheckpointError: the index is invalid, or a shard is missing.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CorruptCheckpointError(f"{index}: no 'weight_map', which names the shard of each tensor; copy it again")
    shards: dict[Path, list[str]] = {}
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or Path(name).name != name:
            raise CorruptCheckpointError(f"{index}: '{tensor}' is in {name!r}, which is not a file of this folder")
        shards.setdefault(index.with_name(name), []).append(tensor)
    missing = sorted(path.name for path in shards if not path.is_file())
    if missing:
        raise CorruptCheckpointError(
            f"{index}: {', '.join(missing)} missing of {format_count(len(shards), 'shard')}; copy it to this folder"
        )
    return shards
