"""The seam: the few system calls through which everything above reaches a kernel, real or simulated."""

import ctypes
import os
from typing import Any, Protocol, TypeAlias, TypeVar

CData = TypeVar("CData", bound=ctypes.Structure | ctypes.Union | ctypes.Array[Any])

IoctlArg: TypeAlias = "int | ctypes.Structure | ctypes.Union | ctypes.Array[Any]"
"""A number (or a raw address), or an object that is passed by address and written back in place."""


class KernelMapping(Protocol):
    """A shared mapping of a file descriptor. It pins the file until it is closed, as mmap(2) does."""

    address: int
    """HVA of the first byte [bytes, 4 KiB-aligned]."""
    length: int
    """[bytes]."""

    @property
    def memory(self) -> memoryview:
        """The bytes, writable, without a copy."""

    def view(self, layout: type[CData], offset: int = 0) -> CData:
        """Overlay `layout` at `offset` [bytes], without a copy. Raise ``ValueError`` past the end."""

    def close(self) -> None:
        """Unmap. Idempotent. Views that are still held stay safe to touch and read zeros."""


class Kernel(Protocol):
    """The system calls. Every failure raises `KvmError`; nothing returns -1."""

    name: str
    """``linux`` or ``sim:<profile>``."""

    def open(self, path: str, flags: int = os.O_RDWR | os.O_CLOEXEC) -> int:
        """Open `path` and return the file descriptor."""

    def ioctl(self, fd: int, request: int, arg: IoctlArg = 0) -> int:
        """Issue `request` and return its non-negative result."""

    def fallocate(self, fd: int, mode: int, offset: int, length: int) -> None:
        """Reserve or punch space from `offset` on [bytes]; the flags are those of the system call."""

    def mmap(self, fd: int, length: int) -> KernelMapping:
        """Map `length` [bytes] of `fd` from its start, shared, readable and writable."""

    def close(self, fd: int) -> None:
        """Close `fd`; the last close of a KVM object destroys it."""
