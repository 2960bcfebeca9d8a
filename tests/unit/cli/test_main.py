"""The dispatcher of ``mmdistill VERB``."""

import ast
import importlib
import os
import re
import signal
import sys
from types import ModuleType

import pytest

from mmdistill import __version__, cli
from mmdistill.cli.main import VERBS, main, run_verb, usage
from tests.commands import ROOT


def test_usage_lists_every_verb_with_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in ([], ["--help"], ["-h"]):
        assert main(argv) == 0
        assert capsys.readouterr().out == usage() + "\n"
    lines = usage().splitlines()
    assert [line.split()[0] for line in lines[lines.index("Verbs:") + 1 :]] == list(VERBS)
    assert max(map(len, lines)) <= 100


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"mmdistill {__version__}\n"


def test_unknown_verb_names_the_closest_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretran"]) == 2
    assert (
        "unknown verb 'pretran'; `mmdistill --help` lists the verbs; did you mean pretrain?\n"
        in capsys.readouterr().err
    )
    assert main(["xyz"]) == 2
    assert "did you mean" not in capsys.readouterr().err


def test_verb_receives_its_arguments_and_returns_its_status(monkeypatch: pytest.MonkeyPatch) -> None:
    received: list[list[str]] = []
    module = ModuleType("mmdistill.cli.find_checkpoints")
    module.main = lambda argv: received.append([*argv, sys.argv[0]]) or 7  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(sys, "argv", ["before"])
    assert main(["find-checkpoints", "output", "--json"]) == 7
    assert received == [["output", "--json", "mmdistill find-checkpoints"]]


@pytest.mark.parametrize(("rank", "shown"), [("0", "mmdistill distill: interrupted\n"), ("1", "")])
def test_ctrl_c_during_the_imports_of_a_verb_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rank: str, shown: str
) -> None:
    def interrupt(name: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib, "import_module", interrupt)
    monkeypatch.setattr(sys, "argv", ["before"])
    monkeypatch.setenv("RANK", rank)
    assert main(["distill"]) == 130
    assert capsys.readouterr().err == shown


@pytest.mark.parametrize("verb", VERBS)
def test_module_of_each_verb_has_main(verb: str) -> None:
    tree = ast.parse((ROOT / "src/mmdistill/cli" / f"{VERBS[verb][0]}.py").read_text())
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert functions["main"].args.args[0].arg == "argv"


def test_every_script_calls_its_verb() -> None:
    scripts = [*ROOT.glob("*.py"), *(ROOT / "scripts").glob("*.py")]
    called = {verb for script in scripts for verb in re.findall(r'run_verb\("([\w-]+)"\)', script.read_text())}
    assert called == set(VERBS) - {"evaluate"}
    assert (ROOT / "find_checkpoints.py").is_file()
    assert cli.__doc__


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signal_during_the_imports_of_a_run_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    monkeypatch.setattr(sys, "argv", ["mmdistill pretrain"])
    monkeypatch.setattr(importlib, "import_module", lambda _: os.kill(os.getpid(), number))
    with pytest.raises(SystemExit) as ended:
        run_verb("pretrain", [])
    assert ended.value.code == 85
    assert capsys.readouterr().err == "mmdistill pretrain: stopped by a signal; run the same command again\n"
    assert signal.getsignal(number) is signal.SIG_DFL
