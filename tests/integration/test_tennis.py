"""The full-size tennis configs: one clip through each stage, 16 frames of 224 x 384, ViT-S."""

import json
import pickle
from pathlib import Path

import cv2
import numpy as np
import pytest

from mmdistill.checkpoint import read_checkpoint
from tests.commands import run_python

ROOT = Path(__file__).resolve().parents[2]
ANNOTATIONS = ROOT.parent / "shared" / "data" / "f3set-tennis" / "val.json"
FRAMES = 18  # one window of 16, and the frame that the last flow pair leads to


def _render(root: Path) -> None:
    """A real rally's record, cut to its first frames, with drawn frames, flow and joints in their layout."""
    rallies = json.loads(ANNOTATIONS.read_text())[:1]
    rng = np.random.default_rng(0)
    (root / "skeletons" / "f3set-tennis").mkdir(parents=True)
    for rally in rallies:
        rally["num_frames"], rally["events"] = FRAMES, []
        frames, flows = root / "vid_frames_224" / rally["video"], root / "tennis_flows" / rally["video"]
        frames.mkdir(parents=True)
        flows.mkdir(parents=True)
        court = cv2.resize(rng.integers(0, 255, (7, 12, 3)).astype(np.uint8), (398, 224))
        joints = np.zeros((2, FRAMES, 17, 2), np.float32)
        for k in range(FRAMES):
            x, y = 100 + 5 * k, 120 + k
            picture = court.copy()
            cv2.circle(picture, (x, y), 20, (255, 255, 255), -1)
            cv2.imwrite(str(frames / f"{k:06d}.jpg"), picture)
            joints[:, k] = (x, y)
            if k + 1 < FRAMES:
                flow = np.zeros((2, 224, 398), np.float32)
                flow[0, y - 20 : y + 20, x - 20 : x + 20] = 5
                np.save(flows / f"pair_{k:05d}.npy", flow)
        record = {
            "keypoint": joints * (1280 / 398),
            "keypoint_score": np.ones((2, FRAMES, 17), np.float32),
            "total_frames": FRAMES,
            "img_shape": (720, 1280),
        }
        (root / "skeletons" / "f3set-tennis" / f"{rally['video']}.pkl").write_bytes(pickle.dumps(record))
    (root / "unlabel.json").write_text(json.dumps(rallies))


@pytest.mark.skipif(not ANNOTATIONS.exists(), reason="the F3Set annotations are not beside the repository")
def test_one_step_of_each_stage_at_full_size(tmp_path: Path) -> None:
    _render(tmp_path)
    small = [f"data_module.target_data_dir={tmp_path}", "batch_size=1", "num_workers=0", "trainer.epochs=1"]
    runs = tmp_path / "runs"
    name = "--config-name=config_pretrain_tennis"
    run_python("pretrain_main.py", "-m", name, "modality=rgb,flow,skeleton", *small, f"hydra.sweep.dir={runs}")
    found = {m: next(runs.glob(f"pretrain_{m}_*/checkpoints/epoch=00-*")) for m in ("rgb", "flow", "skeleton")}
    for modality, size, patch in (("rgb", (224, 384), 16), ("flow", (224, 384), 16), ("skeleton", (56, 96), 4)):
        geometry = read_checkpoint(found[modality]).meta["encoders"]["encoder"]
        assert (geometry["height"], geometry["width"]) == size
        assert (geometry["num_frames"], geometry["patch"], geometry["dim"], geometry["depth"]) == (16, patch, 384, 12)
    paths = ",".join(str(found[m]) for m in ("rgb", "flow", "skeleton"))
    name = "--config-name=config_mmdistill_tennis"
    run = tmp_path / "distill"
    run_python(
        "lit_main_mmdistill.py", name, f"trainer.ckpt_path=[{paths}]", "test=False", *small, f"hydra.run.dir={run}"
    )
    state = read_checkpoint(run / "checkpoints" / "last.ckpt").state_dict
    assert state["student_rgb.encoder.patch_embed.proj.weight"].shape == (384, 3, 2, 16, 16)
    assert state["teacher_skeleton.encoder.patch_embed.proj.weight"].shape == (384, 17, 2, 4, 4)
