"""List the checkpoints below a folder and print what the next command needs.

mmdistill find-checkpoints output
mmdistill find-checkpoints output --best --json
"""

import argparse
import dataclasses
import json
import shlex
import sys
import time
from collections.abc import Sequence
from typing import Any

from mmdistill.checkpoint.errors import CheckpointError
from mmdistill.checkpoint.find import DISTILLED, UNKNOWN, CheckpointInfo, choose, find_checkpoints
from mmdistill.config.compose import CONFIGS
from mmdistill.modalities import modality_names


def size(count: int) -> str:
    """Bytes for people."""
    value = float(count)
    for unit in ("B", "KB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit in ("B", "KB") else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def row(info: CheckpointInfo) -> str:
    """One checkpoint in one line."""
    epoch = "-" if info.epoch is None else str(info.epoch)
    loss = "-" if info.loss is None else f"{info.loss:.4f}"
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(info.modified))
    state = "complete" if info.complete else f"INCOMPLETE: {info.problem}"
    return f"  {info.format:<10}{epoch:>6}{loss:>10}{size(info.size):>10}  {when}  {info.path}  {state}"


def teachers_block(chosen: dict[str, CheckpointInfo]) -> str:
    """The list that trainer.ckpt_path takes, in the order rgb, flow, skeleton."""
    lines = []
    for name in modality_names():
        if name in chosen:
            text = json.dumps(str(chosen[name].path), ensure_ascii=False)
            lines.append(f"  {text},  # {name}, {chosen[name].format}")
        else:
            lines.append(f"  ???,  # {name}: no complete checkpoint found; pretrain it with modality={name}")
    return "\n".join(["ckpt_path: [", *lines, "]"])


def evaluation_command(info: CheckpointInfo) -> str:
    """The command that evaluates a distilled checkpoint, quoted for the shell and for Hydra."""
    words = ["python", "lit_main_mmdistill.py"]
    run = info.path.parent.parent.name
    if run != "mmdistill" and (CONFIGS / f"config_{run}.yaml").is_file():
        words.append(f"--config-name=config_{run}")
    escaped = str(info.path).replace("\\", "\\\\").replace('"', '\\"')
    words += ["train=False", "test=True", f'ckpt_path="{escaped}"']
    return " ".join(shlex.quote(word) for word in words)


def as_data(found: list[CheckpointInfo], chosen: dict[str, CheckpointInfo], unreadable: list[str]) -> dict[str, Any]:
    """The same as the text, for programs."""
    return {
        "checkpoints": [{**dataclasses.asdict(info), "path": str(info.path)} for info in found],
        "chosen": {name: str(info.path) for name, info in chosen.items()},
        "ckpt_path": [str(chosen[name].path) if name in chosen else None for name in modality_names()],
        "evaluate": evaluation_command(chosen[DISTILLED]) if DISTILLED in chosen else None,
        "unreadable": unreadable,
    }


def show(found: list[CheckpointInfo], chosen: dict[str, CheckpointInfo], unreadable: list[str], best: bool) -> None:
    """Print the tables and the two blocks."""
    which = "best" if best else "newest complete"
    for group in (*modality_names(), DISTILLED, UNKNOWN):
        members = [info for info in found if info.modality == group]
        if members:
            print(f"{group} ({len(members)})\n  {'format':<10}{'epoch':>6}{'loss':>10}{'size':>10}  saved")
            print("\n".join(row(info) for info in members))
            print()
    if not found:
        print("No checkpoints found.\n")
    if any(name in chosen for name in modality_names()):
        print(f"Teachers of the distillation ({which} of each modality), for trainer.ckpt_path in the configuration:\n")
        print(teachers_block(chosen) + "\n")
    if DISTILLED in chosen:
        print(f"Evaluate the student ({which}):\n\n{evaluation_command(chosen[DISTILLED])}\n")
    for line in unreadable:
        print(f"unreadable: {line}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line. 0 if checkpoints were found, 1 if none, 2 if the folder cannot be searched."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", help="any folder above the runs")
    parser.add_argument("--best", action="store_true", help="choose by lowest loss instead of by age")
    parser.add_argument("--json", action="store_true", help="print data instead of text")
    args = parser.parse_args(argv)
    unreadable: list[str] = []
    try:
        found = find_checkpoints(args.directory, unreadable=unreadable)
    except CheckpointError as error:
        print(error, file=sys.stderr)
        return 2
    chosen = choose(found, best=args.best)
    if args.json:
        print(json.dumps(as_data(found, chosen, unreadable), indent=1, ensure_ascii=False))
    else:
        show(found, chosen, unreadable, args.best)
    return 0 if found else 1
