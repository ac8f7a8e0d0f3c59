"""TDH.MEM.SEPT.RD."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from sim_backend.hw.gprs import R8, RCX, RDX, Gprs
from sim_backend.tdx_module import op_states
from sim_backend.tdx_module.errors import LeafError
from sim_backend.tdx_module.sept import gpa_mapping, show_entry, walk_to
from uapi_ctypes.tdx_leaves import SeamcallLeaf
from uapi_ctypes.tdx_status import Operand, Status

if TYPE_CHECKING:
    from sim_backend.tdx_module.module import TdxModule

_OP_STATES: Final = op_states.ALLOWED[SeamcallLeaf.TDH_MEM_SEPT_RD]
_READ_L2_ATTRIBUTES: Final = 1


def tdh_mem_sept_rd(module: TdxModule, lp: int, regs: Gprs) -> int:  # noqa: ARG001
    """Read an entry of the Secure EPT.

    ======= === ============================================================
    Operand     Meaning
    ======= === ============================================================
    RCX     in  GPA mapping: level 0 to the root level, private GPA
    RDX     in  HPA of the TDR page; bit 0: L2 attributes too (DEBUG TDs)
    RCX     out the architectural entry
    RDX     out bits 2:0 level, 15:8 state
    R8      out the L2 attributes, when asked for
    ======= === ============================================================

    Spec: TDX Module ABI Reference, TDH.MEM.SEPT.RD.
    """
    rcx, rdx = regs[RCX], regs[RDX]
    regs[RCX] = regs[RDX] = 0
    read_l2_attributes = rdx & _READ_L2_ATTRIBUTES

    # 1. RDX is a TDR page that this LP can lock shared, of a TD in a suitable state.
    tdr = module.lock_tdr(rdx & ~_READ_L2_ATTRIBUTES, Operand.RDX)
    module.check_td(tdr, _OP_STATES)
    tdcs = tdr.tdcs

    # 2. Only of a DEBUG TD may the host read L2 attributes.
    if read_l2_attributes and not tdcs.attributes & 1:
        raise LeafError(Status.OPERAND_INVALID, Operand.RDX)

    # 3. RCX names an entry; the walk reaches it.
    gpa, level = gpa_mapping(rcx, tdcs, 0, tdcs.pwl)
    if tdcs.sept_lock.raw and not tdcs.sept_lock.try_shared():
        raise LeafError(Status.OPERAND_BUSY, Operand.SEPT_TREE)
    index = walk_to(module.q, tdcs, gpa, level, regs)

    # ---- Every check passed: from here on the leaf cannot fail. ----

    if read_l2_attributes:
        regs[R8] = 0  # no L2 Secure EPT can have been added: TDH.MEM.SEPT.ADD refuses to model it
    show_entry(regs, module.q[index], level)
    return 0
