"""The simulated kernel's open files: real descriptors, so numbers never clash and mmap is native.

A file lives until its descriptor is closed and nothing maps it; then `release` runs, which may let go of a VM and
so of much more. The table only knows descriptors that the simulator made.
"""

import os
import threading
from collections.abc import Callable
from typing import Any, Final

from sim_backend.kvm.dispatch import CallTable


class OpenFile:
    """An open file description of the simulated kernel."""

    __slots__ = ("_lock", "_references", "calls", "fd", "kind", "object", "release")

    def __init__(self, fd: int, kind: str, calls: CallTable, target: Any, release: Callable[[], None]) -> None:
        self.fd = fd
        self.kind = kind  # kvm | kvm-vm | kvm-vcpu | kvm-gmem | kvm-stats | kvm-device
        self.calls = calls
        self.object = target
        self.release = release
        self._references = 1
        self._lock = threading.Lock()

    def get(self) -> None:
        """Take a reference, for a mapping."""
        with self._lock:
            self._references += 1

    def put(self) -> None:
        """Give a reference back; the last one releases the object."""
        with self._lock:
            self._references -= 1
            if self._references:
                return
        self.release()


class FdTable:
    """Descriptor number to open file."""

    def __init__(self) -> None:
        self.files: Final[dict[int, OpenFile]] = {}
        self.calls: Final[dict[int, CallTable]] = {}  # the same keys; what the fast path looks at

    def install(self, file: OpenFile) -> int:
        """Publish `file` and return its descriptor number."""
        self.files[file.fd] = file
        self.calls[file.fd] = file.calls
        return file.fd

    def close(self, fd: int) -> None:
        """Close `fd` and drop its reference. Raise ``OSError`` when it is no open descriptor."""
        file = self.files.pop(fd, None)
        self.calls.pop(fd, None)
        os.close(fd)
        if file is not None:
            file.put()

    def close_all(self) -> None:
        """Close everything, as process exit does."""
        for fd in list(self.files):
            self.close(fd)
