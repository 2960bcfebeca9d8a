"""Old keys and values: an error with the new name, and a translation of stored configs."""

import re
from pathlib import Path
from typing import Any

import pytest

from mmdistill.config import ConfigError, DistillConfig, PretrainConfig, explain, stored_config, to_plain
from mmdistill.config.compose import load_config
from mmdistill.config.error_messages import known_keys
from mmdistill.config.renames import (
    REMOVED_KEYS,
    REMOVED_VALUES,
    RENAMED_KEYS,
    RENAMED_VALUES,
    describe_old_key,
    describe_old_value,
    renamed_key,
    translate_stored,
)
from tests.configs import distill_config, pretrain_config

OLD_KEYS = [key.replace("*", "flow") for key in (*RENAMED_KEYS, *REMOVED_KEYS)]
DISTILL_KEYS = {"compare", "head", "network", "trainer.teacher_cache"}  # of the distillation only


def error_of(key: str, overrides: list[str], config_dir: Path | None = None) -> str:
    """Message for the error of composing a config of the phase that had `key`."""
    schema: type[Any] = DistillConfig if key in DISTILL_KEYS else PretrainConfig
    name, needed = ("config_mmdistill", []) if key in DISTILL_KEYS else ("config_pretrain", ["modality=flow"])
    with pytest.raises(Exception) as caught:  # noqa: PT011 - Hydra's or ours
        load_config(schema, name, [*needed, *overrides], config_dir=config_dir)
    return explain(caught.value, schema)


def replacement(key: str) -> str:
    """The expected sentence for an old key."""
    modality = "data_module.modalities.flow."
    general = key.replace(modality, "data_module.modalities.*.")
    if general in RENAMED_KEYS:
        return f"{key} was renamed to {RENAMED_KEYS[general].replace('data_module.modalities.*.', modality)}"
    return f"{key} was removed; {REMOVED_KEYS[general]}"


@pytest.mark.parametrize(("key", "plus"), [*((key, "") for key in OLD_KEYS), (OLD_KEYS[0], "+"), (OLD_KEYS[-1], "+")])
def test_old_key_on_the_command_line_names_the_new_one(key: str, plus: str) -> None:
    expected = replacement("deepspeed" if key.startswith("deepspeed") else key)
    assert error_of(key, [f"{plus}{key}=1"]) == expected


@pytest.mark.parametrize("key", [key for key in OLD_KEYS if key != "deepspeed"][::5])  # each composes a config
def test_old_key_in_yaml_names_the_file_and_the_new_key(key: str, tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    *sections, last = key.split(".")
    lines = [f"{'  ' * depth}{section}:" for depth, section in enumerate(sections)]
    text = "\n".join(["# @package _global_", *lines, f"{'  ' * len(sections)}{last}: 1"])
    (tmp_path / "experiment" / "mine.yaml").write_text(text)
    expected = replacement("deepspeed" if key.startswith("deepspeed") else key)
    assert error_of(key, ["experiment=mine"], tmp_path) == f"experiment/mine: {expected}"


def test_old_key_in_a_dataset_file_names_the_new_one(tmp_path: Path) -> None:
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset" / "mine.yaml").write_text("# @package data_module\nname: mine\nmissing: skip\n")
    shown = error_of("data_module.missing", ["dataset=mine"], tmp_path)
    assert shown == "dataset/mine: data_module.missing was renamed to data_module.on_missing"


@pytest.mark.parametrize("default", ["/deepspeed: zero2", "override /deepspeed: zero2"])
def test_group_deepspeed_in_a_defaults_list_names_strategy(default: str, tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(f"# @package _global_\ndefaults:\n  - {default}\n")
    assert error_of("deepspeed", ["experiment=mine"], tmp_path).endswith(replacement("deepspeed"))


def test_key_of_the_other_phase_is_not_called_renamed() -> None:
    with pytest.raises(Exception) as caught:  # noqa: PT011 - Hydra's
        load_config(PretrainConfig, "config_pretrain", ["modality=rgb", "head=knn"])
    assert "Key 'head' not in 'PretrainConfig'" in explain(caught.value, PretrainConfig)


@pytest.mark.parametrize(("key", "old"), [*RENAMED_VALUES, *REMOVED_VALUES])
def test_old_value_names_the_new_one(key: str, old: str) -> None:
    make = distill_config if key == "classifier" else pretrain_config
    own = key.replace("*", "flow")
    new = RENAMED_VALUES.get((key, old))
    rest = f"was renamed to {own}={new}" if new else f"was removed; {REMOVED_VALUES[key, old]}"
    with pytest.raises(ConfigError, match=f"^{re.escape(f'{own}={old} {rest}')}$"):
        load_config(
            DistillConfig if make is distill_config else PretrainConfig,
            "config_mmdistill" if make is distill_config else "config_pretrain",
            [f"{own}={old}", "trainer.ckpt_path=[a,b,c]" if make is distill_config else "modality=rgb"],
        )


def test_new_names_exist() -> None:
    keys = {*known_keys(PretrainConfig), *known_keys(DistillConfig), "data_module.modalities.*.input_stride"}
    assert set(RENAMED_KEYS.values()) <= keys
    assert not {*RENAMED_KEYS, *REMOVED_KEYS} & keys


def test_current_names_have_no_replacement() -> None:
    for key in ("trainer.lr", "data_module.modalities.flow.input_stride", "model", "modalities.flow.scale"):
        assert renamed_key(key) is None
        assert describe_old_key(key) is None
    assert describe_old_value("classifier", "knn") is None
    assert describe_old_value("data_module.label", "patch") is None


def old_config(**changes: Any) -> dict[str, Any]:
    """A pretraining config as the previous version stored it."""
    plain = to_plain(pretrain_config("data_module.on_missing=skip", "trainer.accumulate_grad_batches=3"))
    data, trainer, model = plain["data_module"], plain["trainer"], plain["model"]
    for section, prefix in ((plain, ""), (data, "data_module."), (trainer, "trainer.")):
        for old, new in RENAMED_KEYS.items():
            if "*" not in old and old.startswith(prefix) and new[len(prefix) :] in section:
                section[old[len(prefix) :]] = section.pop(new[len(prefix) :])
    data["readouts"] = "one"
    for name, modality in data["modalities"].items():
        modality["scale"] = modality.pop("input_stride")
        modality["target"] = {"motion_energy": "energy", "norm_pix": "patch"}.get(
            modality["target"], modality["target"]
        )
        data[{"rgb": "frames_dir"}.get(name, f"{name}_dir")] = modality.pop("dir")
        modality["sigma"] = modality["sigma"] or 0.6
        del modality["pattern"]
    del model["pos_embed"]
    model.update(name="tiny", learned_positions=False, separable_positions=True)
    plain["deepspeed"] = {"zero_stage": 0, "offload": False}
    for key, value in changes.items():
        section, _, name = key.partition("__")
        plain[section] = {**plain[section], name: value} if name else value
    return plain


def test_stored_config_of_the_previous_version_is_translated() -> None:
    before = old_config()
    assert {"missing", "flip", "views", "frames_dir"} <= set(before["data_module"])
    assert {"accumulate", "nonfinite", "picture_freq"} <= set(before["trainer"])
    config = stored_config(before, PretrainConfig)
    expected = to_plain(
        pretrain_config(
            "data_module.on_missing=skip",
            "trainer.accumulate_grad_batches=3",
            "data_module.input_modes=configured",
            "data_module.frames_dir=vid_frames_224",
            "data_module.flow_dir=tennis_flows",
            "data_module.skeleton_dir=skeletons/f3set-tennis",
            *(f"data_module.modalities.{name}.dir=null" for name in ("rgb", "flow", "skeleton")),
        )
    )
    assert to_plain(config) == expected
    assert before == old_config()  # the argument is not changed


@pytest.mark.parametrize(
    ("learned", "separable", "expected"),
    [(False, False, "sincos"), (False, True, "sincos_separable"), (True, False, "learned"), (True, True, "learned")],
)
def test_stored_position_flags_become_pos_embed(learned: bool, separable: bool, expected: str) -> None:
    plain = old_config(model__learned_positions=learned, model__separable_positions=separable)
    assert stored_config(plain, PretrainConfig).model.pos_embed == expected


@pytest.mark.parametrize(
    ("strategy", "stage", "offload", "expected"),
    [
        ("auto", 0, False, "auto"),
        ("auto", 2, False, "deepspeed_stage_2"),
        ("auto", 3, True, "deepspeed_stage_3_offload"),
        ("ddp", 0, False, "ddp"),
        ("deepspeed", 0, True, "deepspeed_stage_2_offload"),
        ("deepspeed_stage_1", 1, True, "deepspeed_stage_1_offload"),
        ("deepspeed_stage_1_offload", 1, True, "deepspeed_stage_1_offload"),
    ],
)
def test_stored_zero_stage_becomes_strategy(strategy: str, stage: int, offload: bool, expected: str) -> None:
    plain = old_config(strategy=strategy, deepspeed={"zero_stage": stage, "offload": offload})
    assert stored_config(plain, PretrainConfig).strategy == expected


def test_stored_distillation_is_translated() -> None:
    plain = to_plain(distill_config("trainer.cache_teacher_epochs=3"))
    for old in DISTILL_KEYS:
        section = plain["trainer"] if old.startswith("trainer.") else plain
        section[old.rpartition(".")[2]] = section.pop(RENAMED_KEYS[old].rpartition(".")[2])
    plain["head"] = ["logistic", "centroid_centred"]
    plain["trainer"]["ckpt_path"] = {"rgb": "a", "flow": "b", "skeleton": "c"}
    config = stored_config(plain, DistillConfig)
    assert config.classifier == ["logistic", "centroid_centered"]
    assert (config.trainer.cache_teacher_epochs, config.eval_component) == (3, "student_rgb")
    assert config.trainer.ckpt_path == {"rgb": "a", "flow": "b", "skeleton": "c"}


def test_current_stored_config_is_not_changed() -> None:
    plain = to_plain(pretrain_config())
    assert translate_stored(plain) == plain


def test_stored_value_without_replacement_raises() -> None:
    plain = old_config()
    plain["data_module"]["modalities"]["rgb"]["target"] = "centred"
    with pytest.raises(ConfigError, match=r"rgb\.target=centred was removed; use norm_pix or pixel"):
        stored_config(plain, PretrainConfig)
