from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pytest

from mmdistill.prepare.player_tracking import PlayerBoxes
from mmdistill.prepare.video import Frame, decode_frames
from tests.generated_video import BroadcastClip, write_broadcast_clip
from tests.tiny_pose import write_detector, write_vitpose


@pytest.fixture(scope="session")
def broadcast(tmp_path_factory: pytest.TempPathFactory) -> BroadcastClip:
    """A generated clip of 720 lines with two players, repeated frames and a cut."""
    return write_broadcast_clip(tmp_path_factory.mktemp("broadcast") / "clip.mp4")


@pytest.fixture(scope="session")
def real_broadcasts() -> Path:
    """The folder of two real broadcast clips, which only some machines have."""
    folder = Path(__file__).resolve().parents[4] / "shared" / "data" / "tennis-video"
    if not folder.exists():
        pytest.skip("the real broadcast clips are not next to this repository")
    return folder


@dataclass(frozen=True)
class TwoPlayers:
    """A video of 360 x 640 px with two bright figures and their centers (T, 2) in px."""

    path: Path
    near: np.ndarray
    far: np.ndarray
    far_start: int  # first frame of the far figure

    def read(self) -> Iterator[Frame]:
        """The frames of the video."""
        return decode_frames(self.path)


def write_two_players(path: Path, near: np.ndarray, far: np.ndarray, *, far_start: int = 0) -> TwoPlayers:
    """A tall and, from frame `far_start` on, a small figure on a textured background."""
    rng = np.random.default_rng(0)
    background = cv2.GaussianBlur(rng.integers(40, 90, (360, 640, 3), np.uint8), (0, 0), 3)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 25, (640, 360))
    for k in range(len(near)):
        image = background.copy()
        x, y = near[k].tolist()
        cv2.rectangle(image, (x - 20, y - 45), (x + 20, y + 45), (230, 230, 230), -1)
        if k >= far_start:
            x, y = far[k].tolist()
            cv2.rectangle(image, (x - 8, y - 18), (x + 8, y + 18), (250, 200, 200), -1)
        writer.write(image)
    writer.release()
    return TwoPlayers(path, near, far, far_start)


@pytest.fixture(scope="session")
def two_players(tmp_path_factory: pytest.TempPathFactory) -> TwoPlayers:
    """A tall figure moves right in the lower half, a small one moves left in the upper half from frame 10."""
    near = np.array([(120 + 6 * k, 260) for k in range(40)])
    far = np.array([(500 - 4 * k, 60) for k in range(40)])
    return write_two_players(tmp_path_factory.mktemp("pose") / "v.avi", near, far, far_start=10)


@pytest.fixture
def tracked(two_players: TwoPlayers, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces the tracking, which takes seconds, by boxes around the true centers."""
    size = np.full((2, len(two_players.near), 2), 60.0)
    boxes = np.concatenate([np.stack([two_players.near, two_players.far]) - 27.0, size], axis=2)
    boxes[1, : two_players.far_start] = np.nan
    players = PlayerBoxes(boxes, np.zeros(len(two_players.near), bool))
    monkeypatch.setattr("mmdistill.prepare.pose.find_players", lambda *_, **__: players)


@pytest.fixture(scope="session")
def pose_models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Folders of a small detector and a small ViTPose."""
    pytest.importorskip("transformers")
    root = tmp_path_factory.mktemp("models")
    return str(write_detector(root / "detector")), str(write_vitpose(root / "vitpose"))
