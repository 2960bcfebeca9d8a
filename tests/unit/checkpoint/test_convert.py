"""Conversion keeps every bit; exports give the same features elsewhere; inspection tells what is there."""

import json
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mmdistill.checkpoint import CheckpointError, load_encoder, read_checkpoint, save_safetensors, save_torch
from mmdistill.checkpoint.convert import convert_checkpoint
from mmdistill.checkpoint.export import export_student
from mmdistill.checkpoint.inspect import inspect_checkpoint
from mmdistill.models.videomae import DecoderConfig, Encoder, EncoderConfig, VideoMAE

FIXTURES = Path(__file__).parent / "fixtures"
SCRIPTS = Path(__file__).resolve().parents[3] / "scripts"
GEOMETRY = EncoderConfig(3, 4, 8, 12, 4, 2, 16, 2, 4, 4, 32)
TARGETS = ["a.safetensors", "a.ckpt", "a.pt", "epoch=03-loss=0.2500"]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def identical(one: Path, other: Path) -> None:
    a, b = read_checkpoint(one), read_checkpoint(other)
    assert sorted(a.state_dict) == sorted(b.state_dict)
    for name, tensor in a.state_dict.items():
        assert tensor.dtype == b.state_dict[name].dtype
        assert torch.equal(bits(tensor), bits(b.state_dict[name]))


def distilled(path: Path) -> Encoder:
    """A small distilled Lightning file with metadata; its student."""
    torch.manual_seed(0)
    student, teacher = Encoder(GEOMETRY), Encoder(GEOMETRY)
    for encoder in (student, teacher):
        for parameter in encoder.parameters():
            parameter.data.uniform_(-0.3, 0.3)
    state = {}
    for part, encoder in (("student_rgb", student), ("teacher_rgb", teacher)):
        state |= {f"{part}.encoder.{k}": v for k, v in encoder.state_dict().items()}
    state["cmt.mlp_to_rgb.0.weight"] = torch.randn(16, 16)
    geometry = vars(GEOMETRY)
    meta = {
        "kind": "distill",
        "encoders": {"student_rgb": geometry, "teacher_rgb": geometry},
        "statistics": {"rgb": {"mean": [0.5], "std": [0.2]}, "flow": {"mean": [0.0], "std": [1.0]}},
    }
    content = {"state_dict": state, "pytorch-lightning_version": "2.6.6", "epoch": 3, "global_step": 40}
    save_torch({**content, "mmdistill": meta}, path)
    return student


@pytest.mark.parametrize("source", ["zero3-w2-bf16", "zero0-w1-fp32", "lightning"])
def test_any_round_trip_is_bitwise(source: str, tmp_path: Path) -> None:
    start = next(p for p in (FIXTURES / source).iterdir() if p.name.startswith("epoch"))
    here = start
    for index, target in enumerate([*TARGETS, *reversed(TARGETS)]):
        here = convert_checkpoint(here, tmp_path / str(index) / target)
        identical(start, here)
    assert read_checkpoint(here).meta["epoch"] == read_checkpoint(start).meta["epoch"]


def test_tensors_of_many_pieces_are_written_whole(tmp_path: Path) -> None:
    """Larger than what is handed to the disk at a time, and not a multiple of it."""
    state = {"a": torch.randn(5_000_003), "b": torch.randn(7_000_001).half(), "c": torch.tensor(3)}
    save_torch(state, tmp_path / "w.pt")
    torch.save(state, tmp_path / "theirs.pt")
    save_safetensors(state, tmp_path / "w.safetensors", {})
    for read in (torch.load(tmp_path / "w.pt"), load_file(tmp_path / "w.safetensors")):
        assert all(torch.equal(read[name], tensor) for name, tensor in state.items())
    for name in ("w.pt", "w.safetensors"):
        identical(tmp_path / "theirs.pt", tmp_path / name)


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    source = FIXTURES / "plain" / "bare.pt"
    for target in TARGETS:
        convert_checkpoint(source, tmp_path / target)
        with pytest.raises(CheckpointError, match=r"exists; choose another name, or use --force"):
            convert_checkpoint(source, tmp_path / target)
        convert_checkpoint(source, tmp_path / target, force=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(TARGETS)


def test_special_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "a=b, [1] *? ~x é 检查点"
    folder.mkdir()
    for target in TARGETS:
        here = convert_checkpoint(FIXTURES / "zero1-w2-bf16" / "epoch=01-loss=0.5000", folder / target)
        identical(here, FIXTURES / "zero1-w2-bf16" / "epoch=01-loss=0.5000")
    monkeypatch.setenv("HOME", str(folder))
    assert read_checkpoint("~/a.ckpt").path == Path("~/a.ckpt")
    convert_checkpoint("~/a.ckpt", "~/b.safetensors")
    assert (folder / "b.safetensors").exists()


def test_lightning_file_from_weights_loads_in_lightning(tmp_path: Path) -> None:
    pl = pytest.importorskip("pytorch_lightning")
    path = convert_checkpoint(FIXTURES / "plain" / "bare.pt", tmp_path / "x.ckpt")

    class Holder(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            net = VideoMAE(EncoderConfig(3, 2, 8, 8, 4, 2, 8, 1, 2, 4, 16), DecoderConfig(4, 1, 1, 4, 8))
            self.mask_token = net.mask_token
            for name, child in net.named_children():
                setattr(self, name, child)

    held = Holder.load_from_checkpoint(path, weights_only=True).state_dict()
    assert all(torch.equal(held[k], v) for k, v in read_checkpoint(path).state_dict.items())


def test_export_safetensors_is_the_student_alone(tmp_path: Path) -> None:
    student = distilled(tmp_path / "last.ckpt")
    path = export_student(tmp_path / "last.ckpt", tmp_path / "s.safetensors", to="safetensors")
    checkpoint = read_checkpoint(path)
    assert checkpoint.components == ["encoder"]
    assert checkpoint.meta["statistics"] == {"rgb": {"mean": [0.5], "std": [0.2]}}
    x = torch.randn(2, 3, 4, 8, 12)
    assert torch.equal(load_encoder(path).embed(x), student.embed(x))


def test_export_huggingface(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    student = distilled(tmp_path / "last.ckpt").eval()
    folder = export_student(tmp_path / "last.ckpt", tmp_path / "hf", to="hf")
    theirs = transformers.VideoMAEModel.from_pretrained(folder).eval()
    x = torch.randn(2, 3, 4, 8, 12)
    with torch.no_grad():
        out = theirs(x.transpose(1, 2)).last_hidden_state
        torch.testing.assert_close(out, student(x), rtol=0, atol=1e-5)
    back = load_encoder(folder)
    assert back.config == GEOMETRY
    assert torch.equal(back.blocks[1].attn.qkv.weight, student.blocks[1].attn.qkv.weight)


def test_huggingface_cannot_hold_free_widths(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="3 heads of 5 in a width of 16"):
        export_student(FIXTURES / "plain" / "free_width_sincos.pth", tmp_path / "hf", to="hf")
    assert not (tmp_path / "hf").exists()


def test_export_torch(tmp_path: Path) -> None:
    student = distilled(tmp_path / "last.ckpt").eval()
    path = export_student(tmp_path / "last.ckpt", tmp_path / "s.pt2", to="torch_export")
    program = torch.export.load(path).module()
    for batch in (1, 3):
        x = torch.randn(batch, 3, 4, 8, 12)
        torch.testing.assert_close(program(x), student.embed(x), rtol=1e-5, atol=1e-5)


def test_export_onnx(tmp_path: Path) -> None:
    student = distilled(tmp_path / "last.ckpt").eval()
    if any(find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")):
        if find_spec("onnx") is None:
            with pytest.raises(CheckpointError, match="ONNX export needs the packages onnx"):
                export_student(tmp_path / "last.ckpt", tmp_path / "s.onnx", to="onnx")
        pytest.skip("onnx, onnxscript and onnxruntime are not installed")
    import onnxruntime

    path = export_student(tmp_path / "last.ckpt", tmp_path / "s.onnx", to="onnx")
    session = onnxruntime.InferenceSession(str(path))
    for batch in (1, 3):
        x = torch.randn(batch, 3, 4, 8, 12)
        out = torch.from_numpy(session.run(None, {"clip": x.numpy()})[0])
        torch.testing.assert_close(out, student.embed(x), rtol=0, atol=1e-4)


def test_inspect(tmp_path: Path) -> None:
    report = inspect_checkpoint(FIXTURES / "zero2-w2-bf16" / "epoch=01-loss=0.5000")
    assert (report["format"], report["stage"], report["world_size"], report["complete"]) == ("deepspeed", 2, 2, True)
    assert report["components"]["encoder"] == {"tensors": 17, "parameters": 1384}
    assert report["missing"] == ["manifest.json (checksums)", "meta.json (architecture and statistics)"]
    distilled(tmp_path / "last.ckpt")
    report = inspect_checkpoint(tmp_path / "last.ckpt")
    assert (report["kind"], report["epoch"], report["step"], report["missing"]) == ("distill", 3, 40, [])
    assert report["architecture"]["student_rgb"]["heads"] == 4
    data = (tmp_path / "last.ckpt").read_bytes()
    (tmp_path / "last.ckpt").write_bytes(data[: len(data) // 2])
    report = inspect_checkpoint(tmp_path / "last.ckpt")
    assert not report["complete"]
    assert "truncated" in report["problem"]


def test_scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The three commands as a user types them."""
    monkeypatch.chdir(tmp_path)

    def run(script: str, *words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [script, *words])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(SCRIPTS / script), run_name="__main__")
        shown = capsys.readouterr()
        return int(ended.value.code or 0), shown.out, shown.err

    source = str(FIXTURES / "lightning" / "epoch=00-train_loss=0.5000.ckpt")
    code, out, _ = run("inspect_checkpoint.py", source)
    assert code == 0
    assert "student_rgb: 17 tensors" in out
    assert json.loads(run("inspect_checkpoint.py", source, "--json")[1])["kind"] == "distill"
    assert run("convert_checkpoint.py", source, "w.safetensors")[1] == "wrote w.safetensors\n"
    code, _, err = run("export_student.py", source, "--to", "hf")
    assert code == 2
    assert "heads" in err
    assert run("inspect_checkpoint.py", "nowhere")[0] == 2
