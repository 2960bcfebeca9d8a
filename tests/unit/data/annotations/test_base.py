"""The registry of annotation formats."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mmdistill.data.annotations import ANNOTATION_FORMATS, Rally, load_annotations, register_annotation_format
from mmdistill.data.annotations.base import is_safe_name
from mmdistill.errors import InputError

DOCS = Path(__file__).resolve().parents[4] / "docs" / "extending.md"


@pytest.fixture
def registered() -> Iterator[Callable[[str], None]]:
    """Call it with the name of a format that the test registers."""
    names: list[str] = []
    yield names.append
    for name in names:
        ANNOTATION_FORMATS.unregister(name)


def test_format_is_one_registered_function(tmp_path: Path, registered: Callable[[str], None]) -> None:
    @register_annotation_format("words")
    def load_words(path: Path, _frames_dir: Path | None, _frame_number_offset: int) -> list[Rally]:
        return [Rally(word, 20, 30.0, ()) for word in path.read_text().split()]

    registered("words")
    (tmp_path / "a.txt").write_text("one two")
    assert [r.video for r in load_annotations(tmp_path / "a.txt", annotations="words")] == ["one", "two"]
    with pytest.raises(ValueError, match="already registered"):
        register_annotation_format("words")(load_words)
    with pytest.raises(InputError, match="annotation format 'nothing' is not one of f3set, clips, words"):
        load_annotations(tmp_path / "a.txt", annotations="nothing")


def test_reader_gets_paths_and_the_frame_number_offset(registered: Callable[[str], None]) -> None:
    given: list[object] = []
    register_annotation_format("record")(lambda *arguments: given.extend(arguments) or [])
    registered("record")
    load_annotations("a.txt", annotations="record", frames_dir="frames", frame_number_offset=1)
    assert given == [Path("a.txt"), Path("frames"), 1]


def test_example_of_the_docs(tmp_path: Path, registered: Callable[[str], None]) -> None:
    (source,) = re.findall(r"```python\n(.*?register_annotation_format\(.*?)```", DOCS.read_text(), flags=re.DOTALL)
    exec(source.rpartition("```python\n")[2], {})
    registered("lines")
    (tmp_path / "a.txt").write_text("one 20\ntwo 30\n")
    rallies = load_annotations(tmp_path / "a.txt", annotations="lines")
    assert [(r.video, r.num_frames) for r in rallies] == [("one", 20), ("two", 30)]


@pytest.mark.parametrize("video", ["../a", "a/..", "/a", "a//b", "", "a\\..\\b", "a\0"])
def test_unsafe_names(video: str) -> None:
    assert not is_safe_name(video)
    assert is_safe_name("a/b.c d")
