"""TDH.PHYMEM.CACHE.WB."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from sim_backend.hw.gprs import RCX, Gprs
from sim_backend.tdx_module.errors import LeafError
from sim_backend.tdx_module.kot import HkidState
from uapi_ctypes.tdx_status import Operand, Status

if TYPE_CHECKING:
    from sim_backend.tdx_module.module import TdxModule

START: Final = 0
RESUME: Final = 1


def tdh_phymem_cache_wb(module: TdxModule, lp: int, regs: Gprs) -> int:
    """Write back this package's caches, for the HKIDs that are flushed when it starts.

    ======= === ============================================================
    Operand     Meaning
    ======= === ============================================================
    RCX     in  0 = start, 1 = resume after an interrupt
    ======= === ============================================================

    Spec: TDX Module ABI Reference, TDH.PHYMEM.CACHE.WB.
    """
    command = regs[RCX]

    # 1. RCX is a command.
    if command > RESUME:
        raise LeafError(Status.OPERAND_INVALID, Operand.RCX)

    # 2. No other LP writes back this package's caches, and the KOT can be locked.
    package = module.platform.lps[lp].package
    write_back = module.wbcache[package]
    if not write_back.lock.try_exclusive():
        raise LeafError(Status.OPERAND_BUSY, Operand.WBCACHE)
    kot = module.kot
    if not kot.lock.try_shared():
        raise LeafError(Status.OPERAND_BUSY, Operand.KOT)

    # 3. To start, some HKID must be flushed; to resume, an interrupted operation must be there.
    if command == START:
        write_back.interrupted_at = 0
        flushed = [
            hkid
            for hkid in range(module.first_private_hkid, module.last_private_hkid + 1)
            if kot.state[hkid] == HkidState.FLUSHED
        ]
        if not flushed:
            raise LeafError(Status.NO_HKID_READY_TO_WBCACHE)
        write_back.hkids = flushed
    elif not write_back.interrupted_at:
        raise LeafError(Status.WBCACHE_RESUME_ERROR)

    # 4. A pending interrupt stops it between two blocks.
    next_block = write_back.interrupted_at + 1
    if next_block < module.cache_blocks and module.platform.interrupt_pending(lp):
        write_back.interrupted_at = next_block
        raise LeafError(Status.INTERRUPTED_RESUMABLE)

    # ---- Every check passed: from here on the leaf cannot fail. ----

    write_back.interrupted_at = 0
    for hkid in write_back.hkids:
        kot.wbinvd_bitmap[hkid] &= ~(1 << package)
    return 0
