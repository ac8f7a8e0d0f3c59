"""The layout of a structure, whoever describes it: a kernel's type information or the binding's ctypes."""

import ctypes
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Field:
    """Where a field is, and how long: both [bytes]."""

    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Layout:
    """A structure. Paths lead into nested structures (``debug.arch.pc``); anonymous ones leave no trace in them."""

    size: int
    fields: Mapping[str, Field]


@dataclass(frozen=True, slots=True)
class Enumeration:
    """An enumeration: its size [bytes] and its values by name."""

    size: int
    values: Mapping[str, int]


def of_ctypes(structure: type[Any]) -> Layout:
    """Return the layout of a ctypes structure or union."""
    return Layout(ctypes.sizeof(structure), dict(_members(structure, "", 0)))


def _members(structure: Any, prefix: str, base: int) -> Iterator[tuple[str, Field]]:
    anonymous = getattr(structure, "_anonymous_", ())
    for name, kind, *_ in structure._fields_:
        offset = base + getattr(structure, name).offset
        inner = prefix
        if name not in anonymous:
            yield f"{prefix}{name}", Field(offset, ctypes.sizeof(kind))
            inner = f"{prefix}{name}."
        if isinstance(kind, type) and issubclass(kind, (ctypes.Structure, ctypes.Union)):
            yield from _members(kind, inner, offset)
