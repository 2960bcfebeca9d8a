"""Is the data whole? Read every frame, flow and skeleton of an annotation file, before training does.

    mmdistill check-data ANNOTATIONS --root data/tennis [--json report.json] [--write-clean clean.json]
    mmdistill check-data dataset=epic data_module.target_data_dir=data/EPIC-KITCHENS-55 --split eval

The first is for the tennis layout; without --root only the annotations are checked. The second takes annotation reader,
folders, file names and frame size from a dataset config, with overrides as for pretrain_main.py.

Exit status: 0 nothing is missing or wrong, 1 something is, 2 the check cannot be made. `--write-clean` writes the
usable rallies and events of an F3Set annotation file that has mistakes.
"""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from mmdistill.builders import load_rallies, open_readers, resolve_annotation_path
from mmdistill.config import ConfigError, DataModuleConfig, PretrainConfig, explain
from mmdistill.config.compose import load_config
from mmdistill.config.overrides import is_override
from mmdistill.data.annotations.base import SHOWN_PROBLEMS, Problem, Rally
from mmdistill.data.annotations.f3set import read_f3set, to_json
from mmdistill.data.readers.base import Reader
from mmdistill.files import atomic_write_bytes
from mmdistill.modalities import modality_names
from mmdistill.prepare.coverage import RallyCoverage, check_all


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, check, report."""
    options = _arguments(argv)
    console = Console()
    readers: dict[str, Reader] = {}
    try:
        data = _data(options)
        path = options.annotations or resolve_annotation_path(data, training=options.split == "unlabel")
        rallies, problems = _rallies(data, path)
        if options.write_clean and data.annotations != "f3set":
            raise ConfigError(f"--write-clean writes F3Set JSON; {path} is read as annotations={data.annotations}")
        if options.root is not None or options.overrides:
            readers = open_readers(data, tuple(options.modalities or data.modalities))
    except (HydraException, OmegaConfBaseException, ValueError, OSError) as error:
        print(f"check_data: {explain(error, PretrainConfig)}", file=sys.stderr)
        return 2
    _show_annotations(console, path, rallies, problems)
    if options.write_clean:
        atomic_write_bytes(options.write_clean, (json.dumps(to_json(rallies)) + "\n").encode())
        console.print(f"the usable part is in {options.write_clean}", markup=False, soft_wrap=True)
    report: dict[str, Any] = {"annotation_problems": [str(p) for p in problems]}
    if readers:
        with Progress(console=Console(stderr=True)) as bar:
            task = bar.add_task("rallies", total=len(rallies))

            def progress(_: RallyCoverage) -> None:
                bar.advance(task)

            report |= check_all(rallies, readers, workers=options.workers, every=options.every, progress=progress)
        _show_coverage(console, report)
    if options.json:
        atomic_write_bytes(options.json, (json.dumps(report, indent=1) + "\n").encode())
    return 0 if report.get("complete", True) and not problems else 1


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("what", nargs="+", metavar="ANNOTATIONS | KEY=VALUE", help="a file, or overrides, or both")
    parser.add_argument(
        "--split", choices=["unlabel", "eval"], default="unlabel", help="which annotation file of the dataset config"
    )
    parser.add_argument("--root", type=Path, help="data folder (data_module.target_data_dir)")
    parser.add_argument("--modalities", nargs="+", choices=modality_names(), help="default: the dataset's")
    parser.add_argument("--frames-dir", help="under the root")
    parser.add_argument("--flow-dir", help="under the root")
    parser.add_argument("--skeleton-dir", help="under the root")
    parser.add_argument("--frame-size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="of the stored frames")
    parser.add_argument("--every", type=int, default=1, help="open only each n-th file; absent ones are always counted")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path, help="write the report here")
    parser.add_argument("--write-clean", type=Path, help="write the usable rallies and events here")
    options = parser.parse_intermixed_args(argv)
    options.overrides = [w for w in options.what if is_override(w) and not Path(w).exists()]
    files = [Path(w) for w in options.what if w not in options.overrides]
    if len(files) > 1:
        parser.error(f"one annotation file at a time: {', '.join(map(str, files))}")
    options.annotations = files[0] if files else None
    return options


def _data(options: argparse.Namespace) -> DataModuleConfig:
    """The dataset config, and the options in the places of its keys. Crop and clips play no role here."""
    chosen = any(override.startswith("dataset=") for override in options.overrides)
    overrides = [*([] if chosen else ["dataset=tennis"]), "modality=rgb", *options.overrides]
    data = load_config(PretrainConfig, "config_pretrain", overrides).data_module
    given = {key: getattr(options, key) for key in ("frames_dir", "flow_dir", "skeleton_dir", "frame_size")}
    given["target_data_dir"] = str(options.root) if options.root is not None else None
    return dataclasses.replace(data, **{key: value for key, value in given.items() if value is not None})


def _rallies(data: DataModuleConfig, path: Path) -> tuple[list[Rally], list[Problem]]:
    """The rallies; what is wrong with an F3Set file in full, where other readers stop at the first mistake."""
    return read_f3set(path) if data.annotations == "f3set" else (load_rallies(data, path), [])


def _show_annotations(console: Console, path: Path, rallies: list[Rally], problems: list[Problem]) -> None:
    events = [event for rally in rallies for event in rally.events]
    labels = len({event.label for event in events})
    console.print(
        f"{path}: {len(rallies)} rallies, {len(events)} events, {labels} labels", markup=False, soft_wrap=True
    )
    for problem in problems[:SHOWN_PROBLEMS]:
        console.print(f"  {problem}", markup=False, soft_wrap=True)
    if len(problems) > SHOWN_PROBLEMS:
        console.print(f"  and {len(problems) - SHOWN_PROBLEMS} more problems")


def _show_coverage(console: Console, report: dict[str, Any]) -> None:
    table = Table("modality", "frames", "absent", "unreadable", "rallies", "without any", "longer than annotated")
    for name, counts in report["modalities"].items():
        keys = ("frames", "absent", "unreadable", "rallies", "rallies_without", "rallies_of_another_length")
        table.add_row(name, *(str(counts[key]) for key in keys))
    console.print(table)
    for who, counts in report["players"].items():
        console.print(f"{who} player: {counts['frames']} frames with a skeleton ({100 * counts['share']:.1f} %)")
    for message in report["messages"][:SHOWN_PROBLEMS]:
        console.print(f"  {message}", markup=False, soft_wrap=True)
    if len(report["messages"]) > SHOWN_PROBLEMS:
        console.print(f"  and {len(report['messages']) - SHOWN_PROBLEMS} more; --json FILE lists all")
    console.print("complete" if report["complete"] else f"gaps in {len(report['rallies_with_gaps'])} rallies")
