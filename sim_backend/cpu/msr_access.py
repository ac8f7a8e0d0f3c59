"""RDMSR and WRMSR of what the MSR policy leaves to the CPU itself."""

from typing import TYPE_CHECKING, Final

from sim_backend.cpu import unicorn_internals as u
from sim_backend.cpu.virtual_apic import X2APIC_MSRS

if TYPE_CHECKING:
    from sim_backend.cpu.unicorn_cpu import UnicornCpu

MSR_EFER: Final = 0xC000_0080
MSR_FS_BASE: Final = 0xC000_0100
MSR_GS_BASE: Final = 0xC000_0101
_BASES: Final = {MSR_FS_BASE: (u.ENV_SEGS + 24 * 4 + 8) >> 3, MSR_GS_BASE: (u.ENV_SEGS + 24 * 5 + 8) >> 3}
_EFER_WRITABLE: Final = 0xD01  # SCE, LME, NXE; LMA is kept
_EFER_LMA: Final = 1 << 10
_CANONICAL: Final = frozenset((0x175, 0x176, 0xC000_0082, 0xC000_0083, 0xC000_0100, 0xC000_0101, 0xC000_0102))

MIRRORED: Final = {  # TCG executes from these: (offset, bytes)
    0x174: (u.ENV_SYSENTER_CS, 4),
    0xC000_0081: (u.ENV_STAR, 8),
    0xC000_0102: (u.ENV_KERNEL_GS_BASE, 8),
    0xC000_0103: (u.ENV_TSC_AUX, 8),
}


def read_msr(cpu: "UnicornCpu", msr: int) -> int:
    """Return the MSR; raise ``KeyError`` when the CPU has none with that number."""
    if msr == MSR_EFER:
        return cpu.quads[u.ENV_EFER >> 3]
    base = _BASES.get(msr)
    if base is not None:
        return cpu.quads[base]
    if msr in X2APIC_MSRS and cpu.virtual_apic is not None:
        return cpu.virtual_apic.read_msr(msr)
    value = cpu.msrs[msr]
    mirror = MIRRORED.get(msr)
    if mirror is not None:
        offset, width = mirror
        return int.from_bytes(cpu.instance.raw[offset : offset + width], "little")
    return value


def write_msr(cpu: "UnicornCpu", msr: int, value: int) -> None:
    """Store into the MSR; raise ``KeyError`` or ``ValueError`` where the CPU raises #GP, or `ApicWriteExit`."""
    if msr in _CANONICAL and (value + (1 << 56)) % (1 << 64) >= 1 << 57:
        raise ValueError(f"{value:#x} is not canonical")
    if msr == MSR_EFER:
        if value & ~(_EFER_WRITABLE | _EFER_LMA):
            raise ValueError(f"EFER {value:#x} has reserved bits")
        state = cpu.get_system_state()
        state.efer = value
        cpu.set_system_state(state)
        return
    base = _BASES.get(msr)
    if base is not None:
        cpu.quads[base] = value
        return
    if msr in X2APIC_MSRS and cpu.virtual_apic is not None:
        cpu.virtual_apic.write_msr(msr, value)
        return
    if msr not in cpu.msrs:
        raise KeyError(msr)
    cpu.msrs[msr] = value
    mirror = MIRRORED.get(msr)
    if mirror is not None:
        store_mirror(cpu, *mirror, value)


def store_mirror(cpu: "UnicornCpu", offset: int, width: int, value: int) -> None:
    """Store an MSR into the place from which TCG executes."""
    cpu.instance.raw[offset : offset + width] = (value & ((1 << 8 * width) - 1)).to_bytes(width, "little")
