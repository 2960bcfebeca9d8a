"""Write the weights of a checkpoint in another format, selected by the name of the target, or its training state.

mmdistill convert last.ckpt weights.safetensors
mmdistill convert weights.safetensors model.ckpt     # a Lightning file
mmdistill convert weights.safetensors epoch=49-loss=0.6095     # a DeepSpeed directory
mmdistill convert epoch=49-loss=0.6095 resumable --stage 2 --world-size 4     # with the training state, for 4 processes
mmdistill convert other.pth weights.safetensors --heads 2     # state the number of attention heads
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
    parser.add_argument(
        "--stage", type=int, choices=range(4), help="keep the training state, for this ZeRO stage (default: as before)"
    )
    parser.add_argument(
        "--world-size", type=int, help="keep the training state, for this number of processes (default: as before)"
    )
    parser.add_argument(
        "--heads", type=int, help="attention heads of an encoder of another program (default: from its tensors)"
    )
    parser.add_argument("--decoder-heads", type=int, help="attention heads of its decoder (default: from its tensors)")
    args = parser.parse_args(argv)
    from mmdistill.checkpoint.convert import convert_checkpoint, convert_layout  # imports torch, which --help must not

    if args.stage is None and args.world_size is None:
        heads = {"heads": args.heads, "decoder_heads": args.decoder_heads}
        written = convert_checkpoint(args.source, args.target, force=args.force, **heads)
    else:
        layout = {"stage": args.stage, "world_size": args.world_size}
        written = convert_layout(args.source, args.target, force=args.force, **layout)
    print(f"wrote {written}")
    return 0
