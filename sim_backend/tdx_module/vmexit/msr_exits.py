"""RDMSR and WRMSR of MSRs that a TD does not access natively.

Spec: TDX Module Base Spec, "MSR Handling"; ABI Reference, "MSR Virtualization".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from sim_backend.cpu.engine import ExitReason
from sim_backend.hw.gprs import RAX, RCX, RDX, Gprs
from sim_backend.tdx_module.event_injection import inject_gp, inject_ve
from sim_backend.tdx_module.metadata_sys import capabilities_of
from sim_backend.tdx_module.msr_virtualization import MsrAction, action
from sim_backend.tdx_module.outcome import Outcome
from sim_backend.tdx_module.td_params import ATTR_PERFMON
from sim_backend.tdx_module.td_vmcs import IA32_DEBUGCTL

if TYPE_CHECKING:
    from sim_backend.tdx_module.module import TdxModule
    from sim_backend.tdx_module.tdvps import Tdvps

_LOW: Final = 0xFFFF_FFFF
_MSR_READ: Final = int(ExitReason.MSR_READ)
_MSR_WRITE: Final = int(ExitReason.MSR_WRITE)

_XAPIC_DISABLE_STATUS: Final = 0xBD
_ARCH_CAPABILITIES: Final = 0x10A
_MISC_ENABLE: Final = 0x1A0
_DEBUGCTL: Final = 0x1D9
_PERF_CAPABILITIES: Final = 0x345
_XSS: Final = 0xDA0
_EFER: Final = 0xC000_0080

_LEGACY_XAPIC_DISABLED: Final = 1
_MISC_PERFMON_AVAILABLE: Final = 1 << 7
_MISC_PEBS_UNAVAILABLE: Final = 1 << 12
_PERF_PEBS_TO_PT: Final = 1 << 16
_DEBUGCTL_TR: Final = 1 << 6
_DEBUGCTL_BTS: Final = 1 << 7
_DEBUGCTL_UNCORE_PMI: Final = 1 << 13
_DEBUGCTL_RESERVED: Final = 7 << 3 | (1 << 64) - (1 << 16)
_EFER_SCE: Final = 1 << 0
_EFER_LMA: Final = 1 << 10


def rdmsr_exit(module: TdxModule, lp: int, regs: Gprs, tdvps: Tdvps) -> Outcome:  # noqa: ARG001
    """Read a virtualised MSR, or let the guest: #VE; one that the TD does not have is a #GP(0)."""
    cpu = tdvps.cpu
    assert cpu is not None, "a running vCPU has a CPU"
    msr = cpu.gprs[RCX] & _LOW
    what = action(msr, write=False, flags=tdvps.tdr.tdcs.cpuid_flags)
    if what is not MsrAction.EMULATED:
        return _refuse(tdvps, what, _MSR_READ)
    value = _read(module, lp, tdvps, msr)
    cpu.gprs[RAX], cpu.gprs[RDX] = value & _LOW, value >> 32
    return Outcome.COMPLETED


def _refuse(tdvps: Tdvps, what: MsrAction, reason: int) -> Outcome:
    if what is MsrAction.VE:
        inject_ve(tdvps, reason)
    else:
        inject_gp(tdvps)
    return Outcome.RESUME


def _read(module: TdxModule, lp: int, tdvps: Tdvps, msr: int) -> int:
    tdcs = tdvps.tdr.tdcs
    if msr == _ARCH_CAPABILITIES:
        return tdcs.virtual_ia32_arch_capabilities
    if msr == _XAPIC_DISABLE_STATUS:
        return _LEGACY_XAPIC_DISABLED
    if msr == _MISC_ENABLE:
        return module.platform.rdmsr(lp, _MISC_ENABLE) & ~_MISC_PERFMON_AVAILABLE | _MISC_PEBS_UNAVAILABLE
    if msr == _DEBUGCTL:
        return tdvps.vmcs.get(IA32_DEBUGCTL, 0) & ~_DEBUGCTL_UNCORE_PMI
    if msr == _PERF_CAPABILITIES:
        if not tdcs.attributes & ATTR_PERFMON:
            return 0
        return capabilities_of(module).perf_capabilities & ~_PERF_PEBS_TO_PT
    return tdcs.virtual_vmx_msrs[msr]


def wrmsr_exit(module: TdxModule, lp: int, regs: Gprs, tdvps: Tdvps) -> Outcome:  # noqa: ARG001
    """Write a virtualised MSR, or let the guest: #VE; a value that the TD may not write is a #GP(0)."""
    cpu = tdvps.cpu
    assert cpu is not None, "a running vCPU has a CPU"
    gprs = cpu.gprs
    msr = gprs[RCX] & _LOW
    what: MsrAction | None = action(msr, write=True, flags=tdvps.tdr.tdcs.cpuid_flags)
    if what is MsrAction.EMULATED:
        what = _write(module, tdvps, msr, (gprs[RDX] & _LOW) << 32 | gprs[RAX] & _LOW)
    return Outcome.COMPLETED if what is None else _refuse(tdvps, what, _MSR_WRITE)


def _write(module: TdxModule, tdvps: Tdvps, msr: int, value: int) -> MsrAction | None:
    if msr == _DEBUGCTL:
        return _write_debugctl(tdvps, value)
    cpu = tdvps.cpu
    assert cpu is not None, "a running vCPU has a CPU"
    state = cpu.get_state()
    if msr == _XSS:
        if value & ~(capabilities_of(module).xss_supported & tdvps.tdr.tdcs.xfam):
            return MsrAction.GP
        state.msrs[_XSS] = value
    else:
        assert msr == _EFER, "the other emulated MSRs are read-only"
        value = value & ~_EFER_LMA | state.efer & _EFER_LMA
        if (value ^ state.efer) & ~_EFER_SCE:
            return MsrAction.VE
        state.efer = value
    cpu.set_state(state)
    return None


def _write_debugctl(tdvps: Tdvps, value: int) -> MsrAction | None:
    if value & _DEBUGCTL_RESERVED:
        return MsrAction.GP
    if value & _DEBUGCTL_TR and not value & _DEBUGCTL_BTS:
        return MsrAction.VE
    kept = tdvps.vmcs.get(IA32_DEBUGCTL, 0) & _DEBUGCTL_UNCORE_PMI
    tdvps.vmcs[IA32_DEBUGCTL] = value & ~_DEBUGCTL_UNCORE_PMI | kept
    return None
