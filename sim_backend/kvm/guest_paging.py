"""Walking an unprotected guest's page tables from the outside, for KVM_TRANSLATE and the emulator."""

import errno
import struct
from typing import TYPE_CHECKING, Final

from sim_backend.kvm.errors import Errno

if TYPE_CHECKING:
    from sim_backend.kvm.vcpu import Vcpu
    from sim_backend.kvm.vm import Vm

_PRESENT: Final = 1
_LARGE: Final = 1 << 7
_ADDRESS: Final = (1 << 52) - (1 << 12)
CR0_PG: Final = 1 << 31
CR4_PSE: Final = 1 << 4
CR4_PAE: Final = 1 << 5
CR4_LA57: Final = 1 << 12
EFER_LMA: Final = 1 << 10


def read_guest(vm: "Vm", gpa: int, length: int) -> bytes | None:
    """Read guest-physical memory through the slots (kvm_read_guest); None where there is none."""
    parts = []
    while length:
        size = min(length, 4096 - (gpa & 0xFFF))
        part = _read_page(vm, gpa, size)
        if part is None:
            return None
        parts.append(part)
        gpa, length = gpa + size, length - size
    return b"".join(parts)


def _read_page(vm: "Vm", gpa: int, size: int) -> bytes | None:
    gfn = gpa >> 12
    slot = vm.find_memslot(gfn)
    if slot is None:
        return None
    try:
        # Always through the HVA, whatever the attributes and the guest_memfd say.
        return slot.mm.read(slot.hva(gfn) + (gpa & 0xFFF), size)
    except Errno:
        return None


def write_guest(vm: "Vm", gpa: int, data: bytes) -> bool:
    """Write guest-physical memory through the slots (kvm_write_guest); False where that is impossible."""
    offset = 0
    while offset < len(data):
        size = min(len(data) - offset, 4096 - (gpa & 0xFFF))
        gfn = gpa >> 12
        slot = vm.find_memslot(gfn)
        if slot is None or slot.flags & 2:
            return False
        try:
            slot.mm.write(slot.hva(gfn) + (gpa & 0xFFF), data[offset : offset + size])
        except Errno as error:
            if error.errno != errno.EFAULT:
                raise
            return False
        slot.mark_dirty(gfn)
        gpa, offset = gpa + size, offset + size
    return True


def read_pdptrs(vcpu: "Vcpu", cr3: int) -> list[int]:
    """Return the four PDPTRs at `cr3`."""
    data = read_guest(vcpu.vm, cr3 & 0xFFFF_FFE0, 32)
    return list(struct.unpack("<4Q", data)) if data is not None else [0, 0, 0, 0]


def translate(vcpu: "Vcpu", linear: int) -> int | None:
    """Return the guest-physical address of `linear`, or None where it is not mapped."""
    cpu = vcpu.cpu
    if cpu is None:
        return linear
    state = cpu.get_state()
    if not state.cr0 & CR0_PG:
        return linear
    vm = vcpu.vm
    if not state.cr4 & CR4_PAE:
        return _walk32(vm, state.cr3, linear & 0xFFFF_FFFF, bool(state.cr4 & CR4_PSE))
    if state.efer & EFER_LMA:
        levels = 5 if state.cr4 & CR4_LA57 else 4
        return _walk64(vm, state.cr3 & _ADDRESS, linear, levels)
    pdpte = read_pdptrs(vcpu, state.cr3)[linear >> 30 & 3]
    return _walk64(vm, pdpte & _ADDRESS, linear, 2) if pdpte & _PRESENT else None


def _walk64(vm: "Vm", table: int, linear: int, levels: int) -> int | None:
    for level in range(levels, 0, -1):
        shift = 12 + 9 * (level - 1)
        data = read_guest(vm, table + (linear >> shift & 511) * 8, 8)
        if data is None:
            return None
        entry = int.from_bytes(data, "little")
        if not entry & _PRESENT:
            return None
        if level == 1 or (entry & _LARGE and level <= 3):
            mask = (1 << shift) - 1
            return entry & _ADDRESS & ~mask | linear & mask
        table = entry & _ADDRESS
    return None


def _walk32(vm: "Vm", cr3: int, linear: int, pse: bool) -> int | None:
    data = read_guest(vm, (cr3 & 0xFFFF_F000) + (linear >> 22) * 4, 4)
    if data is None:
        return None
    entry = int.from_bytes(data, "little")
    if not entry & _PRESENT:
        return None
    if entry & _LARGE and pse:
        return entry & 0xFFC0_0000 | (entry >> 13 & 0xFF) << 32 | linear & 0x3F_FFFF
    data = read_guest(vm, (entry & 0xFFFF_F000) + (linear >> 12 & 1023) * 4, 4)
    if data is None:
        return None
    entry = int.from_bytes(data, "little")
    return entry & 0xFFFF_F000 | linear & 0xFFF if entry & _PRESENT else None
