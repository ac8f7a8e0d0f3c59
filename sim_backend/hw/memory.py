"""The host's physical memory: sparse RAM, and windows onto memory that user space owns.

RAM is one memfd mapping of the whole installed size. Pages cost nothing until they are written, so a
host of 512 GiB is as cheap as one of 1 GiB. HPAs here never carry HKID bits: strip them first.

No encryption or integrity is modelled: a read sees the bytes last written, whatever the KeyID.
"""

import ctypes
import mmap
import os
import threading
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

PAGE_SIZE: Final = 4096
_MAP_NORESERVE: Final = 0x4000
_WINDOW_BASE: Final = 1 << 45  # 32 TiB: above any RAM a profile may have, below the HKID bits


@dataclass(frozen=True, slots=True)
class Window:
    """A range of HPAs that stands for somebody else's memory (a user mapping, a shared guest_memfd)."""

    base: int  # HPA [bytes, 4 KiB-aligned]
    length: int  # [bytes, multiple of 4 KiB]
    pointer: int  # HVA in this process that the CPU may map, or 0 when there is none
    read: Callable[[int, int], bytes]  # (offset, length) -> bytes; OSError(EFAULT) when it is gone
    write: Callable[[int, bytes], None]  # (offset, data); OSError(EFAULT) when it is gone


class PhysicalMemory:
    """RAM of `ram_bytes` at HPA 0, and the windows above it.

    `q` and `b` are the whole RAM as 64-bit words and as bytes: ``memory.q[hpa >> 3]``. Code on a hot
    path uses them directly; they do not reach windows. Whoever reads and writes back a word that another thread
    may change holds `locked_instruction`, which stands for the LOCK prefix.
    """

    def __init__(self, ram_bytes: int) -> None:
        if ram_bytes <= 0 or ram_bytes % PAGE_SIZE:
            raise ValueError(f"RAM of {ram_bytes} bytes is not a positive multiple of {PAGE_SIZE}")
        self.ram_bytes: Final = ram_bytes
        self.fd: Final = os.memfd_create("tdxhw-ram", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, ram_bytes)
        self._map: Final = mmap.mmap(self.fd, ram_bytes, flags=mmap.MAP_SHARED | _MAP_NORESERVE)
        self.b: Final = memoryview(self._map)
        self.q: Final = self.b.cast("Q")
        self.locked_instruction: Final = threading.Lock()
        anchor = ctypes.c_char.from_buffer(self._map)
        self.pointer: Final = ctypes.addressof(anchor)
        del anchor
        self._windows: dict[int, Window] = {}
        self._window_bases: list[int] = []
        self._free_windows: list[tuple[int, int]] = []
        self._next_window = _WINDOW_BASE

    def close(self) -> None:
        """Give the memory back. The object is unusable afterwards."""
        self.q.release()
        self.b.release()
        self._map.close()
        os.close(self.fd)

    def read(self, hpa: int, length: int) -> bytes:
        """Return `length` bytes at `hpa`; raise ``OSError(EFAULT)`` in a window whose memory is gone."""
        if hpa + length <= self.ram_bytes:
            return bytes(self.b[hpa : hpa + length])
        window = self.window_at(hpa)
        return window.read(hpa - window.base, length)

    def write(self, hpa: int, data: bytes | bytearray | memoryview) -> None:
        """Store `data` at `hpa`; raise ``OSError(EFAULT)`` in a window whose memory is gone."""
        if hpa + len(data) <= self.ram_bytes:
            self.b[hpa : hpa + len(data)] = data
            return
        window = self.window_at(hpa)
        window.write(hpa - window.base, bytes(data))

    def zero_page(self, hpa: int) -> None:
        """Fill the 4 KiB RAM page at `hpa` with zeros."""
        self.b[hpa : hpa + PAGE_SIZE] = _ZERO_PAGE

    def discard(self, hpa: int, length: int) -> None:
        """Punch a hole in RAM [bytes, 4 KiB-aligned]: the range reads as zeros and costs nothing again."""
        self._map.madvise(mmap.MADV_REMOVE, hpa, length)

    def add_window(
        self,
        length: int,
        pointer: int,
        read: Callable[[int, int], bytes],
        write: Callable[[int, bytes], None],
    ) -> Window:
        """Give foreign memory of `length` bytes [multiple of 4 KiB] a range of HPAs."""
        span = (length + (1 << 21) - 1) & -(1 << 21)
        reusable = next((base for base, size in self._free_windows if size == span), None)
        if reusable is None:
            base = self._next_window
            self._next_window += span
        else:
            base = reusable
            self._free_windows.remove((base, span))
        window = Window(base, length, pointer, read, write)
        self._windows[base] = window
        self._window_bases = sorted(self._windows)
        return window

    def remove_window(self, window: Window) -> None:
        """Forget `window`: its HPAs become unused."""
        del self._windows[window.base]
        self._window_bases = sorted(self._windows)
        self._free_windows.append((window.base, (window.length + (1 << 21) - 1) & -(1 << 21)))

    def window_at(self, hpa: int) -> Window:
        """Return the window that holds `hpa`; raise ``IndexError`` when no memory is there at all."""
        index = bisect_right(self._window_bases, hpa) - 1
        if index >= 0:
            window = self._windows[self._window_bases[index]]
            if hpa < window.base + window.length:
                return window
        raise IndexError(f"no memory at HPA {hpa:#x}")

    def backing(self, hpa: int) -> tuple[int, int, int]:
        """Return (HPA base, length, HVA) of the region that holds `hpa`, for a CPU that maps it."""
        if hpa < self.ram_bytes:
            return 0, self.ram_bytes, self.pointer
        window = self.window_at(hpa)
        return window.base, window.length, window.pointer


_ZERO_PAGE: Final = bytes(PAGE_SIZE)
