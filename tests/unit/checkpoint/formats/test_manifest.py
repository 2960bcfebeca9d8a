import json
import shutil
import zipfile
from pathlib import Path

import pytest
import torch

from mmdistill.checkpoint.convert import write_deepspeed
from mmdistill.checkpoint.errors import CorruptCheckpointError
from mmdistill.checkpoint.formats.manifest import manifest_bytes, manifest_entry, read_manifest, verify_manifest
from mmdistill.checkpoint.formats.torch_zip import directory_digest, sha256_file

MODEL = "checkpoint/mp_rank_00_model_states.pt"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_deepspeed({"encoder.norm.weight": torch.arange(50.0)}, tmp_path / "d", {"kind": "pretrain", "step": 1})
    return tmp_path / "d"


def test_entries_contain_size_and_digest(root: Path) -> None:
    archive, small = manifest_entry(root / MODEL), manifest_entry(root / "latest")
    size = (root / MODEL).stat().st_size
    assert archive == {"bytes": size, "zip_directory_sha256": directory_digest(root / MODEL)}
    assert small == {"bytes": 10, "sha256": sha256_file(root / "latest")}


def test_manifest_is_read_back_with_its_summary(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes(manifest_bytes({}, step=7, loss=0.5))
    content = read_manifest(tmp_path)
    assert content is not None
    assert (content["step"], content["loss"], content["files"]) == (7, 0.5, {})


def test_directory_without_manifest_gives_none(tmp_path: Path) -> None:
    assert read_manifest(tmp_path) is None
    assert verify_manifest(tmp_path) is None


def test_changed_manifest_is_an_error(root: Path) -> None:
    content = json.loads((root / "manifest.json").read_text())
    (root / "manifest.json").write_text(json.dumps({**content, "step": 2}))
    with pytest.raises(CorruptCheckpointError, match=r"manifest\.json: corrupt: checksum"):
        verify_manifest(root)


def test_missing_changed_and_additional_files_are_errors(root: Path) -> None:
    data = (root / "latest").read_bytes()
    (root / "latest").unlink()
    with pytest.raises(CorruptCheckpointError, match="latest: missing, but listed in the manifest"):
        verify_manifest(root)
    (root / "latest").write_bytes(data + b"x")
    with pytest.raises(CorruptCheckpointError, match="latest: corrupt: 11 bytes on disk, 10 expected"):
        verify_manifest(root)
    (root / "latest").write_bytes(b"Checkpoint")
    with pytest.raises(CorruptCheckpointError, match="latest: corrupt: checksum does not match its manifest"):
        verify_manifest(root)
    (root / "latest").write_bytes(data)
    shutil.copy(root / MODEL, root / "checkpoint" / "zero_pp_rank_1_mp_rank_00_optim_states.pt")
    with pytest.raises(CorruptCheckpointError, match="not in the manifest: a mix of two saves"):
        verify_manifest(root)


def test_ranks_divide_the_payload(root: Path) -> None:
    data = bytearray((root / MODEL).read_bytes())
    data[data.index(torch.arange(50.0).numpy().tobytes()) + 5] ^= 1
    (root / MODEL).write_bytes(bytes(data))
    found = []
    for rank in range(2):
        try:
            verify_manifest(root, rank=rank, world_size=2)
        except CorruptCheckpointError:
            found.append(rank)
    assert len(found) == 1
    assert verify_manifest(root, payload=False) is not None
    with pytest.raises(CorruptCheckpointError):
        verify_manifest(root, full=True, rank=1 - found[0], world_size=2)


def test_sha256_of_older_versions_is_compared(root: Path) -> None:
    content = read_manifest(root)
    assert content is not None
    content["files"][MODEL]["sha256"] = sha256_file(root / MODEL)
    summary = {k: v for k, v in content.items() if k not in ("files", "version", "manifest_sha256")}
    (root / "manifest.json").write_bytes(manifest_bytes(content["files"], **summary))
    assert verify_manifest(root, full=True) is not None
    with zipfile.ZipFile(root / MODEL) as archive:
        offset = archive.infolist()[0].header_offset + 10  # the time in the header, which no CRC covers
    data = bytearray((root / MODEL).read_bytes())
    data[offset] ^= 1
    (root / MODEL).write_bytes(bytes(data))
    with pytest.raises(CorruptCheckpointError, match="does not match its manifest"):
        verify_manifest(root, full=True)
