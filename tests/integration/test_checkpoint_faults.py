"""Damaged and hostile files: an error names the file and the problem, no module changes, no code is executed."""

import io
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mmdistill.checkpoint import (
    CheckpointError,
    CorruptCheckpointError,
    UnsafeCheckpointError,
    latest_valid_checkpoint,
    load_encoder,
    load_torch,
    load_weights,
    read_checkpoint,
    save_safetensors,
    save_torch,
)
from mmdistill.checkpoint import write as writing
from mmdistill.checkpoint.convert import write_deepspeed
from mmdistill.models.videomae import DecoderConfig, EncoderConfig, VideoMAE
from tests.checkpoint_files import zip_records

FIXTURES = Path(__file__).resolve().parents[1] / "unit" / "checkpoint" / "fixtures"
CONFIG, DECODER = EncoderConfig(3, 2, 8, 8, 4, 2, 16, 2, 2, 8, 32), DecoderConfig(8, 1, 1, 8, 16)


def make_model() -> VideoMAE:
    torch.manual_seed(0)
    return VideoMAE(CONFIG, DECODER)


def write_native(path: Path, step: int = 1, **meta: object) -> Path:
    write_deepspeed(make_model().state_dict(), path, {"kind": "pretrain", "step": step, **meta})
    return path


def write_lightning(path: Path, step: int = 1) -> Path:
    save_torch(
        {"state_dict": make_model().state_dict(), "pytorch-lightning_version": "2", "epoch": 0, "global_step": step},
        path,
    )
    return path


def assert_not_loaded(path: Path) -> None:
    """A module that is asked to load `path` keeps its values."""
    module = make_model()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    with pytest.raises(CheckpointError):
        load_weights(module, path)
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


FILES = ["checkpoint/mp_rank_00_model_states.pt", "latest", "meta.json", "manifest.json"]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_truncated_file_of_a_directory(
    tmp_path: Path, file: str, share: float, caplog: pytest.LogCaptureFixture
) -> None:
    old, new = write_native(tmp_path / "epoch=00-loss=2.0000", 1), write_native(tmp_path / "epoch=01-loss=1.0000", 2)
    data = (new / file).read_bytes()
    kept = int(len(data) * share)
    (new / file).write_bytes(data[:kept])
    with pytest.raises(CorruptCheckpointError) as caught:
        read_checkpoint(new)  # an explicit path is never replaced by another checkpoint
    text = str(caught.value)
    assert file.rsplit("/", 1)[-1] in text
    if file.endswith((".pt", "meta.json")):
        assert f"{kept} bytes" in text
        assert f"{len(data)} expected" in text
    assert_not_loaded(new)
    assert latest_valid_checkpoint(tmp_path) == old
    name = file.rsplit("/", 1)[-1]
    assert any("skipping an invalid checkpoint" in r.message and name in r.message for r in caplog.records)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
def test_truncated_single_file(tmp_path: Path, share: float, suffix: str) -> None:
    path = tmp_path / f"epoch=01-train_loss=0.5000.{suffix}"
    if suffix == "ckpt":
        write_lightning(path)
    else:
        save_safetensors(make_model().state_dict(), path, {})
    data = path.read_bytes()
    kept = int(len(data) * share)
    path.write_bytes(data[:kept])
    with pytest.raises(CorruptCheckpointError, match=rf"{path.name}.*truncated: .*{kept} bytes") as caught:
        read_checkpoint(path)
    assert "expected" in str(caught.value) or kept == 0
    assert_not_loaded(path)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_truncated_shard_without_manifest(tmp_path: Path, share: float) -> None:
    """Directories of stock DeepSpeed have no manifest."""
    root = tmp_path / "epoch=01-loss=0.5000"
    shutil.copytree(FIXTURES / "zero2-w2-bf16" / root.name, root)
    for file in sorted((root / "checkpoint").iterdir()):
        data = file.read_bytes()
        file.write_bytes(data[: int(len(data) * share)])
        with pytest.raises(CorruptCheckpointError, match=rf"{file.name}.*truncated"):
            read_checkpoint(root)
        file.write_bytes(data)
    read_checkpoint(root)


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(bytes(data))


def test_flipped_bit_in_a_tensor(tmp_path: Path) -> None:
    directory, file = write_native(tmp_path / "d"), write_lightning(tmp_path / "f.ckpt")
    for path, root in ((directory / FILES[0], directory), (file, file)):
        clean = path.read_bytes()
        records = [r for r in zip_records(path) if "/data/" in r.name and r.size]
        assert len(records) > 20
        for record in records[::7]:
            flip(path, record.start + record.size // 2)
            with pytest.raises(CorruptCheckpointError, match="corrupt: checksum"):
                read_checkpoint(root)
            assert_not_loaded(root)
            path.write_bytes(clean)
    stock = tmp_path / "epoch=01-loss=0.5000"
    shutil.copytree(FIXTURES / "zero1-w2-bf16" / stock.name, stock)
    shard = stock / "checkpoint" / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    flip(shard, max(zip_records(shard), key=lambda r: r.size).start)
    with pytest.raises(CorruptCheckpointError, match="corrupt: checksum"):
        read_checkpoint(stock)
    path = tmp_path / "w.safetensors"
    save_safetensors(make_model().state_dict(), path, {})
    flip(path, path.stat().st_size - 5)
    with pytest.raises(CorruptCheckpointError, match="corrupt: checksum"):
        read_checkpoint(path)


@pytest.mark.parametrize("file", FILES)
def test_flipped_bit_in_small_files_and_headers(tmp_path: Path, file: str) -> None:
    root = write_native(tmp_path / "d")
    clean = (root / file).read_bytes()
    for position in range(0, len(clean), max(1, len(clean) // 40)):
        flip(root / file, position)
        try:  # a flip in the padding between records has no effect
            state = read_checkpoint(root).state_dict
        except CorruptCheckpointError:
            pass
        else:
            assert all(torch.equal(v, state[k]) for k, v in make_model().state_dict().items())
        (root / file).write_bytes(clean)


def test_valid_files_of_two_saves_are_not_mixed(tmp_path: Path) -> None:
    a, b = write_native(tmp_path / "a", 1), tmp_path / "b"
    write_deepspeed({k: v + 1 for k, v in make_model().state_dict().items()}, b, {"kind": "pretrain", "step": 1})
    shutil.copy(a / FILES[0], b / FILES[0])
    with pytest.raises(CorruptCheckpointError, match="checksum does not match its manifest"):
        read_checkpoint(b)
    c = write_native(tmp_path / "c", 1)
    shutil.copy(a / FILES[0], c / "checkpoint" / "zero_pp_rank_1_mp_rank_00_optim_states.pt")
    with pytest.raises(CorruptCheckpointError, match="a mix of two saves"):
        read_checkpoint(c)


class Hostile:
    """Writes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return os.system, (f"touch '{self.mark}'",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("layout", ["zip", "legacy", "bare"])
@pytest.mark.parametrize("name", ["x.pt", "x.ckpt", "checkpoint/mp_rank_00_model_states.pt", "shard"])
def test_hostile_pickles_are_rejected_and_not_executed(tmp_path: Path, name: str, layout: str, protocol: int) -> None:
    mark = tmp_path / "ran"
    content = {"module": {"encoder.norm.weight": torch.zeros(1)}, "state_dict": {}, "bad": Hostile(mark)}
    root = path = tmp_path / name
    if name == "shard":
        root = tmp_path / "epoch=01-loss=0.5000"
        shutil.copytree(FIXTURES / "zero2-w2-bf16" / root.name, root)
        path = root / "checkpoint" / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
        content = {"optimizer_state_dict": Hostile(mark)}
    elif "/" in name:
        root = tmp_path
        path.parent.mkdir()
    if layout == "bare":
        path.write_bytes(pickle.dumps({"bad": Hostile(mark)}, protocol=protocol))
    else:
        torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=layout == "zip")
    for load in (read_checkpoint, load_encoder):
        with pytest.raises(UnsafeCheckpointError, match=r"'(posix|nt)\.system'.*no code was executed"):
            load(root)
    with pytest.raises(UnsafeCheckpointError):
        load_torch(path)
    assert not mark.exists()


def test_functions_of_torch_are_rejected(tmp_path: Path) -> None:
    class Gadget:
        def __reduce__(self) -> tuple:
            return torch.load, ("/nowhere",)

    torch.save({"state_dict": {"a": torch.zeros(1)}, "hyper_parameters": Gadget()}, tmp_path / "x.ckpt")
    with pytest.raises(UnsafeCheckpointError, match=r"torch.*load"):
        read_checkpoint(tmp_path / "x.ckpt")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize(
    "data", [b"hello world", b"\x80\x04", b"PK\x03\x04" + bytes(50), bytes(100), b"\x80\x02}q\x00."]
)
def test_other_files_are_errors(tmp_path: Path, data: bytes) -> None:
    for name in ("x.pt", "x.ckpt", "x.safetensors"):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(CheckpointError, match=name):
            read_checkpoint(tmp_path / name)
    (tmp_path / "notes.txt").write_bytes(data)
    with pytest.raises(CheckpointError, match="not a known checkpoint format"):
        read_checkpoint(tmp_path / "notes.txt")


@pytest.mark.filterwarnings("ignore:.*[Ss]parse")
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"state_dict": {0: torch.zeros(2), "encoder.norm.weight": torch.zeros(2)}}, "the key 0"),
        ({0: torch.zeros(2), "encoder.norm.weight": torch.zeros(2)}, "the key 0"),
        ({"encoder.norm.weight": torch.zeros(2, device="meta")}, "'encoder.norm.weight' has no values"),
        ({"encoder.norm.weight": torch.zeros(2, 2).to_sparse()}, "'encoder.norm.weight' is sparse"),
        ({"model": {"encoder.norm.weight": torch.zeros(2)}, "mmdistill": {"encoders": 3}}, "'encoders'"),
    ],
)
def test_tensors_that_cannot_be_weights_are_errors(tmp_path: Path, content: dict, message: str) -> None:
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=rf"x\.pt: .*{message}"):
        read_checkpoint(tmp_path / "x.pt")


def test_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_lightning(tmp_path / "last.ckpt")
    before = path.read_bytes()
    written = []

    def full(self: writing.DirectFile, data: Any) -> int:
        written.append(data)
        if len(written) > 5:
            raise OSError(28, "No space left on device")
        return io.FileIO.write(self, data)

    monkeypatch.setattr(writing.DirectFile, "write", full)
    with pytest.raises(CheckpointError, match=r"last.ckpt: not saved .*No space left"):
        write_lightning(path, step=9)
    with pytest.raises(CheckpointError, match="No space left"):
        save_safetensors(make_model().state_dict(), tmp_path / "w.safetensors", {})
    with pytest.raises(CheckpointError, match="No space left"):
        write_native(tmp_path / "d")
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


SAVE_WITH_FULL_TMPDIR = """
import os, sys, tempfile
from pathlib import Path
from tests.integration.test_checkpoint_faults import make_model, write_lightning, write_native
from mmdistill.checkpoint import read_checkpoint, save_safetensors
from mmdistill.distill.strategy import VerifiedCheckpointIO
tempfile.tempdir = os.environ["TMPDIR"]  # Python would look for another one by itself
try:
    tempfile.TemporaryFile().write(b"0" * 100000)
except OSError as error:
    assert error.errno == 28, error
else:
    raise SystemExit("not full")
folder = Path(sys.argv[1])
write_lightning(folder / "a.ckpt")
VerifiedCheckpointIO().save_checkpoint({"state_dict": make_model().state_dict()}, folder / "b.ckpt")
write_native(folder / "c")
save_safetensors(make_model().state_dict(), folder / "d.safetensors", {})
for name in ("a.ckpt", "b.ckpt", "c", "d.safetensors"):
    read_checkpoint(folder / name)
"""


def test_full_tmpdir_does_not_matter(tmp_path: Path) -> None:
    """``$TMPDIR`` is a separate, full file system: temporary files are in the folder of their targets."""
    tmpdir, root = tmp_path / "tmpdir", Path(__file__).resolve().parents[2]
    tmpdir.mkdir()
    mount = ["unshare", "-rm", "sh", "-ec", 'mount -t tmpfs -o size=64k none "$TMPDIR"; "$@"', "sh"]
    environment = {**os.environ, "TMPDIR": str(tmpdir)}
    try:
        subprocess.run([*mount, "true"], check=True, capture_output=True, env=environment)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no file system can be mounted here: {error}")
    fill = 'head -c 100000 /dev/zero > "$TMPDIR/fill" 2> /dev/null || true; exec "$@"'
    command = [*mount, "sh", "-c", fill, "sh", sys.executable, "-c", SAVE_WITH_FULL_TMPDIR, str(tmp_path)]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
