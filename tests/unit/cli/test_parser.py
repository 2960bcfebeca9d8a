"""The argument parsers of the verbs: names, help texts and defaults."""

import argparse
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from mmdistill.cli import parser
from mmdistill.cli.main import VERBS
from mmdistill.cli.parser import make_parser, report_errors

HYDRA_VERBS = ("pretrain", "distill", "evaluate")


def test_help_states_the_default_once(capsys: pytest.CaptureFixture[str]) -> None:
    made = make_parser("verb", "First line.\n\n    mmdistill verb X")
    made.add_argument("--a", type=int, default=0, help="an a")
    made.add_argument("--b", default=[1, 2], help="a b")
    made.add_argument("--c", default=3, help="a c (default: all)")
    made.add_argument("--d", action="store_true", help="a d")
    text = made.format_help()
    assert text.startswith("usage: mmdistill verb ")
    assert "    mmdistill verb X" in text
    for line in ("an a (default: 0)", "a b (default: 1 2)", "a c (default: all)", "a d"):
        assert f" {line}\n" in text
    with pytest.raises(SystemExit):
        made.parse_args(["--unknown"])
    assert "mmdistill verb: error: unrecognized arguments" in capsys.readouterr().err


def test_missing_arguments_are_explained_with_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    made = make_parser("verb", "First line.\n\n    mmdistill verb a.ckpt --to hf    # a folder\n    mmdistill verb X")
    made.add_argument("checkpoint", help="checkpoint file")
    made.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="overrides")
    made.add_argument("--to", required=True, help="format")
    for parse in (made.parse_args, made.parse_intermixed_args):
        with pytest.raises(SystemExit) as stopped:
            parse(["--to", "hf"])
        assert stopped.value.code == 2
        assert capsys.readouterr().err == (
            "mmdistill verb: error: missing argument: checkpoint (checkpoint file)\n"
            "for example: mmdistill verb a.ckpt --to hf\n"
            "`mmdistill verb --help` lists all arguments\n"
        )
    with pytest.raises(SystemExit):
        made.parse_args([])
    assert "error: missing arguments: checkpoint (checkpoint file), --to (format)\n" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["export", "visualize", "features", "split-data", "compute-stats", "prepare"])
def test_help_names_output_only(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    main = importlib.import_module(f"mmdistill.cli.{VERBS[verb][0]}").main
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    assert "--output OUTPUT " in shown
    assert "--out " not in shown
    assert "--output-dir" not in shown


def test_overrides_and_paths_are_no_values_of_an_option(tmp_path: Path) -> None:
    made = make_parser("verb", "")
    made.add_argument("files", nargs="*")
    made.add_argument("--modalities", nargs="+", choices=["rgb", "flow"])
    made.add_argument("--out")
    path = str(tmp_path)
    for parse in (made.parse_args, made.parse_intermixed_args):
        for words in (["--modalities", "rgb", "flow", path, "a=b"], [path, "--modalities", "rgb", "flow", "a=b"]):
            args = parse([*words, "--out", "x"])
            assert (args.files, args.modalities, args.out) == ([path, "a=b"], ["rgb", "flow"], "x")
        args = parse(["--modalities", "rgb", "--", "a=b"])
        assert (args.files, args.modalities) == (["a=b"], ["rgb"])


@pytest.mark.parametrize(("continues", "hint"), [(True, "; run the same command again to continue"), (False, "")])
def test_ctrl_c_names_a_hint_only_for_a_verb_that_continues(
    capsys: pytest.CaptureFixture[str], continues: bool, hint: str
) -> None:
    @report_errors("verb", continues=continues)
    def main(argv: Sequence[str] | None) -> int:
        raise KeyboardInterrupt

    assert main([]) == 130
    assert capsys.readouterr().err == f"mmdistill verb: interrupted{hint}\n"


class _ParserMadeError(Exception):
    pass


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb not in HYDRA_VERBS])
def test_every_argument_has_a_help_text_and_its_default(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[argparse.ArgumentParser] = []

    def stop(self: argparse.ArgumentParser, *_: Any) -> None:
        made.append(self)
        raise _ParserMadeError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_intermixed_args", stop)
    with pytest.raises(_ParserMadeError):
        importlib.import_module(f"mmdistill.cli.{VERBS[verb][0]}").main([])
    assert made[0].prog == f"mmdistill {verb}"
    formatter = parser._HelpFormatter("")
    for action in made[0]._actions:
        text = formatter._get_help_string(action)
        assert text, action
        is_optional = action.option_strings and not action.required and action.nargs != 0
        assert not is_optional or "default" in text, action
