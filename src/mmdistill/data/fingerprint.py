"""A hash of what determines a dataset's samples. Cached features are valid as long as it does not change."""

import hashlib
import os

from mmdistill.data.clips import required_frames
from mmdistill.data.dataset import ClipDataset


def data_fingerprint(dataset: ClipDataset, modality: str) -> str:
    """SHA-256 of what determines the samples of one modality, as hexadecimal text.

    It covers the clips with their labels, the crop, the policy for missing data, and path, size and modification time
    (ns) of every file that the clips need. No file is opened; each costs one `stat`, a few microseconds on a local
    disk.
    """
    reader = dataset.readers[modality]
    crop = dataset.crop
    settings: tuple[object, ...] = (crop.crop_size, crop.frame_size, dataset.on_missing, reader.settings)
    if crop.resize != "crop":  # the digests of earlier versions stay valid
        settings += (crop.resize,)
    if dataset.motion_source:
        settings += ("motion of", dataset.motion_source)
    digest = hashlib.sha256(repr(settings).encode())
    for clip in dataset.index.clips:
        digest.update(repr(clip).encode())
    digest.update(repr(dataset.index.classes).encode())
    for video, clips in dataset.index.by_video():
        for path in reader.files(video, required_frames(clips)):
            try:
                status = os.stat(path)
                state = f"{status.st_size} {status.st_mtime_ns}"
            except OSError:
                state = "absent"
            digest.update(f"{os.path.abspath(path)}\0{state}\n".encode())
    if dataset.motion_source not in (None, modality):
        digest.update(data_fingerprint(dataset, str(dataset.motion_source)).encode())
    return digest.hexdigest()
