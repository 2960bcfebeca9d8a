"""Files of a prepared video, which are complete, outdated or foreign."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmdistill.data.readers.flow_file import PACKED_FLOW, open_packed_flow, pack_flow
from mmdistill.data.readers.zip_file import ZIP_NAME, write_zip, zip_names
from mmdistill.files import atomic_write_bytes

FRAME_DIR, FLOW_DIR, SKELETON_DIR, RECORD_DIR = "vid_frames_224", "tennis_flows", "skeletons/f3set-tennis", ".prepared"
SHEET_DIR = "contact_sheets"


@dataclass(frozen=True)
class Outputs:
    """Paths of the files of one video."""

    record: Path
    frames: Path
    flow: Path
    skeleton: Path

    @classmethod
    def of(cls, name: str, output: Path) -> "Outputs":
        """The paths for the video `name` in the folder `output`."""
        record, skeleton = output / RECORD_DIR / f"{name}.json", output / SKELETON_DIR / f"{name}.pkl"
        return cls(record, output / FRAME_DIR / name, output / FLOW_DIR / name, skeleton)

    def are_complete(self, record: dict[str, Any]) -> bool:
        """Whether the files of a completed video still exist; they are counted, not opened."""
        count, parts = record["num_frames"], record["parts"]
        return (
            (self.frames_zip.exists() or len(self.images()) == count)
            and (parts["flow"]["method"] == "none" or self.packed_flow.exists() or len(self.pairs()) == count - 1)
            and (parts["skeleton"]["method"] == "none" or self.skeleton.exists())
        )

    @property
    def frames_zip(self) -> Path:
        """The packed frames."""
        return self.frames / ZIP_NAME

    @property
    def packed_flow(self) -> Path:
        """The packed flow."""
        return self.flow / PACKED_FLOW

    def images(self) -> list[Path]:
        """The frames that are separate files."""
        return list(self.frames.glob("*.jpg"))

    def pairs(self) -> list[Path]:
        """The flow that is in separate files."""
        return list(self.flow.glob("pair_*.npy"))

    def pack(self) -> None:
        """Replace the separate files by the packed ones. It may be interrupted at any time and repeated."""
        for target, files, write in (
            (self.frames_zip, self.images(), write_zip),
            (self.packed_flow, self.pairs(), pack_flow),
        ):
            if files and not target.exists():
                write(target, files)
            for file in files:
                file.unlink()

    def remove_damaged(self) -> None:
        """Remove packed files that are truncated or damaged. They are then written again."""
        for target, check in ((self.frames_zip, zip_names), (self.packed_flow, open_packed_flow)):
            try:
                if target.exists():
                    check(str(target))
            except ValueError:
                target.unlink()


def remove_outdated(path: Path, files: Outputs, new: dict[str, Any], *, keep_frames: bool) -> dict[str, Any]:
    """Remove the files that another source or other settings produced, and mark the record as incomplete.

    With `keep_frames` the frames are the source and are never removed.

    Returns:
        The record of the earlier run, empty if there is none.
    """
    old: dict[str, Any] = json.loads(files.record.read_bytes()) if files.record.exists() else {}
    targets = {"frames": files.frames, "flow": files.flow, "skeleton": files.skeleton}
    if keep_frames:
        del targets["frames"]
    foreign = {"frames"} if old.get("has_own_frames") else set(targets) if not old else set()
    if existing := [str(target) for kind, target in targets.items() if kind in foreign and target.exists()]:
        raise ValueError(f"{path}: {existing[0]} exists and was not written by mmdistill; choose another --output")
    if keep_frames:
        new["has_own_frames"] = True
    for kind, target in targets.items():
        if old and (old["fingerprint"] != new["fingerprint"] or old["parts"].get(kind) != new["parts"][kind]):
            old["complete"] = False
            remove = shutil.rmtree if target.is_dir() else Path.unlink
            if target.exists():
                remove(target)
        for temporary in target.glob(".tmp-*"):  # left by a run that was killed during a write
            temporary.unlink()
    if not old.get("complete"):
        atomic_write_bytes(files.record, json.dumps({**new, "complete": False}).encode())
    return old
