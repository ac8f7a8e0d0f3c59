"""TDH.SYS.CONFIG."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from sim_backend.hw.gprs import R8, RCX, RDX, Gprs
from sim_backend.tdx_module.errors import LeafError
from sim_backend.tdx_module.kot import HkidState
from sim_backend.tdx_module.sys_state import SysState
from sim_backend.tdx_module.tdmr_checks import TDMR_INFO_BYTES, TdmrInfo, check_tdmr
from uapi_ctypes.tdx_status import Operand, Status

if TYPE_CHECKING:
    from sim_backend.tdx_module.module import TdxModule

MAX_TDMRS: Final = 64
POINTERS_ALIGNMENT: Final = 512


def tdh_sys_config(module: TdxModule, lp: int, regs: Gprs) -> int:  # noqa: ARG001
    """Tell the module which memory TDs may use, where its metadata goes, and the module's own HKID.

    ======= === ============================================================
    Operand     Meaning
    ======= === ============================================================
    RCX     in  HPA of an array of HPAs of TDMR_INFO entries, 512-byte aligned
    RDX     in  how many, 1 to 64
    R8      in  bits 15:0: a private HKID
    ======= === ============================================================

    The HKID is taken before the TDMRs are checked: a call that fails on them burns it.

    Spec: TDX Module ABI Reference, TDH.SYS.CONFIG.
    """
    array, count, hkid = regs[RCX], regs[RDX], regs[R8]

    # 1. The module is initialised on every LP, and not configured.
    if not module.global_lock.try_exclusive():
        raise LeafError(Status.SYS_BUSY)
    if module.sys_state != SysState.SYSINIT_DONE or not all(module.lp_is_init):
        raise LeafError(Status.SYS_CONFIG_NOT_PENDING)

    # 2. RCX is shared memory, RDX a number of TDMRs, R8 a private HKID.
    module.check_shared_hpa(array, POINTERS_ALIGNMENT, Operand.RCX)
    if not 1 <= count <= MAX_TDMRS:
        raise LeafError(Status.OPERAND_INVALID, Operand.RDX)
    if not module.first_private_hkid <= hkid <= module.last_private_hkid:
        raise LeafError(Status.OPERAND_INVALID, Operand.R8)
    module.kot.state[hkid] = HkidState.RESERVED
    module.global_hkid = hkid

    # 3. Each TDMR is acceptable beside those before it.
    infos: list[TdmrInfo] = []
    pointers = memoryview(module.read_shared(array, 8 * count)).cast("Q")
    for index, pointer in enumerate(pointers):
        module.check_shared_hpa(pointer, TDMR_INFO_BYTES, Operand.RCX)
        infos.append(TdmrInfo.decode(module.read_shared(pointer, TDMR_INFO_BYTES)))
        check_tdmr(index, infos, module.cmrs, 1 << module.hkid_start_bit)

    # ---- Every check passed: from here on the leaf cannot fail. ----

    module.tdmrs = [info.to_tdmr() for info in infos]
    module.pkg_config_bitmap = 0
    module.sys_state = SysState.SYSCONFIG_DONE
    return 0
