"""Datasets and loaders from configs."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

import mmdistill.demo.dataset
from mmdistill import builders
from mmdistill.builders import make_clip_dataset, open_readers
from mmdistill.config import ConfigError, PretrainConfig
from tests.configs import pretrain_config
from tests.tiny_data import make_tiny, overrides


def _config(*arguments: str) -> PretrainConfig:
    return pretrain_config("modality=rgb", *arguments)


def test_other_layout_and_annotations_give_the_same_frames(tmp_path: Path) -> None:
    """The same images with EPIC-like names, counted from 1, and annotations in the format clips."""
    root = make_tiny(tmp_path / "tiny", per_class=2)
    plain = make_clip_dataset(_config(*overrides(root)).data_module, ("rgb",), training=False, seed=0)
    clips = []
    for number, clip in enumerate(plain.index.clips):
        folder = root / "epic" / clip.video
        folder.mkdir(parents=True)
        for source in (root / "frames" / clip.video).glob("*.jpg"):
            shutil.copy(source, folder / f"frame_{int(source.stem) + 1:010d}.jpg")
        clips.append({"video_id": clip.video, "start_frame": clip.frames[0] + 1, "action_idx": number % 2})
    (root / "epic.json").write_text(json.dumps({"clips": clips}))
    other = make_clip_dataset(
        _config(
            *overrides(root),
            "data_module.annotations=clips",
            "data_module.frames_dir=epic",
            "data_module.frame_pattern='{video}/frame_{frame:010d}.jpg'",
            "data_module.frame_number_offset=1",
            "data_module.clip_anchor=start",
            "data_module.fewshot_eval_json_path=epic.json",
        ).data_module,
        ("rgb",),
        training=False,
        seed=0,
    )
    assert len(other) == len(plain) == 8
    assert len(other.index.classes) == 2
    by_video = {c.video: i for i, c in enumerate(other.index.clips)}
    for i, clip in enumerate(plain.index.clips):
        assert np.array_equal(plain[i]["rgb"], other[by_video[clip.video]]["rgb"])


def test_error_counts_too_short_rallies(tmp_path: Path) -> None:
    data = _config(*overrides(make_tiny(tmp_path)), "data_module.num_frames=16").data_module
    with pytest.raises(
        ConfigError, match=r"Rallies: 24\. Shorter than the 17 frames .* needs: 24\. Without an event: 0\. "
    ):
        make_clip_dataset(data, ("rgb",), training=True, seed=0)


def test_error_counts_the_missing_files_if_no_clip_is_left(tmp_path: Path) -> None:
    root = make_tiny(tmp_path, per_class=1)
    shutil.rmtree(root / "flow")
    (root / "flow").mkdir()
    data = _config(*overrides(root), "data_module.on_missing=skip").data_module
    with pytest.raises(ConfigError, match="on_missing=skip leaves none of 12 clips: 12 clips without flow files;"):
        make_clip_dataset(data, ("rgb", "flow"), training=True, seed=0)


@pytest.mark.parametrize("modality", ["rgb", "flow"])
def test_frame_size_of_all_files_is_named(tmp_path: Path, modality: str) -> None:
    """One file of the configured size, or files of two sizes: the error is about a file, when it is read."""
    root = make_tiny(tmp_path, per_class=1)
    data = _config(*overrides(root), "data_module.frame_size=[40,40]").data_module
    message = r"frame_size is \[40,40\], but the stored frames have 32 x 36 px .*; set data_module.frame_size=\[32,36\]"
    with pytest.raises(ConfigError, match=message):
        make_clip_dataset(data, (modality, "skeleton"), training=True, seed=0)
    for path in (root / "frames" / "rally_CC_0").glob("*.jpg"):
        cv2.imwrite(str(path), np.zeros((48, 48, 3), np.uint8))
    assert len(make_clip_dataset(data, ("rgb",), training=True, seed=0))


def test_other_modalities_are_not_required(tmp_path: Path) -> None:
    root = make_tiny(tmp_path, per_class=1)
    shutil.rmtree(root / "frames")
    assert len(make_clip_dataset(_config(*overrides(root)).data_module, ("skeleton",), training=True, seed=0)) == 12


def test_source_of_the_motion(tmp_path: Path) -> None:
    """Training: flow if it is read in each epoch, then frames, then the only modality. Evaluation: frames."""
    data = _config(*overrides(make_tiny(tmp_path, per_class=1)), "data_module.mask_type=motion").data_module

    def source(*modalities: str, training: bool = True, cached_epochs: int = 0) -> tuple[str | None, list[str]]:
        dataset = make_clip_dataset(data, modalities, training=training, seed=0, cached_epochs=cached_epochs)
        return dataset.motion_source, list(dataset.readers)

    assert source("rgb", "flow", "skeleton") == ("flow", ["rgb", "flow", "skeleton"])
    assert source("rgb", "flow", cached_epochs=2) == ("rgb", ["rgb", "flow"])
    assert source("rgb", "skeleton") == ("rgb", ["rgb", "skeleton"])
    assert source("skeleton") == ("skeleton", ["skeleton"])
    assert source("flow", training=False) == ("rgb", ["rgb", "flow"])
    data = replace(data, mask_type="tube")
    assert source("rgb", "flow") == (None, ["rgb", "flow"])
    needed = make_clip_dataset(data, ("rgb",), training=True, seed=0, needs_motion=True)
    assert needed[0]["motion"].shape == (2 * 4 * 4,)


def test_missing_folder_names_the_settings_without_the_modality(tmp_path: Path) -> None:
    data = _config(*overrides(make_tiny(tmp_path)), "data_module.skeleton_dir=absent").data_module
    with pytest.raises(
        ConfigError, match=r"absent does not exist; .*trainer\.teachers=\[rgb,flow\].*--modalities rgb flow"
    ):
        open_readers(data, ("rgb", "flow", "skeleton"))
    with pytest.raises(ConfigError) as caught:
        open_readers(data, ("skeleton",))
    assert "teachers" not in str(caught.value)


@pytest.mark.parametrize("place", ["source tree", "parent folder"])
def test_demo_data_of_another_folder_are_not_rendered_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """A relative folder of the demo data refers to the folder in which they were rendered first."""
    first, here = tmp_path / "first", tmp_path / ("first/below" if place == "parent folder" else "other")
    here.mkdir(parents=True)
    (first / "data/demo").mkdir(parents=True)
    (first / "data/demo/demo.json").touch()
    monkeypatch.setattr(builders, "SOURCE_ROOT", first if place == "source tree" else None)
    rendered: list[Path] = []
    monkeypatch.setattr(mmdistill.demo.dataset, "make_demo", lambda root, parameters: rendered.append(root))
    monkeypatch.chdir(here)
    data = _config().data_module
    with pytest.raises(ConfigError, match=rf"set data_module\.target_data_dir={first}/data/demo, or create the folder"):
        builders.make_demo_data(data)
    assert not rendered
    (here / "data/demo").mkdir(parents=True)
    builders.make_demo_data(data)
    (first / "data/demo/demo.json").unlink()
    (here / "data/demo").rmdir()
    builders.make_demo_data(data)
    assert rendered == [Path("data/demo")] * 2
