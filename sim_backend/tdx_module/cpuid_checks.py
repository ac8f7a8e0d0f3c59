"""What TDH.SYS.INIT demands of CPUID, and what TDH.SYS.LP.INIT compares of it.

Source: TDX Module 1.5 Base Architecture Specification, "CPUID Enumeration Checks"; release 1.5.01.
"""

from collections.abc import Callable
from typing import Final

from sim_backend.hw.gprs import R8, R9, R10, RCX, RDX, Gprs
from sim_backend.tdx_module.cpuid_virtualization import CPUID_LOOKUP, SUBLEAF_NA, CpuidLookup, CpuidValues
from sim_backend.tdx_module.errors import LeafError
from sim_backend.tdx_module.not_modelled import NotModelled
from uapi_ctypes.tdx_status import Operand, Status

Cpuid = Callable[[int, int], CpuidValues]

_MIN_LAST_BASE_LEAF: Final = 0x1F
_LAST_EXTENDED_LEAF: Final = 0x8000_0008
_ALL: Final = (0xFFFF_FFFF,) * 4
_NONE: Final = (0, 0, 0, 0)
_MIN_TSC_HZ: Final = 0x2540C
_MAX_FIXED_COUNTERS: Final = 7
MAX_PACKAGES: Final = 8

_SMT, _CORE, _LEVEL_TYPES = 1, 2, 6

VERIFY_SAME: Final[dict[tuple[int, int | None], CpuidValues]] = {
    (0x1, None): (0xF000_C000, 0xFFFF, 0xF7FF_FF9F, 0xFFFF_FFFF),
    (0x3, None): _NONE,
    (0x6, None): (0x80_0000, 0, 0, 0),
    (0x7, 0): (0xFFFF_FFFF, 0xFFFF_FFFB, 0xBFC1_FF6F, 0xFFEB_FFFF),
    (0x8, None): _NONE,
    (0xD, 0): (0xFFFF_FFFF, 0, 0xFFFF_FFFF, 0xFFFF_FFFF),
    (0xD, 1): (0xFFFF_FFFF, 0, 0xFFFF_FFFF, 0xFFFF_FFFF),
    (0xE, None): _NONE,
    (0x11, None): _NONE,
    (0x12, None): _NONE,
    (0x13, None): _NONE,
    (0x19, None): (0xFFFF_FFFF, 0xFFFF_FFFE, 0xFFFF_FFFF, 0xFFFF_FFFF),
    **{(0x1F, subleaf): (0xFFFF_FFFF, 0xFFFF_FFFF, 0xFFFF_FFFF, 0) for subleaf in range(6)},
    (0x20, None): _NONE,
    (0x21, 0): _NONE,
    (0x22, None): _NONE,
    (0x8000_0006, None): (0, 0, 0xFF, 0),
    (0x8000_0007, None): (0, 0, 0, 0x100),
}
"""Bits in which all LPs must agree; a leaf that is not listed must agree in all of them."""


def _halves(values: CpuidValues) -> tuple[int, int]:
    eax, ebx, ecx, edx = values
    return eax | ebx << 32, ecx | edx << 32


def _masked(values: CpuidValues, mask: CpuidValues) -> CpuidValues:
    return (values[0] & mask[0], values[1] & mask[1], values[2] & mask[2], values[3] & mask[3])


def _is_supported(row: CpuidLookup, last_base: int, last_extended: int) -> bool:
    return row.leaf <= last_base or 0x8000_0000 <= row.leaf <= last_extended


def _read(cpuid: Cpuid, row: CpuidLookup) -> CpuidValues:
    return cpuid(row.leaf, SUBLEAF_NA if row.subleaf is None else row.subleaf)


def check_cpuid(cpuid: Cpuid, fms: int, regs: Gprs) -> list[CpuidValues]:
    """Check the CPU's answers; return them in the order of the lookup table.

    `fms` replaces CPUID(1).EAX. Raise CPUID_LEAF_NOT_SUPPORTED, INCORRECT_CPUID_VALUE (RCX the leaf and sub-leaf,
    RDX and R8 the mask, R9 and R10 the expected value), CPUID_LEAF_1F_FORMAT_UNRECOGNIZED or INVALID_WBINVD_SCOPE.
    """
    last_base, last_extended = cpuid(0, 0)[0], cpuid(0x8000_0000, 0)[0]
    if last_base < _MIN_LAST_BASE_LEAF:
        raise LeafError(Status.CPUID_LEAF_NOT_SUPPORTED, _MIN_LAST_BASE_LEAF)
    if last_extended < _LAST_EXTENDED_LEAF:
        raise LeafError(Status.CPUID_LEAF_NOT_SUPPORTED, _LAST_EXTENDED_LEAF)

    topology = _Topology()
    sampled: list[CpuidValues] = []
    la57 = False
    for row in CPUID_LOOKUP:
        values = _read(cpuid, row) if _is_supported(row, last_base, last_extended) else _NONE
        if _masked(values, row.verify_mask) != row.verify_value:
            raise _incorrect(regs, row, row.verify_mask, row.verify_value)
        eax, ebx, ecx, edx = values
        if row.leaf == 1:
            values = (fms, ebx, ecx, edx)
        elif row.leaf == 4 and row.subleaf == 3:
            topology.lps_sharing_l3 = eax >> 14 & 0xFFF
        elif row.leaf == 7 and row.subleaf == 0:
            la57 = bool(ecx & 1 << 16)
        elif row.leaf == 0xA:
            if eax & 0xFF < 5:
                raise _incorrect(regs, row, (0xF, 0, 0, 0), (5, 0, 0, 0))
            if edx & 0x1F > _MAX_FIXED_COUNTERS:
                raise _incorrect(regs, row, (0, 0, 0, 0x1F), (0, 0, 0, _MAX_FIXED_COUNTERS))
        elif row.leaf == 0x15:
            if not ebx:
                raise LeafError(Status.CPUID_LEAF_NOT_SUPPORTED, row.leaf)
            if not eax or ecx * ebx // eax < _MIN_TSC_HZ:
                raise NotModelled("an implausible TSC frequency: the module shuts the platform down")
        elif row.leaf == 0x1C and not eax & 0xFF:
            raise NotModelled("LBRs of no depth: the module shuts the platform down")
        elif row.leaf == 0x1F and row.subleaf is not None:
            topology.scan(row.subleaf, eax & 0x1F, ecx >> 8 & 0xFF)
        elif row.leaf == _LAST_EXTENDED_LEAF:
            la_bits = 57 if la57 else 48
            if eax >> 8 & 0xFF != la_bits:
                raise _incorrect(regs, row, (0xFF00, 0, 0, 0), (la_bits << 8, 0, 0, 0))
        sampled.append(values)
    return sampled


def _incorrect(regs: Gprs, row: CpuidLookup, mask: CpuidValues, expected: CpuidValues) -> LeafError:
    regs[RCX] = row.leaf_subleaf
    regs[RDX], regs[R8] = _halves(mask)
    regs[R9], regs[R10] = _halves(expected)
    return LeafError(Status.INCORRECT_CPUID_VALUE)


class _Topology:
    """The scan of leaf 1FH: levels ascend, and the level below the package shares the L3 cache."""

    def __init__(self) -> None:
        self.lps_sharing_l3 = -1
        self.previous_level = 0
        self.shift = 0
        self.core_seen = False

    def scan(self, subleaf: int, shift: int, level: int) -> None:
        """Look at the next sub-leaf."""
        if level:
            if level <= self.previous_level or level >= _LEVEL_TYPES:
                raise LeafError(Status.CPUID_LEAF_1F_FORMAT_UNRECOGNIZED)
            self.shift = shift
            self.core_seen |= level == _CORE
        else:
            if subleaf == 0 or not self.core_seen:
                raise LeafError(Status.CPUID_LEAF_NOT_SUPPORTED, Operand.RAX)
            if self.previous_level and (not self.shift or self.lps_sharing_l3 >> (self.shift - 1) != 1):
                raise LeafError(Status.INVALID_WBINVD_SCOPE)
        self.previous_level = level


def compare_cpuid(cpuid: Cpuid, sampled: list[CpuidValues], package: int, regs: Gprs) -> None:
    """Check that this LP's answers agree with the sample, and its package number.

    Raise INCONSISTENT_CPUID_FIELD (RCX the leaf and sub-leaf, RDX and R8 the mask) or INVALID_PKG_ID.
    """
    last_base, last_extended = cpuid(0, 0)[0], cpuid(0x8000_0000, 0)[0]
    for row, expected in zip(CPUID_LOOKUP, sampled, strict=True):
        if not _is_supported(row, last_base, last_extended):
            continue
        mask = VERIFY_SAME.get((row.leaf, row.subleaf), _ALL)
        if _masked(_read(cpuid, row), mask) != _masked(expected, mask):
            regs[RCX] = row.leaf_subleaf
            regs[RDX], regs[R8] = _halves(mask)
            raise LeafError(Status.INCONSISTENT_CPUID_FIELD)
        if row.leaf == 0x1F and row.subleaf == 0 and package >= MAX_PACKAGES:
            raise LeafError(Status.INVALID_PKG_ID, package)
