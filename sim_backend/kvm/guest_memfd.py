"""guest_memfd: memory that belongs to a guest and not to a process (`virt/kvm/guest_memfd.c`).

Two kinds of backing. Private-only files (TDs) take pages of simulated RAM from `HostPages`, and their real
descriptor stays empty, so that an mmap of it succeeds and every touch is SIGBUS. Other files keep their pages in
the memfd itself, which user space may map, and the CPU reaches them through one window of HPAs.
"""

import ctypes
import errno
import mmap
import os
import threading
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from sim_backend.kvm.errors import Errno
from sim_backend.kvm.host_pages import OutOfMemory
from sim_backend.kvm.signals import SIGNALS

if TYPE_CHECKING:
    from sim_backend.hw.memory import Window
    from sim_backend.kvm.memslots import Memslot
    from sim_backend.kvm.vm import Vm

GUEST_MEMFD_FLAG_MMAP: Final = 1
GUEST_MEMFD_FLAG_INIT_SHARED: Final = 2
FALLOC_FL_KEEP_SIZE: Final = 1
FALLOC_FL_PUNCH_HOLE: Final = 2
_FALLOC_WITHOUT_KEEP_SIZE: Final = 0xA8  # FALLOC_FL_COLLAPSE_RANGE, FALLOC_FL_INSERT_RANGE, FALLOC_FL_WRITE_ZEROES
_FALLOC_MODES: Final = (0, FALLOC_FL_PUNCH_HOLE, 0x08, 0x10, 0x20, 0x40, 0x80)
"""What vfs_fallocate() hands on: one of allocate, punch, collapse, zero, insert, unshare, write zeroes."""
EHWPOISON: Final = 133  # absent from Python's errno
_S64_MAX: Final = (1 << 63) - 1


class GuestMemfd:
    """One file of `size` [bytes]. It pins its VM; a slot does not pin it."""

    def __init__(self, vm: "Vm", size: int, flags: int) -> None:
        self.vm: Final = vm
        self.size: Final = size
        self.flags: Final = flags
        self.private_only: Final = vm.ops.gmem_is_private
        self.fd: Final = os.memfd_create("kvm-gmem", 0)
        self.bindings: list[Memslot] = []  # slots that map some of this file (vm.slots_lock)
        self.poisoned: set[int] = set()  # page indexes that answer EHWPOISON
        self.prepared: set[int] = set()  # page indexes that KVM_TDX_INIT_MEM_REGION filled (folio_test_uptodate)
        self._lock: Final = threading.Lock()
        self._pages: dict[int, int] = {}  # page index -> HPA, private-only files
        self._map: mmap.mmap | None = None
        self._window: Window | None = None
        if not self.private_only:
            os.ftruncate(self.fd, size)
        vm.gmems.append(self)

    def get_page(self, index: int) -> int:
        """Return the HPA of page `index`, allocating a zeroed one (kvm_gmem_get_pfn).

        Raise ``Errno(EHWPOISON)`` for a poisoned page and ``Errno(ENOMEM)`` when the host has no page left.
        """
        hpa = self._pages.get(index)
        if hpa is not None and not self.poisoned:
            return hpa
        if index in self.poisoned:
            raise Errno(EHWPOISON)
        if not self.private_only:
            return self._window_base() + (index << 12)
        with self._lock:
            hpa = self._pages.get(index)
            if hpa is None:
                try:
                    hpa = self.vm.host.pages.alloc_zeroed()
                except OutOfMemory:
                    raise Errno(errno.ENOMEM) from None
                self._pages[index] = hpa
            return hpa

    def private_pages(self) -> Mapping[int, int]:
        """Return page index -> HPA of what a private-only file holds."""
        return MappingProxyType(self._pages)

    def pages_in_use(self) -> int:
        """Return how many pages the file holds [4 KiB pages]."""
        if self.private_only:
            return len(self._pages)
        return os.fstat(self.fd).st_blocks // 8

    def fallocate(self, mode: int, offset: int, length: int) -> None:
        """Allocate or punch a hole, with the checks of vfs_fallocate() and kvm_gmem_fallocate() in order."""
        if not 0 <= offset <= _S64_MAX or not 0 < length <= _S64_MAX:
            raise Errno(errno.EINVAL)
        if mode & ~FALLOC_FL_KEEP_SIZE not in _FALLOC_MODES:
            raise Errno(errno.EOPNOTSUPP)
        keep_size = mode & FALLOC_FL_KEEP_SIZE
        if (mode & FALLOC_FL_PUNCH_HOLE and not keep_size) or (mode & _FALLOC_WITHOUT_KEEP_SIZE and keep_size):
            raise Errno(errno.EOPNOTSUPP)
        if offset + length > _S64_MAX:
            raise Errno(errno.EFBIG)
        if not keep_size or mode & ~(FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE):
            raise Errno(errno.EOPNOTSUPP)
        if (offset | length) & 0xFFF:
            raise Errno(errno.EINVAL)
        start, end = offset >> 12, (offset + length) >> 12
        if mode & FALLOC_FL_PUNCH_HOLE:
            with self.vm.slots_lock:
                self.punch_hole(start, end)
            return
        if offset + length > self.size:
            raise Errno(errno.EINVAL)
        if self.private_only:
            signals = SIGNALS.mark()
            for index in range(start, end):
                if SIGNALS.since(signals):
                    raise Errno(errno.EINTR)
                self.get_page(index)
        else:
            os.posix_fallocate(self.fd, offset, length)

    def punch_hole(self, start: int, end: int) -> None:
        """Unmap pages [start, end) from every guest and give them back (slots_lock held).

        The file forgets a page before it is zapped: a fault that looks later gets a new one, and an earlier one's
        mapping is still there for the zap to find.
        """
        if not self.private_only:
            self._zap_bindings(start, end)
            span = (min(end << 12, self.size)) - (start << 12)
            if span > 0:
                self._mapping().madvise(mmap.MADV_REMOVE, start << 12, span)
            return
        if self.prepared:
            self.prepared = {index for index in self.prepared if not start <= index < end}
        with self._lock:
            pages = self._pages
            if end - start > len(pages):
                gone = [index for index in pages if start <= index < end]
            else:
                gone = [index for index in range(start, end) if index in pages]
            freed = [pages.pop(index) for index in gone]
        self._zap_bindings(start, end)
        for hpa in freed:
            self.vm.host.pages.free(hpa)

    def release(self) -> None:
        """Zap, unbind and give every page back, then let the VM go (the last descriptor is closed)."""
        with self.vm.slots_lock:
            for slot in self.bindings:
                slot.gmem = None
            self._zap_bindings(0, self.size >> 12)
            self.bindings.clear()
            with self._lock:
                for hpa in self._pages.values():
                    self.vm.host.pages.free(hpa)
                self._pages.clear()
            if self._window is not None:
                self.vm.host.memory.remove_window(self._window)
                self._window = None
            self._map = None
        self.vm.gmems.remove(self)
        self.vm.put()

    def _zap_bindings(self, start: int, end: int) -> None:
        for slot in self.bindings:
            low = max(start, slot.gmem_pgoff)
            high = min(end, slot.gmem_pgoff + slot.npages)
            if low < high:
                delta = slot.base_gfn - slot.gmem_pgoff
                self.vm.ops.zap_gfn_range(low + delta, high + delta, private=True, shared=not self.private_only)

    def _mapping(self) -> mmap.mmap:
        if self._map is None:
            self._map = mmap.mmap(self.fd, self.size)
        return self._map

    def _window_base(self) -> int:
        with self._lock:
            if self._window is None:
                area = self._mapping()
                anchor = ctypes.c_char.from_buffer(area)
                pointer = ctypes.addressof(anchor)
                del anchor

                def read(offset: int, length: int) -> bytes:
                    return area[offset : offset + length]

                def write(offset: int, data: bytes) -> None:
                    area[offset : offset + len(data)] = data

                self._window = self.vm.host.memory.add_window(self.size, pointer, read, write)
            return self._window.base
