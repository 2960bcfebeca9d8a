"""List the checkpoints below a folder; print the commands that distill and evaluate them.

mmdistill find-checkpoints output
mmdistill find-checkpoints output --best --json
"""

import contextlib
import dataclasses
import json
import re
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from mmdistill.checkpoint.find import DISTILLED, UNKNOWN, CheckpointInfo, find_checkpoints, select_checkpoints
from mmdistill.checkpoint.formats.metadata import read_stored_meta
from mmdistill.cli.hydra_help import parse_options
from mmdistill.cli.parser import make_parser, report_errors
from mmdistill.cli.video_classes import video_class_overrides
from mmdistill.config import ConfigError, DistillConfig, PretrainConfig, to_plain
from mmdistill.config.compose import compose_config, configs_dir, load_config
from mmdistill.data.annotations.f3set import load_f3set
from mmdistill.data.clips import ClipSpec, build_index
from mmdistill.errors import format_size
from mmdistill.modalities import BUILTIN_MODALITIES, STUDENT_MODALITY, modality_names

HEADER = f"  {'format':<10}{'epoch':>6}{'loss':>10}{'size':>10}  {'saved':<18}{'files':<12}path"
RESULTS_FILE = "fewshot.json"
_INVALID_CONFIG = (ConfigError, HydraException, OmegaConfBaseException)
# the records of a run are not as expected
_UNREADABLE = (OSError, yaml.YAMLError, ValueError, LookupError, TypeError, *_INVALID_CONFIG)
# verb -> keys of a training that change the result of the verb, besides `dataset` and `data_module`. A distillation has
# its own `trainer`
OTHER_KEYS: dict[str, tuple[str, ...]] = {
    "pretrain": (
        *("seed", "batch_size", "precision", "model", "trainer", "decoder_mask_ratio", "experiment"),
        *("dataset@source", "source"),
    ),
    "distill": ("seed", "batch_size", "precision", "experiment"),
    "evaluate": ("experiment", "seed", "precision", "eval_component", "baselines", "classifier", "probe"),
}
# verb -> keys of `data_module` that do not change it. Pretraining and distillation have their own `mask_ratio`
UNUSED_DATA_KEYS: dict[str, tuple[str, ...]] = {
    "pretrain": (),
    "distill": ("mask_ratio",),
    "evaluate": ("train_clips", "val_json_path", "hflip_prob", "random_crop_min_scale"),
}


def format_row(info: CheckpointInfo) -> str:
    """Format a checkpoint as one line."""
    epoch = "-" if info.epoch is None else str(info.epoch)
    loss = "-" if info.loss is None else f"{info.loss:.4f}"
    modified = time.strftime("%Y-%m-%d %H:%M", time.localtime(info.modified))
    files = "complete" if info.complete else "INCOMPLETE"
    note = f"  {info.problem}" if info.problem else "  (interrupted epoch)" if info.is_inside_epoch else ""
    size = format_size(info.size)
    return f"  {info.format:<10}{epoch:>6}{loss:>10}{size:>10}  {modified}  {files:<12}{info.path}{note}"


def format_ckpt_path(selected: dict[str, CheckpointInfo]) -> str:
    """Format the YAML list for trainer.ckpt_path, in the order rgb, flow, skeleton."""
    found = [name for name in modality_names() if name in selected]
    lines = []
    for name in modality_names():
        if name in selected:
            text = json.dumps(str(selected[name].path), ensure_ascii=False)
            lines.append(f"  {text},  # {name}, {selected[name].format}")
        else:
            command = shlex.join(
                [
                    "mmdistill",
                    "pretrain",
                    *config_arguments(_run_dir(selected[found[0]]), "pretrain", selected[found[0]].path),
                    f"modality={name}",
                ]
            )
            lines.append(f"  ???,  # {name}: no complete checkpoint found; to pretrain it: {command}")
    if STUDENT_MODALITY in found and len(found) < len(modality_names()):
        lines.append(
            f"]\n# to distill from these only: remove the lines with ???, set trainer.teachers=[{','.join(found)}]"
        )
    else:
        lines.append("]")
    return "\n".join(["ckpt_path: [", *lines])


def _run_dir(info: CheckpointInfo) -> Path:
    return info.path.parent.parent


def config_arguments(run_dir: Path, verb: str, checkpoint: Path | None = None) -> list[str]:
    """Arguments of ``mmdistill VERB`` that select the config, the dataset and the overrides of a run that VERB uses.

    They come from the ``.hydra`` folder of the run, else from its ``run.json``, else from the config in `checkpoint`.
    Without these: the main config that has the run's name, if there is one, else the placeholder NAME. A distillation
    uses the config of the pretraining with ``mmdistill`` in its name, and the experiment of the pretraining if it fits.
    """
    try:
        hydra, data = _read_run(run_dir, checkpoint)
        names = {"main": "--config-path", "command-line": "--config-dir"}
        sources = [
            (names[s["provider"]], s["path"]) for s in hydra["runtime"]["config_sources"] if s["provider"] in names
        ]
        folders = [f"{name}={path}" for name, path in sources if Path(path).is_dir() and path != str(configs_dir())]
        task = hydra["overrides"]["task"]
        keys = [o.lstrip("+").partition("=")[0] for o in task]
        last = [(key, o) for i, (key, o) in enumerate(zip(keys, task, strict=True), 1) if key not in keys[i:]]
        overrides = [o for key, o in last if _is_used(key, verb, data)]
        dataset = hydra["runtime"]["choices"]["dataset"]
        if dataset and not any(override.startswith("dataset=") for override in overrides):
            overrides.insert(0, f"dataset={dataset}")
        if hydra.get("mode") == "MULTIRUN" and any(override.startswith("experiment=") for override in overrides):
            overrides.append("hydra.mode=RUN")  # one job of the sweep, whose values are among the overrides
        more = _overrides_without_labels(hydra, data, verb)
        overrides = [o for o in overrides if o.partition("=")[0] not in {m.partition("=")[0] for m in more}] + more
        config_name = hydra["job"]["config_name"]
        if verb == "distill":
            config_name = config_name.replace("pretrain", "mmdistill")
            if not any((Path(folder) / f"{config_name}.yaml").is_file() for _, folder in sources):
                config_name = "NAME"
            elif not _composes(config_name, dict(sources), overrides):
                overrides = [o for o in overrides if not o.startswith(("experiment=", "hydra.mode="))]
        return [f"--config-name={config_name}", *folders, *overrides]
    except _UNREADABLE:
        name = f"config_{run_dir.name}"
        if verb == "evaluate" and (configs_dir() / f"{name}.yaml").is_file():
            return [f"--config-name={name}"]
        return ["--config-name=NAME", "dataset=NAME"]


def _composes(config_name: str, sources: dict[str, str], overrides: list[str]) -> bool:
    """Whether Hydra accepts the arguments."""
    folders = {"config_path": sources.get("--config-path"), "config_dir": sources.get("--config-dir")}
    try:
        compose_config(config_name, overrides, **folders)
    except _INVALID_CONFIG:
        return False
    return True


def missing_evaluation_file(run_dir: Path, checkpoint: Path | None = None) -> Path | None:
    """The annotation file of a run's evaluation, if it does not exist, but that of the training exists; else None."""
    try:
        return _missing_evaluation_file(*_read_run(run_dir, checkpoint))
    except _UNREADABLE:
        return None


def _missing_evaluation_file(hydra: dict[str, Any], data: dict[str, Any]) -> Path | None:
    try:
        training, evaluation = _annotation_paths(hydra, data)
    except _UNREADABLE:
        return None
    return evaluation if training.is_file() and not evaluation.exists() else None


def _read_run(run_dir: Path, checkpoint: Path | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Hydra's settings and `data_module` of a run, from the first of these that exists.

    ``.hydra``, the first record of ``run.json``, the config in the metadata of `checkpoint`.
    """
    if (run_dir / ".hydra").is_dir():
        hydra = yaml.safe_load((run_dir / ".hydra" / "hydra.yaml").read_bytes())["hydra"]
        return hydra, yaml.safe_load((run_dir / ".hydra" / "config.yaml").read_bytes())["data_module"]
    paths: Sequence[tuple[str, str | None]]
    if checkpoint is None or (run_dir / "run.json").is_file():
        record = json.loads((run_dir / "run.json").read_bytes())[0]
        config, options = record["config"], parse_options(record["command"][1:])
        name = options.config_name or ("config_pretrain" if "modality" in config else "config_mmdistill")
        paths = (("main", options.config_path or str(configs_dir())), ("command-line", options.config_dir))
        overrides = options.overrides
    else:
        config, paths = read_stored_meta(checkpoint)["config"], (("main", str(configs_dir())),)
        name, overrides = _nearest_config(config)
    runtime = {
        "cwd": "",
        "config_sources": [{"provider": provider, "path": path} for provider, path in paths if path],
        "choices": {"dataset": None},
    }
    hydra = {"job": {"config_name": name}, "runtime": runtime, "overrides": {"task": overrides}}
    return hydra, config["data_module"]


def _nearest_config(config: dict[str, Any]) -> tuple[str, list[str]]:
    """The main config that needs the fewest overrides for `config`, a complete config, and these overrides."""
    prefix = "config_pretrain" if "modality" in config else "config_mmdistill"
    dataset = config["data_module"]["name"]
    arguments = [f"dataset={dataset}"] if (configs_dir() / "dataset" / f"{dataset}.yaml").is_file() else []
    found = {}
    for path in sorted(configs_dir().glob(f"{prefix}*.yaml")):
        base: PretrainConfig | DistillConfig
        if "modality" in config:
            base = load_config(PretrainConfig, path.stem, [*arguments, f"modality={config['modality']}"])
        else:
            teachers = f"trainer.teachers=[{','.join(config['trainer']['teachers'])}]"
            base = load_config(DistillConfig, path.stem, [*arguments, "train=False", "test=False", teachers])
        own = {key: value for key, value in config.items() if key != "source"}
        found[path.stem] = [*arguments, *_differences(own, to_plain(base))]
    name = min(found, key=lambda name: len(found[name]))
    return name, [*found[name], *(_source_overrides(config["source"]) if config.get("source") else [])]


def _source_overrides(source: dict[str, Any]) -> list[str]:
    """The overrides for the source of a joint pretraining."""
    name = source["name"]
    if not (configs_dir() / "dataset" / f"{name}.yaml").is_file():
        return [f"source={name}"]
    base = load_config(PretrainConfig, "config_pretrain", [f"dataset={name}", f"modality={STUDENT_MODALITY}"])
    return [f"source={name}", *_differences(source, to_plain(base.data_module), "source.")]


def _differences(config: dict[str, Any], base: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Overrides that give the keys of `base` the values of `config`."""
    for key, value in config.items():
        if key not in base or value == base[key]:
            continue
        if isinstance(value, dict) and isinstance(base[key], dict):
            yield from _differences(value, base[key], f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}={_hydra_value(value)}"


def _annotation_paths(hydra: dict[str, Any], data: dict[str, Any]) -> tuple[Path, Path]:
    """The annotation files of the training and of the evaluation."""
    root = Path(hydra["runtime"]["cwd"]) / Path(data["target_data_dir"]).expanduser()
    training, evaluation = (Path(data[key]).expanduser() for key in ("unlabel_json_path", "fewshot_eval_json_path"))
    return root / training, root / evaluation


def _overrides_without_labels(hydra: dict[str, Any], data: dict[str, Any], verb: str) -> list[str]:
    """Overrides of `verb` without an evaluation file: no evaluation, or the video as class if possible."""
    if verb == "pretrain" or _missing_evaluation_file(hydra, data) is None:
        return []
    if verb == "distill":
        return ["test=False"]
    if data["annotations"] != "f3set":
        return []
    spec = ClipSpec("windows", data["num_frames"], sampling_rate=data["sampling_rate"], stride=data["window_stride"])
    try:
        clips = build_index(load_f3set(_annotation_paths(hydra, data)[0]), spec).clips
    except ValueError:  # the annotation file cannot be used
        return []
    return video_class_overrides(clips, data["unlabel_json_path"], data["n_way"], data["q_sample"]) or []


def _is_used(key: str, verb: str, data: dict[str, Any]) -> bool:
    """Whether an override of `key` in a training changes the result of `verb`. `data` is the training's data_module."""
    group, _, name = key.partition(".")
    if group != "data_module":
        return group == "dataset" or group in OTHER_KEYS[verb]
    if name == "window_stride":
        clips: str = data["eval_clips" if verb == "evaluate" else "train_clips"]
        return clips == "windows"
    return name not in UNUSED_DATA_KEYS[verb]


def _hydra_value(value: Any) -> str:
    """A value as Hydra reads it: text in quotes if needed (the entrypoints accept "=" without), keys without quotes."""
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{_hydra_value(entry)}' for key, entry in value.items())}}}"
    if not isinstance(value, str):
        return json.dumps(value, separators=(",", ":"))
    if re.fullmatch(r"[\w./=+-]+", value, re.ASCII):
        return value
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def distillation_command(selected: dict[str, CheckpointInfo]) -> str | None:
    """Build the command that distills the selected teachers; None without an RGB teacher.

    Config, dataset and overrides are those of the RGB teacher.
    """
    teachers = [name for name in modality_names() if name in selected]
    if STUDENT_MODALITY not in teachers:
        return None
    subset = [f"trainer.teachers=[{','.join(teachers)}]"] if teachers != list(BUILTIN_MODALITIES) else []
    paths = ",".join(_hydra_value(str(selected[name].path)) for name in teachers)
    teacher = selected[STUDENT_MODALITY]
    arguments = config_arguments(_run_dir(teacher), "distill", teacher.path)
    return shlex.join(["mmdistill", "distill", *arguments, *subset, f"trainer.ckpt_path=[{paths}]"])


def _evaluation_dir(run_dir: Path) -> Path:
    """The newest run beside a distillation that evaluated one of its checkpoints, else the distillation."""
    reports = [path for path in run_dir.parent.glob(f"*/{RESULTS_FILE}") if (path.parent / ".hydra").is_dir()]
    for path in sorted(reports, key=lambda path: path.stat().st_mtime, reverse=True):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            if run_dir in Path(json.loads(path.read_bytes())["checkpoint"]).absolute().parents:
                return path.parent
    return run_dir


def evaluation_command_of_run(checkpoint: Path, run_dir: Path) -> str:
    """Build the command that evaluates a distilled checkpoint with the settings of the run in `run_dir`.

    It is quoted for the shell and for Hydra.
    """
    arguments = config_arguments(run_dir, "evaluate", checkpoint)
    return shlex.join(["mmdistill", "evaluate", *arguments, f"ckpt_path={_hydra_value(str(checkpoint))}"])


def evaluation_command(info: CheckpointInfo) -> str:
    """Build the command that evaluates a distilled checkpoint, with the settings of its last evaluation."""
    return evaluation_command_of_run(info.path, _evaluation_dir(_run_dir(info)))


def to_data(found: list[CheckpointInfo], selected: dict[str, CheckpointInfo], unreadable: list[str]) -> dict[str, Any]:
    """Build the data of ``--json``."""
    return {
        "checkpoints": [{**dataclasses.asdict(info), "path": str(info.path)} for info in found],
        "chosen": {name: str(info.path) for name, info in selected.items()},
        "ckpt_path": [str(selected[name].path) if name in selected else None for name in modality_names()],
        "distill": distillation_command(selected),
        "evaluate": evaluation_command(selected[DISTILLED]) if DISTILLED in selected else None,
        "unreadable": unreadable,
    }


def print_report(
    found: list[CheckpointInfo], selected: dict[str, CheckpointInfo], unreadable: list[str], best: bool
) -> None:
    """Print the tables, the ckpt_path list, and the commands that distill and evaluate."""
    which = "best" if best else "newest complete"
    for group in (*modality_names(), DISTILLED, UNKNOWN):
        members = [info for info in found if info.modality == group]
        if members:
            print(f"{group} ({len(members)})\n{HEADER}")
            print("\n".join(format_row(info) for info in members))
            print()
    if not found:
        print("No checkpoints found.\n")
    if any(name in selected for name in modality_names()):
        print(f"Teachers of the distillation ({which} of each modality), for trainer.ckpt_path in the config:\n")
        print(format_ckpt_path(selected) + "\n")
    if command := distillation_command(selected):
        print(f"Distill these teachers (set trainer.* keys, such as trainer.epochs, if needed):\n\n{command}\n")
    if DISTILLED in selected:
        command = evaluation_command(selected[DISTILLED])
        student = selected[DISTILLED].path
        missing = missing_evaluation_file(_evaluation_dir(_run_dir(selected[DISTILLED])), student)
        fix = "the video is the class" if "label=video" in command else "the evaluation needs a file with labels"
        note = "" if missing is None else f"; {missing} does not exist: {fix}"
        print(f"Evaluate the student ({which}{note}):\n\n{command}\n")
    for line in unreadable:
        print(f"unreadable: {line}", file=sys.stderr)


@report_errors("find-checkpoints")
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns 0 if checkpoints were found, 1 if none, 2 if the folder does not exist."""
    parser = make_parser("find-checkpoints", __doc__)
    parser.add_argument("directory", help="folder at any level above the runs")
    parser.add_argument("--best", action="store_true", help="select by lowest loss instead of by age")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    args = parser.parse_args(argv)
    unreadable: list[str] = []
    found = find_checkpoints(args.directory, unreadable=unreadable)
    selected = select_checkpoints(found, best=args.best)
    if args.json:
        print(json.dumps(to_data(found, selected, unreadable), indent=1, ensure_ascii=False))
    else:
        print_report(found, selected, unreadable, args.best)
    return 0 if found else 1
