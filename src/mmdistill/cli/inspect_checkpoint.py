"""Show the format, content and architecture of a checkpoint, and whether it is complete.

mmdistill inspect output/DATE/TIME/NAME/checkpoints/last.ckpt
"""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmdistill.checkpoint.errors import CheckpointError, CorruptCheckpointError
from mmdistill.checkpoint.find import find_checkpoints
from mmdistill.checkpoint.formats.names import FILE_SUFFIXES, LATEST, MANIFEST, META
from mmdistill.checkpoint.locate import locate
from mmdistill.cli.parser import make_parser, report_errors
from mmdistill.errors import format_count


def format_report(report: dict[str, Any]) -> list[str]:
    """Format the report of `inspect_checkpoint` as lines of text."""
    out = [f"{report['path']}  ({report['size'] / 1e6:.1f} MB)"]
    for key in ("format", "kind", "modality", "epoch", "step", "loss", "stage", "world_size"):
        if report.get(key) is not None:
            out.append(f"  {key:<14}{report[key]:.4f}" if key == "loss" else f"  {key:<14}{report[key]}")
    for name, count in report.get("components", {}).items():
        out.append(
            f"  component     {name}: {format_count(count['tensors'], 'tensor')}, {count['parameters']:,} parameters"
        )
    if report.get("dtypes"):
        out.append("  dtypes        " + ", ".join(f"{name} ({count})" for name, count in report["dtypes"].items()))
    for name, fields in report.get("architecture", {}).items():
        out.append(f"  architecture  {name}: " + ", ".join(f"{k}={v}" for k, v in fields.items()))
    for source in report.get("labeled_sources", []):
        out.append(
            f"  labels        of {format_count(source['classes'], 'class')} of the source {source['dataset']} were used"
        )
    out += [f"  note          {note}" for note in report.get("notes", [])]
    out += [f"  missing       {line}" for line in report.get("missing", [])]
    out.append(f"  complete      {'yes' if report['complete'] else 'NO: ' + report['problem']}")
    return out


def describe_folder(path: str) -> str | None:
    """What to inspect instead, if `path` is a folder of runs or checkpoints; None if it is not."""
    folder = Path(path).expanduser()
    if not folder.is_dir() or is_checkpoint(folder):
        return None
    found = find_checkpoints(folder)
    complete = [info for info in found if info.complete]
    to_list = f"to list checkpoints: mmdistill find-checkpoints {shlex.quote(path)}"
    if any((folder / name).exists() for name in ("checkpoints", "run.json")):
        if not complete:
            return f"{path}: a run folder without a complete checkpoint; {to_list}"
        newest = shlex.quote(str(complete[0].path))
        return f"{path}: a run folder, not a checkpoint; its newest checkpoint: mmdistill inspect {newest}"
    runs = {info.path.parents[1] for info in found if info.path.parent.name == "checkpoints"}
    of_runs = f" of {format_count(len(runs), 'run')}" if runs else ""
    return f"{path}: a folder with {format_count(len(found), 'checkpoint')}{of_runs}, not a checkpoint; {to_list}"


def is_checkpoint(folder: Path) -> bool:
    """Whether `folder` is a checkpoint, possibly a damaged one."""
    try:
        locate(folder)
    except CheckpointError as error:
        return isinstance(error, CorruptCheckpointError)
    return True


def _has_unknown_name(path: str) -> bool:
    """Whether `path` is a file whose name is not that of a checkpoint file."""
    file = Path(path)
    return file.is_file() and file.suffix not in FILE_SUFFIXES and file.name not in (LATEST, META, MANIFEST)


@report_errors("inspect")
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns 0 if the checkpoint is complete, 1 if it is not, 2 if the path is none."""
    parser = make_parser("inspect", __doc__)
    parser.add_argument("path", help="checkpoint file or directory")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.add_argument(
        "--full",
        action="store_true",
        help="also compare the sha256 of archives in manifests of older versions",
    )
    args = parser.parse_args(argv)
    if message := describe_folder(args.path):
        raise CheckpointError(message)
    from mmdistill.checkpoint.inspect import inspect_checkpoint  # imports torch, which --help must not

    report = inspect_checkpoint(args.path, full=args.full)
    if "format" not in report and _has_unknown_name(args.path):
        raise CheckpointError(report["problem"])
    print(json.dumps(report, indent=1, ensure_ascii=False) if args.json else "\n".join(format_report(report)))
    return 0 if report["complete"] else 1
