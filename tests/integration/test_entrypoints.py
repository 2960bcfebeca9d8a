"""The entrypoints as processes on a tiny dataset: train, resume, distill, evaluate."""

import json
from pathlib import Path

import pytest
import torch

from mmdistill.checkpoint import load_torch, read_checkpoint
from tests.commands import run_python
from tests.tiny_data import EVAL, MODEL, make_tiny, overrides

ROOT = Path(__file__).resolve().parents[2]


def _newest(run: Path) -> Path:
    return max((run / "checkpoints").glob("epoch=*"), key=lambda p: p.stat().st_mtime)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return overrides(make_tiny(tmp_path_factory.mktemp("tiny") / "data"))


@pytest.fixture(scope="module")
def teachers(data: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One pretraining per modality, as a multirun; the flow teacher is wider."""
    root = tmp_path_factory.mktemp("pretrain")
    arguments = ["-m", "modality=rgb,flow,skeleton", *data, *MODEL, f"hydra.sweep.dir={root}"]
    run_python("pretrain_main.py", *arguments)
    runs = {m: next(root.glob(f"pretrain_{m}_*")) for m in ("rgb", "flow", "skeleton")}
    wide = root / "wide_flow"
    run_python("pretrain_main.py", "modality=flow", *data, *MODEL, "model.dim=48", f"hydra.run.dir={wide}")
    return {"rgb": _newest(runs["rgb"]), "flow": _newest(wide), "skeleton": _newest(runs["skeleton"])}


@pytest.fixture(scope="module")
def student(data: list[str], teachers: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("distill")
    run_python(
        "lit_main_mmdistill.py",
        _teachers(teachers),
        "test=False",
        *data,
        "trainer.epochs=4",
        "trainer.save_ckpt_freq=2",
        f"hydra.run.dir={run}",
    )
    return run / "checkpoints"


def _teachers(paths: dict[str, Path]) -> str:
    """A list with unquoted ``=``, as in the user's text."""
    return f"trainer.ckpt_path=[{paths['rgb']},{paths['flow']},{paths['skeleton']}]"


def test_pretraining_writes_the_layout_of_the_user_text(teachers: dict[str, Path]) -> None:
    for modality, path in teachers.items():
        assert path.name.startswith("epoch=01-loss=")
        states = torch.load(path / "checkpoint" / "mp_rank_00_model_states.pt", weights_only=True, map_location="cpu")
        assert {"encoder.patch_embed.proj.weight", "encoder.blocks.0.norm1.weight", "mask_token"} <= set(
            states["module"]
        )
        checkpoint = read_checkpoint(path)
        assert checkpoint.meta["modality"] == modality
        assert checkpoint.meta["statistics"][modality]["std"]
        metrics = (path.parents[1] / "metrics.csv").read_text().splitlines()
        assert "constant_baseline_loss" in metrics[0]
        assert len(metrics) == 3


def test_resumed_pretraining_is_bit_identical(data: list[str], tmp_path: Path) -> None:
    """From the end of an epoch, in another folder; test_resume.py stops within an epoch."""
    common = ["modality=skeleton", *data, *MODEL, "trainer.epochs=3", "trainer.save_ckpt_freq=1"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_python("pretrain_main.py", *common, f"hydra.run.dir={whole}")
    first = next((whole / "checkpoints").glob("epoch=00-*"))
    run_python("pretrain_main.py", *common, f"resume={first}", f"hydra.run.dir={parts}")
    a = torch.load(_newest(whole) / "checkpoint" / "mp_rank_00_model_states.pt", weights_only=True)["module"]
    b = torch.load(_newest(parts) / "checkpoint" / "mp_rank_00_model_states.pt", weights_only=True)["module"]
    assert _newest(whole).name == _newest(parts).name  # the losses of the last epoch, to four digits
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert (whole / "metrics.csv").read_text().splitlines()[-1].split(",")[:4] == (
        (parts / "metrics.csv").read_text().splitlines()[-1].split(",")[:4]
    )


def test_distilled_file_has_the_contents_of_the_user_text(student: Path) -> None:
    names = sorted(p.name for p in student.glob("*.ckpt"))
    assert [n.split("=")[:2] for n in names[:2]] == [["epoch", "01-train_loss"], ["epoch", "03-train_loss"]]
    assert names[2:] == ["last.ckpt"]
    content = load_torch(student / "last.ckpt")
    assert {"state_dict", "epoch", "global_step", "lr_schedulers", "optimizer_states"} <= set(content)
    assert content["epoch"] == 3
    for key in (
        "student_rgb.encoder.patch_embed.proj.weight",
        "teacher_flow.encoder.blocks.0.norm1.weight",
        "cmt.mlp_to_rgb.0.weight",
    ):
        assert key in content["state_dict"]
    assert content["state_dict"]["cmt.mlp_to_flow.2.weight"].shape == (48, 32)


def test_teachers_are_unchanged_and_the_student_is_not(student: Path, teachers: dict[str, Path]) -> None:
    state = read_checkpoint(student / "last.ckpt").state_dict
    for modality, path in teachers.items():
        for name, tensor in read_checkpoint(path).state_dict.items():
            if name.startswith("encoder."):
                assert torch.equal(state[f"teacher_{modality}.{name}"], tensor)
    assert not torch.equal(state["student_rgb.encoder.norm.weight"], state["teacher_rgb.encoder.norm.weight"])


def test_resumed_distillation_is_bit_identical(
    data: list[str], teachers: dict[str, Path], student: Path, tmp_path: Path
) -> None:
    first = next(student.glob("epoch=01-*"))
    run = tmp_path / "resumed"
    run_python(
        "lit_main_mmdistill.py",
        _teachers(teachers),
        "test=False",
        *data,
        "trainer.epochs=4",
        "trainer.save_ckpt_freq=2",
        f"resume={first}",
        f"hydra.run.dir={run}",
    )
    a, b = (load_torch(p / "last.ckpt") for p in (student, run / "checkpoints"))
    assert a["global_step"] == b["global_step"]
    assert all(torch.equal(a["state_dict"][k], b["state_dict"][k]) for k in a["state_dict"])
    for own, other in zip(
        a["optimizer_states"][0]["state"].values(), b["optimizer_states"][0]["state"].values(), strict=True
    ):
        assert torch.equal(own["exp_avg_sq"], other["exp_avg_sq"])


def test_teacher_of_wrong_modality_is_rejected(data: list[str], teachers: dict[str, Path], tmp_path: Path) -> None:
    swapped = {"rgb": teachers["flow"], "flow": teachers["rgb"], "skeleton": teachers["skeleton"]}
    done = run_python(
        "lit_main_mmdistill.py", _teachers(swapped), "test=False", *data, f"hydra.run.dir={tmp_path}", expect=2
    )
    assert "is a flow checkpoint, but is listed as the rgb teacher" in done.stderr
    assert "Traceback" not in done.stderr


def test_evaluation_works_with_a_moved_file(data: list[str], student: Path, tmp_path: Path) -> None:
    alone = tmp_path / "moved = here" / "epoch=03-train_loss=0.1.ckpt"
    alone.parent.mkdir()
    alone.write_bytes((student / "last.ckpt").read_bytes())
    run = tmp_path / "test"
    run_python(
        "lit_main_mmdistill.py", "train=False", "test=True", f"ckpt_path={alone}", *data, *EVAL,
        "data_module.k_shot=[1,2]",
        f"feature_cache={tmp_path / 'cache'}", f"hydra.run.dir={run}",
    )  # fmt: skip
    result = json.loads((run / "fewshot.json").read_text())
    assert {"top1_action_ensemble", "top1_action_ensemble_std", "top1_action_ensemble_std_error", "ci95"} <= set(result)
    assert (result["episodes"], result["n_way"], result["k_shot"], result["q_sample"]) == (20, 3, 1, 3)
    assert result["network"] == "student_rgb"
    assert result["checkpoint"] == str(alone)
    assert [s["k_shot"] for s in result["settings"]] == [1, 2]
    for setting in result["settings"]:
        others = {n for n in setting["rows"] if n.startswith("student_rgb (2 tube masks, 75% removed, ")}
        assert len(others) == 2  # shared and per clip
        assert set(setting["rows"]) - others == {"student_rgb", "random", "teacher_rgb"}
        assert (
            setting["differences"]["student_rgb - random"]["low"]
            <= setting["differences"]["student_rgb - random"]["high"]
        )
    assert (run / "report.html").is_file()


def test_evaluation_of_a_pretraining_directory(data: list[str], teachers: dict[str, Path], tmp_path: Path) -> None:
    run_python(
        "lit_main_mmdistill.py", "train=False", "test=True", f"ckpt_path={teachers['rgb']}", *data, *EVAL,
        "feature_cache=null", f"hydra.run.dir={tmp_path}",
    )  # fmt: skip
    assert json.loads((tmp_path / "fewshot.json").read_text())["network"] == "pretrained_rgb"


def test_student_with_nan_is_rejected(data: list[str], student: Path, tmp_path: Path) -> None:
    content = torch.load(student / "last.ckpt", weights_only=True)
    for key, value in content["state_dict"].items():
        if key.startswith("student_rgb."):
            value.fill_(float("nan"))
    torch.save(content, tmp_path / "nan.ckpt")
    done = run_python(
        "lit_main_mmdistill.py", "train=False", "test=True", f"ckpt_path={tmp_path / 'nan.ckpt'}", *data, *EVAL,
        "feature_cache=null", f"hydra.run.dir={tmp_path}", expect=2,
    )  # fmt: skip
    assert "student_rgb: NaN" in done.stderr


def test_missing_frame_is_named(data: list[str], teachers: dict[str, Path], tmp_path: Path) -> None:
    root = make_tiny(tmp_path / "broken", per_class=4)
    (root / "frames" / "rally_CC_0" / "000005.jpg").unlink()
    done = run_python(
        "pretrain_main.py", "modality=rgb", *overrides(root), *MODEL, f"hydra.run.dir={tmp_path / 'run'}", expect=2
    )
    assert "000005.jpg" in done.stderr
    assert "Traceback" not in done.stderr
