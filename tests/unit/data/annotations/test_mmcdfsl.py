"""The annotation format of MM-CDFSL, and its datasets on small generated samples."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from mmdistill.builders import make_clip_dataset
from mmdistill.config import (
    ConfigError,
    DataModuleConfig,
    ModalityConfig,
    PretrainConfig,
    modality_specs,
)
from mmdistill.config.compose import load_config
from mmdistill.data.annotations.base import (
    AnnotationError,
    Event,
    load_annotations,
)
from mmdistill.data.clips import ClipSpec, build_index
from mmdistill.data.readers.flow_file import write_flow
from mmdistill.data.readers.zip_file import write_zip
from tests.commands import Script
from tests.contracts.annotation_contract import NUM_FRAMES, AnnotationFormatContract
from tests.generated_annotations import make_clips

SIZE = (16, 24)
FRAMES = 64

HEATMAP_SIZE = (3, 4)
# file of a frame, a flow and a heat-map below the dataset folder, {k} counted from 1; two clips; their classes
LAYOUTS: dict[str, tuple[str, str, str, list[dict[str, Any]], tuple[str, str]]] = {
    "epic": (
        "frames/rgb/train/P01/P01_01/frame_{k:010d}.jpg",
        "frames/flow/train/P01/P01_01/frame_{k:010d}.npy",
        "frames/pose/train/P01/P01_01/frame_{k:010d}.npy",
        [
            {"uid": 7, "participant_id": "P01", "video_id": "P01_01", "start_frame": s, "stop_frame": 99, **labels}
            for s, labels in (
                (1, {"verb_label": 0, "noun_label": 4, "action_idx": 3}),
                ("5", {"verb_label": 2, "noun_label": 4, "action_idx": 8}),
            )
        ],
        ("3", "8"),
    ),
    "meccano": (
        "RGB_frames/0001/{k:05d}.jpg",
        "flow_frames/0001/{k:05d}.npy",
        "hand-pose/heatmap/0001/{k:05d}.npy",
        [
            {"video_id": "0001", "start_frame": 1, "action_idx": 3},
            {"video_id": "0001", "start_frame": 5, "action_idx": 8},
        ],
        ("3", "8"),
    ),
    "wear": (
        "RGB_frames/sbj_0/{k:06d}.jpg",
        "flow_frames/sbj_0/{k:06d}.npy",
        "hand-pose/heatmap/sbj_0/{k:06d}.npy",
        [
            {"video_id": "sbj_0", "label": "jogging", "label_id": 0, "start_frame": 1, "label_id_internal": 0},
            {"video_id": "sbj_0", "label": "lunges", "label_id": 5, "start_frame": 5, "label_id_internal": 1},
        ],
        ("jogging (0)", "lunges (5)"),
    ),
    "ego4d": (
        "image_frame/uid-1/{k:06d}.jpg",
        "optical_flow/uid-1/npy/{k:06d}.npy",
        "hand_pose/heatmap/uid-1/npy/{k:06d}.npy",
        [
            {"video_id": "v", "clip_uid": "uid-1", "clip_frame": 1, "verb_label": 3, "noun_label": 9},
            {"video_id": "v", "clip_uid": "uid-1", "clip_frame": 5, "verb_label": 3, "noun_label": 10},
        ],
        ("3-10", "3-9"),
    ),
}
ACTION_KEYS = ("action_idx", "label_id", "label", "verb_label", "noun_label", "label_id_internal")


def write_layout(root: Path, name: str, data: DataModuleConfig) -> None:
    """Write the files of frame k and annotation files, all with the dataset's names.

    A frame has the brightness 3 k, its flow k px, and its hand pose the value k / 255.
    """
    *names, clips, _ = LAYOUTS[name]
    for k in range(FRAMES):
        frame, flow, heatmap = (root / text.format(k=k + 1) for text in names)
        for path in (frame, flow, heatmap):
            path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(frame), np.full((*SIZE, 3), 3 * k, np.uint8))
        write_flow(flow, np.full((2, *SIZE), k, np.float32))
        np.save(heatmap, np.full((21, *HEATMAP_SIZE), k, np.uint8))
    (root / "annotations").mkdir()
    unlabeled = [{key: v for key, v in clip.items() if key not in ACTION_KEYS} for clip in clips]
    for path, content in ((data.unlabel_json_path, unlabeled), (data.fewshot_eval_json_path, clips)):
        (root / path).write_text(json.dumps({"version": 1.0, "split": "val", "clips": content}))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", LAYOUTS)
def test_dataset_config_is_enough_to_read_a_dataset(tmp_path: Path, name: str, training: bool) -> None:
    """`dataset=NAME` and the sizes of the sample suffice to index the clips and to read every modality."""
    data = _compose(name, tmp_path)
    write_layout(tmp_path, name, data)
    modalities = tuple(modality_specs(data))
    assert modalities == ("rgb", "flow", "skeleton")
    ds = make_clip_dataset(data, modalities, training=training, seed=0)
    assert ds.index.classes == (() if training else LAYOUTS[name][4])
    assert [c.frames[0] for c in ds.index.clips] == [0, 4]
    assert {c.label for c in ds.index.clips} == ({-1} if training else {0, 1})
    for i, clip in enumerate(ds.index.clips):
        assert clip.frames == tuple(range(clip.frames[0], clip.frames[0] + 4 * data.sampling_rate, data.sampling_rate))
        sample = ds[i]
        np.testing.assert_allclose(sample["rgb"].mean(axis=(1, 2, 3)), [3 * k for k in clip.frames], atol=1)
        np.testing.assert_array_equal(sample["flow"][:, 0, 0, 0], clip.frames)
        np.testing.assert_allclose(sample["skeleton"][:, 20, 2, 3] * 255, clip.frames, rtol=1e-3)


@pytest.mark.parametrize("name", LAYOUTS)
def test_check_data_reads_a_dataset_by_its_config(tmp_path: Path, name: str, script: Script) -> None:
    """Whole, then with a hole; its own annotation reader, file names and numbers."""
    write_layout(tmp_path, name, _compose(name, tmp_path))
    given = [*_overrides(name, tmp_path), "--workers", 1, "--json", tmp_path / "found.json"]
    for split in ("eval", "unlabel"):
        done = script("check_data.py", *given, "--split", split)
        assert done.returncode == 0, done.stdout
        assert "1 rally, 2 events" in done.stdout
    found = json.loads((tmp_path / "found.json").read_text())["modalities"]
    assert [found[m]["expected_frames"] for m in ("rgb", "flow", "skeleton")] == [FRAMES, FRAMES - 1, FRAMES]
    frame, flow, heatmap = (tmp_path / text.format(k=9) for text in LAYOUTS[name][:3])
    frame.write_bytes(frame.read_bytes()[:-9])
    flow.unlink()
    np.save(heatmap, np.full((21, *HEATMAP_SIZE), np.nan, np.float16))
    done = script("check_data.py", *given)
    assert done.returncode == 1
    assert f"{frame}: truncated JPEG" in done.stdout
    found = json.loads((tmp_path / "found.json").read_text())["modalities"]
    assert (found["rgb"]["unreadable_frames"], found["flow"]["missing_frames"]) == (1, 1)
    assert f"{heatmap}: NaN or infinite" in done.stdout
    assert found["skeleton"]["unreadable_frames"] == 1
    done = script("check_data.py", *given, "data_module.flow_dir=elsewhere")
    assert (done.returncode, "data_module.flow_dir" in done.stderr) == (2, True)


def test_check_data_names_what_it_cannot_check(tmp_path: Path, script: Script) -> None:
    write_layout(tmp_path, "wear", _compose("wear", tmp_path))
    given = _overrides("wear", tmp_path)
    (tmp_path / "annotations" / "wear_unlabel.json").write_text('{"clips": [{"video_id": "sbj_0"}]}')
    done = script("check_data.py", *given)
    assert (done.returncode, "clip 0 (sbj_0): the key 'start_frame' is missing" in done.stderr) == (2, True)
    done = script("check_data.py", "dataset=waer")
    assert (done.returncode, "waer" in done.stderr) == (2, True)


def test_error_names_the_modality_that_a_dataset_lacks(tmp_path: Path) -> None:
    data = _compose("wear", tmp_path)
    write_layout(tmp_path, "wear", data)
    lacking = dataclasses.replace(data, modalities={m: data.modalities[m] for m in ("rgb", "flow")})
    with pytest.raises(ConfigError, match="modalities has no entry skeleton"):
        make_clip_dataset(lacking, ("skeleton",), training=False, seed=0)
    without = ["modality=skeleton", "dataset=wear", "~data_module.modalities.skeleton"]
    with pytest.raises(ConfigError, match="modality: dataset wear has no skeleton, but rgb, flow"):
        load_config(PretrainConfig, "config_pretrain", without)
    data = dataclasses.replace(
        data,
        modalities={**data.modalities, "skeleton": ModalityConfig(input_stride=4, mean=[0], std=[1], target="pixel")},
    )
    with pytest.raises(ConfigError, match=r"data_module\.modalities\.skeleton\.dir is not set"):
        make_clip_dataset(data, ("skeleton",), training=False, seed=0)


def _overrides(name: str, root: Path) -> list[str]:
    """Overrides: the dataset, and the sizes of the sample."""
    sizes = [f"frame_size={list(SIZE)}", "crop_size=[16,16]", "num_frames=4", "mask_ratio=0"]
    sizes.append(f"modalities.skeleton.heatmap_size={list(HEATMAP_SIZE)}")
    return [f"dataset={name}", f"data_module.target_data_dir={root}", *(f"data_module.{size}" for size in sizes)]


def _compose(name: str, root: Path) -> DataModuleConfig:
    return _pretraining(name, root, "rgb").data_module


def _pretraining(name: str, root: Path, modality: str) -> PretrainConfig:
    return load_config(PretrainConfig, "config_pretrain", [f"modality={modality}", *_overrides(name, root)])


def test_unlabeled_clips_become_events_or_windows(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    clips = [
        {"video_id": "a", "start_frame": 3, "num_frames": 40},
        {"video_id": "b", "start_frame": 0, "num_frames": 9},
    ]
    path.write_text(json.dumps({"split": "train (unlabel)", "clips": clips}))
    rallies = load_annotations(path, annotations="clips")
    assert [(r.video, r.num_frames, r.events) for r in rallies] == [
        ("a", 40, (Event(3, ""),)),
        ("b", 9, (Event(0, ""),)),
    ]
    assert len(build_index(rallies, ClipSpec("windows", 8)).clips) == 4 + 1
    listed = build_index(rallies, ClipSpec("events", 8, anchor="start"))
    assert [(c.frames[0], c.label) for c in listed.clips] == [(3, -1), (0, -1)]
    assert listed.classes == ()
    named = build_index(rallies, ClipSpec("events", 8, label="video"))
    assert (named.classes, [c.label for c in named.clips]) == (("a", "b"), [0, 1])


@pytest.mark.parametrize(
    ("clip", "named"),
    [
        ({"start_frame": 1}, "clip 0: clip_uid or video_id is not a file name"),
        ({"video_id": "../x", "start_frame": 1}, "is not a file name"),
        ({"video_id": "a", "num_frames": 9}, "clip 0 \\(a\\): the key 'start_frame' is missing"),
        ({"video_id": "a", "start_frame": -1}, "start_frame=-1 is not a number from 0"),
        ({"video_id": "a", "start_frame": 1, "action_idx": "x"}, "action_idx='x' is not a number"),
        ({"video_id": "a", "start_frame": 9, "num_frames": 9, "action_idx": 1}, "frame 9 is out of range"),
        (
            {"video_id": "a", "start_frame": 1, "action_idx": 1},
            "cannot determine the length of a: its clips have no num_frames",
        ),
        ("text", "clip 0: expected an object"),
    ],
)
def test_error_names_the_invalid_field_of_a_clip(tmp_path: Path, clip: object, named: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"clips": [clip]}))
    with pytest.raises(AnnotationError, match=named):
        load_annotations(path, annotations="clips")


def test_repeated_clips_are_taken_once_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Clips with one start and one class are repeats, also with two ends. Clips with two classes are two events."""
    clip = {"video_id": "a", "start_frame": 1, "end_frame": 5, "num_frames": 9}
    for keys, expected in (({"action_id": 1}, ["1", "2"]), ({}, [""])):
        path = tmp_path / f"{len(keys)}.json"
        second = {**clip, **dict.fromkeys(keys, 2)}
        path.write_text(json.dumps({"clips": [{**clip, **keys}, {**clip, **keys, "end_frame": 7}, second]}))
        for _ in range(2):
            (rally,) = load_annotations(path, annotations="clips")
        assert [event.label for event in rally.events] == expected
    assert [record.message.partition(": ")[2] for record in caplog.records] == [
        "1 clip with the video, first frame and class of another clip, each taken once",
        "2 clips with the video and first frame of another clip, each taken once",
    ]


@pytest.mark.parametrize(
    ("num_events", "num_repeats", "num_classes", "same"),
    [
        (7381, 14, 40, "video, first frame and class"),
        (1333, 6, 0, "video and first frame"),
        (3635, 2, 0, "video and first frame"),
    ],
)
def test_lists_of_the_published_sizes_are_read_completely(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, num_events: int, num_repeats: int, num_classes: int, same: str
) -> None:
    """Numbers of clips, repeats and classes as in MECCANO's evaluation and training list and EPIC's training list."""
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"clips": make_clips(num_events, num_repeats, num_classes=num_classes)}))
    events = [event for rally in load_annotations(path, annotations="clips") for event in rally.events]
    assert (len(events), len({e.label for e in events} - {""})) == (num_events, num_classes)
    (record,) = caplog.records
    assert record.message.endswith(f"{num_repeats} clips with the {same} of another clip, each taken once")


@pytest.mark.parametrize(
    ("keys", "label"),
    [
        ({"action_idx": 3}, "3"),
        ({"action_id": 3.0, "action_id_internal": 9, "action_name": "take_screw"}, "take_screw (3)"),
        ({"label": "3"}, "3"),
        ({"label": 3, "action_name": "take"}, "take (3)"),
        ({"label": "open door"}, "open door"),
        ({"verb_class": 2, "noun_class": 5, "verb": "open", "noun": "door"}, "2-5"),
        ({"verb": "open", "noun": "door"}, "open-door"),
        ({"action_name": "take_screw"}, "take_screw"),
        ({"action": "take"}, "take"),
    ],
)
def test_class_of_a_clip_has_one_of_several_keys(tmp_path: Path, keys: dict[str, object], label: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"clips": [{"video_id": "a", "start_frame": 1, "num_frames": 9, **keys}]}))
    assert load_annotations(path, annotations="clips")[0].events == (Event(1, label),)


def test_clips_with_an_unknown_class_key_are_not_read_as_unlabeled(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    clip = {"video_id": "a", "start_frame": 1, "stop_timestamp": "0:01", "id": 7, "num_frames": 9, "category": 3}
    path.write_text(json.dumps({"clips": [clip]}))
    with pytest.raises(AnnotationError, match=r"no clip has a known key .*, but the clips have category; rename"):
        load_annotations(path, annotations="clips")
    path.write_text(json.dumps({"clips": [{**clip, "label": 1}, {**clip, "start_frame": 3}]}))
    with pytest.raises(AnnotationError, match=r"clip 1 \(a\): the key 'label' of the class has no value"):
        load_annotations(path, annotations="clips")


def test_valid_clips_of_an_invalid_file_are_written_as_f3set_json(tmp_path: Path, script: Script) -> None:
    data = _compose("meccano", tmp_path)
    write_layout(tmp_path, "meccano", data)
    clips = LAYOUTS["meccano"][3]
    clips = [*clips, {**clips[0], "start_frame": FRAMES + 9}, {**clips[0], "video_id": "absent"}]
    path, clean = tmp_path / data.fewshot_eval_json_path, tmp_path / "clean.json"
    path.write_text(json.dumps({"clips": clips}))
    done = script("check_data.py", *_overrides("meccano", tmp_path), "--split", "eval", "--write-clean", clean)
    assert done.returncode == 1
    assert f"0001: frame {FRAMES + 8} is out of range" in done.stdout
    assert "cannot determine the length of absent" in done.stdout
    assert "read it with data_module.annotations=f3set" in done.stdout
    (rally,) = load_annotations(clean, annotations="f3set")
    assert (rally.video, rally.num_frames) == ("0001", FRAMES)
    assert [(e.frame, e.label) for e in rally.events] == [(0, "3"), (4, "8")]


def test_other_json_raises(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("[]")
    with pytest.raises(AnnotationError, match="a list 'clips'"):
        load_annotations(path, annotations="clips")


def test_number_of_the_action_is_the_class(tmp_path: Path) -> None:
    """Clips with one number and different texts are one class."""
    path = tmp_path / "a.json"
    clips = [
        {"video_id": "a", "start_frame": s, "num_frames": 9, "action_idx": idx, "action": text}
        for s, idx, text in ((0, 4, "opens a door"), (2, 4, "the door is opened"), (3, 7, "waits"), (5, 7, "waits"))
    ]
    path.write_text(json.dumps({"clips": clips}))
    labels = [event.label for event in load_annotations(path, annotations="clips")[0].events]
    assert labels == ["4", "4", "waits (7)", "waits (7)"]


def test_clips_with_different_video_lengths_raise(tmp_path: Path) -> None:
    """num_frames is the length of the video, not of the clip."""
    path = tmp_path / "a.json"
    clips = [{"video_id": "a", "start_frame": s, "num_frames": n, "action_idx": 1} for s, n in ((0, 90), (50, 60))]
    path.write_text(json.dumps({"clips": clips}))
    with pytest.raises(AnnotationError, match=r"clip 1 \(a\): num_frames=60, an earlier clip of this video has 90"):
        load_annotations(path, annotations="clips")


class TestClipsContract(AnnotationFormatContract):
    format_name = "clips"
    repeats_are_errors = False

    def write_annotations(self, path: Path, videos: Mapping[str, Sequence[int]]) -> None:
        clips = [
            {"video_id": video, "start_frame": frame, "num_frames": NUM_FRAMES, "action_idx": 1}
            for video, frames in videos.items()
            for frame in frames
        ]
        path.write_text(json.dumps({"clips": clips}))


def test_frames_in_a_zip_are_counted(tmp_path: Path) -> None:
    """A video without ``num_frames`` has the length of its folder of frames, or of the ``frames.zip`` in it."""
    (tmp_path / "a.json").write_text(json.dumps({"clips": [{"video_id": "v", "start_frame": 1, "label": "x"}]}))
    files = [tmp_path / "v" / f"{k:05d}.jpg" for k in range(7)]
    files[0].parent.mkdir()
    for file in files:
        file.touch()
    options = {"annotations": "clips", "frames_dir": tmp_path}
    separate = load_annotations(tmp_path / "a.json", **options)  # type: ignore[arg-type]
    write_zip(tmp_path / "v/frames.zip", files)
    for file in files:
        file.unlink()
    assert load_annotations(tmp_path / "a.json", **options) == separate  # type: ignore[arg-type]
    assert [rally.num_frames for rally in separate] == [7]
