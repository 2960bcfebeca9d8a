"""Where the skeletons of prepared videos come from: a pose network, or a folder of skeleton files."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmdistill.prepare.placement import Placement
from mmdistill.prepare.player_tracking import ReadFrames
from mmdistill.prepare.pose import (
    PoseError,
    SkeletonCounts,
    copy_skeletons,
    import_mediapipe,
    load_mediapipe,
    write_skeletons,
)
from mmdistill.prepare.vitpose import describe_model, limit_threads, load_vitpose

METHODS = ("mediapipe", "vitpose", "none")


@dataclass(frozen=True)
class SkeletonSource:
    """A pose network, or a folder with a file {video}.pkl of each video.

    Attributes:
        method: one of `METHODS`, or the folder.
        pose_model: of ``vitpose``, see `VitPose`.
        detector_model: the same.
        split: of the pose networks, see `find_players`.
    """

    method: str
    pose_model: str
    detector_model: str
    split: float

    def __post_init__(self) -> None:
        if self.method not in METHODS and not Path(self.method).is_dir():
            names = ", ".join(METHODS)
            raise ValueError(f"skeleton={self.method!r} is not one of {names}, and not a folder with skeleton files")

    def check(self) -> None:
        """Load the pose network, which downloads it if necessary.

        Raises:
            PoseError: the network is not installed or cannot be loaded.
        """
        if self.method == "mediapipe":
            import_mediapipe()
        elif self.method == "vitpose":
            load_vitpose(self.detector_model, self.pose_model)

    def start_worker(self, num_processes: int) -> None:
        """Prepare a worker process, one of `num_processes`."""
        if self.method == "vitpose":
            limit_threads(num_processes)

    def settings(self) -> dict[str, Any]:
        """The settings that the skeletons depend on."""
        if self.method not in METHODS:
            return {"method": "files"}
        models = {}
        if self.method == "vitpose":
            models = {name: describe_model(getattr(self, name)) for name in ("pose_model", "detector_model")}
        return {"method": self.method, "split": self.split, **models}

    def file_settings(self, video: str, target: Path) -> dict[str, str]:
        """The hash of the skeleton file of a video; empty for a pose network.

        Raises:
            PoseError: the file does not exist, or it is `target`, which `write` would replace.
        """
        if self.method in METHODS:
            return {}
        path = self._path(video)
        if not path.is_file():
            raise PoseError(f"{path}: no such skeleton file; the folder of --skeleton needs one per video")
        if path.resolve() == target.resolve():
            raise PoseError(f"{path}: --skeleton and --output are the same folder; choose another --output")
        return {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()}

    def write(self, video: str, read: ReadFrames, target: Path, sheet: Path, place: Placement | None) -> SkeletonCounts:
        """Write the skeletons of a video and their contact sheet; see `write_skeletons` and `copy_skeletons`."""
        if self.method not in METHODS:
            return copy_skeletons(read, self._path(video), target, sheet, place)
        is_vitpose = self.method == "vitpose"
        pose = load_vitpose(self.detector_model, self.pose_model) if is_vitpose else load_mediapipe()
        return write_skeletons(read, target, sheet, split=self.split, pose=pose, place=place)

    def _path(self, video: str) -> Path:
        return Path(self.method) / f"{video}.pkl"
