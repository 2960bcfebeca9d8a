"""Every key of every configuration, with its type, default and meaning."""

from dataclasses import FrozenInstanceError, dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from mmdistill.errors import InputError


class ConfigError(InputError):
    """A configuration that cannot be run; the message names the key and what to do."""


class Sealable:
    """A config is writable while Hydra composes it (a frozen dataclass would refuse that) and read-only once parsed."""

    def __setattr__(self, name: str, value: object) -> None:
        if "_sealed" in self.__dict__:
            raise FrozenInstanceError(f"{type(self).__name__}.{name}: a parsed config is never written to")
        object.__setattr__(self, name, value)


@dataclass
class ModelConfig(Sealable):
    """Sizes of the encoder and decoder (`model=tiny|small|base|large`)."""

    dim: int = MISSING  # encoder width
    depth: int = MISSING  # encoder blocks
    heads: int = MISSING  # attention heads
    head_dim: int | None = None  # width of one head; null: dim / heads
    mlp_ratio: float = 4.0  # hidden width of the MLPs over their width
    # sincos: fixed, of the running token index, as in VideoMAE | sincos_separable: fixed, of t, h and w apart | learned
    pos_embed: str = "sincos"
    drop_path: float = 0.0  # stochastic depth rate of the last block
    decoder_dim: int = MISSING  # decoder width
    decoder_depth: int = MISSING  # decoder blocks
    decoder_heads: int = MISSING  # attention heads of the decoder


@dataclass
class ModalityConfig(Sealable):
    """Where the files of one modality are and how they become model input."""

    dir: str | None = None  # folder of the files, may be relative to target_data_dir; null: the dataset has none
    pattern: str | None = None  # file name below dir, with {video} and {frame:06d}; null: the modality's default
    input_stride: int = MISSING  # stored-frame px per input px and axis
    mean: list[float] = (
        MISSING  # per channel (rgb in [0, 1], flow in px, heat-maps in [0, 1]); one value is used for all
    )
    std: list[float] = MISSING  # same units
    target: str = MISSING  # what pretraining predicts: norm_pix (normalized per patch) | motion_energy | pixel
    sigma: float | None = None  # Gaussian of a keypoint, heat-map px; null: the modality's default


@dataclass
class DataModuleConfig(Sealable):
    """Where clips come from, how they are cut and masked, and the few-shot protocol."""

    name: str = MISSING  # "demo" is made on first use
    target_data_dir: str = MISSING  # root folder; the folders below may be relative to it
    frames_dir: str | None = None  # short for modalities.rgb.dir
    flow_dir: str | None = None  # short for modalities.flow.dir
    skeleton_dir: str | None = None  # short for modalities.skeleton.dir
    annotations: str = "f3set"  # reader of the annotation files, see mmdistill.data.annotations.mmcdfsl
    frame_pattern: str | None = None  # short for modalities.rgb.pattern
    flow_pattern: str | None = None  # short for modalities.flow.pattern
    frame_number_offset: int = 0  # number that frame 0 has in file names
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
    on_missing: str = "error"  # unreadable frame, flow or skeleton: error | repeat | skip
    hflip_prob: float = 0.0  # probability of a horizontal flip, training only
    random_crop_min_scale: float = 1.0  # smallest random crop, as a fraction of crop_size, training only
    mask_type: str = "tube"  # tube | random
    mask_ratio: float = 0.75  # fraction of tokens removed in training
    n_masks: int = 0  # evaluation: masked views per clip; 0: the whole clip
    eval_mask_ratio: float = 0.75  # evaluation: fraction removed in each masked view
    eval_masks: str = "shared"  # evaluation masks: shared (the same for all clips) | per_clip
    # the scored network beside itself: all: as the whole clip, with shared masks and with masks per clip, whose cost is
    # shown; the headline is what n_masks and eval_masks say | configured: only that
    input_modes: str = "all"
    n_way: Any = 5  # classes per episode; a list evaluates each
    k_shot: Any = 1  # support clips per class; a list evaluates each
    q_sample: int = 15  # query clips per class
    episodes: int = 600  # few-shot episodes per setting
    disjoint: str | None = None  # video: support and query clips of an episode come from different rallies
    modalities: dict[str, ModalityConfig] = field(default_factory=dict)


@dataclass
class TrainerConfig(Sealable):
    """Optimisation, the same keys in both phases."""

    epochs: int = MISSING  # passes over the training clips
    lr: float = MISSING  # base learning rate per 256 clips; the rate used is lr * global batch / 256
    min_lr: float = 0.0  # end of the cosine, per 256 clips
    warmup_lr: float = 0.0  # start of the warm-up, per 256 clips
    warmup_epochs: float = 5.0  # epochs of the linear warm-up
    weight_decay: float = 0.05  # AdamW
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])  # AdamW
    clip_grad: float | None = None  # global gradient norm; null: no clipping
    # a loss or gradient that is not finite: raise | skip the step, which leaves weights, moments and averages alone and
    # counts in the schedule. With precision=16, overflows above loss scale 1 are counted apart (overflow_steps)
    on_nonfinite: str = "raise"
    max_skipped_steps: int = 10  # steps that may be skipped in the whole training
    accumulate_grad_batches: int = 1  # batches per optimiser step
    save_ckpt_freq: int = 5  # epochs between checkpoints; the last epoch is always saved
    # which checkpoints stay: the newest keep_last and the save_top_k of lowest loss (-1: all). Both null keep all; one
    # number alone keeps, beside its own, the best one or the newest one
    keep_last: int | None = None
    save_top_k: int | None = None  # see keep_last
    activation_checkpointing: bool = False  # recompute activations in the backward pass to save memory
    layer_decay: float | None = None  # factor of the rate from each encoder block to the one below; null: one rate


@dataclass
class PretrainTrainerConfig(TrainerConfig):
    """Optimisation of the pretraining."""

    image_every_n_epochs: int = 5  # epochs between reconstruction images (images/, TensorBoard); 0: none


@dataclass
class DistillTrainerConfig(TrainerConfig):
    """Optimisation of the distillation, and its teachers."""

    ckpt_path: Any = None  # pretrained teachers: a list (rgb, flow, skeleton) or by modality; null: as the resumed file
    teachers: list[str] = field(default_factory=lambda: ["rgb", "flow", "skeleton"])  # modalities of the teachers
    check_val_every_n_epoch: int | None = None  # epochs between few-shot validations (val_top1_action); null or 0: none
    # what save_top_k goes by: train_loss (lowest) | val_top1_action (highest; of checkpoints of validated epochs)
    monitor: str = "train_loss"
    val_episodes: int = 20  # of a validation, with the first n_way and k_shot; only their clips are encoded
    ema: float | None = None  # decay per step of an average of the student, saved as student_ema_rgb; null: none
    # N mask draws per clip, whose teacher features are kept: from epoch N on only frames are read; 0: none
    cache_teacher_epochs: int = 0
    save_teachers: bool = True  # false: checkpoints hold student and cmt only, and name the teachers with their sha256


@dataclass
class CommonConfig(Sealable):
    """Keys of both entrypoints."""

    seed: int = 0  # seed of the initialization, data order, masks and episodes
    batch_size: int = MISSING  # clips per process and step
    num_workers: int = 1  # loader processes; 0 reads in the training process
    accelerator: str = "auto"  # auto | cpu | gpu
    devices: Any = 1  # processes on this machine | auto or -1: all GPUs | a list of GPUs; a launcher's are used
    # torch.compile of what trains, pretraining's decoder and the teachers included; the first step takes minutes. An
    # evaluation, which encodes each clip once, compiles nothing and says so
    compile: bool = False
    precision: str = "auto"  # auto: bf16 on a GPU that has it, else 32 | 32 | bf16 | 16
    resume: str | None = None  # auto: newest whole checkpoint of this job | a checkpoint | null: start anew
    # these end a run after the step in hand, with a whole checkpoint and exit status 85
    stop_signals: list[str] = field(default_factory=lambda: ["SIGTERM", "SIGINT", "SIGUSR1"])
    distributed_timeout_s: float = 1800.0  # a rank that waits longer for the others ends with an error
    loader_timeout_s: float = 600.0  # a loader worker that needs longer for one batch ends the run; 0: no limit
    logger: Any = field(default_factory=lambda: ["tensorboard", "csv"])  # also wandb, mlflow; one name or a list
    data_module: DataModuleConfig = field(default_factory=DataModuleConfig)


@dataclass
class PretrainConfig(CommonConfig):
    """`pretrain_main.py`."""

    modality: str = MISSING  # rgb | flow | skeleton | any other registered modality
    init_from: str | None = None  # VideoMAE weights to start from
    # ZeRO stage: auto or ddp: 0 | deepspeed: 2 | deepspeed_stage_N, N from 1 also with _offload
    strategy: str = "auto"
    decoder_mask_ratio: float = 0.0  # fraction of removed tokens that are not reconstructed (VideoMAE V2 uses 0.5)
    model: ModelConfig = field(default_factory=ModelConfig)
    trainer: PretrainTrainerConfig = field(default_factory=PretrainTrainerConfig)


@dataclass
class DistillConfig(CommonConfig):
    """`lit_main_mmdistill.py`."""

    train: bool = True  # distill
    test: bool = True  # evaluate few-shot
    ckpt_path: str | None = None  # what test=True evaluates when train=False
    # auto | ddp | deepspeed (as deepspeed_stage_2) | deepspeed_stage_0 | _1 | _2 | _1_offload | _2_offload
    strategy: str = "auto"
    run_name: str = "mmdistill"  # name of the run's folder
    eval_component: str = "student_rgb"  # component of the checkpoint that is evaluated
    # scored on the same episodes beside it: random (untrained encoder) | a part of the checkpoint | another checkpoint
    baselines: list[str] = field(default_factory=lambda: ["random", "teacher_rgb"])
    classifier: Any = "logistic"  # few-shot classifier, see mmdistill.fewshot.classifiers; a list evaluates each
    probe: bool = False  # also a linear probe and k-NN on the full label set
    feature_cache: str | None = "output/features"  # folder of encoded clips, reused by later evaluations; null: none
    trainer: DistillTrainerConfig = field(default_factory=DistillTrainerConfig)


def register_schemas() -> None:
    """Make the schemas available to the `defaults` lists of configs/."""
    store = ConfigStore.instance()
    store.store(name="pretrain_schema", node=PretrainConfig)
    store.store(name="distill_schema", node=DistillConfig)
