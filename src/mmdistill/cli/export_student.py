"""Write the student of a distilled checkpoint alone, for use elsewhere.

mmdistill export last.ckpt --to hf            # a folder for transformers.VideoMAEModel
mmdistill export last.ckpt --to onnx --out student.onnx
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mmdistill.checkpoint.errors import CheckpointError
from mmdistill.checkpoint.export import FORMATS, export_student


def main(argv: Sequence[str] | None = None) -> int:
    """Command line. 0 if written, 2 if not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--to", required=True, choices=list(FORMATS))
    parser.add_argument("--out", help="where to write (default: ./student-hf, ./student.safetensors, ...)")
    parser.add_argument("--part", help="another encoder than the student, e.g. teacher_flow")
    parser.add_argument("--force", action="store_true", help="replace the target if it exists")
    args = parser.parse_args(argv)
    target = Path(args.out or (f"student{FORMATS[args.to]}" if FORMATS[args.to] else f"student-{args.to}"))
    try:
        written = export_student(args.checkpoint, target, to=args.to, part=args.part, force=args.force)
    except CheckpointError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"wrote {written}")
    return 0
