"""A small dataset in the tennis layout: a bright square and a joint that move in one of four directions."""

import json
import pickle
from pathlib import Path
from typing import Any

import cv2
import numpy as np

FRAMES = 12
HEIGHT, WIDTH = 32, 36
DIRECTIONS = {"CC": (1, 0), "DL": (-1, 0), "T": (0, 1), "W": (0, -1)}


def make_tiny(root: Path, *, per_class: int = 6) -> Path:
    """Write frames, flow, skeletons and annotations; one event per rally."""
    rng = np.random.default_rng(0)
    rallies = []
    (root / "skeletons").mkdir(parents=True)
    for direction, (dx, dy) in DIRECTIONS.items():
        for number in range(per_class):
            video = f"rally_{direction}_{number}"
            rallies.append(_rally(root, video, direction, (dx, dy), rng))
    for name in ("unlabel.json", "val.json"):
        (root / name).write_text(json.dumps(rallies))
    return root


def _rally(
    root: Path, video: str, direction: str, step: tuple[int, int], rng: np.random.Generator
) -> dict[str, object]:
    frames, flows = root / "frames" / video, root / "flow" / video
    frames.mkdir(parents=True)
    flows.mkdir(parents=True)
    background = rng.integers(40, 120, size=3)
    joints = np.zeros((2, FRAMES, 17, 2), np.float32)
    for k in range(FRAMES):
        x, y = 16 + step[0] * (k - 6), 16 + step[1] * (k - 6)
        image = np.broadcast_to(background, (HEIGHT, WIDTH, 3)).astype(np.uint8).copy()
        image[y - 3 : y + 4, x - 3 : x + 4] = 240
        cv2.imwrite(str(frames / f"{k:06d}.jpg"), image, [cv2.IMWRITE_JPEG_QUALITY, 95])
        joints[0, k] = (x, y)
        if k < FRAMES - 1:
            flow = np.zeros((2, HEIGHT, WIDTH), np.float16)
            flow[0, y - 3 : y + 4, x - 3 : x + 4], flow[1, y - 3 : y + 4, x - 3 : x + 4] = step
            np.save(flows / f"pair_{k:05d}.npy", flow)
    score = np.zeros((2, FRAMES, 17), np.float32)
    score[0] = 1
    content = {"keypoint": joints, "keypoint_score": score, "total_frames": FRAMES, "img_shape": (HEIGHT, WIDTH)}
    (root / "skeletons" / f"{video}.pkl").write_bytes(pickle.dumps(content))
    label = f"near_deuce_stroke_fh_gs_{direction}_-_in"
    events = [{"frame": 6, "label": label, "outcome": "in"}]
    return {"video": video, "fps": 25.0, "height": HEIGHT, "width": WIDTH, "num_frames": FRAMES, "events": events}


def overrides(root: Path) -> list[str]:
    """Overrides that select this dataset, with short clips and a training of two epochs."""
    return [
        "data_module.name=tiny",
        f"data_module.target_data_dir={root}",
        "data_module.frames_dir=frames",
        "data_module.flow_dir=flow",
        "data_module.modalities.flow.std=[1.0]",
        "data_module.modalities.flow.compensate=null",
        "data_module.skeleton_dir=skeletons",
        "data_module.unlabel_json_path=unlabel.json",
        "data_module.fewshot_eval_json_path=val.json",
        f"data_module.frame_size=[{HEIGHT},{WIDTH}]",
        "data_module.crop_size=[32,32]",
        "data_module.num_frames=4",
        "data_module.window_stride=3",
        "data_module.label_fields=null",
        "data_module.patch_size=8",  # set here because the values of the demo dataset may change
        "data_module.mask_type=tube",
        "data_module.mask_ratio=0.75",
        "num_workers=0",
        "precision=32",  # auto depends on the CPU
        "batch_size=8",
        "logger=csv",  # the import of Lightning's TensorBoard logger takes 2 s
        "trainer.warmup_epochs=0",
        "trainer.epochs=2",
    ]


MODEL = [
    "model.dim=32",
    "model.depth=2",
    "model.heads=2",
    "model.decoder_dim=16",
    "model.decoder_depth=1",
    "model.decoder_heads=1",
]
EVAL = ["data_module.q_sample=3", "data_module.n_way=3", "data_module.episodes=20"]
SCORE_STEP = 1 / (20 * 3 * 3)  # change of an accuracy under EVAL, a fraction, if one query changes its class


def write_teacher(path: Path, modality: str, seed: int, **more: Any) -> Path:
    """Write an untrained pretraining checkpoint for the tiny data's token grid; `more` is added to its metadata."""
    import torch

    from mmdistill.checkpoint.convert import write_deepspeed
    from mmdistill.config import to_plain
    from mmdistill.models.videomae import Encoder, EncoderConfig

    channels, scale = {"rgb": (3, 1), "flow": (2, 1), "skeleton": (17, 2)}[modality]
    encoder_config = EncoderConfig(
        channels=channels, num_frames=4, height=32 // scale, width=32 // scale, patch=8 // scale, tubelet=2,
        dim=16, depth=1, heads=2, head_dim=8, mlp_dim=32, pos_embed="sincos",
    )  # fmt: skip
    torch.manual_seed(seed)
    state = {f"encoder.{k}": v for k, v in Encoder(encoder_config).state_dict().items()}
    meta = {"kind": "pretrain", "modality": modality, "encoders": {"encoder": to_plain(encoder_config)}, "epoch": 0}
    write_deepspeed(state, path, meta | more)
    return path
