"""TDH.MEM.WR."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from sim_backend.hw.gprs import R8, Gprs
from sim_backend.tdx_module import op_states, sept_states
from sim_backend.tdx_module.seamcall.tdh_mem_rd import debug_access
from uapi_ctypes.tdx_leaves import SeamcallLeaf

if TYPE_CHECKING:
    from sim_backend.tdx_module.module import TdxModule

_OP_STATES: Final = op_states.ALLOWED[SeamcallLeaf.TDH_MEM_WR]
_SEPT_STATES: Final = sept_states.ALLOWED[SeamcallLeaf.TDH_MEM_WR]


def tdh_mem_wr(module: TdxModule, lp: int, regs: Gprs) -> int:  # noqa: ARG001
    """Write 8 bytes of a DEBUG TD's private memory.

    ======= === ============================================================
    Operand     Meaning
    ======= === ============================================================
    RCX     in  private GPA, 8-byte aligned
    RDX     in  HPA of the TDR page
    R8      in  the value to write
    RCX,RDX out 0; on a Secure EPT error, the entry
    R8      out the value before
    ======= === ============================================================

    Spec: TDX Module ABI Reference, TDH.MEM.WR.
    """
    value = regs[R8]
    index = debug_access(module, regs, _OP_STATES, _SEPT_STATES)

    # ---- Every check passed: from here on the leaf cannot fail. ----

    regs[R8] = module.q[index]
    module.q[index] = value
    return 0
