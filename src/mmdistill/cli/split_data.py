r"""Split an annotation file into files that share no match or no class.

    mmdistill split-data all.json --output splits --by match --fractions train=0.7 val=0.15 test=0.15
    mmdistill split-data all.json --output splits --by class --fractions base=0.6 novel=0.4 \
        --label-fields type side technique direction

With several files, `--by class` divides the classes of all files together and writes one file per input and split, such
as train_base.json. The same seed gives the same files on every machine.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from mmdistill.cli.parser import make_parser, report_errors
from mmdistill.data.annotations.base import Rally, format_rally_counts
from mmdistill.data.annotations.f3set import F3SET_FIELDS, LABEL_FIELDS, load_f3set, to_json
from mmdistill.errors import InputError
from mmdistill.files import atomic_write_bytes


def _parse_fraction(text: str) -> tuple[str, float]:
    """Parse NAME=FRACTION."""
    name, _, value = text.partition("=")
    try:
        return name, float(value)
    except ValueError:
        raise InputError(f"--fractions {text}: expected NAME=FRACTION, like train=0.7") from None


@report_errors("split-data", ValueError)
def main(argv: Sequence[str] | None = None) -> int:
    """Write the split files. Returns the exit status."""
    parser = make_parser("split-data", __doc__)
    parser.add_argument("annotations", type=Path, nargs="+", help="F3Set JSON; several files with --by class only")
    parser.add_argument("--output", "--output-dir", type=Path, required=True, help="folder for one NAME.json per split")
    parser.add_argument("--by", choices=["match", "class"], required=True, help="what the files do not share")
    parser.add_argument(
        "--fractions",
        nargs="+",
        required=True,
        metavar="NAME=FRACTION",
        help="file names and their fractions, which sum to 1, like train=0.7 test=0.3; of the events with --by match "
        "(of the rallies if there are no events), of the classes with --by class",
    )
    parser.add_argument(
        "--label-fields",
        nargs="+",
        metavar="FIELD",
        choices=LABEL_FIELDS,
        help=f"label fields that define a class: {', '.join(F3SET_FIELDS)}, or positions from 0 (default: all)",
    )
    parser.add_argument("--min-events", type=int, default=1, help="exclude classes with fewer events (with --by class)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the split")
    options = parser.parse_args(argv)
    from mmdistill.data.annotations.splits import split_by_class, split_by_match  # imports torch, which --help must not

    fractions = dict(_parse_fraction(text) for text in options.fractions)
    if len(fractions) != len(options.fractions):
        raise InputError("--fractions: a name occurs twice; give each split its own name")
    files = {path: load_f3set(path) for path in options.annotations}
    if len({path.stem for path in files}) != len(options.annotations):
        raise InputError("annotations: two files have the same name; their splits would have the same name, too")
    rallies = [rally for content in files.values() for rally in content]
    written: dict[str, list[Rally]] = {}
    if options.by == "match":
        if len(files) > 1:
            raise InputError("annotations: --by match splits one file")
        written = split_by_match(rallies, fractions, seed=options.seed)
    else:
        limits = {"label_fields": options.label_fields, "min_events": options.min_events, "reference": rallies}
        for path, content in files.items():
            parts = split_by_class(content, fractions, seed=options.seed, **limits)
            prefix = f"{path.stem}_" if len(files) > 1 else ""
            written |= {f"{prefix}{name}": part for name, part in parts.items()}
    options.output.mkdir(parents=True, exist_ok=True)
    for name, part in written.items():
        path = options.output / f"{name}.json"
        atomic_write_bytes(path, (json.dumps(to_json(part)) + "\n").encode())
        print(f"{path}: {format_rally_counts(part)}")
    return 0
