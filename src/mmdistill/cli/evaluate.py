"""The command ``mmdistill evaluate``: ``mmdistill distill`` with ``train=False test=True``. Imports no torch."""

import sys
from collections.abc import Sequence

from mmdistill.cli import distill
from mmdistill.config.overrides import is_override


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate a checkpoint few-shot. The overrides in `argv` follow the two presets, so they take precedence."""
    given = list(sys.argv[1:] if argv is None else argv)
    first = next((i for i, argument in enumerate(given) if is_override(argument)), len(given))
    return distill.main([*given[:first], "train=False", "test=True", *given[first:]])
