"""TDG.MEM.PAGE.ATTR.RD."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from sim_backend.hw.gprs import RCX, RDX, Gprs
from sim_backend.tdx_module.errors import LeafError
from sim_backend.tdx_module.guest_memory import is_gpa_valid
from sim_backend.tdx_module.not_modelled import NotModelled
from sim_backend.tdx_module.sept import LEVEL_SHIFT, walk
from sim_backend.tdx_module.sept_states import ALLOWED_TDCALL, TDP, state_of
from sim_backend.tdx_module.td_exit import TdExit, ept_violation_exit
from sim_backend.tdx_module.tdcall.tdg_mem_page_accept import lock_entry_as_guest
from uapi_ctypes.tdx_leaves import TdcallLeaf
from uapi_ctypes.tdx_status import Operand, Status

if TYPE_CHECKING:
    from sim_backend.tdx_module.module import TdxModule
    from sim_backend.tdx_module.tdvps import Tdvps

_ALLOWED: Final = ALLOWED_TDCALL[TdcallLeaf.TDG_MEM_PAGE_ATTR_RD]
MAPPING_PENDING: Final = 1 << 62
"""In a GPA mapping that is returned: the page waits for acceptance."""


def tdg_mem_page_attr_rd(module: TdxModule, lp: int, regs: Gprs, tdvps: Tdvps) -> int:
    """Read how a private page is mapped, for the guest and its L2 VMs.

    ======= === ============================================================
    Operand     Meaning
    ======= === ============================================================
    RCX     in  private GPA
    RCX     out GPA mapping: level in bits 2:0, GPA, pending in bit 62
    RDX     out attributes of each L2 VM
    ======= === ============================================================

    Spec: TDX Module ABI Reference, TDG.MEM.PAGE.ATTR.RD.
    """
    assert tdvps.cpu is not None, "a running vCPU has a CPU"
    gprs = tdvps.cpu.gprs
    tdcs = tdvps.tdr.tdcs
    gpa = gprs[RCX]

    # 1. RCX is a private GPA.
    if not is_gpa_valid(tdcs, gpa, private_only=True):
        gprs[RCX] = gprs[RDX] = 0
        raise LeafError(Status.OPERAND_INVALID, Operand.RCX)

    # 2. Nobody works on the entry where the Secure EPT walk ends.
    index, level = walk(module.q, tdcs, gpa, 0)
    try:
        entry = lock_entry_as_guest(module, index)
    except LeafError:
        gprs[RCX] = gprs[RDX] = 0
        raise

    # 3. It is a page, and not blocked.
    if not _ALLOWED >> state_of(entry) & 1:
        ept_violation_exit(module, lp, regs, tdvps, gpa, 0)
        raise TdExit
    if tdcs.num_l2_vms:
        raise NotModelled("page attributes of L2 VMs")

    # ---- Every check passed: from here on the leaf cannot fail. ----

    gprs[RCX] = gpa & ~((1 << LEVEL_SHIFT[level]) - 1) | level | (MAPPING_PENDING if entry & TDP else 0)
    gprs[RDX] = 0  # the guest's own mapping has no attributes to show
    return 0
