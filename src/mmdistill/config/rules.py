"""The rule of a config value, which `schema` states beside the key.

A rule applies to the value, or to each element of a list and each name of a mapping. A null value is not checked.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field
from typing import Any

from mmdistill.config.renames import describe_old_value
from mmdistill.errors import InputError, suggest_nearest

Rule = Callable[[str, Any], object]  # (dotted key, value); raises ConfigError


class ConfigError(InputError):
    """An invalid configuration. The message names the key and the fix."""


def key(default: Any, *rules: Rule) -> Any:
    """A field of the schema with its default and rules."""
    if isinstance(default, list | dict):
        return field(default_factory=default.copy, metadata={"rules": rules})
    return field(default=default, metadata={"rules": rules})


def each(rule: Rule) -> Rule:
    """Apply `rule` to each element of a list; to the value itself if it is no list."""

    def check(name: str, value: Any) -> None:
        for element in value if isinstance(value, list | tuple | dict) else [value]:
            rule(name, element)

    return check


def one_of(*allowed: str, more: Callable[[], Sequence[str]] = tuple, synonyms: Mapping[str, str] | None = None) -> Rule:
    """Allow these values, and those that `more` returns when a config is validated.

    `synonyms` maps names that other programs use to the allowed value, which the error suggests.
    """

    def check(name: str, value: Any) -> None:
        choices = (*allowed, *more())
        if value not in choices:
            if old := describe_old_value(name, value):
                raise ConfigError(old)
            synonym = (synonyms or {}).get(str(value))
            hint = f"; did you mean {synonym}?" if synonym else suggest_nearest(str(value), choices)
            raise ConfigError(f"{name}={value} is not one of {', '.join(choices)}{hint}")

    return each(check)


def at_least(minimum: float) -> Rule:
    """Allow values from `minimum` on."""

    def check(name: str, value: Any) -> None:
        if value < minimum:
            raise ConfigError(f"{name}={value} must be at least {minimum}")

    return each(check)


def within(interval: str, *, null: str = "") -> Rule:
    """Allow values in an interval, ``[0, 1)`` or ``(0, inf]``; `null` is the meaning of null, for the message."""
    low, high = map(float, interval[1:-1].split(","))
    excluded = [low] * (interval[0] == "(") + [high] * (interval[-1] == ")")

    def check(name: str, value: Any) -> None:
        if not low <= value <= high or value in excluded:
            bound = f"{'above' if interval[0] == '(' else 'at least'} {low:g}"
            rule = f"lie in {interval}" if math.isfinite(high) else f"be {bound}"
            raise ConfigError(f"{name}={value} must {rule}{f'; use null for {null}' if null else ''}")

    return check


def positive(*, null: str) -> Rule:
    """Allow values above 0; `null` is the meaning of null, for the message."""

    def check(name: str, value: Any) -> None:
        if value <= 0:
            raise ConfigError(f"{name}={value} must be positive; use null for {null}")

    return check


def standardization(name: str, value: Any) -> str | None:
    """The method of `trainer.standardize_targets`: ``standard``, ``phi_s``, or None for false."""
    methods = {False: None, True: "standard", "standard": "standard", "phi_s": "phi_s"}
    if not isinstance(value, bool | str) or value not in methods:
        raise ConfigError(f"{name}={value} is not one of false, true, standard, phi_s")
    return methods[value]


def as_ints(name: str, value: Any) -> list[int]:
    """A value that is a whole number or a list of them, as a list. Raises `ConfigError`, naming the key, for others."""
    values = value if isinstance(value, list | tuple) else [value]
    if not values or any(isinstance(v, bool) or not isinstance(v, int) for v in values):
        raise ConfigError(f"{name}={value} must be a whole number or a list of whole numbers")
    return list(values)


def as_names(name: str, value: Any) -> list[str]:
    """A value that is a name or a list of them, as a list. Raises `ConfigError`, naming the key, for others."""
    values = value if isinstance(value, list | tuple) else [value]
    if not values or any(not isinstance(v, str) for v in values):
        raise ConfigError(f"{name}={value} must be a name or a list of names")
    return list(values)
