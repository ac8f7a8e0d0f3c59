"""TDH.MEM.PAGE.ADD and the 16 TDH.MR.EXTENDs of its page in one piece, for hosts that build measured memory.

Nobody can tell: a leaf runs to its end before another begins, and the extensions of a page that was just mapped cannot
fail. The usual case (nobody holds a lock, everything is as it should be) is decided at a glance; whatever else it is,
the leaf itself finds out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from sim_backend.hw.gprs import R8, R9, RAX, RCX, RDX, Gprs
from sim_backend.tdx_module import dispatch
from sim_backend.tdx_module.op_states import OpState
from sim_backend.tdx_module.pamt import PageType
from sim_backend.tdx_module.sept import walk
from sim_backend.tdx_module.sept_states import ENTRY_BITS, FREE_ENTRY, HPA_MASK, SeptState
from sim_backend.tdx_module.sys_state import SysState
from sim_backend.tdx_module.tdr import LifecycleState
from uapi_ctypes.tdx_leaves import SeamcallLeaf

if TYPE_CHECKING:
    from sim_backend.tdx_module.module import TdxModule
    from sim_backend.tdx_module.tdcs import Tdcs

_PAGE_ADD: Final = int(SeamcallLeaf.TDH_MEM_PAGE_ADD)
_READY: Final = int(SysState.SYS_READY)
_KEYS_CONFIGURED: Final = int(LifecycleState.KEYS_CONFIGURED)
_INITIALIZED: Final = int(OpState.INITIALIZED)
_MAPPED: Final = ENTRY_BITS[SeptState.MAPPED]
_REG: Final = PageType.REG << 16
_NOT_A_4K_PAGE: Final = ~(HPA_MASK & -4096)


def add_and_extend(module: TdxModule, lp: int, regs: Gprs) -> None:
    """Execute TDH.MEM.PAGE.ADD with `regs`, and when it succeeds, TDH.MR.EXTEND of all of the page's chunks."""
    gpa, tdr_hpa, page = regs[RCX], regs[RDX], regs[R8]
    source = _source_if_usual(module, regs)
    if source is not None:
        tdcs = module.tdrs[tdr_hpa].tdcs
        index = _free_entry(module, tdcs, gpa)
        if index is not None:
            memory = module.memory.b
            module.copy_from_shared(source, page)
            q = module.q
            q[index] = _MAPPED | page
            tdcs.measurement.extend(module.extender.added_page(gpa, memory[page : page + 4096]))
            module.tdrs[tdr_hpa].chldcnt += 1
            pamt_entry = module.pamt.entry_4k(page)
            q[pamt_entry] = _REG | tdr_hpa << 12
            q[pamt_entry + 1] = 0
            regs[RAX] = regs[RCX] = regs[RDX] = 0
            return
    dispatch.seamcall(module, lp, regs)
    if regs[RAX] == 0:
        contents = module.memory.b[page : page + 4096]
        module.tdrs[tdr_hpa].tdcs.measurement.extend(module.extender.blocks(gpa, contents))


def _source_if_usual(module: TdxModule, regs: Gprs) -> int | None:
    """Return the HPA of the source without its HKID when TD, page and source are all right and free, else None."""
    tdr = module.tdrs.get(regs[RDX])
    source, page = regs[R9], regs[R8]
    base, size = module.seamrr
    if (
        regs[RAX] != _PAGE_ADD
        or module.sys_state != _READY
        or tdr is None
        or tdr.fatal
        or tdr.lifecycle_state != _KEYS_CONFIGURED
        or tdr.tdcs.op_state != _INITIALIZED
        or source & 0xFFF
        or source >= module.shared_end
    ):
        return None
    source &= ~module.hkid_mask
    if base < source + 4096 <= base + size + 4095:
        return None
    if not module.pamt.is_idle(tdr.hpa) or not module.pamt.is_free(page):
        return None
    return source


def _free_entry(module: TdxModule, tdcs: Tdcs, gpa: int) -> int | None:
    """Return the word index of the Secure EPT entry of the 4 KiB page at `gpa` when it is free, else None."""
    if gpa & _NOT_A_4K_PAGE or gpa >> tdcs.shared_bit:
        return None
    index, level = walk(module.q, tdcs, gpa, 0)
    return index if not level and module.q[index] == FREE_ENTRY else None
