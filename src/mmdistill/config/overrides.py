"""The command line's edge: what Hydra's override grammar would refuse is quoted. Imports no torch."""

import re
from collections.abc import Sequence

_BARE = re.compile(r"[\w\s/+.$%*@?|:\\-]*", re.ASCII)  # what Hydra takes without quotes
_CALL = re.compile(r"[A-Za-z_]\w*\(.*\)", re.DOTALL)  # range(1,5), choice(a,b)
_OVERRIDE = re.compile(r"^(\+{0,2}|~)([A-Za-z_][\w./@-]*)=(.*)$", re.DOTALL)


def quote_overrides(argv: Sequence[str]) -> list[str]:
    """Quote values that Hydra's grammar would refuse, and drop the launcher's ``--local_rank``.

    Hydra reads ``ckpt_path=/p/epoch=49-loss=0.6.ckpt`` as a syntax error because of the second ``=``, and likewise
    ``~``, brackets inside a path and letters beyond ASCII. Such values, also as elements of a list, mapping or comma
    sweep, are put in single quotes. What is quoted already stays as it is; a comma outside quotes stays a sweep.
    """
    out = []
    given = iter(argv)
    for argument in given:
        if re.match(r"^--local[_-]rank(=|$)", argument):
            if "=" not in argument:
                next(given, None)  # its value
            continue
        match = _OVERRIDE.match(argument)
        if match:
            argument = f"{match[1]}{match[2]}={_quote_value(match[3])}"
        out.append(argument)
    return out


def is_override(argument: str) -> bool:
    """Whether it is ``key=value`` in Hydra's sense, and not an option or a bare word."""
    return _OVERRIDE.match(argument) is not None


def add_overrides(argv: Sequence[str], more: Sequence[str]) -> list[str]:
    """`more` behind the last override of a command line: Hydra takes them in one block, and the last one counts."""
    at = max((i + 1 for i, argument in enumerate(argv) if is_override(argument)), default=len(argv))
    return [*argv[:at], *more, *argv[at:]]


def _quote_value(value: str) -> str:
    value = value.strip()
    if value[:1] in "'\"":
        return value
    parts = _split_top(value)
    if len(parts) > 1:
        return ",".join(_quote_value(part) for part in parts)
    for opening, closing in ("[]", "{}"):
        if value.startswith(opening) and value.endswith(closing):
            return opening + ",".join(_quote_element(part, opening) for part in _split_top(value[1:-1])) + closing
    if "=" not in value and (_BARE.fullmatch(value) or _CALL.fullmatch(value) or "${" in value):
        return value
    escaped = value.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def _quote_element(part: str, opening: str) -> str:
    if opening == "{" and ":" in part:
        key, _, rest = part.partition(":")
        return f"{key.strip()}:{_quote_value(rest)}"
    return _quote_value(part)


def _split_top(text: str) -> list[str]:
    """Split at commas outside brackets and quotes; a quote opens only where a value begins, not inside a word."""
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
