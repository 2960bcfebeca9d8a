"""Is the data whole? Read every frame, flow and skeleton of an annotation file, before training does.

    python scripts/check_data.py ANNOTATIONS --root data/tennis [--json report.json] [--write-clean clean.json]

Exit status: 0 nothing is missing or wrong, 1 something is, 2 the check cannot be made. `--write-clean` writes the
usable rallies and events of an annotation file that has mistakes.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from mmdistill.data.annotations import SHOWN_PROBLEMS, AnnotationError, Problem, Rally, read_f3set, to_json
from mmdistill.data.atomic import write_whole
from mmdistill.data.readers import FlowReader, Reader, RgbReader, SkeletonReader
from mmdistill.prepare.coverage import RallyCoverage, check_all


def main() -> int:
    """Parse, check, report."""
    options = _arguments()
    console = Console()
    try:
        rallies, problems = read_f3set(options.annotations)
    except (AnnotationError, OSError) as error:
        print(f"check_data: {error}", file=sys.stderr)
        return 2
    _show_annotations(console, options.annotations, rallies, problems)
    if options.write_clean:
        write_whole(options.write_clean, (json.dumps(to_json(rallies)) + "\n").encode())
        console.print(f"the usable part is in {options.write_clean}", markup=False, soft_wrap=True)
    report: dict[str, Any] = {"annotation_problems": [str(p) for p in problems]}
    if options.root is not None:
        readers = _readers(options)
        with Progress(console=Console(stderr=True)) as bar:
            task = bar.add_task("rallies", total=len(rallies))

            def progress(_: RallyCoverage) -> None:
                bar.advance(task)

            report |= check_all(rallies, readers, workers=options.workers, every=options.every, progress=progress)
        _show_coverage(console, report)
    if options.json:
        write_whole(options.json, (json.dumps(report, indent=1) + "\n").encode())
    return 0 if report.get("complete", True) and not problems else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("annotations", type=Path, help="F3Set JSON")
    parser.add_argument("--root", type=Path, help="data folder; without it only the annotations are checked")
    parser.add_argument(
        "--modalities", nargs="+", choices=["rgb", "flow", "skeleton"], default=["rgb", "flow", "skeleton"]
    )
    parser.add_argument("--frames-dir", default="vid_frames_224", help="under the root")
    parser.add_argument("--flow-dir", default="tennis_flows", help="under the root")
    parser.add_argument("--skeleton-dir", default="skeletons/f3set-tennis", help="under the root")
    parser.add_argument("--frame-size", type=int, nargs=2, default=[224, 398], metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--every", type=int, default=1, help="open only each n-th file; absent ones are always counted")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path, help="write the report here")
    parser.add_argument("--write-clean", type=Path, help="write the usable rallies and events here")
    return parser.parse_args()


def _readers(options: argparse.Namespace) -> dict[str, Reader]:
    size = (options.frame_size[0], options.frame_size[1])
    makers: dict[str, Reader] = {
        "rgb": RgbReader(options.root / options.frames_dir, frame_size=size),
        "flow": FlowReader(options.root / options.flow_dir, frame_size=size),
        "skeleton": SkeletonReader(options.root / options.skeleton_dir, frame_size=size),
    }
    return {name: makers[name] for name in options.modalities}


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


if __name__ == "__main__":
    sys.exit(main())
