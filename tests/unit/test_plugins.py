"""Registries: order, duplicates, entry points."""

from importlib.metadata import EntryPoint, EntryPoints

import pytest

from mmdistill import plugins
from mmdistill.errors import InputError
from mmdistill.plugins import Registry, entry_point_names

GROUP = "mmdistill.tests"


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Registry[object]:
    """Two registered components and two entry points; one of these cannot be imported."""
    points = EntryPoints(
        [
            EntryPoint("pi", "math:pi", GROUP),
            EntryPoint("broken", "no_such_module:x", GROUP),
            EntryPoint("other", "math:e", "another.group"),
        ]
    )
    monkeypatch.setattr(plugins, "entry_points", lambda group: points.select(group=group))
    registry: Registry[object] = Registry("constant", GROUP)
    registry.register("two", 2)
    registry.register("one", 1)
    return registry


def test_names_are_in_the_order_of_registration_and_entry_points_last(registry: Registry[object]) -> None:
    assert registry.names() == ("two", "one", "broken", "pi")
    assert entry_point_names(GROUP) == ["broken", "pi"]


def test_get_returns_components_and_loads_entry_points(registry: Registry[object]) -> None:
    assert registry.get("one") == 1
    assert registry.get("pi") == pytest.approx(3.14159, abs=1e-5)
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        registry.get("broken")


def test_unknown_name_raises_with_the_closest_match(registry: Registry[object]) -> None:
    with pytest.raises(InputError, match=r"constant 'onne' is not one of two, one, broken, pi; did you mean one\?"):
        registry.get("onne")
    with pytest.raises(InputError, match=r"constant 'xyz' is not one of two, one, broken, pi$"):
        registry.get("xyz")


def test_name_is_registered_once_and_can_be_removed(registry: Registry[object]) -> None:
    with pytest.raises(ValueError, match="constant 'one' is already registered"):
        registry.register("one", 3)
    registry.unregister("one")
    assert "one" not in registry.names()
    assert registry.register("one", 3) == 3
