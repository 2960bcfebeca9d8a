r"""Compute mean and standard deviation of each modality of a training set and write them as a dataset config.

    mmdistill compute-stats --config-name config_pretrain_tennis --output configs/dataset/mine.yaml \
        data_module.target_data_dir=data/mine

`dataset=mine` then trains with this config. The values are computed from the model input: the clips, crops, resizing
and heat-maps of a training with the same overrides. Each checkpoint stores them.
"""

import argparse
import shlex
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import yaml

from mmdistill.cli.parser import add_config_dir, make_parser, report_errors
from mmdistill.config import ConfigError, DataModuleConfig, ModalityConfig, PretrainConfig, modality_specs, to_plain
from mmdistill.config.compose import configs_dir, dataset_arguments, load_config, load_dataset_settings
from mmdistill.console import ProgressDisplay
from mmdistill.errors import format_count
from mmdistill.files import atomic_write_bytes
from mmdistill.modalities import STUDENT_MODALITY, ModalitySpec, modality_names

TRAINING_KEYS = (
    "window_stride", "hflip_prob", "random_crop_min_scale", "mask_type", "mask_temperature", "mask_ratio", "n_masks",
    "eval_mask_ratio", "eval_masks", "input_modes", "n_way", "k_shot", "q_sample", "episodes", "disjoint",
    "support_views", "on_missing",
)  # fmt: skip


@report_errors("compute-stats", ValueError)
def main(argv: Sequence[str] | None = None) -> int:
    """Compute the statistics and write the config. Returns the exit status."""
    options = _arguments(argv)
    if options.output and options.output.exists() and not options.force:
        raise ConfigError(f"{options.output}: exists; choose another name, or use --force to replace it")
    from mmdistill.builders import make_clip_dataset, make_demo_data  # imports torch, which --help must not
    from mmdistill.prepare.statistics import dataset_statistics, to_mean_std

    config = load_config(
        PretrainConfig, options.config_name, ["modality=rgb", *options.overrides], config_dir=options.config_dir
    )
    data = config.data_module
    dataset_name = output_name(options, data) if options.output else data.name
    make_demo_data(data)
    specs = modality_specs(data)
    names = tuple(options.modalities or specs)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)  # an error here comes before the long computation
    dataset = make_clip_dataset(data, names, training=True, seed=config.seed)
    count = min(options.clips or len(dataset), len(dataset))
    with ProgressDisplay("clips", count) as display:
        statistics = dataset_statistics(
            dataset, specs, num_workers=config.num_workers, clips=options.clips, progress=display.update
        )
    plain = dataset_keys(data, statistics, options.overrides, options.config_dir)
    for name, scaler in statistics.items():
        mean, std, constant = to_mean_std(scaler)
        plain["modalities"][name] |= {"mean": list(mean), "std": list(std)}
        print(f"{name}: mean {mean}, std {std}", file=sys.stderr)
        if constant:
            print(_constant_channels_message(specs[name], constant), file=sys.stderr)
    _write(options.output, {**plain, "name": dataset_name}, count)
    if options.output:
        is_small = len(dataset) < config.batch_size
        batch_size = len(dataset) if is_small else config.batch_size if _has_key(options, "batch_size") else None
        print("\n".join(next_steps(options, names, batch_size)), file=sys.stderr)
    return 0


def output_name(options: argparse.Namespace, data: DataModuleConfig) -> str:
    """`name` in the written config: that of the command line, else that of the file. The demo data keep theirs.

    Raises:
        ConfigError: the name is that of other data.
    """
    path: Path = options.output
    own = configs_dir() / "dataset" / path.name
    if own.is_file() and path.resolve() != own.resolve():
        raise ConfigError(f"--output {path}: dataset={path.stem} selects {own}; choose another file name")
    if data.name == "demo" or _has_key(options, "data_module.name"):  # the name "demo" triggers the rendering
        return data.name
    if path.stem == "demo":
        raise ConfigError(f"--output {path}: the name demo belongs to the generated data; choose another file name")
    return path.stem


def _has_key(options: argparse.Namespace, key: str) -> bool:
    return any(override.startswith(f"{key}=") for override in options.overrides)


def next_steps(options: argparse.Namespace, modalities: Sequence[str], batch_size: int | None = None) -> list[str]:
    """The path of the written config, and the pretraining that uses it, with the overrides that it does not contain.

    Args:
        options: the command line.
        modalities: the modalities of the config.
        batch_size: batch size of the pretraining; None: that of the main config.
    """
    path: Path = options.output
    dataset = dataset_arguments(path)
    if dataset is None:
        return [f"wrote {path}; to use it, move it to DIR/dataset/ and add --config-dir=DIR dataset={path.stem}"]
    training = [o for o in options.overrides if o.partition("=")[0].removeprefix("data_module.") in TRAINING_KEYS]
    if batch_size is not None:
        training.append(f"batch_size={batch_size}")
    sweep = ["-m"] if len(modalities) > 1 else []
    words = ["mmdistill", "pretrain", *sweep, f"--config-name={options.config_name}", *dataset]
    return [f"wrote {path}", "to pretrain: " + shlex.join([*words, f"modality={','.join(modalities)}", *training])]


def _constant_channels_message(spec: ModalitySpec, constant: list[int]) -> str:
    """Log line about constant channels. For keypoints it states the cause: the joint was not found."""
    if spec.sigma is None:
        return f"{spec.name}: channels {constant} have the same value everywhere; their std is set to 1"
    if len(constant) == spec.channels:
        return f"{spec.name}: no skeleton was found in the training set; the std of all channels is set to 1"
    return f"{spec.name}: joints {constant} were not found in the training set; their std is set to 1"


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser("compute-stats", __doc__)
    parser.add_argument("--config-name", default="config_pretrain", help="main config in configs/")
    add_config_dir(parser)
    parser.add_argument("--output", type=Path, help="dataset config to write (default: standard output)")
    parser.add_argument(
        "--modalities", nargs="+", choices=modality_names(), help="modalities to compute (default: all of the dataset)"
    )
    parser.add_argument("--force", action="store_true", help="replace the output if it exists")
    parser.add_argument("--clips", type=int, help="number of clips, evenly spaced (default: all)")
    parser.add_argument("overrides", nargs="*", help="Hydra overrides, as for `mmdistill pretrain`")
    return parser.parse_intermixed_args(argv)


def dataset_keys(
    data: DataModuleConfig, computed: Collection[str], overrides: Sequence[str], config_dir: Path | None
) -> dict[str, Any]:
    """The keys of a dataset config: data, clips and the computed modalities, without keys at their defaults.

    Keys of a training or an evaluation (`TRAINING_KEYS`) have the values of the dataset's own config, not those of the
    main config or the command line. rgb is kept in any case, because every distillation needs it.
    """
    chosen = [override.removeprefix("dataset=") for override in overrides if override.startswith("dataset=")]
    try:
        own = load_dataset_settings(chosen[-1] if chosen else data.name, config_dir)
    except ConfigError:  # the dataset is written in a main config
        own = {}
    plain, defaults = to_plain(data), to_plain(DataModuleConfig())
    kept = {key: value for key, value in plain.items() if key not in TRAINING_KEYS and value != defaults.get(key)}
    kept |= {key: own[key] for key in TRAINING_KEYS if key in own}
    modalities = kept.pop("modalities")
    names = [name for name in modalities if name in (STUDENT_MODALITY, *computed)]
    unset = to_plain(ModalityConfig())
    for name in names:
        modalities[name] = {key: value for key, value in modalities[name].items() if value != unset[key]}
    return {**kept, "modalities": {name: modalities[name] for name in names}}


def _write(output: Path | None, kept: dict[str, Any], clips: int) -> None:
    text = "# @package data_module\n" + f"# statistics over {format_count(clips, 'clip')}, by mmdistill compute-stats\n"
    text += yaml.safe_dump(kept, sort_keys=False, default_flow_style=None, width=110)
    if output is None:
        print(text, end="")
    else:
        atomic_write_bytes(output, text.encode())
