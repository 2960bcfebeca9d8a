"""Validation of config values, and access to keys that take several forms. Runs before any data is read."""

import importlib.util
import itertools
import math
import re
from dataclasses import dataclass, fields
from typing import Any

from mmdistill.config.keypoints import keypoint_layout, skeleton_format, validate_keypoint_files
from mmdistill.config.rules import ConfigError, as_names, one_of
from mmdistill.config.schema import (
    PRETRAIN_STAGES,
    DataModuleConfig,
    DistillConfig,
    DistillTrainerConfig,
    PretrainConfig,
    PretrainTrainerConfig,
    Sealable,
)
from mmdistill.data.annotations.f3set import F3SET_FIELDS
from mmdistill.errors import format_count, rename_key
from mmdistill.modalities import (
    BUILTIN_MODALITIES,
    STUDENT_MODALITY,
    ModalitySpec,
    StoredHeatmaps,
    get_modality,
    modality_names,
)

COMPONENT_PREFIXES = ("teacher_", "student_")  # of the components of a distilled checkpoint
RANDOM_PREFIX = "random_"  # `random_flow`: an untrained encoder with the architecture of `teacher_flow`
SHORT_KEYS = {  # key of data_module -> (modality, key of data_module.modalities.MODALITY)
    "frames_dir": ("rgb", "dir"),
    "flow_dir": ("flow", "dir"),
    "skeleton_dir": ("skeleton", "dir"),
    "frame_pattern": ("rgb", "pattern"),
    "flow_pattern": ("flow", "pattern"),
}

SOURCE_KEYS = ("lambda_source", "lambda_target", "lambda_ce", "classifier_dropout")  # of trainer, for a source only


def _validate_multiple(key: str, value: int, divisor_key: str, divisor: int) -> None:
    if value % divisor:
        below = value // divisor * divisor
        near = f"{below} or {below + divisor}" if below else f"{divisor}"
        raise ConfigError(f"{key}={value} is not a multiple of {divisor_key}={divisor}; use {near}")


def validate(config: PretrainConfig | DistillConfig) -> None:
    """Raise `ConfigError` if a value is not allowed or two values are incompatible. The message names the keys."""
    if isinstance(config, DistillConfig) and config.strategy.startswith("deepspeed_stage_3"):
        raise ConfigError(
            f"strategy={config.strategy}: in stage 3 no process has all weights, so the checkpoint cannot be a single "
            "file; use strategy=deepspeed_stage_2"
        )
    _validate_values(config)
    if config.precision == "16" and config.accelerator == "cpu":
        raise ConfigError("precision=16 needs a GPU, and accelerator=cpu; use precision=32 or precision=bf16")
    for name in {"wandb", "mlflow"}.intersection(as_names("logger", config.logger)):
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"logger={name}: {name} is not installed; pip install {name}, or remove it from logger")
    trainer = config.trainer
    if len(trainer.betas) != 2 or not all(0 <= beta < 1 for beta in trainer.betas):
        raise ConfigError(f"trainer.betas={trainer.betas} must be two numbers in [0, 1)")
    _validate_data(config.data_module)
    if isinstance(config, PretrainConfig):
        _validate_pretrain(config)
    else:
        _validate_distill(config)


def _validate_values(config: Any, prefix: str = "") -> None:
    """Apply the rules of the schema to every value, none of which is an empty text."""
    for f in fields(config):
        key, value = prefix + f.name, getattr(config, f.name)
        if value == "":  # for example `ckpt_path=$CKPT` without the variable
            raise ConfigError(f"{key} is empty; give a value, or remove {key}=")
        for rule in f.metadata.get("rules", ()) if value is not None else ():
            rule(key, value)
        nested = value if isinstance(value, dict) else {"": value}
        for name, part in nested.items():
            if isinstance(part, Sealable):
                _validate_values(part, f"{key}.{name}." if name else f"{key}.")


def _validate_pretrain(config: PretrainConfig) -> None:
    _validate_modality("modality", config.modality, config.data_module, "use one of these")
    _validate_source(config)
    if zero_stage(config) == 3 and config.trainer.on_nonfinite == "skip":
        raise ConfigError(
            "trainer.on_nonfinite=skip does not work with ZeRO stage 3; use stage 2 or on_nonfinite=raise"
        )
    if zero_stage(config) == 3 and config.compile:
        raise ConfigError(
            "compile=true does not work with ZeRO stage 3, which gathers weights inside the encoder; "
            "use stage 2 or compile=false"
        )
    if zero_stage(config) == 3 and config.trainer.ema is not None:
        raise ConfigError(
            f"trainer.ema={config.trainer.ema} does not work with ZeRO stage 3, in which no process has all weights; "
            "use stage 2 or ema=null"
        )
    if config.pooling == "person":
        raise ConfigError("pooling=person has no effect in a pretraining; use another pooling, or pooling=null")
    model = config.model
    if model.head_dim is None and model.dim % model.heads:
        raise ConfigError(f"model.dim={model.dim} is not divisible by model.heads={model.heads}; set model.head_dim")
    if model.decoder_dim % model.decoder_heads:
        raise ConfigError(
            f"model.decoder_dim={model.decoder_dim} is not divisible by model.decoder_heads={model.decoder_heads}; "
            "change one of them"
        )


def _validate_source(config: PretrainConfig) -> None:
    """Check the source and the weights of the joint loss; see docs/method.md."""
    source, data, trainer, modality = config.source, config.data_module, config.trainer, config.modality
    if source is None:
        for name in SOURCE_KEYS:
            if (value := getattr(trainer, name)) != getattr(PretrainTrainerConfig, name):
                raise ConfigError(
                    f"trainer.{name}={value} has no effect without a source; set source=DATASET, also with an "
                    "experiment that sets this key, such as experiment=mm_cdfsl"
                )
        return
    with rename_key("data_module.", "source."):
        _validate_data(source)
        _validate_modality("source", modality, source, "choose another source or modality")
    _validate_same_clips(source, data, modality)
    if zero_stage(config) == 3:
        raise ConfigError("source does not work with ZeRO stage 3; use stage 2, or source=null")
    weights = loss_weights(config)
    if not weights.ce and (removes_no_token(data) or not weights.source):
        why = f"data_module.mask_ratio={data.mask_ratio} removes no token" if weights.source else "lambda_source is 0"
        raise ConfigError(f"trainer.lambda_ce is 0 and {why}: nothing is learned from source; set source=null")


def _validate_same_clips(source: DataModuleConfig, data: DataModuleConfig, modality: str) -> None:
    """Raise unless the clips of both datasets have the same frames, size, tokens and reconstruction target."""
    keys = ("num_frames", "crop_size", "patch_size", "tubelet")
    pairs = [(key, getattr(source, key), getattr(data, key)) for key in keys]
    specs = [modality_specs(config)[modality] for config in (source, data)]
    for key in ("input_stride", "target"):
        pairs.append((f"modalities.{modality}.{key}", *(getattr(spec, key) for spec in specs)))
    different = [(key, own, other) for key, own, other in pairs if own != other]
    if different:
        fix = " ".join(f"source.{key}={str(other).replace(' ', '')}" for key, _, other in different)
        names = ", ".join(f"{key} {own} / {other}" for key, own, other in different)
        raise ConfigError(f"source and data_module must have the same clips (source / data_module): {names}; set {fix}")
    if specs[0].channels != specs[1].channels:
        raise ConfigError(
            f"source: its {modality} has {specs[0].channels} channels, that of data_module {specs[1].channels}; choose "
            "another source"
        )


def removes_no_token(data: DataModuleConfig) -> bool:
    """Whether training masks keep all tokens. There is then nothing to reconstruct."""
    return round(data.mask_ratio * _num_mask_units(data)) == 0


@dataclass(frozen=True)
class LossWeights:
    """Weights of the terms of the joint loss: reconstruction of source and target, cross-entropy."""

    source: float
    target: float
    ce: float


def loss_weights(config: PretrainConfig) -> LossWeights:
    """The weights for the modality of a config.

    Raises:
        ConfigError: `trainer.lambda_ce` is neither a number from 0, nor a mapping with one for the modality.
    """
    trainer, modality = config.trainer, config.modality
    given = trainer.lambda_ce
    value = given.get(modality) if isinstance(given, dict) else given
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ConfigError(
            f"trainer.lambda_ce={given} must be a number from 0, or a mapping from modality to number with an entry "
            f"{modality}"
        )
    return LossWeights(trainer.lambda_source, trainer.lambda_target, float(value))


def zero_stage(config: PretrainConfig) -> int:
    """ZeRO stage that the `strategy` of a pretraining selects."""
    return PRETRAIN_STAGES[config.strategy]


def has_offload(config: PretrainConfig | DistillConfig) -> bool:
    """Whether the optimizer state is kept in host memory."""
    return config.strategy.endswith("_offload")


def _validate_modality(key: str, modality: str, data: DataModuleConfig, fix: str) -> None:
    if modality not in data.modalities:
        raise ConfigError(
            f"{key}: dataset {data.name} has no {modality}, but {', '.join(data.modalities)}; {fix}, or "
            f"add data_module.modalities.{modality} to the dataset's config"
        )


def _validate_distill(config: DistillConfig) -> None:
    trainer, modalities = config.trainer, config.data_module.modalities
    every, saved = trainer.check_val_every_n_epoch, trainer.save_ckpt_freq
    if trainer.monitor == "val_top1_action" and (not every or saved % every):
        raise ConfigError(
            f"trainer.monitor=val_top1_action needs a validation in each epoch that is saved: "
            f"trainer.check_val_every_n_epoch={every} must divide trainer.save_ckpt_freq={saved}"
        )
    teacher_weights(trainer)
    if config.train and config.pooling == "person":
        if "skeleton" not in trainer.teachers:
            raise ConfigError("pooling=person needs skeletons; add skeleton to trainer.teachers")
        if trainer.cache_teacher_epochs:
            raise ConfigError(
                f"pooling=person reads skeletons in each epoch, and trainer.cache_teacher_epochs="
                f"{trainer.cache_teacher_epochs} does not; set trainer.cache_teacher_epochs=0"
            )
    if config.test:
        _validate_components(config)
    if config.train:
        if STUDENT_MODALITY not in trainer.teachers and config.student is None and config.resume is None:
            raise ConfigError(
                "trainer.teachers must contain rgb, because the student starts as a copy of the RGB teacher; or set "
                "student"
            )
        _validate_teacher_names(config)
        fix = f"set trainer.teachers=[{','.join(teacher for teacher in trainer.teachers if teacher in modalities)}]"
        for teacher in set(trainer.teachers).intersection(modality_names()):
            _validate_modality("trainer.teachers", teacher, config.data_module, fix)
        if config.resume is None or trainer.ckpt_path is not None:  # a resumed checkpoint may contain the teachers
            teacher_paths(trainer)
    elif config.test and config.ckpt_path is None:
        raise ConfigError("train=False test=True needs ckpt_path=PATH, the checkpoint to evaluate")


def _validate_teacher_names(config: DistillConfig) -> None:
    """Raise unless each teacher is a modality or a file of features, which a resumed checkpoint may name."""
    trainer, key = config.trainer, "trainer.teachers"
    if not trainer.teachers or len(set(trainer.teachers)) != len(trainer.teachers):
        raise ConfigError(f"{key}={trainer.teachers} must contain at least one teacher, and each of them once")
    files = feature_files(trainer)
    for name in files:
        if name in modality_names():
            raise ConfigError(
                f"trainer.ckpt_path.{name}: {name} is a modality; choose another name for a file of features"
            )
        if not re.fullmatch(r"[A-Za-z]\w*", name, re.ASCII):
            raise ConfigError(f"trainer.ckpt_path.{name}: use letters, digits and _ for the name of a teacher")
        if name not in trainer.teachers:
            raise ConfigError(f"trainer.ckpt_path.{name}: add {name} to {key}={trainer.teachers}, or remove the file")
    is_stored = config.resume is not None and trainer.ckpt_path is None
    for name in trainer.teachers if not is_stored else ():
        try:
            one_of(*files, more=modality_names)(key, name)
        except ConfigError as error:
            path = trainer.ckpt_path.get(name) if isinstance(trainer.ckpt_path, dict) else None
            if path is None:
                raise
            hint = f"; for a file of features write trainer.ckpt_path={{{name}:{{file:{path}}}}}"
            raise ConfigError(f"{error}{hint}") from error


def baseline_component(entry: str) -> str | None:
    """The component of the checkpoint that an entry of `baselines` needs; None for `random` and for a path."""
    if entry.startswith(RANDOM_PREFIX):
        return f"teacher_{entry.removeprefix(RANDOM_PREFIX)}"
    return entry if entry.startswith(COMPONENT_PREFIXES) else None


def _validate_components(config: DistillConfig) -> None:
    """The name of an evaluated component ends with its modality: ``student_rgb``, ``pretrained_skeleton``."""
    scored = [] if config.eval_component in ("encoder", "encoder_ema") else [("eval_component", config.eval_component)]
    baselines = [("baselines", name) for name in config.baselines if baseline_component(name)]
    for key, component in (*scored, *baselines):
        if component.rpartition("_")[2] not in modality_names():
            raise ConfigError(
                f"{key}={component}: a component's name ends with its modality, like student_rgb, teacher_flow"
                f"{', or random_flow for an untrained encoder' if key == 'baselines' else ''}"
            )


def _validate_data(data: DataModuleConfig) -> None:
    key = "data_module."
    if data.label_fields == []:
        raise ConfigError(f"{key}label_fields=[] selects no field; use null for all of {', '.join(F3SET_FIELDS)}")
    for name, size in (("frame_size", data.frame_size), ("crop_size", data.crop_size)):
        if len(size) != 2:
            raise ConfigError(f"{key}{name}={size} must be [height, width] in px")
    for axis, (frame, crop) in enumerate(zip(data.frame_size, data.crop_size, strict=True)):
        if crop > frame and data.resize == "crop":
            raise ConfigError(
                f"{key}crop_size[{axis}]={crop} is larger than frame_size[{axis}]={frame}; use at most {frame}"
            )
        _validate_multiple(f"{key}crop_size[{axis}]", crop, "patch_size", data.patch_size)
    _validate_multiple(key + "num_frames", data.num_frames, "tubelet", data.tubelet)
    modality_specs(data)
    for name in dict.fromkeys(("skeleton", *(m for m in data.modalities if get_modality(m).keypoints is not None))):
        skeleton_format(data, name)
    if data.flow_bound is not None and modality_setting(data, "flow", "pattern") is None:
        raise ConfigError(f"{key}flow_bound={data.flow_bound} needs {key}flow_pattern with {{axis}}")
    for name in dict.fromkeys((*data.modalities, *(modality for modality, _ in SHORT_KEYS.values()))):
        _validate_pattern(data, name)
    _validate_visible_tokens(key + "mask_ratio", data.mask_ratio, data)
    if data.n_masks and data.mask_type == "motion" and data.eval_masks == "shared":
        raise ConfigError(
            f"{key}eval_masks=shared gives all clips the same mask, and one of mask_type=motion depends on the clip; "
            f"use {key}eval_masks=per_clip"
        )
    if data.n_masks:
        _validate_visible_tokens(key + "eval_mask_ratio", data.eval_mask_ratio, data)


def _validate_pattern(data: DataModuleConfig, modality: str) -> None:
    """Raise if the file name pattern of a modality gives two frames or two videos the same file."""
    pattern, fields = modality_setting(data, modality, "pattern"), get_modality(modality).pattern_fields
    if get_modality(modality).keypoints is not None and modality in data.modalities:
        fields = validate_keypoint_files(data.modalities[modality], modality)
    if pattern is None or not fields:
        return
    optional = dict.fromkeys(get_modality(modality).optional_pattern_fields, "x")
    try:
        files = {pattern.format(video=video, frame=frame, **optional) for video in "ab" for frame in (1, 2)}
    except (KeyError, IndexError, ValueError, AttributeError, TypeError):
        files = set()
    if len(files) < 2 ** len(fields):
        names = " and ".join(f"{{{field}}}" for field in fields)
        raise ConfigError(
            f"data_module.{modality_setting_key(data, modality, 'pattern')}={pattern!r} must contain {names}; "
            "see configs/dataset for examples"
        )
    if "axis" in optional and ("{axis}" in pattern) != (data.flow_bound is not None):
        raise ConfigError(
            f"data_module.flow_bound={data.flow_bound}, and the file name of flow is {pattern!r}: flow in pairs of "
            "images needs a file name with {axis} and flow_bound, the displacement in px of gray 255; .npy files need "
            "neither"
        )


def _validate_visible_tokens(key: str, ratio: float, data: DataModuleConfig) -> None:
    """Raise if a mask removes all tokens. A tube mask removes spatial positions, a random mask single tokens."""
    tokens = _num_mask_units(data)
    if round(ratio * tokens) == tokens:
        raise ConfigError(f"{key}={ratio} leaves none of {format_count(tokens, 'token')} visible; use a smaller ratio")


def _num_mask_units(data: DataModuleConfig) -> int:
    """Number of positions (tube mask) or tokens (other masks) from which a mask removes a fraction."""
    positions = (data.crop_size[0] // data.patch_size) * (data.crop_size[1] // data.patch_size)
    return positions * (1 if data.mask_type == "tube" else data.num_frames // data.tubelet)


def modality_specs(data: DataModuleConfig) -> dict[str, ModalitySpec]:
    """Specs of the dataset's modalities. Raises `ConfigError` if a value of a modality is not allowed."""
    specs = {}
    for name, m in data.modalities.items():
        key = f"data_module.modalities.{name}"
        if data.patch_size % m.input_stride or any(size % m.input_stride for size in data.crop_size):
            raise ConfigError(
                f"{key}.input_stride={m.input_stride} must divide data_module.patch_size={data.patch_size} and "
                f"data_module.crop_size={data.crop_size}"
            )
        modality, layout = get_modality(name), keypoint_layout(data, name)
        changes: dict[str, Any] = {"sigma": modality.sigma if m.sigma is None else m.sigma, "compensate": m.compensate}
        if layout is not None:
            changes |= {"keypoints": layout, "channels": len(layout.channel_names)}
        if m.heatmap_size is not None:
            size, frame_size = ((height, width) for height, width in (m.heatmap_size, data.frame_size))
            changes |= {"heatmaps": StoredHeatmaps(size, frame_size), "sigma": None}
        try:
            specs[name] = modality.spec(
                input_stride=m.input_stride, mean=tuple(m.mean), std=tuple(m.std), target=m.target, **changes
            )
        except ValueError as error:
            raise ConfigError(f"data_module.modalities.{error}") from error
    return specs


def modality_setting(data: DataModuleConfig, modality: str, key: str) -> str | None:
    """Value of ``dir`` or ``pattern`` of a modality; None if it is not set.

    The short key, such as `data_module.flow_dir`, takes precedence over `data_module.modalities.flow.dir`: a dataset
    config usually sets the latter, and a command line the former.
    """
    short = modality_setting_key(data, modality, key)
    if short in SHORT_KEYS:
        return str(getattr(data, short))
    return getattr(data.modalities[modality], key) if modality in data.modalities else None


def modality_setting_key(data: DataModuleConfig, modality: str, key: str) -> str:
    """The key of `data_module` that `modality_setting` reads, for messages: the short key if it is set."""
    for short, target in SHORT_KEYS.items():
        if target == (modality, key) and getattr(data, short) is not None:
            return short
    return f"modalities.{modality}.{key}"


def feature_files(trainer: DistillTrainerConfig) -> dict[str, str]:
    """Path of each file of features, by the name of the teacher.

    Raises:
        ConfigError: an entry of `trainer.ckpt_path` is a mapping without the only key ``file``.
    """
    given, files = trainer.ckpt_path, {}
    for name, entry in given.items() if isinstance(given, dict) else ():
        if isinstance(entry, dict):
            if set(entry) != {"file"} or not isinstance(entry["file"], str):
                raise ConfigError(
                    f"trainer.ckpt_path.{name}={entry} must be the path of a checkpoint, or {{file: PATH}} for a file "
                    "of features"
                )
            files[str(name)] = entry["file"]
    return files


def teacher_paths(trainer: DistillTrainerConfig) -> dict[str, str]:
    """Checkpoint of each teacher that is a network, by modality.

    Raises:
        ConfigError: `trainer.ckpt_path` is neither a mapping with an entry for each teacher, nor a list of one path per
            teacher or per modality, in the order of `modality_names`.
    """
    given, names, files = trainer.ckpt_path, modality_names(), feature_files(trainer)
    required = [m for m in names if m in trainer.teachers]
    rule = (
        f"trainer.ckpt_path must name a checkpoint for each of {', '.join(required)}: "
        "a list in this order, or a mapping"
    )
    if isinstance(given, dict):
        unknown = set(given) - set(names) - set(files)
        if unknown or any(m not in given for m in required):
            raise ConfigError(f"{rule}; got the keys {', '.join(map(str, given))}")
        return {m: str(given[m]) for m in required}
    if isinstance(given, list | tuple):
        if len(given) == len(required):
            return dict(zip(required, map(str, given), strict=True))
        if len(BUILTIN_MODALITIES) <= len(given) <= len(names) and set(required) <= set(names[: len(given)]):
            return {m: str(given[names.index(m)]) for m in required}
    fewer = ""
    if isinstance(given, list | tuple) and 1 <= len(given) < len(required):
        subsets = [m for m in itertools.combinations(required, len(given)) if STUDENT_MODALITY in m]
        examples = " or ".join(f"trainer.teachers=[{','.join(subset)}]" for subset in subsets)
        fewer = f" For {format_count(len(given), 'teacher')} set {examples}."
    raise ConfigError(f"{rule}; got {given!r}.{fewer} `mmdistill find-checkpoints output` prints a list to copy")


def teacher_weights(trainer: DistillTrainerConfig) -> dict[str, float]:
    """The factor of each teacher's loss, by teacher.

    Raises:
        ConfigError: `trainer.teacher_weights` is no mapping from teachers to finite numbers of at least 0, or all
            weights are 0.
    """
    key, given = "trainer.teacher_weights", trainer.teacher_weights or {}
    if not isinstance(given, dict):
        raise ConfigError(f"{key}={given} must be a mapping from teachers to numbers, for example {{flow: 2}}")
    for name, weight in given.items():
        if name not in trainer.teachers:
            raise ConfigError(f"{key}.{name}: there is no teacher {name}, only {', '.join(trainer.teachers)}")
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < math.inf:
            raise ConfigError(f"{key}.{name}={weight} must be a finite number of at least 0")
    weights = {name: float(given.get(name, 1.0)) for name in trainer.teachers}
    if not any(weights.values()):
        raise ConfigError(f"{key}={given}: all weights are 0, so the student learns nothing; raise one")
    return weights
