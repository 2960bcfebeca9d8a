"""What every `Reader` must do. Subclass `ReaderContract` for each reader."""

import pickle
from abc import ABC, abstractmethod
from pathlib import Path

import numpy as np
import pytest

from mmdistill.data.readers.base import FrameError, Reader

NUM_FRAMES = 8  # frames of each video; the last one may have no flow, so the tests read frames 0 to 6
VIDEOS = ("a", "folder/b")


class ReaderContract(ABC):
    """Tests of one reader on files that `write_video` writes.

    Attributes:
        frame_shape: shape of one frame of the raw array.
        dtype: its NumPy type.
    """

    frame_shape: tuple[int, ...]
    dtype: str

    @abstractmethod
    def write_video(self, root: Path, video: str, num_frames: int) -> None:
        """Write the files of a video below `root`. Its frames differ from each other."""

    @abstractmethod
    def open_reader(self, root: Path) -> Reader:
        """A new reader of the files below `root`."""

    @pytest.fixture
    def reader(self, tmp_path: Path) -> Reader:
        for video in VIDEOS:
            self.write_video(tmp_path, video, NUM_FRAMES)
        return self.open_reader(tmp_path)

    def test_read_returns_the_documented_array(self, reader: Reader) -> None:
        for video in VIDEOS:
            array = reader.read(video, range(4))
            assert (array.dtype.name, array.shape) == (self.dtype, (4, *self.frame_shape))

    def test_read_follows_the_given_frame_numbers(self, reader: Reader) -> None:
        single = [reader.read("a", [k])[0] for k in range(NUM_FRAMES - 1)]
        assert len({frame.tobytes() for frame in single}) == NUM_FRAMES - 1
        np.testing.assert_array_equal(reader.read("a", [5, 0, 0, 2]), np.stack([single[k] for k in (5, 0, 0, 2)]))

    def test_result_does_not_depend_on_earlier_reads(self, reader: Reader, tmp_path: Path) -> None:
        first = reader.read("a", [1, 2])
        first[...] = 0  # a caller may write into its array
        np.testing.assert_array_equal(reader.read("a", [1, 2]), self.open_reader(tmp_path).read("a", [1, 2]))

    def test_frame_after_the_end_raises_an_error_that_names_a_file(self, reader: Reader) -> None:
        for frames in ([NUM_FRAMES + 3], [0, NUM_FRAMES + 3]):
            with pytest.raises(FrameError) as caught:
                reader.read("a", frames)
            assert any(path in str(caught.value) for path in reader.files("a", frames))

    def test_missing_frames_lists_frames_without_a_file(self, reader: Reader) -> None:
        assert reader.missing_frames("a", [0, 3, 6]) == []
        assert reader.missing_frames("absent", [0, 3]) == [0, 3]

    def test_files_lists_what_read_opens(self, reader: Reader) -> None:
        frames = [2, 4, 5]
        files = reader.files("a", frames)
        assert len(files) == len(set(files)) > 0
        assert all(Path(path).is_file() for path in files)
        assert not any(Path(path).exists() for path in reader.files("absent", frames))

    @pytest.mark.parametrize("keep", [0.0, 0.5, 0.95])
    def test_truncated_file_raises_an_error_that_names_it(self, reader: Reader, keep: float) -> None:
        path = reader.files("a", [2])[-1]
        data = Path(path).read_bytes()
        Path(path).write_bytes(data[: int(len(data) * keep)])
        with pytest.raises(FrameError) as caught:
            reader.read("a", [2])
        assert path in str(caught.value)

    def test_deleted_file_raises_an_error_that_names_it(self, reader: Reader) -> None:
        path = reader.files("a", [2])[-1]
        Path(path).unlink()
        with pytest.raises(FrameError) as caught:
            reader.read("a", [2])
        assert path in str(caught.value)
        assert reader.missing_frames("a", [2]) == [2]

    def test_read_with_repeats_equals_read_if_nothing_is_missing(self, reader: Reader) -> None:
        array, repeated = reader.read_with_repeats("a", [0, 1, 2])
        assert repeated == []
        np.testing.assert_array_equal(array, reader.read("a", [0, 1, 2]))
        with pytest.raises(FrameError):
            reader.read_with_repeats("absent", [0, 1])

    def test_reader_can_be_pickled(self, reader: Reader) -> None:
        """Loader workers that are spawned get a pickled copy."""
        expected = reader.read("a", [1])
        np.testing.assert_array_equal(pickle.loads(pickle.dumps(reader)).read("a", [1]), expected)

    def test_error_can_be_pickled(self, reader: Reader) -> None:
        with pytest.raises(FrameError) as caught:
            reader.read("absent", [0])
        assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)

    def test_settings_are_the_same_for_equal_readers(self, reader: Reader, tmp_path: Path) -> None:
        """The feature cache depends on their text."""
        assert repr(reader.settings) == repr(self.open_reader(tmp_path).settings)
        assert " at 0x" not in repr(reader.settings)
