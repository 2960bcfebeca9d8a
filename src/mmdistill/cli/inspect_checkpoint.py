"""Show the format, content and architecture of a checkpoint, and whether it is complete.

mmdistill inspect PATH [--json] [--full]
"""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmdistill.checkpoint.errors import CheckpointError
from mmdistill.checkpoint.find import find_checkpoints
from mmdistill.cli.parser import make_parser, report_errors
from mmdistill.errors import format_count


def format_report(report: dict[str, Any]) -> list[str]:
    """Format the report of `inspect_checkpoint` as lines of text."""
    out = [f"{report['path']}  ({report['size'] / 1e6:.1f} MB)"]
    for key in ("format", "kind", "modality", "epoch", "step", "loss", "stage", "world_size"):
        if report.get(key) is not None:
            out.append(f"  {key:<14}{report[key]}")
    for name, count in report.get("components", {}).items():
        out.append(
            f"  component     {name}: {format_count(count['tensors'], 'tensor')}, {count['parameters']:,} parameters"
        )
    if report.get("dtypes"):
        out.append("  dtypes        " + ", ".join(f"{name} ({count})" for name, count in report["dtypes"].items()))
    for name, fields in report.get("architecture", {}).items():
        out.append(f"  architecture  {name}: " + ", ".join(f"{k}={v}" for k, v in fields.items()))
    out += [f"  note          {note}" for note in report.get("notes", [])]
    out += [f"  missing       {line}" for line in report.get("missing", [])]
    out.append(f"  complete      {'yes' if report['complete'] else 'NO: ' + report['problem']}")
    return out


def describe_run_folder(path: str) -> str | None:
    """What to inspect instead, if `path` is the folder of a run; None if it is not."""
    folder = Path(path).expanduser()
    if not folder.is_dir() or not any((folder / name).exists() for name in ("checkpoints", "run.json")):
        return None
    found = [info for info in find_checkpoints(folder) if info.complete]
    if not found:
        return f"{path}: a run folder without a complete checkpoint; `mmdistill find-checkpoints` lists checkpoints"
    return (
        f"{path}: a run folder, not a checkpoint; its newest checkpoint: "
        f"mmdistill inspect {shlex.quote(str(found[0].path))}"
    )


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
    if message := describe_run_folder(args.path):
        raise CheckpointError(message)
    from mmdistill.checkpoint.inspect import inspect_checkpoint  # imports torch, which --help must not

    report = inspect_checkpoint(args.path, full=args.full)
    print(json.dumps(report, indent=1, ensure_ascii=False) if args.json else "\n".join(format_report(report)))
    return 0 if report["complete"] else 1
