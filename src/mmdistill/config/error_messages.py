"""What is wrong with an input, in one line for its user."""

import difflib
import re
from dataclasses import fields, is_dataclass
from typing import Any

from omegaconf.errors import OmegaConfBaseException

from mmdistill.config.schema import CommonConfig
from mmdistill.errors import MMDistillError


def known_keys(schema: type[Any] = CommonConfig, prefix: str = "") -> list[str]:
    """Every dotted key of a schema."""
    keys = []
    for f in fields(schema):
        keys.append(prefix + f.name)
        if isinstance(f.type, type) and is_dataclass(f.type):
            keys += known_keys(f.type, f"{prefix}{f.name}.")
    return keys


# what a DataLoader makes of an exception in a worker: the traceback there, and the message at its end
_FROM_WORKER = re.compile(
    r"Caught (\w+) in DataLoader worker process \d+\.\nOriginal Traceback.*\n[\w.]*\1: (.*?)\n?", re.DOTALL
)


def explain(error: Exception, schema: type[Any]) -> str:
    """One sentence for a Hydra or OmegaConf error, with the nearest known keys; our own errors say it themselves."""
    if isinstance(error, MMDistillError) and not isinstance(error.__cause__, OmegaConfBaseException):
        worker = _FROM_WORKER.fullmatch(str(error))
        return worker[2] if worker else str(error)  # whole: the lines below the first list what is wrong
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    text = "\n".join(str(e) for e in chain)
    if missing := re.search(r"missing mandatory value: (\S+)", text, re.IGNORECASE):
        return f"{missing[1]} is not given; give it on the command line, for example modality=rgb"
    match = re.search(r"Key '([^']+)'", text)
    firsts = [next((line.strip() for line in str(e).splitlines() if line.strip()), type(e).__name__) for e in chain]
    message = firsts[0]
    for detail in firsts[1:]:
        if detail not in message and "$VALUE" not in detail:  # OmegaConf's own text before it is filled in
            message += f" ({detail})"
    if "Ambiguous value for argument" in text:
        message += ": a comma outside quotes makes a sweep (-m); for a path with a comma write \"key='/a, b/c'\""
    if options := getattr(error, "options", None):  # Hydra's, where a group has no such file
        message += f". Available: {', '.join(options)}"
    if match:
        word = match[1]
        leaves = known_keys(schema)
        near = [
            k
            for k in leaves
            if k.rsplit(".", 1)[-1] in difflib.get_close_matches(word, {k.rsplit(".", 1)[-1] for k in leaves}, n=3)
        ]
        if near:
            message += f". Near matches: {', '.join(near[:3])}"
    return message
