"""What the host kernel learns from the TDX module when it brings it up (`struct tdx_sys_info`)."""

from dataclasses import dataclass
from typing import Final

from sim_backend.kvm.tdx.seamcalls import SUCCESS, Seamcalls

_TDX_FEATURES0: Final = 0x0A00_0003_0000_0008
_TDCS_BASE_SIZE: Final = 0x9800_0001_0000_0100
_TDVPS_BASE_SIZE: Final = 0x9800_0001_0000_0200
_ATTRIBUTES_FIXED0: Final = 0x1900_0003_0000_0000
_ATTRIBUTES_FIXED1: Final = 0x1900_0003_0000_0001
_XFAM_FIXED0: Final = 0x1900_0003_0000_0002
_XFAM_FIXED1: Final = 0x1900_0003_0000_0003
_NUM_CPUID_CONFIG: Final = 0x9900_0001_0000_0004
_CPUID_CONFIG_LEAVES: Final = 0x9900_0003_0000_0400
_CPUID_CONFIG_VALUES: Final = 0x9900_0003_0000_0500

FEATURE_NO_RBP_MOD: Final = 1 << 18
FEATURE_TOPOLOGY_ENUM: Final = 1 << 20

_HLE: Final = 1 << 4  # CPUID.7.0:EBX
_RTM: Final = 1 << 11  # CPUID.7.0:EBX
_WAITPKG: Final = 1 << 5  # CPUID.7.0:ECX
_LOW: Final = 0xFFFF_FFFF
NO_SUBLEAF: Final = 0xFFFF_FFFF


class TdxUnavailable(Exception):  # noqa: N818 - a state of the host, not a failed call
    """The module lacks what KVM insists on, so this host offers no TDX."""


@dataclass(frozen=True, slots=True)
class CpuidConfig:
    """One CPUID (sub-)leaf that a TD's creator may configure, with its configurable bits."""

    leaf: int
    subleaf: int  # NO_SUBLEAF: the leaf has none
    eax: int
    ebx: int
    ecx: int
    edx: int

    def without_host_state_features(self) -> "CpuidConfig":
        """Return the entry less TSX and WAITPKG, which would corrupt the host's TSX_CTRL and UMWAIT MSRs."""
        if self.leaf != 7 or self.subleaf not in (0, NO_SUBLEAF):
            return self
        return CpuidConfig(self.leaf, self.subleaf, self.eax, self.ebx & ~(_HLE | _RTM), self.ecx & ~_WAITPKG, self.edx)


def uses_tsx_or_waitpkg(function: int, index: int, ebx: int, ecx: int) -> bool:
    """Tell whether a CPUID entry turns on what KVM refuses to give a TD."""
    return function == 7 and index == 0 and bool(ebx & (_HLE | _RTM) or ecx & _WAITPKG)


@dataclass(frozen=True, slots=True)
class TdxSysInfo:
    """The fields of the module's global metadata that KVM uses."""

    features0: int
    tdcs_pages: int  # [4 KiB pages], TDCX pages of a TD
    tdvps_pages: int  # [4 KiB pages], TDVPR and TDCX pages of a vCPU
    attributes_fixed0: int
    attributes_fixed1: int
    xfam_fixed0: int
    xfam_fixed1: int
    cpuid_configs: tuple[CpuidConfig, ...]


def read_sysinfo(seamcalls: Seamcalls, lp: int) -> TdxSysInfo:
    """Read the metadata with TDH.SYS.RD; raise `TdxUnavailable` when the module refuses a field."""

    def read(field: int) -> int:
        status, value = seamcalls.sys_rd(lp, field)
        if status != SUCCESS:
            raise TdxUnavailable(f"TDH.SYS.RD of field {field:#018x}: {status:#018x}")
        return value

    configs = []
    for index in range(read(_NUM_CPUID_CONFIG)):
        leaf = read(_CPUID_CONFIG_LEAVES + index)
        eax_ebx = read(_CPUID_CONFIG_VALUES + 2 * index)
        ecx_edx = read(_CPUID_CONFIG_VALUES + 2 * index + 1)
        configs.append(
            CpuidConfig(leaf & _LOW, leaf >> 32, eax_ebx & _LOW, eax_ebx >> 32, ecx_edx & _LOW, ecx_edx >> 32)
        )
    return TdxSysInfo(
        features0=read(_TDX_FEATURES0),
        tdcs_pages=read(_TDCS_BASE_SIZE) >> 12,
        tdvps_pages=read(_TDVPS_BASE_SIZE) >> 12,
        attributes_fixed0=read(_ATTRIBUTES_FIXED0),
        attributes_fixed1=read(_ATTRIBUTES_FIXED1),
        xfam_fixed0=read(_XFAM_FIXED0),
        xfam_fixed1=read(_XFAM_FIXED1),
        cpuid_configs=tuple(configs),
    )
