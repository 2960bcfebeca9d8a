"""Rules of single values. Each key with its message: test_validation.py."""

import dataclasses
from typing import Any

import pytest

from mmdistill.config import ConfigError
from mmdistill.config.rules import Rule, as_ints, as_names, at_least, key, one_of, positive, within


@pytest.mark.parametrize(
    ("rule", "allowed", "rejected"),
    [
        (one_of("a", "b"), ["a", ["a", "b"], []], ["c", ["a", "c"]]),
        (one_of("a", more=lambda: ["b"]), ["b"], ["c"]),
        (one_of("a"), [{"a": 1}], [{"c": 1}]),
        (at_least(2), [2, 3.5, [2, 9]], [1, [2, 1]]),
        (within("[0, 1)"), [0, 0.0, 0.999], [-1e-9, 1, 1.0]),
        (within("(0, 1]"), [1e-9, 1.0], [0, 1.001]),
        (positive(null="x"), [1e-9], [0, -1]),
        (as_ints, [1, [1, 2]], [True, 1.0, "1", []]),
        (as_names, ["a", ["a", "b"]], [1, ["a", 1], []]),
    ],
)
def test_rule_rejects_values_outside_of_it(rule: Rule, allowed: list[Any], rejected: list[Any]) -> None:
    for value in allowed:
        rule("trainer.x", value)
    for value in rejected:
        with pytest.raises(ConfigError, match=r"^trainer\.x="):
            rule("trainer.x", value)


def test_name_of_another_program_suggests_the_allowed_value() -> None:
    rule = one_of("bf16", "16", synonyms={"fp16": "16"})
    with pytest.raises(ConfigError, match=r"^precision=fp16 is not one of bf16, 16; did you mean 16\?$"):
        rule("precision", "fp16")
    with pytest.raises(ConfigError, match=r"did you mean bf16\?$"):
        rule("precision", "bf6")


def test_default_list_belongs_to_one_config() -> None:
    made = dataclasses.make_dataclass("Made", [("names", list, key(["a"], one_of("a")))])
    made().names.append("b")
    assert made().names == ["a"]
