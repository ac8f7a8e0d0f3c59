"""TD_PARAMS, the structure that TDH.MNG.INIT takes (TDX Module ABI Reference, TD_PARAMS)."""

import struct
from dataclasses import dataclass
from typing import Final

TD_PARAMS_BYTES: Final = 1024
CONFIG_FLAGS_MAX_GPAW: Final = 1 << 0
CONFIG_FLAGS_NO_RBP_MOD: Final = 1 << 2
_EPTP_WB: Final = 6
_HEAD: Final = struct.Struct("<QQH6xQQH38x48s48s48s")
_CPUID_VALUES_OFFSET: Final = 256


@dataclass(frozen=True, slots=True)
class TdParams:
    """What KVM sets in TD_PARAMS; everything else is zero. `cpuid_values` is in the module's own order."""

    attributes: int
    xfam: int
    max_vcpus: int
    ept_levels: int  # 4 or 5
    gpaw52: bool
    no_rbp_mod: bool
    tsc_frequency: int  # [25 MHz]
    mrconfigid: bytes
    mrowner: bytes
    mrownerconfig: bytes
    cpuid_values: tuple[tuple[int, int, int, int], ...]

    def pack(self) -> bytes:
        """Return the 1024 bytes."""
        config_flags = CONFIG_FLAGS_MAX_GPAW if self.gpaw52 else 0
        if self.no_rbp_mod:
            config_flags |= CONFIG_FLAGS_NO_RBP_MOD
        head = _HEAD.pack(
            self.attributes,
            self.xfam,
            self.max_vcpus & 0xFFFF,
            _EPTP_WB | self.ept_levels - 1 << 3,
            config_flags,
            self.tsc_frequency & 0xFFFF,
            self.mrconfigid,
            self.mrowner,
            self.mrownerconfig,
        )
        values = b"".join(struct.pack("<4I", *value) for value in self.cpuid_values)
        return (head.ljust(_CPUID_VALUES_OFFSET, b"\0") + values).ljust(TD_PARAMS_BYTES, b"\0")
