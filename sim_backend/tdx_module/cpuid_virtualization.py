"""CPUID as a TD sees it: what MNG.INIT computes, and what the guest's CPUID instruction then returns.

TDH.SYS.INIT samples the CPU's answers, TDH.MNG.INIT turns them into the TD's by the rules of cpuid_lookup.tsv, the
TD's CPUID_CONFIG, ATTRIBUTES and XFAM; the CPUID exit applies the few bits that depend on the vCPU's state.

Spec: TDX Module Base Spec, "CPUID Virtualization"; ABI Reference, "CPUID Virtualization".
"""

from dataclasses import dataclass
from importlib.resources import files
from typing import Final, TypeAlias

CpuidValues: TypeAlias = tuple[int, int, int, int]
"""EAX, EBX, ECX, EDX."""

ZERO: Final[CpuidValues] = (0, 0, 0, 0)
SUBLEAF_NA: Final = 0xFFFF_FFFF
"""The subleaf of a leaf that has none, in leaf/subleaf words."""

LAST_BASE_LEAF: Final = 0x23
_FIRST_EXTENDED_LEAF: Final = 0x8000_0000
_HYPERVISOR_LEAVES: Final = range(0x4000_0000, 0x5000_0000)


@dataclass(frozen=True, slots=True)
class CpuidLookup:
    """One line of cpuid_lookup.tsv: how one leaf and subleaf is virtualised."""

    index: int
    leaf: int
    subleaf: int | None  # None: the leaf has no subleaves
    faulting: bool  # the guest gets a #VE instead of a value
    fixed0_or_dynamic: CpuidValues
    fixed1: CpuidValues
    verify_mask: CpuidValues
    verify_value: CpuidValues
    config_index: int | None  # position in TD_PARAMS.CPUID_CONFIG
    config_direct: CpuidValues
    allow_direct: CpuidValues

    @property
    def leaf_subleaf(self) -> int:
        """The leaf in bits 31:0 and the subleaf (all ones: none) in bits 63:32."""
        return self.leaf | (SUBLEAF_NA if self.subleaf is None else self.subleaf) << 32


def _quad(cell: str) -> CpuidValues:
    if cell == "-":
        return ZERO
    eax, ebx, ecx, edx = (int(part, 16) for part in cell.split(","))
    return eax, ebx, ecx, edx


def _load() -> tuple[CpuidLookup, ...]:
    text = files("sim_backend.tdx_module").joinpath("cpuid_lookup.tsv").read_text("utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    rows = [line.split("\t") for line in lines[1:]]
    return tuple(
        CpuidLookup(
            index=int(row[0]),
            leaf=int(row[1], 16),
            subleaf=None if row[2] == "-" else int(row[2], 16),
            faulting=row[3] == "1",
            fixed0_or_dynamic=_quad(row[4]),
            fixed1=_quad(row[5]),
            verify_mask=_quad(row[6]),
            verify_value=_quad(row[7]),
            config_index=None if row[8] == "-" else int(row[8]),
            config_direct=_quad(row[9]),
            allow_direct=_quad(row[10]),
        )
        for row in rows
    )


CPUID_LOOKUP: Final = _load()
CPUID_LOOKUP_SIZE: Final = len(CPUID_LOOKUP)
CPUID_CONFIG: Final = tuple(
    sorted((row for row in CPUID_LOOKUP if row.config_index is not None), key=lambda row: row.config_index or 0)
)
"""The configurable leaves, in the order of TD_PARAMS.CPUID_CONFIG."""

_INDEX: Final = {(row.leaf, row.subleaf): row.index for row in CPUID_LOOKUP}

# Bits that exist only with an XFAM component: {XFAM bit: (EAX, EBX, ECX, EDX)} of bits to clear when it is 0.
_AVX512: Final[CpuidValues] = (0, 0xDC23_0000, 0x5842, 0x80_010C)
_XFAM_MASKS: Final[dict[tuple[int, int | None], dict[int, CpuidValues]]] = {
    (0x1, None): {2: (0, 0, 0x3000_1000, 0)},
    (0x7, 0): {
        2: (0, 0x20, 0x600, 0), 5: _AVX512, 6: _AVX512, 7: _AVX512, 8: (0, 0x200_0000, 0, 0), 9: (0, 0, 0x8, 0),
        11: (0, 0, 0x80, 0x10_0000), 12: (0, 0, 0x80, 0x10_0000), 14: (0, 0, 0, 0x20), 15: (0, 0, 0, 0x8_0000),
        17: (0, 0, 0, 0x340_0000), 18: (0, 0, 0, 0x340_0000),
    },
    (0x7, 1): {5: (0x30, 0, 0, 0), 6: (0x30, 0, 0, 0), 7: (0x30, 0, 0, 0)},
    (0xD, 0): {
        2: (0x4, 0, 0, 0), 5: (0xE0, 0, 0, 0), 6: (0xE0, 0, 0, 0), 7: (0xE0, 0, 0, 0), 9: (0x200, 0, 0, 0),
        17: (0x6_0000, 0, 0, 0), 18: (0x6_0000, 0, 0, 0),
    },
    (0xD, 1): {
        8: (0, 0, 0x100, 0), 11: (0, 0, 0x1800, 0), 12: (0, 0, 0x1800, 0), 14: (0, 0, 0x4000, 0),
        15: (0, 0, 0x8000, 0),
    },
}  # fmt: skip
# Leaves that exist as a whole only when all these XFAM bits are set.
_XFAM_LEAVES: Final = {0x14: 1 << 8, 0x1C: 1 << 15, 0x1D: 3 << 17}
_KEY_LOCKER_LEAF: Final = 0x19

# The newest processors first. A TD may be configured as its platform or as any that comes after it here.
_KNOWN_FMS: Final = (0xD06D0, 0xA06E0, 0xA06D0, 0xA06F0, 0xC06F2, 0x806F8)


class CpuidConfigError(Exception):
    """CPUID_CONFIG is refused; `leaf_subleaf` is what RCX reports (0: no single leaf is at fault)."""

    def __init__(self, leaf_subleaf: int) -> None:
        super().__init__(f"CPUID_CONFIG of {leaf_subleaf:#x}")
        self.leaf_subleaf = leaf_subleaf


class TsxControlMissingError(Exception):
    """TSX is configured, but the CPU has no IA32_TSX_CTRL."""


@dataclass(frozen=True, slots=True)
class CpuidFlags:
    """What the module remembers of a TD's virtual CPUID, for MSR virtualisation and TD entry."""

    monitor_mwait: bool = False
    dca: bool = False
    tsc_deadline: bool = False
    tsx: bool = False
    waitpkg: bool = False
    tme: bool = False
    la57: bool = False
    mktme: bool = False
    ddpd: bool = False
    xfd: bool = False


@dataclass(frozen=True, slots=True)
class CpuidPlatform:
    """What TDH.SYS.INIT remembers of the platform that CPUID configuration needs."""

    values: tuple[CpuidValues, ...]  # by lookup index, FIXED and DYNAMIC bits already applied
    fms: int  # CPUID(1).EAX: family, model, stepping (the lowest of all packages)
    xfd_faulting_mask: int  # XFAM bits whose component supports XFD
    tsx_ctrl: bool  # IA32_ARCH_CAPABILITIES.TSX_CTRL
    xsave_area_size: int  # CPUID(0xD, 0).EBX [bytes]


def cpuid_index(leaf: int, subleaf: int) -> int | None:
    """Return the lookup index of `leaf` and `subleaf`, or None when the module does not know them."""
    index = _INDEX.get((leaf, None))
    return _INDEX.get((leaf, subleaf)) if index is None else index


def clamp_leaf(leaf: int, last_extended_leaf: int) -> int:
    """Return the leaf that CPUID answers for `leaf`: beyond the last, the last base leaf.

    Leaves 0x40000000 to 0x4fffffff are the hypervisor's and stay.
    """
    if leaf in _HYPERVISOR_LEAVES:
        return leaf
    if leaf > last_extended_leaf or LAST_BASE_LEAF < leaf < _FIRST_EXTENDED_LEAF:
        return LAST_BASE_LEAF
    return leaf


def apply_fixed_bits(values: tuple[CpuidValues, ...]) -> tuple[CpuidValues, ...]:
    """Return sampled CPUID values with the FIXED and DYNAMIC bits of each leaf applied (done by SYS.LP.INIT)."""
    return tuple(
        _combine(value, row.fixed0_or_dynamic, row.fixed1) for value, row in zip(values, CPUID_LOOKUP, strict=True)
    )


def allowed_fms(platform_fms: int) -> tuple[int, ...]:
    """Return the family/model/stepping values that a migratable TD may be configured with, the native one first.

    Raise ``LookupError`` for a processor that module 1.5.01 does not know.
    """
    model = platform_fms & ~0xF
    for position, known in enumerate(_KNOWN_FMS):
        if known & ~0xF == model:
            return (platform_fms, *_KNOWN_FMS[position + 1 :])
    raise LookupError(f"module 1.5.01 knows no processor with CPUID(1).EAX = {platform_fms:#x}")


def is_fms_allowed(fms: int, platform_fms: int) -> bool:
    """Tell whether a migratable TD may be configured with CPUID(1).EAX = `fms` on this platform."""
    limits = {known & ~0xF: known & 0xF for known in _KNOWN_FMS}
    allowed = {known & ~0xF for known in allowed_fms(platform_fms)}
    if fms & ~0xF not in allowed or fms & 0xF > limits[fms & ~0xF]:
        return False
    return fms & ~0xF != platform_fms & ~0xF or fms & 0xF <= platform_fms & 0xF


def configure(
    platform: CpuidPlatform,
    config: tuple[CpuidValues, ...],
    *,
    attributes: int,
    xfam: int,
    tsc_frequency: int,
) -> tuple[tuple[CpuidValues, ...], CpuidFlags]:
    """Return the TD's virtual CPUID, by lookup index, and the flags that follow from it.

    `config` is TD_PARAMS.CPUID_CONFIG, `tsc_frequency` in 25 MHz. Raise `CpuidConfigError` for a value that is not
    configurable, `TsxControlMissingError` for TSX without its control MSR.
    """
    result: list[CpuidValues] = []
    flags = CpuidFlags()
    for row in CPUID_LOOKUP:
        value = platform.values[row.index]
        if row.config_index is not None:
            value = _configured(row, value, config[row.config_index])
        value, flags = _special_leaf(row, value, flags, platform, attributes, xfam, tsc_frequency)
        result.append(value)
    return tuple(result), flags


def _combine(value: CpuidValues, fixed0: CpuidValues, fixed1: CpuidValues) -> CpuidValues:
    eax, ebx, ecx, edx = (value[i] & ~fixed0[i] | fixed1[i] for i in range(4))
    return eax, ebx, ecx, edx


def _configured(row: CpuidLookup, native: CpuidValues, config: CpuidValues) -> CpuidValues:
    registers = []
    for i in range(4):
        direct, allow = row.config_direct[i], row.allow_direct[i]
        if config[i] & ~(direct | allow):
            raise CpuidConfigError(row.leaf_subleaf)
        value = native[i] & ~row.fixed0_or_dynamic[i] | row.fixed1[i]
        value = value & ~direct | config[i] & direct
        registers.append(value & (config[i] | ~allow))
    eax, ebx, ecx, edx = registers
    return eax, ebx, ecx, edx


def _special_leaf(
    row: CpuidLookup,
    value: CpuidValues,
    flags: CpuidFlags,
    platform: CpuidPlatform,
    attributes: int,
    xfam: int,
    tsc_frequency: int,
) -> tuple[CpuidValues, CpuidFlags]:
    """Apply XFAM, ATTRIBUTES and the leaf's own rule."""
    leaf, subleaf = row.leaf, row.subleaf
    if leaf == 0x1:
        value = (_family_model_stepping(row, value[0], platform.fms, attributes), *value[1:])
    for bit, mask in _XFAM_MASKS.get((leaf, subleaf), {}).items():
        if not xfam >> bit & 1:
            value = _combine(value, mask, ZERO)
    eax, ebx, ecx, edx = value
    if leaf == 0x1:
        flags = _replace(flags, monitor_mwait=ecx >> 3 & 1, dca=ecx >> 18 & 1, tsc_deadline=ecx >> 24 & 1)
    elif leaf == 0x5 and not flags.monitor_mwait:
        return ZERO, flags
    elif leaf == 0x7 and subleaf == 0:
        hle, rtm = ebx >> 4 & 1, ebx >> 11 & 1
        if hle != rtm:
            raise CpuidConfigError(0)
        if hle and not platform.tsx_ctrl:
            raise TsxControlMissingError
        pks = attributes >> 30 & 1
        ecx = ecx & ~(1 << 31 | 1 << 23) | pks << 31
        flags = _replace(
            flags, tsx=hle, waitpkg=ecx >> 5 & 1, tme=ecx >> 13 & 1, la57=ecx >> 16 & 1, mktme=edx >> 18 & 1
        )
    elif leaf == 0x7 and subleaf == 2:
        flags = _replace(flags, ddpd=edx >> 3 & 1)
    elif leaf == 0xA and not attributes >> 63 & 1:
        return ZERO, flags
    elif leaf == 0xD and subleaf == 0:
        ecx = platform.xsave_area_size
    elif leaf == 0xD and subleaf == 1:
        if not platform.xfd_faulting_mask & xfam:
            eax &= ~(1 << 4)
        flags = _replace(flags, xfd=eax >> 4 & 1)
    elif leaf == 0xD and subleaf is not None and subleaf >= 2 and not xfam >> subleaf & 1:
        return ZERO, flags
    elif leaf == 0x15:
        ebx = tsc_frequency
    elif leaf == _KEY_LOCKER_LEAF:
        return ZERO, flags
    elif leaf == 0x8000_0008:
        eax = eax & ~0xFF00 | (57 if flags.la57 else 48) << 8
    elif leaf in _XFAM_LEAVES and xfam & _XFAM_LEAVES[leaf] != _XFAM_LEAVES[leaf]:
        return ZERO, flags
    return (eax, ebx, ecx, edx), flags


def _replace(flags: CpuidFlags, **bits: int) -> CpuidFlags:
    known = {name: getattr(flags, name) for name in CpuidFlags.__slots__}
    return CpuidFlags(**(known | {name: bool(bit) for name, bit in bits.items()}))


def _family_model_stepping(row: CpuidLookup, fms: int, platform_fms: int, attributes: int) -> int:
    """Return CPUID(1).EAX: 0 means native; only a migratable TD may be configured as another processor."""
    if fms == 0:
        fms = platform_fms
    migratable = attributes >> 29 & 1
    if not (is_fms_allowed(fms, platform_fms) if migratable else fms == platform_fms):
        raise CpuidConfigError(row.leaf_subleaf)
    return fms
