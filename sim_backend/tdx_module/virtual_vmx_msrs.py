"""The VMX capability MSRs that an L1 guest reads: what it may ask of its L2 VMs.

Each is the L2 VMCS's initial value with the bits that L1 may vary (TDX Module Base Spec, "TD Partitioning"; Intel SDM
Vol. 3, Appendix A).
"""

from typing import Final

from sim_backend.tdx_module.cpu_capabilities import CpuCapabilities
from sim_backend.tdx_module.cpuid_virtualization import CpuidFlags
from sim_backend.tdx_module.td_params import ATTR_DEBUG, ATTR_PERFMON, ATTR_PKS, XFAM_CET

IA32_VMX_BASIC: Final = 0x480
_L2_CR0_INIT: Final = 0x21
_L2_CR0_VARIABLE: Final = 0x8005_001F
_L2_CR4_INIT: Final = 0x2040
_L2_CR4_VARIABLE: Final = 0x03FF_1FBF

_MWAIT_EXITING: Final = 1 << 10
_RDPMC_EXITING: Final = 1 << 11
_MONITOR_EXITING: Final = 1 << 29
_EN_GUEST_WAIT_PAUSE: Final = 1 << 26
_EN_PCONFIG: Final = 1 << 27
_EXIT_PERF_GLOBAL_CTRL: Final = 1 << 12 | 1 << 30
_ENTRY_PERF_GLOBAL_CTRL: Final = 1 << 13
_ENTRY_PKRS: Final = 1 << 22
_CR4_PKE, _CR4_CET, _CR4_PKS, _CR4_UINTR, _CR4_KL = 1 << 22, 1 << 23, 1 << 24, 1 << 25, 1 << 19


def _set(value: int, bits: int, *, on: bool) -> int:
    return value | bits if on else value & ~bits


def _allowed(initial: int, variable: int) -> int:
    """Return the MSR: allowed-0 settings in the low half, allowed-1 settings in the high half."""
    return initial & ~variable | (initial | variable) << 32


def base_l2_cr4_write_mask(capabilities: CpuCapabilities, attributes: int, xfam: int) -> int:
    """Return the CR4 bits that the guest of a TD with this configuration may change."""
    mask = _L2_CR4_VARIABLE & ~capabilities.cr4_fixed0 & capabilities.cr4_fixed1 & ~_CR4_KL
    for bit, enabled in (
        (_CR4_PKE, xfam & 1 << 9),
        (_CR4_CET, xfam & XFAM_CET == XFAM_CET),
        (_CR4_UINTR, xfam & 1 << 14),
        (_CR4_PKS, attributes & ATTR_PKS),
    ):
        if not enabled:
            mask &= ~bit
    return mask


def virtual_vmx_msrs(capabilities: CpuCapabilities, attributes: int, xfam: int, flags: CpuidFlags) -> dict[int, int]:
    """Return {MSR: virtual value} for a TD with this configuration."""
    l2 = capabilities.l2_controls
    perfmon = bool(attributes & ATTR_PERFMON)
    perf_global = bool(attributes & (ATTR_PERFMON | ATTR_DEBUG))
    proc = _set(l2.proc, _MWAIT_EXITING | _MONITOR_EXITING, on=not flags.monitor_mwait)
    proc = _set(proc, _RDPMC_EXITING, on=not perfmon)
    proc2 = _set(l2.proc2, _EN_GUEST_WAIT_PAUSE, on=flags.waitpkg)
    proc2 = _set(proc2, _EN_PCONFIG, on=flags.mktme)
    proc2_variable = _set(0x0C51_3E0C, _EN_GUEST_WAIT_PAUSE, on=flags.waitpkg)
    proc2_variable = _set(proc2_variable, _EN_PCONFIG, on=flags.mktme)
    exit_controls = _set(l2.exit, _EXIT_PERF_GLOBAL_CTRL, on=perf_global)
    entry_controls = _set(l2.entry, _ENTRY_PERF_GLOBAL_CTRL, on=perf_global)
    entry_controls = _set(entry_controls, _ENTRY_PKRS, on=bool(attributes & (ATTR_PKS | ATTR_DEBUG)))
    cr4_mask = base_l2_cr4_write_mask(capabilities, attributes, xfam)
    ept = 1 << 0 | 1 << 16 | 1 << 17 | 1 << 22 | capabilities.ept_vpid_cap & 0x3F << 48
    return {
        0x480: 1 << 54 | 1 << 55 | 1 << 56,
        0x485: 1 << 5 | 1 << 6 | 1 << 7 | 1 << 14 | 4 << 16 | 1 << 29 | 1 << 30,
        0x486: _L2_CR0_INIT & ~_L2_CR0_VARIABLE,
        0x487: _L2_CR0_INIT | _L2_CR0_VARIABLE,
        0x488: _L2_CR4_INIT & ~cr4_mask,
        0x489: _L2_CR4_INIT | cr4_mask,
        0x48B: _allowed(proc2, proc2_variable),
        0x48C: _set(ept, 1 << 23, on=bool(xfam & 1 << 12)),
        0x48D: _allowed(l2.pin, 0),
        0x48E: _allowed(proc, _set(0x48D9_9A04, _RDPMC_EXITING, on=perfmon)),
        0x48F: _allowed(exit_controls, 0),
        0x490: _allowed(entry_controls, 0x200),
        0x491: 0,
        0x492: l2.proc3 | 0xE,
    }
