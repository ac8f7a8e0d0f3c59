"""What TDH.SYS.INIT demands of the platform, in its order.

Each function raises the `LeafError` of the first demand that is not met. The leaf samples what is checked here, and
TDH.SYS.LP.INIT (lp_checks.py) compares every LP with the sample.

Source: TDX Module 1.5 Base Architecture Specification, "TDX Module Initialization: Platform Configuration Checks";
release 1.5.01.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from sim_backend.hw.platform import Platform
from sim_backend.tdx_module.errors import LeafError
from uapi_ctypes.tdx_status import Status

IA32_TSC_ADJUST: Final = 0x3B
IA32_MKTME_KEYID_PARTITIONING: Final = 0x87
IA32_WBINVDP: Final = 0x98
IA32_WBNOINVDP: Final = 0x99
IA32_MISC_PACKAGE_CTLS: Final = 0xBC
IA32_XAPIC_DISABLE_STATUS: Final = 0xBD
IA32_CORE_CAPABILITIES: Final = 0xCF
IA32_MTRRCAP: Final = 0xFE
IA32_ARCH_CAPABILITIES: Final = 0x10A
IA32_MISC_ENABLE: Final = 0x1A0
IA32_SMRR_PHYSBASE: Final = (0x1F2, 0x1F6)
IA32_SMRR_PHYSMASK: Final = (0x1F3, 0x1F7)
IA32_PERF_CAPABILITIES: Final = 0x345
IA32_VMX_BASIC: Final = 0x480
IA32_VMX_MISC: Final = 0x485
IA32_VMX_CR0_FIXED0: Final = 0x486
IA32_VMX_CR0_FIXED1: Final = 0x487
IA32_VMX_CR4_FIXED0: Final = 0x488
IA32_VMX_CR4_FIXED1: Final = 0x489
IA32_VMX_PROCBASED_CTLS2: Final = 0x48B
IA32_VMX_EPT_VPID_CAP: Final = 0x48C
IA32_VMX_TRUE_PINBASED_CTLS: Final = 0x48D
IA32_VMX_TRUE_PROCBASED_CTLS: Final = 0x48E
IA32_VMX_TRUE_EXIT_CTLS: Final = 0x48F
IA32_VMX_TRUE_ENTRY_CTLS: Final = 0x490
IA32_VMX_PROCBASED_CTLS3: Final = 0x492
IA32_TME_CAPABILITY: Final = 0x981
IA32_TME_ACTIVATE: Final = 0x982

MISC_ENABLE_BOOT_NT4: Final = 1 << 22
MAX_HKIDS: Final = 2048
MAX_PA: Final = 52
MTRRCAP_SMRR: Final = 1 << 11
MTRRCAP_SMRR2: Final = 1 << 13
MTRRCAP_SMRR_LOCK: Final = 1 << 14
SMRR_LOCK: Final = 1 << 10
SMRR_VALID: Final = 1 << 11
SEAMOPS_TD_PRESERVING: Final = 0b11_1100
"""SEAMDB.CLEAR, .INSERT, .GETREF and .REPORT: what a module update that preserves TDs needs."""

_ARCH_CAPABILITIES_ONE: Final = 0x20_FD6B  # bits 0, 1, 3, 5, 6, 8, 10..15, 21
_ARCH_CAPABILITIES_ZERO: Final = 1 << 2  # RSBA
_EPT_VPID_CAP: Final = 0x101_0633_4041
_GUEST_CR0_INIT: Final = 0x21
_GUEST_CR4_INIT: Final = 0x2040
_L2_CR0_VARIABLE: Final = 0x8005_001F
_PE_PG: Final = 1 | 1 << 31
_U32: Final = 0xFFFF_FFFF
_U64: Final = (1 << 64) - 1
_EN_GUEST_WAIT_PAUSE: Final = 1 << 26
_EN_ENCLV_EXITING: Final = 1 << 28

Rdmsr = Callable[[int], int]


@dataclass(frozen=True, slots=True)
class ControlDemand:
    """What the module wants of one VMX control field. `unknown` bits take whatever the CPU demands."""

    msr: int
    init: int
    variable: int
    unknown: int

    def met_by(self, value: int, init: int | None = None) -> bool:
        """Tell whether a capability MSR of the usual form (must-be-1 in 31:0, may-be-1 in 63:32) allows it."""
        init = self.init if init is None else init
        must_be_1, may_be_1 = value & _U32, value >> 32
        must_be_0 = ~may_be_1 & _U32
        return not (must_be_1 & ~(init | self.unknown) or must_be_0 & init or (must_be_1 | must_be_0) & self.variable)

    def met_by_allowed1(self, value: int) -> bool:
        """Tell whether a capability MSR whose 64 bits are may-be-1 allows it."""
        return not ~value & _U64 & (self.init | self.variable)


_L1: Final = {
    demand.msr: demand
    for demand in (
        ControlDemand(IA32_VMX_TRUE_PINBASED_CTLS, 0x29, 0x80, 0xFFFF_FF16),
        ControlDemand(IA32_VMX_TRUE_PROCBASED_CTLS, 0x9122_0088, 0x2040_0C00, 0x0404_6173),
        ControlDemand(IA32_VMX_PROCBASED_CTLS2, 0x133C_B3FA, 0xCC00_0400, 0),
        ControlDemand(IA32_VMX_PROCBASED_CTLS3, 0x80, 0x20, 0xFFFF_FFFF_FFFF_FF40),
        ControlDemand(IA32_VMX_TRUE_EXIT_CTLS, 0x1F3C_8204, 0x4000_1000, 0x0003_6DFB),
        ControlDemand(IA32_VMX_TRUE_ENTRY_CTLS, 0x003E_C004, 0x0040_2200, 0xFF80_11FB),
    )
}
_L2: Final = {
    demand.msr: demand
    for demand in (
        ControlDemand(IA32_VMX_TRUE_PINBASED_CTLS, 0x29, 0, 0xFFFF_FF16),
        ControlDemand(IA32_VMX_TRUE_PROCBASED_CTLS, 0x9122_0088, 0x68D8_1E04, 0x0404_6173),
        ControlDemand(IA32_VMX_PROCBASED_CTLS2, 0x1338_B3FA, 0x0C51_3E0C, 0),
        ControlDemand(IA32_VMX_PROCBASED_CTLS3, 0x80, 0x2E, 0xFFFF_FFFF_FFFF_FF40),
        ControlDemand(IA32_VMX_TRUE_EXIT_CTLS, 0x1F3C_8204, 0x4000_1000, 0x0003_6DFB),
        ControlDemand(IA32_VMX_TRUE_ENTRY_CTLS, 0x003E_C004, 0x0040_2200, 0xFF80_11FB),
    )
}


def _incorrect(msr: int) -> LeafError:
    return LeafError(Status.INCORRECT_MSR_VALUE, msr)


def check_msrs(rdmsr: Rdmsr) -> None:
    """Check the CPU's capabilities, x2APIC-only operation, energy filtering and full-width counters."""
    arch_capabilities = rdmsr(IA32_ARCH_CAPABILITIES)
    if ~arch_capabilities & _ARCH_CAPABILITIES_ONE or arch_capabilities & _ARCH_CAPABILITIES_ZERO:
        raise _incorrect(IA32_ARCH_CAPABILITIES)
    if rdmsr(IA32_XAPIC_DISABLE_STATUS) != 1:
        raise _incorrect(IA32_XAPIC_DISABLE_STATUS)
    if not rdmsr(IA32_MISC_PACKAGE_CTLS) & 1:
        raise _incorrect(IA32_MISC_PACKAGE_CTLS)
    if not rdmsr(IA32_PERF_CAPABILITIES) & 1 << 13:
        raise _incorrect(IA32_PERF_CAPABILITIES)


def check_vmx_msrs(rdmsr: Rdmsr, *, waitpkg: bool) -> None:
    """Check that VMX can do what the TD VMCS, and then the L2 VMCS, need."""
    basic = rdmsr(IA32_VMX_BASIC)
    if basic >> 32 & 0x1FFF > 2048 or not basic & 1 << 54 or not basic & 1 << 55:
        raise _incorrect(IA32_VMX_BASIC)
    _check_controls(rdmsr, _L1, waitpkg=waitpkg)
    misc = rdmsr(IA32_VMX_MISC)
    if ~misc & (1 << 5 | 1 << 6 | 1 << 7 | 1 << 14 | 1 << 29) or misc >> 16 & 0x1FF < 4:
        raise _incorrect(IA32_VMX_MISC)
    if ~rdmsr(IA32_VMX_EPT_VPID_CAP) & _EPT_VPID_CAP:
        raise _incorrect(IA32_VMX_EPT_VPID_CAP)
    cr0_fixed0, cr0_fixed1 = rdmsr(IA32_VMX_CR0_FIXED0) & ~_PE_PG, rdmsr(IA32_VMX_CR0_FIXED1)
    if cr0_fixed0 & ~_GUEST_CR0_INIT:
        raise _incorrect(IA32_VMX_CR0_FIXED0)
    if ~cr0_fixed1 & _GUEST_CR0_INIT:
        raise _incorrect(IA32_VMX_CR0_FIXED1)
    if rdmsr(IA32_VMX_CR4_FIXED0) & ~_GUEST_CR4_INIT:
        raise _incorrect(IA32_VMX_CR4_FIXED0)
    if ~rdmsr(IA32_VMX_CR4_FIXED1) & _GUEST_CR4_INIT:
        raise _incorrect(IA32_VMX_CR4_FIXED1)
    _check_controls(rdmsr, _L2, waitpkg=waitpkg)
    if (cr0_fixed0 | ~cr0_fixed1 & _U64) & _L2_CR0_VARIABLE:
        raise _incorrect(IA32_VMX_CR0_FIXED0)


def _check_controls(rdmsr: Rdmsr, demands: dict[int, ControlDemand], *, waitpkg: bool) -> None:
    for msr, demand in demands.items():
        value = rdmsr(msr)
        if msr == IA32_VMX_PROCBASED_CTLS3:
            met = demand.met_by_allowed1(value)
        elif msr == IA32_VMX_PROCBASED_CTLS2:
            init = demand.init & ~_EN_GUEST_WAIT_PAUSE | (_EN_GUEST_WAIT_PAUSE if waitpkg else 0)
            if not value >> 32 & _EN_ENCLV_EXITING:
                init &= ~_EN_ENCLV_EXITING
            met = demand.met_by(value, init)
        else:
            met = demand.met_by(value)
        if not met:
            raise _incorrect(msr)


def check_key_management(rdmsr: Rdmsr, *, without_integrity: bool) -> None:
    """Check that memory encryption is active and locked, and that the KeyIDs are not too many."""
    capability, activate = rdmsr(IA32_TME_CAPABILITY), rdmsr(IA32_TME_ACTIVATE)
    algorithms = 0b0101 if without_integrity else 0b1010  # AES-XTS 128 and 256, with integrity in the odd bits
    if not activate & 1:
        raise _incorrect(IA32_TME_ACTIVATE)
    if not capability & algorithms:
        raise _incorrect(IA32_TME_CAPABILITY)
    if not activate >> 48 & algorithms:
        raise _incorrect(IA32_TME_ACTIVATE)
    if private_hkids(rdmsr)[1] >= MAX_HKIDS:
        raise LeafError(Status.NUM_ACTIVATED_HKIDS_NOT_SUPPORTED, MAX_HKIDS)
    if rdmsr(IA32_WBINVDP) != rdmsr(IA32_WBNOINVDP):
        raise _incorrect(IA32_WBNOINVDP)


def private_hkids(rdmsr: Rdmsr) -> tuple[int, int]:
    """Return the first and the last private HKID. The module adds up 32-bit numbers."""
    partitioning = rdmsr(IA32_MKTME_KEYID_PARTITIONING)
    num_mktme, num_tdx = partitioning & _U32, partitioning >> 32
    return num_mktme + 1 & _U32, num_mktme + num_tdx & _U32


def check_cmrs(cmrs: list[tuple[int, int]], hkid_mask: int) -> None:
    """Check that the CMRs are 4 KiB-aligned, ascending and disjoint, and below the HKID bits."""
    previous_start = previous_end = 0
    for start, size in cmrs:
        if not size:
            continue
        end = start + size - 1
        if (
            end > _U64
            or (start | end) & hkid_mask
            or end > 1 << MAX_PA
            or (start | size) & 0xFFF
            or (previous_end and (previous_start > start or previous_end > start))
        ):
            raise LeafError(Status.CMR_LIST_INVALID)
        previous_start, previous_end = start, end


def smrr_count(mtrrcap: int, platform: Platform) -> int:
    """Return how many SMRRs the CPU has: 1 or 2."""
    return 2 if mtrrcap & MTRRCAP_SMRR2 and not platform.smrr2_not_supported else 1


def check_smrrs(rdmsr: Rdmsr, platform: Platform) -> None:
    """Check that the SMRRs are locked, well-formed, and outside of all CMRs."""
    mtrrcap = rdmsr(IA32_MTRRCAP)
    if not mtrrcap & MTRRCAP_SMRR:
        raise LeafError(Status.SMRR_NOT_SUPPORTED)
    if not mtrrcap & MTRRCAP_SMRR_LOCK:
        raise LeafError(Status.SMRR_LOCK_NOT_SUPPORTED)
    count = smrr_count(mtrrcap, platform)
    for smrr in range(count):
        if not rdmsr(IA32_SMRR_PHYSMASK[smrr]) & SMRR_LOCK:
            raise LeafError(Status.SMRR_NOT_LOCKED, smrr)
    for smrr in range(count):
        mask_msr = rdmsr(IA32_SMRR_PHYSMASK[smrr])
        if not mask_msr & SMRR_VALID:
            continue
        base, mask = rdmsr(IA32_SMRR_PHYSBASE[smrr]) & 0xFFFF_F000, mask_msr & 0xFFFF_F000
        size = mask & -mask
        if not mask or mask != -size & _U32 or base & (size - 1):
            raise LeafError(Status.INVALID_SMRR_CONFIGURATION, smrr)
        for index, (cmr, cmr_size) in enumerate(platform.cmrs):
            if cmr_size and base < cmr + cmr_size and cmr < base + size:
                raise LeafError(Status.SMRR_OVERLAPS_CMR, smrr | index << 8)
