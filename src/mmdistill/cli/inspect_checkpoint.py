"""Say what a checkpoint is: format, contents, architecture, and whether it is whole.

mmdistill inspect PATH [--json] [--full]
"""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from mmdistill.checkpoint.errors import CheckpointError
from mmdistill.checkpoint.inspect import inspect_checkpoint


def lines(report: dict[str, Any]) -> list[str]:
    """The report for people."""
    out = [f"{report['path']}  ({report['size'] / 1e6:.1f} MB)"]
    for key in ("format", "kind", "modality", "epoch", "step", "loss", "stage", "world_size"):
        if report.get(key) is not None:
            out.append(f"  {key:<12}{report[key]}")
    for name, part in report.get("parts", {}).items():
        out.append(f"  part        {name}: {part['tensors']} tensors, {part['parameters']:,} parameters")
    if report.get("dtypes"):
        out.append("  dtypes      " + ", ".join(f"{name} ({count})" for name, count in report["dtypes"].items()))
    for name, fields in report.get("geometry", {}).items():
        out.append(f"  geometry    {name}: " + ", ".join(f"{k}={v}" for k, v in fields.items()))
    out += [f"  note        {note}" for note in report.get("notes", [])]
    out += [f"  without     {line}" for line in report.get("missing", [])]
    out.append(f"  complete    {'yes' if report['complete'] else 'NO: ' + report['problem']}")
    return out


def main(argv: Sequence[str] | None = None) -> int:
    """Command line. 0 if the checkpoint is complete, 1 if it is not, 2 if nothing is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path")
    parser.add_argument("--json", action="store_true", help="print data instead of text")
    parser.add_argument(
        "--full",
        action="store_true",
        help="also compare the sha256 that manifests of older versions hold",
    )
    args = parser.parse_args(argv)
    try:
        report = inspect_checkpoint(args.path, full=args.full)
    except CheckpointError as error:
        print(error, file=sys.stderr)
        return 2
    print(json.dumps(report, indent=1, ensure_ascii=False) if args.json else "\n".join(lines(report)))
    return 0 if report["complete"] else 1
