"""Check that the data of an annotation file is complete: read every frame, flow and skeleton file.

    mmdistill check-data data/tennis/val.json --root data/tennis --json report.json --write-clean clean.json
    mmdistill check-data dataset=epic data_module.target_data_dir=data/EPIC-KITCHENS-55 --split eval

The first form is for the tennis layout. Without --root it checks only the annotations. The second form reads annotation
format, folders, file names and frame size from a dataset config and accepts the overrides of `mmdistill pretrain`.

Exit status: 0 if the data is complete, 1 if there are gaps or errors, 2 if the check cannot run. `--write-clean` writes
the valid rallies and events of an annotation file of any format as F3Set JSON. It checks the annotations only: the
frame, flow and skeleton files of the remaining rallies must still exist. With `--present-only` it writes only rallies
whose files all exist and can be read.
"""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mmdistill.cli.parser import add_config_dir, make_parser, report_errors
from mmdistill.config import ConfigError, DataModuleConfig, PretrainConfig, modality_setting
from mmdistill.config.compose import load_config
from mmdistill.config.overrides import is_override
from mmdistill.console import progress
from mmdistill.data.annotations.base import MAX_PROBLEMS_SHOWN, InvalidEntriesError, Rally, format_rally_counts
from mmdistill.data.annotations.f3set import to_json
from mmdistill.data.cores import available_cores
from mmdistill.data.readers.base import Reader
from mmdistill.errors import format_count, format_first
from mmdistill.files import atomic_write_bytes
from mmdistill.modalities import modality_names
from mmdistill.prepare.coverage import check_all

_DIR_OPTIONS = {"rgb": "--frames-dir", "flow": "--flow-dir", "skeleton": "--skeleton-dir"}
COVERAGE_ROWS = (  # key of the report, title of the row
    ("expected_frames", "expected frames"),
    ("missing_frames", "missing frames"),
    ("unreadable_frames", "unreadable frames"),
    ("wrong_size_frames", "frames of a wrong size"),
    ("rallies", "rallies"),
    ("rallies_without_files", "rallies without any file"),
    ("rallies_longer_than_annotated", "rallies longer than annotated"),
)


@report_errors("check-data", ValueError)
def main(argv: Sequence[str] | None = None) -> int:
    """Check the data and print a report. Returns the exit status."""
    options = _arguments(argv)
    if options.annotations is not None and options.annotations.is_dir():
        found = sorted(str(path) for path in options.annotations.glob("*.json") if path.name != "provenance.json")
        files = f"; it contains {format_first(found, MAX_PROBLEMS_SHOWN)}" if found else ""
        raise ConfigError(f"{options.annotations} is a folder; give an annotation file{files}")
    from mmdistill.builders import (  # imports torch, which --help must not
        load_rallies,
        open_readers,
        resolve_annotation_path,
    )

    readers: dict[str, Reader] = {}
    data = _data_config(options)
    path = options.annotations or resolve_annotation_path(data, training=options.split == "unlabel")
    problems: list[str] = []
    try:
        rallies = load_rallies(data, path)
    except InvalidEntriesError as error:
        if not error.rallies:
            _write_report(options.json, {"annotation_problems": error.problems})
            raise
        rallies, problems = error.rallies, error.problems
    _print_annotations(path, rallies, problems)
    report: dict[str, Any] = {"annotation_problems": problems}
    names = tuple(options.modalities or data.modalities)
    if options.write_clean and not options.present_only:
        folders = ", ".join(f"{modality_setting(data, name, 'dir')} ({name})" for name in names)
        _write_clean(options.write_clean, rallies, f"the training also needs their files in {folders}", data)
    if _checks_files(options, data):
        _check_folders(options, data, names)
        readers = open_readers(data, names)
    if readers:
        with progress("rallies", len(rallies)) as advance:
            report |= check_all(
                rallies, readers, workers=options.workers, every=options.every, progress=lambda _: advance(1)
            )
        _print_coverage(report)
        if any(counts["wrong_size_frames"] for counts in report["modalities"].values()):
            expected = " x ".join(map(str, data.frame_size))
            demo = "" if options.overrides else ", or add dataset=demo for the demo data"
            print(f"the expected size is {expected} px: set --frame-size to the size of the stored frames{demo}")
    else:
        absent = f"; there is no {data.target_data_dir}" if options.overrides else ""
        add = "add --root DIR to check the frame, flow and skeleton files in DIR"
        print(f"only the annotations were checked{absent}; {add}")
    if options.present_only:
        kept = [rally for rally in rallies if not _lacks_files(report["rallies_with_gaps"].get(rally.video, {}))]
        _write_clean(options.write_clean, kept, f"{len(rallies) - len(kept)} without all files excluded", data)
    _write_report(options.json, report)
    return 0 if report.get("complete", True) and not problems else 1


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser("check-data", __doc__)
    parser.add_argument(
        "what",
        nargs="+",
        metavar="ANNOTATIONS | KEY=VALUE",
        help="annotation file, overrides of a dataset config, or both",
    )
    parser.add_argument(
        "--split",
        choices=["unlabel", "eval"],
        default="unlabel",
        help="annotation file of the dataset config: training or evaluation",
    )
    add_config_dir(parser)
    parser.add_argument(
        "--root",
        type=Path,
        help="data folder, which contains the folders of the modalities (default: that of KEY=VALUE; without KEY=VALUE "
        "only the annotations are checked)",
    )
    parser.add_argument(
        "--modalities", nargs="+", choices=modality_names(), help="modalities to check (default: all of the dataset)"
    )
    for option, files in (("frames", "frames"), ("flow", "flow files"), ("skeleton", "skeleton files")):
        text = f"folder of the {files}, relative to the data folder (default: that of the dataset config)"
        parser.add_argument(f"--{option}-dir", help=text)
    parser.add_argument(
        "--frame-size",
        type=int,
        nargs=2,
        metavar=("HEIGHT", "WIDTH"),
        help="size of the stored frames in px (default: that of the dataset config)",
    )
    parser.add_argument(
        "--every", type=int, default=1, help="open only every n-th file; missing files are always counted"
    )
    parser.add_argument(
        "--workers", type=int, default=available_cores(), help="number of processes (default: all cores of this job)"
    )
    parser.add_argument("--json", type=Path, help="file for the full report (default: none)")
    parser.add_argument("--write-clean", type=Path, help="file for the valid rallies and events (default: none)")
    parser.add_argument(
        "--present-only", action="store_true", help="with --write-clean: only rallies whose files exist and can be read"
    )
    options = parser.parse_intermixed_args(argv)
    options.overrides = [w for w in options.what if is_override(w) and not Path(w).exists()]
    paths = [Path(w) for w in options.what if w not in options.overrides]
    if len(paths) > 1:
        parser.error(f"give one annotation file at a time, got {', '.join(map(str, paths))}")
    options.annotations = paths[0] if paths else None
    if options.present_only and not (options.write_clean and (options.root or options.overrides)):
        parser.error("--present-only needs --write-clean FILE, and --root DIR or the overrides of a dataset config")
    return options


def _data_config(options: argparse.Namespace) -> DataModuleConfig:
    """The dataset config with the values of the command-line options. Crop and clip settings are not used."""
    chosen = any(override.startswith("dataset=") for override in options.overrides)
    overrides = [*([] if chosen else ["dataset=tennis"]), "modality=rgb", *options.overrides]
    data = load_config(PretrainConfig, "config_pretrain", overrides, config_dir=options.config_dir).data_module
    given = {key: getattr(options, key) for key in ("frames_dir", "flow_dir", "skeleton_dir", "frame_size")}
    given["target_data_dir"] = str(options.root) if options.root is not None else None
    return dataclasses.replace(data, **{key: value for key, value in given.items() if value is not None})


def _checks_files(options: argparse.Namespace, data: DataModuleConfig) -> bool:
    """Whether there are files to check besides the annotation file.

    A given annotation file is checked alone if the dataset's default folder does not exist.
    """
    is_default = not any("dir" in override.partition("=")[0] for override in options.overrides)
    if options.root is None and options.annotations and is_default and not options.present_only:
        return bool(options.overrides) and Path(data.target_data_dir).exists()
    return True


def _check_folders(options: argparse.Namespace, data: DataModuleConfig, names: Sequence[str]) -> None:
    """Raise `ConfigError` if a folder that the options select does not exist. It names the option and the fix."""
    if options.root is None:
        return
    if not options.root.is_dir():
        raise ConfigError(f"--root {options.root}: there is no such folder; give the folder that contains the data")
    folders = {name: modality_setting(data, name, "dir") for name in names}
    absent = [name for name, folder in folders.items() if folder and not (options.root / folder).exists()]
    if absent:
        found = [name for name in names if name not in absent]
        listed = ", ".join(f"{folders[name]} ({name})" for name in absent)
        only = f", or check only the others with --modalities {' '.join(found)}" if found else ""
        raise ConfigError(
            f"--root {options.root}: it contains no {listed}; give the folder that contains the data, or set "
            f"{' or '.join(_DIR_OPTIONS.get(name, f'data_module.modalities.{name}.dir') for name in absent)}{only}"
        )


def _write_clean(path: Path, rallies: list[Rally], note: str, data: DataModuleConfig) -> None:
    """Write rallies as F3Set JSON. Raises `ConfigError` if there is none."""
    if not rallies:
        raise ConfigError(f"--write-clean {path}: no rally is left; {note}")
    atomic_write_bytes(path, (json.dumps(to_json(rallies)) + "\n").encode())
    f3set = "" if data.annotations == "f3set" else "; read it with data_module.annotations=f3set"
    print(f"{path}: {format_count(len(rallies), 'valid rally')}; {note}{f3set}")


def _write_report(path: Path | None, report: dict[str, Any]) -> None:
    """Write the report as JSON, if a file is given."""
    if path is not None:
        atomic_write_bytes(path, (json.dumps(report, indent=1) + "\n").encode())


def _lacks_files(gaps: dict[str, dict[str, Any]]) -> bool:
    """Whether a file of a rally is missing or cannot be used, in any modality."""
    keys = ("missing_frames", "unreadable_frames", "wrong_size_frames")
    return any(gap.get(key) for gap in gaps.values() for key in keys)


def _print_annotations(path: Path, rallies: list[Rally], problems: list[str]) -> None:
    print(f"{path}: {format_rally_counts(rallies)}")
    _print_problems(problems, hint="; --json FILE writes all")


def _print_problems(problems: Sequence[str], noun: str = "problem", hint: str = "") -> None:
    """Print the first problems, and the number of the others with a hint where to find them."""
    for problem in problems[:MAX_PROBLEMS_SHOWN]:
        print(f"  {problem}")
    if len(problems) > MAX_PROBLEMS_SHOWN:
        print(f"  and {format_count(len(problems) - MAX_PROBLEMS_SHOWN, f'more {noun}')}{hint}")


def _print_coverage(report: dict[str, Any]) -> None:
    table = Table("", *report["modalities"])
    for key, title in COVERAGE_ROWS:
        table.add_row(title, *(str(counts[key]) for counts in report["modalities"].values()))
    Console().print(table)
    for player, counts in report["players"].items():
        found = (
            f"{counts['found_frames']} of {format_count(counts['expected_frames'], 'frame')} "
            f"({100 * counts['share']:.1f} %)"
        )
        print(f"{player} player found in {found}")
    _print_problems(report["messages"], "message", " about the first files of each rally; --json FILE writes them")
    gaps = len(report["rallies_with_gaps"])
    print("complete" if report["complete"] else f"gaps in {gaps} of {format_count(report['rallies'], 'rally')}")
