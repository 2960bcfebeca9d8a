import json
import os
from pathlib import Path

import pytest

from mmdistill.checkpoint import CheckpointError, find_checkpoints, save_torch
from mmdistill.checkpoint.find import select_checkpoints
from mmdistill.checkpoint.formats.safetensors_file import save_safetensors
from mmdistill.fewshot.features import save_features
from tests.checkpoint_files import STATE, write_distilled, write_lightning, write_native, write_output
from tests.commands import ROOT
from tests.synthetic_features import make_features


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return write_output(tmp_path / "output")


def test_every_format_is_found_with_epoch_and_loss(output: Path) -> None:
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


def test_search_starts_at_any_level_and_selects_the_best(output: Path) -> None:
    run = output / "2026-01-10" / "12-30-45" / "mmdistill_tennis"
    assert len(find_checkpoints(run)) == len(find_checkpoints(run / "checkpoints")) == 4
    best = select_checkpoints(find_checkpoints(output), best=True)
    assert best["distilled"].path.name == "epoch=20-train_loss=0.0070.ckpt"  # the truncated one is no candidate
    single = output / "2026-01-09/15-29-49/pretrain_rgb/checkpoints/epoch=49-loss=0.6095"
    assert [i.path for i in find_checkpoints(single)] == [single]


def test_last_is_newer_than_the_checkpoint_that_it_links_to(tmp_path: Path) -> None:
    folder = tmp_path / "mmdistill/checkpoints"
    folder.mkdir(parents=True)
    path = write_lightning(folder / "epoch=03-train_loss=0.2500.ckpt", 3)
    (folder / "last.ckpt").hardlink_to(path)
    assert [(i.path.name, i.epoch, i.loss) for i in find_checkpoints(tmp_path)] == [
        ("last.ckpt", 3, 0.25),
        (path.name, 3, 0.25),
    ]


def test_complete_epochs_are_preferred(tmp_path: Path) -> None:
    stopped = write_native(tmp_path / "pretrain_rgb/checkpoints/epoch=02-loss=0.1000-step=9", modality="rgb")
    for best in (False, True):
        assert select_checkpoints(find_checkpoints(tmp_path), best=best)["rgb"].path == stopped
    write_native(tmp_path / "pretrain_rgb/checkpoints/epoch=01-loss=0.5000", modality="rgb")
    for best in (False, True):
        assert select_checkpoints(find_checkpoints(tmp_path), best=best)["rgb"].epoch == 1


def test_unreadable_folders_are_listed(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, closed = os.scandir, str(output / "2026-01-08")

    def raise_permission_error(path: str):  # as root no folder is unreadable
        if path == closed:
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(os, "scandir", raise_permission_error)
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


def test_missing_root_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such directory"):
        find_checkpoints(tmp_path / "none")
    assert find_checkpoints(tmp_path) == []


def test_damaged_manifest_is_incomplete(tmp_path: Path) -> None:
    path = write_native(tmp_path / "epoch=01-loss=0.5000")
    (path / "manifest.json").write_text("{")
    (info,) = find_checkpoints(tmp_path)
    assert not info.complete
    assert "manifest.json is damaged" in info.problem
    path = write_native(tmp_path / "epoch=02-loss=0.4000")
    model = path / "checkpoint" / "mp_rank_00_model_states.pt"
    model.write_bytes(model.read_bytes()[:-1])
    assert not find_checkpoints(path)[0].complete


def test_many_runs(tmp_path: Path) -> None:
    model = write_native(tmp_path / "one" / "x", epoch=1, modality="rgb")
    inner = "checkpoint/mp_rank_00_model_states.pt"
    for i in range(60):
        run = tmp_path / "many" / str(i % 20) / f"2026-01-{i % 28 + 1:02d}" / f"{i}" / "pretrain_rgb" / "checkpoints"
        target = run / "epoch=01-loss=0.5000"
        (target / "checkpoint").mkdir(parents=True)
        for name in ("manifest.json", "meta.json", "latest", inner):
            (target / name).hardlink_to(model / name)
    found = find_checkpoints(tmp_path / "many")
    assert len(found) == 60
    assert all(info.complete for info in found)


def test_feature_files_are_no_checkpoints(tmp_path: Path) -> None:
    """An evaluation writes its feature cache below output/, where users search for checkpoints."""
    save_features(make_features("student_rgb", 1.0), tmp_path / "output" / "features" / "f.safetensors")
    assert find_checkpoints(tmp_path) == []


@pytest.mark.parametrize(
    ("content", "group"),
    [
        ('[{"config": {"train": true}}]', "distilled"),
        ('[{"config": {"modality": "flow"}}]', "flow"),
        ('[{"config": {"modality": "other"}}]', "unknown"),
        ("[]", "unknown"),
        ("{", "unknown"),
        (None, "unknown"),
    ],
)
def test_run_with_a_name_that_does_not_tell_its_kind(tmp_path: Path, content: str | None, group: str) -> None:
    (tmp_path / "mine" / "checkpoints").mkdir(parents=True)
    write_lightning(tmp_path / "mine" / "checkpoints" / "last.ckpt", 3)
    if content is not None:
        (tmp_path / "mine" / "run.json").write_text(content)
    assert [info.modality for info in find_checkpoints(tmp_path)] == [group]


@pytest.mark.parametrize("has_record", [True, False])
def test_copied_run_is_ordered_by_epoch_and_start_not_by_modification_time(tmp_path: Path, has_record: bool) -> None:
    """A copy with new times of modification, in any order of the files."""
    for run, hour, epochs in (("old", 8, (7, 15)), ("copy", 9, (11, 3))):
        for number, epoch in enumerate(epochs):
            folder = tmp_path / f"{run}/checkpoints"
            path = write_native(folder / f"epoch={epoch:02d}-loss=0.5000", epoch=epoch, loss=0.5, modality="rgb")
            time = 2000 + number - 100 * (run == "old" and not has_record)
            os.utime(path / "manifest.json", (time, time))
        if has_record:
            (tmp_path / run / "run.json").write_text(json.dumps([{"started": f"2026-01-01T0{hour}:00:00+00:00"}]))
    found = find_checkpoints(tmp_path)
    assert [(i.path.parent.parent.name, i.epoch) for i in found] == [("copy", 11), ("copy", 3), ("old", 15), ("old", 7)]


def test_content_decides_the_group_not_the_name_of_the_folder(tmp_path: Path) -> None:
    """A distillation in a folder named as a pretraining, and pretrainings in folders named as distillations."""
    (tmp_path / "rgb_run").mkdir()
    write_distilled(tmp_path / "rgb_run/last.ckpt")
    (tmp_path / "distill_2/checkpoints").mkdir(parents=True)
    for meta in ({"kind": "pretrain", "modality": "flow"}, {"flow": 1, "kind": "pretrain", "modality": "flow"}):
        path = tmp_path / f"distill_2/checkpoints/{len(meta)}"
        save_torch({"model": STATE, "mmdistill": meta}, path.with_suffix(".pt"))
        save_safetensors(STATE, path.with_suffix(".safetensors"), {**meta, "epoch": 4})
    found = {info.path.name: (info.modality, info.epoch) for info in find_checkpoints(tmp_path)}
    assert found == {
        "last.ckpt": ("distilled", 3),
        "2.pt": ("flow", None),
        "3.pt": ("flow", None),
        "2.safetensors": ("flow", 4),
        "3.safetensors": ("flow", 4),
    }


@pytest.mark.parametrize("name", ["student_rgb/last.ckpt", "model.ckpt", "abc/last.ckpt", "abc/checkpoints/copy.pt"])
def test_renamed_copy_of_a_student_is_a_student_with_its_loss(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    write_distilled(tmp_path / name, more={"loss": 0.25})
    (info,) = find_checkpoints(tmp_path)
    assert (info.modality, info.epoch, info.loss) == ("distilled", 3, 0.25)
    assert list(select_checkpoints([info])) == ["distilled"]


def test_exported_student_is_not_a_teacher(tmp_path: Path) -> None:
    for component, group in (("student_rgb", "distilled"), ("teacher_flow", "flow")):
        meta = {"kind": "weights", "component": component, "modality": component.rpartition("_")[2]}
        save_safetensors(STATE, tmp_path / "rgb.safetensors", meta)
        assert [info.modality for info in find_checkpoints(tmp_path)] == [group]


def test_shards_are_one_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "videomae_rgb"
    folder.mkdir()
    names = [f"model-{i:05d}-of-00002.safetensors" for i in (1, 2)]
    for name in names:
        save_safetensors({f"{name}.weight": STATE["encoder.norm.weight"]}, folder / name, {})
    index = {"weight_map": {f"{name}.weight": name for name in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text("{}")
    (info,) = find_checkpoints(tmp_path)
    assert (info.path, info.format, info.complete) == (folder, "safetensors", True)
    assert info.size == sum((folder / name).stat().st_size for name in names)
    (folder / names[1]).unlink()
    (info,) = find_checkpoints(tmp_path)
    assert info.problem == f"{names[1]} is missing"
    (folder / "model.safetensors.index.json").write_text("[]")
    (info,) = find_checkpoints(tmp_path)
    assert info.problem == "model.safetensors.index.json is damaged"


def test_shards_of_the_corpus_are_one_checkpoint() -> None:
    root = ROOT.parent / "shared/data/world/checkpoints"
    if not root.is_dir():
        pytest.skip("no ../shared")
    found = {info.path.name: info for info in find_checkpoints(root)}
    for name in ("videomae_shards", "videomae_finetuned", "videomae_4_heads"):
        assert found[name].complete
    assert not [name for name in found if "-of-" in name]
