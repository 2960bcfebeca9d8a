"""The full-size tennis configs: one step of each training on clips of 16 frames of 224 x 384."""

import json
import pickle
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from mmdistill.checkpoint import read_checkpoint
from mmdistill.config import PretrainConfig
from mmdistill.config.compose import load_config
from tests.commands import ROOT, run_python
from tests.generated_annotations import make_f3set_entries

F3SET = ROOT.parent / "shared" / "data" / "f3set-tennis" / "val.json"
FRAMES = 18  # one window of 16 frames, and the frame that the last flow pair leads to
FEW_BLOCKS = ["model.depth=1", "model.decoder_depth=1"]


def write_rallies(root: Path, entries: list[dict[str, Any]]) -> None:
    """The first frames of each rally in the tennis layout: a moving disk, its flow, and joints at its center."""
    rng = np.random.default_rng(0)
    (root / "skeletons" / "f3set-tennis").mkdir(parents=True)
    shortened = [{**entry, "num_frames": FRAMES, "events": []} for entry in entries]
    for entry in shortened:
        frames, flows = root / "vid_frames_224" / entry["video"], root / "tennis_flows" / entry["video"]
        frames.mkdir(parents=True)
        flows.mkdir(parents=True)
        court = cv2.resize(rng.integers(0, 255, (7, 12, 3)).astype(np.uint8), (398, 224))
        joints = np.zeros((2, FRAMES, 17, 2), np.float32)
        for k in range(FRAMES):
            x, y = 100 + 5 * k, 120 + k
            image = court.copy()
            cv2.circle(image, (x, y), 20, (255, 255, 255), -1)
            cv2.imwrite(str(frames / f"{k:06d}.jpg"), image)
            joints[:, k] = (x, y)
            if k + 1 < FRAMES:
                flow = np.zeros((2, 224, 398), np.float32)
                flow[0, y - 20 : y + 20, x - 20 : x + 20] = 5
                np.save(flows / f"pair_{k:05d}.npy", flow)
        skeleton = {
            "keypoint": joints * (1280 / 398),
            "keypoint_score": np.ones((2, FRAMES, 17), np.float32),
            "total_frames": FRAMES,
            "img_shape": (720, 1280),
        }
        (root / "skeletons" / "f3set-tennis" / f"{entry['video']}.pkl").write_bytes(pickle.dumps(skeleton))
    (root / "unlabel.json").write_text(json.dumps(shortened))


def test_tennis_config_is_vit_small_at_full_size() -> None:
    config = load_config(PretrainConfig, "config_pretrain_tennis", ["modality=rgb"])
    assert (config.model.dim, config.model.depth) == (384, 12)
    assert (config.data_module.num_frames, list(config.data_module.crop_size)) == (16, [224, 384])


@pytest.mark.parametrize("annotations", ["generated", "real"])
def test_one_step_of_each_training_at_full_size(tmp_path: Path, annotations: str) -> None:
    """The width is that of the config; one block instead of twelve keeps the test short."""
    if annotations == "real" and not F3SET.exists():
        pytest.skip("the F3Set annotations are not next to this repository")
    entries = json.loads(F3SET.read_text()) if annotations == "real" else make_f3set_entries(matches=1)
    write_rallies(tmp_path, entries[:2])
    data = [f"data_module.target_data_dir={tmp_path}", "batch_size=2", "num_workers=0", "trainer.epochs=1"]
    runs = tmp_path / "runs"
    config = "--config-name=config_pretrain_tennis"
    modalities = "modality=rgb,flow,skeleton"
    run_python("pretrain_main.py", "-m", config, modalities, *FEW_BLOCKS, *data, f"hydra.sweep.dir={runs}")
    found = {m: next(runs.glob(f"pretrain_{m}_*/checkpoints/epoch=00-*")) for m in ("rgb", "flow", "skeleton")}
    for modality, size, patch in (("rgb", (224, 384), 16), ("flow", (224, 384), 16), ("skeleton", (56, 96), 4)):
        encoder = read_checkpoint(found[modality]).meta["encoders"]["encoder"]
        assert (encoder["height"], encoder["width"]) == size
        assert (encoder["num_frames"], encoder["patch"], encoder["dim"], encoder["depth"]) == (16, patch, 384, 1)
    paths = ",".join(str(found[m]) for m in ("rgb", "flow", "skeleton"))
    config = "--config-name=config_mmdistill_tennis"
    run = tmp_path / "distill"
    arguments = [f"trainer.ckpt_path=[{paths}]", "test=False", *data, f"hydra.run.dir={run}"]
    run_python("lit_main_mmdistill.py", config, *arguments)
    checkpoint = read_checkpoint(run / "checkpoints" / "last.ckpt")
    assert checkpoint.meta["step"] == 1
    assert checkpoint.state_dict["student_rgb.encoder.patch_embed.proj.weight"].shape == (384, 3, 2, 16, 16)
    assert checkpoint.state_dict["teacher_skeleton.encoder.patch_embed.proj.weight"].shape == (384, 17, 2, 4, 4)
