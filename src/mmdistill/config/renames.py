"""Keys and values of earlier versions, and what replaces them.

An old name in a command or a YAML file raises an error that gives the new one. The config that an old checkpoint stores
is translated.
"""

import re
from collections.abc import Iterator
from typing import Any

# Old dotted key -> new dotted key. ``*`` is the name of a modality.
RENAMED_KEYS = {
    "compare": "baselines",
    "head": "classifier",
    "network": "eval_component",
    "pretrain": "init_from",
    "process_timeout_s": "distributed_timeout_s",
    "data_module.first_number": "data_module.frame_number_offset",
    "data_module.flip": "data_module.hflip_prob",
    "data_module.min_scale": "data_module.random_crop_min_scale",
    "data_module.missing": "data_module.on_missing",
    "data_module.readouts": "data_module.input_modes",
    "data_module.views": "data_module.eval_masks",
    "data_module.modalities.*.scale": "data_module.modalities.*.input_stride",
    "trainer.accumulate": "trainer.accumulate_grad_batches",
    "trainer.nonfinite": "trainer.on_nonfinite",
    "trainer.nonfinite_budget": "trainer.max_skipped_steps",
    "trainer.picture_freq": "trainer.image_every_n_epochs",
    "trainer.teacher_cache": "trainer.cache_teacher_epochs",
}
_USE_STRATEGY = "use strategy=deepspeed_stage_N or strategy=deepspeed_stage_N_offload"
# Old dotted key, or group of config files -> what to do instead.
REMOVED_KEYS = {
    "deepspeed": _USE_STRATEGY,
    "deepspeed.offload": _USE_STRATEGY,
    "deepspeed.zero_stage": _USE_STRATEGY,
    "model.learned_positions": "use model.pos_embed=learned",
    "model.name": "delete it; it had no effect",
    "model.separable_positions": "use model.pos_embed=sincos_separable",
}
# (dotted key, old value) -> new value
RENAMED_VALUES = {
    ("classifier", "centroid_centred"): "centroid_centered",
    ("data_module.input_modes", "one"): "configured",
    ("data_module.modalities.*.target", "energy"): "motion_energy",
    ("data_module.modalities.*.target", "patch"): "norm_pix",
}
# (dotted key, old value) -> what to do instead
REMOVED_VALUES = {("data_module.modalities.*.target", "centred"): "use norm_pix or pixel"}

_MODALITY = re.compile(r"^data_module\.modalities\.([^.]+)\.")


def _general(key: str) -> str:
    """`key` with ``*`` in place of the modality's name."""
    return _MODALITY.sub("data_module.modalities.*.", key)


def renamed_key(key: str) -> str | None:
    """The new dotted key of an old one; None if `key` was not renamed."""
    new = RENAMED_KEYS.get(_general(key))
    modality = _MODALITY.match(key)
    return new.replace("*", modality[1]) if new is not None and modality is not None else new


def describe_old_key(key: str) -> str | None:
    """What replaces an old dotted key, as a sentence; None if `key` is no old key."""
    new = renamed_key(key)
    if new is not None:
        return f"{key} was renamed to {new}"
    removed = next((old for old in (key, key.split(".")[0]) if old in REMOVED_KEYS), None)
    return None if removed is None else f"{key} was removed; {REMOVED_KEYS[removed]}"


def describe_old_value(key: str, value: object) -> str | None:
    """What replaces an old value of a key, as a sentence; None if `value` is no old value."""
    pair = (_general(key), value)
    if pair in RENAMED_VALUES:
        return f"{key}={value} was renamed to {key}={RENAMED_VALUES[pair]}"
    return f"{key}={value} was removed; {REMOVED_VALUES[pair]}" if pair in REMOVED_VALUES else None


def translate_stored(plain: dict[str, Any]) -> dict[str, Any]:
    """A stored config with the keys and values of this version.

    Args:
        plain: builtin containers, as `mmdistill.config.to_plain` returns them. It is not changed.
    """
    modalities = plain.get("data_module", {}).get("modalities", {})
    without_effect = {  # every modality had a value of sigma
        f"data_module.modalities.{m}.sigma" for m in ("rgb", "flow") if "scale" in modalities.get(m, {})
    }
    flat = {renamed_key(key) or key: value for key, value in _leaves(plain) if key not in without_effect}
    removed = {key: flat.pop(key) for key in REMOVED_KEYS if key in flat}
    translated = {key: _translate_value(key, value) for key, value in flat.items()}
    nested: dict[str, Any] = {}
    for key, value in (translated | _replacements(translated, removed)).items():
        node = nested
        *parents, last = key.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return nested


def _leaves(plain: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of nested dictionaries. A dictionary with keys of its own, such as `ckpt_path`, stays."""
    for name, value in plain.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and not key.endswith(".ckpt_path"):
            yield from _leaves(value, f"{key}.")
        else:
            yield key, value


def _translate_value(key: str, value: Any) -> Any:
    if isinstance(value, list):
        return [_translate_value(key, element) for element in value]
    return RENAMED_VALUES.get((_general(key), value), value) if isinstance(value, str) else value


def _replacements(config: dict[str, Any], removed: dict[str, Any]) -> dict[str, Any]:
    """The dotted keys and values that replace removed keys."""
    found: dict[str, Any] = {}
    for key, pos_embed in (("learned_positions", "learned"), ("separable_positions", "sincos_separable")):
        if removed.get(f"model.{key}"):
            found.setdefault("model.pos_embed", pos_embed)
    if "deepspeed.zero_stage" in removed:
        strategy, stage = config.get("strategy", "auto"), removed["deepspeed.zero_stage"]
        if strategy == "auto" and stage:
            strategy = f"deepspeed_stage_{stage}"
        if removed.get("deepspeed.offload") and not strategy.endswith("_offload"):
            strategy = "deepspeed_stage_2_offload" if strategy == "deepspeed" else f"{strategy}_offload"
        found["strategy"] = strategy
    return found
