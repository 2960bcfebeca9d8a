"""``mmdistill VERB`` as a process: help without torch, and dataset configs outside the repository."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.commands import Script, run_python
from tests.tiny_data import EVAL, MODEL, make_tiny, overrides

# Calls main([verb, "--help"]) for each verb in one process. Fails at the first verb without usage or with torch.
HELP = """
import contextlib, io, sys
from mmdistill.cli.main import VERBS, main
for verb in VERBS:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        main([verb, "--help"])
    assert "usage: mmdistill " in out.getvalue(), f"{verb}: no usage"
    assert "torch" not in sys.modules, f"{verb}: imports torch"
"""
# Imports a pretraining. Fails if it imports a library that is needed after the first batch only.
START = """
import sys
import mmdistill.pretrain
imported = {"matplotlib", "pandas", "pytorch_lightning", "scipy", "sklearn", "transformers"} & set(sys.modules)
assert not imported, imported
"""
SMALL = ["dataset=mine", "num_workers=0", "batch_size=8", "trainer.warmup_epochs=0", "trainer.epochs=1"]


def test_help_of_every_verb_imports_no_torch() -> None:
    run_python("-c", HELP)


def test_pretraining_imports_no_library_of_later_steps() -> None:
    run_python("-c", START)


def test_evaluate_names_its_verb_and_the_required_key() -> None:
    shown = run_python("-m", "mmdistill", "evaluate", "--help").stdout
    assert shown.startswith("usage: mmdistill evaluate ckpt_path=PATH ")
    assert "ckpt_path is required" in shown
    assert "mmdistill distill" not in shown
    shown = run_python("-m", "mmdistill", "evaluate", expect=2).stderr
    assert shown.endswith(
        "mmdistill evaluate: error: train=False test=True needs ckpt_path=PATH, the checkpoint to evaluate\n"
    )


@pytest.fixture(scope="module")
def config_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder outside the repository with ``dataset/mine.yaml``, which describes the tiny dataset."""
    root = tmp_path_factory.mktemp("elsewhere")
    pairs = [override.split("=", 1) for override in overrides(make_tiny(root / "data", per_class=4))]
    settings: dict[str, Any] = {
        key.removeprefix("data_module."): yaml.safe_load(value)
        for key, value in pairs
        if key.startswith("data_module.") and not key.startswith("data_module.modalities.")
    }
    common = {"input_stride": 1, "mean": [0.0], "std": [1.0], "target": "pixel"}
    settings["modalities"] = {
        "rgb": common | {"dir": settings.pop("frames_dir")},
        "flow": common | {"dir": settings.pop("flow_dir")},
        "skeleton": common | {"dir": settings.pop("skeleton_dir"), "input_stride": 2, "sigma": 1.0},
    }
    folder = root / "my configs" / "dataset"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text("# @package data_module\n" + yaml.safe_dump(settings))
    return folder.parent


@pytest.fixture(scope="module")
def pretrained(config_dir: Path) -> Path:
    """A pretraining checkpoint, made with a relative ``--config-dir`` in another folder."""
    run_python(
        "-m", "mmdistill", "pretrain", f"--config-dir={config_dir.name}", "modality=rgb", *SMALL, *MODEL,
        f"hydra.run.dir={config_dir.parent / 'run'}", cwd=config_dir.parent,
    )  # fmt: skip
    return next((config_dir.parent / "run" / "checkpoints").glob("epoch=00-*"))


def test_evaluate_reads_a_dataset_config_of_another_folder(config_dir: Path, pretrained: Path, tmp_path: Path) -> None:
    run_python(
        "-m", "mmdistill", "evaluate", f"--config-dir={config_dir}", f"ckpt_path={pretrained}", *SMALL, *EVAL,
        "baselines=[random]", "feature_cache=null", f"hydra.run.dir={tmp_path}", cwd=config_dir.parent,
    )  # fmt: skip
    assert json.loads((tmp_path / "fewshot.json").read_text())["n_way"] == 3
    command = json.loads((tmp_path / "run.json").read_text())[0]["command"]
    assert command[:4] == ["mmdistill evaluate", f"--config-dir={config_dir}", "train=False", "test=True"]


def test_scripts_read_a_dataset_config_of_another_folder(
    config_dir: Path, pretrained: Path, tmp_path: Path, script: Script
) -> None:
    single = "data_module.max_persons=1"  # the tiny data have one player
    done = script("check_data.py", "dataset=mine", single, "--config-dir", config_dir)
    assert done.returncode == 0, done.stderr
    stats, features = tmp_path / "stats.yaml", tmp_path / "f.npz"
    small = ["dataset=mine", "num_workers=0", "--config-dir", config_dir]
    done = script("compute_stats.py", *small, "--clips", 2, "--output", stats)
    assert done.returncode == 0, done.stderr
    assert set(yaml.safe_load(stats.read_text())["modalities"]) == {"rgb", "flow", "skeleton"}
    done = script("extract_features.py", pretrained, features, *small)
    assert done.returncode == 0, done.stderr
    assert features.is_file()


def test_visualize_reads_a_dataset_config_of_another_folder(
    config_dir: Path, pretrained: Path, tmp_path: Path, script: Script
) -> None:
    """The data has moved since the pretraining."""
    moved = tmp_path / "configs" / "dataset" / "moved.yaml"
    moved.parent.mkdir(parents=True)
    shutil.copytree(config_dir.parent / "data", tmp_path / "data")
    settings = yaml.safe_load((config_dir / "dataset" / "mine.yaml").read_text())
    moved.write_text(yaml.safe_dump(settings | {"target_data_dir": str(tmp_path / "data")}))
    arguments = ["--clips", 1, "--out", tmp_path / "images", "dataset=moved", "--config-dir", tmp_path / "configs"]
    done = script("visualize_reconstruction.py", pretrained, *arguments)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "images").glob("*.png"))) == 1


@pytest.mark.parametrize("name", ["check_data.py", "compute_stats.py"])
def test_missing_config_dir_is_named(tmp_path: Path, script: Script, name: str) -> None:
    done = script(name, "dataset=mine", "--config-dir", tmp_path / "nowhere")
    assert done.returncode == 2
    assert "nowhere: there is no such folder" in done.stderr


def test_missing_config_dir_of_a_hydra_verb_is_named(tmp_path: Path) -> None:
    done = run_python("-m", "mmdistill", "pretrain", f"--config-dir={tmp_path}/nowhere", "modality=rgb", expect=2)
    assert "nowhere" in done.stderr
    assert "Traceback" not in done.stderr
