"""The command ``mmdistill label``."""

import csv
import html
import json
import re
import shutil
from pathlib import Path

import cv2
import pytest

from mmdistill.cli import check_data
from mmdistill.cli.label import main
from mmdistill.data.annotations.examples import load_examples
from mmdistill.evaluation.report.label_page import CSV_COLUMNS, MAX_PAGE_BYTES
from mmdistill.prepare.video import decode_frames
from tests.labeled_videos import NEW, NUM_FRAMES, make_label_files
from tests.tiny_data import write_teacher

pytestmark = pytest.mark.usefixtures("single_process_env")


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return make_label_files(tmp_path_factory.mktemp("label"))


@pytest.fixture(scope="module")
def output(arguments: list[str]) -> Path:
    assert main(arguments) == 0
    return Path(arguments[-1])


@pytest.fixture
def strokes(output: Path) -> list[dict]:
    (rally,) = json.loads((output / "strokes.json").read_text())
    assert (rally["video"], rally["num_frames"], round(rally["fps"])) == ("new", NUM_FRAMES, 25)
    return rally["events"]


def with_examples(arguments: list[str], *paths: Path) -> list[str]:
    """The arguments with other files of examples."""
    first = arguments.index("--examples")
    return [*arguments[:first], *arguments[first + 2 :], *(text for p in paths for text in ("--examples", str(p)))]


def text_of(part: str) -> str:
    return " ".join(html.unescape(re.sub("<[^>]+>", " ", part)).split())


def test_every_stroke_is_found_with_its_label(strokes: list[dict]):
    assert [stroke["source"] for stroke in strokes] == ["example", "proposal", "proposal", "proposal"]
    assert [stroke["label"] for stroke in strokes] == list(NEW.values())
    assert all(abs(stroke["frame"] - frame) <= 1 for stroke, frame in zip(strokes, NEW, strict=True))


def test_page_csv_and_json_agree_on_every_stroke(output: Path, strokes: list[dict]):
    with (output / "strokes.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == CSV_COLUMNS
    expected = [
        ("new", f"{s['frame'] / 25:.3f}", str(s["frame"]), s["label"], f"{s['score']:.4f}", s["source"])
        for s in strokes
    ]
    assert [tuple(row.values()) for row in rows] == expected

    page = (output / "strokes.html").read_text()
    articles = re.findall(r'<article class="stroke" id="stroke-(\d+)">(.*?)</article>', page, flags=re.DOTALL)
    by_certainty = sorted(strokes, key=lambda s: (s["source"] == "example", s["score"]))
    assert [int(frame) for frame, _ in articles] == [s["frame"] for s in by_certainty]
    for (_, article), s in zip(articles, by_certainty, strict=True):
        title = text_of(re.search("<h3>(.*?)</h3>", article, flags=re.DOTALL)[1])
        example = " (example)" if s["source"] == "example" else ""
        assert title == f"0:00:{s['frame'] / 25:06.3f}, frame {s['frame']}: {s['label']} {s['score']:.4f}{example}"
        cells = [text_of(cell) for cell in re.findall("<td.*?</td>", article, flags=re.DOTALL)]
        labels = [(a["label"], f"{a['score']:.4f}") for a in s["alternatives"]]
        assert list(zip(cells[::2], cells[1::2], strict=True)) == [
            *labels,
            ("a stroke with any label", f"{s['event_score']:.4f}"),
        ]
        assert labels[0] == (s["label"], f"{s['score']:.4f}")
        assert article.count("data:image/jpeg") == 1  # the film strip
        assert len(re.findall(r'class="shot e\d+"', article)) == 3  # the nearest examples
    lines = re.findall(r"<title>frame (\d+): (\S+), (\S+)</title>", page)
    assert lines == [(frame, label, score) for _, _, frame, label, score, _ in expected]  # of the timeline


def test_check_data_accepts_the_json_and_the_csv_is_a_file_of_examples(
    output: Path, capsys: pytest.CaptureFixture[str]
):
    assert check_data.main([str(output / "strokes.json")]) == 0
    assert "1 rally, 4 events, 2 labels" in capsys.readouterr().out
    from_csv, from_json = (load_examples(output / f"strokes.{kind}")[0] for kind in ("csv", "json"))
    assert (from_csv.video, from_csv.events) == (from_json.video, from_json.events)


def test_the_page_states_examples_and_limits(output: Path):
    page = (output / "strokes.html").read_text()
    assert len(page) < MAX_PAGE_BYTES
    text = text_of(page.partition("<body>")[2])
    assert "3 proposed strokes and 1 labeled example in 100 frames (0:00:04.000, 25 frames per second)" in text
    assert "trained on 6 examples from 2 videos" in text
    assert "They are not calibrated" in text
    assert "fh_CC 3 2 " in text  # label, examples, proposed strokes
    assert "single example" not in text


def test_a_folder_of_frames_gives_the_same_strokes_without_times(
    arguments: list[str], strokes: list[dict], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "new").mkdir()
    for frame in decode_frames(Path(arguments[0])):
        cv2.imwrite(str(tmp_path / "new" / f"{frame.number:06d}.jpg"), frame.pixels, [cv2.IMWRITE_JPEG_QUALITY, 100])
    more = ["--output", str(tmp_path / "out"), "--videos", str(Path(arguments[0]).parent)]
    assert main([str(tmp_path / "new"), *arguments[1:-2], *more]) == 0
    (rally,) = json.loads((tmp_path / "out" / "strokes.json").read_text())
    assert [(e["frame"], e["label"]) for e in rally["events"]] == [(s["frame"], s["label"]) for s in strokes]
    assert rally["fps"] == -1
    assert (tmp_path / "out" / "strokes.csv").read_text().splitlines()[1].startswith("new,,")
    assert "(--fps), so the strokes have no times" in (tmp_path / "out" / "strokes.html").read_text()
    assert "new: 3 proposed strokes in 100 frames, with 6 examples" in capsys.readouterr().out


@pytest.mark.usefixtures("new_command")
def test_files_of_examples_in_several_folders_are_joined(
    arguments: list[str], output: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    for name, text in (("one", "old,10,fh_CC\nold,26,bh_DL"), ("two", "old,26,bh_DL\nold2,10,fh_CC")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "examples.csv").write_text(f"video,frame,label\n{text}\n")
    old = Path(arguments[0]).parent / "old.mp4"
    shutil.copy(old, tmp_path / "two" / "old2.mp4")  # next to the second file
    (tmp_path / "none").mkdir()
    files = [tmp_path / "one" / "examples.csv", tmp_path / "two" / "examples.csv", output / "strokes.csv"]
    more = ["--videos", str(old.parent), "--videos", str(tmp_path / "none"), "--output", str(tmp_path / "out")]
    assert main([*with_examples(arguments, *files), *more]) == 0
    page = text_of((tmp_path / "out" / "strokes.html").read_text())
    assert "trained on 7 examples from 3 videos" in page  # 2 + 1 new one + 4 strokes of the earlier call
    assert f"{files[2]}: the labels include 3 proposals of an earlier call (source=proposal)" in caplog.text


def rally(**changes: object) -> dict[str, object]:
    return {"video": "old", "num_frames": 100, "fps": 25, "events": [{"frame": 10, "label": "a"}]} | changes


@pytest.mark.parametrize(
    ("examples", "more", "message"),
    [
        ([rally(num_frames=200, events=[{"frame": 150, "label": "a"}])], [], "a stroke at frame 150 of old, but"),
        ([rally(fps=50)], [], "old.mp4: has 25.00 fps, but its rallies are annotated at 50 fps"),
        ([rally(video="gone")], [], "name the video gone, but there is no video file"),
        ([rally(events=[])], [], "there is no labeled stroke"),
        ([rally(video="new")], ["--complete"], "leave no frame of this video to label"),
        ([rally()], ["--stride", "9"], "stride=9 must lie between 1 and 4"),
        ([rally()], ["--videos", "nowhere"], "nowhere: no such file or folder"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(
    arguments: list[str],
    tmp_path: Path,
    examples: list[dict],
    more: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
):
    path = tmp_path / "examples.json"
    path.write_text(json.dumps(examples))
    assert main([*with_examples(arguments, path), "--videos", str(Path(arguments[0]).parent), *more]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_a_checkpoint_without_an_rgb_encoder_is_named(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    flow = write_teacher(tmp_path / "flow", "flow", 0)
    assert main([*arguments, "--checkpoint", str(flow)]) == 2
    assert "encoder has the modality flow, but frames need rgb" in capsys.readouterr().err
