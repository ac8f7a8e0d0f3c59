"""TDH.MNG.CREATE."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sim_backend.hw.gprs import RCX, RDX, Gprs
from sim_backend.tdx_module.errors import LeafError
from sim_backend.tdx_module.kot import HkidState
from sim_backend.tdx_module.pamt import PageType
from sim_backend.tdx_module.tdr import Tdr
from uapi_ctypes.tdx_status import Operand, Status

if TYPE_CHECKING:
    from sim_backend.tdx_module.module import TdxModule


def tdh_mng_create(module: TdxModule, lp: int, regs: Gprs) -> int:  # noqa: ARG001  (every leaf has this shape)
    """Make a page the TDR of a new TD and give the TD a private HKID.

    ======= === ============================================================
    Operand     Meaning
    ======= === ============================================================
    RCX     in  HPA of a free page
    RDX     in  bits 15:0: a free private HKID
    ======= === ============================================================

    Spec: TDX Module ABI Reference, TDH.MNG.CREATE.
    """
    hpa, hkid = regs[RCX], regs[RDX]

    # 1. RDX is a private HKID.
    if not module.first_private_hkid <= hkid <= module.last_private_hkid:
        raise LeafError(Status.OPERAND_INVALID, Operand.RDX)

    # 2. RCX is a free page that this LP can lock exclusively.
    entry = module.pamt.lock(hpa, PageType.NDA, Operand.RCX, 1)

    # 3. The HKID is free.
    if not module.kot.lock.try_exclusive():
        raise LeafError(Status.OPERAND_BUSY, Operand.KOT)
    if module.kot.state[hkid] != HkidState.FREE:
        raise LeafError(Status.HKID_NOT_FREE)

    # 4. There is entropy for the TD's UUID.
    uuid = module.random_256()

    # ---- Every check passed: from here on the leaf cannot fail. ----

    tdr = Tdr(hpa, hkid)
    tdr.td_uuid = uuid
    tdr.seamdb_index = module.platform.seamdb_index
    tdr.handoff_version = module.profile.module_hv
    module.tdrs[hpa] = tdr
    module.memory.zero_page(hpa)
    module.kot.state[hkid] = HkidState.ASSIGNED
    module.pamt.set_page(entry, PageType.TDR, 0)
    return 0
