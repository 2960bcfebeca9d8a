"""A hash of what determines a dataset's samples. Cached features are valid as long as it does not change."""

import hashlib
import os

from mmdistill.data.dataset import ClipDataset


def data_fingerprint(dataset: ClipDataset, modality: str) -> str:
    """SHA-256 of what determines the samples of one modality, as hexadecimal text.

    It covers the clips with their labels, the crop, the policy for missing data, and path, size and modification time
    (ns) of every file that the clips need. No file is opened; each costs one `stat`, a few microseconds on a local
    disk.
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
            digest.update(f"{os.path.abspath(path)}\0{_file_state(path)}\n".encode())
    return digest.hexdigest()


def _file_state(path: str) -> str:
    try:
        status = os.stat(path)
    except OSError:
        return "absent"
    return f"{status.st_size} {status.st_mtime_ns}"
