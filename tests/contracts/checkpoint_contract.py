"""What every checkpoint format must do. Subclass `CheckpointFormatContract` for each format."""

from abc import ABC, abstractmethod
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmdistill.checkpoint import (
    CheckpointError,
    CheckpointFormat,
    CorruptCheckpointError,
    WeightMismatchError,
    detect_format,
    load_encoder,
    load_weights,
    read_checkpoint,
)
from mmdistill.checkpoint import write as writing
from mmdistill.models.videomae import Encoder, EncoderConfig

CONFIG = EncoderConfig(3, 4, 8, 12, 4, 2, 16, 1, 2, 8, 32)
META = {
    "kind": "weights",
    "modality": "rgb",
    "encoders": {"encoder": asdict(CONFIG)},
    "statistics": {"rgb": {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.1]}},
    "epoch": 3,
    "step": 40,
}


def make_encoder(seed: int) -> Encoder:
    """An encoder with random values in all tensors, so that an exchange of two tensors changes the result."""
    torch.manual_seed(seed)
    encoder = Encoder(CONFIG)
    for parameter in encoder.parameters():
        parameter.data.uniform_(-0.3, 0.3)
    return encoder.eval()


def state_of(encoder: Encoder) -> dict[str, Tensor]:
    """Its tensors under canonical names."""
    return {f"encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}


def assert_same_tensors(state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same names, dtypes and bits."""
    assert sorted(state) == sorted(expected)
    for name, tensor in expected.items():
        assert state[name].dtype == tensor.dtype, name
        assert torch.equal(state[name], tensor), name


class CheckpointFormatContract(ABC):
    """Tests of one format.

    Attributes:
        format: what `detect_format` returns.
        name: name of the file or directory that `write` creates.
        files: paths of all files that are read, relative to the checkpoint; ``""`` is the checkpoint itself.
    """

    format: CheckpointFormat
    name: str
    files: tuple[str, ...] = ("",)

    @abstractmethod
    def write(self, state: dict[str, Tensor], path: Path, meta: dict[str, Any]) -> None:
        """Write tensors (canonical names of an encoder) and metadata to `path`."""

    @pytest.fixture
    def encoder(self) -> Encoder:
        return make_encoder(0)

    @pytest.fixture
    def path(self, tmp_path: Path, encoder: Encoder) -> Path:
        self.write(state_of(encoder), tmp_path / self.name, META)
        return tmp_path / self.name

    def assert_rejected(self, path: Path, error: type[CheckpointError], match: str) -> None:
        """Loading raises `error`, and the module keeps its values."""
        module = make_encoder(1)
        before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        with pytest.raises(error, match=match):
            load_weights(module, path)
        assert_same_tensors(module.state_dict(), before)

    def test_format_is_detected(self, path: Path) -> None:
        assert detect_format(path) is self.format
        assert read_checkpoint(path).format is self.format

    def test_tensors_are_read_back_bit_by_bit(self, path: Path, encoder: Encoder) -> None:
        assert_same_tensors(read_checkpoint(path).state_dict, state_of(encoder))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_dtype_is_kept(self, tmp_path: Path, encoder: Encoder, dtype: torch.dtype) -> None:
        state = {name: tensor.to(dtype) for name, tensor in state_of(encoder).items()}
        self.write(state, tmp_path / self.name, META)
        assert_same_tensors(read_checkpoint(tmp_path / self.name).state_dict, state)

    def test_metadata_is_read_back(self, path: Path) -> None:
        meta = read_checkpoint(path).meta
        assert {key: meta[key] for key in META} == META

    def test_encoder_is_built_from_the_metadata(self, path: Path, encoder: Encoder) -> None:
        loaded = load_encoder(path).eval()
        clips = torch.randn(2, 3, 4, 8, 12)
        assert loaded.config == CONFIG
        assert torch.equal(loaded.embed(clips), encoder.embed(clips))

    def test_missing_tensor_is_an_error(self, tmp_path: Path, encoder: Encoder) -> None:
        state = state_of(encoder)
        del state["encoder.norm.weight"]
        self.write(state, tmp_path / self.name, META)
        self.assert_rejected(tmp_path / self.name, WeightMismatchError, r"1 missing: norm\.weight")

    def test_unexpected_tensor_is_an_error(self, tmp_path: Path, encoder: Encoder) -> None:
        state = {**state_of(encoder), "encoder.blocks.1.norm1.weight": torch.zeros(16)}
        self.write(state, tmp_path / self.name, META)
        self.assert_rejected(tmp_path / self.name, WeightMismatchError, r"1 unexpected: blocks\.1\.norm1\.weight")

    def test_other_shape_is_an_error(self, tmp_path: Path, encoder: Encoder) -> None:
        state = {**state_of(encoder), "encoder.norm.bias": torch.zeros(5)}
        self.write(state, tmp_path / self.name, META)
        shapes = r"norm\.bias \[5\] in the file, \[16\] in the module"
        self.assert_rejected(tmp_path / self.name, WeightMismatchError, shapes)

    @pytest.mark.parametrize("keep", [0.0, 0.01, 0.5, 0.99])
    def test_truncated_file_is_an_error_that_names_it(self, path: Path, keep: float) -> None:
        for name in self.files:
            file = path / name
            data = file.read_bytes()
            file.write_bytes(data[: int(len(data) * keep)])
            self.assert_rejected(path, CorruptCheckpointError, file.name)
            file.write_bytes(data)
        read_checkpoint(path)

    def test_flipped_bit_in_the_largest_file_is_an_error(self, path: Path) -> None:
        file = max((path / name for name in self.files), key=lambda file: file.stat().st_size)
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(bytes(data))
        self.assert_rejected(path, CorruptCheckpointError, rf"{file.name}.*corrupt: checksum")

    def test_deleted_checkpoint_is_an_error(self, path: Path) -> None:
        path.rename(path.with_name("moved"))
        self.assert_rejected(path, CheckpointError, "does not exist")

    def test_failed_write_keeps_the_previous_checkpoint(
        self, path: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(_: object) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(writing.DirectFile, "finish", fail)
            with pytest.raises(CheckpointError, match=r"not saved .*No space left"):
                self.write(state_of(make_encoder(2)), path, META)
        assert [p.name for p in path.parent.iterdir()] == [self.name]
        assert_same_tensors(read_checkpoint(path).state_dict, state_of(encoder))
