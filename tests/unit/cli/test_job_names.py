import hashlib
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf, open_dict

from mmdistill.cli.job_names import FIRST_JOB, folder_name, shorten_subdirs
from mmdistill.config import register_schemas

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
LONG = "é" * 200  # 400 bytes


@pytest.mark.parametrize("name", ["rgb", "a/b", "[a,b]", "k=v", "x" * 240, "汉" * 80])
def test_names_that_a_file_system_accepts_are_unchanged(name: str) -> None:
    assert folder_name(name) == name


def test_long_names_end_in_a_hash_and_stay_different() -> None:
    name = folder_name(f"a/{LONG}/b")
    first, middle, last = name.split("/")
    assert (first, last) == ("a", "b")
    assert middle == "é" * 115 + "-" + hashlib.sha256(LONG.encode()).hexdigest()[:8]
    assert len(middle.encode()) <= 240
    assert folder_name(LONG + "1") != folder_name(LONG + "2")


def test_names_stay_inside_the_folder_of_the_sweep() -> None:
    assert folder_name("ckpt=../..", "seed=1/../../x") == "ckpt=../..,seed=1/__/__/x"  # the second name is "..,seed=1"


def test_only_interpolations_of_the_command_line_are_wrapped() -> None:
    given = ["hydra.sweep.subdir=${hydra.job.override_dirname}", "hydra.sweep.subdir=a", "seed=1"]
    wrapped = ["hydra.sweep.subdir='${folder_name:${hydra.job.override_dirname}}'", *given[1:]]
    assert shorten_subdirs(given) == wrapped


def _resolve(top: str, *overrides: str, subdir_of: str) -> str:
    register_schemas()
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIGS)):
        config = compose(top, overrides=list(overrides), return_hydra_config=True)
    with open_dict(config):
        config.hydra.job.num = 3
        config.hydra.job.override_dirname = subdir_of
    return str(OmegaConf.select(config, "hydra.sweep.subdir"))


def test_job_folders_of_the_main_configs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _resolve("config_pretrain", "modality=rgb", subdir_of="") == "pretrain_rgb_3"
    assert _resolve("config_mmdistill", "run_name='a[1]/b'", subdir_of="") == "a[1]/b_3"
    monkeypatch.setenv(FIRST_JOB, "4")
    assert _resolve("config_pretrain", "modality=rgb", subdir_of="") == "pretrain_rgb_7"
    (wrapped,) = shorten_subdirs(["hydra.sweep.subdir=${hydra.job.override_dirname}"])
    assert _resolve("config_pretrain", wrapped, "modality=rgb", subdir_of="p=[a,/b],seed=1") == "p=[a,/b],seed=1"
    assert len(_resolve("config_mmdistill", wrapped, subdir_of=LONG).encode()) <= 255
    assert len(_resolve("config_mmdistill", f"run_name='{LONG}'", subdir_of="").encode()) <= 255
