"""KVM_TDX_GET_CPUID: the CPUID values that the module will show to the TD's vCPUs."""

import errno
import struct
from typing import TYPE_CHECKING, Final

from sim_backend.kvm.cpuid import KVM_CPUID_FLAG_SIGNIFICANT_INDEX, KVM_MAX_CPUID_ENTRIES, CpuidEntry
from sim_backend.kvm.errors import Errno
from sim_backend.kvm.tdx.seamcalls import SUCCESS

if TYPE_CHECKING:
    from sim_backend.kvm.tdx.commands import TdxCmd
    from sim_backend.kvm.tdx.ops import TdxOps
    from sim_backend.kvm.vcpu import Vcpu

_HEADER: Final = struct.Struct("<II")  # struct kvm_cpuid2 without its entries
_CPUID_VALUES: Final = 0x9410_0003_0000_0000
_NO_SUBLEAF: Final = 0x1FE
_UNREADABLE_LEAF_BITS: Final = 0x7FFF_FF80  # bits 30:7 do not fit into a field id
_MAX_SUBLEAVES: Final = 128  # bits 7:1 of the field id
_LOW: Final = 0xFFFF_FFFF


def tdx_vcpu_get_cpuid(ops: "TdxOps", vcpu: "Vcpu", cmd: "TdxCmd") -> int:  # noqa: ARG001 - same for every vCPU
    """Write ``struct kvm_cpuid2`` to `cmd.data`.

    Raise ``Errno``: EFAULT, EIO (leaf 0 or 0x80000000 unreadable), or E2BIG with the number needed stored in
    ``nent``. Source: `tdx_vcpu_get_cpuid()`.
    """
    mm = ops.vm.mm
    (room, _) = _HEADER.unpack(mm.read(cmd.data, _HEADER.size))
    with ops.on_lp() as lp:
        entries = _read_all(ops, lp)
    if room < len(entries):
        mm.write(cmd.data, struct.pack("<I", len(entries)))
        raise Errno(errno.E2BIG)
    mm.write(cmd.data, _HEADER.pack(len(entries), 0) + b"".join(entry.pack() for entry in entries))
    return 0


def _read_all(ops: "TdxOps", lp: int) -> list[CpuidEntry]:
    entries: list[CpuidEntry] = []
    for base in (0, 0x8000_0000):
        found = _read_leaf(ops, lp, base)
        if not found:
            raise Errno(errno.EIO)
        entries += found
        for leaf in range(base + 1, found[0].eax + 1):
            entries += _read_leaf(ops, lp, leaf)
    return entries[:KVM_MAX_CPUID_ENTRIES]


def _read_leaf(ops: "TdxOps", lp: int, leaf: int) -> list[CpuidEntry]:
    """Return the entries of `leaf`: one without a sub-leaf, or one for each sub-leaf, or none at all."""
    if leaf & _UNREADABLE_LEAF_BITS:
        return []
    values = _read(ops, lp, leaf, None)
    if values is not None:
        eax, ebx, ecx, edx = values
        if leaf == 0x8000_0008:
            eax = eax & ~(0xFF << 16) | (52 if ops.td.gpaw52 else 48) << 16
        return [CpuidEntry(leaf, 0, 0, eax, ebx, ecx, edx)]
    entries = []
    for index in range(_MAX_SUBLEAVES):
        values = _read(ops, lp, leaf, index)
        if values is None:
            break
        entries.append(CpuidEntry(leaf, index, KVM_CPUID_FLAG_SIGNIFICANT_INDEX, *values))
    return entries


def _read(ops: "TdxOps", lp: int, leaf: int, subleaf: int | None) -> tuple[int, int, int, int] | None:
    field = _CPUID_VALUES | (leaf >> 31) << 16 | (leaf & 0x7F) << 9
    field |= _NO_SUBLEAF if subleaf is None else subleaf << 1
    status, eax_ebx = ops.host.seamcalls.mng_rd(lp, ops.td.tdr, field)
    if status != SUCCESS:
        return None
    status, ecx_edx = ops.host.seamcalls.mng_rd(lp, ops.td.tdr, field + 1)
    if status != SUCCESS:
        return None
    return eax_ebx & _LOW, eax_ebx >> 32, ecx_edx & _LOW, ecx_edx >> 32
