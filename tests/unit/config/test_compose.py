"""Every YAML file of configs/ composes to a valid config."""

import shutil
from pathlib import Path

import pytest

from mmdistill.config import ConfigError, DistillConfig, PretrainConfig, loss_weights
from mmdistill.config.compose import CONFIGS, load_config, load_dataset_settings, select_files
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
    if file.stem == "pretrain_mm_cdfsl":
        overrides.append("source=demo")  # without which it is an error
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
    default = load_config(PretrainConfig, "config_pretrain", ["modality=rgb"]).trainer.epochs
    trainer.write_text(trainer.read_text().replace(f"epochs: {default}\n", f"epochs: {default + 1}\n", 1))
    monkeypatch.chdir(tmp_path)
    config = load_config(PretrainConfig, "config_pretrain", ["modality=rgb", "dataset=mine"])
    assert config.trainer.epochs == default + 1
    monkeypatch.chdir(tmp_path / "configs")
    assert load_config(PretrainConfig, "config_pretrain", ["modality=rgb"]).trainer.epochs == default


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


def test_a_source_is_any_dataset(tmp_path: Path) -> None:
    """Also one of a user; its keys can be changed, and the dataset of the target stays."""
    (tmp_path / "dataset").mkdir()
    text = (CONFIGS / "dataset/epic.yaml").read_text()
    (tmp_path / "dataset/mine.yaml").write_text(text.replace("\nname: epic\n", "\nname: mine\n"))
    given = ["modality=rgb", "dataset=meccano", "source=mine", "source.target_data_dir=/a=b", "source.sampling_rate=3"]
    config = load_config(PretrainConfig, "config_pretrain", given, config_dir=tmp_path)
    assert config.source is not None
    assert (config.source.name, config.source.target_data_dir, config.source.sampling_rate) == ("mine", "/a=b", 3)
    assert (config.data_module.name, config.data_module.sampling_rate) == ("meccano", 1)
    for off in ([], ["source=null"]):
        assert load_config(PretrainConfig, "config_pretrain", ["modality=rgb", *off]).source is None
    for override in ("source.num_frames=8", "source={num_frames:8}"):
        with pytest.raises(ConfigError, match=r"^source[.\w]*: source is null; select its dataset by name, such as"):
            load_config(PretrainConfig, "config_pretrain", ["modality=rgb", override])


def test_experiment_of_the_paper() -> None:
    """The values of the authors' config for each modality; each can be replaced."""
    given = ["dataset=epic", "source=ego4d", "experiment=mm_cdfsl"]
    for modality, lambda_ce in (("rgb", 0.05), ("flow", 0.01)):
        config = load_config(PretrainConfig, "config_pretrain", [*given, f"modality={modality}"])
        weights = loss_weights(config)
        assert (weights.source, weights.target, weights.ce) == (1, 1, lambda_ce)
        assert (config.data_module.mask_ratio, config.model.dim, config.trainer.epochs) == (0.9, 384, 100)
        assert config.trainer.classifier_dropout == 0.5
    with pytest.raises(ConfigError, match=r"without a source; set source=DATASET, also with .* experiment=mm_cdfsl$"):
        load_config(PretrainConfig, "config_pretrain", ["modality=rgb", "dataset=epic", "experiment=mm_cdfsl"])
    replaced = [*given, "modality=rgb", "trainer.lambda_ce=0", "model=tiny"]
    config = load_config(PretrainConfig, "config_pretrain", replaced)
    assert (loss_weights(config).ce, config.model.dim) == (0, 128)


def test_names_of_files_are_those_of_the_phase() -> None:
    given = ["source=epic", "source=demo,epic", "source.name=x", "source=null", "experiment=mask_ratio", "experiment=x"]
    selected = ["dataset@source=epic", "dataset@source=demo,epic", "source.name=x", "source=null"]
    assert select_files(given, PretrainConfig) == [*selected, "experiment=pretrain_mask_ratio", "experiment=x"]
    assert select_files(given, DistillConfig) == given
