"""Which pixels a dataset has, without opening a file: features made of them are valid until this changes."""

import hashlib
import os

from mmdistill.data.dataset import ClipDataset


def data_fingerprint(dataset: ClipDataset, modality: str) -> str:
    """sha256 over what decides the samples of one modality.

    That is the clips with their labels, the crop, the policy for missing data, and name, size and time of change (ns)
    of every file that the clips need: a frame that is rendered again gives another version, one that is missing too. A
    file costs one `stat`, a few microseconds on a local disk.
    """
    reader = dataset.readers[modality]
    settings = (dataset.crop_size, dataset.frame_size, dataset.on_missing, reader.settings)
    digest = hashlib.sha256(repr(settings).encode())
    needed: dict[str, set[int]] = {}
    for clip in dataset.index.clips:
        digest.update(repr(clip).encode())
        needed.setdefault(clip.video, set()).update(clip.frames)
    digest.update(repr(dataset.index.classes).encode())
    for video, frames in needed.items():
        for path in reader.files(video, sorted(frames)):
            digest.update(f"{os.path.abspath(path)}\0{_state(path)}\n".encode())
    return digest.hexdigest()


def _state(path: str) -> str:
    try:
        found = os.stat(path)
    except OSError:
        return "absent"
    return f"{found.st_size} {found.st_mtime_ns}"
