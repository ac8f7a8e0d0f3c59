"""x87 and SSE state: an FXSAVE image to and from Unicorn's CPUX86State."""

import ctypes
import struct
from typing import Final

from sim_backend.cpu import unicorn_internals as u
from sim_backend.cpu.unicorn_instance import UnicornInstance

_MXCSR_MASK: Final = 0xFFFF
FXSAVE_BYTES: Final = 512
RESET_IMAGE: Final = struct.pack("<HHB19xII480x", 0x37F, 0, 0, 0x1F80, _MXCSR_MASK)
"""What FNINIT and a reset of MXCSR leave."""


def save_fpu(instance: UnicornInstance) -> bytes:
    """Return x87 and SSE state as a 512-byte FXSAVE image. FIP, FDP and FOP are not kept: zero."""
    raw = instance.raw
    (top,) = struct.unpack_from("<I", raw, u.ENV_FPSTT)
    status, control = struct.unpack_from("<HH", raw, u.ENV_FPUS)
    tags = sum(1 << index for index in range(8) if not raw[u.ENV_FPTAGS + index])
    (mxcsr,) = struct.unpack_from("<I", raw, u.ENV_MXCSR)
    parts = [struct.pack("<HHB19xII", control, status & ~0x3800 | (top & 7) << 11, tags, mxcsr, _MXCSR_MASK)]
    for index in range(8):
        register = u.ENV_FPREGS + 16 * ((top + index) & 7)
        parts.append(bytes(raw[register : register + 10]) + bytes(6))
    for index in range(16):
        register = u.ENV_XMM + 64 * index
        parts.append(bytes(raw[register : register + 16]))
    return b"".join(parts).ljust(FXSAVE_BYTES, b"\0")


def load_fpu(instance: UnicornInstance, image: bytes) -> None:
    """Load x87 and SSE state from a 512-byte FXSAVE image."""
    raw = instance.raw
    control, status, tags, mxcsr = struct.unpack_from("<HHB19xI", image)
    top = status >> 11 & 7
    struct.pack_into("<I", raw, u.ENV_FPSTT, top)
    struct.pack_into("<H", raw, u.ENV_FPUS, status & ~0x3800)
    for index in range(8):
        raw[u.ENV_FPTAGS + index] = not tags >> index & 1
        register = u.ENV_FPREGS + 16 * ((top + index) & 7)
        raw[register : register + 10] = image[32 + 16 * index : 42 + 16 * index]
    for index in range(16):
        register = u.ENV_XMM + 64 * index
        raw[register : register + 16] = image[160 + 16 * index : 176 + 16 * index]
    if not instance.handle:  # closed
        return
    # Through the API: rounding and denormal modes are kept in derived form as well.
    for number, value in ((u.UC_REG_FPCW, control), (u.UC_REG_MXCSR, mxcsr)):
        u.uc_reg_write(instance.handle, number, ctypes.addressof(ctypes.c_uint64(value)))
