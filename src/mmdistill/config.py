"""The typed schema of every configuration.

With `cli` and `sweep`, which Hydra calls, the only module that knows OmegaConf. The entrypoints compose a config, turn
it into the dataclasses below with `parse`, which also makes them read-only, and pass those on. Nothing here imports
torch, so a wrong key is reported at once.
"""

import difflib
import importlib.util
import re
import signal
from collections.abc import Sequence
from dataclasses import FrozenInstanceError, dataclass, field, fields, is_dataclass
from typing import Any, TypeVar, cast

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mmdistill.data.annotations import F3SET_FIELDS
from mmdistill.data.layouts import ANNOTATION_READERS, names_each_frame
from mmdistill.modality import MODALITIES, MODALITY_SPECS, ModalitySpec

HEAD_NAMES = (
    "logistic", "logistic_l2", "knn", "knn_euclidean",
    "centroid", "centroid_centred", "centroid_euclidean", "centroid_l2", "centroid_cl2",
)  # fmt: skip
PARTS = ("teacher_", "student_")  # how parts of a distilled checkpoint are named
DEEPSPEED_STAGES = {"deepspeed": 2, "deepspeed_stage_0": 0, "deepspeed_stage_1": 1, "deepspeed_stage_2": 2}


class ConfigError(ValueError):
    """A configuration that cannot be run; the message names the key and what to do."""


class _Sealable:
    """A config is writable while Hydra composes it (a frozen dataclass would refuse that) and read-only once parsed."""

    def __setattr__(self, name: str, value: object) -> None:
        if "_sealed" in self.__dict__:
            raise FrozenInstanceError(f"{type(self).__name__}.{name}: a parsed config is never written to")
        object.__setattr__(self, name, value)


def _seal(config: object) -> None:
    if isinstance(config, _Sealable):
        for f in fields(cast(Any, config)):
            _seal(getattr(config, f.name))
        config.__dict__["_sealed"] = True
    elif isinstance(config, dict):
        for value in config.values():
            _seal(value)


@dataclass
class ModelConfig(_Sealable):
    """Sizes of the encoder and decoder (`model=tiny|small|base|large`)."""

    name: str = MISSING
    dim: int = MISSING  # encoder width
    depth: int = MISSING  # encoder blocks
    heads: int = MISSING  # attention heads
    head_dim: int | None = None  # width of one head; null: dim / heads
    mlp_ratio: float = 4.0  # hidden width of the MLPs over their width
    learned_positions: bool = False  # false: fixed sin-cos
    separable_positions: bool = False  # sin-cos of t, h and w apart; false: of the running token index, as in VideoMAE
    drop_path: float = 0.0  # stochastic depth rate of the last block
    decoder_dim: int = MISSING
    decoder_depth: int = MISSING
    decoder_heads: int = MISSING


@dataclass
class ModalityConfig(_Sealable):
    """How one modality of a dataset becomes model input."""

    scale: int = MISSING  # stored-frame px per input px and axis
    mean: list[float] = MISSING  # per channel (rgb in [0, 1], flow in px, heat-maps in [0, 1]); one value serves all
    std: list[float] = MISSING  # same units
    target: str = MISSING  # what pretraining predicts: patch (normalised per patch) | centred | energy | pixel
    sigma: float = 0.6  # Gaussian of a joint, heat-map px


@dataclass
class DataModuleConfig(_Sealable):
    """Where clips come from, how they are cut and masked, and the few-shot protocol."""

    name: str = MISSING  # "demo" is made on first use
    target_data_dir: str = MISSING  # root folder; the folders below may be relative to it
    frames_dir: str = MISSING  # {video}/{frame:06d}.jpg
    flow_dir: str | None = None  # {video}/pair_{frame:05d}.npy; null: the dataset has no flow
    skeleton_dir: str | None = None  # {video}.pkl; null: the dataset has no skeletons
    annotations: str = "f3set"  # reader of the annotation files, see mmdistill.data.layouts
    frame_pattern: str | None = None  # file of a frame below frames_dir; null: {video}/{frame:06d}.jpg
    flow_pattern: str | None = None  # file of a flow pair below flow_dir; null: {video}/pair_{frame:05d}.npy
    first_number: int = 0  # number that frame 0 has in file names
    unlabel_json_path: str = MISSING  # rallies to train on, labels unused
    fewshot_eval_json_path: str = MISSING  # labelled rallies to evaluate on
    # labelled rallies of the validation during distillation; null: those of fewshot_eval_json_path, and then a
    # checkpoint that is chosen by val_top1_action has been chosen on the test's clips
    val_json_path: str | None = None
    frame_size: list[int] = MISSING  # stored frames, [height, width] px
    crop_size: list[int] = MISSING  # what the model sees, [height, width] px
    patch_size: int = 16  # px of the stored frame per token and axis
    tubelet: int = 2  # frames per token
    num_frames: int = 16  # frames per clip
    sampling_rate: int = 1  # a clip takes every n-th frame
    train_clips: str = "windows"  # windows | events | first
    eval_clips: str = "events"  # events | first | windows
    window_stride: int | None = None  # frames between windows; null: the clip's span
    clip_anchor: str = "center"  # where in the clip its event lies: start | center
    label: str = "event"  # event: the F3Set label | video: the rally's video
    label_fields: list[str] | None = (
        None  # subset of player court type side technique direction approach outcome; null: all
    )
    max_persons: int = 2  # persons kept per frame
    missing: str = "error"  # unreadable frame, flow or skeleton: error | repeat | skip
    flip: float = 0.0  # probability of a horizontal flip, training only
    min_scale: float = 1.0  # smallest random crop, as a fraction of crop_size, training only
    mask_type: str = "tube"  # tube | random
    mask_ratio: float = 0.75  # fraction of tokens removed in training
    n_masks: int = 0  # evaluation: masked views per clip; 0: the whole clip
    eval_mask_ratio: float = 0.75  # evaluation: fraction removed in each masked view
    views: str = "shared"  # evaluation masks: shared (the same for all clips) | per_clip
    # the scored network beside itself: all: as the whole clip, with shared masks and with masks per clip, whose cost is
    # shown; the headline is what n_masks and views say | one: only that
    readouts: str = "all"
    n_way: Any = 5  # classes per episode; a list evaluates each
    k_shot: Any = 1  # support clips per class; a list evaluates each
    q_sample: int = 15  # query clips per class
    episodes: int = 600
    disjoint: str | None = None  # video: support and query clips of an episode come from different rallies
    modalities: dict[str, ModalityConfig] = field(default_factory=dict)


@dataclass
class TrainerConfig(_Sealable):
    """Optimisation, the same keys in both phases."""

    epochs: int = MISSING
    lr: float = MISSING  # base learning rate per 256 clips; the rate used is lr * global batch / 256
    min_lr: float = 0.0  # end of the cosine, per 256 clips
    warmup_lr: float = 0.0  # start of the warm-up, per 256 clips
    warmup_epochs: float = 5.0
    weight_decay: float = 0.05
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    clip_grad: float | None = None  # global gradient norm; null: no clipping
    # a loss or gradient that is not finite: raise | skip the step, which leaves weights, moments and averages alone and
    # counts in the schedule. With precision=16, overflows above loss scale 1 are counted apart (overflow_steps)
    nonfinite: str = "raise"
    nonfinite_budget: int = 10  # steps that may be skipped in the whole training
    accumulate: int = 1  # batches per optimiser step
    save_ckpt_freq: int = 5  # epochs between checkpoints; the last epoch is always saved
    # which checkpoints stay: the newest keep_last and the save_top_k of lowest loss (-1: all). Both null keep all; one
    # number alone keeps, beside its own, the best one or the newest one
    keep_last: int | None = None
    save_top_k: int | None = None
    activation_checkpointing: bool = False
    layer_decay: float | None = None  # factor of the rate from each encoder block to the one below; null: one rate


@dataclass
class PretrainTrainerConfig(TrainerConfig):
    """Optimisation of the pretraining."""

    picture_freq: int = 5  # epochs between pictures of a reconstruction (pictures/, TensorBoard); 0: none


@dataclass
class DistillTrainerConfig(TrainerConfig):
    """Optimisation of the distillation, and its teachers."""

    ckpt_path: Any = None  # pretrained teachers: a list (rgb, flow, skeleton) or by modality; null: as the resumed file
    teachers: list[str] = field(default_factory=lambda: ["rgb", "flow", "skeleton"])
    check_val_every_n_epoch: int | None = None  # epochs between few-shot validations (val_top1_action); null or 0: none
    # what save_top_k goes by: train_loss (lowest) | val_top1_action (highest; of checkpoints of validated epochs)
    monitor: str = "train_loss"
    val_episodes: int = 20  # of a validation, with the first n_way and k_shot; only their clips are encoded
    ema: float | None = None  # decay per step of an average of the student, saved as student_ema_rgb; null: none
    # N mask draws per clip, whose teacher features are kept: from epoch N on only frames are read; 0: none
    teacher_cache: int = 0
    save_teachers: bool = True  # false: checkpoints hold student and cmt only, and name the teachers with their sha256


@dataclass
class CommonConfig(_Sealable):
    """Keys of both entrypoints."""

    seed: int = 0
    batch_size: int = MISSING  # clips per process and step
    num_workers: int = 1  # loader processes; 0 reads in the training process
    accelerator: str = "auto"  # auto | cpu | gpu
    devices: Any = 1  # processes on this machine | auto or -1: all GPUs | a list of GPUs; a launcher's are used
    # torch.compile of the encoders that train, teachers included; the first step takes minutes. An evaluation, which
    # encodes each clip once, compiles nothing and says so
    compile: bool = False
    precision: str = "auto"  # auto: bf16 on a GPU that has it, else 32 | 32 | bf16 | 16
    resume: str | None = None  # auto: newest whole checkpoint of this job | a checkpoint | null: start anew
    # these end a run after the step in hand, with a whole checkpoint and exit status 85
    stop_signals: list[str] = field(default_factory=lambda: ["SIGTERM", "SIGINT", "SIGUSR1"])
    process_timeout_s: float = 1800.0  # a rank that waits longer for the others ends with an error
    loader_timeout_s: float = 600.0  # a loader worker that needs longer for one batch ends the run; 0: no limit
    logger: Any = field(default_factory=lambda: ["tensorboard", "csv"])  # also wandb, mlflow; one name or a list
    data_module: DataModuleConfig = field(default_factory=DataModuleConfig)


@dataclass
class DeepSpeedConfig(_Sealable):
    """What is handed to DeepSpeed."""

    zero_stage: int = 0  # 0 | 1 | 2 | 3
    offload: bool = False  # keep optimiser state (stage 1-3) in host memory


@dataclass
class PretrainConfig(CommonConfig):
    """`pretrain_main.py`."""

    modality: str = MISSING  # rgb | flow | skeleton
    pretrain: str | None = None  # VideoMAE weights to start from
    strategy: str = "auto"  # auto: deepspeed.zero_stage | ddp: stage 0 | deepspeed: stage 2 | deepspeed_stage_N
    decoder_mask_ratio: float = 0.0  # fraction of removed tokens that are not reconstructed (VideoMAE V2 uses 0.5)
    model: ModelConfig = field(default_factory=ModelConfig)
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    trainer: PretrainTrainerConfig = field(default_factory=PretrainTrainerConfig)


@dataclass
class DistillConfig(CommonConfig):
    """`lit_main_mmdistill.py`."""

    train: bool = True
    test: bool = True
    ckpt_path: str | None = None  # what test=True evaluates when train=False
    strategy: str = "auto"  # auto | ddp | deepspeed (as deepspeed_stage_2) | deepspeed_stage_0 | _1 | _2
    run_name: str = "mmdistill"  # name of the run's folder
    network: str = "student_rgb"  # part of the checkpoint that is evaluated
    # scored on the same episodes beside it: random (untrained encoder) | a part of the checkpoint | another checkpoint
    compare: list[str] = field(default_factory=lambda: ["random", "teacher_rgb"])
    head: Any = "logistic"  # few-shot classifier, see mmdistill.fewshot.heads; a list evaluates each
    probe: bool = False  # also a linear probe and k-NN on the full label set
    feature_cache: str | None = "output/features"  # folder of encoded clips, reused by later evaluations; null: none
    trainer: DistillTrainerConfig = field(default_factory=DistillTrainerConfig)


def register_schemas() -> None:
    """Make the schemas available to the `defaults` lists of configs/."""
    store = ConfigStore.instance()
    store.store(name="pretrain_schema", node=PretrainConfig)
    store.store(name="distill_schema", node=DistillConfig)


T = TypeVar("T", PretrainConfig, DistillConfig)


def parse(cfg: DictConfig, schema: type[T]) -> T:
    """The validated, frozen config. Raises `ConfigError` naming the key."""
    try:
        config = OmegaConf.to_object(cfg)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None)
        raise ConfigError(f"{key or 'config'}: {str(error).splitlines()[0]}") from error
    if not isinstance(config, schema):
        raise ConfigError(f"the config's defaults list must start with the schema of {schema.__name__}")
    _validate(config)
    _seal(config)
    return config


def _choice(key: str, value: object, allowed: Sequence[object]) -> None:
    if value not in allowed:
        near = difflib.get_close_matches(str(value), [str(a) for a in allowed], n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"{key}={value} is not one of {', '.join(map(str, allowed))}{hint}")


def _at_least(key: str, value: float, least: float) -> None:
    if value < least:
        raise ConfigError(f"{key}={value} must be at least {least}")


def _fraction(key: str, value: float, *, below_one: bool = False) -> None:
    if not 0 <= value <= 1 or (below_one and value == 1):
        raise ConfigError(f"{key}={value} must lie in [0, 1{')' if below_one else ']'}")


def _validate(config: PretrainConfig | DistillConfig) -> None:
    _choice("accelerator", config.accelerator, ("auto", "cpu", "gpu"))
    _choice("precision", config.precision, ("auto", "32", "bf16", "16"))
    if config.precision == "16" and config.accelerator == "cpu":
        raise ConfigError("precision=16 needs a GPU, and accelerator=cpu; use precision=32 (or bf16)")
    _at_least("seed", config.seed, 0)
    _at_least("batch_size", config.batch_size, 1)
    _at_least("num_workers", config.num_workers, 0)
    _at_least("process_timeout_s", config.process_timeout_s, 1)
    _at_least("loader_timeout_s", config.loader_timeout_s, 0)
    for name in config.stop_signals:
        _choice("stop_signals", name, [s.name for s in signal.Signals if s.name not in ("SIGKILL", "SIGSTOP")])
    for name in as_names("logger", config.logger):
        _choice("logger", name, ("tensorboard", "csv", "wandb", "mlflow"))
        if name in ("wandb", "mlflow") and importlib.util.find_spec(name) is None:
            raise ConfigError(f"logger={name}: {name} is not installed; pip install {name}, or leave it out of logger")
    _validate_data(config.data_module)
    trainer = config.trainer
    for key in ("epochs", "accumulate", "save_ckpt_freq"):
        _at_least(f"trainer.{key}", getattr(trainer, key), 1)
    for key in ("lr", "min_lr", "warmup_lr", "warmup_epochs", "weight_decay"):
        _at_least(f"trainer.{key}", getattr(trainer, key), 0)
    if trainer.keep_last is not None:
        _at_least("trainer.keep_last", trainer.keep_last, 1)
    if trainer.save_top_k is not None:
        _at_least("trainer.save_top_k", trainer.save_top_k, -1)
    _choice("trainer.nonfinite", trainer.nonfinite, ("raise", "skip"))
    _at_least("trainer.nonfinite_budget", trainer.nonfinite_budget, 0)
    if trainer.layer_decay is not None and not 0 < trainer.layer_decay <= 1:
        raise ConfigError(f"trainer.layer_decay={trainer.layer_decay} must lie in (0, 1]")
    if len(trainer.betas) != 2 or not all(0 <= beta < 1 for beta in trainer.betas):
        raise ConfigError(f"trainer.betas={trainer.betas} must be two numbers in [0, 1)")
    if trainer.clip_grad is not None and trainer.clip_grad <= 0:
        raise ConfigError(f"trainer.clip_grad={trainer.clip_grad} must be positive; null clips nothing")
    if isinstance(config, PretrainConfig):
        _choice("modality", config.modality, MODALITIES)
        _has_modality("modality", config.modality, config.data_module)
        _at_least("trainer.picture_freq", config.trainer.picture_freq, 0)
        _choice("deepspeed.zero_stage", config.deepspeed.zero_stage, (0, 1, 2, 3))
        if config.deepspeed.offload and zero_stage(config) == 0:
            raise ConfigError("deepspeed.offload needs deepspeed.zero_stage 1, 2 or 3: stage 0 shards nothing")
        if zero_stage(config) == 3 and trainer.nonfinite == "skip":
            raise ConfigError("trainer.nonfinite=skip does not go with ZeRO stage 3; use stage 2, or nonfinite=raise")
        if zero_stage(config) == 3 and config.compile:
            raise ConfigError("compile=true does not go with ZeRO stage 3, which gathers weights inside the encoder")
        _fraction("decoder_mask_ratio", config.decoder_mask_ratio, below_one=True)
        model = config.model
        if model.head_dim is None and model.dim % model.heads:
            raise ConfigError(
                f"model.dim={model.dim} is not divisible by model.heads={model.heads}; set model.head_dim"
            )
        if model.decoder_dim % model.decoder_heads:
            raise ConfigError(
                f"model.decoder_dim={model.decoder_dim} is not divisible by model.decoder_heads={model.decoder_heads}"
            )
    else:
        _validate_distill(config)


def zero_stage(config: PretrainConfig) -> int:
    """ZeRO's stage, of `strategy` where it names one, else of `deepspeed.zero_stage`. Raises where both differ."""
    stages = {**DEEPSPEED_STAGES, "ddp": 0, "deepspeed_stage_3": 3}
    _choice("strategy", config.strategy, ("auto", *stages))
    stage = stages.get(config.strategy, config.deepspeed.zero_stage)
    if config.deepspeed.zero_stage not in (0, stage):
        raise ConfigError(
            f"strategy={config.strategy} is ZeRO stage {stage}, deepspeed.zero_stage={config.deepspeed.zero_stage}; "
            "give one of them"
        )
    return stage


def _has_modality(key: str, modality: str, data: DataModuleConfig) -> None:
    if modality not in data.modalities:
        raise ConfigError(
            f"{key}: dataset {data.name} has no {modality}, but {', '.join(data.modalities)}; choose among these, or "
            f"describe it in data_module.modalities.{modality}"
        )


def _validate_distill(config: DistillConfig) -> None:
    if config.strategy.startswith("deepspeed_stage_3"):
        raise ConfigError(
            f"strategy={config.strategy}: no process holds all the weights, so a checkpoint could not stay one file; "
            "use strategy=deepspeed_stage_2"
        )
    _choice("strategy", config.strategy, ("auto", "ddp", *DEEPSPEED_STAGES))
    _at_least("trainer.check_val_every_n_epoch", config.trainer.check_val_every_n_epoch or 0, 0)
    _at_least("trainer.val_episodes", config.trainer.val_episodes, 2)
    _choice("trainer.monitor", config.trainer.monitor, ("train_loss", "val_top1_action"))
    every, saved = config.trainer.check_val_every_n_epoch, config.trainer.save_ckpt_freq
    if config.trainer.monitor == "val_top1_action" and (not every or saved % every):
        raise ConfigError(
            f"trainer.monitor=val_top1_action needs a validation in each epoch that is saved: "
            f"trainer.check_val_every_n_epoch={every} must divide trainer.save_ckpt_freq={saved}"
        )
    if config.trainer.ema is not None and not 0 <= config.trainer.ema < 1:
        raise ConfigError(f"trainer.ema={config.trainer.ema} must lie in [0, 1)")
    _at_least("trainer.teacher_cache", config.trainer.teacher_cache, 0)
    for teacher in config.trainer.teachers:
        _choice("trainer.teachers", teacher, MODALITIES)
    if "rgb" not in config.trainer.teachers:
        raise ConfigError("trainer.teachers must hold rgb: the student starts as a copy of the RGB teacher")
    if config.train:
        for teacher in config.trainer.teachers:
            _has_modality("trainer.teachers", teacher, config.data_module)
    for head in as_names("head", config.head):
        _choice("head", head, HEAD_NAMES)
    if config.test:
        _validate_networks(config)
    named = config.resume is not None and config.trainer.ckpt_path is None  # a checkpoint names its teachers
    if config.train and not named:
        teacher_paths(config.trainer)
    elif not config.train and config.test and config.ckpt_path is None:
        raise ConfigError("train=False test=True needs ckpt_path=PATH, the checkpoint to evaluate")


def _validate_networks(config: DistillConfig) -> None:
    """What is scored names its modality: ``student_rgb``, ``teacher_flow``, ``pretrained_skeleton``."""
    own = [] if config.network == "encoder" else [config.network]
    compared = [entry for entry in config.compare if entry.startswith(PARTS)]
    for key, part in [*(("network", part) for part in own), *(("compare", part) for part in compared)]:
        if part.rpartition("_")[2] not in MODALITIES:
            raise ConfigError(
                f"{key}={part}: the name of a network ends in its modality, like student_rgb, teacher_flow"
            )


def _validate_data(data: DataModuleConfig) -> None:
    key = "data_module."
    _choice(key + "train_clips", data.train_clips, ("windows", "events", "first"))
    _choice(key + "eval_clips", data.eval_clips, ("events", "first", "windows"))
    _choice(key + "clip_anchor", data.clip_anchor, ("start", "center"))
    _choice(key + "missing", data.missing, ("error", "repeat", "skip"))
    _choice(key + "mask_type", data.mask_type, ("tube", "random"))
    _choice(key + "views", data.views, ("shared", "per_clip"))
    _choice(key + "readouts", data.readouts, ("all", "one"))
    _choice(key + "label", data.label, ("event", "video"))
    _choice(key + "annotations", data.annotations, sorted(ANNOTATION_READERS))
    if data.label_fields is not None:
        for name in data.label_fields:
            _choice(key + "label_fields", name, F3SET_FIELDS)
        if not data.label_fields:
            raise ConfigError(f"{key}label_fields=[] leaves no label; null takes all of {', '.join(F3SET_FIELDS)}")
    if data.disjoint is not None:
        _choice(key + "disjoint", data.disjoint, ("video",))
    for name, pattern in (("frame_pattern", data.frame_pattern), ("flow_pattern", data.flow_pattern)):
        if pattern is not None and not names_each_frame(pattern):
            raise ConfigError(
                f"{key}{name}={pattern!r} must name a file by {{video}} and {{frame}}, see configs/dataset"
            )
    _fraction(key + "mask_ratio", data.mask_ratio, below_one=True)
    _fraction(key + "eval_mask_ratio", data.eval_mask_ratio, below_one=True)
    _fraction(key + "flip", data.flip)
    for name in ("num_frames", "sampling_rate", "max_persons", "q_sample", "tubelet", "patch_size"):
        _at_least(key + name, getattr(data, name), 1)
    if data.window_stride is not None:
        _at_least(key + "window_stride", data.window_stride, 1)
    _at_least(key + "first_number", data.first_number, 0)
    if not 0 < data.min_scale <= 1:
        raise ConfigError(f"{key}min_scale={data.min_scale} must lie in (0, 1]")
    for name, least in (("n_way", 2), ("k_shot", 1)):
        for value in as_ints(key + name, getattr(data, name)):
            _at_least(key + name, value, least)
    _at_least(key + "episodes", data.episodes, 2)  # one episode has no standard error
    _at_least(key + "n_masks", data.n_masks, 0)
    for name in ("frame_size", "crop_size"):
        if len(getattr(data, name)) != 2:
            raise ConfigError(f"{key}{name}={getattr(data, name)} must be [height, width] in px")
    for axis, (frame, crop) in enumerate(zip(data.frame_size, data.crop_size, strict=True)):
        if crop > frame:
            raise ConfigError(f"{key}crop_size[{axis}]={crop} is larger than frame_size[{axis}]={frame}")
        if crop % data.patch_size:
            raise ConfigError(f"{key}crop_size[{axis}]={crop} is not a multiple of patch_size={data.patch_size}")
    if data.num_frames % data.tubelet:
        raise ConfigError(f"{key}num_frames={data.num_frames} is not a multiple of tubelet={data.tubelet}")
    for name in data.modalities:
        _choice(key + "modalities", name, MODALITIES)
    modality_specs(data)
    _leaves_tokens(key + "mask_ratio", data.mask_ratio, data)
    if data.n_masks:
        _leaves_tokens(key + "eval_mask_ratio", data.eval_mask_ratio, data)


def _leaves_tokens(key: str, ratio: float, data: DataModuleConfig) -> None:
    """A mask removes what `mmdistill.data.masks` says: places of the picture (tube) or single tokens (random)."""
    tokens = (data.crop_size[0] // data.patch_size) * (data.crop_size[1] // data.patch_size)
    if data.mask_type == "random":
        tokens *= data.num_frames // data.tubelet
    if round(ratio * tokens) == tokens:
        raise ConfigError(f"{key}={ratio} leaves none of {tokens} tokens visible")


def modality_specs(data: DataModuleConfig) -> dict[str, ModalitySpec]:
    """The dataset's modalities with its statistics. Raises `ConfigError` where a modality's values do not fit."""
    specs = {}
    for name, m in data.modalities.items():
        _at_least(f"data_module.modalities.{name}.scale", m.scale, 1)
        if m.sigma <= 0:
            raise ConfigError(f"data_module.modalities.{name}.sigma={m.sigma} must be positive")
        if data.patch_size % m.scale or any(size % m.scale for size in data.crop_size):
            raise ConfigError(f"data_module.modalities.{name}.scale={m.scale} must divide patch_size and crop_size")
        channels = MODALITY_SPECS[name].channels
        try:
            specs[name] = ModalitySpec(name, channels, m.scale, tuple(m.mean), tuple(m.std), m.target, m.sigma)
        except ValueError as error:
            raise ConfigError(f"data_module.modalities.{error}") from error
    return specs


def as_ints(key: str, value: Any) -> list[int]:
    """A whole number or a list of them, as a list."""
    values = value if isinstance(value, list | tuple) else [value]
    if not values or any(isinstance(v, bool) or not isinstance(v, int) for v in values):
        raise ConfigError(f"{key}={value} must be a whole number or a list of whole numbers")
    return list(values)


def as_names(key: str, value: Any) -> list[str]:
    """A name or a list of them, as a list."""
    values = value if isinstance(value, list | tuple) else [value]
    if not values or any(not isinstance(v, str) for v in values):
        raise ConfigError(f"{key}={value} must be a name or a list of names")
    return list(values)


def teacher_paths(trainer: DistillTrainerConfig) -> dict[str, str]:
    """`trainer.ckpt_path` by modality: a list is in the order of `MODALITIES` (or of `trainer.teachers`)."""
    given = trainer.ckpt_path
    wanted = [m for m in MODALITIES if m in trainer.teachers]
    how = (
        f"trainer.ckpt_path must name a checkpoint for each of {', '.join(wanted)}: a list in this order, or a mapping"
    )
    if isinstance(given, dict):
        unknown = set(given) - set(MODALITIES)
        if unknown or any(m not in given for m in wanted):
            raise ConfigError(f"{how}; got the keys {', '.join(map(str, given))}")
        return {m: str(given[m]) for m in wanted}
    if isinstance(given, list | tuple) and len(given) in (len(wanted), len(MODALITIES)):
        names = wanted if len(given) == len(wanted) else list(MODALITIES)
        paths = dict(zip(names, map(str, given), strict=True))
        return {m: paths[m] for m in wanted}
    raise ConfigError(f"{how}; got {given!r}. `python scripts/find_checkpoints.py output` prints one to paste")


def stored_config(plain: dict[str, Any], schema: type[T], overrides: Sequence[str] = ()) -> T:
    """The config that a checkpoint carries (`to_plain`), with ``key=value`` overrides; nothing is instantiated.

    Raises:
        ConfigError: a key is unknown to this version, or a value is wrong.
    """
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), plain, OmegaConf.from_dotlist(list(overrides)))
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None)
        raise ConfigError(f"{key or 'config'}: {str(error).splitlines()[0]}") from error
    return parse(cast(DictConfig, merged), schema)


def to_plain(config: object) -> dict[str, Any]:
    """A config as builtin containers, to store in a checkpoint."""
    return {f.name: _plain(getattr(config, f.name)) for f in fields(cast(Any, config))}


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return to_plain(value)
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value


# What is wrong, in one line ------------------------------------------------------------------------------------------


def known_keys(schema: type[Any] = CommonConfig, prefix: str = "") -> list[str]:
    """Every dotted key of a schema."""
    keys = []
    for f in fields(schema):
        keys.append(prefix + f.name)
        if isinstance(f.type, type) and is_dataclass(f.type):
            keys += known_keys(f.type, f"{prefix}{f.name}.")
    return keys


# what a DataLoader makes of an exception in a worker: the traceback there, and the message at its end
_FROM_WORKER = re.compile(
    r"Caught (\w+) in DataLoader worker process \d+\.\nOriginal Traceback.*\n[\w.]*\1: (.*?)\n?", re.DOTALL
)


def explain(error: Exception, schema: type[Any]) -> str:
    """One sentence for a Hydra or OmegaConf error, with the nearest known keys; our own errors say it themselves."""
    if type(error).__module__.startswith("mmdistill.") and not isinstance(error.__cause__, OmegaConfBaseException):
        worker = _FROM_WORKER.fullmatch(str(error))
        return worker[2] if worker else str(error)  # whole: the lines below the first list what is wrong
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    text = "\n".join(str(e) for e in chain)
    match = re.search(r"Key '([^']+)'", text) or re.search(r"full_key: (\S+)", text)
    firsts = [next((line.strip() for line in str(e).splitlines() if line.strip()), type(e).__name__) for e in chain]
    message = firsts[0]
    for detail in firsts[1:]:
        if detail not in message:
            message += f" ({detail})"
    if "Ambiguous value for argument" in text:
        message += ": a comma outside quotes makes a sweep (-m); for a path with a comma write \"key='/a, b/c'\""
    if "Missing mandatory value" in text:
        message += ". Give it on the command line, for example modality=rgb"
    if match:
        word = match[1]
        leaves = known_keys(schema)
        near = [
            k
            for k in leaves
            if k.rsplit(".", 1)[-1] in difflib.get_close_matches(word, {k.rsplit(".", 1)[-1] for k in leaves}, n=3)
        ]
        if near:
            message += f". Near matches: {', '.join(near[:3])}"
    return message
