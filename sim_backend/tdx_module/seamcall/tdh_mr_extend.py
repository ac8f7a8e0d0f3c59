"""TDH.MR.EXTEND."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from sim_backend.hw.gprs import RCX, RDX, Gprs
from sim_backend.tdx_module.errors import LeafError
from sim_backend.tdx_module.mrtd import CHUNK_BYTES, extend_block
from sim_backend.tdx_module.op_states import ALLOWED
from sim_backend.tdx_module.sept import leaf_hpa, private_gpa, show_entry, walk
from sim_backend.tdx_module.sept_states import PS, RWX, SeptState, state_of
from uapi_ctypes.tdx_leaves import SeamcallLeaf
from uapi_ctypes.tdx_status import Operand, Status

if TYPE_CHECKING:
    from sim_backend.tdx_module.module import TdxModule

_ALLOWED: Final = ALLOWED[SeamcallLeaf.TDH_MR_EXTEND]
_MAPPED: Final = int(SeptState.MAPPED)
_RDX: Final = int(Operand.RDX)
_RCX: Final = int(Operand.RCX)


def tdh_mr_extend(module: TdxModule, lp: int, regs: Gprs) -> int:  # noqa: ARG001
    """Measure the contents of 256 bytes of guest memory into MRTD.

    ======= === ============================================================
    Operand     Meaning
    ======= === ============================================================
    RCX     in  GPA of the chunk, 256-byte aligned
    RDX     in  HPA of the TDR page
    RCX,RDX out 0; when the GPA is not mapped, the Secure EPT entry
    ======= === ============================================================

    Spec: TDX Module ABI Reference, TDH.MR.EXTEND.
    """
    gpa, tdr_hpa = regs[RCX], regs[RDX]
    regs[RCX] = regs[RDX] = 0

    # 1. RDX is a TDR page that this LP can lock exclusively, of a TD that is being built.
    tdr = module.lock_tdr(tdr_hpa, _RDX, 1)
    module.check_td_locked(tdr, _ALLOWED)
    tdcs = tdr.tdcs

    # 2. RCX is an aligned private GPA.
    if gpa & (CHUNK_BYTES - 1):
        raise LeafError(Status.OPERAND_INVALID, Operand.RCX)
    private_gpa(gpa, tdcs, _RCX)

    # 3. A present page is there.
    index, level = walk(module.q, tdcs, gpa, 0)
    entry = module.q[index]
    if not entry & PS or not entry & RWX:
        show_entry(regs, entry, level)
        raise LeafError(Status.EPT_ENTRY_NOT_PRESENT, Operand.RCX)
    if state_of(entry) != _MAPPED:
        raise LeafError(Status.EPT_ENTRY_NOT_PRESENT)

    # ---- Every check passed: from here on the leaf cannot fail. ----

    hpa = leaf_hpa(entry, level, gpa)
    tdcs.measurement.extend(extend_block(gpa))
    tdcs.measurement.extend(module.memory.b[hpa : hpa + CHUNK_BYTES])
    return 0
