"""TDG.MR.RTMR.EXTEND."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Final

from sim_backend.hw.gprs import RCX, RDX, Gprs
from sim_backend.tdx_module.errors import LeafError
from sim_backend.tdx_module.guest_memory import READ, translate
from sim_backend.tdx_module.locks import GuestTry
from sim_backend.tdx_module.tdcs import RTMR_OFFSET
from uapi_ctypes.tdx_status import Operand, Status

if TYPE_CHECKING:
    from sim_backend.tdx_module.module import TdxModule
    from sim_backend.tdx_module.tdvps import Tdvps

_DIGEST_BYTES: Final = 48
_NUM_RTMRS: Final = 4


def tdg_mr_rtmr_extend(module: TdxModule, lp: int, regs: Gprs, tdvps: Tdvps) -> int:
    """Extend a run-time measurement register: RTMR = SHA-384(RTMR || data).

    ======= === ============================================================
    Operand     Meaning
    ======= === ============================================================
    RCX     in  GPA of 48 bytes, private, 64-byte-aligned
    RDX     in  number of the RTMR: 0 to 3
    ======= === ============================================================

    Spec: TDX Module ABI Reference, TDG.MR.RTMR.EXTEND.
    """
    assert tdvps.cpu is not None, "a running vCPU has a CPU"
    gpa, index = tdvps.cpu.gprs[RCX], tdvps.cpu.gprs[RDX]
    tdr = tdvps.tdr
    tdcs = tdr.tdcs

    # 1. RCX is aligned, and private memory that the guest can read.
    if gpa & 63:
        raise LeafError(Status.OPERAND_INVALID, Operand.RCX)
    hpa = translate(module, lp, regs, tdvps, gpa, READ, Operand.RCX, private_only=True)

    # 2. RDX is the number of an RTMR.
    if index >= _NUM_RTMRS:
        raise LeafError(Status.OPERAND_INVALID, Operand.RDX)

    # 3. Nobody else uses the RTMRs.
    attempt = tdcs.rtmr_lock.guest_try_exclusive()
    if attempt != GuestTry.ACQUIRED:
        raise LeafError(BUSY_STATUS[attempt], Operand.RTMR)

    # ---- Every check passed: from here on the leaf cannot fail. ----

    digest = hashlib.sha384(tdcs.rtmr[index] + module.memory.read(hpa, _DIGEST_BYTES)).digest()
    tdcs.rtmr[index] = digest
    module.memory.write(tdr.tdcx_pa[0] + RTMR_OFFSET + _DIGEST_BYTES * index, digest)
    tdcs.tee_info_hash = None
    return 0


BUSY_STATUS: Final = {
    GuestTry.BUSY: Status.OPERAND_BUSY,
    GuestTry.BUSY_HOST_PRIORITY: Status.OPERAND_BUSY_HOST_PRIORITY,
}
"""How a guest's failed attempt on a host-priority lock is reported."""
