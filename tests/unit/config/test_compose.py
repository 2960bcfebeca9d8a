"""Every YAML file of configs/ composes to a valid config."""

import shutil
from pathlib import Path

import pytest

from mmdistill.config import ConfigError, DistillConfig, PretrainConfig
from mmdistill.config.compose import CONFIGS, load_config, load_dataset_settings
from tests.configs import TEACHERS

FILES = sorted(file.relative_to(CONFIGS).with_suffix("") for file in CONFIGS.rglob("*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=str)
def test_every_yaml_composes(file: Path) -> None:
    """Top-level files alone; each file of a group as an override of the entrypoint that has this group."""
    group = file.parent.as_posix()
    is_pretrain = group == "model" or file.stem.startswith(("pretrain", "config_pretrain"))
    overrides = [] if group == "." else [f"{group}={file.stem}"]
    if group == "dataset":
        overrides.append("trainer.teachers=[rgb,flow]")  # which every dataset has
    name = file.stem if group == "." else "config_pretrain" if is_pretrain else "config_mmdistill"
    if is_pretrain:
        assert load_config(PretrainConfig, name, ["modality=rgb", *overrides])
    else:
        assert load_config(DistillConfig, name, [TEACHERS, "ckpt_path=a", *overrides])


def test_there_are_configs() -> None:
    assert len(FILES) > 15


def test_config_dir_adds_files_of_a_user(tmp_path: Path) -> None:
    (tmp_path / "trainer").mkdir()
    (tmp_path / "trainer" / "short.yaml").write_text("epochs: 1\nlr: 1.0e-3\n")
    config = load_config(PretrainConfig, "config_pretrain", ["modality=rgb", "trainer=short"], config_dir=tmp_path)
    assert (config.trainer.epochs, config.trainer.lr) == (1, 1e-3)
    with pytest.raises(ConfigError, match=r"--config-dir .*absent: there is no such folder"):
        load_config(PretrainConfig, "config_pretrain", ["modality=rgb"], config_dir=tmp_path / "absent")


def test_defaults_list_must_start_with_the_schema() -> None:
    with pytest.raises(
        ConfigError, match=r"selects a config of another verb; use config_mmdistill or .* starts with distill_schema"
    ):
        load_config(DistillConfig, "config_pretrain", ["modality=rgb"])


def test_configs_of_a_source_tree_take_precedence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user with an installed wheel edits the configs of a clone and runs the commands there."""
    shutil.copytree(CONFIGS, tmp_path / "configs")
    (tmp_path / "configs" / "dataset" / "mine.yaml").write_text((CONFIGS / "dataset" / "demo.yaml").read_text())
    trainer = tmp_path / "configs" / "trainer" / "pretrain_demo.yaml"
    trainer.write_text(trainer.read_text().replace("epochs: 12", "epochs: 7"))
    monkeypatch.chdir(tmp_path)
    config = load_config(PretrainConfig, "config_pretrain", ["modality=rgb", "dataset=mine"])
    assert config.trainer.epochs == 7
    monkeypatch.chdir(tmp_path / "configs")
    assert load_config(PretrainConfig, "config_pretrain", ["modality=rgb"]).trainer.epochs == 12


def test_dataset_of_both_folders_is_that_of_the_package_as_in_hydra(tmp_path: Path) -> None:
    (tmp_path / "dataset").mkdir()
    text = (CONFIGS / "dataset/tennis.yaml").read_text()
    for name in ("tennis", "mine"):
        path = tmp_path / f"dataset/{name}.yaml"
        path.write_text(text.replace("\nname: tennis\n", f"\nname: own_{name}\n"))
    for name, expected in (("tennis", "tennis"), ("mine", "own_mine")):
        overrides = ["modality=rgb", f"dataset={name}"]
        config = load_config(PretrainConfig, "config_pretrain", overrides, config_dir=tmp_path)
        assert load_dataset_settings(name, tmp_path)["name"] == config.data_module.name == expected
