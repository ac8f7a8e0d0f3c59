"""TDG.MEM.PAGE.ATTR.WR."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NoReturn

from sim_backend.hw.gprs import R8, RCX, RDX, Gprs
from sim_backend.tdx_module.errors import LeafError
from sim_backend.tdx_module.not_modelled import NotModelled
from sim_backend.tdx_module.sept import gpa_mapping, walk
from sim_backend.tdx_module.sept_states import ALLOWED_TDCALL, PS, TDP, SeptState, state_of
from sim_backend.tdx_module.td_exit import EEQ_ATTR_WR, TdExit, ept_violation_exit
from sim_backend.tdx_module.tdcall.tdg_mem_page_accept import (
    exit_qualification,
    extended_qualification,
    lock_entry_as_guest,
)
from sim_backend.tdx_module.tdcall.tdg_mem_page_attr_rd import MAPPING_PENDING
from uapi_ctypes.tdx_leaves import TdcallLeaf
from uapi_ctypes.tdx_status import Operand, Status

if TYPE_CHECKING:
    from sim_backend.tdx_module.module import TdxModule
    from sim_backend.tdx_module.tdvps import Tdvps

_ALLOWED: Final = ALLOWED_TDCALL[TdcallLeaf.TDG_MEM_PAGE_ATTR_WR]
_MAX_VMS: Final = 4


def tdg_mem_page_attr_wr(module: TdxModule, lp: int, regs: Gprs, tdvps: Tdvps) -> int:
    """Change how a private page is mapped for L2 VMs. A TD without L2 VMs has nothing to change.

    ======= === ============================================================
    Operand     Meaning
    ======= === ============================================================
    RCX     i/o GPA mapping: level 0 to 2 and a private GPA; out: pending in bit 62
    RDX     i/o attributes, 16 bits a VM
    R8      in  which attributes to change, 16 bits a VM
    ======= === ============================================================

    Spec: TDX Module ABI Reference, TDG.MEM.PAGE.ATTR.WR.
    """
    assert tdvps.cpu is not None, "a running vCPU has a CPU"
    gprs = tdvps.cpu.gprs
    try:
        entry = _entry(module, lp, regs, tdvps)
    except LeafError:
        gprs[RCX] = gprs[RDX] = 0
        raise

    # ---- Every check passed: from here on the leaf cannot fail. ----

    gprs[RCX] |= MAPPING_PENDING if entry & TDP else 0
    gprs[RDX] = 0
    return 0


def _entry(module: TdxModule, lp: int, regs: Gprs, tdvps: Tdvps) -> int:
    """Check the operands and return the Secure EPT entry."""
    assert tdvps.cpu is not None, "a running vCPU has a CPU"
    gprs = tdvps.cpu.gprs
    tdcs = tdvps.tdr.tdcs

    # 1. There is nothing to say about the guest itself, nor about VMs that it does not have.
    if tdcs.num_l2_vms:
        raise NotModelled("page attributes of L2 VMs")
    for vm in range(_MAX_VMS):
        if gprs[RDX] >> 16 * vm & 0xFFFF:
            raise LeafError(Status.OPERAND_INVALID, Operand.RDX)
        if gprs[R8] >> 16 * vm & 0xFFFF:
            raise LeafError(Status.OPERAND_INVALID, Operand.R8)

    # 2. RCX maps a private page.
    gpa, level = gpa_mapping(gprs[RCX], tdcs, 0, 2)

    # 3. The Secure EPT walk reaches an entry at that level, or the host is asked to make one.
    index, reached = walk(module.q, tdcs, gpa, level)
    if reached != level:
        _violation(module, lp, regs, tdvps, gpa, level, module.q[index], reached)

    # 4. Nobody works on the entry; it is a page that the guest may write, or that waits for acceptance.
    entry = lock_entry_as_guest(module, index)
    if not entry & PS and state_of(entry) != SeptState.FREE:
        raise LeafError(Status.PAGE_SIZE_MISMATCH, level)
    if not _ALLOWED >> state_of(entry) & 1:
        _violation(module, lp, regs, tdvps, gpa, level, entry, level)
    return entry


def _violation(
    module: TdxModule, lp: int, regs: Gprs, tdvps: Tdvps, gpa: int, requested: int, entry: int, level: int
) -> NoReturn:
    extended = extended_qualification(EEQ_ATTR_WR, requested, entry, level)
    ept_violation_exit(module, lp, regs, tdvps, gpa, exit_qualification(entry), extended)
    raise TdExit
