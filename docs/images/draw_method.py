"""Draw docs/images/method.png from the runs of `make demo`: input, masked input, prediction, few-shot accuracy.

python docs/images/draw_method.py [output/demo]
"""

import json
import sys
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch.utils.data import default_collate

from mmdistill.builders import make_clip_dataset
from mmdistill.checkpoint import latest_valid_checkpoint, open_checkpoint
from mmdistill.checkpoint.architecture import encoder_config_from_meta
from mmdistill.config import PretrainConfig, modality_specs, stored_config
from mmdistill.modalities.images import draw_image_grid
from mmdistill.models.videomae import DecoderConfig, VideoMAE
from mmdistill.pretrain.visualization import INPUT, MASKED_INPUT, reconstruct, render_rows

MODALITIES = ("rgb", "flow", "skeleton")
NETWORKS = {"student_rgb": "distilled\nstudent", "teacher_rgb": "RGB\npretrained", "random": "random\ninit"}


def middle_frames(run_dir: Path) -> dict[str, np.ndarray]:
    """Images of the middle frame of a demo clip: row title -> (H, W, 3)."""
    path = latest_valid_checkpoint(run_dir / "checkpoints")
    if path is None:
        raise SystemExit(f"{run_dir}: no checkpoint; run `make demo` first")
    checkpoint = open_checkpoint(path)
    config = stored_config(checkpoint.meta["config"], PretrainConfig)
    encoder = encoder_config_from_meta(checkpoint.meta["encoders"]["encoder"])
    model = VideoMAE(encoder, DecoderConfig(**checkpoint.meta["decoder"]))
    checkpoint.load_into(model)
    dataset = make_clip_dataset(config.data_module, (config.modality,), training=True, seed=config.seed)
    clip = len(dataset) // 2
    result = reconstruct(model, default_collate([dataset[clip]]), modality_specs(config.data_module)[config.modality])
    return {title: images[len(images) // 2] for title, images in render_rows(result).items()}


def main(output: Path) -> None:
    """Write method.png next to this file."""
    figure = Figure(figsize=(9.6, 4.6), layout="constrained", dpi=110)
    canvas = FigureCanvasAgg(figure)
    left, right = figure.subfigures(1, 2, width_ratios=(3, 2))
    rows = {}
    for modality in MODALITIES:
        images = middle_frames(output / f"pretrain_{modality}")
        rows[modality] = [images[INPUT], images[MASKED_INPUT], list(images.values())[-1]]
    draw_image_grid(left, rows, (INPUT, MASKED_INPUT, "prediction"))
    left.suptitle("1. Pretrain one masked autoencoder per modality", fontsize=10)
    ax = right.subplots()
    results = json.loads((output / "test" / "fewshot.json").read_text())
    for offset, setting in zip((-0.2, 0.2), results["settings"], strict=True):
        rows = [setting["rows"][name] for name in NETWORKS]
        values, intervals = ([100 * r[key] for r in rows] for key in ("top1_action_ensemble", "ci95"))
        label = f"{setting['n_way']}-way {setting['k_shot']}-shot"
        bars = ax.bar(np.arange(len(rows)) + offset, values, 0.4, yerr=intervals, capsize=3, label=label)
        ax.bar_label(bars, fmt="%.1f", fontsize=8, padding=2)
    ax.set_xticks(range(len(NETWORKS)), NETWORKS.values())
    ax.set_ylabel("few-shot accuracy on RGB (%)")
    ax.legend(fontsize=8)
    right.suptitle("2. Distill into one RGB student   3. Evaluate few-shot", fontsize=10)
    canvas.print_png(str(Path(__file__).with_name("method.png")))


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "output/demo"))
