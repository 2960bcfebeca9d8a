"""Write the weights of a checkpoint in another format, selected by the name of the target.

mmdistill convert last.ckpt weights.safetensors
mmdistill convert weights.safetensors model.ckpt     # a Lightning file
mmdistill convert weights.safetensors epoch=49-loss=0.6095     # a DeepSpeed directory
"""

from collections.abc import Sequence

from mmdistill.cli.parser import make_parser, report_errors


@report_errors("convert")
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns 0 if the target was written, 2 if not."""
    parser = make_parser("convert", __doc__)
    parser.add_argument("source", help="checkpoint of any format")
    parser.add_argument(
        "target", help="X.safetensors, X.ckpt, X.pt, X.pth, or a name without suffix for a DeepSpeed directory"
    )
    parser.add_argument("--force", action="store_true", help="replace the target if it exists")
    args = parser.parse_args(argv)
    from mmdistill.checkpoint.convert import convert_checkpoint  # imports torch, which --help must not

    written = convert_checkpoint(args.source, args.target, force=args.force)
    print(f"wrote {written}")
    return 0
