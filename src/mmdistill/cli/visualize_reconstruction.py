"""Draw input, masked input and prediction of a pretraining checkpoint; one PNG per clip.

mmdistill visualize output/DATE/TIME/pretrain_rgb/checkpoints/epoch=49-loss=0.6095
mmdistill visualize CKPT --clips 8 --split val data_module.mask_ratio=0.5
mmdistill visualize VIDEOMAE.pth dataset=tennis modality=rgb

Dataset, mask and modality come from the config in the checkpoint. Further arguments override its data_module keys, for
example the path of the data. For a checkpoint of another program, the arguments override the config of `mmdistill
pretrain`.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from mmdistill.cli.parser import add_config_dir, make_parser, report_errors
from mmdistill.config import SOURCE_KEYS, ConfigError, PretrainConfig, modality_specs, stored_config
from mmdistill.config.compose import load_config, load_dataset_settings


def write_reconstructions(args: argparse.Namespace) -> None:
    """Load the checkpoint, reconstruct clips, write the images."""
    import torch
    from torch.utils.data import default_collate

    from mmdistill.builders import make_clip_dataset
    from mmdistill.checkpoint import open_checkpoint
    from mmdistill.pretrain.visualization import draw, load_masked_autoencoder, reconstruct, write_png
    from mmdistill.training.run_logger import baseline_ratio

    checkpoint = open_checkpoint(args.checkpoint)
    if checkpoint.meta.get("kind") != "pretrain":
        raise ConfigError(
            f"{args.checkpoint} is not a pretraining checkpoint: it has no decoder; give one of `mmdistill pretrain`"
        )
    if stored := checkpoint.meta.get("config"):
        datasets = [override.removeprefix("dataset=") for override in args.overrides if override.startswith("dataset=")]
        settings = load_dataset_settings(datasets[-1], args.config_dir) if datasets else {}
        overrides = [override for override in args.overrides if not override.startswith("dataset=")]
        trainer = {key: value for key, value in stored["trainer"].items() if key not in SOURCE_KEYS}
        stored = {**stored, "source": None, "trainer": trainer, "data_module": {**stored["data_module"], **settings}}
        config = stored_config(stored, PretrainConfig, overrides)
    else:
        config = load_config(PretrainConfig, "config_pretrain", args.overrides, config_dir=args.config_dir)
    spec = modality_specs(config.data_module)[config.modality]
    model = load_masked_autoencoder(checkpoint, config)
    dataset = make_clip_dataset(
        config.data_module,
        (config.modality,),
        training=args.split == "train",
        seed=config.seed,
        augment=False,
        masked=True,
    )
    out_dir = args.output or Path("reconstructions") / f"{config.modality}-{Path(args.checkpoint).name}"
    for index in torch.linspace(0, len(dataset) - 1, min(args.clips, len(dataset))).long().tolist():
        clip = dataset.index.clips[index]
        result = reconstruct(model, default_collate([dataset[index]]), spec)
        path = out_dir / f"clip_{index:05d}.png"
        removed = f"{100 * config.data_module.mask_ratio:g} % of the tokens removed"
        write_png(draw(result, f"{config.modality}, {clip.id}, {removed}"), path)
        ratio = baseline_ratio(result.loss, result.constant_baseline)
        print(
            f"{path}: loss {result.loss:.4f} (constant baseline {result.constant_baseline:.4f}, ratio {ratio:.3f}, "
            "lower is better)"
        )


@report_errors("visualize")
def main(argv: Sequence[str] | None = None) -> int:
    """Write the images. 0 if written, 2 if the checkpoint or the data cannot be used."""
    parser = make_parser("visualize", __doc__)
    parser.add_argument("checkpoint", help="checkpoint of `mmdistill pretrain` or of another VideoMAE")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="dataset=NAME | modality=NAME | data_module.KEY=VALUE | seed=N",
        help="overrides of the config in the checkpoint, or of config_pretrain if it has none",
    )
    parser.add_argument("--clips", type=int, default=4, help="number of clips, spread evenly over the split")
    parser.add_argument("--split", choices=("train", "val"), default="train", help="training or evaluation clips")
    add_config_dir(parser)
    parser.add_argument(
        "--output", "--out", type=Path, help="output folder (default: reconstructions/MODALITY-CHECKPOINT)"
    )
    args = parser.parse_intermixed_args(argv)
    keys = [override.partition("=")[0] for override in args.overrides]
    unused = [key for key in keys if key not in ("dataset", "modality", "seed") and not key.startswith("data_module.")]
    if unused:
        allowed = "give dataset=NAME, modality=NAME, data_module.KEY=VALUE or seed=N"
        raise ConfigError(f"{', '.join(unused)}: no effect on the images of a checkpoint; {allowed}")
    write_reconstructions(args)
    return 0
