"""Query formats that the system fd and vCPU fds share."""

import errno
import struct
from collections.abc import Sequence
from typing import Final

from sim_backend.kvm.address_space import AddressSpace
from sim_backend.kvm.cpuid import CpuidEntry
from sim_backend.kvm.errors import Errno

MAX_IO_MSRS: Final = 256
_CPUID2_HEADER: Final = struct.Struct("<II")


def write_cpuid(mm: AddressSpace, argp: int, entries: Sequence[CpuidEntry], *, spare: int = 0) -> int:
    """Answer a ``struct kvm_cpuid2`` query: E2BIG, without touching nent, when the caller's array is too small."""
    nent, padding = _CPUID2_HEADER.unpack(mm.read(argp, 8))
    if nent < len(entries) + spare or nent == 0:
        raise Errno(errno.E2BIG)
    mm.write(argp + 8, b"".join(entry.pack() for entry in entries))
    mm.write(argp, _CPUID2_HEADER.pack(len(entries), padding))
    return 0
