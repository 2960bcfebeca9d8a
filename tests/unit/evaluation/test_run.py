"""The evaluation of a checkpoint in this process: input modes, log lines, and the feature cache."""

import json
import logging
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from mmdistill.checkpoint import CheckpointError, read_checkpoint, save_torch
from mmdistill.config import ConfigError, DistillConfig, modality_specs, to_plain
from mmdistill.distill.teachers import read_teacher
from mmdistill.distributed.process import Process
from mmdistill.evaluation import run
from mmdistill.evaluation.networks import Network, load_networks
from mmdistill.evaluation.report import write
from mmdistill.evaluation.run import (
    SHOWN_DATA_KEYS,
    check_evaluation,
    evaluate_checkpoint,
    report_settings,
    run_folder_lines,
    training_facts,
)
from mmdistill.fewshot.episodes import EpisodeSpec, sample_episodes
from mmdistill.fewshot.errors import FewshotError
from mmdistill.fewshot.features import load_features
from mmdistill.models.videomae import Encoder, EncoderConfig
from tests.configs import distill_config
from tests.tiny_data import EVAL, SCORE_STEP, make_tiny, overrides

ENCODER = EncoderConfig(
    channels=3, num_frames=4, height=32, width=32, patch=8, tubelet=2, dim=32, depth=1, heads=2, head_dim=16, mlp_dim=64
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny data; read-only."""
    return make_tiny(tmp_path_factory.mktemp("tiny") / "data")


@pytest.fixture
def own_data(data: Path, tmp_path: Path) -> Path:
    """A copy of `data` that a test can change."""
    return Path(shutil.copytree(data, tmp_path / "data"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A distilled file: a student and a teacher with random weights; read-only."""
    tmp_path = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(7)
    encoders = {name: Encoder(ENCODER) for name in ("student_rgb", "teacher_rgb")}
    state = {
        f"{name}.encoder.{key}": v for name, encoder in encoders.items() for key, v in encoder.state_dict().items()
    }
    meta = {"kind": "distill", "encoders": {name: to_plain(ENCODER) for name in encoders}}
    save_torch({"state_dict": state, "mmdistill": meta}, tmp_path / "student.ckpt")
    return tmp_path / "student.ckpt"


@pytest.fixture
def no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw no report: that takes half of a short evaluation."""
    monkeypatch.setattr(write, "render_page", lambda *_, **__: "")


def _config(root: Path, *more: str) -> DistillConfig:
    test = ["train=False", "ckpt_path=x", "accelerator=cpu", "classifier=[centroid,knn]"]
    return distill_config(*overrides(root), *EVAL, *test, *more)


def _evaluate(root: Path, checkpoint: Path, out: Path, *more: str) -> dict[str, Any]:
    cache = f"feature_cache={out / 'cache'}"  # unless `more` gives another
    return evaluate_checkpoint(_config(root, cache, *more), str(checkpoint), out)


@pytest.mark.parametrize(
    ("meta", "facts"),
    [
        ({"epoch": 11, "batch": None}, ["Training: dataset tennis, 12 of 12 epochs."]),
        ({"epoch": 3, "batch": 5}, ["Training: dataset tennis, 3 of 12 epochs."]),  # stopped inside an epoch
        ({}, []),
    ],
)
def test_headline_states_dataset_and_epochs_of_the_training(meta: dict[str, Any], facts: list[str]) -> None:
    config = {"data_module": {"name": "tennis"}, "trainer": {"epochs": 12}}
    assert training_facts({**meta, "config": config}) == facts
    assert training_facts(meta) == []  # of another program


SHARED, PER_CLIP = "2 tube masks, 75% removed, shared", "2 tube masks, 75% removed, per clip"


def test_all_three_input_modes_are_evaluated_by_default(data: Path, checkpoint: Path, tmp_path: Path) -> None:
    """The headline and the rows of the baselines use the configured input mode."""
    out = _evaluate(data, checkpoint, tmp_path)
    assert json.loads((tmp_path / "fewshot.json").read_text()) == out
    assert (out["network"], out["input_mode"]) == ("student_rgb", "whole clips")
    assert [load_features(file).network for file in out["files"]] == ["student_rgb"] * 3 + ["random", "teacher_rgb"]
    masked = [f"student_rgb ({SHARED})", f"student_rgb ({PER_CLIP})"]
    for setting in out["settings"]:
        assert list(setting["rows"]) == ["student_rgb", *masked, "random", "teacher_rgb"]
        for row in setting["rows"].values():
            assert row["seconds"] > 0
        for name in masked:
            difference = setting["differences"][f"student_rgb - {name}"]["difference"]
            own, other = (setting["rows"][n]["top1_action_ensemble"] for n in ("student_rgb", name))
            assert difference == pytest.approx(own - other)
    assert out["settings"][0]["rows"]["student_rgb"]["top1_action_ensemble"] == out["top1_action_ensemble"]
    page = (tmp_path / "report.html").read_text()
    assert all(text in page for text in ("whole clips", SHARED, PER_CLIP))


@pytest.mark.usefixtures("no_page")
def test_protocol_of_the_paper(data: Path, checkpoint: Path, tmp_path: Path) -> None:
    """One classifier, fitted to the first view of the support clips, classifies both views of the queries."""
    protocol = ["data_module.support_views=first", "data_module.resize=squash", "data_module.n_masks=2"]
    more = ["data_module.input_modes=configured", "data_module.eval_masks=per_clip", "classifier=centroid"]
    out = _evaluate(data, checkpoint, tmp_path, *protocol, *more)
    assert (out["support_views"], out["config"]["data_module"]["resize"]) == ("first", "squash")
    features = load_features(out["files"][0])
    episodes = sample_episodes(features.labels, EpisodeSpec(3, 1, 3), episodes=20, seed=0, groups=features.groups)
    x = features.features / np.linalg.norm(features.features, axis=2, keepdims=True)  # (N, V, D)
    correct = []
    for support, query in zip(episodes.support, episodes.query, strict=True):
        similarity = 10 * x[query.ravel()] @ x[support[:, 0], 0].T  # (N * Q, V, N)
        p = np.exp(similarity) / np.exp(similarity).sum(axis=2, keepdims=True)
        correct.append((p.mean(axis=1).argmax(axis=1) == np.repeat(np.arange(3), 3)).mean())
    assert out["top1_action_ensemble"] == pytest.approx(np.mean(correct), abs=2 * SCORE_STEP)


@pytest.mark.usefixtures("no_page")
def test_a_checkpoint_with_another_resize_gives_a_warning(
    data: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = read_checkpoint(checkpoint)
    meta = {**content.meta, "config": {"data_module": {"name": "tiny"}}}
    save_torch({"state_dict": content.state_dict, "mmdistill": meta}, tmp_path / "crop.ckpt")
    files = []
    for resize in ("crop", "squash"):
        capsys.readouterr()
        options = [f"data_module.resize={resize}", "data_module.input_modes=configured", "classifier=centroid"]
        files += _evaluate(data, tmp_path / "crop.ckpt", tmp_path, *options)["files"]
        text = f"data_module.resize=squash, but {tmp_path / 'crop.ckpt'} was trained with crop"
        assert (text in capsys.readouterr().out) is (resize == "squash")
    assert len(set(files)) == 6  # no feature of the other resize is reused


@pytest.mark.usefixtures("no_page")
def test_an_input_mode_has_the_same_result_alone(data: Path, checkpoint: Path, tmp_path: Path) -> None:
    together = _evaluate(data, checkpoint, tmp_path / "all")["settings"][0]["rows"]
    modes = {
        "student_rgb": [],
        f"student_rgb ({SHARED})": ["data_module.n_masks=2"],
        f"student_rgb ({PER_CLIP})": ["data_module.n_masks=2", "data_module.eval_masks=per_clip"],
    }
    for number, (name, options) in enumerate(modes.items()):
        alone = _evaluate(data, checkpoint, tmp_path / str(number), "data_module.input_modes=configured", *options)
        assert list(alone["settings"][0]["rows"]) == ["student_rgb", "random", "teacher_rgb"]
        assert alone["input_mode"] == together[name]["input_mode"]
        assert alone["top1_action_ensemble"] == together[name]["top1_action_ensemble"]
    headline = _evaluate(data, checkpoint, tmp_path / "masked", "data_module.n_masks=2")
    assert headline["input_mode"] == SHARED
    assert "student_rgb (whole clips)" in headline["settings"][0]["rows"]


@pytest.mark.usefixtures("no_page")
def test_input_modes_without_visible_tokens_are_skipped_unless_configured(
    data: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hidden = "data_module.eval_mask_ratio=0.99"
    out = _evaluate(data, checkpoint, tmp_path, hidden, "baselines=[]")
    assert list(out["settings"][0]["rows"]) == ["student_rgb"]
    assert (
        "input_modes=all: skipping 2 tube masks, 99% removed, shared: mask ratio 0.99 leaves none"
        in capsys.readouterr().out
    )
    with pytest.raises(ConfigError, match=r"eval_mask_ratio=0\.99 leaves none of 16 tokens visible"):
        _evaluate(data, checkpoint, tmp_path, hidden, "baselines=[]", "data_module.n_masks=2")


@pytest.mark.parametrize(
    ("overrides", "names", "lines"),
    [
        ([], [], []),
        (["resume=auto"], [], ["ignoring resume=auto: train=False evaluates ckpt_path"]),
        ([], ["report.html"], ["replacing report.html of an earlier evaluation in {run}"]),
        (
            [],
            ["fewshot.json", "report.html"],
            ["replacing report.html and fewshot.json of an earlier evaluation in {run}"],
        ),
    ],
)
def test_replaced_files_and_an_unused_resume_are_logged(
    tmp_path: Path, overrides: list[str], names: list[str], lines: list[str]
) -> None:
    for name in names:
        (tmp_path / name).touch()
    config = distill_config("train=False", "ckpt_path=x", *overrides)
    assert run_folder_lines(config, tmp_path) == [line.format(run=tmp_path) for line in lines]


@pytest.mark.usefixtures("no_page")
def test_compile_is_ignored(
    data: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a log line; the results equal those of an evaluation without it."""

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("compiled")

    monkeypatch.setattr(torch.nn.Module, "compile", fail)
    common = ("feature_cache=null", "data_module.input_modes=configured", "baselines=[]")
    without_cache = _evaluate(data, checkpoint, tmp_path, *common)
    assert without_cache["files"] == [None]
    plain = without_cache["settings"][0]["rows"]["student_rgb"]
    assert "compile=true" not in capsys.readouterr().out
    compiled = _evaluate(data, checkpoint, tmp_path, *common, "compile=true")["settings"][0]["rows"]["student_rgb"]
    assert "ignoring compile=true" in capsys.readouterr().out
    assert {**compiled, "seconds": 0} == {**plain, "seconds": 0}


@pytest.mark.usefixtures("no_page")
def test_features_are_reused_until_a_frame_changes(own_data: Path, checkpoint: Path, tmp_path: Path) -> None:
    def cached() -> tuple[bool, float]:
        out = _evaluate(own_data, checkpoint, tmp_path, "baselines=[]", "data_module.input_modes=configured")
        return out["cached"], out["top1_action_ensemble"]

    assert not cached()[0]
    used, before = cached()
    assert used
    for frame in (own_data / "frames").glob("*/*.jpg"):  # replace all frames by one image under the same names
        cv2.imwrite(str(frame), np.full((32, 36, 3), 90, np.uint8))
    used, after = cached()
    assert not used
    assert before != after == pytest.approx(1 / 3)  # chance: all classes look the same
    assert cached() == (True, after)


@pytest.mark.usefixtures("no_page")
def test_repeated_frames_are_reported_also_for_cached_features(
    own_data: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (own_data / "frames" / "rally_T_0" / "000005.jpg").unlink()
    for cached in (False, True):
        out = _evaluate(own_data, checkpoint, tmp_path, "baselines=[]", "data_module.on_missing=repeat")
        assert out["cached"] is cached
        assert out["missing"]["frames_repeated"] == {"rgb": {"rally_T_0": 1}}
        assert "missing data (on_missing=repeat): rgb: 1 frame repeated" in capsys.readouterr().out


def test_clips_of_another_size_than_the_training_raise_an_error(data: Path, checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\(checkpoint / data_module\): height 32 / 16, width 32 / 16"):
        _evaluate(data, checkpoint, tmp_path, "data_module.crop_size=[16,16]")


def test_a_missing_component_raises_an_error(data: Path, checkpoint: Path, tmp_path: Path) -> None:
    for override in ("eval_component=teacher_old_rgb", "baselines=[teacher_old_rgb]"):
        with pytest.raises(CheckpointError, match=r"no component 'teacher_old_rgb'; select one of student_rgb"):
            _evaluate(data, checkpoint, tmp_path, override)


def test_a_pretraining_checkpoint_has_no_other_component(data: Path, tmp_path: Path) -> None:
    state = {f"encoder.{key}": v for key, v in Encoder(ENCODER).state_dict().items()}
    save_torch({"module": state, "mmdistill": {"kind": "pretrain", "modality": "rgb"}}, tmp_path / "rgb.pt")
    with pytest.raises(ConfigError, match=r"eval_component=teacher_flow: .*rgb.pt is not a distilled checkpoint"):
        _evaluate(data, tmp_path / "rgb.pt", tmp_path, "eval_component=teacher_flow")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data_module.q_sample=30", "classes that have them: 0 of 4"),
        ("data_module.eval_clips=windows", "no clip has a label"),
        ("data_module.fewshot_eval_json_path=absent.json", r"absent\.json does not exist; .*; or set test=False"),
        ("eval_component=student_ema_rgb", "eval_component: the distilled checkpoint will have no student_ema_rgb"),
        ("baselines=[teacher_old_rgb]", "baselines: the distilled checkpoint will have no teacher_old_rgb"),
        ("baselines=[randm]", r"baselines: randm is .*, nor an existing path; did you mean random\?"),
        ("baselines=[/nowhere]", "baselines: /nowhere is not one of random, student_rgb, teacher_rgb"),
    ],
)
def test_check_evaluation_finds_errors_before_the_training(data: Path, override: str, message: str) -> None:
    check_evaluation(_config(data))
    check_evaluation(_config(data, "trainer.teachers=[flow]", "student=tiny", "trainer.ckpt_path=[nowhere]"))
    with pytest.raises(ConfigError, match=message):
        check_evaluation(_config(data, override))


def test_overlapping_clips_are_logged(
    data: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Windows of 4 frames, one every 2: each of a video's four windows overlaps its neighbors."""
    windows = ("data_module.eval_clips=windows", "data_module.window_stride=2", "data_module.label=video")
    out = _evaluate(data, checkpoint, tmp_path, *windows, "baselines=[]", "data_module.input_modes=configured")
    assert out["overlapping_clips"] == 96
    line = "96 clips overlap in time with another clip of their class"
    shown = capsys.readouterr().out
    assert line in shown
    assert "may show the same frames; unset data_module.window_stride to avoid it\n" in shown
    assert "disjoint" not in shown  # a class is a video
    assert f"<li>{line}" in (tmp_path / "report.html").read_text()


def test_the_page_has_the_caveats_of_the_evaluation(data: Path, checkpoint: Path, tmp_path: Path) -> None:
    """The rallies of the evaluation are in the training file; these clips do not overlap."""
    _evaluate(data, checkpoint, tmp_path, "baselines=[]", "data_module.input_modes=configured")
    text = (tmp_path / "report.html").read_text()
    caveats = text[text.index("<h2>Caveats</h2>") : text.index("<h2>Results</h2>")]
    assert "evaluated rallies are also in" in caveats
    assert "overlap in time" not in caveats


def test_warnings_of_the_log_are_on_the_page(
    data: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each distinct one once, also those about skipped networks."""
    check = run._check_clips

    def check_with_warnings(*args: Any) -> list[str]:
        for text in ("2 clips are listed twice", "2 clips are listed twice", "no image shape"):
            logging.getLogger("mmdistill.data.annotations").warning(text)
        return check(*args)

    monkeypatch.setattr(run, "_check_clips", check_with_warnings)
    hidden = ("data_module.eval_mask_ratio=0.99", "baselines=[]")
    _evaluate(data, checkpoint, tmp_path, *hidden)
    text = (tmp_path / "report.html").read_text()
    caveats = text[text.index("<h2>Caveats</h2>") : text.index('<p class="lead">')]
    assert caveats.count("2 clips are listed twice") == caveats.count("no image shape") == 1
    assert caveats.count("input_modes=all: skipping") == 2


def test_settings_of_the_page_are_those_that_the_numbers_depend_on(data: Path) -> None:
    config = _config(data, "seed=3", "data_module.sampling_rate=2", "trainer.lr=0.25")
    extra = {"precision": "bf16", "index": {}, "missing": {}, "overlapping_clips": 0, "rallies_in_training": 1}
    network = Network("student_rgb", Encoder(ENCODER), "rgb", statistics=((0.5,), (0.25,), None))
    found = report_settings(config, extra, [network], {"config": {"trainer": {"lr": 0.125}}})
    assert (found["Evaluation"]["precision"], found["Evaluation"]["seed"]) == ("bf16", 3)
    assert found["Evaluation"]["data_module"]["sampling_rate"] == 2
    assert "trainer" not in found["Evaluation"]
    assert "mask_ratio" not in found["Evaluation"]["data_module"]
    assert "mean" not in found["Evaluation"]["data_module"]["modalities"]["rgb"]
    assert found["Training config in the checkpoint"] == {"trainer": {"lr": 0.125}}
    assert found["Statistics of the model input"] == {"student_rgb": {"mean": [0.5] * 3, "std": [0.25] * 3}}
    assert report_settings(config, extra, [network], {})["Training config in the checkpoint"] == "not stored"
    hidden = {field.name for field in fields(config.data_module)} - set(SHOWN_DATA_KEYS)
    short_forms = {"frames_dir", "flow_dir", "skeleton_dir", "frame_pattern", "flow_pattern"}
    training = {"train_clips", "val_json_path", "hflip_prob", "random_crop_min_scale", "mask_ratio"}
    masks = {"n_masks", "eval_mask_ratio", "eval_masks"}  # of each network, in the block Networks
    protocol = {"n_way", "k_shot", "q_sample", "episodes", "disjoint", "support_views"}
    assert hidden == {"modalities", *short_forms, *training, *masks, *protocol}
    assert config.trainer.lr == 0.25


@pytest.mark.usefixtures("no_page")
@pytest.mark.parametrize("suffix", ["ckpt", "pth"])
def test_evaluation_unpickles_a_checkpoint_once(
    data: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    read: list[Path] = []
    real = torch.load

    def load(path: Path, *args: Any, **keywords: Any) -> Any:
        read.append(Path(path))
        return real(path, *args, **keywords)

    monkeypatch.setattr(torch, "load", load)
    path = Path(shutil.copy(checkpoint, tmp_path / f"copy.{suffix}"))
    _evaluate(data, path, tmp_path, "baselines=[random,teacher_rgb]", "data_module.input_modes=configured")
    assert read == [path]


def test_input_size_without_metadata_is_the_token_grid_in_each_phase(tmp_path: Path) -> None:
    """A teacher with patch 16 for heat-maps of 64 x 64; the config halves them, so patches should have 8 pixels."""
    geometry = EncoderConfig(17, 4, 64, 64, 16, 2, dim=384, depth=1, heads=6, head_dim=64, mlp_dim=64)
    state = {f"encoder.{k}": v for k, v in Encoder(geometry).state_dict().items()}
    save_torch({"model": state, "mmdistill": {"modality": "skeleton"}}, tmp_path / "s.pth")
    size = ("data_module.crop_size=[64,64]", "data_module.frame_size=[64,72]", "data_module.patch_size=16")
    config = _config(tmp_path, *size, "data_module.modalities.skeleton.input_stride=2")
    spec = modality_specs(config.data_module)["skeleton"]
    hint = r"height 64 / 32, width 64 / 32, patch 16 / 8; set data_module\.modalities\.skeleton\.input_stride=1"
    with pytest.raises(ConfigError, match=hint):
        read_teacher(str(tmp_path / "s.pth"), "skeleton", spec, config.data_module)
    with pytest.raises(ConfigError, match=hint):
        load_networks(config, read_checkpoint(tmp_path / "s.pth"))


@pytest.mark.usefixtures("no_page")
def test_only_rank_zero_prints(
    data: Path, checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Skipped input modes and baselines included: each of them has a log line on rank 0."""
    state = {f"encoder.{key}": v for key, v in Encoder(ENCODER).state_dict().items()}
    meta = {"kind": "pretrain", "modality": "rgb", "encoders": {"encoder": to_plain(ENCODER)}}
    save_torch({"module": state, "mmdistill": meta}, tmp_path / "rgb.pt")
    options = ("data_module.eval_mask_ratio=0.99", "baselines=[teacher_rgb]")
    _evaluate(data, tmp_path / "rgb.pt", tmp_path, *options)
    out = capfd.readouterr().out
    assert "is not a distilled checkpoint; baselines=[random] omits it" in out
    assert out.count("input_modes=all: skipping") == 2
    monkeypatch.setattr(Process, "is_main", property(lambda self: False))
    _evaluate(data, tmp_path / "rgb.pt", tmp_path, *options)
    assert capfd.readouterr().out == ""


@pytest.mark.usefixtures("no_page")
def test_report_card_and_audit_need_no_further_encoding(
    own_data: Path,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rallies = json.loads((own_data / "val.json").read_text())
    for number, rally in enumerate(rallies):
        rally |= {"near_name": f"Player {number % 3}", "near_hand": "LH" if number % 3 else "RH"}
    (own_data / "val.json").write_text(json.dumps(rallies))
    calls = []
    encode = run.encode_cached
    monkeypatch.setattr(run, "encode_cached", lambda *args, **kwargs: calls.append(1) or encode(*args, **kwargs))
    options = ("data_module.input_modes=configured", "report_card=true", "shortcut_audit=true")
    out = _evaluate(own_data, checkpoint, tmp_path, *options)
    assert calls == [1]
    assert json.loads((tmp_path / "fewshot.json").read_text()) == out
    card = out["report_card"]
    assert card["technique"] == {"clips": {"gs": 24}, "not_scored": "not scored: 1 class (gs)"}
    direction = card["direction"]["networks"]["student_rgb"]
    assert direction["top1_action_ensemble"] == out["top1_action_ensemble"]  # the only element with several classes
    assert set(direction["parts"]) == {"near player", "hand LH", "hand RH", "no serve", "court deuce"}
    assert list(out["shortcut_audit"]["levels"]) == ["any", "video", "player"]
    assert "24 of 24 videos count as matches of their own" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["data_module.disjoint=player"],
            "the player is unknown in 24 of 24 clips; the annotation file needs near_name",
        ),
        (
            ["data_module.disjoint=match", "data_module.q_sample=6"],
            "need 3 classes with at least 7 clips in different m",
        ),
        (["report_card=true", "data_module.eval_clips=windows", "data_module.label=video"], "no clip has a label"),
    ],
)
def test_impossible_episodes_are_rejected_before_the_encoding(
    data: Path, checkpoint: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    with pytest.raises(FewshotError, match=message):
        _evaluate(data, checkpoint, tmp_path, *options)
    with pytest.raises(ConfigError, match=message):
        check_evaluation(_config(data, *options))
