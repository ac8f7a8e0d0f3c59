"""TD_PARAMS: the TD's configuration as TDH.MNG.INIT takes it, its checks in order, and what follows from it.

Spec: TDX Module ABI Reference, "TD_PARAMS", "ATTRIBUTES", "XFAM", "CONFIG_FLAGS".
"""

from dataclasses import dataclass
from struct import Struct
from typing import Final, Protocol

from sim_backend.tdx_module.cpu_capabilities import (
    IA32_ARCH_CAPABILITIES,
    IA32_TSC_ADJUST,
    XFAM_FIXED1,
    CpuCapabilities,
)
from sim_backend.tdx_module.cpuid_virtualization import (
    CpuidFlags,
    CpuidValues,
    TsxControlMissingError,
    configure,
)
from sim_backend.tdx_module.errors import LeafError
from uapi_ctypes.tdx_status import Operand, Status

TD_PARAMS_BYTES: Final = 1024
NUM_CPUID_CONFIG: Final = 12

ATTR_DEBUG: Final = 1 << 0
ATTR_SEPT_VE_DISABLE: Final = 1 << 28
ATTR_MIGRATABLE: Final = 1 << 29
ATTR_PKS: Final = 1 << 30
ATTR_PERFMON: Final = 1 << 63

FLAG_GPAW: Final = 1 << 0
FLAG_FLEXIBLE_PENDING_VE: Final = 1 << 1
FLAG_NO_RBP_MOD: Final = 1 << 2

XFAM_AVX: Final = 1 << 2
_XFAM_AVX512: Final = 7 << 5
XFAM_PT: Final = 1 << 8
XFAM_CET: Final = 3 << 11
XFAM_AMX: Final = 3 << 17

MAX_L2_VMS: Final = 3
MIN_TDCX_PAGES: Final = 6
_MIN_MAXPA_FOR_5_LEVELS: Final = 49  # [bits]
_MIN_TSC_FREQUENCY: Final = 4  # [25 MHz]
_MAX_TSC_FREQUENCY: Final = 400
_TSC_FREQUENCY_UNIT: Final = 25_000_000  # [Hz]
DEFAULT_HP_LOCK_TIMEOUT_US: Final = 1_000_000

# IA32_ARCH_CAPABILITIES: bits that the module always reports as 0, and those that TD_PARAMS may choose.
_ARCH_CAP_FIXED0: Final = 7 << 9 | 7 << 16 | 7 << 21 | ((1 << 64) - (1 << 25))
_ARCH_CAP_ALLOW: Final = 1 << 4 | 1 << 20 | 1 << 24  # SSB_NO, BHI_NO, PBRSB_NO: 1 only if asked for
_ARCH_CAP_FORCE: Final = 1 << 19  # RRSBA: 1 when asked for
ARCH_CAP_CONFIG_MASK: Final = _ARCH_CAP_ALLOW | _ARCH_CAP_FORCE
_ARCH_CAP_TSX_CTRL: Final = 1 << 7

_XSAVE_EXTENDED_REGION: Final = 576  # legacy region and header [bytes]
_LAYOUT: Final = Struct("<QQHBB4sQQH38s48s48s48sQ24s")
_CPUID_CONFIG_OFFSET: Final = 0x100
_CPUID_VALUES: Final = Struct("<4I")


class ConfigLimits(Protocol):
    """What a module release allows: part of its profile."""

    @property
    def attributes_fixed0(self) -> int:
        """ATTRIBUTES bits that may be 1."""
        ...

    @property
    def attributes_fixed1(self) -> int:
        """ATTRIBUTES bits that must be 1."""
        ...

    @property
    def config_flags_fixed0(self) -> int:
        """CONFIG_FLAGS bits that may be 1."""
        ...

    @property
    def config_flags_fixed1(self) -> int:
        """CONFIG_FLAGS bits that must be 1."""
        ...


@dataclass(frozen=True, slots=True)
class TdParams:
    """TD_PARAMS as it lies in memory."""

    attributes: int
    xfam: int
    max_vcpus: int
    num_l2_vms: int
    msr_config_ctls: int
    eptp_controls: int
    config_flags: int
    tsc_frequency: int  # [25 MHz]
    mrconfigid: bytes
    mrowner: bytes
    mrownerconfig: bytes
    ia32_arch_capabilities_config: int
    cpuid_config: tuple[CpuidValues, ...]
    reserved: tuple[bytes, bytes, bytes, bytes]

    @classmethod
    def decode(cls, data: bytes) -> "TdParams":
        """Decode 1024 bytes."""
        (
            attributes, xfam, max_vcpus, num_l2_vms, msr_config_ctls, reserved0, eptp, flags, tsc, reserved1,
            mrconfigid, mrowner, mrownerconfig, arch_capabilities, reserved2,
        ) = _LAYOUT.unpack_from(data)  # fmt: skip
        config: list[CpuidValues] = [
            _CPUID_VALUES.unpack_from(data, _CPUID_CONFIG_OFFSET + i * _CPUID_VALUES.size)
            for i in range(NUM_CPUID_CONFIG)
        ]
        end = _CPUID_CONFIG_OFFSET + NUM_CPUID_CONFIG * _CPUID_VALUES.size
        return cls(
            attributes=attributes,
            xfam=xfam,
            max_vcpus=max_vcpus,
            num_l2_vms=num_l2_vms,
            msr_config_ctls=msr_config_ctls,
            eptp_controls=eptp,
            config_flags=flags,
            tsc_frequency=tsc,
            mrconfigid=mrconfigid,
            mrowner=mrowner,
            mrownerconfig=mrownerconfig,
            ia32_arch_capabilities_config=arch_capabilities,
            cpuid_config=tuple(config),
            reserved=(reserved0, reserved1, reserved2, bytes(data[end:TD_PARAMS_BYTES])),
        )


@dataclass(frozen=True, slots=True)
class TdConfiguration:
    """What an accepted TD_PARAMS makes of the TD."""

    params: TdParams
    cpuid_values: tuple[CpuidValues, ...]
    cpuid_flags: CpuidFlags
    virtual_arch_capabilities: int
    xbuff_offsets: tuple[int, ...]  # by XFAM bit [bytes]
    xbuff_size: int  # [bytes]


def check(
    params: TdParams, limits: ConfigLimits, capabilities: CpuCapabilities, *, num_tdcx: int, tsc_adjust: int, maxpa: int
) -> TdConfiguration:
    """Check TD_PARAMS in the module's order and return the TD's configuration.

    `num_tdcx` is the number of TDCS pages, `tsc_adjust` IA32_TSC_ADJUST of this LP now, `maxpa` in bits. Raise
    `LeafError`, or `CpuidConfigError` where RCX names the CPUID leaf.
    """
    # 1. ATTRIBUTES and XFAM are allowed; there is room for a vCPU; NUM_L2_VMS fits the TDCS pages.
    if not _are_attributes_allowed(params.attributes, limits):
        raise LeafError(Status.OPERAND_INVALID, Operand.ATTRIBUTES)
    if not is_xfam_allowed(params.xfam, capabilities.xfam_fixed0):
        raise LeafError(Status.OPERAND_INVALID, Operand.XFAM)
    if params.max_vcpus == 0:
        raise LeafError(Status.OPERAND_INVALID, Operand.MAX_VCPUS)
    if params.num_l2_vms > MAX_L2_VMS:
        raise LeafError(Status.OPERAND_INVALID, Operand.NUM_L2_VMS)
    if num_tdcx < MIN_TDCX_PAGES + params.num_l2_vms:
        raise LeafError(Status.TDCS_NOT_ALLOCATED)
    if any(params.reserved[0]):
        raise LeafError(Status.OPERAND_INVALID, Operand.RDX)

    # 2. CONFIG_FLAGS, EPTP_CONTROLS, TSC_FREQUENCY.
    flags = params.config_flags
    if flags & ~limits.config_flags_fixed0 or ~flags & limits.config_flags_fixed1:
        raise LeafError(Status.OPERAND_INVALID, Operand.EXEC_CONTROLS)
    five_levels = bool(capabilities.ept_vpid_cap & 1 << 7) and maxpa >= _MIN_MAXPA_FOR_5_LEVELS
    if not _are_eptp_controls_allowed(params.eptp_controls, gpaw=bool(flags & FLAG_GPAW), five_levels=five_levels):
        raise LeafError(Status.OPERAND_INVALID, Operand.EPTP_CONTROLS)
    if not _MIN_TSC_FREQUENCY <= params.tsc_frequency <= _MAX_TSC_FREQUENCY:
        raise LeafError(Status.OPERAND_INVALID, Operand.TSC_FREQUENCY)

    # 3. The host has not moved the TSC since TDH.SYS.INIT.
    if tsc_adjust != capabilities.tsc_adjust:
        raise LeafError(Status.INCONSISTENT_MSR, IA32_TSC_ADJUST)

    # 4. Reserved fields around the measurement inputs and MSR_CONFIG_CTLS.
    if any(params.reserved[1]) or params.msr_config_ctls & ~1 or any(params.reserved[2]):
        raise LeafError(Status.OPERAND_INVALID, Operand.RDX)

    # 5. CPUID_CONFIG.
    try:
        cpuid_values, cpuid_flags = configure(
            capabilities.cpuid,
            params.cpuid_config,
            attributes=params.attributes,
            xfam=params.xfam,
            tsc_frequency=params.tsc_frequency,
        )
    except TsxControlMissingError:
        raise LeafError(Status.INCORRECT_MSR_VALUE, IA32_ARCH_CAPABILITIES) from None
    if any(params.reserved[3]):
        raise LeafError(Status.OPERAND_INVALID, Operand.RDX)

    # 6. IA32_ARCH_CAPABILITIES_CONFIG, and what the fields mean together.
    arch_capabilities = _virtual_arch_capabilities(params, capabilities.arch_capabilities, tsx=cpuid_flags.tsx)
    if params.attributes & ATTR_MIGRATABLE and params.num_l2_vms:
        raise LeafError(Status.OPERAND_INVALID, Operand.RDX)

    offsets, size = xbuff_layout(params.xfam, capabilities.xsave_components)
    return TdConfiguration(params, cpuid_values, cpuid_flags, arch_capabilities, offsets, size)


def _are_attributes_allowed(attributes: int, limits: ConfigLimits) -> bool:
    if attributes & ~limits.attributes_fixed0 or ~attributes & limits.attributes_fixed1:
        return False
    return not (attributes & ATTR_MIGRATABLE and attributes & (ATTR_DEBUG | ATTR_PERFMON))


def is_xfam_allowed(xfam: int, xfam_fixed0: int) -> bool:
    """Tell whether a TD may have these extended features, given those that module and CPU support."""
    if xfam & ~xfam_fixed0 or ~xfam & XFAM_FIXED1:
        return False
    avx512 = xfam & _XFAM_AVX512
    if avx512 and (avx512 != _XFAM_AVX512 or not xfam & XFAM_AVX):
        return False
    return xfam & XFAM_CET in (0, XFAM_CET) and xfam & XFAM_AMX in (0, XFAM_AMX)


def is_xcr0_allowed(xcr0: int, xfam: int, xcr0_supported: int) -> bool:
    """Tell whether the guest may write `xcr0` (Intel SDM Vol. 1, 13.3, within XFAM)."""
    if xcr0 & ~(xcr0_supported & xfam) or not xcr0 & 1:
        return False
    if xcr0 & XFAM_AVX and not xcr0 & 2:
        return False
    avx512 = xcr0 & _XFAM_AVX512
    if avx512 and (avx512 != _XFAM_AVX512 or not xcr0 & XFAM_AVX):
        return False
    return xcr0 & XFAM_AMX in (0, XFAM_AMX)


def _are_eptp_controls_allowed(controls: int, *, gpaw: bool, five_levels: bool) -> bool:
    levels = controls >> 3 & 7  # minus one
    if controls & ~0x3F or controls & 7 != 6 or levels not in (3, 4):
        return False
    if levels == 4 and not five_levels:
        return False
    return levels == 4 or not gpaw


def _virtual_arch_capabilities(params: TdParams, native: int, *, tsx: bool) -> int:
    config = params.ia32_arch_capabilities_config
    if config & ~ARCH_CAP_CONFIG_MASK or (config and not params.msr_config_ctls & 1):
        raise LeafError(Status.OPERAND_INVALID, Operand.IA32_ARCH_CAPABILITIES_CONFIG)
    value = native & ~(_ARCH_CAP_ALLOW & ~config) & ~_ARCH_CAP_FIXED0 | config & _ARCH_CAP_FORCE
    return value if tsx else value & ~_ARCH_CAP_TSX_CTRL


def xbuff_layout(xfam: int, components: tuple[tuple[int, bool], ...]) -> tuple[tuple[int, ...], int]:
    """Return the offsets of the XSAVE components in XBUFF by XFAM bit, and its size (Intel SDM Vol. 1, 13.4.3)."""
    offsets = [0] * len(components)
    offset = _XSAVE_EXTENDED_REGION
    for bit in range(2, len(components)):
        if xfam >> bit & 1:
            size, aligned = components[bit]
            if aligned:
                offset = (offset + 63) & ~63
            offsets[bit] = offset
            offset += size
    return tuple(offsets), offset


def microseconds_to_tsc(microseconds: int, tsc_frequency: int) -> int:
    """Return TSC ticks; `tsc_frequency` is native [Hz]."""
    return microseconds * tsc_frequency // 1_000_000


def tsc_parameters(native_tsc: int, native_frequency: int, frequency: int) -> tuple[int, int]:
    """Return TSC_MULTIPLIER and TSC_OFFSET with which the virtual TSC runs at `frequency` [25 MHz] from 0 now."""
    multiplier = (frequency * _TSC_FREQUENCY_UNIT << 48) // native_frequency
    return multiplier, -(native_tsc * multiplier >> 48) & (1 << 64) - 1
