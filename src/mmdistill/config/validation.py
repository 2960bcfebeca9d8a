"""Validation of config values, and access to keys that take several forms. Runs before any data is read."""

import importlib.util
import itertools
import signal
from collections.abc import Sequence
from typing import Any

from mmdistill.config.renames import describe_old_value
from mmdistill.config.schema import (
    ConfigError,
    DataModuleConfig,
    DistillConfig,
    DistillTrainerConfig,
    PretrainConfig,
    TrainerConfig,
)
from mmdistill.data.annotations import ANNOTATION_FORMATS
from mmdistill.data.annotations.f3set import F3SET_FIELDS
from mmdistill.errors import format_count, suggest_nearest
from mmdistill.modalities import BUILTIN_MODALITIES, STUDENT_MODALITY, ModalitySpec, get_modality, modality_names
from mmdistill.models import TARGETS
from mmdistill.plugins import entry_point_names

CLASSIFIER_NAMES = (
    "logistic", "logistic_l2", "knn", "knn_euclidean",
    "centroid", "centroid_centered", "centroid_euclidean", "centroid_l2", "centroid_cl2",
)  # fmt: skip
COMPONENT_PREFIXES = ("teacher_", "student_")  # of the components of a distilled checkpoint
DEEPSPEED_STAGES = {
    "deepspeed": 2,
    "deepspeed_stage_0": 0,
    "deepspeed_stage_1": 1,
    "deepspeed_stage_2": 2,
    "deepspeed_stage_1_offload": 1,
    "deepspeed_stage_2_offload": 2,
}  # strategy -> ZeRO stage
PRETRAIN_STAGES = {
    "auto": 0,
    "ddp": 0,
    **DEEPSPEED_STAGES,
    "deepspeed_stage_3": 3,
    "deepspeed_stage_3_offload": 3,
}
POS_EMBEDS = ("sincos", "sincos_separable", "learned")
SHORT_KEYS = {  # key of data_module -> (modality, key of data_module.modalities.MODALITY)
    "frames_dir": ("rgb", "dir"),
    "flow_dir": ("flow", "dir"),
    "skeleton_dir": ("skeleton", "dir"),
    "frame_pattern": ("rgb", "pattern"),
    "flow_pattern": ("flow", "pattern"),
}


def _validate_choice(key: str, value: object, allowed: Sequence[object]) -> None:
    if value not in allowed:
        if old := describe_old_value(key, value):
            raise ConfigError(old)
        listed = ", ".join(map(str, allowed))
        raise ConfigError(f"{key}={value} is not one of {listed}{suggest_nearest(str(value), allowed)}")


def _validate_minimum(key: str, value: float, minimum: float) -> None:
    if value < minimum:
        raise ConfigError(f"{key}={value} must be at least {minimum}")


def _validate_fraction(key: str, value: float, *, below_one: bool = False) -> None:
    if not 0 <= value <= 1 or (below_one and value == 1):
        raise ConfigError(f"{key}={value} must lie in [0, 1{')' if below_one else ']'}")


def _validate_multiple(key: str, value: int, divisor_key: str, divisor: int) -> None:
    if value % divisor:
        below = value // divisor * divisor
        near = f"{below} or {below + divisor}" if below else f"{divisor}"
        raise ConfigError(f"{key}={value} is not a multiple of {divisor_key}={divisor}; use {near}")


def validate(config: PretrainConfig | DistillConfig) -> None:
    """Raise `ConfigError` if a value is not allowed or two values are incompatible. The message names the keys."""
    _validate_choice("accelerator", config.accelerator, ("auto", "cpu", "gpu"))
    _validate_choice("precision", config.precision, ("auto", "32", "bf16", "16"))
    if config.precision == "16" and config.accelerator == "cpu":
        raise ConfigError("precision=16 needs a GPU, and accelerator=cpu; use precision=32 or precision=bf16")
    _validate_minimum("seed", config.seed, 0)
    _validate_minimum("batch_size", config.batch_size, 1)
    _validate_minimum("num_workers", config.num_workers, 0)
    _validate_minimum("distributed_timeout_s", config.distributed_timeout_s, 1)
    _validate_minimum("loader_timeout_s", config.loader_timeout_s, 0)
    for name in config.stop_signals:
        _validate_choice("stop_signals", name, [s.name for s in signal.Signals if s.name not in ("SIGKILL", "SIGSTOP")])
    for name in as_names("logger", config.logger):
        _validate_choice("logger", name, ("tensorboard", "csv", "wandb", "mlflow"))
        if name in ("wandb", "mlflow") and importlib.util.find_spec(name) is None:
            raise ConfigError(f"logger={name}: {name} is not installed; pip install {name}, or remove it from logger")
    _validate_data(config.data_module)
    _validate_trainer(config.trainer)
    if isinstance(config, PretrainConfig):
        _validate_pretrain(config)
    else:
        _validate_distill(config)


def _validate_trainer(trainer: TrainerConfig) -> None:
    for key in ("epochs", "accumulate_grad_batches", "save_ckpt_freq"):
        _validate_minimum(f"trainer.{key}", getattr(trainer, key), 1)
    for key in ("lr", "min_lr", "warmup_lr", "warmup_epochs", "weight_decay"):
        _validate_minimum(f"trainer.{key}", getattr(trainer, key), 0)
    if trainer.keep_last is not None:
        _validate_minimum("trainer.keep_last", trainer.keep_last, 1)
    if trainer.save_top_k is not None:
        _validate_minimum("trainer.save_top_k", trainer.save_top_k, -1)
    _validate_choice("trainer.on_nonfinite", trainer.on_nonfinite, ("raise", "skip"))
    _validate_minimum("trainer.max_skipped_steps", trainer.max_skipped_steps, 0)
    if trainer.layer_decay is not None and not 0 < trainer.layer_decay <= 1:
        raise ConfigError(
            f"trainer.layer_decay={trainer.layer_decay} must lie in (0, 1]; use null for one learning rate"
        )
    if len(trainer.betas) != 2 or not all(0 <= beta < 1 for beta in trainer.betas):
        raise ConfigError(f"trainer.betas={trainer.betas} must be two numbers in [0, 1)")
    if trainer.clip_grad is not None and trainer.clip_grad <= 0:
        raise ConfigError(f"trainer.clip_grad={trainer.clip_grad} must be positive; use null for no clipping")


def _validate_pretrain(config: PretrainConfig) -> None:
    _validate_choice("modality", config.modality, modality_names())
    _validate_modality("modality", config.modality, config.data_module, "use one of these")
    _validate_minimum("trainer.image_every_n_epochs", config.trainer.image_every_n_epochs, 0)
    _validate_choice("strategy", config.strategy, tuple(PRETRAIN_STAGES))
    _validate_choice("model.pos_embed", config.model.pos_embed, POS_EMBEDS)
    if zero_stage(config) == 3 and config.trainer.on_nonfinite == "skip":
        raise ConfigError(
            "trainer.on_nonfinite=skip does not work with ZeRO stage 3; use stage 2 or on_nonfinite=raise"
        )
    if zero_stage(config) == 3 and config.compile:
        raise ConfigError(
            "compile=true does not work with ZeRO stage 3, which gathers weights inside the encoder; "
            "use stage 2 or compile=false"
        )
    _validate_fraction("decoder_mask_ratio", config.decoder_mask_ratio, below_one=True)
    model = config.model
    if model.head_dim is None and model.dim % model.heads:
        raise ConfigError(f"model.dim={model.dim} is not divisible by model.heads={model.heads}; set model.head_dim")
    if model.decoder_dim % model.decoder_heads:
        raise ConfigError(
            f"model.decoder_dim={model.decoder_dim} is not divisible by model.decoder_heads={model.decoder_heads}; "
            "change one of them"
        )


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
    if config.strategy.startswith("deepspeed_stage_3"):
        raise ConfigError(
            f"strategy={config.strategy}: in stage 3 no process has all weights, so the checkpoint cannot be a single "
            "file; use strategy=deepspeed_stage_2"
        )
    _validate_choice("strategy", config.strategy, ("auto", "ddp", *DEEPSPEED_STAGES))
    _validate_minimum("trainer.check_val_every_n_epoch", config.trainer.check_val_every_n_epoch or 0, 0)
    _validate_minimum("trainer.val_episodes", config.trainer.val_episodes, 2)
    _validate_choice("trainer.monitor", config.trainer.monitor, ("train_loss", "val_top1_action"))
    every, saved = config.trainer.check_val_every_n_epoch, config.trainer.save_ckpt_freq
    if config.trainer.monitor == "val_top1_action" and (not every or saved % every):
        raise ConfigError(
            f"trainer.monitor=val_top1_action needs a validation in each epoch that is saved: "
            f"trainer.check_val_every_n_epoch={every} must divide trainer.save_ckpt_freq={saved}"
        )
    if config.trainer.ema is not None and not 0 <= config.trainer.ema < 1:
        raise ConfigError(f"trainer.ema={config.trainer.ema} must lie in [0, 1); use null for no average")
    _validate_minimum("trainer.cache_teacher_epochs", config.trainer.cache_teacher_epochs, 0)
    for teacher in config.trainer.teachers:
        _validate_choice("trainer.teachers", teacher, modality_names())
    if STUDENT_MODALITY not in config.trainer.teachers:
        raise ConfigError("trainer.teachers must contain rgb, because the student starts as a copy of the RGB teacher")
    if config.train:
        available = [teacher for teacher in config.trainer.teachers if teacher in config.data_module.modalities]
        fix = f"set trainer.teachers=[{','.join(available)}]"
        for teacher in config.trainer.teachers:
            _validate_modality("trainer.teachers", teacher, config.data_module, fix)
    for name in as_names("classifier", config.classifier):
        _validate_choice("classifier", name, (*CLASSIFIER_NAMES, *entry_point_names("mmdistill.classifiers")))
    if config.test:
        _validate_components(config)
    teachers_in_checkpoint = config.resume is not None and config.trainer.ckpt_path is None
    if config.train and not teachers_in_checkpoint:
        teacher_paths(config.trainer)
    elif not config.train and config.test and config.ckpt_path is None:
        raise ConfigError("train=False test=True needs ckpt_path=PATH, the checkpoint to evaluate")


def _validate_components(config: DistillConfig) -> None:
    """The name of an evaluated component ends with its modality: ``student_rgb``, ``pretrained_skeleton``."""
    scored = [] if config.eval_component == "encoder" else [("eval_component", config.eval_component)]
    baselines = [("baselines", name) for name in config.baselines if name.startswith(COMPONENT_PREFIXES)]
    for key, component in (*scored, *baselines):
        if component.rpartition("_")[2] not in modality_names():
            raise ConfigError(
                f"{key}={component}: a component's name ends with its modality, like student_rgb, teacher_flow"
            )


def _validate_data(data: DataModuleConfig) -> None:
    key = "data_module."
    _validate_choice(key + "train_clips", data.train_clips, ("windows", "events", "first"))
    _validate_choice(key + "eval_clips", data.eval_clips, ("events", "first", "windows"))
    _validate_choice(key + "clip_anchor", data.clip_anchor, ("start", "center"))
    _validate_choice(key + "on_missing", data.on_missing, ("error", "repeat", "skip"))
    _validate_choice(key + "mask_type", data.mask_type, ("tube", "random"))
    _validate_choice(key + "eval_masks", data.eval_masks, ("shared", "per_clip"))
    _validate_choice(key + "input_modes", data.input_modes, ("all", "configured"))
    _validate_choice(key + "label", data.label, ("event", "video"))
    _validate_choice(key + "annotations", data.annotations, ANNOTATION_FORMATS.names())
    if data.label_fields is not None:
        for name in data.label_fields:
            _validate_choice(key + "label_fields", name, F3SET_FIELDS)
        if not data.label_fields:
            raise ConfigError(f"{key}label_fields=[] selects no field; use null for all of {', '.join(F3SET_FIELDS)}")
    if data.disjoint is not None:
        _validate_choice(key + "disjoint", data.disjoint, ("video",))
    _validate_fraction(key + "mask_ratio", data.mask_ratio, below_one=True)
    _validate_fraction(key + "eval_mask_ratio", data.eval_mask_ratio, below_one=True)
    _validate_fraction(key + "hflip_prob", data.hflip_prob)
    for name in ("num_frames", "sampling_rate", "max_persons", "q_sample", "tubelet", "patch_size"):
        _validate_minimum(key + name, getattr(data, name), 1)
    if data.window_stride is not None:
        _validate_minimum(key + "window_stride", data.window_stride, 1)
    _validate_minimum(key + "frame_number_offset", data.frame_number_offset, 0)
    if not 0 < data.random_crop_min_scale <= 1:
        raise ConfigError(f"{key}random_crop_min_scale={data.random_crop_min_scale} must lie in (0, 1]")
    for name, minimum in (("n_way", 2), ("k_shot", 1)):
        for value in as_ints(key + name, getattr(data, name)):
            _validate_minimum(key + name, value, minimum)
    _validate_minimum(key + "episodes", data.episodes, 2)  # a standard error needs two
    _validate_minimum(key + "n_masks", data.n_masks, 0)
    for name in ("frame_size", "crop_size"):
        if len(getattr(data, name)) != 2:
            raise ConfigError(f"{key}{name}={getattr(data, name)} must be [height, width] in px")
    for axis, (frame, crop) in enumerate(zip(data.frame_size, data.crop_size, strict=True)):
        if crop > frame:
            raise ConfigError(
                f"{key}crop_size[{axis}]={crop} is larger than frame_size[{axis}]={frame}; use at most {frame}"
            )
        _validate_multiple(f"{key}crop_size[{axis}]", crop, "patch_size", data.patch_size)
    _validate_multiple(key + "num_frames", data.num_frames, "tubelet", data.tubelet)
    for name in data.modalities:
        _validate_choice(key + "modalities", name, modality_names())
    modality_specs(data)
    for name in dict.fromkeys((*data.modalities, *(modality for modality, _ in SHORT_KEYS.values()))):
        _validate_pattern(data, name)
    _validate_visible_tokens(key + "mask_ratio", data.mask_ratio, data)
    if data.n_masks:
        _validate_visible_tokens(key + "eval_mask_ratio", data.eval_mask_ratio, data)


def _validate_pattern(data: DataModuleConfig, modality: str) -> None:
    """Raise if the file name pattern of a modality gives two frames or two videos the same file."""
    pattern, fields = modality_setting(data, modality, "pattern"), get_modality(modality).pattern_fields
    if pattern is None or not fields:
        return
    try:
        files = {pattern.format(video=video, frame=frame) for video in "ab" for frame in (1, 2)}
    except (KeyError, IndexError, ValueError, AttributeError, TypeError):
        files = set()
    if len(files) < 2 ** len(fields):
        names = " and ".join(f"{{{field}}}" for field in fields)
        raise ConfigError(
            f"data_module.{modality_setting_key(data, modality, 'pattern')}={pattern!r} must contain {names}; "
            "see configs/dataset for examples"
        )


def _validate_visible_tokens(key: str, ratio: float, data: DataModuleConfig) -> None:
    """Raise if a mask removes all tokens. A tube mask removes spatial positions, a random mask single tokens."""
    tokens = (data.crop_size[0] // data.patch_size) * (data.crop_size[1] // data.patch_size)
    if data.mask_type == "random":
        tokens *= data.num_frames // data.tubelet
    if round(ratio * tokens) == tokens:
        raise ConfigError(f"{key}={ratio} leaves none of {format_count(tokens, 'token')} visible; use a smaller ratio")


def modality_specs(data: DataModuleConfig) -> dict[str, ModalitySpec]:
    """Specs of the dataset's modalities. Raises `ConfigError` if a value of a modality is not allowed."""
    specs = {}
    for name, m in data.modalities.items():
        key = f"data_module.modalities.{name}"
        _validate_minimum(f"{key}.input_stride", m.input_stride, 1)
        _validate_choice(f"{key}.target", m.target, TARGETS)
        if m.sigma is not None and m.sigma <= 0:
            raise ConfigError(f"{key}.sigma={m.sigma} must be positive; use null for the modality's default")
        if data.patch_size % m.input_stride or any(size % m.input_stride for size in data.crop_size):
            raise ConfigError(
                f"{key}.input_stride={m.input_stride} must divide data_module.patch_size={data.patch_size} and "
                f"data_module.crop_size={data.crop_size}"
            )
        modality = get_modality(name)
        try:
            specs[name] = modality.spec(
                input_stride=m.input_stride,
                mean=tuple(m.mean),
                std=tuple(m.std),
                target=m.target,
                sigma=modality.sigma if m.sigma is None else m.sigma,
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


def as_ints(key: str, value: Any) -> list[int]:
    """A value that is a whole number or a list of them, as a list. Raises `ConfigError`, naming `key`, for others."""
    values = value if isinstance(value, list | tuple) else [value]
    if not values or any(isinstance(v, bool) or not isinstance(v, int) for v in values):
        raise ConfigError(f"{key}={value} must be a whole number or a list of whole numbers")
    return list(values)


def as_names(key: str, value: Any) -> list[str]:
    """A value that is a name or a list of them, as a list. Raises `ConfigError`, naming `key`, for others."""
    values = value if isinstance(value, list | tuple) else [value]
    if not values or any(not isinstance(v, str) for v in values):
        raise ConfigError(f"{key}={value} must be a name or a list of names")
    return list(values)


def teacher_paths(trainer: DistillTrainerConfig) -> dict[str, str]:
    """Checkpoint of each teacher, by modality.

    Raises:
        ConfigError: `trainer.ckpt_path` is neither a mapping with an entry for each teacher, nor a list of one path per
            teacher or per modality, in the order of `modality_names`.
    """
    given, names = trainer.ckpt_path, modality_names()
    required = [m for m in names if m in trainer.teachers]
    rule = (
        f"trainer.ckpt_path must name a checkpoint for each of {', '.join(required)}: "
        "a list in this order, or a mapping"
    )
    if isinstance(given, dict):
        unknown = set(given) - set(names)
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
        examples = " or ".join(f"trainer.teachers=[{','.join(m)}]" for m in _teacher_subsets(required, len(given)))
        fewer = f" For {format_count(len(given), 'teacher')} set {examples}."
    raise ConfigError(f"{rule}; got {given!r}.{fewer} `mmdistill find-checkpoints output` prints a list to copy")


def _teacher_subsets(names: Sequence[str], size: int) -> list[tuple[str, ...]]:
    """The subsets of `size` modalities that contain the student's."""
    return [subset for subset in itertools.combinations(names, size) if STUDENT_MODALITY in subset]
