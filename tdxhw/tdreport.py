"""TDREPORT_STRUCT, what TDG.MR.REPORT writes (TDX Module Base Specification, "TDREPORT_STRUCT"), 1024 bytes."""

import struct
from dataclasses import dataclass
from typing import ClassVar, Final, Self

_TEE_TCB_INFO: Final = slice(256, 495)
_TEE_INFO: Final = slice(512, 1024)
_HASH_BYTES: Final = 48


def _hash_at(data: bytes, offset: int) -> bytes:
    return data[offset : offset + _HASH_BYTES]


@dataclass(frozen=True, slots=True)
class TdReport:
    """A TDREPORT, as far as a test looks at it."""

    SIZE: ClassVar[int] = 1024
    TYPE_TDX: ClassVar[int] = 0x81

    type: int
    cpusvn: bytes
    tee_tcb_info_hash: bytes
    tee_info_hash: bytes
    report_data: bytes
    mac: bytes
    tee_tcb_info: bytes
    tee_info: bytes
    attributes: int
    xfam: int
    mrtd: bytes
    mrconfigid: bytes
    mrowner: bytes
    mrownerconfig: bytes
    rtmrs: tuple[bytes, bytes, bytes, bytes]

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Split `data`. Raise ``ValueError`` when it is not 1024 bytes."""
        if len(data) != cls.SIZE:
            raise ValueError(f"a TDREPORT has {cls.SIZE} bytes, not {len(data)}")
        info = data[_TEE_INFO]
        attributes, xfam = struct.unpack_from("<QQ", info)
        rtmrs = _hash_at(info, 208), _hash_at(info, 256), _hash_at(info, 304), _hash_at(info, 352)
        return cls(
            type=data[0],
            cpusvn=data[16:32],
            tee_tcb_info_hash=_hash_at(data, 32),
            tee_info_hash=_hash_at(data, 80),
            report_data=data[128:192],
            mac=data[224:256],
            tee_tcb_info=data[_TEE_TCB_INFO],
            tee_info=info,
            attributes=attributes,
            xfam=xfam,
            mrtd=_hash_at(info, 16),
            mrconfigid=_hash_at(info, 64),
            mrowner=_hash_at(info, 112),
            mrownerconfig=_hash_at(info, 160),
            rtmrs=rtmrs,
        )
