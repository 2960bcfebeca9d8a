"""Every expected error of the package has the base class that the command line reports as one line."""

import ast
import builtins
from pathlib import Path

import pytest

from mmdistill.errors import InputError, MMDistillError, format_count, format_first, rename_key, suggest_nearest

PACKAGE = Path(__file__).resolve().parents[2] / "src" / "mmdistill"


def test_exit_status_distinguishes_input_errors() -> None:
    assert (MMDistillError.exit_status, InputError.exit_status) == (1, 2)
    assert issubclass(InputError, MMDistillError)
    assert issubclass(InputError, ValueError)


@pytest.mark.parametrize(
    ("count", "noun", "expected"),
    [
        (0, "clip", "0 clips"),
        (1, "clip", "1 clip"),
        (2, "clip", "2 clips"),
        (1, "rally", "1 rally"),
        (2, "valid rally", "2 valid rallies"),
        (3, "day", "3 days"),
        (2, "class", "2 classes"),
        (2, "batch", "2 batches"),
        (2, "epoch", "2 epochs"),
        (2, "GPU", "2 GPUs"),
    ],
)
def test_counts_have_the_right_plural(count: int, noun: str, expected: str) -> None:
    assert format_count(count, noun) == expected


def test_long_lists_are_shortened() -> None:
    assert format_first(["a", "b", "c"], 3) == "a, b, c"
    assert format_first(range(5), 3) == "0, 1, 2 and 2 more"


def test_nearest_choice_is_suggested() -> None:
    assert suggest_nearest("randm", ["random", "teacher_rgb"]) == "; did you mean random?"
    assert suggest_nearest("xyz", ["random"]) == ""


def error_classes() -> dict[str, list[str]]:
    """Names of all exception classes of the package, with the names of their bases."""
    classes = {
        node.name: [ast.unparse(base).rpartition(".")[2] for base in node.bases]
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
    }
    exceptions = {
        name for name, value in vars(builtins).items() if isinstance(value, type) and issubclass(value, Exception)
    }
    found: dict[str, list[str]] = {}
    while more := {n: b for n, b in classes.items() if n not in found and {*b} & {*exceptions, *found}}:
        found |= more
    return found


def test_all_error_classes_have_the_base_class() -> None:
    classes = error_classes()
    assert {"ConfigError", "CheckpointError", "FrameError", "NonFiniteError"} <= set(classes)
    known = {"MMDistillError"}
    while more := {name for name, bases in classes.items() if name not in known and known & set(bases)}:
        known |= more
    assert sorted(set(classes) - known) == []


@pytest.mark.parametrize("name", sorted(error_classes()))
def test_error_classes_are_named_so(name: str) -> None:
    assert name.endswith("Error")


def test_input_errors_name_the_key_of_their_place() -> None:
    """Other errors stay as they are."""
    with pytest.raises(InputError, match=r"^source\.label: set source\.label$"), rename_key("data_module.", "source."):
        raise InputError("data_module.label: set data_module.label")
    with pytest.raises(KeyError, match=r"data_module\.label"), rename_key("data_module.", "source."):
        raise KeyError("data_module.label")
