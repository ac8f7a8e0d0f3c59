"""TDH.EXPORT.UNBLOCKW."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from sim_backend.hw.gprs import RCX, RDX, Gprs
from sim_backend.tdx_module import op_states, sept_states
from sim_backend.tdx_module.errors import LeafError
from sim_backend.tdx_module.not_modelled import NotModelled
from sim_backend.tdx_module.sept import gpa_mapping, show_entry, walk_to
from sim_backend.tdx_module.sept_states import state_of
from uapi_ctypes.tdx_leaves import SeamcallLeaf
from uapi_ctypes.tdx_status import Operand, Status

if TYPE_CHECKING:
    from sim_backend.tdx_module.module import TdxModule

_OP_STATES: Final = op_states.ALLOWED[SeamcallLeaf.TDH_EXPORT_UNBLOCKW]
_SEPT_STATES: Final = sept_states.ALLOWED[SeamcallLeaf.TDH_EXPORT_UNBLOCKW]


def tdh_export_unblockw(module: TdxModule, lp: int, regs: Gprs) -> int:  # noqa: ARG001
    """Let the guest write to a page again that TDH.EXPORT.BLOCKW blocked.

    ======= === ============================================================
    Operand     Meaning
    ======= === ============================================================
    RCX     in  GPA mapping: level 0, private GPA
    RDX     in  HPA of the TDR page
    RCX,RDX out 0; on a Secure EPT error, the entry
    ======= === ============================================================

    Spec: TDX Module ABI Reference, TDH.EXPORT.UNBLOCKW.
    """
    rcx, tdr_hpa = regs[RCX], regs[RDX]
    regs[RCX] = regs[RDX] = 0

    # 1. RDX is a TDR page that this LP can lock shared, of a TD in a suitable state.
    tdr = module.lock_tdr(tdr_hpa, Operand.RDX)
    module.check_td(tdr, _OP_STATES)
    tdcs = tdr.tdcs

    # 2. RCX names a 4 KiB entry; this LP can lock the Secure EPT shared and the walk reaches the entry.
    gpa, level = gpa_mapping(rcx, tdcs, 0, 0)
    if not tdcs.sept_lock.try_shared():
        raise LeafError(Status.OPERAND_BUSY, Operand.SEPT_TREE)
    index = walk_to(module.q, tdcs, gpa, level, regs)

    # 3. The entry is blocked for writing. (Nothing is, outside an export session.)
    entry = module.q[index]
    if not _SEPT_STATES >> state_of(entry) & 1:
        show_entry(regs, entry, level)
        raise LeafError(Status.EPT_ENTRY_STATE_INCORRECT, Operand.RCX)
    raise NotModelled("TDH_EXPORT_UNBLOCKW: a migration session")
