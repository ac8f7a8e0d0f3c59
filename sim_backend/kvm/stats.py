"""Binary statistics (KVM_GET_STATS_FD): header, id, descriptors and data in a file that user space reads natively.

The values are stored through a mapping whenever KVM_RUN returns, so a read sees them as they were then.
"""

import errno
import mmap
import os
import struct
from typing import TYPE_CHECKING, Final

from sim_backend.kvm.dispatch import CallTable
from sim_backend.kvm.files import Files

if TYPE_CHECKING:
    from sim_backend.kvm.vcpu import Vcpu
    from sim_backend.kvm.vm import Vm

_HEADER: Final = struct.Struct("<6I")  # flags name_size num_desc id_offset desc_offset data_offset
_DESCRIPTOR: Final = struct.Struct("<IhHII")  # flags exponent size offset bucket_size, then the name
NAME_BYTES: Final = 48
CUMULATIVE: Final = 0

VM_STATS: Final = (("remote_tlb_flush", CUMULATIVE),)
"""Of each VM: only what the model counts is listed, so no statistic is a made-up zero."""
VCPU_STATS: Final = (
    ("exits", CUMULATIVE),
    ("io_exits", CUMULATIVE),
    ("mmio_exits", CUMULATIVE),
    ("signal_exits", CUMULATIVE),
    ("halt_exits", CUMULATIVE),
    ("halt_wakeup", CUMULATIVE),
)
"""Of each vCPU, by the names of its counters (`Vcpu.counters`)."""


class StatsFile:
    """One statistics file, and our own mapping of it."""

    def __init__(self, identity: str, stats: tuple[tuple[str, int], ...]) -> None:
        id_offset = _HEADER.size
        descriptors_offset = id_offset + NAME_BYTES
        data_offset = descriptors_offset + len(stats) * (_DESCRIPTOR.size + NAME_BYTES)
        parts = [
            _HEADER.pack(0, NAME_BYTES, len(stats), id_offset, descriptors_offset, data_offset),
            identity.encode().ljust(NAME_BYTES, b"\0"),
        ]
        for index, (name, kind) in enumerate(stats):
            parts.append(_DESCRIPTOR.pack(kind, 0, 1, index * 8, 0) + name.encode().ljust(NAME_BYTES, b"\0"))
        image = b"".join(parts)
        self.fd: Final = os.memfd_create("kvm-stats", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, len(image) + 8 * len(stats))
        os.pwrite(self.fd, image, 0)
        self._map: Final = mmap.mmap(self.fd, len(image) + 8 * len(stats))
        self._data_offset: Final = data_offset
        self._names: Final = tuple(name for name, _ in stats)

    def store(self, counters: dict[str, int]) -> None:
        """Publish the counters."""
        values = [counters[name] for name in self._names]
        struct.pack_into(f"<{len(values)}Q", self._map, self._data_offset, *values)

    def close(self) -> None:
        """Release the mapping."""
        self._map.close()


def publish_stats(vm: "Vm", files: Files, vcpu: "Vcpu | None" = None) -> int:
    """Make a statistics fd of `vm`, or of one of its vCPUs; it pins the VM."""
    identity = f"kvm-{os.getpid()}" if vcpu is None else f"kvm-{os.getpid()}/vcpu-{vcpu.id}"
    stats = StatsFile(identity, VM_STATS if vcpu is None else VCPU_STATS)
    owner = vm if vcpu is None else vcpu
    stats.store(owner.counters)
    owner.stats_files.append(stats)
    vm.get()

    def release() -> None:
        owner.stats_files.remove(stats)
        stats.close()
        vm.put()

    return files.add_file(stats.fd, "kvm-stats", CallTable({}, errno.ENOTTY), stats, release)
