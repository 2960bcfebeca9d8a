"""Registries of named components: modalities, annotation formats, classifiers.

A component is registered by its own module, or by another distribution through a Python entry point. The entry point's
name is the component's name, and its value is the component.
"""

from functools import cache
from importlib import metadata
from typing import Generic, TypeVar

from mmdistill.errors import InputError, suggest_nearest

T = TypeVar("T")


@cache
def entry_points(group: str) -> metadata.EntryPoints:
    """The entry points of a group. The first call reads the metadata of all installed packages."""
    return metadata.entry_points(group=group)


class Registry(Generic[T]):
    """Components by name, in the order of their registration.

    Args:
        kind: what messages call a component, for example ``modality``.
        group: the entry point group, for example ``mmdistill.modalities``.
    """

    def __init__(self, kind: str, group: str) -> None:
        self.kind, self.group = kind, group
        self._components: dict[str, T] = {}

    def register(self, name: str, component: T) -> T:
        """Add a component. Raises `ValueError` if the name is taken."""
        if name in self._components:
            raise ValueError(f"{self.kind} {name!r} is already registered")
        self._components[name] = component
        return component

    def unregister(self, name: str) -> None:
        """Remove a component that `register` added."""
        del self._components[name]

    def names(self) -> tuple[str, ...]:
        """Names of all components, those of entry points last. Entry points are not loaded."""
        return tuple(dict.fromkeys([*self._components, *entry_point_names(self.group)]))

    def get(self, name: str) -> T:
        """The component called `name`. An entry point is loaded on first use.

        Raises:
            InputError: there is no such component; the message lists the names.
        """
        if name not in self._components:
            found = [entry for entry in entry_points(group=self.group) if entry.name == name]
            if not found:
                names = self.names()
                hint = suggest_nearest(name, names)
                raise InputError(f"{self.kind} {name!r} is not one of {', '.join(names)}{hint}")
            self._components[name] = found[0].load()
        return self._components[name]


def entry_point_names(group: str) -> list[str]:
    """Names of the entry points of a group, sorted."""
    return sorted({entry.name for entry in entry_points(group=group)})
