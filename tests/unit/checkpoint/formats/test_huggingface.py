import json
from pathlib import Path
from typing import Any

import pytest

from mmdistill.checkpoint.errors import CheckpointError, CorruptCheckpointError
from mmdistill.checkpoint.formats.huggingface import ModelSettings, read_model_settings, read_shard_index


def write_config(folder: Path, **content: Any) -> Path:
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def test_omitted_keys_have_the_defaults_of_transformers(tmp_path: Path) -> None:
    expected = ModelSettings(12, 6, 16, 224, 224, 1e-12, has_mean_pooling=True)
    assert read_model_settings(write_config(tmp_path, model_type="videomae")) == expected


def test_stated_values_are_read(tmp_path: Path) -> None:
    folder = write_config(
        tmp_path,
        model_type="videomae",
        image_size=[32, 48],
        patch_size=[8, 8],
        num_frames=4,
        hidden_size=64,
        num_attention_heads=4,
        layer_norm_eps=1e-5,
        use_mean_pooling=False,
    )
    sizes = {"dim": 64, "patch": 8}
    expected = ModelSettings(4, 6, 4, 32, 48, 1e-5, has_mean_pooling=False, tensor_sizes=sizes)
    assert read_model_settings(folder) == expected


def test_videomae_v2_has_its_settings_in_model_config(tmp_path: Path) -> None:
    names = {"img_size": 32, "num_heads": 4, "embed_dim": 64, "depth": 2, "in_chans": 3, "num_frames": 4}
    settings = {**names, "use_mean_pooling": True, "layer_norm_eps": 1e-6, "init_values": 0.0, "cos_attn": False}
    sizes = {"dim": 64, "depth": 2, "channels": 3}
    expected = ModelSettings(4, None, 4, 32, 32, 1e-6, has_mean_pooling=True, tensor_sizes=sizes)
    folder = write_config(tmp_path, model_type="VideoMAEv2_Base", model_config=settings)
    assert read_model_settings(folder) == expected
    for change in ({"cos_attn": True}, {"init_values": 0.1}):
        write_config(tmp_path, model_type="VideoMAEv2_Base", model_config={**settings, **change})
        with pytest.raises(CheckpointError, match=r"config\.json: .*cos_attn and init_values are not supported"):
            read_model_settings(tmp_path)


def test_configs_of_other_models_are_ignored_and_damaged_ones_are_errors(tmp_path: Path) -> None:
    assert read_model_settings(tmp_path) is None
    assert read_model_settings(write_config(tmp_path, architecture="vit_small_patch16_224")) is None
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CorruptCheckpointError, match=r"config\.json: unreadable"):
        read_model_settings(tmp_path)


def test_shard_index(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "1.safetensors", "b": "2.safetensors", "c": "1.safetensors"}}))
    for name in ("1.safetensors", "2.safetensors"):
        (tmp_path / name).touch()
    assert read_shard_index(index) == {tmp_path / "1.safetensors": ["a", "c"], tmp_path / "2.safetensors": ["b"]}
    (tmp_path / "2.safetensors").unlink()
    with pytest.raises(CorruptCheckpointError, match=r"index\.json: 2\.safetensors missing of 2 shards; copy it"):
        read_shard_index(index)


@pytest.mark.parametrize("content", [{}, {"weight_map": {}}, {"weight_map": {"a": "../x"}}, {"weight_map": {"a": 1}}])
def test_invalid_shard_index_is_an_error(tmp_path: Path, content: dict[str, Any]) -> None:
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps(content))
    with pytest.raises(CorruptCheckpointError, match=r"pytorch_model\.bin\.index\.json: "):
        read_shard_index(index)
