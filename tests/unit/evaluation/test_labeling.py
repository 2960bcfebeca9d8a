"""What a head that is trained on a few labeled strokes proposes, and what is stated about it."""

import re
from pathlib import Path

import pytest

from mmdistill.data.annotations.base import UNKNOWN_FPS, AnnotationError, Event, Rally
from mmdistill.errors import InputError
from mmdistill.evaluation.labeling import LabeledVideo, LabelingOptions, label_video
from mmdistill.evaluation.video_features import VideoEncoder, load_video_encoder
from tests.labeled_videos import NEW, NUM_FRAMES, OLD, write_flashes
from tests.tiny_data import write_teacher


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    write_flashes(folder / "old.mp4", OLD)
    write_flashes(folder / "new.mp4", NEW)
    return folder


@pytest.fixture(scope="module")
def encoder(folder: Path) -> VideoEncoder:
    return load_video_encoder(str(write_teacher(folder / "rgb", "rgb", seed=0)), stride=1)


def events(strokes: dict[int, str]) -> tuple[Event, ...]:
    return tuple(Event(frame, label) for frame, label in strokes.items())


def run(folder: Path, encoder: VideoEncoder, *rallies: Rally, **options: object) -> LabeledVideo:
    return label_video(folder / "new.mp4", encoder, rallies, LabelingOptions((folder,), **options))  # type: ignore[arg-type]


def test_neighbors_are_examples_of_the_same_label(folder: Path, encoder: VideoEncoder):
    video = run(folder, encoder, Rally("old", 0, UNKNOWN_FPS, events(OLD)))
    assert [(e.video, e.frame, e.label) for e in video.examples] == [("old", f, label) for f, label in OLD.items()]
    assert len(video.strokes) == len(NEW)
    for stroke in video.strokes:
        (first, similarity), (_, second), (_, third) = stroke.neighbors
        assert video.examples[first].label == stroke.label
        assert 1 >= similarity >= second >= third >= -1
    assert len(video.images) == video.num_frames == NUM_FRAMES
    red = video.examples[0].image[..., 0].astype(int) - video.examples[0].image[..., 2]
    assert red.mean() > 100  # the image of an example shows its frame, in RGB


def test_background_and_caveats_of_partly_labeled_rallies(folder: Path, encoder: VideoEncoder):
    labels = {10: "near_fh_CC", 26: "near_bh_DL", 45: "near_fh_CC"}
    video = run(folder, encoder, Rally("old", 90, 25.0, events(labels)))
    assert video.num_background == 58 - 3  # frames 0 to 57, without the strokes
    text = " ".join(video.caveats)
    assert "Frames within 0.5 s of an example" in text
    assert "1 of 2 labels have a single example: near_bh_DL." in text
    assert "All examples have the same value of field_0 near, so every proposal has it." in text


@pytest.mark.usefixtures("new_command")
def test_complete_rallies_have_all_other_frames_as_background(
    folder: Path, encoder: VideoEncoder, caplog: pytest.LogCaptureFixture
):
    rally, empty = Rally("old", 90, 25.0, events(OLD)), [Rally(f"old_{k}_{k + 2}", 2, 25.0, ()) for k in (1, 3, 5, 7)]
    video = run(folder, encoder, rally, *empty, complete=True, threshold=0.9999999)
    assert video.num_background == 93 - 5  # the rally, and the frames within 12 of the stroke at frame 80
    assert "Frames within" not in " ".join(video.caveats)
    assert video.strokes == []  # of this threshold
    assert video.caveats[:2] == caplog.messages
    assert caplog.messages[0] == (
        "The examples without a stroke include 4 rallies with an empty list of events: old_1_3, old_3_5, old_5_7 and 1 "
        "more. Remove those that are not labeled yet."
    )
    assert re.fullmatch(
        r"No stroke is proposed: the highest event_score is [01]\.\d{4}, and --threshold is 0\.9999999\. Give more "
        r"examples, or a lower --threshold\.",
        caplog.messages[1],
    )


def test_an_example_of_the_video_is_kept_and_is_not_its_own_neighbor(folder: Path, encoder: VideoEncoder):
    video = run(
        folder, encoder, Rally("old", 0, UNKNOWN_FPS, events(OLD)), Rally("new", 0, UNKNOWN_FPS, (Event(40, "fh_CC"),))
    )
    (given,) = [stroke for stroke in video.strokes if stroke.is_example]
    assert (given.frame, given.label, given.probability, given.alternatives) == (40, "fh_CC", 1, (("fh_CC", 1),))
    assert all(video.examples[i].video == "old" for i, _ in given.neighbors)
    assert all(stroke is given or abs(stroke.frame - 40) > 12 for stroke in video.strokes)


def test_an_example_beyond_the_end_is_found_before_a_video_is_encoded(
    folder: Path, encoder: VideoEncoder, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(encoder, "encode", None)
    with pytest.raises(AnnotationError, match=r"stroke at frame 100 of old, but .*old.mp4 ends at frame 99"):
        run(folder, encoder, Rally("old", 0, UNKNOWN_FPS, (Event(100, "x"),)))


@pytest.mark.parametrize(
    ("rallies", "complete", "cause"),
    [
        ([Rally("new", NUM_FRAMES, 25.0, events(NEW))], True, "with --complete, do not give it as an example"),
        (
            [Rally("new", NUM_FRAMES, 25.0, tuple(Event(frame, "a") for frame in range(10, NUM_FRAMES, 20)))],
            False,
            "each frame is within 0.5 s of an example",
        ),
        (
            [Rally("new", NUM_FRAMES, 25.0, events(NEW)), Rally(f"new_0_{NUM_FRAMES}", NUM_FRAMES, 25.0, ())],
            False,
            r"the examples have 1 rally of it without a stroke \(new_0_100\); remove those that are not labeled yet",
        ),
    ],
)
def test_a_video_without_frames_left_to_label_is_rejected_with_the_cause(
    folder: Path, encoder: VideoEncoder, rallies: list[Rally], complete: bool, cause: str
):
    with pytest.raises(InputError, match=f"leave no frame of this video to label; {cause}"):
        run(folder, encoder, *rallies, complete=complete)
