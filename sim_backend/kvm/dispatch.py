"""The table from request number to handler of one open file: what an ioctl costs before its own work."""

import errno
from collections.abc import Callable
from typing import TypeAlias

IoctlHandler: TypeAlias = Callable[[int], int]


class CallTable(dict[int, IoctlHandler]):
    """Handlers of one open file by full 32-bit request number; `unknown` is the errno of every other request.

    A dead VM is an empty table that says EIO, so the gate in front of every ioctl costs nothing while it lives.
    """

    __slots__ = ("unknown",)

    def __init__(self, handlers: dict[int, IoctlHandler], unknown: int) -> None:
        super().__init__(handlers)
        self.unknown = unknown

    def kill(self) -> None:
        """Answer EIO to everything from now on."""
        self.unknown = errno.EIO
        self.clear()
