"""Exported students give the same features in transformers, torch.export and onnxruntime."""

import dataclasses
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from mmdistill import load_student
from mmdistill.checkpoint import CheckpointError, load_encoder, save_torch
from mmdistill.checkpoint.export import export_student
from mmdistill.models.videomae import Encoder, EncoderConfig
from tests.checkpoint_files import STUDENT_CONFIG, write_distilled

CLIPS = {"sincos": STUDENT_CONFIG, "demo": dataclasses.replace(STUDENT_CONFIG, pos_embed="sincos_separable")}


def random_frames(batch: int) -> torch.Tensor:
    return torch.randint(0, 256, (batch, 4, 8, 12, 3), dtype=torch.uint8)


def test_export_huggingface(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    student = write_distilled(tmp_path / "last.ckpt").eval()
    folder = export_student(tmp_path / "last.ckpt", tmp_path / "hf", to="hf")
    theirs = transformers.VideoMAEModel.from_pretrained(folder).eval()
    x = torch.randn(2, 3, 4, 8, 12)
    with torch.no_grad():
        out = theirs(x.transpose(1, 2)).last_hidden_state
        torch.testing.assert_close(out, student(x), rtol=0, atol=1e-5)
    back = load_encoder(folder)
    assert back.config == STUDENT_CONFIG
    assert torch.equal(back.blocks[1].attn.qkv.weight, student.blocks[1].attn.qkv.weight)


@pytest.mark.parametrize("class_name", ["VideoMAEImageProcessor", "VideoMAEVideoProcessor"])
def test_processor_of_the_huggingface_folder(tmp_path: Path, class_name: str) -> None:
    """Stored frames of 10 x 18 px: the processor crops the center and normalizes, as the evaluation does."""
    transformers = pytest.importorskip("transformers")
    write_distilled(tmp_path / "last.ckpt")
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    content["mmdistill"]["config"] = {"data_module": {"frame_size": [10, 18]}}
    save_torch(content, tmp_path / "last.ckpt")
    folder = export_student(tmp_path / "last.ckpt", tmp_path / "hf", to="hf")
    processor = getattr(transformers, class_name).from_pretrained(folder)
    model = transformers.VideoMAEModel.from_pretrained(folder).eval()
    frames = np.random.default_rng(0).integers(0, 256, (4, 10, 18, 3), dtype=np.uint8)
    with torch.no_grad():
        tokens = model(processor(list(frames), return_tensors="pt").pixel_values).last_hidden_state
    feature = torch.nn.functional.layer_norm(tokens.mean(dim=1), (16,), eps=1e-6)[0]
    torch.testing.assert_close(feature, load_student(tmp_path / "last.ckpt")(frames), rtol=0, atol=1e-4)


def test_code_of_the_card_runs_as_written(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    write_distilled(tmp_path / "last.ckpt")
    folder = export_student(tmp_path / "last.ckpt", tmp_path / "hf", to="hf")
    card = (folder / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0].replace("FOLDER", str(folder))
    frames = random_frames(1)[0].numpy()
    scope = {"frames": frames}
    exec(code, scope)
    torch.testing.assert_close(scope["feature"][0], load_student(folder)(frames), rtol=0, atol=1e-4)
    assert "Mean and standard deviation of the input: [0.5, 0.5, 0.5] and [0.2, 0.2, 0.2]." in card


def test_norm_free_student_is_exported_to_huggingface(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = dataclasses.replace(STUDENT_CONFIG, final_norm=False, layer_norm_eps=1e-3)
    student = write_distilled(tmp_path / "last.ckpt", config).eval()
    folder = export_student(tmp_path / "last.ckpt", tmp_path / "hf", to="hf")
    x = torch.randn(2, 3, 4, 8, 12)
    with torch.no_grad():
        out = transformers.VideoMAEModel.from_pretrained(folder).eval()(x.transpose(1, 2)).last_hidden_state
        torch.testing.assert_close(out, student(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", CLIPS)
def test_export_torch(tmp_path: Path, name: str) -> None:
    write_distilled(tmp_path / "last.ckpt", CLIPS[name])
    path = export_student(tmp_path / "last.ckpt", tmp_path / "s.pt2", to="torch_export")
    program, student = torch.export.load(path).module(), load_student(tmp_path / "last.ckpt")
    for batch in (1, 3):
        frames = random_frames(batch)
        torch.testing.assert_close(program(frames), student(frames), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CLIPS)
def test_export_onnx(tmp_path: Path, name: str) -> None:
    write_distilled(tmp_path / "last.ckpt", CLIPS[name])
    if any(find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")):
        if find_spec("onnx") is None:
            with pytest.raises(CheckpointError, match="ONNX export needs the packages onnx"):
                export_student(tmp_path / "last.ckpt", tmp_path / "s.onnx", to="onnx")
        pytest.skip("onnx, onnxscript and onnxruntime are not installed")
    import onnxruntime

    path = export_student(tmp_path / "last.ckpt", tmp_path / "s.onnx", to="onnx")
    session, student = onnxruntime.InferenceSession(str(path)), load_student(tmp_path / "last.ckpt")
    for batch in (1, 3):
        frames = random_frames(batch)
        out = torch.from_numpy(session.run(None, {"frames": frames.numpy()})[0])
        torch.testing.assert_close(out, student(frames), rtol=0, atol=1e-4)


def test_an_exported_program_has_the_pooling_of_the_training(tmp_path: Path) -> None:
    """For any batch size."""
    student = write_distilled(tmp_path / "last.ckpt")
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    content["mmdistill"]["config"] = {"pooling": "halves", "pooling_last_k": 4}
    save_torch(content, tmp_path / "last.ckpt")
    program = torch.export.load(export_student(tmp_path / "last.ckpt", tmp_path / "s.pt2", to="torch_export"))
    for batch in (1, 3):
        frames = random_frames(batch)
        x = (frames.permute(0, 4, 1, 2, 3) / 255 - 0.5) / 0.2
        tokens = student(x).unflatten(1, (2, 2, 3))  # (B, t, h, w, D)
        halves = [tokens[:, :, row].flatten(1, 2).mean(dim=1) for row in (0, 1)]
        normed = [
            (v - v.mean(1, keepdim=True)) / (v.var(1, unbiased=False, keepdim=True) + 1e-6).sqrt() for v in halves
        ]
        torch.testing.assert_close(program.module()(frames), torch.cat(normed, dim=1), rtol=1e-4, atol=1e-4)


def test_export_of_a_flow_encoder_takes_clips_in_px(tmp_path: Path) -> None:
    encoder = Encoder(dataclasses.replace(STUDENT_CONFIG, channels=2)).eval()
    meta = {"kind": "pretrain", "modality": "flow", "encoders": {"encoder": dataclasses.asdict(encoder.config)}}
    content = {"model": {f"encoder.{k}": v for k, v in encoder.state_dict().items()}, "mmdistill": meta}
    save_torch(content, tmp_path / "flow.pt")
    with pytest.raises(CheckpointError, match=r"flow\.pt: has no mean and std of its flow input"):
        export_student(tmp_path / "flow.pt", tmp_path / "flow.pt2", to="torch_export")
    meta["statistics"] = {"flow": {"mean": [0.5, -0.5], "std": [2.0, 4.0]}}
    save_torch(content, tmp_path / "flow.pt")
    path = export_student(tmp_path / "flow.pt", tmp_path / "flow.pt2", to="torch_export")
    clips = torch.randn(3, 2, 4, 8, 12)
    normalized = (clips - torch.tensor([0.5, -0.5]).view(2, 1, 1, 1)) / torch.tensor([2.0, 4.0]).view(2, 1, 1, 1)
    torch.testing.assert_close(torch.export.load(path).module()(clips), encoder.embed(normalized), rtol=1e-5, atol=1e-5)


def test_vit_s_at_full_size_has_any_batch_size(tmp_path: Path) -> None:
    """Only the graph is compared; its batch size is symbolic in every operation."""
    config = EncoderConfig(3, 16, 224, 384, 16, 2, 384, 12, 6, 64, 1536)
    write_distilled(tmp_path / "last.ckpt", config)
    path = export_student(tmp_path / "last.ckpt", tmp_path / "s.pt2", to="torch_export")
    program = torch.export.load(path)
    shapes = {str(node): node.meta["val"].shape for node in program.graph.nodes if node.op == "placeholder"}
    batch = shapes["clips"][0]
    outputs = [node.meta["val"].shape for node in program.graph.output_node().args[0]]
    assert isinstance(batch, torch.SymInt)
    assert outputs == [torch.Size([batch, 384])]
