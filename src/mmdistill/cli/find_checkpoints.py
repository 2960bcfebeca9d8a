"""List the checkpoints below a folder; print the ckpt_path list and the evaluation command that use them.

mmdistill find-checkpoints output
mmdistill find-checkpoints output --best --json
"""

import dataclasses
import json
import re
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from mmdistill.checkpoint.find import DISTILLED, UNKNOWN, CheckpointInfo, find_checkpoints, select_checkpoints
from mmdistill.cli.parser import make_parser, report_errors
from mmdistill.config.compose import configs_dir
from mmdistill.modalities import STUDENT_MODALITY, modality_names


def format_size(num_bytes: int) -> str:
    """Format a size with a unit."""
    value = float(num_bytes)
    for unit in ("B", "KB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit in ("B", "KB") else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def format_row(info: CheckpointInfo) -> str:
    """Format a checkpoint as one line."""
    epoch = "-" if info.epoch is None else str(info.epoch)
    loss = "-" if info.loss is None else f"{info.loss:.4f}"
    modified = time.strftime("%Y-%m-%d %H:%M", time.localtime(info.modified))
    state = "complete" if info.complete else f"INCOMPLETE: {info.problem}"
    return f"  {info.format:<10}{epoch:>6}{loss:>10}{format_size(info.size):>10}  {modified}  {info.path}  {state}"


def format_ckpt_path(selected: dict[str, CheckpointInfo]) -> str:
    """Format the YAML list for trainer.ckpt_path, in the order rgb, flow, skeleton."""
    lines = []
    for name in modality_names():
        if name in selected:
            text = json.dumps(str(selected[name].path), ensure_ascii=False)
            lines.append(f"  {text},  # {name}, {selected[name].format}")
        else:
            lines.append(f"  ???,  # {name}: no complete checkpoint found; pretrain it with modality={name}")
    found = [name for name in modality_names() if name in selected]
    if STUDENT_MODALITY in found and len(found) < len(modality_names()):
        hint = f"# to distill from these only: remove the lines with ???, set trainer.teachers=[{','.join(found)}]"
        return "\n".join(["ckpt_path: [", *lines, "]", hint])
    return "\n".join(["ckpt_path: [", *lines, "]"])


def config_arguments(run_dir: Path) -> list[str]:
    """Arguments that select the config and the dataset of a run, from the ``.hydra`` folder that the run wrote.

    Without that folder: the main config that has the run's name, if there is one.
    """
    try:
        hydra = yaml.safe_load((run_dir / ".hydra" / "hydra.yaml").read_text())["hydra"]
        names = {"main": "--config-path", "command-line": "--config-dir"}
        sources = [
            (names[s["provider"]], s["path"]) for s in hydra["runtime"]["config_sources"] if s["provider"] in names
        ]
        folders = [f"{name}={path}" for name, path in sources if Path(path).is_dir() and path != str(configs_dir())]
        overrides = [o for o in hydra["overrides"]["task"] if o.startswith(("dataset=", "data_module."))]
        if not any(override.startswith("dataset=") for override in overrides):
            overrides.insert(0, f"dataset={hydra['runtime']['choices']['dataset']}")
        return [f"--config-name={hydra['job']['config_name']}", *folders, *overrides]
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        name = f"config_{run_dir.name}"
        is_config = run_dir.name != "mmdistill" and (configs_dir() / f"{name}.yaml").is_file()
        return [f"--config-name={name}"] if is_config else []


def evaluation_command(info: CheckpointInfo) -> str:
    """Build the command that evaluates a distilled checkpoint, quoted for the shell and for Hydra."""
    words = ["mmdistill", "evaluate", *config_arguments(info.path.parent.parent)]
    value = str(info.path)
    if not re.fullmatch(r"[\w./=+-]+", value, re.ASCII):  # Hydra needs quotes; the entrypoints accept "=" without
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        value = f'"{escaped}"'
    words.append(f"ckpt_path={value}")
    return " ".join(shlex.quote(word) for word in words)


def to_data(found: list[CheckpointInfo], selected: dict[str, CheckpointInfo], unreadable: list[str]) -> dict[str, Any]:
    """Build the data of ``--json``."""
    return {
        "checkpoints": [{**dataclasses.asdict(info), "path": str(info.path)} for info in found],
        "chosen": {name: str(info.path) for name, info in selected.items()},
        "ckpt_path": [str(selected[name].path) if name in selected else None for name in modality_names()],
        "evaluate": evaluation_command(selected[DISTILLED]) if DISTILLED in selected else None,
        "unreadable": unreadable,
    }


def print_report(
    found: list[CheckpointInfo], selected: dict[str, CheckpointInfo], unreadable: list[str], best: bool
) -> None:
    """Print the tables, the ckpt_path list and the evaluation command."""
    which = "best" if best else "newest complete"
    for group in (*modality_names(), DISTILLED, UNKNOWN):
        members = [info for info in found if info.modality == group]
        if members:
            print(f"{group} ({len(members)})\n  {'format':<10}{'epoch':>6}{'loss':>10}{'size':>10}  saved")
            print("\n".join(format_row(info) for info in members))
            print()
    if not found:
        print("No checkpoints found.\n")
    if any(name in selected for name in modality_names()):
        print(f"Teachers of the distillation ({which} of each modality), for trainer.ckpt_path in the config:\n")
        print(format_ckpt_path(selected) + "\n")
    if DISTILLED in selected:
        print(f"Evaluate the student ({which}):\n\n{evaluation_command(selected[DISTILLED])}\n")
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
