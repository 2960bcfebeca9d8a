"""Command-line overrides: quote values that Hydra's override grammar rejects. Imports no torch."""

import re
from collections.abc import Sequence

_BARE = re.compile(r"[\w\s/+.$%*@?|:\\-]*", re.ASCII)  # accepted by Hydra without quotes
_QUOTED = re.compile(r"""(['"])(\\.|(?!\1).)*\1""", re.DOTALL)
_CALL = re.compile(r"[A-Za-z_]\w*\(.*\)", re.DOTALL)  # range(1,5), choice(a,b)
_OVERRIDE = re.compile(r"^(\+{0,2}|~)([A-Za-z_][\w./@-]*)=(.*)$", re.DOTALL)


def quote_overrides(argv: Sequence[str]) -> list[str]:
    """Quote values that Hydra's grammar rejects, and remove the ``--local_rank`` that a launcher adds.

    ``ckpt_path=/p/epoch=49-loss=0.6.ckpt`` is a syntax error for Hydra because of the second ``=``. The same applies to
    ``~``, brackets inside a path and non-ASCII letters. Such values are put in single quotes, also as elements of a
    list, a mapping or a comma sweep. Quoted values stay as they are. A comma outside quotes remains a sweep.

    Options are moved before the overrides, because Hydra rejects an override that follows an option after overrides.
    """
    out = []
    arguments = iter(argv)
    for argument in arguments:
        if re.match(r"^--local[_-]rank(=|$)", argument):
            if "=" not in argument:
                next(arguments, None)  # its value
            continue
        match = _OVERRIDE.match(argument)
        if match:
            argument = f"{match[1]}{match[2]}={_quote_value(match[3])}"
        out.append(argument)
    return [*(a for a in out if not is_override(a)), *(a for a in out if is_override(a))]


def is_override(argument: str) -> bool:
    """Whether `argument` is ``key=value`` for Hydra, not an option or a single word."""
    return _OVERRIDE.match(argument) is not None


def add_overrides(argv: Sequence[str], more: Sequence[str]) -> list[str]:
    """Insert `more` after the last override of a command line.

    Hydra accepts overrides in one block only, and the last value of a key takes effect.
    """
    end = max((i + 1 for i, argument in enumerate(argv) if is_override(argument)), default=len(argv))
    return [*argv[:end], *more, *argv[end:]]


def _quote_value(value: str) -> str:
    value = value.strip()
    if _QUOTED.fullmatch(value):
        return value
    parts = _split_at_commas(value)
    if len(parts) > 1:
        return ",".join(_quote_value(part) for part in parts)
    for opening, closing in ("[]", "{}"):
        if value.startswith(opening) and value.endswith(closing) and _is_balanced(value[1:-1]):
            elements = _split_at_commas(value[1:-1])
            return opening + ",".join(_quote_element(element, opening) for element in elements) + closing
    if "=" not in value and (_BARE.fullmatch(value) or _CALL.fullmatch(value) or "${" in value):
        return value
    escaped = value.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def _quote_element(part: str, opening: str) -> str:
    if opening == "{" and ":" in part:
        key, _, rest = part.partition(":")
        return f"{key.strip()}:{_quote_value(rest)}"
    return _quote_value(part)


def _is_balanced(text: str) -> bool:
    """Whether every bracket in `text` is closed: false for the inner part of ``{video}/{frame}``."""
    depth = 0
    for char in text:
        depth += (char in "[{") - (char in "]}")
        if depth < 0:
            return False
    return depth == 0


def _split_at_commas(text: str) -> list[str]:
    """Split at commas outside brackets and quotes. A quote opens only at the start of a value, not inside a word."""
    parts, depth, quote, start = [], 0, "", 0
    for i, char in enumerate(text):
        if quote:
            quote = "" if char == quote else quote
        elif char in "'\"" and text[:i].rstrip()[-1:] in ("", ",", ":", "[", "{", "("):
            quote = char
        elif char in "[{(":
            depth += 1
        elif char in "]})":
            depth -= 1
        elif char == "," and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    return [*parts, text[start:]]


def without_option_values(argv: Sequence[str]) -> list[tuple[int, str]]:
    """Position and text of each argument that is not the value of the option before it."""
    kept = []
    for i, (before, argument) in enumerate(zip(["", *argv], argv, strict=False)):
        takes_value = before.startswith("-") and before not in ("-m", "--multirun") and "=" not in before
        if not takes_value or argument.startswith("-"):
            kept.append((i, argument))
    return kept
