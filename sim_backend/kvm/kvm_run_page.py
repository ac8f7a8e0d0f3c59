"""The pages behind a vCPU file descriptor: ``struct kvm_run``, the PIO data page, the coalesced-MMIO ring.

Hot paths store straight into the typed views: ``run.u32[EXIT_REASON] = KVM_EXIT_IO``.
"""

import mmap
import os
from typing import Final

RUN_PAGES: Final = 3  # what KVM_GET_VCPU_MMAP_SIZE answers, in pages
RUN_BYTES: Final = RUN_PAGES * 4096
PIO_PAGE_OFFSET: Final = 4096  # [bytes] data_offset of every KVM_EXIT_IO
COALESCED_PAGE_OFFSET: Final = 8192  # [bytes]
PIO_DATA_BYTES: Final = 4096

# Indexes into the views: byte offset divided by the view's item size (Documentation/virt/kvm/api.rst, kvm_run).
REQUEST_INTERRUPT_WINDOW: Final = 0  # u8
IMMEDIATE_EXIT: Final = 1  # u8
EXIT_REASON: Final = 8 // 4  # u32
READY_FOR_INTERRUPT_INJECTION: Final = 12  # u8
IF_FLAG: Final = 13  # u8
FLAGS: Final = 14 // 2  # u16
CR8: Final = 16 // 8  # u64
APIC_BASE: Final = 24 // 8  # u64
UNION: Final = 32  # [bytes] where the exit's own fields begin
UNION_U32: Final = UNION // 4
UNION_U64: Final = UNION // 8
KVM_VALID_REGS: Final = 288 // 8  # u64
KVM_DIRTY_REGS: Final = 296 // 8  # u64
SYNC_REGS: Final = 304  # [bytes]


DIRTY_LOG_OFFSET: Final = 64 << 12  # [bytes] of the mapping, KVM_DIRTY_LOG_PAGE_OFFSET: the dirty ring, ever empty


class KvmRunPage:
    """A vCPU's memfd and our own mapping of it, under four views. User space maps the same file natively."""

    __slots__ = ("_map", "fd", "u8", "u16", "u32", "u64")

    def __init__(self, dirty_ring_bytes: int = 0) -> None:
        self.fd = os.memfd_create("kvm-vcpu", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, DIRTY_LOG_OFFSET + dirty_ring_bytes if dirty_ring_bytes else RUN_BYTES)
        self._map = mmap.mmap(self.fd, RUN_BYTES)
        self.u8 = memoryview(self._map)
        self.u16 = self.u8.cast("H")
        self.u32 = self.u8.cast("I")
        self.u64 = self.u8.cast("Q")

    def release(self) -> None:
        """Unmap our view. The descriptor is the file table's to close."""
        for view in (self.u64, self.u32, self.u16, self.u8):
            view.release()
        self._map.close()
