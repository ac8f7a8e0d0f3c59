"""guest_memfd: memory of a VM that user space owns and cannot read. From KVM_CREATE_GUEST_MEMFD."""

from typing import Final

from uapi_ctypes.handle import Handle
from uapi_ctypes.kernel import Kernel, KernelMapping

FALLOC_FL_KEEP_SIZE: Final = 1
FALLOC_FL_PUNCH_HOLE: Final = 2


class GuestMemfd(Handle):
    """A guest_memfd of `size` [bytes]."""

    def __init__(self, kernel: Kernel, fd: int, size: int) -> None:
        super().__init__(kernel, fd)
        self.size = size

    def fallocate(self, mode: int, offset: int, length: int) -> None:
        """Reserve memory, or with FALLOC_FL_PUNCH_HOLE in `mode` discard it; both in [bytes]."""
        self.kernel.fallocate(self.fd, mode, offset, length)

    def punch_hole(self, offset: int, length: int) -> None:
        """Discard `length` [bytes, 4 KiB-aligned] at `offset`, in the guest too."""
        self.kernel.fallocate(self.fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length)

    def mmap(self, length: int) -> KernelMapping:
        """Map `length` [bytes] from the start; needs GUEST_MEMFD_FLAG_MMAP."""
        return self.kernel.mmap(self.fd, length)
