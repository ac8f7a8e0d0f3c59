"""Which MSR accesses a TD makes natively, and what happens to the others.

MNG.INIT turns msr_lookup.tsv and the TD's configuration into the MSR bitmap; an intercepted access then ends in a
#VE, a #GP(0), or emulation.

Spec: TDX Module Base Spec, "MSR Handling"; ABI Reference, "MSR Virtualization".
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from importlib.resources import files
from typing import Final

from sim_backend.tdx_module.cpuid_virtualization import CpuidFlags

LOW_MSRS: Final = range(0x2000)
HIGH_MSRS: Final = range(0xC000_0000, 0xC000_2000)


class MsrAction(Enum):
    """What an intercepted access does to the guest."""

    VE = "#VE"
    GP = "#GP(0)"
    EMULATED = "emulated"


@dataclass(frozen=True, slots=True)
class MsrLookup:
    """One line of msr_lookup.tsv: a range of MSRs that are virtualised alike."""

    first: int
    last: int
    name: str
    rd_bit: str
    rd_action: str
    wr_bit: str
    wr_action: str


def _load() -> Iterator[MsrLookup]:
    text = files("sim_backend.tdx_module").joinpath("msr_lookup.tsv").read_text("utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    for line in lines[1:]:
        first, last, name, rd_bit, rd_action, wr_bit, wr_action = line.split("\t")
        yield MsrLookup(int(first, 16), int(last, 16), name, rd_bit, rd_action, wr_bit, wr_action)


MSR_LOOKUP: Final = tuple(_load())
_ROW: Final = {msr: row for row in MSR_LOOKUP for msr in range(row.first, row.last + 1)}

# GP_OR_VE: a #VE when the TD's CPUID enumerates the feature, else a #GP(0), as on a CPU without it.
_GP_OR_VE_FLAG: Final = {
    0x1F8: "dca", 0x1F9: "dca", 0x1FA: "dca",
    0x981: "tme", 0x982: "tme", 0x983: "tme", 0x984: "tme",
    0x87: "mktme",
    0x6E0: "tsc_deadline",
}  # fmt: skip

_ATTRIBUTES_PKS: Final = 1 << 30
_ATTRIBUTES_PERFMON: Final = 1 << 63
_XFAM_FEATURES: Final = {"XFAM_PT": 1 << 8, "XFAM_CET": 3 << 11, "XFAM_ULI": 1 << 14, "XFAM_LBR": 1 << 15}
_PERF_METRICS: Final = 0x329
_PERF_CAPABILITIES: Final = 0x345
_PERF_METRICS_AVAILABLE: Final = 1 << 15  # in IA32_PERF_CAPABILITIES


def native_features(attributes: int, xfam: int, flags: CpuidFlags) -> frozenset[str]:
    """Return the features (bit names of msr_lookup.tsv) whose MSRs the TD accesses natively."""
    features = {"FIXED_0"}
    features.update(name for name, bits in _XFAM_FEATURES.items() if xfam & bits == bits)
    if attributes & _ATTRIBUTES_PERFMON:
        features.add("PERFMON")
    if attributes & _ATTRIBUTES_PKS:
        features.add("PKS")
    for name, enabled in (("XFD", flags.xfd), ("UMWAIT", flags.waitpkg), ("TSX", flags.tsx)):
        if enabled:
            features.add(name)
    return frozenset(features)


def _is_native(msr: int, bit: str, features: Collection[str], perf_capabilities: int) -> bool:
    if bit != "OTHER":
        return bit in features
    if "PERFMON" not in features:
        return False
    if msr == _PERF_CAPABILITIES:
        return "XFAM_PT" in features
    return msr == _PERF_METRICS and bool(perf_capabilities & _PERF_METRICS_AVAILABLE)


@dataclass(frozen=True, slots=True)
class MsrBitmap:
    """The MSRs that a TD reads and writes natively: the clear bits of its MSR exiting bitmap."""

    rd: frozenset[int]
    wr: frozenset[int]

    def exits(self, msr: int, write: bool) -> bool:
        """Tell whether the access leaves the guest. Makes this a `cpu.engine.MsrPolicy`."""
        return msr not in (self.wr if write else self.rd)

    @property
    def page(self) -> bytes:
        """Return the 4 KiB bitmap page: a bit set for each MSR whose reads (first half) or writes exit."""
        page = bytearray(b"\xff" * 4096)
        for half, natives in ((0, self.rd), (2048, self.wr)):
            for msr in natives:
                offset = half + (msr & 0x1FFF) // 8 + (1024 if msr in HIGH_MSRS else 0)
                page[offset] &= ~(1 << (msr & 7))
        return bytes(page)


NOTHING_NATIVE: Final = MsrBitmap(frozenset(), frozenset())
"""The bitmap of a TD before TDH.MNG.INIT: all ones."""


@lru_cache(maxsize=64)
def build_bitmap(features: frozenset[str], perf_capabilities: int) -> MsrBitmap:
    """Return the bitmap of a TD with these native features. Equal TDs share one."""
    rd: set[int] = set()
    wr: set[int] = set()
    for row in MSR_LOOKUP:
        msrs = range(row.first, row.last + 1)
        if _is_native(row.first, row.rd_bit, features, perf_capabilities):
            rd.update(msrs)
        if _is_native(row.first, row.wr_bit, features, perf_capabilities):
            wr.update(msrs)
    return MsrBitmap(frozenset(rd), frozenset(wr))


def action(msr: int, *, write: bool, flags: CpuidFlags) -> MsrAction:
    """Return what an intercepted access to `msr` does; `EMULATED` ones have their own rule."""
    row = _ROW.get(msr)
    if row is None:  # outside the bitmap, or in it and unknown
        return MsrAction.VE
    name = row.wr_action if write else row.rd_action
    if name == "GP_OR_VE":
        return MsrAction.VE if getattr(flags, _GP_OR_VE_FLAG[msr]) else MsrAction.GP
    if name == "OTHER":
        return MsrAction.EMULATED
    return MsrAction.GP if name == "GP" else MsrAction.VE
