"""Write the features that a checkpoint gives the evaluation clips, as .npz or .safetensors.

mmdistill features PATH/TO/last.ckpt student.safetensors
mmdistill features PATH/TO/last.ckpt teacher.npz --part teacher_flow --n-masks 2 --views per_clip
mmdistill features PATH o.npz --config-name config_mmdistill_tennis data_module.target_data_dir=DIR

Any checkpoint of any format, any part of it; what follows the options are Hydra overrides of the data.
"""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from mmdistill.config import ConfigError, DistillConfig, explain
from mmdistill.config.compose import load_config
from mmdistill.errors import MMDistillError


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="file or folder")
    parser.add_argument("out", type=Path, help=".npz or .safetensors")
    parser.add_argument("--part", help="student_rgb, teacher_flow, encoder ...; default: the student, or the encoder")
    parser.add_argument("--modality", help="where the checkpoint does not tell")
    parser.add_argument("--split", choices=["eval", "unlabel"], default="eval", help="which annotation file")
    parser.add_argument(
        "--n-masks", type=int, help="masked views per clip, 0: the whole clip; default: as in the config"
    )
    parser.add_argument("--mask-ratio", type=float, help="default: data_module.eval_mask_ratio")
    parser.add_argument("--views", choices=["shared", "per_clip"], help="default: data_module.eval_masks")
    parser.add_argument("--config-name", default="config_mmdistill")
    parser.add_argument("--config-dir", type=Path, help="additional folder of configs, such as dataset/NAME.yaml")
    parser.add_argument("--cache", type=Path, help="folder of the feature cache")
    parser.add_argument("overrides", nargs="*", help="Hydra overrides")
    return parser.parse_intermixed_args(argv)


def extract(args: argparse.Namespace, config: DistillConfig) -> Path:
    """Encode and write."""
    from mmdistill.builders import make_clip_dataset, make_clip_loader, make_demo_data, token_grid
    from mmdistill.config import modality_specs
    from mmdistill.data.fingerprint import data_fingerprint
    from mmdistill.distributed.device import autocast, resolve_precision
    from mmdistill.distributed.process import start_process
    from mmdistill.evaluation.networks import load_network
    from mmdistill.fewshot.encode import Views, encode_cached
    from mmdistill.fewshot.features import save_features

    if args.out.suffix not in (".npz", ".safetensors"):
        raise ConfigError(f"{args.out}: features are written as .npz or .safetensors")
    data = config.data_module
    process = start_process(accelerator=config.accelerator, seed=config.seed)
    specs = modality_specs(data)
    sizes = {m: (data.num_frames, *(side // spec.input_stride for side in data.crop_size)) for m, spec in specs.items()}
    network = load_network(
        args.checkpoint, part=args.part, modality=args.modality, input_sizes=sizes, token_grid=token_grid(data)
    )
    make_demo_data(data)
    dataset = make_clip_dataset(data, (network.modality,), training=False, seed=config.seed)
    index = dataset.index
    views = Views(
        data.n_masks if args.n_masks is None else args.n_masks,
        data.eval_mask_ratio if args.mask_ratio is None else args.mask_ratio,
        data.mask_type,
        args.views or data.eval_masks,
        config.seed,
    )
    precision = resolve_precision(config.precision, process.device)
    context = partial(autocast, precision, process.device)
    job = network.job(specs[network.modality], views, device=process.device, autocast=context, precision=precision)
    pin = process.device.type == "cuda"
    (features,) = encode_cached(
        [job],
        lambda: make_clip_loader(dataset, num_workers=config.num_workers, pin_memory=pin, batch_size=config.batch_size),
        index,
        data=data_fingerprint(dataset, network.modality) if args.cache else "",
        cache=args.cache,
    )
    path = save_features(features, args.out)
    print(f"{path}: {features.network}, {features.input_mode}, features {list(features.features.shape)}")
    return path


def main(argv: Sequence[str] | None = None) -> int:
    """Command line. 0 when written, 2 when the input is not usable."""
    args = parse_arguments(argv)
    try:
        overrides = [*args.overrides, "train=False", "test=False"]
        extract(args, load_config(DistillConfig, args.config_name, overrides, config_dir=args.config_dir))
    except (HydraException, OmegaConfBaseException, MMDistillError) as error:
        print(f"extract_features: {explain(error, DistillConfig)}", file=sys.stderr)
        return 2
    return 0
