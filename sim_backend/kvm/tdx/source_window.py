"""User pages as a source operand: TDH.MEM.PAGE.ADD takes an HPA, user space gives an address."""

import errno
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

from sim_backend.hw.memory import PAGE_SIZE
from sim_backend.kvm.errors import Errno
from sim_backend.kvm.signals import SIGNALS

if TYPE_CHECKING:
    from sim_backend.hw.memory import Window
    from sim_backend.kvm.tdx.ops import TdxOps

_WINDOW_PAGES: Final = 1 << 14  # [4 KiB pages] no larger than what is likely to succeed
_READ_BYTES: Final = 64 * PAGE_SIZE  # user memory is read ahead in blocks of this size


class SourceWindow:
    """Gives the user pages from `start` on HPAs, for as long as the context lasts."""

    def __init__(self, ops: "TdxOps", start: int, nr_pages: int) -> None:
        self._mm: Final = ops.vm.mm
        self._memory: Final = ops.host.memory
        self._end: Final = start + nr_pages * PAGE_SIZE
        self._base = 0
        self._limit = 0
        self._window: Window | None = None
        self._block = b""  # what was read last
        self._block_start = 0
        self._signals: Final = SIGNALS.mark()

    def __enter__(self) -> Self:
        """Return the window itself; it is made when the first page is wanted."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Forget the window."""
        self._drop()

    def pin(self, address: int) -> int:
        """Return the HPA of the user page at `address`; raise ``Errno(EFAULT)`` when it cannot be read."""
        if not 0 <= address - self._block_start <= len(self._block) - PAGE_SIZE:
            self._read_ahead(address)
        window = self._window
        if window is None or not self._base <= address < self._limit:
            window = self._make(address)
        return window.base + address - self._base

    def check_signals(self) -> None:
        """Raise ``Errno(EINTR)`` when a signal arrived since the window was made: the caller reissues the call."""
        if SIGNALS.since(self._signals):
            raise Errno(errno.EINTR)

    def _read_ahead(self, address: int) -> None:
        mm = self._mm
        wanted = max(min(self._end - address, _READ_BYTES), PAGE_SIZE)
        try:
            self._block = mm.read(address, wanted)
        except Errno:
            # A later page may be the one that is missing: it fails when its turn comes.
            if not mm.fault_in(address, PAGE_SIZE, write=False):
                raise
            self._block = mm.read(address, PAGE_SIZE)
        self._block_start = address

    def _make(self, address: int) -> "Window":
        self._drop()
        mm = self._mm
        length = min(max(self._end - address, PAGE_SIZE), _WINDOW_PAGES * PAGE_SIZE)

        def read(offset: int, size: int) -> bytes:
            start = address + offset - self._block_start
            if 0 <= start <= len(self._block) - size:
                return self._block[start : start + size]
            return mm.read(address + offset, size)

        def write(offset: int, data: bytes) -> None:
            mm.write(address + offset, data)

        self._base, self._limit = address, address + length
        self._window = self._memory.add_window(length, mm.pointer(address, length), read, write)
        return self._window

    def _drop(self) -> None:
        if self._window is not None:
            self._memory.remove_window(self._window)
            self._window = None
