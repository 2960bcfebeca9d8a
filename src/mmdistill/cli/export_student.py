"""Export the student of a distilled checkpoint for use without this project.

mmdistill export last.ckpt --to hf            # a folder for transformers.VideoMAEModel
mmdistill export last.ckpt --to onnx --output student.onnx
"""

from collections.abc import Sequence
from pathlib import Path

from mmdistill.checkpoint.errors import ComponentError, name_setting
from mmdistill.checkpoint.formats.names import EXPORT_SUFFIXES
from mmdistill.cli.parser import make_parser, report_errors


@report_errors("export")
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns 0 if the file was written, 2 if not."""
    parser = make_parser("export", __doc__)
    parser.add_argument("checkpoint", help="distilled or pretraining checkpoint of any format")
    parser.add_argument("--to", required=True, choices=list(EXPORT_SUFFIXES), help="format of the export")
    parser.add_argument("--output", "--out", help="output path (default: ./student-hf, ./student.safetensors, ...)")
    parser.add_argument("--component", help="encoder to export, for example teacher_flow (default: the student)")
    parser.add_argument("--force", action="store_true", help="replace the target if it exists")
    args = parser.parse_args(argv)
    from mmdistill.checkpoint.export import export_student  # imports torch, which --help must not

    target = Path(
        args.output or (f"student{EXPORT_SUFFIXES[args.to]}" if EXPORT_SUFFIXES[args.to] else f"student-{args.to}")
    )
    with name_setting("--component", ComponentError):
        written = export_student(args.checkpoint, target, to=args.to, component=args.component, force=args.force)
    print(f"wrote {written}")
    return 0
