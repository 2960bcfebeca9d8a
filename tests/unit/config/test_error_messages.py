"""Errors of Hydra and OmegaConf become one sentence with the nearest keys; own errors stay as they are."""

from typing import Any

import pytest
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from mmdistill.config import ConfigError, DistillConfig, PretrainConfig, explain
from mmdistill.config.compose import load_config
from mmdistill.config.error_messages import describe_misplaced_key, known_keys, near_matches


def explain_overrides(*overrides: str) -> str:
    """Message for the error of composing a pretraining with `overrides`."""
    with pytest.raises(Exception) as caught:  # noqa: PT011 - Hydra's or ours
        load_config(PretrainConfig, "config_pretrain", list(overrides))
    return explain(caught.value, PretrainConfig)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("dataset=tenis", "Could not find 'dataset/tenis'. Available: demo, ego4d, epic, meccano, tennis, wear"),
        ("trainer.epochs=three", "trainer.epochs=three must be a whole number"),
        ("compile=maybe", "compile=maybe must be True or False"),
        ("dataset=my", "wear. A config outside the repository needs --config-dir=DIR and the file DIR/dataset/my.yaml"),
        ("trainer.lr=abc", "trainer.lr=abc must be a number"),
        ("seed=1", "modality is not given; give it on the command line, for example modality=rgb"),
    ],
)
def test_allowed_values_are_listed(override: str, message: str) -> None:
    shown = explain_overrides(override)
    assert message in shown
    assert "$VALUE" not in shown
    assert "Near matches" not in shown


@pytest.mark.parametrize("name", ["zero2", "zero_2", "zero-2", "zero_stage_2", "stage2", "deepspeed_zero2"])
def test_strategy_of_a_zero_stage_is_suggested(name: str) -> None:
    shown = explain_overrides("modality=rgb", f"strategy={name}")
    assert shown.startswith(f"strategy={name} is not one of auto, ddp, ")
    assert shown.endswith("; did you mean deepspeed_stage_2?")


def test_unknown_key_is_reported_with_near_matches() -> None:
    assert explain_overrides("modality=rgb", "trainer.epcohs=3").endswith(". Near matches: trainer.epochs")
    assert explain_overrides("modality=rgb", "+trainer.epcohs=3") == (
        "unknown key trainer.epcohs. Near matches: trainer.epochs"
    )
    assert explain_overrides("modality=rgb", "+zzz=3") == "unknown key zzz"


@pytest.mark.parametrize(
    ("override", "near"),
    [
        ("trainer.epoch=3", "trainer.epochs"),  # not model.depth, which has another parent
        ("+trainer.epoch=3", "trainer.epochs"),
        ("datase=demo", "dataset"),  # a group of files
        ("source.clip_anchr=start", "source.clip_anchor"),
        ("data_module.modalities.flow.compens=median", "data_module.modalities.flow.compensate"),
        (
            "data_module.modalities.skeleton.extra_keypoints.name=[ball]",
            "data_module.modalities.skeleton.extra_keypoints.names",
        ),
        (
            "+data_module.modalities.skeleton.extra_keypoints.name=[ball]",
            "data_module.modalities.skeleton.extra_keypoints.names",
        ),
    ],
)
def test_near_matches_have_the_same_parent_if_there_are_any(override: str, near: str) -> None:
    assert explain_overrides("modality=rgb", "source=demo", override).endswith(f". Near matches: {near}")


@pytest.mark.parametrize("overrides", [[], ["modality=rgb"], ["train=False"], ["trainer.teachers=[rgb]"]])
@pytest.mark.parametrize(
    ("schema", "name", "other"),
    [
        (PretrainConfig, "config_mmdistill", "config_pretrain"),
        (DistillConfig, "config_pretrain", "config_mmdistill"),
    ],
)
def test_config_of_the_other_phase_is_named(schema: Any, name: str, other: str, overrides: list[str]) -> None:
    with pytest.raises((ConfigError, HydraException, OmegaConfBaseException)) as caught:
        load_config(schema, name, overrides)
    shown = explain(caught.value, schema)
    assert shown.startswith(f"--config-name selects a config of another verb; use {other} or {other}_tennis")


@pytest.mark.parametrize("prefix", ["", "+"])
def test_key_of_the_other_phase_is_reported_with_its_verb(prefix: str) -> None:
    assert explain_overrides("modality=rgb", f"{prefix}trainer.monitor=val_top1_action") == (
        "trainer.monitor: a key of `mmdistill distill`, not of this verb; remove it from the command"
    )


def test_word_without_equal_sign_is_explained() -> None:
    assert explain_overrides("rgb") == "rgb: not of the form KEY=VALUE, for example seed=1"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["seed=1", "modality", "rgb"], "modality rgb: write modality=rgb"),
        (["--modality", "rgb"], "--modality rgb: write modality=rgb"),
        (["--trainer.lr=1"], "--trainer.lr=1: write trainer.lr=1"),
        (["dataset"], "dataset: write dataset=VALUE"),
        (["modality=rgb", "--config-name", "model", "--cfg", "job", "-m", "rgb"], None),
    ],
)
def test_key_without_equal_sign_is_reported_with_it(argv: list[str], message: str | None) -> None:
    assert describe_misplaced_key(argv, PretrainConfig) == message


def test_comma_outside_quotes_is_explained() -> None:
    shown = explain_overrides("modality=rgb", "init_from=/a, b/c")
    assert "a comma outside quotes makes a sweep (-m); for a path with a comma write \"key='/a, b/c'\"" in shown


def test_own_error_is_reported_in_full() -> None:
    assert explain(ConfigError("two\nlines"), PretrainConfig) == "two\nlines"


def test_error_of_a_loader_worker_is_reported_without_its_traceback() -> None:
    shown = "Caught FrameError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  x\n"
    error = ConfigError(f"{shown}mmdistill.data.readers.base.FrameError: /a.jpg: no such rgb file\n")
    assert explain(error, PretrainConfig) == "/a.jpg: no such rgb file"


def test_known_keys_are_dotted() -> None:
    assert {"seed", "model.dim", "trainer.lr", "data_module.mask_ratio"} <= set(known_keys(PretrainConfig))
    assert "model.dim" not in known_keys(DistillConfig)
    assert near_matches("episode", DistillConfig) == ". Near matches: data_module.episodes, trainer.val_episodes"


def test_nearest_group_and_main_config_are_suggested() -> None:
    assert "wear; did you mean tennis? A config outside" in explain_overrides("dataset=tenis")
    with pytest.raises(HydraException) as caught:
        load_config(PretrainConfig, "config_pretrain_tenis", [])
    names = "config_pretrain, config_pretrain_tennis; did you mean config_pretrain_tennis?"
    assert explain(caught.value, PretrainConfig) == f"--config-name=config_pretrain_tenis: not one of {names}"
    shown = explain(caught.value, DistillConfig)  # a config of the other verb is not suggested
    assert ": not one of config_mmdistill, config_mmdistill_tennis; did you mean config_mmdistill_tennis?" in shown


@pytest.mark.parametrize("override", ["model=tiny", "model.dim=3"])
def test_model_of_an_evaluation_comes_from_the_checkpoint(override: str) -> None:
    with pytest.raises(HydraException) as caught:
        load_config(DistillConfig, "config_mmdistill", [override])
    shown = explain(caught.value, DistillConfig)
    assert shown == "model: distillation and evaluation use the model of the checkpoint; remove model from the command"


def test_error_of_the_operating_system_starts_with_its_file() -> None:
    error = FileNotFoundError(2, "No such file or directory", "a.json")
    assert explain(error, PretrainConfig) == "a.json: No such file or directory"
