"""TDH.SYS.TDMR.INIT."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from sim_backend.hw.gprs import RCX, RDX, Gprs
from sim_backend.tdx_module.errors import LeafError
from sim_backend.tdx_module.pamt import GIB
from uapi_ctypes.tdx_status import Operand, Status

if TYPE_CHECKING:
    from sim_backend.tdx_module.module import TdxModule

BYTES_PER_CALL: Final = 1024 * 4096
"""How much of the TDMR one call initialises: 1024 entries of 4 KiB pages."""


def tdh_sys_tdmr_init(module: TdxModule, lp: int, regs: Gprs) -> int:  # noqa: ARG001
    """Initialise the PAMT of the next 4 MiB of a TDMR. A gigabyte is usable when all of it is initialised.

    ======= === ============================================================
    Operand     Meaning
    ======= === ============================================================
    RCX     in  HPA of the start of the TDMR
    RDX     out HPA up to which the TDMR is usable, a multiple of 1 GiB
    ======= === ============================================================

    Spec: TDX Module ABI Reference, TDH.SYS.TDMR.INIT.
    """
    base = regs[RCX]
    regs[RDX] = 0

    # 1. RCX is the start of a TDMR, which no other LP is initialising.
    tdmr = next((tdmr for tdmr in module.tdmrs if tdmr.base == base), None)
    if tdmr is None:
        raise LeafError(Status.OPERAND_INVALID, Operand.RCX)
    if tdmr.locked:
        raise LeafError(Status.OPERAND_BUSY, Operand.RCX)

    # 2. Some of it is not initialised yet.
    start = tdmr.next_to_initialize
    if start >= tdmr.base + tdmr.size:
        raise LeafError(Status.TDMR_ALREADY_INITIALIZED)

    # ---- Every check passed: from here on the leaf cannot fail. ----

    tdmr.next_to_initialize = start + BYTES_PER_CALL
    module.pamt.initialize(tdmr, start, tdmr.next_to_initialize)
    regs[RDX] = tdmr.next_to_initialize & -GIB
    return 0
