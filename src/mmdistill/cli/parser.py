"""The argument parser and the error messages of the verbs that do not use Hydra."""

import argparse
import copy
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from mmdistill.config import DistillConfig, PretrainConfig, explain
from mmdistill.config.compose import load_config
from mmdistill.config.overrides import is_override
from mmdistill.console import exit_if_pipe_closed
from mmdistill.errors import InputError, MMDistillError

Main = Callable[[Sequence[str] | None], int]


OLD_OPTIONS = ("--out", "--output-dir")  # earlier names of --output, which work, but are not in the help


def current_names(action: argparse.Action) -> list[str]:
    """The names of an option without its earlier ones."""
    return [name for name in action.option_strings if name == action.option_strings[0] or name not in OLD_OPTIONS]


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of the description and appends ``(default: X)`` to each help text that does not state it.

    The names in `OLD_OPTIONS` are left out.
    """

    def _format_action_invocation(self, action: argparse.Action) -> str:
        shown = copy.copy(action)
        shown.option_strings = current_names(action)
        return super()._format_action_invocation(shown)

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        if default is None or default is False or default in ([], argparse.SUPPRESS) or "default" in text:
            return text
        return f"{text} (default: {' '.join(map(str, default)) if isinstance(default, list) else default})"


class _Parser(argparse.ArgumentParser):
    """Reports missing arguments with their help text and the first example of the description.

    An override or an existing path is not a value of an option with several values, such as ``--modalities``.
    """

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As in `argparse.ArgumentParser`."""
        return super().parse_known_args(self._move_lists(args), namespace)

    def parse_known_intermixed_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As in `argparse.ArgumentParser`."""
        return super().parse_known_intermixed_args(self._move_lists(args), namespace)

    def _move_lists(self, args: Sequence[str] | None) -> list[str]:
        """The arguments, with the options with several values at the end. No positional argument follows them."""
        words = list(sys.argv[1:] if args is None else args)
        end = words.index("--") if "--" in words else len(words)
        with_lists = [a for a in self._actions if a.nargs == "+" and "=" not in str(a.metavar)]  # not NAME=FRACTION
        options = {name: action for action in with_lists for name in action.option_strings}
        others: list[str] = []
        lists: list[str] = []
        current: argparse.Action | None = None  # the option with several values that the word may belong to
        for word in words[:end]:
            if word.startswith("-"):
                current = options.get(word)
            elif current and word not in (current.choices or ()) and (is_override(word) or Path(word).exists()):
                current = None
            (others if current is None else lists).append(word)
        return [*others, *lists, *words[end:]]

    def error(self, message: str) -> NoReturn:
        """Print the error and exit with status 2."""
        _, _, names = message.partition("the following arguments are required: ")
        missing = [
            f"{'/'.join(current_names(action)) or name} ({action.help})"
            for action in self._actions
            if (name := "/".join(action.option_strings) or action.metavar or action.dest) in names.split(", ")
            and action.nargs != "*"  # argparse lists these too, although they may be omitted
        ]
        if not missing:
            super().error(message)
        lines = [line.strip().partition("  #")[0] for line in (self.description or "").splitlines()]
        examples = [f"for example: {line.rstrip()}\n" for line in lines if line.startswith(f"{self.prog} ")]
        noun = "argument" if len(missing) == 1 else "arguments"
        self.exit(
            InputError.exit_status,
            f"{self.prog}: error: missing {noun}: {', '.join(missing)}\n{''.join(examples[:1])}"
            f"`{self.prog} --help` lists all arguments\n",
        )


def make_parser(verb: str, description: str | None) -> argparse.ArgumentParser:
    """A parser whose usage and errors name ``mmdistill VERB``, also if a script calls the verb."""
    return _Parser(
        prog=f"mmdistill {verb}", description=description, formatter_class=_HelpFormatter, allow_abbrev=False
    )


def add_config_dir(parser: argparse.ArgumentParser) -> None:
    """Add ``--config-dir``."""
    parser.add_argument(
        "--config-dir", type=Path, help="additional folder of configs, such as dataset/NAME.yaml (default: none)"
    )


def add_evaluation_config(parser: argparse.ArgumentParser) -> None:
    """Add ``--config-name``, ``--config-dir`` and Hydra overrides; see `load_evaluation_config`."""
    parser.add_argument(
        "--config-name", default="config_mmdistill", help="main config in configs/; use that of the training"
    )
    add_config_dir(parser)
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="overrides of the config, such as dataset=NAME"
    )


def load_evaluation_config(args: argparse.Namespace) -> DistillConfig:
    """The config that the arguments of `add_evaluation_config` select, for a command that neither trains nor tests."""
    overrides = [*args.overrides, "train=False", "test=False"]
    return load_config(DistillConfig, args.config_name, overrides, config_dir=args.config_dir)


def report_errors(
    verb: str,
    *more: type[Exception],
    schema: type[PretrainConfig | DistillConfig] = PretrainConfig,
    continues: bool = False,
) -> Callable[[Callable[..., int]], Main]:
    """Decorator of the ``main`` of a verb: an expected error becomes one line and an exit status.

    The status is the one of the error: 1 for a failed stage, 2 for invalid input and files that cannot be read or
    written. Ctrl-C gives 130.

    Args:
        verb: name of the verb, for the line.
        more: further classes of expected errors.
        schema: class of the config, whose keys are suggested.
        continues: whether a second call continues an interrupted one.
    """
    expected: tuple[type[Exception], ...] = (MMDistillError, HydraException, OmegaConfBaseException, OSError, *more)

    def decorate(run: Callable[..., int]) -> Main:
        @functools.wraps(run)
        def main(argv: Sequence[str] | None = None) -> int:
            try:
                with exit_if_pipe_closed():
                    return run(argv)
            except BrokenPipeError:
                raise
            except expected as error:
                print(f"mmdistill {verb}: error: {explain(error, schema)}", file=sys.stderr)
                return error.exit_status if isinstance(error, MMDistillError) else InputError.exit_status
            except KeyboardInterrupt:
                hint = "; run the same command again to continue" if continues else ""
                print(f"mmdistill {verb}: interrupted{hint}", file=sys.stderr)
                return 130

        return main

    return decorate
