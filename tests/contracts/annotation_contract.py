"""What every annotation format must do. Subclass `AnnotationFormatContract` for each format."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from mmdistill.data.annotations import ANNOTATION_FORMATS, AnnotationError, Rally, load_annotations
from mmdistill.data.annotations.base import UNKNOWN_FPS

NUM_FRAMES = 40
VIDEOS = {"match_0_40": (3, 20), "folder/b": (0,)}  # video -> frames of its events


class AnnotationFormatContract(ABC):
    """Tests of one format on files that `write_annotations` writes.

    Attributes:
        format_name: name in the registry.
        repeats_are_errors: whether a duplicate event is an error. If not, it is taken once.
    """

    format_name: str
    repeats_are_errors = True

    @abstractmethod
    def write_annotations(self, path: Path, videos: Mapping[str, Sequence[int]]) -> None:
        """Write a valid file with these videos of `NUM_FRAMES` frames, and an event at each frame."""

    def load(self, path: Path) -> list[Rally]:
        return load_annotations(path, annotations=self.format_name)

    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        self.write_annotations(tmp_path / "annotations", VIDEOS)
        return tmp_path / "annotations"

    def test_format_is_registered(self) -> None:
        assert self.format_name in ANNOTATION_FORMATS.names()

    def test_rallies_have_the_written_videos_and_events(self, path: Path) -> None:
        rallies = self.load(path)
        assert {r.video: tuple(e.frame for e in r.events) for r in rallies} == VIDEOS
        assert len(rallies) == len(VIDEOS)
        for rally in rallies:
            assert rally.num_frames == NUM_FRAMES
            assert rally.fps > 0 or rally.fps == UNKNOWN_FPS
            assert all(isinstance(event.label, str) for event in rally.events)

    def test_loading_twice_gives_equal_rallies(self, path: Path) -> None:
        assert self.load(path) == self.load(path)

    @pytest.mark.parametrize("frame", [-1, NUM_FRAMES, NUM_FRAMES + 5])
    def test_event_outside_the_video_raises_an_error(self, tmp_path: Path, frame: int) -> None:
        path = tmp_path / "annotations"
        self.write_annotations(path, {"a": (3, frame)})
        with pytest.raises(AnnotationError) as caught:
            self.load(path)
        assert str(path) in str(caught.value)

    @pytest.mark.parametrize("video", ["../a", "a/../../b", "/a", ""])
    def test_video_name_that_leaves_the_data_folder_raises_an_error(self, tmp_path: Path, video: str) -> None:
        path = tmp_path / "annotations"
        self.write_annotations(path, {video: (3,)})
        with pytest.raises(AnnotationError) as caught:
            self.load(path)
        assert str(path) in str(caught.value)

    def test_duplicate_event_is_an_error_or_taken_once(self, tmp_path: Path) -> None:
        self.write_annotations(tmp_path / "annotations", {"a": (3, 3)})
        if self.repeats_are_errors:
            with pytest.raises(AnnotationError, match="duplicate"):
                self.load(tmp_path / "annotations")
        else:
            (rally,) = self.load(tmp_path / "annotations")
            assert [event.frame for event in rally.events] == [3]

    @pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le"])
    def test_files_of_other_editors_are_read(self, path: Path, encoding: str) -> None:
        """A byte order mark, UTF-16, and lines that end with CR and LF."""
        expected, text = self.load(path), path.read_text()
        path.write_bytes(text.replace(", ", ",\r\n").encode(encoding))
        assert self.load(path) == expected

    @pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b"[{", b"null", b"[]", b"{}"])
    def test_invalid_file_raises_an_error_that_names_it(self, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "annotations"
        path.write_bytes(content)
        with pytest.raises(AnnotationError) as caught:
            self.load(path)
        assert str(path) in str(caught.value)

    def test_absent_file_raises_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError):
            self.load(tmp_path / "absent")
