"""EPT violations and misconfigurations of a TD.

Spec: TDX Module Base Spec, "EPT Violations".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from sim_backend.hw.gprs import Gprs
from sim_backend.tdx_module import stepping
from sim_backend.tdx_module.event_injection import inject_pf, inject_ve
from sim_backend.tdx_module.guest_memory import ACCEPTABLE
from sim_backend.tdx_module.metadata_td import TD_CTLS_PENDING_VE_DISABLE
from sim_backend.tdx_module.not_modelled import NotModelled
from sim_backend.tdx_module.outcome import Outcome
from sim_backend.tdx_module.sept import walk_to_leaf
from sim_backend.tdx_module.sept_states import state_of
from sim_backend.tdx_module.td_exit import (
    EEQ_PENDING_EPT_VIOLATION,
    ept_misconfiguration_exit,
    ept_violation_exit,
)
from sim_backend.tdx_module.td_vmcs import INTERRUPTIBILITY

if TYPE_CHECKING:
    from sim_backend.tdx_module.module import TdxModule
    from sim_backend.tdx_module.tdvps import Tdvps

_DATA_WRITE: Final = 1 << 1
_INSTRUCTION_FETCH: Final = 1 << 2
_GLA_VALID: Final = 1 << 7
_NMI_UNBLOCKED: Final = 1 << 12
_SHADOW_STACK: Final = 1 << 13
_BLOCKING_BY_NMI: Final = 1 << 3
_PFEC_P, _PFEC_WR, _PFEC_US, _PFEC_RSVD, _PFEC_ID, _PFEC_SS = 1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 4, 1 << 6


def ept_violation(module: TdxModule, lp: int, regs: Gprs, tdvps: Tdvps) -> Outcome:
    """Turn the violation into a #PF (beyond GPAW), a #VE (a pending page), or a TD exit."""
    cpu = tdvps.cpu
    assert cpu is not None, "a running vCPU has a CPU"
    tdcs = tdvps.tdr.tdcs
    gpa, qualification = cpu.exit.gpa, cpu.exit.qualification
    if qualification & _NMI_UNBLOCKED:
        tdvps.vmcs[INTERRUPTIBILITY] = tdvps.vmcs.get(INTERRUPTIBILITY, 0) | _BLOCKING_BY_NMI

    # 1. With GPAW 48 the CPU still walks 52 bits: what lies between is the module's reserved-bit fault.
    if not tdcs.gpaw and gpa >> 48 & 0xF and qualification & _GLA_VALID:
        error_code = _PFEC_P | _PFEC_RSVD
        for bit, flag in (
            (_DATA_WRITE, _PFEC_WR), (_INSTRUCTION_FETCH, _PFEC_ID), (_SHADOW_STACK, _PFEC_SS),
        ):  # fmt: skip
            error_code |= flag if qualification & bit else 0
        inject_pf(tdvps, cpu.exit.gla, error_code | (_PFEC_US if cpu.cpl() == 3 else 0))
        return Outcome.RESUME

    # 2. A pending private page is the guest's to accept, or the host's to hear of.
    extended = 0
    if not gpa >> tdcs.shared_bit & 1:
        index, _ = walk_to_leaf(module.q, tdcs, gpa)
        if state_of(module.q[index]) in ACCEPTABLE:
            if not tdcs.td_ctls & TD_CTLS_PENDING_VE_DISABLE:
                inject_ve(tdvps, cpu.exit.reason, qualification, gpa, cpu.exit.gla)
                return Outcome.RESUME
            extended = EEQ_PENDING_EPT_VIOLATION
        stepping.log_ept_violation(tdvps, gpa)

    # 3. The host has to map something.
    ept_violation_exit(module, lp, regs, tdvps, gpa, qualification, extended)
    return Outcome.TD_EXIT


def ept_misconfiguration(module: TdxModule, lp: int, regs: Gprs, tdvps: Tdvps) -> Outcome:
    """Leave for a misconfigured shared EPT; the Secure EPT never is."""
    assert tdvps.cpu is not None, "a running vCPU has a CPU"
    gpa = tdvps.cpu.exit.gpa
    if not gpa >> tdvps.tdr.tdcs.shared_bit & 1:
        raise NotModelled("the module's shutdown on a misconfigured Secure EPT")
    ept_misconfiguration_exit(module, lp, regs, tdvps, gpa)
    return Outcome.TD_EXIT
