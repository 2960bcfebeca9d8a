"""Every key of every configuration, with its type, default and meaning.

The comment above a field is its description in docs/config.md (`make docs`).
"""

import signal
from dataclasses import FrozenInstanceError, dataclass, field
from types import UnionType
from typing import Any, get_args, get_origin

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from mmdistill.config.rules import (
    ConfigError,
    as_ints,
    as_names,
    at_least,
    key,
    one_of,
    positive,
    standardization,
    within,
)
from mmdistill.data.annotations import ANNOTATION_FORMATS
from mmdistill.data.annotations.f3set import LABEL_FIELDS
from mmdistill.data.clips import DISJOINT
from mmdistill.modalities import modality_names
from mmdistill.models import POOLINGS, TARGETS
from mmdistill.plugins import entry_point_names

CLASSIFIER_NAMES = (
    "logistic", "logistic_l2", "knn", "knn_euclidean",
    "centroid", "centroid_centered", "centroid_euclidean", "centroid_l2", "centroid_cl2",
)  # fmt: skip
DEEPSPEED_STAGES = {
    "deepspeed": 2,
    "deepspeed_stage_0": 0,
    "deepspeed_stage_1": 1,
    "deepspeed_stage_2": 2,
    "deepspeed_stage_1_offload": 1,
    "deepspeed_stage_2_offload": 2,
}  # strategy -> ZeRO stage
DEFAULT_BASELINES = ("random", "teacher_rgb")
PRETRAIN_STAGES = {
    "auto": 0,
    "ddp": 0,
    **DEEPSPEED_STAGES,
    "deepspeed_stage_3": 3,
    "deepspeed_stage_3_offload": 3,
}
PRECISION_SYNONYMS = {  # in torch, Lightning and other programs -> value of `precision`
    **dict.fromkeys(("fp32", "float32", "32-true", "full"), "32"),
    **dict.fromkeys(("bfloat16", "bf16-mixed", "bf16-true"), "bf16"),
    **dict.fromkeys(("fp16", "float16", "16-mixed", "16-true", "half", "amp"), "16"),
}
_ZERO_STAGES = {  # names of ZeRO stages in other programs -> value of `strategy`
    f"{name}{separator}{stage}": f"deepspeed_stage_{stage}"
    for name in ("zero", "zero_stage", "stage", "deepspeed", "deepspeed_zero")
    for separator in ("", "_", "-")
    for stage in (1, 2, 3)
}
_STOP_SIGNALS = ["SIGTERM", "SIGINT", "SIGUSR1"]  # Windows has no SIGUSR1, which is then ignored
_SIGNALS = [s.name for s in signal.Signals if s.name not in ("SIGKILL", "SIGSTOP")]


def _classifier_plugins() -> list[str]:
    return entry_point_names("mmdistill.classifiers")


def _validate_probe(name: str, value: Any) -> None:
    if value not in (False, True, "attentive"):
        raise ConfigError(f"{name}={value} is not one of false, true, attentive")


class Sealable:
    """Base of all config classes: writable while Hydra composes the config, read-only after `parse`.

    A frozen dataclass does not work, because Hydra sets attributes while it composes.
    """

    def __setattr__(self, name: str, value: object) -> None:
        """Set an attribute. Raises `FrozenInstanceError` after `parse`."""
        if "_sealed" in self.__dict__:
            raise FrozenInstanceError(f"{type(self).__name__}.{name}: a parsed config is read-only")
        object.__setattr__(self, name, value)


def nested_class(annotation: Any) -> type[Any] | None:
    """The config class of a field of type ``Class`` or ``Class | None``; None if the field is a value."""
    classes = [t for t in (annotation, *get_args(annotation)) if isinstance(t, type) and issubclass(t, Sealable)]
    return classes[0] if classes and get_origin(annotation) in (None, UnionType) else None


@dataclass
class ModelConfig(Sealable):
    """Sizes of the encoder and the pretraining decoder (`model=tiny|small|base|large`)."""

    # width of the encoder
    dim: int = MISSING
    # number of encoder blocks
    depth: int = MISSING
    # number of attention heads of the encoder
    heads: int = MISSING
    # width of one attention head of the encoder; null: dim / heads
    head_dim: int | None = None
    # hidden width of the MLPs, as a multiple of the width
    mlp_ratio: float = 4.0
    # position embedding: sincos (fixed, of the token index, as in VideoMAE) | sincos_separable (fixed, of time, height
    # and width separately) | learned
    pos_embed: str = key("sincos", one_of("sincos", "sincos_separable", "learned"))
    # stochastic depth rate of the last encoder block; it increases linearly from 0 at the first block
    drop_path: float = 0.0
    # width of the decoder
    decoder_dim: int = MISSING
    # number of decoder blocks
    decoder_depth: int = MISSING
    # number of attention heads of the decoder
    decoder_heads: int = MISSING


@dataclass
class ExtraKeypointsConfig(Sealable):
    """Keypoints of a second file per video, which become further heat-map channels: ball, court corners."""

    # names of the keypoints, in the order of the files; empty: none
    names: list[str] = field(default_factory=list)
    # folder of the files; a relative path is relative to target_data_dir
    dir: str | None = None
    # file name below dir: a .npy file or a pickle file with an array [T, K, 3] of (x, y, score) for K keypoints, or a
    # skeleton file with one person
    pattern: str = "{video}.npy"
    # pairs of a left and a right keypoint, by name, which a horizontal flip exchanges
    pairs: list[list[str]] = field(default_factory=list)
    # size [height, width] in px of the image of the coordinates; null: frame_size
    img_shape: list[int] | None = key(None, at_least(1))
    # largest possible score; scores are divided by it. A larger score is an error
    score_max: float = key(1.0, at_least(1))


@dataclass
class ModalityConfig(Sealable):
    """Files of one modality and how they become model input."""

    # folder of the files; a relative path is relative to target_data_dir; null: the dataset does not have them
    dir: str | None = None
    # file name below dir, for example {video}/{frame:06d}.jpg; null: default of the modality
    pattern: str | None = None
    # number of frame 0 in file names; null: data_module.frame_number_offset
    frame_number_offset: int | None = key(None, at_least(0))
    # pixels of the stored frame per pixel of the model input, along each axis
    input_stride: int = key(MISSING, at_least(1))
    # mean of each input channel (rgb in [0, 1], flow in px, heat-maps in [0, 1]); one value applies to all channels
    mean: list[float] = MISSING
    # standard deviation of each input channel, in the same units
    std: list[float] = MISSING
    # what the pretraining reconstructs: norm_pix (pixels, normalized per patch) | pixel | motion_energy
    target: str = key(MISSING, one_of(*TARGETS))
    # standard deviation of the Gaussian around a keypoint in heat-map px; null: default of the modality
    sigma: float | None = key(None, positive(null="the modality's default"))
    # camera motion that is removed from flow: median (the median displacement of each frame) | null
    compensate: str | None = key(None, one_of("median"))
    # keypoints of the model input, one heat-map channel each: coco17 | hand21 | {names: [...], pairs: [[LEFT, RIGHT]],
    # limbs: [[A, B]]} with the names of all joints, the pairs that a horizontal flip exchanges, and the joints that a
    # line connects; null: default of the modality (skeleton: coco17)
    joints: Any = None
    # whether each limb of the joints has a heat-map channel too
    limb_channels: bool = False
    # size [height, width] in px of stored heat-maps: one .npy file [joints, height, width] per frame, which covers the
    # whole frame; null: keypoint files
    heatmap_size: list[int] | None = key(None, at_least(1))
    extra_keypoints: ExtraKeypointsConfig = field(default_factory=ExtraKeypointsConfig)


@dataclass
class DataModuleConfig(Sealable):
    """Dataset, clips, masks and few-shot protocol."""

    # name of the dataset in logs and errors; the dataset "demo" is generated on first use
    name: str = MISSING
    # root folder of the dataset; the other paths may be relative to it
    target_data_dir: str = MISSING
    # strength of the variation of the images of the dataset "demo": colors, light, noise, blur, camera shake, and
    # texture and movement of the background; 0: none, 1: strong
    demo_nuisance: float = key(0.3, at_least(0))
    # short form of modalities.rgb.dir, over which it takes precedence
    frames_dir: str | None = None
    # short form of modalities.flow.dir, over which it takes precedence
    flow_dir: str | None = None
    # short form of modalities.skeleton.dir, over which it takes precedence
    skeleton_dir: str | None = None
    # format of the annotation files: f3set | clips (MM-CDFSL) | a registered format
    annotations: str = key("f3set", one_of(more=ANNOTATION_FORMATS.names))
    # short form of modalities.rgb.pattern, over which it takes precedence
    frame_pattern: str | None = None
    # short form of modalities.flow.pattern, over which it takes precedence
    flow_pattern: str | None = None
    # displacement in px of gray 255 in flow images, whose flow_pattern contains {axis}, for example
    # {video}/flow_{axis}_{frame:05d}.jpg; gray 0 is the negative displacement; null: flow is stored as .npy
    flow_bound: float | None = key(None, positive(null=".npy files"))
    # what replaces {axis} in flow_pattern: xy | uv
    flow_axes: str = key("xy", one_of("xy", "uv"))
    # number of the first frame of a video in file names
    frame_number_offset: int = key(0, at_least(0))
    # annotation file of the training videos; labels are not used
    unlabel_json_path: str = MISSING
    # annotation file of the labeled videos for the evaluation
    fewshot_eval_json_path: str = MISSING
    # annotation file of the labeled videos for the validation during a training; null: fewshot_eval_json_path, in
    # which case trainer.monitor=val_top1_action selects a checkpoint on the clips of the evaluation
    val_json_path: str | None = None
    # size of the stored frames: [height, width] in px
    frame_size: list[int] = MISSING
    # size of the model input: [height, width] in px; with resize=crop also the size of the crop of the stored frame
    crop_size: list[int] = MISSING
    # how a stored frame becomes model input, in training and evaluation: crop (a crop of crop_size) | squash (the whole
    # frame is resized to crop_size, each axis on its own)
    resize: str = key("crop", one_of("crop", "squash"))
    # height and width of a token in px of the stored frame
    patch_size: int = key(16, at_least(1))
    # number of frames per token
    tubelet: int = key(2, at_least(1))
    # number of frames per clip
    num_frames: int = key(16, at_least(1))
    # a clip consists of every n-th frame of the video
    sampling_rate: int = key(1, at_least(1))
    # training clips: windows (one every window_stride frames) | events (one per event) | first (the first event of each
    # video)
    train_clips: str = key("windows", one_of("windows", "events", "first"))
    # evaluation clips: events | first | windows, as for train_clips
    eval_clips: str = key("events", one_of("events", "first", "windows"))
    # frames between the starts of two windows; null: windows do not overlap
    window_stride: int | None = key(None, at_least(1))
    # position of the event in its clip: start | center
    clip_anchor: str = key("center", one_of("start", "center"))
    # class of a clip: event (label of the event) | video (name of the video)
    label: str = key("event", one_of("event", "video"))
    # fields of the labels that define the class: names of F3Set's eight fields (player, court, type, side, technique,
    # direction, approach, outcome), or positions from 0 in labels with any number of fields; null: the whole label
    label_fields: list[str] | None = key(None, one_of(*LABEL_FIELDS))
    # number of persons per frame in the skeleton input
    max_persons: int = key(2, at_least(1))
    # where the joints of the model input (modalities.skeleton.joints) are in the skeleton files: null (the files have
    # exactly these joints, in this order) | for the 17 COCO joints: coco17 | openpose18 | openpose25 (BODY_25) |
    # wholebody133 | a list with the position of each joint of the model input in the files
    skeleton_joints: Any = None
    # image size [height, width] in px of skeleton files without img_shape; null: frame_size
    skeleton_img_shape: list[int] | None = key(None, at_least(1))
    # largest possible keypoint_score of the skeleton files, or value of stored float heat-maps; they are divided by it.
    # A larger one is an error
    skeleton_score_max: float = key(1.0, at_least(1))
    # what to do in training if a file is missing or unreadable: error | repeat (use the nearest readable frame) | skip
    # (ignore the clip)
    on_missing: str = key("error", one_of("error", "repeat", "skip"))
    # probability of a horizontal flip; training only
    hflip_prob: float = key(0.0, within("[0, 1]"))
    # height and width of the smallest random crop, as a fraction of crop_size; 1: no random scale; training only
    random_crop_min_scale: float = key(1.0, within("(0, 1]"))
    # mask in training and evaluation: tube (the same positions in all frames) | random (any tokens) | motion (any
    # tokens, moving ones are visible more often; the motion is that of the flow in a training that reads flow, else
    # that of the frames, else that of the joints; in the evaluation that of the frames)
    mask_type: str = key("tube", one_of("tube", "random", "motion"))
    # with mask_type=motion: a token with the relative motion energy e is drawn with a probability proportional to
    # (e + 0.01) ^ (1 / mask_temperature)
    mask_temperature: float = key(1.0, within("(0, inf]"))
    # fraction of tokens that a training mask removes
    mask_ratio: float = key(0.75, within("[0, 1)"))
    # number of masked views per clip in the evaluation, over which predictions are averaged; 0: the whole clip
    n_masks: int = key(0, at_least(0))
    # fraction of tokens that an evaluation mask removes
    eval_mask_ratio: float = key(0.75, within("[0, 1)"))
    # masks of the evaluation: shared (the same masks for all clips) | per_clip
    eval_masks: str = key("shared", one_of("shared", "per_clip"))
    # input modes in which the evaluation scores eval_component: configured (as n_masks and eval_masks select) | all
    # (also as the whole clip and with shared and per-clip masks)
    input_modes: str = key("all", one_of("all", "configured"))
    # number of classes per episode; a list evaluates each value
    n_way: Any = key(5, as_ints, at_least(2))
    # number of labeled (support) clips per class; a list evaluates each value
    k_shot: Any = key(1, as_ints, at_least(1))
    # number of clips to classify (query clips) per class
    q_sample: int = key(15, at_least(1))
    # number of few-shot episodes per setting
    episodes: int = key(600, at_least(2))
    # masked views of the support clips that a classifier is fitted to, with n_masks > 1: each (view v of a query is
    # classified by a classifier of view v of the support clips) | first (one classifier of the first view of the
    # support clips classifies all views of a query, as in MM-CDFSL)
    support_views: str = key("each", one_of("each", "first", synonyms={"all": "each"}))
    # support and query clips of an episode come from: video (different videos) | match (different matches) | player
    # (different matches, and strokes of different players) | null (any clips)
    disjoint: str | None = key(None, one_of(*DISJOINT, synonyms={"rally": "video"}))
    # settings of each modality, by name: see data_module.modalities.NAME
    modalities: dict[str, ModalityConfig] = key({}, one_of(more=modality_names))


@dataclass
class TrainerConfig(Sealable):
    """Optimization, in both phases."""

    # number of epochs
    epochs: int = key(MISSING, at_least(1))
    # peak learning rate for a global batch of 256 clips; the rate in use is lr * (global batch size) / 256
    lr: float = key(MISSING, at_least(0))
    # learning rate at the end of the cosine schedule, for 256 clips
    min_lr: float = key(0.0, at_least(0))
    # learning rate at the start of the warm-up, for 256 clips
    warmup_lr: float = key(0.0, at_least(0))
    # length of the linear warm-up in epochs
    warmup_epochs: float = key(5.0, at_least(0))
    # weight decay of AdamW
    weight_decay: float = key(0.05, at_least(0))
    # coefficients beta1 and beta2 of AdamW
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    # largest norm of the gradient of all parameters; null: no clipping
    clip_grad: float | None = key(None, positive(null="no clipping"))
    # what to do if a loss or gradient is NaN or infinite: raise | skip (the step changes no weights, optimizer states
    # or averages, but counts in the schedule). Overflows with precision=16 and a loss scale above 1 are counted
    # separately (overflow_steps)
    on_nonfinite: str = key("raise", one_of("raise", "skip"))
    # number of steps that may be skipped during the whole training; one more is an error
    max_skipped_steps: int = key(10, at_least(0))
    # number of batches per optimizer step
    accumulate_grad_batches: int = key(1, at_least(1))
    # epochs between checkpoints; the last epoch is always saved
    save_ckpt_freq: int = key(5, at_least(1))
    # number of newest checkpoints to keep; if only this key is set, the best checkpoint is kept, too; null: see
    # save_top_k
    keep_last: int | None = key(None, at_least(1))
    # number of best checkpoints to keep, -1: all; if only this key is set, the newest checkpoint is kept, too; with
    # both keys null all checkpoints are kept
    save_top_k: int | None = key(None, at_least(-1))
    # recompute the activations of the encoder in the backward pass: less memory, more time
    activation_checkpointing: bool = False
    # factor of the learning rate from each encoder block to the block below it; null: one learning rate for all blocks
    layer_decay: float | None = key(None, within("(0, 1]", null="one learning rate"))
    # epochs between validations on held-out clips (docs/runs.md): few-shot score val_top1_action, loss, and collapse
    # indicators of the feature; null or 0: none
    check_val_every_n_epoch: int | None = key(None, at_least(0))
    # number of episodes of a few-shot validation, which uses the first value of n_way and k_shot
    val_episodes: int = key(20, at_least(2))
    # decay per step of an exponential moving average of the encoder that is trained, stored in checkpoints as
    # encoder_ema (pretraining) or student_ema_rgb (distillation); null: none
    ema: float | None = key(None, within("[0, 1)", null="no average"))
    # number of steps whose trace, a file trace-steps=A-B.json in the run folder, is written by rank 0 after the first
    # three steps of each start; 0: none
    profile: int = key(0, at_least(0))


@dataclass
class PretrainTrainerConfig(TrainerConfig):
    """Optimization of the pretraining."""

    # epochs between images of reconstructions (in the folder images/ and TensorBoard), also one after the last epoch;
    # 0: none
    image_every_n_epochs: int = key(5, at_least(0))
    # with a source: weight of the reconstruction loss of its clips
    lambda_source: float = key(1.0, at_least(0))
    # with a source: weight of the reconstruction loss of the clips of data_module
    lambda_target: float = key(1.0, at_least(0))
    # with a source: weight of the cross-entropy of the classifier on its clips, a number or a mapping by modality;
    # 0: no classifier
    lambda_ce: Any = 0.05
    # with a source: dropout rate before the last layer of the classifier
    classifier_dropout: float = key(0.0, within("[0, 1)"))


@dataclass
class DistillTrainerConfig(TrainerConfig):
    """Optimization of the distillation, and its teachers."""

    # pretrained checkpoints of the teachers: a list in the order rgb, flow, skeleton or a mapping by teacher. An entry
    # {file: PATH} of the mapping is a file of features of any program, by the id of the clip (docs/runs.md). null: the
    # teachers of the checkpoint that is resumed
    ckpt_path: Any = None
    # modalities of the teachers, and names of files of features; must contain rgb if student is null
    teachers: list[str] = key(["rgb", "flow", "skeleton"])
    # metric by which save_top_k selects checkpoints: train_loss (lowest) | val_top1_action (highest; only checkpoints
    # of validated epochs)
    monitor: str = key("train_loss", one_of("train_loss", "val_top1_action"))
    # how each teacher's features are standardized with statistics of the first epoch (docs/runs.md): false (not at
    # all, as in the paper) | true or standard (each dimension by its own mean and standard deviation) | phi_s (one
    # scale for all dimensions, after a rotation that gives all of them the same variance)
    standardize_targets: Any = key(False, standardization)
    # factor of each teacher's loss in the sum: a mapping by teacher, for example {flow: 2}, in which a teacher that is
    # absent has factor 1; null: all factors are 1
    teacher_weights: Any = None
    # number of mask draws per clip whose teacher features are cached; from this epoch on, the training reads rgb frames
    # only; 0: no cache
    cache_teacher_epochs: int = key(0, at_least(0))
    # whether checkpoints contain the teachers; false: they contain student and transfer heads only, and reference the
    # teachers by path and SHA-256
    save_teachers: bool = True


@dataclass
class CommonConfig(Sealable):
    """Keys of both phases."""

    # seed of the initialization, the data order, the masks and the episodes
    seed: int = key(0, at_least(0))
    # number of clips per process and step
    batch_size: int = key(MISSING, at_least(1))
    # number of data loading processes per rank; 0: the training process loads the data; null: one for each core that
    # the rank was given but its own, from 1 to 16
    num_workers: int | None = key(None, at_least(0))
    # auto (GPU if there is one) | cpu | gpu
    accelerator: str = key("auto", one_of("auto", "cpu", "gpu"))
    # number of processes on this machine | auto or -1 (one per GPU) | list of GPU numbers. Under a launcher (torchrun,
    # deepspeed, srun) its number of processes is used
    devices: Any = 1
    # compile student and teachers, or encoder and decoder of the pretraining, with torch.compile. The first step takes
    # minutes. The evaluation is not compiled
    compile: bool = False
    # auto (bf16 on a GPU with bf16 instructions and on a CPU with AMX or AVX512-BF16, otherwise 32) | 32 | bf16 | 16
    precision: str = key("auto", one_of("auto", "32", "bf16", "16", synonyms=PRECISION_SYNONYMS))
    # null: start from scratch | auto: continue from the newest valid checkpoint of the run folder, if there is one |
    # path of a checkpoint
    resume: str | None = None
    # signals that stop the training after the current step, with a complete checkpoint and exit status 85
    stop_signals: list[str] = key(_STOP_SIGNALS, one_of(*dict.fromkeys(_SIGNALS + _STOP_SIGNALS)))
    # seconds that a rank waits for the other ranks before it exits with an error
    distributed_timeout_s: float = key(1800.0, at_least(1))
    # seconds that the training waits for a batch of a data loading process before it exits with an error; 0: no limit
    loader_timeout_s: float = key(600.0, at_least(0))
    # where metrics are logged: one or a list of tensorboard, csv, wandb, mlflow
    logger: Any = key(["tensorboard", "csv"], as_names, one_of("tensorboard", "csv", "wandb", "mlflow"))
    # feature of a clip, of student and teachers or, in the validation of a pretraining, of its encoder: mean (of all
    # tokens) | motion (mean, weighted by the motion of each token) | last_k (mean over the last pooling_last_k blocks)
    # | segments (means of three ordered segments of time, concatenated) | halves (means of the upper and the lower
    # half, concatenated) | person (mean over the boxes of the persons; in the training of a distillation only, which
    # needs the skeleton teacher); null: mean in a training, that of the checkpoint in an evaluation
    pooling: str | None = key(None, one_of(*POOLINGS))
    # number of blocks with pooling=last_k
    pooling_last_k: int = key(4, at_least(1))
    data_module: DataModuleConfig = field(default_factory=DataModuleConfig)


@dataclass
class PretrainConfig(CommonConfig):
    """Keys of the pretraining (`mmdistill pretrain`)."""

    # labeled dataset that is pretrained jointly with data_module: source=NAME selects a file of configs/dataset,
    # source.KEY=VALUE changes a value of it. Its clips are the labeled clips that source.eval_clips selects in
    # source.unlabel_json_path. Masks and resize are those of data_module; null: none
    source: DataModuleConfig | None = None
    # modality to pretrain: rgb | flow | skeleton | a registered modality
    modality: str = key(MISSING, one_of(more=modality_names))
    # checkpoint whose weights initialize the model, for example of VideoMAE; null: random weights
    init_from: str | None = None
    # DeepSpeed ZeRO stage: auto or ddp (stage 0) | deepspeed (stage 2) | deepspeed_stage_0 | deepspeed_stage_N or
    # deepspeed_stage_N_offload with N = 1, 2 or 3. offload keeps the optimizer state in host memory
    strategy: str = key("auto", one_of(*PRETRAIN_STAGES, synonyms=_ZERO_STAGES))
    # fraction of the masked tokens that the decoder does not reconstruct (0.5 in VideoMAE V2)
    decoder_mask_ratio: float = key(0.0, within("[0, 1)"))
    model: ModelConfig = field(default_factory=ModelConfig)
    trainer: PretrainTrainerConfig = field(default_factory=PretrainTrainerConfig)


@dataclass
class DistillConfig(CommonConfig):
    """Keys of the distillation and the evaluation (`mmdistill distill`, `mmdistill evaluate`)."""

    # whether to train
    train: bool = True
    # whether to evaluate (few-shot), after the training if there is one
    test: bool = True
    # checkpoint to evaluate; required with train=False test=True
    ckpt_path: str | None = None
    # auto | ddp | deepspeed (the same as deepspeed_stage_2) | deepspeed_stage_0 | deepspeed_stage_N or
    # deepspeed_stage_N_offload with N = 1 or 2. offload keeps the optimizer state in host memory
    strategy: str = key("auto", one_of("auto", "ddp", *DEEPSPEED_STAGES, synonyms=_ZERO_STAGES))
    # initial student: a model preset with random weights (tiny | small | base | large) | path of a checkpoint, whose
    # encoder is copied | null: a copy of the RGB teacher
    student: str | None = None
    # name of the run folder
    run_name: str = "mmdistill"
    # component of the checkpoint that is evaluated
    eval_component: str = "student_rgb"
    # other networks that are evaluated on the same episodes: random (an untrained encoder with the architecture and the
    # modality of the scored network), random_MODALITY (the same for teacher_MODALITY of a distilled checkpoint),
    # components of the checkpoint, paths of other checkpoints
    baselines: list[str] = field(default_factory=lambda: list(DEFAULT_BASELINES))
    # few-shot classifier: logistic | logistic_l2 | knn | knn_euclidean | centroid | centroid_centered |
    # centroid_euclidean | centroid_l2 | centroid_cl2 | a registered classifier; a list evaluates each
    classifier: Any = key("logistic", as_names, one_of(*CLASSIFIER_NAMES, more=_classifier_plugins))
    # whether to also train classifiers on all labels: false | true (linear probe and k-NN) | attentive (also an
    # attentive probe on the tokens of whole clips)
    probe: Any = key(False, _validate_probe)
    # whether to also score each element of the labels, by player, hand, serve and court side (docs/label_elements.md)
    report_card: bool = False
    # whether to also score episodes that are disjoint by rally, match and player (docs/label_elements.md)
    shortcut_audit: bool = False
    # folder of encoded clips, which later evaluations reuse; null: no cache
    feature_cache: str | None = "output/features"
    trainer: DistillTrainerConfig = field(default_factory=DistillTrainerConfig)


def register_schemas() -> None:
    """Register the schemas under the names that the `defaults` lists in configs/ use."""
    store = ConfigStore.instance()
    store.store(name="pretrain_schema", node=PretrainConfig)
    store.store(name="distill_schema", node=DistillConfig)
