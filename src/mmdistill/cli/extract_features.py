"""Encode evaluation or training clips with a network of a checkpoint and write the features as .npz or .safetensors.

mmdistill features PATH/TO/last.ckpt --output student.safetensors
mmdistill features PATH/TO/last.ckpt --output teacher.npz --component teacher_flow --n-masks 2 --eval-masks per_clip
mmdistill features PATH/TO/last.ckpt --output train.npz --split unlabel
mmdistill features PATH/TO/last.ckpt --output FOLDER --per-frame
mmdistill features PATH --output o.npz --config-name config_mmdistill_tennis data_module.target_data_dir=DIR

The checkpoint may have any format, and any of its components can be selected. Further arguments are Hydra overrides of
the dataset config. --per-frame writes one file per rally instead, with one feature per frame: FOLDER/VIDEO.npy, float16
[frames, D].
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mmdistill.checkpoint.errors import ComponentError, name_setting
from mmdistill.cli.parser import add_evaluation_config, load_evaluation_config, make_parser, report_errors
from mmdistill.config import ConfigError, DistillConfig, modality_specs
from mmdistill.config.overrides import is_override
from mmdistill.errors import format_count


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = make_parser("features", __doc__)
    parser.add_argument("checkpoint", help="checkpoint file or directory")
    parser.add_argument(
        "--output", type=Path, help="file to write, .npz or .safetensors; with --per-frame a folder (no default)"
    )
    parser.add_argument(
        "--component", help="student_rgb, teacher_flow, encoder ... (default: the student, or the only encoder)"
    )
    parser.add_argument(
        "--split",
        choices=["unlabel", "eval"],
        default="eval",
        help="annotation file of the dataset config: training (clips without labels) or evaluation",
    )
    parser.add_argument("--modality", help="modality of the component (default: that of the checkpoint)")
    parser.add_argument("--per-frame", action="store_true", help="encode whole rallies, one feature per frame")
    parser.add_argument(
        "--stride", type=int, default=3, help="with --per-frame: frames between the windows that are encoded"
    )
    parser.add_argument(
        "--n-masks", type=int, help="masked views per clip; 0: whole clips (default: data_module.n_masks)"
    )
    parser.add_argument(
        "--eval-mask-ratio",
        type=float,
        help="fraction of tokens that a mask removes (default: data_module.eval_mask_ratio)",
    )
    parser.add_argument(
        "--eval-masks",
        choices=["shared", "per_clip"],
        help="masks of all clips or of each clip (default: data_module.eval_masks)",
    )
    add_evaluation_config(parser)
    parser.add_argument("--cache", type=Path, help="folder of the feature cache (default: no cache)")
    args = parser.parse_intermixed_args(argv)
    if args.output is None and args.overrides and not is_override(args.overrides[0]):  # its place in earlier versions
        args.output = Path(args.overrides.pop(0))
    if args.output is None:
        parser.error("the following arguments are required: --output")
    return args


def extract_features(args: argparse.Namespace, config: DistillConfig) -> Path:
    """Encode the clips and write the file."""
    from mmdistill.builders import (
        load_clip_sources,
        load_rallies,
        make_clip_dataset,
        make_clip_loader,
        make_demo_data,
        resolve_annotation_path,
    )
    from mmdistill.data.fingerprint import data_fingerprint
    from mmdistill.distributed.device import resolve_precision
    from mmdistill.distributed.process import start_process
    from mmdistill.evaluation.frame_features import FrameEncoder, write_frame_features
    from mmdistill.evaluation.networks import load_network
    from mmdistill.fewshot.encode import EvalMasks, encode_cached
    from mmdistill.fewshot.features import save_features

    if not args.per_frame and args.output.suffix not in (".npz", ".safetensors"):
        raise ConfigError(f"{args.output}: unsupported file type; use a name that ends in .npz or .safetensors")
    data = config.data_module
    process = start_process(accelerator=config.accelerator, seed=config.seed)
    with name_setting("--component", ComponentError):
        network = load_network(args.checkpoint, component=args.component, modality=args.modality, data=data)
    network = network.choose_pooling(config)
    make_demo_data(data)
    training = args.split == "unlabel"
    precision = resolve_precision(config.precision, process.device)
    if args.per_frame:
        rallies = load_rallies(data, resolve_annotation_path(data, training=training))
        encoder = FrameEncoder([network], rallies, data, stride=args.stride, device=process.device, precision=precision)
        if line := encoder.describe_too_short():
            print(line, file=sys.stderr)
        count = write_frame_features(encoder, args.output, batch_size=config.batch_size, num_workers=config.num_workers)
        rallies_text = format_count(len(encoder.videos), "rally")
        print(f"{args.output}: {network.name}, {rallies_text}, {format_count(count, 'window')} encoded")
        return Path(args.output)
    dataset = make_clip_dataset(
        data,
        (network.modality,),
        training=training,
        seed=config.seed,
        augment=False,
        masked=False,
        needs_motion=network.pooling is not None and network.pooling.name == "motion",
    )
    clips = format_count(len(dataset), f"{'training' if training else 'evaluation'} clip")
    print(f"dataset {data.name}: {clips}", file=sys.stderr)
    n_masks = data.n_masks if args.n_masks is None else args.n_masks
    ratio = data.eval_mask_ratio if args.eval_mask_ratio is None else args.eval_mask_ratio
    shared = (args.eval_masks or data.eval_masks) == "shared"
    job = network.encoding_job(
        modality_specs(data)[network.modality],
        EvalMasks(n_masks, ratio, data.mask_type, shared, config.seed, mask_temperature=data.mask_temperature),
        device=process.device,
        precision=precision,
    )
    pin = process.device.type == "cuda"
    (features,) = encode_cached(
        [job],
        lambda: make_clip_loader(dataset, num_workers=config.num_workers, pin_memory=pin, batch_size=config.batch_size),
        dataset.index,
        data=data_fingerprint(dataset, network.modality) if args.cache else "",
        cache=args.cache,
    )
    sources = load_clip_sources(data, dataset.index, training=training)
    info = {**features.info, "dataset": data.name}
    path = save_features(replace(features, sources=sources, info=info), args.output)
    print(f"{path}: {features.network}, {features.input_mode}, features {list(features.features.shape)}")
    return path


@report_errors("features", schema=DistillConfig)
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns 0, or 2 if the arguments, the checkpoint or the data are invalid."""
    args = parse_arguments(argv)
    extract_features(args, load_evaluation_config(args))
    return 0
