"""Both trainings, uninterrupted and in two parts: bit-identical clips, losses and weights.

resume_worker.py runs the real entrypoints on tiny data; the tests compare the files that they write.
"""

import csv
import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from mmdistill.checkpoint import directory_lock, inspect, latest_valid_checkpoint, load_torch, read_checkpoint
from mmdistill.checkpoint.convert import convert_checkpoint
from mmdistill.checkpoint.export import export_student
from mmdistill.checkpoint.formats.manifest import verify_manifest
from mmdistill.distributed.process import INTERRUPTED_EXIT_CODE
from tests.commands import run_python
from tests.configs import source_override
from tests.tiny_data import MODEL, make_tiny, overrides, write_teacher

pytestmark = pytest.mark.timeout(3000)  # the first test waits for all runs: minutes on a quiet machine of two cores
ROOT = Path(__file__).resolve().parents[2]
STAGES = [(2, 0), (2, 2), (2, 3), (1, 1)]  # processes, ZeRO stage; test_deepspeed_engine.py covers each combination
VALIDATION = ["trainer.check_val_every_n_epoch=1", "trainer.val_episodes=2", "data_module.q_sample=1"]
VALIDATION += ["data_module.n_way=2"]
DISTILL, NATIVE = "lit_main_mmdistill.py", "pretrain_main.py"


class Runs:
    """Runs of the worker, planned by name; afterwards their codes, logs and records."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.plan: list[dict[str, Any]] = []
        self.codes: dict[str, list[int]] = {}

    def add(self, name: str, script: str, arguments: list[str], *, world: int = 1, **more: Any) -> Path:
        """Plan a run in the folder ``name``, or ``into``; its folder."""
        folder = self.root / str(more.pop("into", name))
        more |= {"name": name, "script": script, "world": world, "record": str(self.root / f"{name}.run")}
        self.plan.append({**more, "arguments": [*arguments, f"hydra.run.dir={folder}"]})
        return folder

    def run(self) -> None:
        """All planned runs."""
        plan = self.root / "plan.json"
        plan.write_text(json.dumps({"runs": self.plan}))
        run_python("-m", "tests.integration.resume_worker", plan)
        codes = json.loads((self.root / "plan.json.codes").read_text())
        self.codes |= {run["name"]: code for run, code in zip(self.plan, codes, strict=True)}
        self.plan = []

    def log(self, name: str) -> str:
        """What the ranks printed."""
        return "".join(path.read_text() for path in sorted(self.root.glob(f"{name}.run.*.log")))

    def steps(self, name: str, rank: int = 0) -> list[Any]:
        """[epoch, clips, loss] of each batch."""
        return [json.loads(line) for line in (self.root / f"{name}.run.{rank}.jsonl").read_text().splitlines()]


def _plan_distill(runs: Runs, data: list[str]) -> None:
    paths = {m: write_teacher(runs.root / f"teacher_{m}", m, i) for i, m in enumerate(("rgb", "flow", "skeleton"))}
    given = f"trainer.ckpt_path=[{paths['rgb']},{paths['flow']},{paths['skeleton']}]"
    common = ["test=False", *data, "trainer.epochs=3", "trainer.save_ckpt_freq=1", "trainer.lr=0.01"]
    student_only = [*common, "trainer.save_teachers=false", "trainer.accumulate_grad_batches=2", "num_workers=1"]
    runs.add("student_only_full", DISTILL, [given, *student_only])
    runs.add(
        "student_only_first", DISTILL, [given, *student_only], into="student_only", stop_at=13
    )  # the 4th of 9 batches of epoch 1
    runs.add(
        "student_only_rest", DISTILL, [*student_only, "resume=auto"], into="student_only"
    )  # the teachers are those that the file names
    two = [given, *common, "strategy=ddp", "devices=2", "trainer.ema=0.9"]
    runs.add("ddp_full", DISTILL, two, world=2)
    runs.add("ddp_first", DISTILL, two, world=2, stop_at=6, stop_rank=1)  # the 2nd of 4 batches of epoch 1
    last = runs.root / "ddp_first" / "checkpoints" / "last.ckpt"
    runs.add("ddp_rest", DISTILL, [*two, f"resume={last}", "trainer.keep_last=1"], world=2)
    other = [given, *common, "trainer.ema=0.9", f"resume={last}"]  # other batches inside an epoch: refused
    runs.add("ddp_other", DISTILL, other)
    zero = [given, *common, "strategy=deepspeed_stage_2", "devices=2", "trainer.save_ckpt_freq=2", "trainer.epochs=2"]
    runs.add("zero_full", DISTILL, zero, world=2)
    runs.add("zero_first", DISTILL, zero, world=2, stop_at=6, into="zero")
    runs.add("zero_rest", DISTILL, [*zero, "resume=auto"], world=2, into="zero")
    phi_s = [given, *common, "trainer.standardize_targets=phi_s", "trainer.teacher_weights.flow=2"]
    phi_s += ["trainer.epochs=2"]
    runs.add("phi_s_one", DISTILL, [*phi_s, "batch_size=16"])
    two = [*phi_s, "strategy=ddp", "devices=2"]
    runs.add("phi_s_full", DISTILL, two, world=2)
    runs.add("phi_s_first", DISTILL, two, world=2, stop_at=2, into="phi_s")  # in the epoch of the statistics
    runs.add("phi_s_rest", DISTILL, [*two, "resume=auto"], world=2, into="phi_s")
    runs.add("end_first", DISTILL, [given, *common, "num_workers=1"], stop_at=9)  # an epoch's last batch
    runs.add("end_rest", DISTILL, [given, *common, "num_workers=1", "resume=auto"], into="end_first")
    runs.add("end_full", DISTILL, [given, *common])


def _plan_native(runs: Runs, data: list[str]) -> None:
    for world, stage in STAGES:
        common = ["modality=skeleton", *data, *MODEL, f"strategy=deepspeed_stage_{stage}", "num_workers=1", *VALIDATION]
        common += ["trainer.ema=0.9"] if (world, stage) in ((2, 0), (1, 1)) else []
        name = f"native{world}{stage}"
        runs.add(f"{name}_full", NATIVE, common, world=world)
        batches = {1: 9, 2: 4}[world]
        runs.add(f"{name}_first", NATIVE, common, world=world, stop_at=batches + 2, stop_rank=world - 1, into=name)
        if (world, stage) == (2, 2):  # one process, another stage and the same clips per step
            one = [*common, "strategy=deepspeed_stage_3", "batch_size=16"]
            runs.add("elastic", NATIVE, one, resume_newest=str(runs.root / name))
        runs.add(f"{name}_rest", NATIVE, [*common, "resume=auto"], world=world, into=name)


def _plan_joint(runs: Runs) -> None:
    """A source, with two ranks; stopped in the second of three batches of the second epoch."""
    target, source = (overrides(make_tiny(runs.root / name, per_class=1)) for name in ("target", "source"))
    common = ["modality=flow", *target, source_override(*source, "data_module.name=labeled"), *MODEL, "batch_size=2"]
    common += ["strategy=deepspeed_stage_2", "trainer.classifier_dropout=0.5", "trainer.ema=0.9"]
    runs.add("joint_full", NATIVE, common, world=2)
    runs.add("joint_first", NATIVE, common, world=2, stop_at=5, stop_rank=1, into="joint")
    runs.add("joint_rest", NATIVE, [*common, "resume=auto"], world=2, into="joint")


def _plan_folders(runs: Runs, data: list[str]) -> None:
    """Rows 20 and 21 of the fault matrix: what is kept, used folders, locks; and data with a hole."""
    common = ["modality=skeleton", *data, *MODEL, "trainer.save_ckpt_freq=1"]
    kept = runs.add("kept", NATIVE, [*common, "trainer.epochs=5", "trainer.keep_last=2", "trainer.save_top_k=1"])
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    (kept / "checkpoints").mkdir(parents=True)
    stale = {"pid": int(ended.stdout), "host": socket.gethostname(), "id": "x"}
    (kept / "checkpoints" / ".lock").write_text(json.dumps(stale))
    runs.add("used", NATIVE, common, into="kept", world=2)
    runs.add("locked", NATIVE, common, into="in_use", world=2)
    given = ",".join(str(runs.root / f"teacher_{m}") for m in ("rgb", "flow", "skeleton"))
    distil = ["test=False", f"trainer.ckpt_path=[{given}]", *data]
    runs.add("used_distill", DISTILL, distil, into="student_only_full")
    runs.add("locked_distill", DISTILL, distil, into="in_use")
    hole = make_tiny(runs.root / "hole")
    (hole / "frames" / "rally_CC_0" / "000005.jpg").unlink()  # of one clip, frames 3 to 6
    broken = ["modality=rgb", *overrides(hole), *MODEL, "trainer.epochs=1", "batch_size=4"]
    runs.add("repeat", NATIVE, [*broken, "data_module.on_missing=repeat", "num_workers=1"], world=2)
    skip = [*distil, *overrides(hole), "trainer.epochs=1", "data_module.on_missing=skip"]
    runs.add("skip", DISTILL, skip)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    done = Runs(tmp_path_factory.mktemp("resume"))
    data = overrides(make_tiny(done.root / "data"))
    _plan_distill(done, data)
    _plan_native(done, data)
    _plan_joint(done)
    _plan_folders(done, data)
    with directory_lock(done.root / "in_use" / "checkpoints"):  # this test is another job in that folder
        done.run()
    return done


def _same_tensors(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def _rows(path: Path) -> list[dict[str, str]]:
    timed = ("clips_per_s", "data_wait_percent", "mfu_percent")
    with path.open(newline="") as file:
        return [{k: v for k, v in row.items() if k not in timed} for row in csv.DictReader(file)]


def _same_moments(a: Path, b: Path) -> bool:
    states = [load_torch(p)["optimizer_states"][0]["state"] for p in (a, b)]
    return states[0].keys() == states[1].keys() and all(
        torch.equal(states[0][n][key], states[1][n][key]) for n in states[0] for key in ("exp_avg", "exp_avg_sq")
    )


@pytest.mark.parametrize(
    ("name", "rest", "folder", "world"),
    [
        ("student_only", "student_only_rest", "student_only", 1),
        ("ddp", "ddp_rest", "ddp_rest", 2),
        ("zero", "zero_rest", "zero", 2),
        ("phi_s", "phi_s_rest", "phi_s", 2),
        ("end", "end_rest", "end_first", 1),
    ],
)
def test_distillation_in_two_parts(runs: Runs, name: str, rest: str, folder: str, world: int) -> None:
    """Stopped inside an epoch (accumulated gradients, one worker, student-only; ddp; ZeRO 2) and in its last step."""
    assert runs.codes[f"{name}_full"] == [0] * world, runs.log(f"{name}_full")
    assert runs.codes[f"{name}_first"] == [INTERRUPTED_EXIT_CODE] * world, runs.log(f"{name}_first")
    assert runs.codes[rest] == [0] * world, runs.log(rest)
    for rank in range(world):
        parts = runs.steps(f"{name}_first", rank) + runs.steps(rest, rank)
        assert parts == runs.steps(f"{name}_full", rank)
    a, b = (runs.root / f / "checkpoints" / "last.ckpt" for f in (f"{name}_full", folder))
    assert _same_tensors(load_torch(a)["state_dict"], load_torch(b)["state_dict"])
    assert _same_moments(a, b)
    assert load_torch(a)["global_step"] == load_torch(b)["global_step"]
    assert "not resumable" not in runs.log(rest)


@pytest.mark.parametrize(
    ("name", "folder"), [("student_only", "student_only"), ("ddp", "ddp_rest"), ("end", "end_first")]
)
def test_epoch_means_equal_those_of_an_uninterrupted_run(runs: Runs, name: str, folder: str) -> None:
    """Also of the epoch that was interrupted; the earlier rows stay, and come over into a new folder."""
    full, parts = (_rows(runs.root / f / "metrics.csv") for f in (f"{name}_full", folder))
    assert len(full) == 3
    assert parts == full
    names = [sorted(p.name for p in (runs.root / f / "checkpoints").glob("epoch=*")) for f in (f"{name}_full", folder)]
    if name != "ddp":  # where only the newest and the best of the new folder were kept
        assert names[0] == names[1]


def test_standardized_training_of_two_ranks_equals_one(runs: Runs) -> None:
    one, two = (
        load_torch(runs.root / f"phi_s_{n}" / "checkpoints" / "last.ckpt")["state_dict"] for n in ("one", "full")
    )
    names = [name for name in one if name.startswith("target_statistics.")]
    assert len(names) == 12  # count, mean, scatter and rotation of three teachers
    for name in names:
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=1e-4)
    losses = [[float.fromhex(loss) for *_, loss in runs.steps(name)] for name in ("phi_s_one", "phi_s_full")]
    other_half = [float.fromhex(loss) for *_, loss in runs.steps("phi_s_full", 1)]
    means = [(a + b) / 2 for a, b in zip(losses[1], other_half, strict=True)]
    assert losses[0] == pytest.approx(means, rel=1e-3)


def test_student_only_checkpoints_reference_their_teachers(runs: Runs) -> None:
    path = runs.root / "student_only" / "checkpoints" / "last.ckpt"
    checkpoint = read_checkpoint(path)
    assert {k.split(".")[0] for k in checkpoint.state_dict} == {"student_rgb", "cmt"}
    assert checkpoint.meta["teachers"]["teacher_flow"]["path"] == str(runs.root / "teacher_flow")
    report = inspect.inspect_checkpoint(path)
    assert report["complete"]
    assert any("teacher_flow" in line and "sha256" in line for line in report["missing"])
    assert set(report["components"]) == {"student_rgb", "cmt"}


def test_student_only_checkpoints_convert_and_export(runs: Runs, tmp_path: Path) -> None:
    path = runs.root / "student_only" / "checkpoints" / "last.ckpt"
    back = convert_checkpoint(convert_checkpoint(path, tmp_path / "a.safetensors"), tmp_path / "b.ckpt")
    assert _same_tensors(read_checkpoint(path).state_dict, read_checkpoint(back).state_dict)
    assert read_checkpoint(back).meta["teachers"] == read_checkpoint(path).meta["teachers"]
    export_student(path, tmp_path / "s.safetensors", to="safetensors")
    own = read_checkpoint(path).state_dict
    own = {k.removeprefix("student_rgb."): v for k, v in own.items() if k.startswith("student_rgb.")}
    assert _same_tensors(own, read_checkpoint(tmp_path / "s.safetensors").state_dict)


def test_another_batch_order_inside_an_epoch_is_rejected(runs: Runs) -> None:
    assert runs.codes["ddp_other"] == [2]
    assert "in the middle of epoch 1" in runs.log("ddp_other")
    assert "global_batch 16 / 8" in runs.log("ddp_other")


def test_retention_continues_in_a_new_folder(runs: Runs) -> None:
    """keep_last=1 and no top k: the newest and the best of the whole training stay, the source is untouched."""
    saved = sorted(p.name for p in (runs.root / "ddp_rest" / "checkpoints").glob("epoch=*"))
    losses = load_torch(runs.root / "ddp_rest" / "checkpoints" / "last.ckpt")["callbacks"]["EpochCheckpoints"]["losses"]
    assert [Path(p).name.split("-")[0] for p in losses] == ["epoch=00", "epoch=01", "epoch=02"]
    best = min(losses, key=lambda p: losses[p])
    assert set(saved) == {Path(list(losses)[-1]).name} | ({Path(best).name} if "ddp_rest" in best else set())
    assert (runs.root / "ddp_first" / "checkpoints" / "last.ckpt").is_file()
    assert Path(next(iter(losses))).is_file()
    assert f"best checkpoint: {best}" in runs.log("ddp_rest")


@pytest.mark.parametrize(("world", "stage"), STAGES)
def test_pretraining_in_two_parts(runs: Runs, world: int, stage: int) -> None:
    name = f"native{world}{stage}"
    assert runs.codes[f"{name}_full"] == [0] * world, runs.log(f"{name}_full")
    assert runs.codes[f"{name}_first"] == [INTERRUPTED_EXIT_CODE] * world, runs.log(f"{name}_first")
    assert runs.codes[f"{name}_rest"] == [0] * world, runs.log(f"{name}_rest")
    assert len(list((runs.root / name / "checkpoints").glob("*-step=*"))) == 1
    for rank in range(world):
        parts = runs.steps(f"{name}_first", rank) + runs.steps(f"{name}_rest", rank)
        assert parts == runs.steps(f"{name}_full", rank)
    full, parts = (latest_valid_checkpoint(runs.root / f / "checkpoints") for f in (f"{name}_full", name))
    assert full is not None
    assert parts is not None
    assert full.name == parts.name
    assert _same_tensors(read_checkpoint(full).state_dict, read_checkpoint(parts).state_dict)
    assert (verify_manifest(parts) or {})["stage"] == stage
    assert _rows(runs.root / f"{name}_full" / "metrics.csv") == _rows(runs.root / name / "metrics.csv")


def test_joint_pretraining_in_two_parts(runs: Runs) -> None:
    for name, code in (("full", 0), ("first", INTERRUPTED_EXIT_CODE), ("rest", 0)):
        assert runs.codes[f"joint_{name}"] == [code, code], runs.log(f"joint_{name}")
    both = [runs.steps("joint_full", rank) for rank in range(2)]
    assert both == [runs.steps("joint_first", rank) + runs.steps("joint_rest", rank) for rank in range(2)]
    full, parts = (latest_valid_checkpoint(runs.root / f / "checkpoints") for f in ("joint_full", "joint"))
    assert full is not None
    assert parts is not None
    assert _same_tensors(read_checkpoint(full).state_dict, read_checkpoint(parts).state_dict)
    assert read_checkpoint(parts).meta["source"]["dataset"] == "labeled"
    assert _rows(runs.root / "joint_full" / "metrics.csv") == _rows(runs.root / "joint" / "metrics.csv")


def test_pretraining_continues_inside_an_epoch_with_other_processes_and_another_stage(runs: Runs) -> None:
    """From 2 processes at stage 2 to 1 at stage 3: the same clips per step, and the same losses to 1e-5."""
    assert runs.codes["elastic"] == [0], runs.log("elastic")
    both = list(zip(*(runs.steps("native22_full", rank) for rank in range(2)), strict=True))
    first, rest = runs.steps("native22_first"), runs.steps("elastic")
    assert len(first) + len(rest) == len(both)
    for (one, other), (epoch, clips, loss) in zip(both[len(first) :], rest, strict=True):
        assert epoch == one[0]
        assert sorted(clips) == sorted(one[1] + other[1])
        expected = (float.fromhex(one[2]) + float.fromhex(other[2])) / 2
        assert float.fromhex(loss) == pytest.approx(expected, abs=1e-5, rel=0)


def test_retention_keeps_the_newest_and_the_best(runs: Runs) -> None:
    assert runs.codes["kept"] == [0], runs.log("kept")
    losses = [float(row["loss"]) for row in _rows(runs.root / "kept" / "metrics.csv")]
    saved = sorted(int(p.name[6:8]) for p in (runs.root / "kept" / "checkpoints").glob("epoch=*"))
    assert len(losses) == 5
    assert saved == sorted({3, 4, losses.index(min(losses))})
    assert "removed the lock of process" in runs.log("kept")
    assert not (runs.root / "kept" / "checkpoints" / ".lock").exists()


@pytest.mark.parametrize(("name", "world"), [("used", 2), ("used_distill", 1)])
def test_new_run_in_a_used_folder_is_rejected(runs: Runs, name: str, world: int) -> None:
    assert runs.codes[name] == [2] * world, runs.log(name)
    assert "contains checkpoints of an earlier run" in runs.log(name)
    assert "resume=auto" in runs.log(name)


@pytest.mark.parametrize(("name", "world"), [("locked", 2), ("locked_distill", 1)])
def test_second_job_in_a_folder_is_rejected(runs: Runs, name: str, world: int) -> None:
    assert runs.codes[name] == [2] * world, runs.log(name)
    assert f"process {os.getpid()} on {socket.gethostname()} writes checkpoints to this folder" in runs.log(name)
    assert list((runs.root / "in_use" / "checkpoints").iterdir()) == []


def test_log_reports_missing_data(runs: Runs) -> None:
    assert runs.codes["repeat"] == [0, 0], runs.log("repeat")
    report = json.loads((runs.root / "repeat" / "data_report.json").read_text())
    assert report["index"]["clips"] == 72
    assert report["modalities"] == {"rgb": {"clips_skipped": 0, "frames_repeated": 1}}  # by one rank's worker
    assert report["missing"]["frames_repeated"] == {"rgb": {"rally_CC_0": 1}}
    assert "data: 72 clips of 24 rallies" in runs.log("repeat")
    assert "missing data (on_missing=repeat): rgb: 1 frame repeated" in runs.log("repeat")
    assert runs.codes["skip"] == [0], runs.log("skip")
    report = json.loads((runs.root / "skip" / "data_report.json").read_text())
    assert report["modalities"]["rgb"]["clips_skipped"] == 1
    assert report["modalities"]["flow"]["clips_skipped"] == 0
    assert report["missing"]["clips"] == 71
    assert (
        runs.log("skip").count("missing data (on_missing=skip): rgb: 1 clip skipped") == 2
    )  # at the start and at the end
