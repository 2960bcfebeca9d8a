"""The base class of all errors that this package raises on purpose, and the wording that messages share.

The command line prints such an error as one line and exits with its `exit_status`. Any other exception is a defect and
is printed with its traceback.
"""

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Self


class MMDistillError(Exception):
    """An expected failure. The message names the file or the key and the fix.

    Attributes:
        exit_status: status of the process that ends with this error.
        raised_on_all_ranks: whether each rank of the run raises this error, so that one of them has to print it.
    """

    exit_status = 1
    raised_on_all_ranks = False

    def on_all_ranks(self) -> Self:
        """This error, marked as raised on all ranks."""
        self.raised_on_all_ranks = True
        return self


class InputError(MMDistillError, ValueError):
    """A file, config value or argument that cannot be used as it is."""

    exit_status = 2


@contextmanager
def rename_key(old: str, new: str) -> Iterator[None]:
    """While open, the messages of input errors contain `new` instead of `old`: another key has the same settings."""
    try:
        yield
    except InputError as error:
        error.args = (str(error).replace(old, new),)
        raise


def format_count(count: int, noun: str) -> str:
    """A number with its noun: ``1 clip``, ``2 clips``, ``2 rallies``, ``2 test classes``."""
    if count == 1:
        return f"1 {noun}"
    if re.search(r"[^aeiou]y$", noun):
        return f"{count} {noun[:-1]}ies"
    return f"{count} {noun}{'es' if re.search(r'(s|x|(?<!epo)ch|sh)$', noun) else 's'}"


def format_size(num_bytes: int) -> str:
    """A number of bytes with its unit: ``532 B``, ``1.2 GB``."""
    value = float(num_bytes)
    for unit in ("B", "KB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit in ("B", "KB") else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def format_first(items: Sequence[object], limit: int) -> str:
    """The first `limit` items: ``a, b, c and 4 more``."""
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(map(str, items[:limit])) + more


def quote_name(name: str) -> str:
    """The name of a file or clip for a message, in quotes if it contains blanks."""
    return repr(name) if re.search(r"\s", name) else name


def suggest_nearest(name: str, choices: Iterable[object]) -> str:
    """``; did you mean X?`` for the choice that is nearest to `name`, or nothing. It ends a message."""
    near = difflib.get_close_matches(name, [str(choice) for choice in choices], n=1)
    return f"; did you mean {near[0]}?" if near else ""
