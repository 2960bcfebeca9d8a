"""Write an unlabeled training file: the rallies of annotation files without their events.

    mmdistill make-unlabel train.json --exclude val.json test.json --output unlabel.json

`--exclude` removes the rallies of the evaluation files, with `--by match` all rallies of their matches, so that the
training does not see them. The output contains no labels.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mmdistill.cli.parser import make_parser, report_errors
from mmdistill.data.annotations.f3set import load_f3set, match_name, to_json
from mmdistill.errors import InputError, format_count
from mmdistill.files import atomic_write_bytes


@report_errors("make-unlabel")
def main(argv: Sequence[str] | None = None) -> int:
    """Write the file. Returns the exit status."""
    parser = make_parser("make-unlabel", __doc__)
    parser.add_argument("annotations", type=Path, nargs="+", help="F3Set JSON files")
    parser.add_argument("--output", type=Path, required=True, help="file to write")
    parser.add_argument(
        "--exclude", type=Path, nargs="*", default=[], help="files whose rallies are excluded (default: none)"
    )
    parser.add_argument(
        "--by", choices=["rally", "match"], default="rally", help="exclude rallies, or their whole matches"
    )
    options = parser.parse_args(argv)
    rallies = [rally for path in options.annotations for rally in load_f3set(path)]
    excluded = [rally for path in options.exclude for rally in load_f3set(path)]
    duplicates = [name for name, count in Counter(rally.video for rally in rallies).items() if count > 1]
    if duplicates:
        raise InputError(f"rally {duplicates[0]} is in more than one of the files; remove one of them")
    key = match_name if options.by == "match" else str
    excluded_keys = {key(rally.video) for rally in excluded}
    kept = [replace(rally, events=()) for rally in rallies if key(rally.video) not in excluded_keys]
    if not kept:
        raise InputError("--exclude removes all rallies; exclude fewer files")
    atomic_write_bytes(options.output, (json.dumps(to_json(kept)) + "\n").encode())
    print(f"{options.output}: {format_count(len(kept), 'rally')}, {len(rallies) - len(kept)} excluded")
    return 0
