"""Weights of transformers, VideoMAE and timm: the tokens are those of transformers, and every command reads them."""

import argparse
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mmdistill.checkpoint import CheckpointError, load_encoder, load_weights, open_checkpoint, read_checkpoint
from mmdistill.checkpoint.convert import convert_checkpoint
from mmdistill.checkpoint.errors import CorruptCheckpointError, UnsafeCheckpointError, WeightMismatchError
from mmdistill.cli.inspect_checkpoint import main as inspect
from mmdistill.cli.visualize_reconstruction import main as visualize
from mmdistill.config import DistillConfig, modality_specs
from mmdistill.config.compose import load_config
from mmdistill.distill.teachers import read_teacher
from mmdistill.evaluation.networks import load_network
from mmdistill.models.videomae import Encoder
from mmdistill.pretrain.initialization import load_videomae
from tests.commands import ROOT
from tests.tiny_data import make_tiny, overrides

transformers = pytest.importorskip("transformers")

CORPUS = ROOT.parent / "shared" / "data" / "world" / "checkpoints"
SIZES = {
    "image_size": 32,
    "patch_size": 8,
    "num_frames": 4,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "decoder_hidden_size": 16,
    "decoder_num_attention_heads": 2,
    "decoder_num_hidden_layers": 1,
    "decoder_intermediate_size": 32,
    "use_mean_pooling": False,
    "num_labels": 3,
}
MODELS = {
    "model": ("VideoMAEModel", {}),
    "model_with_mean_pooling": ("VideoMAEModel", {"use_mean_pooling": True}),
    "finetuned": ("VideoMAEForVideoClassification", {"use_mean_pooling": True}),
    "finetuned_without_mean_pooling": ("VideoMAEForVideoClassification", {}),
    "pretraining": ("VideoMAEForPreTraining", {}),
    "without_bias": ("VideoMAEModel", {"qkv_bias": False}),
    "large_eps": ("VideoMAEModel", {"layer_norm_eps": 1e-2}),
    "not_square": ("VideoMAEModel", {"image_size": [16, 32]}),
}


def data_overrides(root: Path) -> list[str]:
    """The overrides of `overrides` that `visualize` accepts."""
    return [given for given in overrides(root) if given.startswith("data_module.")]


def make_model(name: str) -> Any:
    """A model of transformers with random values in all tensors."""
    class_name, changes = MODELS[name]
    torch.manual_seed(0)
    model = getattr(transformers, class_name)(transformers.VideoMAEConfig(**{**SIZES, **changes}))
    for parameter in model.parameters():
        parameter.data.uniform_(-0.1, 0.1)
    return model.eval()


def write_one_file(model: Any, path: Path) -> Path:
    model.save_pretrained(path)
    return path


def write_shards(model: Any, path: Path) -> Path:
    model.save_pretrained(path, max_shard_size="20KB")
    assert len(list(path.glob("*.safetensors"))) > 1
    return path


def write_bin(model: Any, path: Path) -> Path:
    """As transformers 4 did by default."""
    model.save_pretrained(path)
    (path / "model.safetensors").unlink()
    torch.save(model.state_dict(), path / "pytorch_model.bin")
    return path


def write_bin_shards(model: Any, path: Path) -> Path:
    write_bin(model, path)
    state = torch.load(path / "pytorch_model.bin", weights_only=True)
    (path / "pytorch_model.bin").unlink()
    weight_map = {}
    for number, names in enumerate((list(state)[::2], list(state)[1::2]), 1):
        file = f"pytorch_model-0000{number}-of-00002.bin"
        torch.save({name: state[name] for name in names}, path / file)
        weight_map |= dict.fromkeys(names, file)
    (path / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def write_official(path: Path, **more: Any) -> Path:
    """The pretraining model in the layout of VideoMAE's own script."""
    folder = write_one_file(make_model("pretraining"), path.with_suffix(".source"))
    torch.save({"model": read_checkpoint(folder).state_dict, "epoch": 799, **more}, path)
    shutil.rmtree(folder)
    return path


def assert_same_tokens(encoder: Encoder, folder: Path) -> None:
    theirs = transformers.VideoMAEModel.from_pretrained(folder).eval()
    config = encoder.eval().config
    clips = torch.randn(2, 3, config.num_frames, config.height, config.width)
    with torch.no_grad():
        expected = theirs(clips.transpose(1, 2)).last_hidden_state
        torch.testing.assert_close(encoder(clips), expected, rtol=0, atol=1e-5)


def configure(root: Path) -> DistillConfig:
    return load_config(DistillConfig, "config_mmdistill", [*overrides(root), "trainer.ckpt_path=[a,b,c]"])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("data") / "tiny", per_class=1)


@pytest.mark.parametrize("name", MODELS)
def test_tokens_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    folder = write_one_file(make_model(name), tmp_path / "hf")
    encoder = load_encoder(folder)
    assert_same_tokens(encoder, folder)
    assert encoder.config.heads == 4
    assert encoder.config.final_norm == (not MODELS[name][1].get("use_mean_pooling", False))


@pytest.mark.parametrize("write", [write_shards, write_bin, write_bin_shards])
def test_every_layout_of_a_folder_is_read_completely(tmp_path: Path, write: Callable[[Any, Path], Path]) -> None:
    model = make_model("pretraining")
    folder, expected = write(model, tmp_path / "a"), read_checkpoint(write_one_file(model, tmp_path / "b")).state_dict
    paths = [folder, next(iter(folder.glob("*.index.json")), folder), next(iter(folder.glob("*-00002-of-*")), folder)]
    for path in paths:
        state = read_checkpoint(path).state_dict
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[key], tensor) for key, tensor in expected.items())
    assert_same_tokens(load_encoder(folder), tmp_path / "b")


@pytest.mark.parametrize("write", [write_shards, write_bin_shards])
def test_missing_and_incomplete_shards_are_named(tmp_path: Path, write: Callable[[Any, Path], Path]) -> None:
    folder = write(make_model("pretraining"), tmp_path / "hf")
    first, second = sorted(folder.glob("*-of-*"))[:2]
    content = second.read_bytes()
    second.write_bytes(first.read_bytes())
    with pytest.raises(CorruptCheckpointError, match=rf"{second.name}: lacks \d+ tensors? that .*index\.json lists"):
        open_checkpoint(folder)
    second.write_bytes(content[:-50])
    with pytest.raises(CorruptCheckpointError, match=second.name):
        read_checkpoint(folder)
    second.unlink()
    with pytest.raises(CorruptCheckpointError, match=rf"index\.json: {second.name} missing of \d+ shards"):
        open_checkpoint(folder)
    index = next(folder.glob("*.index.json"))
    index.unlink()
    with pytest.raises(CheckpointError, match=r"one of several shards; .*index\.json, which lists them, is missing"):
        open_checkpoint(first)


def test_config_json_that_does_not_fit_is_an_error(tmp_path: Path) -> None:
    folder = write_one_file(make_model("model"), tmp_path / "hf")
    original = json.loads((folder / "config.json").read_text())
    for change, message in (
        ({"hidden_size": 48}, r"\(tensors / config\.json\): dim 32 / 48; copy"),
        ({"num_hidden_layers": 3}, "depth 2 / 3"),
        ({"use_mean_pooling": True}, "norms after the last block 1 / 0"),
        ({"num_attention_heads": 3}, "not a multiple of heads=3"),
        ({"num_frames": "many"}, r"config\.json: invalid or missing value"),
        ({"hidden_act": "relu"}, r"config\.json: hidden_act other than gelu"),
    ):
        (folder / "config.json").write_text(json.dumps({**original, **change}))
        with pytest.raises(CheckpointError, match=message):
            load_encoder(folder)


def test_another_input_size_is_logged(tmp_path: Path, tiny: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Positions are sin-cos, so that the same weights with a config.json of this size give the same tokens."""
    folder = write_one_file(make_model("not_square"), tmp_path / "hf")
    data = configure(tiny).data_module
    with caplog.at_level("INFO"):
        encoder = read_teacher(str(folder), "rgb", modality_specs(data)["rgb"], data)
    assert "input of 4 frames of 32 x 32 px instead of 4 frames of 16 x 32 px in config.json" in caplog.text
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "image_size": [32, 32]}))
    assert_same_tokens(encoder, folder)


@pytest.mark.parametrize("name", ["model", "model_with_mean_pooling", "pretraining"])
def test_converted_file_keeps_the_settings_of_config_json(tmp_path: Path, name: str) -> None:
    folder = write_one_file(make_model(name), tmp_path / "hf")
    converted = convert_checkpoint(folder, tmp_path / "w.safetensors")
    assert_same_tokens(load_encoder(converted), folder)
    assert open_checkpoint(converted).find_decoder_config() == open_checkpoint(folder).find_decoder_config()


def test_module_with_another_number_of_heads_is_an_error(tmp_path: Path) -> None:
    folder = write_one_file(make_model("model"), tmp_path / "hf")
    encoder = load_encoder(folder)
    wrong = Encoder(type(encoder.config)(**{**vars(encoder.config), "heads": 2, "head_dim": 16}))
    with pytest.raises(WeightMismatchError, match=r"\(checkpoint / module\): heads 4 / 2"):
        load_weights(wrong, folder)


def test_videomae_v2_folder(tmp_path: Path) -> None:
    """Names of VideoMAE under `model.`, the settings in `model_config`, mean pooling without a classifier."""
    folder = write_one_file(make_model("finetuned"), tmp_path / "hf")
    state = {
        "model." + key.removeprefix("encoder."): tensor
        for key, tensor in read_checkpoint(folder).state_dict.items()
        if not key.startswith("classifier")
    }
    v2 = tmp_path / "v2"
    v2.mkdir()
    torch.save(state, v2 / "pytorch_model.bin")
    names = {"embed_dim": 32, "depth": 2, "num_heads": 4, "in_chans": 3, "img_size": 32, "patch_size": 8}
    settings = {**names, "num_frames": 4, "tubelet_size": 2, "use_mean_pooling": True, "layer_norm_eps": 1e-12}
    (v2 / "config.json").write_text(json.dumps({"model_type": "VideoMAEv2_Base", "model_config": settings}))
    assert_same_tokens(load_encoder(v2), folder)


@pytest.mark.parametrize("suffix", [".pth", ".pth.tar", ".bin", ".model", ""])
@pytest.mark.parametrize("is_zip", [True, False])
def test_content_decides_the_format(tmp_path: Path, suffix: str, is_zip: bool) -> None:
    folder = write_one_file(make_model("finetuned"), tmp_path / "hf")
    expected = read_checkpoint(folder).state_dict
    path = tmp_path / f"weights{suffix}"
    torch.save({"module": expected}, path, _use_new_zipfile_serialization=is_zip)
    assert read_checkpoint(path).state_dict.keys() == expected.keys()
    shutil.copy(folder / "model.safetensors", path)
    assert read_checkpoint(path).state_dict.keys() == expected.keys()
    path.write_text("text")
    with pytest.raises(CheckpointError, match=path.name):
        open_checkpoint(path)


def test_timm_names_in_safetensors(tmp_path: Path) -> None:
    """Blocks of timm's VisionTransformer: one bias for queries, keys and values; no prefix; a classifier."""
    from safetensors.torch import save_file

    folder = write_one_file(make_model("finetuned_without_mean_pooling"), tmp_path / "hf")
    state = {}
    for key, tensor in read_checkpoint(folder).state_dict.items():
        name = key.removeprefix("encoder.").replace("classifier.", "head.")
        if name.endswith("q_bias"):
            other = read_checkpoint(folder).state_dict[key.replace("q_bias", "v_bias")]
            state[name.replace("q_bias", "qkv.bias")] = torch.cat((tensor, torch.randn(32), other))
        elif not name.endswith("v_bias"):
            state[name] = tensor.clone()
    save_file(state, tmp_path / "timm.safetensors")
    encoder = load_encoder(tmp_path / "timm.safetensors", heads=4, num_frames=4, height=32, width=32)
    assert_same_tokens(encoder, folder)
    save_file({**state, "patch_embed.proj.weight": torch.zeros(32, 3, 8, 8)}, tmp_path / "image.safetensors")
    with pytest.raises(
        CheckpointError, match=r"image\.safetensors: weights of an image model .*; use those of a video"
    ):
        load_encoder(tmp_path / "image.safetensors", heads=4)


def test_arguments_in_an_official_file_are_ignored(tmp_path: Path) -> None:
    args = argparse.Namespace(lr=1e-3, output_dir=Path("out"), betas=[0.9, 0.95])
    plain, with_args = write_official(tmp_path / "a.pth"), write_official(tmp_path / "b.pth", args=args, scaler={})
    expected, checkpoint = read_checkpoint(plain).state_dict, read_checkpoint(with_args)
    assert checkpoint.meta["epoch"] == 799
    assert all(torch.equal(checkpoint.state_dict[key], tensor) for key, tensor in expected.items())


@pytest.mark.parametrize("name", ["model", "finetuned", "pretraining"])
def test_every_use_of_a_folder(
    tmp_path: Path, tiny: Path, name: str, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Inspect, init_from, baselines and teachers give the same tokens; a picture, or one line without a decoder."""
    folder = write_one_file(make_model(name), tmp_path / "hf")
    config = configure(tiny)
    assert inspect([str(folder)]) == 0
    assert "heads=4" in capsys.readouterr().out
    teacher = read_teacher(str(folder), "rgb", modality_specs(config.data_module)["rgb"], config.data_module)
    baseline = load_network(folder, data=config.data_module).encoder
    for encoder in (teacher, baseline):
        assert_same_tokens(encoder, folder)

    pretrained = Encoder(type(teacher.config)(**{**vars(teacher.config), "final_norm": True}))
    report = load_videomae(pretrained, str(folder))
    assert torch.equal(pretrained.blocks[1].mlp.fc2.weight, teacher.blocks[1].mlp.fc2.weight)
    is_new = name == "finetuned"
    assert ("encoder.norm is new (weight 1, bias 0)" in str(report)) == is_new
    assert torch.equal(pretrained.norm.weight, torch.ones(32)) == is_new

    status = visualize(
        [str(folder), *data_overrides(tiny), "modality=rgb", "--clips", "1", "--out", str(tmp_path / "png")]
    )
    errors = capsys.readouterr().err
    assert status == (0 if name == "pretraining" else 2)
    assert len(list((tmp_path / "png").glob("*.png"))) == (1 if name == "pretraining" else 0)
    assert ("it has no decoder" in errors) == (name != "pretraining")


def test_prediction_of_a_pretraining_folder_is_that_of_transformers(tmp_path: Path, tiny: Path) -> None:
    from mmdistill.config import PretrainConfig
    from mmdistill.pretrain.visualization import load_masked_autoencoder

    theirs = make_model("pretraining")
    folder = write_one_file(theirs, tmp_path / "hf")
    config = load_config(PretrainConfig, "config_pretrain", [*overrides(tiny), "modality=rgb"])
    model = load_masked_autoencoder(open_checkpoint(folder), config).eval()
    clips, is_masked = torch.randn(1, 3, 4, 32, 32), torch.arange(32)[None] % 4 != 0
    with torch.no_grad():
        predictions, _ = model(clips, (~is_masked).nonzero()[None, :, 1])
        pixels = torch.zeros_like(clips).transpose(1, 2) + clips.transpose(1, 2)
        expected = theirs(pixels, bool_masked_pos=is_masked).logits
    expected = expected.unflatten(2, (-1, 3)).transpose(2, 3).flatten(2)  # (pt, ph, pw, C) -> (C, pt, ph, pw)
    torch.testing.assert_close(predictions, expected, rtol=0, atol=1e-3)


def test_picture_of_an_official_file_or_one_line(
    tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_official(tmp_path / "official.pth")
    capsys.readouterr()
    assert visualize([str(path), *data_overrides(tiny), "modality=rgb", "--out", str(tmp_path)]) == 2
    errors = capsys.readouterr().err
    assert "official.pth: the number of heads cannot be inferred" in errors
    assert errors.count("\n") == 1


@pytest.mark.skipif(not CORPUS.is_dir(), reason="needs ../shared")
@pytest.mark.parametrize("name", ["videomae_finetuned", "videomae_4_heads", "videomae_shards"])
def test_corpus_folders(name: str) -> None:
    encoder = load_encoder(CORPUS / name)
    assert_same_tokens(encoder, CORPUS / name)
    assert encoder.config.heads == json.loads((CORPUS / name / "config.json").read_text())["num_attention_heads"]
    assert inspect([str(CORPUS / name)]) == 0


@pytest.mark.skipif(not CORPUS.is_dir(), reason="needs ../shared")
def test_corpus_files(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plain, with_args = (
        read_checkpoint(CORPUS / f"videomae_official_{n}.pth").state_dict for n in ("plain", "with_args")
    )
    assert plain.keys() == with_args.keys()
    assert all(torch.equal(plain[key], tensor) for key, tensor in with_args.items())
    with pytest.raises(UnsafeCheckpointError, match=rf"hostile\.pth: rejected: .*'{os.name}\.system'"):
        open_checkpoint(CORPUS / "hostile.pth")
    assert not list(tmp_path.glob("*"))
    assert visualize([str(CORPUS / "videomae_official_plain.pth"), *data_overrides(tiny), "modality=rgb"]) == 2
    assert (
        visualize([str(CORPUS / "videomae_shards"), *data_overrides(tiny), "modality=rgb", "--out", str(tmp_path)]) == 0
    )
    config = configure(tiny)
    for name in ("videomae_finetuned", "videomae_shards"):
        load_network(CORPUS / name, data=config.data_module)
        read_teacher(str(CORPUS / name), "rgb", modality_specs(config.data_module)["rgb"], config.data_module)
