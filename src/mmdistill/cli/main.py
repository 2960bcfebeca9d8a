"""The console command ``mmdistill VERB``. Each verb is imported when it is called; nothing here imports torch."""

import importlib
import os
import sys
from collections.abc import Sequence

from mmdistill import __version__
from mmdistill.distributed.stop_signals import KEYBOARD_INTERRUPT_EXIT_CODE, exit_on_stop_signal
from mmdistill.errors import InputError, suggest_nearest

VERBS = {  # verb -> (module of `mmdistill.cli` with ``main(argv) -> exit status``, line in the list of verbs)
    "pretrain": ("pretrain", "Pretrain a masked autoencoder on one modality"),
    "distill": ("distill", "Distill the teachers into an RGB student, then evaluate it"),
    "evaluate": ("evaluate", "Evaluate a checkpoint few-shot"),
    "demo": ("demo", "Run the whole method on generated data"),
    "prepare": ("prepare_data", "Convert videos to frames, optical flow and skeletons"),
    "convert-skeletons": ("convert_skeletons", "Convert skeletons of other programs to one file per video"),
    "check-data": ("check_data", "Check that the files of a dataset exist and can be read"),
    "browse": ("browse", "Write a page with the clips of a dataset, and the errors of an evaluation"),
    "compute-stats": ("compute_stats", "Compute mean and standard deviation of the training data"),
    "split-data": ("split_data", "Split an annotation file by match or by class"),
    "make-unlabel": ("make_unlabel", "Write an annotation file without labels for training"),
    "find-checkpoints": ("find_checkpoints", "List checkpoints and the commands that use them"),
    "inspect": ("inspect_checkpoint", "Show the contents of a checkpoint"),
    "convert": ("convert_checkpoint", "Convert a checkpoint to another format"),
    "export": ("export_student", "Export the student without its teachers"),
    "features": ("extract_features", "Write the features of clips, or of each frame"),
    "evaluate-features": ("evaluate_features", "Evaluate features of any model few-shot"),
    "select-rallies": ("select_rallies", "Select the rallies to label next"),
    "spot": ("spot", "Find labeled events in rallies, with a few labeled rallies as examples"),
    "label": ("label", "Propose labels for the strokes of a new video, with a few examples"),
    "visualize": ("visualize_reconstruction", "Render the reconstructions of a pretraining checkpoint"),
    "sweep-summary": ("summarize_sweep", "Write a table and a plot of a sweep"),
    "results-table": ("results_table", "Repeat the demo with several seeds and write a table of results"),
}

# verbs that schedulers stop and start again
RUNS = ("pretrain", "distill", "evaluate", "prepare", "demo", "results-table")
EARLY_SIGNALS = ("SIGTERM", "SIGUSR1")  # with which schedulers stop a run


def usage() -> str:
    """The text of ``mmdistill --help``: each verb with its summary."""
    width = max(map(len, VERBS))
    lines = [f"  {name:<{width}}  {summary}" for name, (_, summary) in VERBS.items()]
    head = ["usage: mmdistill VERB [ARGUMENTS]", "       mmdistill VERB --help", "", "Verbs:"]
    return "\n".join([*head, *lines])


def main(argv: Sequence[str] | None = None) -> int:
    """Call one verb with the arguments that follow it.

    Args:
        argv: the verb and its arguments; None: those of this process.

    Returns:
        exit status of the process.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0
    if arguments[0] == "--version":
        print(f"mmdistill {__version__}")
        return 0
    name, *rest = arguments
    if name not in VERBS:
        hint = f"`mmdistill --help` lists the verbs{suggest_nearest(name, VERBS)}"
        print(f"mmdistill: error: unknown verb {name!r}; {hint}", file=sys.stderr)
        return InputError.exit_status
    sys.argv = [f"mmdistill {name}", *rest]  # argparse and Hydra print the first item in their help
    return run_verb(name, rest)


def run_verb(name: str, argv: Sequence[str] | None = None) -> int:
    """Call a verb. A stop signal during its start ends it with one line.

    Args:
        name: a key of `VERBS`.
        argv: its arguments; None: a script was started with the arguments in `sys.argv`.

    Returns:
        exit status of the process.
    """
    names = EARLY_SIGNALS if name in RUNS else ()
    try:
        with exit_on_stop_signal(names):
            status: int = importlib.import_module(f"mmdistill.cli.{VERBS[name][0]}").main(argv)
    except KeyboardInterrupt:  # during the imports of the verb
        if os.environ.get("RANK", "0") == "0":
            print(f"mmdistill {name}: interrupted", file=sys.stderr)
        return KEYBOARD_INTERRUPT_EXIT_CODE
    return status
