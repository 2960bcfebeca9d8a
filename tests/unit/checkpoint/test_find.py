"""find_checkpoints: what is below a folder, from any depth, fast, and ready to paste."""

import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from mmdistill.checkpoint import CheckpointError, find_checkpoints, save_torch
from mmdistill.checkpoint.convert import write_deepspeed
from mmdistill.checkpoint.find import select_checkpoints
from mmdistill.config.overrides import quote_overrides

SCRIPT = Path(__file__).resolve().parents[3] / "scripts" / "find_checkpoints.py"
STATE = {"encoder.norm.weight": torch.zeros(2)}


def native(path: Path, **meta: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_deepspeed(STATE, path, {"kind": "pretrain", **meta})
    return path


def lightning(path: Path, epoch: int) -> Path:
    save_torch({"epoch": epoch, "global_step": 10 * epoch, "pytorch-lightning_version": "2", "state_dict": STATE}, path)
    return path


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """Single runs, a multirun, a foreign directory, a truncated file, leftovers."""
    root = tmp_path / "output"
    day = root / "2026-01-09"
    native(day / "15-29-49/pretrain_rgb/checkpoints/epoch=09-loss=0.7000", epoch=9, loss=0.7, modality="rgb")
    native(day / "15-29-49/pretrain_rgb/checkpoints/epoch=49-loss=0.6095", epoch=49, loss=0.6095, modality="rgb")
    native(root / "multirun/2026-01-10/09-00-00/1/pretrain_flow/checkpoints/epoch=49-loss=0.9503", modality="flow")
    foreign = root / "2026-01-08/10-00-00/pretrain_skeleton/checkpoints/epoch=49-loss=0.0141/checkpoint"
    foreign.mkdir(parents=True)
    torch.save({"module": STATE}, foreign / "mp_rank_00_model_states.pt")
    distill = root / "2026-01-10/12-30-45/mmdistill_tennis/checkpoints"
    lightning(distill / "epoch=49-train_loss=0.0081.ckpt", 49)
    lightning(distill / "epoch=20-train_loss=0.0070.ckpt", 20)
    lightning(distill / "last.ckpt", 49)
    cut = lightning(distill / "epoch=48-train_loss=0.0001.ckpt", 48)
    cut.write_bytes(cut.read_bytes()[:-100])
    (distill / ".tmp-epoch=50").mkdir()
    return root


def test_everything_is_found(output: Path) -> None:
    found = find_checkpoints(output)
    groups = {}
    for info in found:
        groups.setdefault(info.modality, []).append(info)
    assert {k: len(v) for k, v in groups.items()} == {"distilled": 4, "flow": 1, "rgb": 2, "skeleton": 1}
    assert [i.epoch for i in groups["rgb"]] == [49, 9]  # newest first
    assert groups["rgb"][0].loss == 0.6095
    assert groups["skeleton"][0].format == "deepspeed"
    assert groups["skeleton"][0].loss == 0.0141
    last = next(i for i in groups["distilled"] if i.path.name == "last.ckpt")
    assert (last.epoch, last.loss, last.complete) == (49, None, True)
    broken = [i for i in found if not i.complete]
    assert [i.path.name for i in broken] == ["epoch=48-train_loss=0.0001.ckpt"]
    assert "truncated" in broken[0].problem


def test_from_any_depth_and_best(output: Path) -> None:
    run = output / "2026-01-10" / "12-30-45" / "mmdistill_tennis"
    assert len(find_checkpoints(run)) == len(find_checkpoints(run / "checkpoints")) == 4
    best = select_checkpoints(find_checkpoints(output), best=True)
    assert best["distilled"].path.name == "epoch=20-train_loss=0.0070.ckpt"  # the truncated one is no candidate
    single = output / "2026-01-09/15-29-49/pretrain_rgb/checkpoints/epoch=49-loss=0.6095"
    assert [i.path for i in find_checkpoints(single)] == [single]


def test_printed_block_and_command(output: Path) -> None:
    shown = subprocess.run([sys.executable, str(SCRIPT), str(output)], capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    block = shown.stdout[shown.stdout.index("ckpt_path: [") : shown.stdout.index("]\n") + 1]
    yaml = pytest.importorskip("yaml")
    paths = yaml.safe_load(block)["ckpt_path"]
    assert [Path(p).parent.parent.name for p in paths] == ["pretrain_rgb", "pretrain_flow", "pretrain_skeleton"]
    assert all(Path(p).is_dir() for p in paths)
    words = shlex.split(next(line for line in shown.stdout.splitlines() if line.startswith("python ")))
    assert words[:2] == ["python", "lit_main_mmdistill.py"]
    assert "--config-name=config_mmdistill_tennis" in words
    assert words[-3:-1] == ["train=False", "test=True"]
    from hydra.core.override_parser.overrides_parser import OverridesParser

    override = OverridesParser.create().parse_override(quote_overrides(words[-1:])[0])
    assert Path(str(override.value())).is_file()


def test_json_and_unreadable(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = [sys.executable, str(SCRIPT), str(output), "--json"]
    data = json.loads(subprocess.run(command, capture_output=True).stdout)
    assert len(data["checkpoints"]) == 8
    assert all(data["ckpt_path"])
    import os

    real, closed = os.scandir, str(output / "2026-01-08")

    def refuse(path: str):  # as root no folder is unreadable
        if path == closed:
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(os, "scandir", refuse)
    unreadable: list[str] = []
    assert len(find_checkpoints(output, unreadable=unreadable)) == 7
    assert unreadable == [f"{closed}: Permission denied"]


def test_links_are_followed_once(output: Path, tmp_path: Path) -> None:
    (output / "2026-01-09").rename(tmp_path / "elsewhere")
    (output / "2026-01-09").symlink_to(tmp_path / "elsewhere")
    (output / "again").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "up").symlink_to(output)
    (output / "2026-01-10" / "here").symlink_to(output / "2026-01-10")
    assert len(find_checkpoints(output)) == 8


def test_bad_root(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such directory"):
        find_checkpoints(tmp_path / "none")
    assert find_checkpoints(tmp_path) == []


def test_damaged_manifest_is_incomplete(tmp_path: Path) -> None:
    path = native(tmp_path / "epoch=01-loss=0.5000")
    (path / "manifest.json").write_text("{")
    (info,) = find_checkpoints(tmp_path)
    assert not info.complete
    assert "manifest.json is damaged" in info.problem
    path = native(tmp_path / "epoch=02-loss=0.4000")
    model = path / "checkpoint" / "mp_rank_00_model_states.pt"
    model.write_bytes(model.read_bytes()[:-1])
    assert not find_checkpoints(path)[0].complete


def test_ten_thousand_runs(tmp_path: Path) -> None:
    """Only the count is asserted; the time is printed (3 s is the promise, see docs)."""
    model = native(tmp_path / "one" / "x", epoch=1, modality="rgb")
    for i in range(500):
        folder = tmp_path / "many" / str(i % 20) / f"2026-01-{i % 28 + 1:02d}" / f"{i}" / "pretrain_rgb" / "checkpoints"
        folder.mkdir(parents=True)
        target = folder / "epoch=01-loss=0.5000"
        target.mkdir()
        for name in ("manifest.json", "meta.json", "latest"):
            (target / name).hardlink_to(model / name)
        (target / "checkpoint").mkdir()
        inner = "checkpoint/mp_rank_00_model_states.pt"
        (target / inner).hardlink_to(model / inner)
    start = time.perf_counter()
    found = find_checkpoints(tmp_path / "many")
    print(f"{len(found)} checkpoints in {time.perf_counter() - start:.2f} s")
    assert len(found) == 500
    assert all(info.complete for info in found)
