"""The argument parser of the verbs that do not use Hydra."""

import argparse


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of the description and appends ``(default: X)`` to each help text that does not state it."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        if default is None or default is False or default in ([], argparse.SUPPRESS) or "default" in text:
            return text
        return f"{text} (default: {' '.join(map(str, default)) if isinstance(default, list) else default})"


def make_parser(verb: str, description: str | None) -> argparse.ArgumentParser:
    """A parser whose usage and errors name ``mmdistill VERB``, also if a script calls the verb."""
    return argparse.ArgumentParser(
        prog=f"mmdistill {verb}", description=description, formatter_class=_HelpFormatter, allow_abbrev=False
    )
