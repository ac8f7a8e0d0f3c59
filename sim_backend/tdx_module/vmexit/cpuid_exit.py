"""CPUID in a TD.

Spec: TDX Module Base Spec, "CPUID Virtualization".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from sim_backend.cpu.engine import Cpu, ExitReason
from sim_backend.hw.gprs import RAX, RBX, RCX, RDX, Gprs
from sim_backend.tdx_module.cpuid_virtualization import CPUID_LOOKUP, clamp_leaf, cpuid_index
from sim_backend.tdx_module.event_injection import inject_ve
from sim_backend.tdx_module.metadata_sys import capabilities_of
from sim_backend.tdx_module.outcome import Outcome

if TYPE_CHECKING:
    from sim_backend.tdx_module.module import TdxModule
    from sim_backend.tdx_module.tdvps import Tdvps

_CPUID: Final = int(ExitReason.CPUID)
_CR4_OSXSAVE: Final = 1 << 18
_CR4_PKE: Final = 1 << 22
_ECX_OSXSAVE: Final = 1 << 27
_ECX_OSPKE: Final = 1 << 4
_EBX_HLE_RTM: Final = 1 << 4 | 1 << 11
_EDX_SYSCALL: Final = 1 << 11
_IA32_TSX_CTRL: Final = 0x122
_TSX_CPUID_CLEAR: Final = 1 << 1
_SUPERVISOR_VE: Final = 1
_USER_VE: Final = 2


def cpuid_exit(module: TdxModule, lp: int, regs: Gprs, tdvps: Tdvps) -> Outcome:  # noqa: ARG001
    """Answer CPUID from the TD's configuration, or let the guest: #VE."""
    cpu = tdvps.cpu
    assert cpu is not None, "a running vCPU has a CPU"
    gprs = cpu.gprs
    leaf = clamp_leaf(gprs[RAX] & 0xFFFF_FFFF, capabilities_of(module).last_extended_leaf)
    subleaf = gprs[RCX] & 0xFFFF_FFFF
    index = cpuid_index(leaf, subleaf)
    if index is None or CPUID_LOOKUP[index].faulting or _guest_wants_ve(tdvps, cpu, index):
        inject_ve(tdvps, _CPUID)
        return Outcome.RESUME
    low, high = tdvps.tdr.tdcs.cpuid_values[index]
    gprs[RAX], gprs[RBX] = low & 0xFFFF_FFFF, low >> 32
    gprs[RCX], gprs[RDX] = high & 0xFFFF_FFFF, high >> 32
    _apply_dynamic_bits(module, tdvps, cpu, leaf, subleaf)
    return Outcome.COMPLETED


def _guest_wants_ve(tdvps: Tdvps, cpu: Cpu, index: int) -> bool:
    control = tdvps.cpuid_control[index]
    if cpu.cpl() == 0:
        return bool(tdvps.cpuid_supervisor_ve or control & _SUPERVISOR_VE)
    return bool(tdvps.cpuid_user_ve or control & _USER_VE)


def _apply_dynamic_bits(module: TdxModule, tdvps: Tdvps, cpu: Cpu, leaf: int, subleaf: int) -> None:
    """Set the bits that depend on the vCPU and on what its guest has enabled."""
    gprs = cpu.gprs
    if leaf == 0x1:
        gprs[RBX] = gprs[RBX] & 0x00FF_FFFF | (tdvps.vcpu_index & 0xFF) << 24
        osxsave = cpu.get_state().cr4 & _CR4_OSXSAVE
        gprs[RCX] = gprs[RCX] & ~_ECX_OSXSAVE | (_ECX_OSXSAVE if osxsave else 0)
    elif leaf == 0x7 and subleaf == 0:
        state = cpu.get_state()
        if tdvps.tdr.tdcs.cpuid_flags.tsx and state.msrs.get(_IA32_TSX_CTRL, 0) & _TSX_CPUID_CLEAR:
            gprs[RBX] &= ~_EBX_HLE_RTM
        gprs[RCX] = gprs[RCX] & ~_ECX_OSPKE | (_ECX_OSPKE if state.cr4 & _CR4_PKE else 0)
    elif leaf == 0xD and subleaf <= 1:
        gprs[RBX] = module.platform.cpuid_regs(leaf, subleaf)[1]
    elif leaf == 0x8000_0001:
        gprs[RDX] = gprs[RDX] & ~_EDX_SYSCALL | (_EDX_SYSCALL if cpu.in_64bit_mode() else 0)
