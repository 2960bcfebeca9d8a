"""Files of a prepared video: which are complete, damaged or of other origin."""

from pathlib import Path

import pytest

from mmdistill.prepare.outputs import Outputs, remove_outdated

PARTS = {"frames": {"height": 48}, "flow": {"method": "dis"}, "skeleton": {"method": "none"}}
RECORD = {"fingerprint": "a", "parts": PARTS}


@pytest.fixture
def files(tmp_path: Path) -> Outputs:
    """Three frames and two pairs of a video in a subfolder, which are not recorded."""
    files = Outputs.of("P01/v", tmp_path)
    for folder, names in ((files.frames, ["0.jpg", "1.jpg", "2.jpg"]), (files.flow, ["pair_0.npy", "pair_1.npy"])):
        folder.mkdir(parents=True)
        for name in names:
            (folder / name).touch()
    return files


def test_each_kind_of_file_is_counted(files: Outputs) -> None:
    record = {"num_frames": 3, **RECORD}
    assert files.are_complete(record)
    assert not files.are_complete({**record, "num_frames": 4})
    skeleton = {**record, "parts": {**PARTS, "skeleton": {"method": "x"}}}
    assert not files.are_complete(skeleton)
    files.skeleton.parent.mkdir(parents=True)
    files.skeleton.touch()
    assert files.are_complete(skeleton)
    files.pairs()[0].unlink()
    assert not files.are_complete(record)
    assert files.are_complete({**record, "parts": {**PARTS, "flow": {"method": "none"}}})


def test_only_recorded_files_are_removed(files: Outputs) -> None:
    def remove(*, keep_frames: bool = False, **changes: object) -> dict[str, object]:
        return remove_outdated(Path("v.mp4"), files, {**RECORD, **changes}, keep_frames=keep_frames)

    with pytest.raises(ValueError, match=r"v\.mp4: .*P01/v exists and was not written by mmdistill; choose another"):
        remove()
    for pair in files.pairs():
        pair.unlink()
    files.flow.rmdir()
    assert remove(keep_frames=True) == {}  # the frames are the source
    assert len(files.images()) == 3
    with pytest.raises(ValueError, match="was not written by mmdistill"):
        remove(fingerprint="b")  # another video of this name
    remove(keep_frames=True, fingerprint="b")
    assert len(files.images()) == 3
    files.record.unlink()
    for image in files.images():
        image.unlink()
    files.frames.rmdir()
    remove()
    files.frames.mkdir()
    (files.frames / "0.jpg").touch()
    remove()
    assert len(files.images()) == 1
    remove(parts={**PARTS, "frames": {"height": 96}})
    assert not files.frames.exists()
