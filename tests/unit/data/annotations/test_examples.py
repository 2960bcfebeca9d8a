"""Files of labeled strokes."""

import json
from pathlib import Path

import pytest

from mmdistill.data.annotations.base import UNKNOWN_FPS, AnnotationError, Event, Rally
from mmdistill.data.annotations.examples import load_examples

EXPECTED = [
    Rally("a.mp4", 0, UNKNOWN_FPS, (Event(3, "fh_CC"), Event(9, "bh_DL"))),
    Rally("b", 0, UNKNOWN_FPS, (Event(1, "serve"),)),
]
LINES = ["video,frame,label", "a.mp4,9,bh_DL", "b,1,serve", "a.mp4,3,fh_CC"]


@pytest.mark.parametrize(
    "data",
    [
        "\n".join(LINES).encode(),
        ("\r\n".join(LINES) + "\r\n\r\n").encode("utf-8-sig"),
        "\n".join(LINES).replace(",", ";").encode("utf-16"),
        "\n".join(LINES).replace(",", "\t").encode(),
        b"Label, Frame ,VIDEO\nbh_DL,9.0,a.mp4\nserve,1,b\n fh_CC ,3,a.mp4\n",
    ],
    ids=["plain", "windows", "utf-16 with semicolons", "tabs", "other order"],
)
def test_csv_gives_the_strokes_of_each_video_in_order(tmp_path: Path, data: bytes):
    path = tmp_path / "examples.csv"
    path.write_bytes(data)
    assert load_examples(path) == EXPECTED


def test_further_columns_and_repeated_lines_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    path = tmp_path / "examples.csv"
    path.write_text("video,time,frame,label,probability\na,0.1,3,x,1\na,0.1,3,x,1\n")
    assert load_examples(path) == [Rally("a", 0, UNKNOWN_FPS, (Event(3, "x"),))]
    assert "ignoring 2 columns (time, probability)" in caplog.text
    assert "1 repeated line" in caplog.text


def test_files_are_joined_and_one_of_them_needs_a_stroke(tmp_path: Path):
    without = [{"video": "c", "num_frames": 9, "fps": 25, "events": []}]
    (tmp_path / "a.json").write_text(json.dumps(without))
    (tmp_path / "b.csv").write_text("\n".join(LINES))
    assert load_examples(tmp_path / "a.json", tmp_path / "b.csv") == [Rally("c", 9, 25.0, ()), *EXPECTED]
    with pytest.raises(AnnotationError, match=r"a\.json, .*a\.json: there is no labeled stroke"):
        load_examples(tmp_path / "a.json", tmp_path / "a.json")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "video,frame,label,source\na,3,x,example\na,9,x,proposal\nb,1,x,proposal\n"),
        (
            "a.json",
            json.dumps(
                [
                    {
                        "video": "a",
                        "num_frames": 9,
                        "fps": 25,
                        "events": [{"frame": k, "label": "x", "source": "proposal"} for k in (1, 3)],
                    }
                ]
            ),
        ),
    ],
)
def test_proposals_of_an_earlier_call_are_counted(
    tmp_path: Path, name: str, text: str, caplog: pytest.LogCaptureFixture
):
    path = tmp_path / name
    path.write_text(text)
    load_examples(path)
    expected = f"{path}: the labels include 2 proposals of an earlier call (source=proposal); check them first"
    assert caplog.messages == [expected]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,9,bh\n", "the first line has no column video, frame, label"),
        ("video,frame,label\na,9\n", "line 2: 2 values, but 3 columns"),
        ("video,frame,label\na,1.5,x\n", "line 2: frame='1.5' is not a frame number"),
        ("video,frame,label\na,-1,x\n", "line 2: frame='-1' is not a frame number"),
        ("video,frame,label\na,1,\n", "line 2: the label is empty"),
        ("video,frame,label\n../a,1,x\n", "line 2: video='../a' is not a file name"),
        ("video,frame,label\n", "there is no labeled stroke"),
        (json.dumps([{"video": "a", "num_frames": 9, "fps": 25, "events": []}]), "there is no labeled stroke"),
        (
            json.dumps([{"video": "a", "num_frames": 9, "fps": 25, "events": [{"frame": 1}]}]),
            "a has a stroke without a",
        ),
        ('{"clips": []}', "expected a JSON list of rallies"),
    ],
)
def test_an_invalid_file_is_one_error_with_the_line(tmp_path: Path, text: str, message: str):
    path = tmp_path / "examples"
    path.write_text(text)
    with pytest.raises(AnnotationError, match=message):
        load_examples(path)


def test_a_binary_file_is_rejected(tmp_path: Path):
    path = tmp_path / "examples.csv"
    path.write_bytes(b"PK\x03\x04\xff\x00\xfe")
    with pytest.raises(AnnotationError, match="not a text file"):
        load_examples(path)
