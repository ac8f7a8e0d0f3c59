"""TDH.SYS.INFO."""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING, Final

from sim_backend.hw.gprs import R8, R9, RCX, RDX, Gprs
from sim_backend.tdx_module.cpu_capabilities import XFAM_FIXED1
from sim_backend.tdx_module.cpuid_virtualization import CPUID_CONFIG
from sim_backend.tdx_module.errors import LeafError
from sim_backend.tdx_module.metadata_sys import (
    MAX_CMRS,
    MAX_RESERVED_PER_TDMR,
    MAX_TDMRS,
    PAMT_ENTRY_BYTES,
    VENDOR_INTEL,
    capabilities_of,
)
from uapi_ctypes.tdx_status import Operand, Status

if TYPE_CHECKING:
    from sim_backend.tdx_module.module import TdxModule

_TDSYSINFO_BYTES: Final = 1024
_CMR_INFO: Final = Struct("<QQ")
_CMR_LIST_BYTES: Final = MAX_CMRS * _CMR_INFO.size
# ATTRIBUTES, VENDOR_ID, BUILD_DATE, BUILD_NUM, MINOR_VERSION, MAJOR_VERSION, SYS_RD, 13 reserved bytes; then
# MAX_TDMRS, MAX_RESERVED_PER_TDMR, PAMT_ENTRY_SIZE; then at 48 TDCS_BASE_SIZE, 2 reserved, TDVPS_BASE_SIZE,
# TDVPS_XFAM_DEPENDENT_SIZE; at 64 ATTRIBUTES_FIXED0/1, XFAM_FIXED0/1; at 128 NUM_CPUID_CONFIG and the list.
_HEAD: Final = Struct("<IIIHHHB13xHHH10xHxxHB9xQQQQ32xI")
_CPUID_CONFIG: Final = Struct("<QIIII")
_TDCS_BASE_BYTES: Final = 6 * 4096
_TDVPS_BASE_BYTES: Final = 6 * 4096


def tdh_sys_info(module: TdxModule, lp: int, regs: Gprs) -> int:
    """Describe the module and the Convertible Memory Ranges.

    ======= === ============================================================
    Operand     Meaning
    ======= === ============================================================
    RCX     in  HPA for TDSYSINFO_STRUCT, shared, 1 KiB-aligned
    RDX     i/o its size, at least 1024; out: 1024 [bytes]
    R8      in  HPA for the array of CMR_INFO, shared, 512-byte-aligned
    R9      i/o its length, at least 32; out: 32 [entries]
    ======= === ============================================================

    Spec: TDX Module ABI Reference, TDH.SYS.INFO.
    """
    size, entries = regs[RDX], regs[R9]
    regs[RDX] = regs[R9] = 0

    # 1. This LP is initialised.
    if not module.lp_is_init[lp]:
        raise LeafError(Status.SYS_LP_INIT_NOT_DONE)

    # 2. RCX is shared memory and large enough. It is zeroed even if a later check fails.
    module.check_shared_hpa(regs[RCX], _TDSYSINFO_BYTES, Operand.RCX)
    if size < _TDSYSINFO_BYTES:
        raise LeafError(Status.OPERAND_INVALID, Operand.RDX)
    module.write_shared(regs[RCX], bytes(_TDSYSINFO_BYTES))

    # 3. So is R8.
    module.check_shared_hpa(regs[R8], _CMR_LIST_BYTES, Operand.R8)
    if entries < MAX_CMRS:
        raise LeafError(Status.OPERAND_INVALID, Operand.R9)

    # ---- Every check passed: from here on the leaf cannot fail. ----

    module.write_shared(regs[RCX], _td_sys_info(module))
    cmrs = [*module.platform.cmrs, *[(0, 0)] * MAX_CMRS][:MAX_CMRS]
    module.write_shared(regs[R8], b"".join(_CMR_INFO.pack(base, length) for base, length in cmrs))
    regs[RDX] = _TDSYSINFO_BYTES
    regs[R9] = MAX_CMRS
    return 0


def _td_sys_info(module: TdxModule) -> bytes:
    profile, capabilities = module.profile, capabilities_of(module)
    head = _HEAD.pack(
        0,
        VENDOR_INTEL,
        profile.build_date,
        profile.build_num,
        profile.minor_version,
        profile.major_version,
        1,
        MAX_TDMRS,
        MAX_RESERVED_PER_TDMR,
        PAMT_ENTRY_BYTES,
        _TDCS_BASE_BYTES,
        _TDVPS_BASE_BYTES,
        0,
        profile.attributes_fixed0,
        profile.attributes_fixed1,
        capabilities.xfam_fixed0,
        XFAM_FIXED1,
        len(CPUID_CONFIG),
    )
    configurable = b"".join(
        _CPUID_CONFIG.pack(
            row.leaf_subleaf,
            *(row.config_direct[i] | row.allow_direct[i] & capabilities.cpuid.values[row.index][i] for i in range(4)),
        )
        for row in CPUID_CONFIG
    )
    return (head + configurable).ljust(_TDSYSINFO_BYTES, b"\0")
