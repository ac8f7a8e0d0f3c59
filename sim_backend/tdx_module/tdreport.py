"""TDINFO, TEE_INFO_HASH and the TDREPORT.

Spec: TDX Module ABI Reference, "TDREPORT_STRUCT", "REPORTMACSTRUCT", "TDINFO_STRUCT".
"""

from __future__ import annotations

import hashlib
import hmac
from struct import Struct
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from sim_backend.tdx_module.tdcs import Tdcs

TDREPORT_BYTES: Final = 1024
REPORTDATA_BYTES: Final = 64
TDINFO_BYTES: Final = 512
_TYPE_TDX: Final = 0x81
_CPUSVN: Final = bytes([0x11]) * 16  # what the CPU of the recorded vectors reports
_TEE_TCB_INFO: Final = bytes(256)  # likewise: the SEAM loader's measurements are not modelled
_TEE_TCB_INFO_HASH: Final = bytes(48)
REPORTMACSTRUCT_BYTES: Final = 256
_MAC_OFFSET: Final = 224
_NO_MAC: Final = bytes(32)
_TDINFO: Final = Struct("<QQ48s48s48s48s48s48s48s48s48s64x")
_MACSTRUCT: Final = Struct("<BBBx12x16s48s48s64s32x")
_DIGEST: Final = bytes(48)

IGNORE_ATTRIBUTES: Final = 1 << 0
IGNORE_XFAM: Final = 1 << 1
IGNORE_MRTD: Final = 1 << 2
IGNORE_MRCONFIGID: Final = 1 << 3
IGNORE_MROWNER: Final = 1 << 4
IGNORE_MROWNERCONFIG: Final = 1 << 5
IGNORE_RTMR0: Final = 1 << 6  # 9:6, one an RTMR
IGNORE_SERVTD_HASH: Final = 1 << 10


def tdinfo(tdcs: Tdcs, ignore: int = 0) -> bytes:
    """Return TDINFO (512 bytes); fields named by the IGNORE_* bits of `ignore` are zero."""

    def kept(bit: int, value: bytes) -> bytes:
        return _DIGEST if ignore & bit else value

    return _TDINFO.pack(
        0 if ignore & IGNORE_ATTRIBUTES else tdcs.attributes,
        0 if ignore & IGNORE_XFAM else tdcs.xfam,
        kept(IGNORE_MRTD, tdcs.mrtd),
        kept(IGNORE_MRCONFIGID, tdcs.mrconfigid),
        kept(IGNORE_MROWNER, tdcs.mrowner),
        kept(IGNORE_MROWNERCONFIG, tdcs.mrownerconfig),
        *(kept(IGNORE_RTMR0 << index, rtmr) for index, rtmr in enumerate(tdcs.rtmr)),
        kept(IGNORE_SERVTD_HASH, tdcs.servtd_hash),
    )


def tee_info_hash(tdcs: Tdcs, ignore: int = 0) -> bytes:
    """Return SHA-384 of TDINFO. The hash of the whole TDINFO is cached until an RTMR changes."""
    if ignore:
        return hashlib.sha384(tdinfo(tdcs, ignore)).digest()
    if tdcs.tee_info_hash is None:
        tdcs.tee_info_hash = hashlib.sha384(tdinfo(tdcs)).digest()
    return tdcs.tee_info_hash


def _mac(key: bytes | None, mac_struct: bytes) -> bytes:
    """Return what SEAMREPORT puts in the MAC: HMAC-SHA-256 under the CPU's key. Without a key: zeros."""
    return _NO_MAC if key is None else hmac.digest(key, mac_struct[:_MAC_OFFSET], "sha256")


def is_made_here(key: bytes | None, mac_struct: bytes) -> bool:
    """Tell whether a CPU with this key made the REPORTMACSTRUCT (256 bytes). A CPU without a key accepts any."""
    return key is None or hmac.compare_digest(mac_struct[_MAC_OFFSET:], _mac(key, mac_struct))


def tdreport(tdcs: Tdcs, report_data: bytes, key: bytes | None) -> bytes:
    """Return the TDREPORT (1024 bytes) over `report_data` (64 bytes), its MAC made under the CPU's `key`."""
    version = 1 if tdcs.servtd_num else 0
    mac_struct = _MACSTRUCT.pack(_TYPE_TDX, 0, version, _CPUSVN, _TEE_TCB_INFO_HASH, tee_info_hash(tdcs), report_data)
    return mac_struct + _mac(key, mac_struct) + _TEE_TCB_INFO + tdinfo(tdcs)
