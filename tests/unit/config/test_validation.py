"""The schema: every file composes, every key is read, every wrong key is named."""

import ast
import dataclasses
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from mmdistill.config import (
    HEAD_NAMES,
    ConfigError,
    DistillConfig,
    PretrainConfig,
    explain,
    parse,
    register_schemas,
    schema,
    teacher_paths,
)
from mmdistill.config.compose import CONFIGS, load_config
from mmdistill.config.overrides import quote_overrides
from tests.commands import TIMEOUT

ROOT = Path(__file__).resolve().parents[3]
PATHS = "trainer.ckpt_path=[a,b,c]"


def _compose(name: str, *overrides: str) -> DictConfig:
    register_schemas()
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIGS)):
        return compose(name, overrides=list(overrides))


def _pretrain(*overrides: str) -> PretrainConfig:
    return load_config(PretrainConfig, "config_pretrain", ["modality=rgb", *overrides])


def _distill(*overrides: str) -> DistillConfig:
    return load_config(DistillConfig, "config_mmdistill", [PATHS, *overrides])


def test_every_yaml_composes() -> None:
    """Top-level files alone, each file of a group as an override of the entrypoint that has this group."""
    files = sorted(CONFIGS.rglob("*.yaml"))
    composed = 0
    for file in files:
        group = file.parent.relative_to(CONFIGS).as_posix()
        if group == ".":
            pretrain, overrides = "pretrain" in file.stem, []
        else:
            pretrain = group == "model" or file.stem.startswith("pretrain")
            teachers = ["trainer.teachers=[rgb,flow]"] if group == "dataset" else []  # that every dataset has
            overrides = [f"{group}={file.stem}", *teachers]
        name = file.stem if group == "." else ("config_pretrain" if pretrain else "config_mmdistill")
        kind, needed = (PretrainConfig, ["modality=rgb"]) if pretrain else (DistillConfig, [PATHS, "ckpt_path=a"])
        parse(_compose(name, *needed, *overrides), kind)
        composed += 1
    assert composed == len(files) > 15


@pytest.mark.parametrize("end", ["", "_offload"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_strategy_selects_zero_stage_and_offload(stage: int, end: str) -> None:
    from mmdistill.pretrain.deepspeed import deepspeed_config

    if stage == 0 and end:
        with pytest.raises(ConfigError, match="strategy=deepspeed_stage_0_offload is not one of auto, ddp"):
            _pretrain("strategy=deepspeed_stage_0_offload")
        return
    zero = deepspeed_config(_pretrain(f"strategy=deepspeed_stage_{stage}{end}"), "32")["zero_optimization"]
    assert (zero["stage"], "offload_optimizer" in zero) == (stage, bool(end))


def test_fp16_on_cpu_is_an_error() -> None:
    with pytest.raises(ConfigError, match="precision=16 needs a GPU, and accelerator=cpu"):
        _distill("precision=16", "accelerator=cpu")


def test_every_key_is_read() -> None:
    """Each field of each schema class occurs as an attribute outside the schema."""
    read: set[str] = set()
    sources = [*(ROOT / "src").rglob("*.py"), *ROOT.glob("*.py")]
    for path in sources:
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                read.add(node.attr)
    for path in CONFIGS.glob("*.yaml"):  # run folders are named by keys
        read.update(re.findall(r"\$\{(\w+)\}", path.read_text()))
    classes = [cls for cls in vars(schema).values() if isinstance(cls, type) and dataclasses.is_dataclass(cls)]
    assert len(classes) == 9
    assert not {f"{c.__name__}.{f.name}" for c in classes for f in dataclasses.fields(c) if f.name not in read}


def test_parsed_config_is_read_only() -> None:
    config = _pretrain()
    with pytest.raises(dataclasses.FrozenInstanceError, match=r"TrainerConfig\.lr"):
        config.trainer.lr = 1.0
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.data_module.modalities["rgb"].input_stride = 3


@pytest.mark.parametrize(
    ("make", "override", "message"),
    [
        (_pretrain, "modality=rbg", "did you mean rgb"),
        (_pretrain, "trainer.epochs=0", "trainer.epochs=0 must be at least 1"),
        (_pretrain, "data_module.mask_ratio=1", "mask_ratio"),
        (_pretrain, "data_module.mask_type=tubes", "did you mean tube"),
        (_pretrain, "data_module.crop_size=[64,56]", r"crop_size\[1\]=56 is not a multiple of patch_size=16"),
        (_pretrain, "data_module.crop_size=[64,72]", "larger than frame_size"),
        (_pretrain, "data_module.num_frames=7", "num_frames=7"),
        (_pretrain, "model.heads=5", "model.dim=128 is not divisible by model.heads=5"),
        (_distill, "trainer.teachers=[flow]", "must contain rgb"),
        (_distill, "trainer.ckpt_path=[a]", "find_checkpoints"),
        (_distill, "train=False", "ckpt_path=PATH"),
        (_distill, "data_module.k_shot=[1,0]", "k_shot=0"),
        (_distill, "data_module.n_way=two", "n_way=two"),
        (_distill, "data_module.disjoint=vidoe", "data_module.disjoint=vidoe is not one of video; did you mean video"),
        (_distill, "data_module.label_fields=[court,foo]", "label_fields=foo is not one of player"),
        (_distill, "data_module.label_fields=[]", "leaves no label"),
        (_distill, "data_module.annotations=clip", "annotations=clip is not one of clips, f3set; did you mean clips"),
        (_distill, "data_module.window_stride=0", "window_stride=0 must be at least 1"),
        (_distill, "data_module.frame_number_offset=-1", "frame_number_offset=-1"),
        (_distill, "data_module.random_crop_min_scale=0", r"min_scale=0.0 must lie in \(0, 1\]"),
        (
            _distill,
            "data_module.frame_pattern='{vid}.jpg'",
            "frame_pattern='{vid}.jpg' must contain {video} and {frame}",
        ),
        (
            _distill,
            "data_module.flow_pattern='{video}/{frame.x}'",
            "flow_pattern='{video}/{frame.x}' must contain {video} and {frame}",
        ),
        (_distill, "data_module.modalities.flow.input_stride=0", "modalities.flow.input_stride=0 must be at least 1"),
        (_distill, "data_module.modalities.flow.mean=[1,2,3]", "modalities.flow: mean has 3 values, expected 2 or 1"),
        (_distill, "data_module.modalities.skeleton.sigma=0", "skeleton.sigma=0.0 must be positive"),
        (_pretrain, "data_module.mask_ratio=0.999", "data_module.mask_ratio=0.999 leaves none of "),
        (_distill, ["data_module.n_masks=2", "data_module.eval_mask_ratio=0.999"], "eval_mask_ratio=0.999 leaves none"),
        (_distill, "classifier=[logistic,centriod]", "classifier=centriod is not one of .*did you mean centroid"),
        (_distill, "seed=-1", "seed=-1 must be at least 0"),
        (_distill, "trainer.betas=[0.9,1]", r"two numbers in \[0, 1\)"),
        (_distill, "trainer.clip_grad=0", "clip_grad=0.0 must be positive"),
        (
            _distill,
            "data_module.modalities.skeleton.pattern=all.pkl",
            "skeleton.pattern='all.pkl' must contain {video};",
        ),
        (_pretrain, ["dataset=epic", "modality=skeleton"], "modality: dataset epic has no skeleton, but rgb, flow"),
        (_distill, "dataset=epic", "trainer.teachers: dataset epic has no skeleton, but rgb, flow"),
        (
            _distill,
            "eval_component=student",
            "eval_component=student: a component's name ends with its modality, like student_rgb",
        ),
        (
            _distill,
            "baselines=[random,teacher_b]",
            "baselines=teacher_b: a component's name ends with its modality, like student_rgb",
        ),
    ],
)
def test_wrong_values_are_named(make: Any, override: str | list[str], message: str) -> None:
    """Before anything is read or made."""
    with pytest.raises(ConfigError, match=message):
        make(*([override] if isinstance(override, str) else override))


def test_networks_are_named_by_their_modality() -> None:
    for name in ("student_ema_rgb", "teacher_flow", "pretrained_skeleton", "encoder"):
        assert _distill(f"eval_component={name}").eval_component == name
    assert _distill("baselines=[random,/runs/student/last.ckpt]").baselines[1] == "/runs/student/last.ckpt"
    assert not _distill("test=False", "eval_component=student").test  # nothing is scored


def test_the_schema_names_every_head() -> None:
    from mmdistill.fewshot.classifiers import HEADS

    assert sorted(HEAD_NAMES) == sorted(HEADS)


def test_teacher_paths_take_list_and_mapping() -> None:
    expected = {"rgb": "a", "flow": "b", "skeleton": "c"}
    assert teacher_paths(_distill().trainer) == expected
    mapping = "trainer.ckpt_path={skeleton:c,rgb:a,flow:b}"
    assert teacher_paths(parse(_compose("config_mmdistill", mapping), DistillConfig).trainer) == expected
    with pytest.raises(ConfigError, match="flwo"):
        parse(_compose("config_mmdistill", "trainer.ckpt_path={rgb:a,flwo:b,skeleton:c}"), DistillConfig)
    two = _distill("trainer.teachers=[rgb,skeleton]", "trainer.ckpt_path=[a,c]")
    assert teacher_paths(two.trainer) == {"rgb": "a", "skeleton": "c"}
    assert teacher_paths(_distill("trainer.teachers=[rgb,skeleton]").trainer) == {"rgb": "a", "skeleton": "c"}


@pytest.mark.parametrize(
    ("argument", "quoted"),
    [
        ("ckpt_path=/p/epoch=49-train_loss=0.0081.ckpt", "ckpt_path='/p/epoch=49-train_loss=0.0081.ckpt'"),
        ("ckpt_path='/p/epoch=49.ckpt'", "ckpt_path='/p/epoch=49.ckpt'"),
        ("trainer.ckpt_path=[/a/epoch=1-loss=2,/b]", "trainer.ckpt_path=['/a/epoch=1-loss=2',/b]"),
        ("trainer.ckpt_path={rgb:/a/epoch=1,flow:/b}", "trainer.ckpt_path={rgb:'/a/epoch=1',flow:/b}"),
        ("ckpt_path=/a/epoch=1,/a/epoch=2", "ckpt_path='/a/epoch=1','/a/epoch=2'"),
        ("trainer.epochs=3", "trainer.epochs=3"),
        ("--config-name=config_mmdistill_tennis", "--config-name=config_mmdistill_tennis"),
        ("-m", "-m"),
        ("ckpt_path=/it's/epoch=1", "ckpt_path='/it\\'s/epoch=1'"),
    ],
)
def test_equals_signs_are_quoted(argument: str, quoted: str) -> None:
    assert quote_overrides([argument]) == [quoted]


def test_quoted_paths_arrive_unchanged() -> None:
    for path in (
        "/p/epoch=49-train_loss=0.0081.ckpt",
        "/a b/epoch=1",
        "/x[1]/epoch=2",
        "/it's/epoch=3",
        "/数据/epoch=4",
    ):
        assert _compose("config_mmdistill", PATHS, *quote_overrides([f"ckpt_path={path}"])).ckpt_path == path
    listed = _compose("config_mmdistill", *quote_overrides(["trainer.ckpt_path=[/a/epoch=1-loss=2,/b/c=d/e=f,/g]"]))
    assert list(listed.trainer.ckpt_path) == ["/a/epoch=1-loss=2", "/b/c=d/e=f", "/g"]


def test_launcher_flags_are_dropped() -> None:
    assert quote_overrides(["--local_rank=0", "--local-rank=1", "modality=rgb"]) == ["modality=rgb"]


def _run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT)


def test_misspelt_keys_fail_on_the_command_line_and_in_yaml(tmp_path: Path) -> None:
    done = _run("pretrain_main.py", "modality=rgb", "trainer.epcohs=3")
    assert done.returncode == 2
    assert "epcohs" in done.stderr
    assert "trainer.epochs" in done.stderr
    assert "Traceback" not in done.stderr
    (tmp_path / "bad.yaml").write_text("defaults:\n  - config_pretrain\n  - _self_\ntrainer:\n  epcohs: 3\n")
    done = _run("pretrain_main.py", f"--config-dir={tmp_path}", "--config-name=bad", "modality=rgb")
    assert done.returncode == 2
    assert "epcohs" in done.stderr
    assert "Traceback" not in done.stderr
    done = _run("pretrain_main.py", "modality=rgb", "trainer.epochs=three")
    assert done.returncode == 2
    assert "trainer.epochs" in done.stderr


def test_help_and_validation_import_no_torch() -> None:
    code = (
        "import sys, runpy; sys.argv = ['pretrain_main.py', '--help']\n"
        "try:\n    runpy.run_path('pretrain_main.py', run_name='__main__')\n"
        "except SystemExit as end:\n    assert not end.code, end.code\n"
        "assert 'torch' not in sys.modules"
    )
    done = _run("-c", code)
    assert done.returncode == 0, done.stderr
    assert "target_data_dir" in done.stdout


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("dataset=tenis", "Could not find 'dataset/tenis'. Available: demo, ego4d, epic, meccano, tennis, wear"),
        ("trainer.lr=abc", "trainer.lr=abc (Value 'abc' of type 'str' could not be converted to Float)"),
        ("seed=1", "modality is not given; give it on the command line, for example modality=rgb"),
    ],
)
def test_what_may_be_given_is_told(given: str, told: str) -> None:
    with pytest.raises(Exception) as caught:  # noqa: PT011 - Hydra's or ours
        load_config(PretrainConfig, "config_pretrain", [given])
    message = explain(caught.value, PretrainConfig)
    assert told in message
    assert "$VALUE" not in message
    assert "Near matches" not in message
