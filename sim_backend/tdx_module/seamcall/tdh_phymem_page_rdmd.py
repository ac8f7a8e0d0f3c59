"""TDH.PHYMEM.PAGE.RDMD."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from sim_backend.hw.gprs import R8, R9, R10, R11, RCX, RDX, Gprs
from sim_backend.tdx_module.pamt import PageType
from uapi_ctypes.tdx_status import Operand

if TYPE_CHECKING:
    from sim_backend.tdx_module.module import TdxModule

_WITH_BEPOCH: Final = frozenset({int(PageType.REG), int(PageType.EPT)})


def tdh_phymem_page_rdmd(module: TdxModule, lp: int, regs: Gprs) -> int:  # noqa: ARG001
    """Read the metadata of a page: of any page of a TDMR, whatever it is used for.

    ======= === ============================================================
    Operand     Meaning
    ======= === ============================================================
    RCX     in  HPA of the page
    RCX     out page type
    RDX     out HPA of the (last) owner's TDR page
    R8      out page size: 0 = 4 KiB, 1 = 2 MiB, 2 = 1 GiB
    R9      out BEPOCH of a guest page or a Secure EPT page, else 0
    R10,R11 out 0
    ======= === ============================================================

    Spec: TDX Module ABI Reference, TDH.PHYMEM.PAGE.RDMD.
    """
    hpa = regs[RCX]
    regs[RCX] = regs[RDX] = regs[R8] = regs[R9] = regs[R10] = regs[R11] = 0

    # 1. RCX is a page of a TDMR that this LP can lock shared.
    entry, level = module.pamt.walk(hpa, Operand.RCX, 0)

    # ---- Every check passed: from here on the leaf cannot fail. ----

    word = module.q[entry]
    page_type = word >> 16 & 0xFF
    regs[RCX], regs[RDX], regs[R8] = page_type, word >> 24 << 12, level
    if page_type in _WITH_BEPOCH:
        regs[R9] = module.q[entry + 1]
    return 0
