"""Each rule names the key, the value, what is allowed and the fix; keys that take several forms give one."""

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from mmdistill.builders import make_clip_dataset
from mmdistill.config import (
    CLASSIFIER_NAMES,
    SHORT_KEYS,
    ConfigError,
    DataModuleConfig,
    DistillConfig,
    PretrainConfig,
    has_offload,
    modality_setting,
    modality_setting_key,
    modality_specs,
    removes_no_token,
    schema,
    teacher_paths,
    teacher_weights,
    zero_stage,
)
from mmdistill.config.compose import load_config
from tests.configs import TEACHERS, distill_config, pretrain_config, source_override
from tests.tiny_data import make_tiny, overrides

D = "data_module."
M = "data_module.modalities."
FIELDS = "player, court, type, side, technique, direction, approach, outcome"

# overrides -> message, or the start of a message that ends with "..."
COMMON = [
    ("accelerator=tpu", "accelerator=tpu is not one of auto, cpu, gpu; did you mean gpu?"),
    ("precision=fp16", "precision=fp16 is not one of auto, 32, bf16, 16; did you mean 16?"),
    (
        "precision='16' accelerator=cpu",
        "precision=16 needs a GPU, and accelerator=cpu; use precision=32 or precision=bf16",
    ),
    ("seed=-1", "seed=-1 must be at least 0"),
    ("batch_size=0", "batch_size=0 must be at least 1"),
    ("num_workers=-1", "num_workers=-1 must be at least 0"),
    ("distributed_timeout_s=0", "distributed_timeout_s=0.0 must be at least 1"),
    ("loader_timeout_s=-1", "loader_timeout_s=-1.0 must be at least 0"),
    ("stop_signals=[SIGKILL]", "stop_signals=SIGKILL is not one of SIGHUP, SIGINT, ..."),
    (
        "logger=[csv,tensorbord]",
        "logger=tensorbord is not one of tensorboard, csv, wandb, mlflow; did you mean tensorboard?",
    ),
    ("logger=3", "logger=3 must be a name or a list of names"),
    ("trainer.epochs=0", "trainer.epochs=0 must be at least 1"),
    ("trainer.accumulate_grad_batches=0", "trainer.accumulate_grad_batches=0 must be at least 1"),
    ("trainer.save_ckpt_freq=0", "trainer.save_ckpt_freq=0 must be at least 1"),
    ("trainer.lr=-1", "trainer.lr=-1.0 must be at least 0"),
    ("trainer.min_lr=-1", "trainer.min_lr=-1.0 must be at least 0"),
    ("trainer.warmup_lr=-1", "trainer.warmup_lr=-1.0 must be at least 0"),
    ("trainer.warmup_epochs=-1", "trainer.warmup_epochs=-1.0 must be at least 0"),
    ("trainer.weight_decay=-1", "trainer.weight_decay=-1.0 must be at least 0"),
    ("trainer.keep_last=0", "trainer.keep_last=0 must be at least 1"),
    ("trainer.save_top_k=-2", "trainer.save_top_k=-2 must be at least -1"),
    ("trainer.on_nonfinite=ignore", "trainer.on_nonfinite=ignore is not one of raise, skip"),
    ("trainer.profile=-1", "trainer.profile=-1 must be at least 0"),
    ("trainer.max_skipped_steps=-1", "trainer.max_skipped_steps=-1 must be at least 0"),
    ("trainer.layer_decay=0", "trainer.layer_decay=0.0 must lie in (0, 1]; use null for one learning rate"),
    ("trainer.betas=[0.9,1]", "trainer.betas=[0.9, 1.0] must be two numbers in [0, 1)"),
    ("trainer.clip_grad=0", "trainer.clip_grad=0.0 must be positive; use null for no clipping"),
    (D + "train_clips=window", D + "train_clips=window is not one of windows, events, first; did you mean windows?"),
    (D + "eval_clips=event", D + "eval_clips=event is not one of events, first, windows; did you mean events?"),
    (D + "clip_anchor=end", D + "clip_anchor=end is not one of start, center"),
    (D + "on_missing=ignore", D + "on_missing=ignore is not one of error, repeat, skip"),
    (D + "mask_type=tubes", D + "mask_type=tubes is not one of tube, random, motion; did you mean tube?"),
    (D + "mask_temperature=0", D + "mask_temperature=0.0 must be above 0"),
    (D + "resize=pad", D + "resize=pad is not one of crop, squash"),
    (D + "support_views=all", D + "support_views=all is not one of each, first; did you mean each?"),
    (
        f"{D}mask_type=motion {D}n_masks=2",
        f"{D}eval_masks=shared gives all clips the same mask, and one of mask_type=motion depends on the clip; "
        f"use {D}eval_masks=per_clip",
    ),
    (D + "eval_masks=same", D + "eval_masks=same is not one of shared, per_clip; did you mean shared?"),
    (D + "input_modes=some", D + "input_modes=some is not one of all, configured"),
    (D + "label=player", D + "label=player is not one of event, video"),
    (D + "annotations=clip", D + "annotations=clip is not one of f3set, clips; did you mean clips?"),
    (D + "label_fields=[court,foo]", f"{D}label_fields=foo is not one of {FIELDS}, 0, 1, 2, ..."),
    (D + "label_fields=[]", f"{D}label_fields=[] selects no field; use null for all of {FIELDS}"),
    (D + "disjoint=vidoe", D + "disjoint=vidoe is not one of video, match, player; did you mean video?"),
    (D + "mask_ratio=1", D + "mask_ratio=1.0 must lie in [0, 1)"),
    (D + "eval_mask_ratio=1", D + "eval_mask_ratio=1.0 must lie in [0, 1)"),
    (D + "hflip_prob=1.5", D + "hflip_prob=1.5 must lie in [0, 1]"),
    (D + "num_frames=0", D + "num_frames=0 must be at least 1"),
    (D + "sampling_rate=0", D + "sampling_rate=0 must be at least 1"),
    (D + "max_persons=0", D + "max_persons=0 must be at least 1"),
    (D + "flow_bound=0", D + "flow_bound=0.0 must be positive; use null for .npy files"),
    (D + "flow_bound=20", D + "flow_bound=20.0 needs data_module.flow_pattern with {axis}"),
    (
        f"{D}flow_bound=20 {D}flow_pattern='{{video}}/{{frame}}.jpg'",
        D + "flow_bound=20.0, and the file name of flow is ...",
    ),
    (f"{D}flow_pattern='{{video}}/{{axis}}/{{frame}}.jpg'", D + "flow_bound=None, and the file name of flow is ..."),
    (f"{D}frame_pattern='{{video}}/{{axis}}/{{frame}}.jpg'", D + "frame_pattern=..."),
    (D + "skeleton_joints=foo", D + "skeleton_joints=foo is not one of coco17, openpose18, openpose25, ..."),
    (D + "skeleton_joints=[0,1]", D + "skeleton_joints=[0, 1] is not one of coco17, openpose18, openpose25, ..."),
    (D + "skeleton_img_shape=[720]", D + "skeleton_img_shape=[720] must be [height, width] in px"),
    (D + "skeleton_score_max=0", D + "skeleton_score_max=0.0 must be at least 1"),
    (D + "q_sample=0", D + "q_sample=0 must be at least 1"),
    (D + "tubelet=0", D + "tubelet=0 must be at least 1"),
    (D + "patch_size=0", D + "patch_size=0 must be at least 1"),
    (D + "window_stride=0", D + "window_stride=0 must be at least 1"),
    (D + "frame_number_offset=-1", D + "frame_number_offset=-1 must be at least 0"),
    (D + "random_crop_min_scale=0", D + "random_crop_min_scale=0.0 must lie in (0, 1]"),
    (D + "n_way=1", D + "n_way=1 must be at least 2"),
    (D + "n_way=two", D + "n_way=two must be a whole number or a list of whole numbers"),
    (D + "k_shot=[1,0]", D + "k_shot=0 must be at least 1"),
    (D + "episodes=1", D + "episodes=1 must be at least 2"),
    (D + "n_masks=-1", D + "n_masks=-1 must be at least 0"),
    (D + "frame_size=[64]", D + "frame_size=[64] must be [height, width] in px"),
    (D + "crop_size=[64,64,3]", D + "crop_size=[64, 64, 3] must be [height, width] in px"),
    (D + "crop_size=[64,72]", D + "crop_size[1]=72 is larger than frame_size[1]=68; use at most 68"),
    (D + "crop_size=[64,56]", D + "crop_size[1]=56 is not a multiple of patch_size=16; use 48 or 64"),
    (D + "crop_size=[8,64]", D + "crop_size[0]=8 is not a multiple of patch_size=16; use 16"),
    (D + "num_frames=7", D + "num_frames=7 is not a multiple of tubelet=2; use 6 or 8"),
    (D + "mask_ratio=0.999", D + "mask_ratio=0.999 leaves none of 64 tokens visible; use a smaller ratio"),
    (
        D + "mask_ratio=0.99 " + D + "mask_type=tube",
        D + "mask_ratio=0.99 leaves none of 16 tokens visible; use a smaller ratio",
    ),
    (
        f"{D}mask_ratio=0.999 {D}mask_type=motion",
        D + "mask_ratio=0.999 leaves none of 64 tokens visible; use a smaller ratio",
    ),
    (
        f"{D}n_masks=2 {D}eval_mask_ratio=0.999",
        D + "eval_mask_ratio=0.999 leaves none of 64 tokens visible; use a smaller ratio",
    ),
    (
        D + "frame_pattern='{vid}.jpg'",
        D + "frame_pattern='{vid}.jpg' must contain {video} and {frame}; see configs/dataset for examples",
    ),
    (
        D + "flow_pattern='{video}/{frame.x}'",
        D + "flow_pattern='{video}/{frame.x}' must contain {video} and {frame}; ...",
    ),
    (M + "rgb.pattern='{video}.jpg'", M + "rgb.pattern='{video}.jpg' must contain {video} and {frame}; ..."),
    (
        M + "skeleton.pattern=all.pkl",
        M + "skeleton.pattern='all.pkl' must contain {video}; see configs/dataset for examples",
    ),
    (M + "flow.input_stride=0", M + "flow.input_stride=0 must be at least 1"),
    (
        M + "flow.input_stride=3",
        M + "flow.input_stride=3 must divide data_module.patch_size=16 and data_module.crop_size=[64, 64]",
    ),
    (M + "flow.mean=[1,2,3]", M + "flow: mean has 3 values, expected 2 or 1"),
    (M + "flow.std=[0]", M + "flow: std must be positive, got (0.0, 0.0)"),
    (
        M + "flow.target=pixels",
        M + "flow.target=pixels is not one of norm_pix, motion_energy, pixel; did you mean pixel?",
    ),
    (M + "skeleton.sigma=0", M + "skeleton.sigma=0.0 must be positive; use null for the modality's default"),
]
PRETRAIN = [
    ("modality=rbg", "modality=rbg is not one of rgb, flow, skeleton; did you mean rgb?"),
    ("trainer.image_every_n_epochs=-1", "trainer.image_every_n_epochs=-1 must be at least 0"),
    (
        "strategy=deepspeed_stage_0_offload",
        "strategy=deepspeed_stage_0_offload is not one of auto, ddp, deepspeed, ...",
    ),
    ("model.pos_embed=fixed", "model.pos_embed=fixed is not one of sincos, sincos_separable, learned"),
    (
        "strategy=deepspeed_stage_3 trainer.on_nonfinite=skip",
        "trainer.on_nonfinite=skip does not work with ZeRO stage 3; use stage 2 or on_nonfinite=raise",
    ),
    (
        "strategy=deepspeed_stage_3 compile=true",
        "compile=true does not work with ZeRO stage 3, which gathers weights "
        "inside the encoder; use stage 2 or compile=false",
    ),
    (
        "strategy=deepspeed_stage_3 trainer.ema=0.9",
        "trainer.ema=0.9 does not work with ZeRO stage 3, in which no process has all weights; use stage 2 or ema=null",
    ),
    ("pooling=person", "pooling=person has no effect in a pretraining; use another pooling, or pooling=null"),
    ("trainer.check_val_every_n_epoch=-1", "trainer.check_val_every_n_epoch=-1 must be at least 0"),
    ("decoder_mask_ratio=1", "decoder_mask_ratio=1.0 must lie in [0, 1)"),
    ("model.heads=5", "model.dim=128 is not divisible by model.heads=5; set model.head_dim"),
    ("model.decoder_heads=5", "model.decoder_dim=64 is not divisible by model.decoder_heads=5; change one of them"),
    (
        "trainer.lambda_ce=0.1",
        "trainer.lambda_ce=0.1 has no effect without a source; set source=DATASET, also with an experiment that sets "
        "this key, such as experiment=mm_cdfsl",
    ),
    ("trainer.lambda_target=0", "trainer.lambda_target=0.0 has no effect without a source; set source=DATASET, ..."),
]
SOURCE = [  # with a source that equals data_module
    (
        "source.num_frames=16 source.crop_size=[64,48]",
        "source and data_module must have the same clips (source / data_module): num_frames 16 / 8, crop_size [64, 48] "
        "/ [64, 64]; set source.num_frames=8 source.crop_size=[64,64]",
    ),
    (
        "source.modalities.rgb.target=pixel",
        "source and data_module must have the same clips (source / data_module): modalities.rgb.target pixel / "
        "motion_energy; set source.modalities.rgb.target=motion_energy",
    ),
    ("source.crop_size=[64,80]", "source.crop_size[1]=80 is larger than frame_size[1]=68; use at most 68"),
    ("source.train_clips=all", "source.train_clips=all is not one of windows, events, first"),
    ("modality=depth", "modality=depth is not one of rgb, flow, skeleton"),
    ("strategy=deepspeed_stage_3", "source does not work with ZeRO stage 3; use stage 2, or source=null"),
    ("trainer.lambda_source=-1", "trainer.lambda_source=-1.0 must be at least 0"),
    ("trainer.classifier_dropout=1", "trainer.classifier_dropout=1.0 must lie in [0, 1)"),
    (
        "trainer.lambda_ce.flow=1",
        "trainer.lambda_ce={'flow': 1} must be a number from 0, or a mapping from modality to number with an entry rgb",
    ),
    ("trainer.lambda_ce=-1", "trainer.lambda_ce=-1 must be a number from 0, or a mapping ..."),
    (
        "trainer.lambda_ce=0 trainer.lambda_source=0",
        "trainer.lambda_ce is 0 and lambda_source is 0: nothing is learned from source; set source=null",
    ),
    (
        "trainer.lambda_ce=0 data_module.mask_ratio=0.001",
        "trainer.lambda_ce is 0 and data_module.mask_ratio=0.001 removes no token: nothing is learned from source; ...",
    ),
]
DISTILL = [
    (
        "strategy=deepspeed_stage_3",
        "strategy=deepspeed_stage_3: in stage 3 no process has all weights, so the checkpoint "
        "cannot be a single file; use strategy=deepspeed_stage_2",
    ),
    ("ckpt_path=''", "ckpt_path is empty; give a value, or remove ckpt_path="),
    ("data_module.modalities.flow.dir=''", "data_module.modalities.flow.dir is empty; ..."),
    ("strategy=dpp", "strategy=dpp is not one of auto, ddp, deepspeed, ..."),
    ("trainer.check_val_every_n_epoch=-1", "trainer.check_val_every_n_epoch=-1 must be at least 0"),
    ("trainer.val_episodes=1", "trainer.val_episodes=1 must be at least 2"),
    ("trainer.monitor=loss", "trainer.monitor=loss is not one of train_loss, val_top1_action"),
    (
        "trainer.monitor=val_top1_action",
        "trainer.monitor=val_top1_action needs a validation in each epoch that is saved: "
        "trainer.check_val_every_n_epoch=None must divide trainer.save_ckpt_freq=2",
    ),
    ("trainer.ema=1", "trainer.ema=1.0 must lie in [0, 1); use null for no average"),
    ("trainer.cache_teacher_epochs=-1", "trainer.cache_teacher_epochs=-1 must be at least 0"),
    ("trainer.teachers=[rgb,flwo]", "trainer.teachers=flwo is not one of rgb, flow, skeleton; did you mean flow?"),
    (
        "trainer.teachers=[flow]",
        "trainer.teachers must contain rgb, because the student starts as a copy of the RGB teacher; or set student",
    ),
    (
        "trainer.ckpt_path=[a]",
        "trainer.ckpt_path must name a checkpoint for each of rgb, flow, skeleton: a list in this "
        "order, or a mapping; got ['a']. For 1 teacher set trainer.teachers=[rgb]. "
        "`mmdistill find-checkpoints output` prints a list to copy",
    ),
    ("probe=linear", "probe=linear is not one of false, true, attentive"),
    ("pooling=max", "pooling=max is not one of mean, motion, last_k, segments, halves, person"),
    ("pooling_last_k=0", "pooling_last_k=0 must be at least 1"),
    (
        "pooling=person trainer.teachers=[rgb,flow] trainer.ckpt_path=[a,b]",
        "pooling=person needs skeletons; add skeleton to trainer.teachers",
    ),
    ("pooling=person trainer.cache_teacher_epochs=2", "pooling=person reads skeletons in each epoch, and ..."),
    ("classifier=[logistic,centriod]", "classifier=centriod is not one of logistic, ..."),
    ("classifier=[]", "classifier=[] must be a name or a list of names"),
    ("train=False", "train=False test=True needs ckpt_path=PATH, the checkpoint to evaluate"),
    (
        "eval_component=student",
        "eval_component=student: a component's name ends with its modality, like student_rgb, teacher_flow",
    ),
    (
        "baselines=[random,teacher_b]",
        "baselines=teacher_b: a component's name ends with its modality, like student_rgb, teacher_flow, or random_flow"
        " for an untrained encoder",
    ),
]


def _make_joint(*given: str) -> PretrainConfig:
    return pretrain_config(source_override(), *given)


def _rules() -> list[tuple[Callable[..., object], str, str]]:
    pretrain = [(pretrain_config, *rule) for rule in (*COMMON, *PRETRAIN)]
    pretrain += [(_make_joint, *rule) for rule in SOURCE]
    return [*pretrain, *((distill_config, *rule) for rule in DISTILL)]


@pytest.mark.parametrize(
    ("make", "given", "message"), _rules(), ids=lambda value: value if isinstance(value, str) else ""
)
def test_invalid_values_raise(make: Callable[..., object], given: str, message: str) -> None:
    """Before anything is read or written."""
    pattern = re.escape(message.removesuffix("...")) + ("" if message.endswith("...") else "$")
    with pytest.raises(ConfigError, match="^" + pattern):
        make(*given.split())


@pytest.mark.parametrize("given", [rule[0] for rule in COMMON])
def test_rules_of_common_keys_apply_to_both_phases(given: str) -> None:
    with pytest.raises(ConfigError):
        distill_config(*given.split())


@pytest.mark.parametrize(
    ("mask_type", "smallest", "largest"),
    [("tube", 1 / 16, 15 / 16), ("random", 1 / 64, 63 / 64), ("motion", 1 / 64, 63 / 64)],
)
def test_masks_remove_from_one_to_all_but_one(mask_type: str, smallest: float, largest: float) -> None:
    """A tube mask removes some of the 4 x 4 positions, the others some of the 4 x 4 x 4 tokens."""

    def data(ratio: float) -> DataModuleConfig:
        return pretrain_config(f"{D}mask_type={mask_type}", f"{D}mask_ratio={ratio}").data_module

    assert not removes_no_token(data(0.51 * smallest))
    assert removes_no_token(data(0.49 * smallest))
    assert data(largest).mask_ratio == largest


def test_absent_logger_package_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="logger=wandb: wandb is not installed; pip install wandb, or remove it from"):
        pretrain_config("logger=[csv,wandb]")


def test_two_checkpoints_for_three_teachers_name_the_key_for_two_teachers() -> None:
    with pytest.raises(ConfigError) as caught:
        distill_config("trainer.ckpt_path=[a,b]")
    subsets = "trainer.teachers=[rgb,flow] or trainer.teachers=[rgb,skeleton]"
    assert f"got ['a', 'b']. For 2 teachers set {subsets}. " in str(caught.value)


def test_dataset_without_modality_raises() -> None:
    rest = "or add data_module.modalities.skeleton to the dataset's config"
    has = "dataset epic has no skeleton, but rgb, flow"
    dataset = ["dataset=epic", "~data_module.modalities.skeleton"]
    with pytest.raises(ConfigError, match=f"^modality: {has}; use one of these, {rest}$"):
        load_config(PretrainConfig, "config_pretrain", ["modality=skeleton", *dataset])
    with pytest.raises(ConfigError, match=rf"^trainer\.teachers: {has}; set trainer\.teachers=\[rgb,flow\], {rest}$"):
        load_config(DistillConfig, "config_mmdistill", [TEACHERS, *dataset])


@pytest.mark.parametrize("strategy", ["auto", "ddp", "deepspeed"])
def test_named_strategies_select_their_stage(strategy: str) -> None:
    config = pretrain_config(f"strategy={strategy}")
    assert (zero_stage(config), has_offload(config)) == (2 if strategy == "deepspeed" else 0, False)


@pytest.mark.parametrize(("stage", "end"), [(0, ""), *((s, e) for s in (1, 2, 3) for e in ("", "_offload"))])
def test_strategy_selects_zero_stage_and_offload(stage: int, end: str) -> None:
    from mmdistill.pretrain.deepspeed import deepspeed_config

    config = pretrain_config(f"strategy=deepspeed_stage_{stage}{end}")
    assert (zero_stage(config), has_offload(config)) == (stage, bool(end))
    zero = deepspeed_config(config, "32")["zero_optimization"]
    assert (zero["stage"], "offload_optimizer" in zero) == (stage, bool(end))


def test_component_names_end_with_their_modality() -> None:
    for name in ("student_ema_rgb", "teacher_flow", "pretrained_skeleton", "encoder"):
        assert distill_config(f"eval_component={name}").eval_component == name
    assert distill_config("baselines=[random,/runs/student/last.ckpt]").baselines[1] == "/runs/student/last.ckpt"
    assert not distill_config("test=False", "eval_component=student").test  # nothing is scored


def test_config_names_every_classifier() -> None:
    from mmdistill.fewshot.classifiers import CLASSIFIERS

    assert sorted(CLASSIFIER_NAMES) == sorted(CLASSIFIERS.names())


def test_classifiers_of_entry_points_are_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="classifier=mine is not one of logistic"):
        distill_config("classifier=mine")
    monkeypatch.setattr(schema, "entry_point_names", lambda group: ["mine"] if "classifiers" in group else [])
    assert distill_config("classifier=[knn,mine]").classifier == ["knn", "mine"]


def test_teacher_paths_take_list_and_mapping() -> None:
    expected = {"rgb": "a", "flow": "b", "skeleton": "c"}
    assert teacher_paths(distill_config().trainer) == expected
    mapping = load_config(DistillConfig, "config_mmdistill", ["trainer.ckpt_path={skeleton:c,rgb:a,flow:b}"])
    assert teacher_paths(mapping.trainer) == expected
    with pytest.raises(ConfigError, match="got the keys rgb, flwo, skeleton"):
        load_config(DistillConfig, "config_mmdistill", ["trainer.ckpt_path={rgb:a,flwo:b,skeleton:c}"])
    two = distill_config("trainer.teachers=[rgb,skeleton]", "trainer.ckpt_path=[a,c]")
    assert teacher_paths(two.trainer) == {"rgb": "a", "skeleton": "c"}
    assert teacher_paths(distill_config("trainer.teachers=[rgb,skeleton]").trainer) == {"rgb": "a", "skeleton": "c"}


@pytest.mark.parametrize(("short", "target"), SHORT_KEYS.items())
def test_short_key_on_the_command_line_takes_precedence(short: str, target: tuple[str, str]) -> None:
    modality, key = target
    long, first, second = f"modalities.{modality}.{key}", "a/{video}/{frame}", "b/{video}/{frame}"
    data = load_config(PretrainConfig, "config_pretrain", ["modality=rgb", f"data_module.{short}={first}"]).data_module
    assert (modality_setting(data, modality, key), modality_setting_key(data, modality, key)) == (first, short)
    data = pretrain_config(f"data_module.{long}={second}").data_module
    assert (modality_setting(data, modality, key), modality_setting_key(data, modality, key)) == (second, long)
    data = pretrain_config(f"data_module.{long}={second}", f"data_module.{short}={first}").data_module
    assert (modality_setting(data, modality, key), modality_setting_key(data, modality, key)) == (first, short)


def test_short_keys_work_in_a_dataset_file(tmp_path: Path) -> None:
    lines = ["# @package data_module", "name: mine", "target_data_dir: /data", "unlabel_json_path: a.json",
             "fewshot_eval_json_path: b.json", "frame_size: [64, 64]", "crop_size: [64, 64]", "modalities:",
             "  rgb: {input_stride: 1, mean: [0], std: [1], target: pixel}",
             "  flow: {dir: long, input_stride: 1, mean: [0], std: [1], target: pixel}"]  # fmt: skip
    values = {
        short: "{video}/{frame}" if key == "pattern" else f"{name}_files" for short, (name, key) in SHORT_KEYS.items()
    }
    (tmp_path / "dataset").mkdir()
    file = tmp_path / "dataset" / "mine.yaml"
    file.write_text("\n".join([*lines, *(f'{short}: "{value}"' for short, value in values.items())]))
    given = ["modality=flow", "dataset=mine"]
    data = load_config(PretrainConfig, "config_pretrain", given, config_dir=tmp_path).data_module
    assert {short: modality_setting(data, *target) for short, target in SHORT_KEYS.items()} == values


def test_unset_folder_is_named_by_both_keys(tmp_path: Path) -> None:
    given = [given for given in overrides(make_tiny(tmp_path / "data", per_class=1)) if "skeleton_dir" not in given]
    data = pretrain_config(*given, "data_module.modalities.skeleton.dir=null").data_module
    message = (
        "data_module.modalities.skeleton.dir is not set (and its short form data_module.skeleton_dir is not set); "
        "set it if dataset tiny has these files"
    )
    with pytest.raises(ConfigError, match=re.escape(message)):
        make_clip_dataset(data, ("skeleton",), training=True, seed=0)


def test_specs_have_the_values_of_the_dataset() -> None:
    specs = modality_specs(pretrain_config(M + "flow.mean=[1,2]", M + "skeleton.sigma=null").data_module)
    assert list(specs) == ["rgb", "flow", "skeleton"]
    assert (specs["flow"].mean, specs["flow"].std, specs["flow"].target) == ((1.0, 2.0), (0.4, 0.4), "pixel")
    assert specs["flow"].compensate == "median"
    assert (specs["skeleton"].sigma, specs["skeleton"].input_stride) == (0.6, 2)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.teacher_weights={flw: 2}", r"teacher_weights\.flw: there is no teacher flw, only rgb, flow"),
        ("trainer.teacher_weights={flow: -1}", r"teacher_weights\.flow=-1 must be a finite number of at least 0"),
        ("trainer.teacher_weights={flow: much}", r"teacher_weights\.flow=much must be a finite number"),
        ("trainer.teacher_weights=2", r"teacher_weights=2 must be a mapping from teachers to numbers"),
        ("trainer.teacher_weights={rgb: 0, flow: 0, skeleton: 0}", "all weights are 0"),
        ("trainer.standardize_targets=phis", "standardize_targets=phis is not one of false, true, standard, phi_s"),
    ],
)
def test_invalid_targets_raise(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        distill_config(override)


def test_weights_default_to_one() -> None:
    weights = teacher_weights(distill_config("trainer.teacher_weights={flow: 2}").trainer)
    assert weights == {"rgb": 1.0, "flow": 2.0, "skeleton": 1.0}
