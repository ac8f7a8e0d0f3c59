"""Control-register accesses of a TD.

The engine exits at every write; VMX would only at those that change a bit the module owns. The others are completed
here as the CPU would have.

Spec: TDX Module Base Spec, "Guest TD Execution Control: CR Handling"; Intel SDM Vol. 3, "VM Exits: Control Registers".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from sim_backend.cpu.engine import Cpu, CpuState, ExitReason
from sim_backend.hw.gprs import Gprs
from sim_backend.tdx_module.event_injection import inject_gp, inject_ve
from sim_backend.tdx_module.metadata_sys import capabilities_of
from sim_backend.tdx_module.outcome import Outcome
from sim_backend.tdx_module.td_params import ATTR_PKS, XFAM_CET
from sim_backend.tdx_module.td_vmcs import CR4_GUEST_HOST_MASK
from sim_backend.tdx_module.vmexit.event_exits import unexpected_exit

if TYPE_CHECKING:
    from sim_backend.tdx_module.module import TdxModule
    from sim_backend.tdx_module.tdvps import Tdvps

_MOV_TO_CR, _MOV_FROM_CR, _CLTS, _LMSW = range(4)

_CR0_PE: Final = 1 << 0
_CR0_TS: Final = 1 << 3
_CR0_NE: Final = 1 << 5
_CR0_WP: Final = 1 << 16
_CR0_NW: Final = 1 << 29
_CR0_CD: Final = 1 << 30
_CR0_PG: Final = 1 << 31
_CR0_HIGH: Final = (1 << 64) - (1 << 32)
_CR0_IGNORED: Final = 0x1FFA_FFC0  # reserved bits whose writes have no effect
_LMSW_BITS: Final = 0xE  # MP, EM, TS; LMSW may set PE but not clear it
_CR4_PAE: Final = 1 << 5
_CR4_VMXE: Final = 1 << 13
_CR4_PCIDE: Final = 1 << 17
_CR4_KL: Final = 1 << 19
_CR4_PKE: Final = 1 << 22
_CR4_CET: Final = 1 << 23
_CR4_PKS: Final = 1 << 24
_CR4_UINTR: Final = 1 << 25
_XFAM_PKRU: Final = 1 << 9
_XFAM_UINTR: Final = 1 << 14
_EFER_LME: Final = 1 << 8
_EFER_LMA: Final = 1 << 10


def cr_access_exit(module: TdxModule, lp: int, regs: Gprs, tdvps: Tdvps) -> Outcome:
    """Complete a legal write; an illegal one is a #GP(0), one that a TD may not do a #VE."""
    cpu = tdvps.cpu
    assert cpu is not None, "a running vCPU has a CPU"
    qualification = cpu.exit.qualification
    number, access = qualification & 0xF, qualification >> 4 & 3
    state = cpu.get_state()
    if access == _CLTS:
        state.cr0 &= ~_CR0_TS
        return _complete(cpu, state)
    if access == _LMSW:
        source = qualification >> 16 & 0xFFFF
        return _write_cr0(module, tdvps, state, source & _LMSW_BITS | state.cr0 & ~_LMSW_BITS)
    if access == _MOV_TO_CR:
        value = cpu.gprs[qualification >> 8 & 0xF]
        if number == 0:
            return _write_cr0(module, tdvps, state, value)
        if number == 4:
            return _write_cr4(module, tdvps, state, value)
    # Only a debugger can have asked for the others: CR8 is the virtual APIC's TPR.
    return unexpected_exit(module, lp, regs, tdvps)


def _complete(cpu: Cpu, state: CpuState) -> Outcome:
    cpu.set_state(state)
    return Outcome.COMPLETED


def _gp(tdvps: Tdvps) -> Outcome:
    inject_gp(tdvps)
    return Outcome.RESUME


def _ve(tdvps: Tdvps) -> Outcome:
    assert tdvps.cpu is not None, "a running vCPU has a CPU"
    inject_ve(tdvps, ExitReason.CR_ACCESS, tdvps.cpu.exit.qualification)
    return Outcome.RESUME


def _write_cr0(module: TdxModule, tdvps: Tdvps, state: CpuState, value: int) -> Outcome:
    capabilities = capabilities_of(module)
    paging = value & _CR0_PG
    if (
        ~value & capabilities.cr0_fixed0 & ~(_CR0_PE | _CR0_PG)
        or value & ~capabilities.cr0_fixed1
        or (paging and not value & _CR0_PE)
        or (state.cr4 & _CR4_CET and not value & _CR0_WP)
    ):
        return _gp(tdvps)
    if not value & _CR0_PE or not value & _CR0_NE or value & (_CR0_NW | _CR0_CD | _CR0_HIGH):
        return _ve(tdvps)
    if paging and state.efer & _EFER_LME and not state.cr4 & _CR4_PAE:
        return _gp(tdvps)
    if not paging and state.cr4 & _CR4_PCIDE:
        return _gp(tdvps)
    state.cr0 = value & ~_CR0_IGNORED | state.cr0 & _CR0_IGNORED
    if state.efer & _EFER_LME:
        state.efer = state.efer | _EFER_LMA if paging else state.efer & ~_EFER_LMA
    assert tdvps.cpu is not None, "a running vCPU has a CPU"
    return _complete(tdvps.cpu, state)


def _write_cr4(module: TdxModule, tdvps: Tdvps, state: CpuState, value: int) -> Outcome:
    if not (value ^ state.cr4) & tdvps.vmcs[CR4_GUEST_HOST_MASK]:
        if _is_cr4_fault(state, value):
            return _gp(tdvps)
        state.cr4 = value
        assert tdvps.cpu is not None, "a running vCPU has a CPU"
        return _complete(tdvps.cpu, state)
    capabilities = capabilities_of(module)
    tdcs = tdvps.tdr.tdcs
    forbidden = _CR4_KL
    for bit, enabled in (
        (_CR4_PKE, tdcs.xfam & _XFAM_PKRU),
        (_CR4_CET, tdcs.xfam & XFAM_CET == XFAM_CET),
        (_CR4_UINTR, tdcs.xfam & _XFAM_UINTR),
        (_CR4_PKS, tdcs.attributes & ATTR_PKS),
    ):
        if not enabled:
            forbidden |= bit
    if (
        ~value & capabilities.cr4_fixed0 & ~_CR4_VMXE
        or value & (~capabilities.cr4_fixed1 | forbidden)
        or (value & _CR4_CET and not state.cr0 & _CR0_WP)
    ):
        return _gp(tdvps)
    return _ve(tdvps)


def _is_cr4_fault(state: CpuState, value: int) -> bool:
    """Tell whether the CPU itself refuses this CR4 (Intel SDM Vol. 2, MOV to control registers)."""
    if value & _CR4_CET and not state.cr0 & _CR0_WP:
        return True
    if state.efer & _EFER_LMA:
        if not value & _CR4_PAE:
            return True
    elif value & _CR4_PCIDE:
        return True
    return bool(value & ~state.cr4 & _CR4_PCIDE and state.cr3 & 0xFFF)
