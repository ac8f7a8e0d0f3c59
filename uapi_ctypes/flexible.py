"""Structures with a flexible array member: a header with a count, and entries behind it."""

import ctypes
from collections.abc import Iterable
from typing import Any, ClassVar, Generic, Self, TypeVar

Entry = TypeVar("Entry")


class Flexible(ctypes.Structure, Generic[Entry]):
    """Base of the variable-length structures: `allocate` one, then pass it to an ioctl by address.

    The capacity is fixed when the buffer is allocated. The count field may be set to anything afterwards, but
    a kernel writes as many entries as it says: one larger than the capacity lets it write past the buffer.
    """

    _entry_: ClassVar[type[Any]]
    _count_: ClassVar[str]
    """Field that holds the count; dots reach into nested structures."""
    _entries_offset_: ClassVar[int | None] = None
    """Where the entries begin [bytes]; the end of the header by default."""

    @classmethod
    def _offset(cls) -> int:
        return ctypes.sizeof(cls) if cls._entries_offset_ is None else cls._entries_offset_

    @classmethod
    def allocate(cls, capacity: int) -> Self:
        """Return a zeroed structure with room for `capacity` entries, its count field set to `capacity`."""
        made = cls()
        needed = cls._offset() + capacity * ctypes.sizeof(cls._entry_)
        size = max(needed, ctypes.sizeof(cls))
        ctypes.resize(made, size)
        ctypes.memset(ctypes.addressof(made), 0, size)  # resize leaves what it adds as it found it
        made.count = capacity
        return made

    @classmethod
    def of(cls, entries: Iterable[Entry]) -> Self:
        """Return a structure that holds exactly `entries`."""
        wanted = list(entries)
        made = cls.allocate(len(wanted))
        array = made.entries
        for index, entry in enumerate(wanted):
            array[index] = entry
        return made

    @property
    def capacity(self) -> int:
        """How many entries the buffer has room for."""
        return (ctypes.sizeof(self) - self._offset()) // ctypes.sizeof(self._entry_)

    @property
    def count(self) -> int:
        """The count field."""
        value: Any = self
        for name in self._count_.split("."):
            value = getattr(value, name)
        return int(value)

    @count.setter
    def count(self, value: int) -> None:
        *path, last = self._count_.split(".")
        target: Any = self
        for name in path:
            target = getattr(target, name)
        setattr(target, last, value)

    @property
    def entries(self) -> "ctypes.Array[Any]":
        """All entries there is room for, in place: writing to them writes to the structure."""
        array: ctypes.Array[Any] = (self._entry_ * self.capacity).from_buffer(self, self._offset())
        return array

    def filled(self) -> list[Entry]:
        """Return the entries that the count field says are valid."""
        return list(self.entries[: min(self.count, self.capacity)])
