"""Sweeps: failing jobs, launchers, the summary, and that every experiment's jobs compose."""

import csv
import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from mmdistill.config import DistillConfig, PretrainConfig, parse, register_schemas
from mmdistill.workflows.sweep_results import last_metrics, objective, read_sweep, swept_keys
from tests.commands import Script, run_python
from tests.tiny_data import MODEL, make_tiny, overrides

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"

# An entrypoint of the real kind whose job writes numbers instead of training; a seed of 13 fails.
TOY = """
import csv, sys
from pathlib import Path
from mmdistill.cli.entrypoint import run_entrypoint
from mmdistill.config import PretrainConfig

def job(config, run_dir):
    if config.seed == 13:
        raise RuntimeError("thirteen")
    with (Path(run_dir) / "metrics.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["step", "loss"], [1, 9.0], [2, (config.trainer.lr - 0.01) ** 2 + config.seed]])

if __name__ == "__main__":
    run_entrypoint(job, PretrainConfig, config_name="config_pretrain")
"""


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("toy") / "toy_main.py"
    path.write_text(TOY)
    return path


def _experiments() -> list[str]:
    return sorted(p.stem for p in (CONFIGS / "experiment").glob("*.yaml"))


@pytest.mark.parametrize("tennis", [False, True])
@pytest.mark.parametrize("name", _experiments())
def test_every_job_of_every_experiment_composes(name: str, tennis: bool) -> None:
    """On the demo's and on the tennis config; each job differs from the others."""
    pretrain = name.startswith("pretrain")
    top = ("config_pretrain" if pretrain else "config_mmdistill") + ("_tennis" if tennis else "")
    needed = ["modality=rgb"] if pretrain else ["trainer.ckpt_path=[a,b,c]", "ckpt_path=p"]
    register_schemas()
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIGS)):
        whole = compose(top, overrides=[f"experiment={name}", *needed], return_hydra_config=True)
        assert whole.hydra.mode.name == "MULTIRUN"
        params = [f"{key}={value}" for key, value in whole.hydra.sweeper.params.items()]
        jobs = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(params), None)[0]
        configs = [
            parse(
                compose(top, overrides=[f"experiment={name}", *needed, *job]),
                PretrainConfig if pretrain else DistillConfig,
            )
            for job in jobs
        ]
    assert len({repr(c) for c in configs}) == len(jobs) > 1
    if not pretrain:
        assert {c.train for c in configs} == {name in ("teachers", "mask_ratio")}


def _launcher(name: str) -> list[str]:
    plugin = {"joblib": "hydra_joblib_launcher", "submitit_local": "hydra_submitit_launcher"}.get(name)
    if plugin is None:
        return []
    if find_spec(f"hydra_plugins.{plugin}") is None:
        pytest.skip(f"{plugin} is not installed")
    return [f"hydra/launcher={name}"]


@pytest.mark.parametrize("launcher", ["basic", "joblib", "submitit_local"])
def test_one_failing_job_does_not_end_the_others(toy: Path, tmp_path: Path, launcher: str) -> None:
    common = [toy, "-m", "modality=rgb", *_launcher(launcher), f"hydra.sweep.dir={tmp_path}"]
    done = run_python(*common, "seed=12,13,14", expect=1)
    assert "1 jobs of the sweep failed" in done.stderr
    assert f"{tmp_path}/pretrain_rgb_1: RuntimeError: thirteen" in done.stderr
    rows = read_sweep(tmp_path)
    assert [(r.job, r.overrides["seed"]) for r in rows] == [(f"pretrain_rgb_{i}", str(12 + i)) for i in range(3)]
    assert [r.error for r in rows] == ["", "RuntimeError: thirteen", ""]
    assert [round(r.values["loss"]) for r in rows if not r.error] == [12, 14]
    run_python(*common, "seed=12,15,14")  # the record of the repaired job is gone
    assert not any(r.error for r in read_sweep(tmp_path))


def test_a_wrong_value_is_one_line_and_not_the_end(toy: Path, tmp_path: Path) -> None:
    done = run_python(
        toy, "-m", "modality=rgb", "trainer.accumulate_grad_batches=0,1", f"hydra.sweep.dir={tmp_path}", expect=1
    )
    assert "trainer.accumulate_grad_batches=0 must be at least 1" in done.stderr
    assert "Traceback" not in done.stderr
    assert [bool(r.error) for r in read_sweep(tmp_path)] == [True, False]


def test_a_failing_single_run_still_raises(toy: Path, tmp_path: Path) -> None:
    done = run_python(toy, "modality=rgb", "seed=13", f"hydra.run.dir={tmp_path}", expect=1)
    assert "RuntimeError: thirteen" in done.stderr
    assert not (tmp_path / "failed.json").exists()


def test_optuna_minimises_the_loss_and_survives_a_failed_trial(toy: Path, tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    run_python(
        toy, "-m", "modality=rgb", "hydra/sweeper=optuna", "hydra.sweeper.n_trials=6", "hydra.sweeper.n_jobs=1",
        "hydra.sweeper.direction=minimize", "hydra.sweeper.sampler.seed=0", f"hydra.sweep.dir={tmp_path}",
        "seed=choice(13,0)", "trainer.lr=interval(0.01,1.0)", expect=1,
    )  # fmt: skip
    rows = read_sweep(tmp_path)
    assert len(rows) == 6
    assert 0 < sum(bool(r.error) for r in rows) < 6
    best = OmegaConf.load(tmp_path / "optimization_results.yaml")
    assert best.best_value == min(r.values["loss"] for r in rows if not r.error)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """Arguments of a tiny pretraining, and its folder with seeds 1 and 2 trained one by one."""
    root = tmp_path_factory.mktemp("alone")
    arguments = ["modality=skeleton", *overrides(make_tiny(root / "data", per_class=2)), *MODEL, "trainer.lr=0.05"]
    for seed in (1, 2):
        run_python("pretrain_main.py", *arguments, f"seed={seed}", f"hydra.run.dir={root / str(seed)}")
    return arguments, root


@pytest.mark.parametrize("launcher", ["basic", "joblib", "submitit_local"])
def test_each_job_equals_itself_run_alone(alone: tuple[list[str], Path], tmp_path: Path, launcher: str) -> None:
    arguments, root = alone
    run_python("pretrain_main.py", "-m", *arguments, "seed=1,2", *_launcher(launcher), f"hydra.sweep.dir={tmp_path}")
    for number, seed in enumerate((1, 2)):
        folders = root / str(seed), tmp_path / f"pretrain_skeleton_{number}"
        a, b = (next(f.glob("checkpoints/epoch=01-*/checkpoint/mp_rank_00_model_states.pt")) for f in folders)
        own, other = (torch.load(p, weights_only=True)["module"] for p in (a, b))
        assert own.keys() == other.keys()
        assert all(torch.equal(own[k], other[k]) for k in own)
        assert a.parents[1].name == b.parents[1].name


# The summary ---------------------------------------------------------------------------------------------------------


def _job(
    root: Path, number: int, overrides: list[str], *, loss: float | None = None, shots: dict[int, float] | None = None
) -> None:
    job = root / f"run_{number}"
    (job / ".hydra").mkdir(parents=True)
    (job / ".hydra" / "overrides.yaml").write_text("".join(f"- {json.dumps(o)}\n" for o in overrides))
    if loss is not None:
        (job / "metrics.csv").write_text(f"step,loss,lr\n1,9,1\n2,{loss},\n")
    if shots:
        settings = [
            {
                "n_way": 5,
                "k_shot": k,
                "head": "logistic",
                "rows": {"student_rgb": {"top1_action_ensemble": v, "ci95": 0.01}},
            }
            for k, v in shots.items()
        ]
        first = next(iter(shots.values()))
        report = {"network": "student_rgb", "top1_action_ensemble": first, "settings": settings}
        (job / "fewshot.json").write_text(json.dumps(report))


def _table(root: Path) -> list[dict[str, str]]:
    with (root / "sweep.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_last_number_of_each_column_counts(tmp_path: Path) -> None:
    _job(tmp_path, 0, [], loss=0.5)
    assert last_metrics(tmp_path / "run_0" / "metrics.csv") == {"step": 2, "loss": 0.5, "lr": 1}
    assert objective(tmp_path / "run_0") == 0.5
    with pytest.raises(ValueError, match=r"neither|no fewshot.json"):
        objective(tmp_path)


def test_one_key_gives_a_line_and_failed_jobs_are_named(tmp_path: Path, script: Script) -> None:
    for i, ratio in enumerate((0.5, 0.75, 0.9)):
        _job(tmp_path, i, ["modality=rgb", f"data_module.mask_ratio={ratio}"], loss=1 + ratio)
    _job(tmp_path, 3, ["modality=rgb", "data_module.mask_ratio=0.95"])
    (tmp_path / "run_3" / "failed.json").write_text(json.dumps({"error": "no memory\nsecond line", "traceback": ""}))
    said = script("summarize_sweep.py", tmp_path).stdout
    assert "run_3" in said
    assert "no memory" in said
    rows = _table(tmp_path)
    assert list(rows[0])[:2] == ["job", "data_module.mask_ratio"]
    assert [(r["data_module.mask_ratio"], r["loss"], r["error"]) for r in rows[1:]] == [
        ("0.75", "1.75", ""), ("0.9", "1.9", ""), ("0.95", "", "no memory"),
    ]  # fmt: skip
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_two_keys_give_a_heat_map_and_seeds_are_averaged(tmp_path: Path, script: Script) -> None:
    from mmdistill.workflows.sweep_plot import grid_of, mean_over_seeds

    jobs = [(t, r, s) for t in ("[rgb]", "[rgb,flow]") for r in (0.5, 0.75) for s in (0, 1)]
    for i, (teachers, ratio, seed) in enumerate(jobs):
        text = [f"trainer.teachers={teachers}", f"data_module.mask_ratio={ratio}", f"seed={seed}"]
        _job(tmp_path, i, text, shots={1: 0.4 + 0.1 * ratio + 0.2 * seed + 0.1 * len(teachers)})
    rows = read_sweep(tmp_path)
    assert swept_keys(rows) == ["trainer.teachers", "data_module.mask_ratio", "seed"]
    points = mean_over_seeds(rows, ["trainer.teachers", "data_module.mask_ratio"])
    assert points[("[rgb]", "0.5")] == pytest.approx((0.45 + 0.1 + 0.1 * 5, 0.1))
    xs, ys, values = grid_of(points)
    assert (xs, ys, values.shape) == (["0.5", "0.75"], ["[rgb]", "[rgb,flow]"], (2, 2))
    assert "±" in script("summarize_sweep.py", tmp_path).stdout
    assert (tmp_path / "sweep.png").is_file()


def test_a_list_of_shots_in_one_job_is_a_key_of_its_own(tmp_path: Path) -> None:
    _job(tmp_path, 0, ["data_module.k_shot=[1,5]"], shots={1: 0.3, 5: 0.6})
    rows = read_sweep(tmp_path)
    assert [(r.overrides["data_module.k_shot"], r.values["top1_action_ensemble"]) for r in rows] == [
        ("1", 0.3),
        ("5", 0.6),
    ]


def test_an_unfinished_job_and_an_empty_folder_are_said(tmp_path: Path, script: Script) -> None:
    done = script("summarize_sweep.py", tmp_path)
    assert done.returncode == 2
    assert "holds no job" in done.stderr
    _job(tmp_path, 0, ["seed=1"])
    assert "unfinished" in script("summarize_sweep.py", tmp_path).stdout
