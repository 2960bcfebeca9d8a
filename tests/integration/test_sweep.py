"""Sweeps as processes: failing jobs, launchers, Optuna, and equality with single runs."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from mmdistill.config import DistillConfig, PretrainConfig, parse, register_schemas
from mmdistill.workflows.sweep_results import read_sweep
from tests.commands import run_python
from tests.tiny_data import MODEL, make_tiny, overrides

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"

# Scripts with the real entrypoint: a job with seed 13 fails, the others write metrics or pretrain.
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

PRETRAIN = """
from mmdistill.cli.entrypoint import run_entrypoint
from mmdistill.cli.pretrain import run_pretraining
from mmdistill.config import PretrainConfig

def job(config, run_dir):
    if config.seed == 13:
        raise RuntimeError("thirteen")
    run_pretraining(config, run_dir)

if __name__ == "__main__":
    run_entrypoint(job, PretrainConfig, config_name="config_pretrain")
"""


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("toy") / "toy_main.py"
    path.write_text(TOY)
    return path


def _experiments() -> list[str]:
    """Those with several jobs."""
    return sorted(p.stem for p in (CONFIGS / "experiment").glob("*.yaml") if "MULTIRUN" in p.read_text())


@pytest.mark.parametrize("tennis", [False, True])
@pytest.mark.parametrize("name", _experiments())
def test_every_job_of_every_experiment_composes(name: str, tennis: bool) -> None:
    """On the demo and the tennis config; all jobs differ."""
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


def test_protocol_of_the_paper_composes_for_its_datasets() -> None:
    register_schemas()
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIGS)):
        for dataset in ("epic", "meccano", "wear", "ego4d"):
            overrides = [f"dataset={dataset}", "experiment=mm_cdfsl", "trainer.ckpt_path=[a,b,c]"]
            config = parse(
                compose("config_mmdistill", overrides=[*overrides, "trainer.teachers=[rgb,flow]"]), DistillConfig
            )
            data = config.data_module
            assert (data.resize, data.crop_size, data.support_views) == ("squash", [224, 224], "first")
            assert (data.n_masks, data.eval_masks, data.episodes, data.q_sample) == (2, "per_clip", 600, 15)


def _launcher(name: str) -> list[str]:
    plugin = {"joblib": "hydra_joblib_launcher", "submitit_local": "hydra_submitit_launcher"}.get(name)
    if plugin is None:
        return []
    if find_spec(f"hydra_plugins.{plugin}") is None:
        pytest.skip(f"{plugin} is not installed")
    return [f"hydra/launcher={name}"]


def test_record_of_a_repaired_job_is_removed(toy: Path, tmp_path: Path) -> None:
    common = [toy, "-m", "modality=rgb", "resume=auto", f"hydra.sweep.dir={tmp_path}"]
    run_python(*common, "seed=12,13", expect=1)
    assert [bool(r.error) for r in read_sweep(tmp_path)] == [False, True]
    done = run_python(*common, "seed=12,15")
    assert re.findall(r"job (\S+) is already finished, skipping it", done.stderr) == ["pretrain_rgb_0"]
    assert not any(r.error for r in read_sweep(tmp_path))


def test_invalid_value_of_one_job_is_one_line(toy: Path, tmp_path: Path) -> None:
    done = run_python(
        toy, "-m", "modality=rgb", "trainer.accumulate_grad_batches=0,1", f"hydra.sweep.dir={tmp_path}", expect=1
    )
    assert "trainer.accumulate_grad_batches=0 must be at least 1" in done.stderr
    assert "Traceback" not in done.stderr
    assert [bool(r.error) for r in read_sweep(tmp_path)] == [True, False]


def test_failed_single_run_raises(toy: Path, tmp_path: Path) -> None:
    done = run_python(toy, "modality=rgb", "seed=13", f"hydra.run.dir={tmp_path}", expect=1)
    assert "RuntimeError: thirteen" in done.stderr
    assert not (tmp_path / "failed.json").exists()


def test_optuna_minimizes_the_loss_despite_a_failed_trial(toy: Path, tmp_path: Path) -> None:
    """With a storage, two starts into one folder are one study, and the table has the jobs of both."""
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    for trials in (4, 2):
        run_python(
            toy, "-m", "modality=rgb", "hydra/sweeper=optuna", f"hydra.sweeper.n_trials={trials}",
            "hydra.sweeper.n_jobs=1", "hydra.sweeper.direction=minimize", f"hydra.sweeper.sampler.seed={trials}",
            f"hydra.sweeper.storage=sqlite:///{tmp_path}/study.db", "hydra.sweeper.study_name=s", "resume=auto",
            f"hydra.sweep.dir={tmp_path}", "seed=choice(13,0)", "trainer.lr=interval(0.01,1.0)",
            expect=1,
        )  # fmt: skip
    rows = read_sweep(tmp_path)
    assert [row.job for row in rows] == [f"pretrain_rgb_{number}" for number in range(6)]
    assert len({row.overrides["trainer.lr"] for row in rows}) == 6
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
def test_each_job_equals_a_single_run_although_one_fails(
    alone: tuple[list[str], Path], tmp_path: Path, launcher: str
) -> None:
    arguments, root = alone
    script, sweep = tmp_path / "main.py", tmp_path / "sweep"
    script.write_text(PRETRAIN)
    given = ["-m", *arguments, "seed=1,13,2", *_launcher(launcher), f"hydra.sweep.dir={sweep}"]
    done = run_python(script, *given, expect=1)
    assert "1 job of the sweep failed" in done.stderr
    assert f"{sweep}/pretrain_skeleton_1: RuntimeError: thirteen" in done.stderr
    rows = read_sweep(sweep)
    assert [(r.job, r.overrides["seed"]) for r in rows] == [
        (f"pretrain_skeleton_{number}", seed) for number, seed in enumerate(("1", "13", "2"))
    ]
    assert [r.error for r in rows] == ["", "RuntimeError: thirteen", ""]
    for number, seed in ((0, 1), (2, 2)):
        folders = root / str(seed), sweep / f"pretrain_skeleton_{number}"
        a, b = (next(f.glob("checkpoints/epoch=01-*/checkpoint/mp_rank_00_model_states.pt")) for f in folders)
        own, other = (torch.load(p, weights_only=True)["module"] for p in (a, b))
        assert own.keys() == other.keys()
        assert all(torch.equal(own[k], other[k]) for k in own)
        assert a.parents[1].name == b.parents[1].name
        (name,) = (p.name for p in folders[1].glob("checkpoints/epoch=01-*"))
        assert f"loss={rows[number].values['loss']:.4f}" in name
