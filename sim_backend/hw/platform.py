"""The platform that the TDX module finds: processors, CPUID, MSRs, memory ranges, KeyIDs, entropy.

Everything that TDH.SYS.INIT and TDH.SYS.LP.INIT check is a value here, so that a wrong platform is a profile.
"""

import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from importlib.resources import files
from typing import Any, Final

import yaml

from sim_backend.hw.keys import KeyIds, PconfigResult
from sim_backend.hw.lp import LogicalProcessor, logical_processors

MSR_IA32_MKTME_KEYID_PARTITIONING: Final = 0x87
MSR_INTR_PENDING: Final = 0x9A
MSR_IA32_SMRR_PHYSBASE: Final = 0x1F2
MSR_IA32_SMRR_PHYSMASK: Final = 0x1F3
MSR_IA32_TME_ACTIVATE: Final = 0x982
MSR_IA32_SEAMRR_BASE: Final = 0x1400
MSR_IA32_SEAMRR_MASK: Final = 0x1401

CpuidRegs = tuple[int, int, int, int]
"""EAX, EBX, ECX, EDX."""


def _new_report_key() -> bytes:
    return secrets.token_bytes(32)


@dataclass(slots=True)
class Platform:
    """One host's hardware. `msrs` holds the values that all LPs share; an LP's own override them."""

    ram_bytes: int
    tsc_hz: int
    lps: list[LogicalProcessor]
    cmrs: list[tuple[int, int]]  # Convertible Memory Ranges: (HPA, size) [bytes]
    cpuid: dict[tuple[int, int | None], CpuidRegs]  # sub-leaf None: the leaf ignores ECX
    msrs: dict[int, int]
    maxpa: int = 52
    tdx_without_integrity: bool = True  # MCHECK: TDX uses encryption without integrity
    smrr2_not_supported: bool = False  # MCHECK: SMRR2 is not used even where MTRRCAP has it
    seamdb_index: int = 0  # what SEAMOPS.SEAMDB.GETREF returns
    seamops_capabilities: int = 0x7F  # SEAMOPS leaves that the CPU has, a bit each
    pconfig_result: int = PconfigResult.SUCCESS  # what PCONFIG answers from now on
    report_key: bytes | None = field(default_factory=_new_report_key, repr=False)
    """The key under which the CPU makes and checks the MACs of TDREPORTs. None: it makes zeros and accepts any report,
    as the CPU of the module's recorded vectors does."""
    rand_fail: int = 0  # how many more RDRAND and RDSEED fail
    tsc_offset: int = 0  # added to the clock [TSC ticks]
    clock: Callable[[], int] = field(default=time.perf_counter_ns)  # [ns], monotonic
    _tsc_ratio: tuple[int, int] = field(init=False)  # TSC ticks per nanosecond, as a reduced fraction

    def __post_init__(self) -> None:
        """Reduce the TSC ratio once: the products then stay small, and RDTSC is on the path of every TD entry."""
        ticks = Fraction(self.tsc_hz, 1_000_000_000)
        self._tsc_ratio = ticks.numerator, ticks.denominator

    @property
    def packages(self) -> int:
        """How many packages the LPs sit in."""
        return 1 + max(lp.package for lp in self.lps)

    @property
    def keyid_bits(self) -> int:
        """How many bits of a physical address are its KeyID."""
        return self.msrs[MSR_IA32_TME_ACTIVATE] >> 32 & 0xF

    @property
    def keyids(self) -> KeyIds:
        """The KeyID partitioning that MSR 87H tells."""
        partitioning = self.msrs[MSR_IA32_MKTME_KEYID_PARTITIONING]
        return KeyIds(self.keyid_bits, partitioning & 0xFFFF_FFFF, partitioning >> 32, self.maxpa)

    @property
    def seamrr(self) -> tuple[int, int]:
        """SEAM range: (HPA, size) [bytes]."""
        return self._range(MSR_IA32_SEAMRR_BASE, MSR_IA32_SEAMRR_MASK, 25)

    @property
    def smrr(self) -> tuple[int, int]:
        """SMM range: (HPA, size) [bytes]."""
        base = self.msrs[MSR_IA32_SMRR_PHYSBASE] & 0xFFFF_F000
        mask = self.msrs[MSR_IA32_SMRR_PHYSMASK] & 0xFFFF_F000
        return base, (1 << 32) - mask

    def _range(self, base_msr: int, mask_msr: int, low_bit: int) -> tuple[int, int]:
        low = -1 << low_bit
        mask = self.msrs[mask_msr] & low & ((1 << self.maxpa) - 1)
        return self.msrs[base_msr] & low & ((1 << self.maxpa) - 1), mask & -mask

    def rdmsr(self, lp: int, msr: int) -> int:
        """Read `msr` on LP `lp`; one that the profile does not list reads as zero."""
        own = self.lps[lp].msrs
        return own[msr] if msr in own else self.msrs.get(msr, 0)

    def msrs_of(self, lp: int) -> Mapping[int, int]:
        """Return the MSRs of LP `lp` for several reads in a row; one that is not in there reads as zero."""
        own = self.lps[lp].msrs
        return self.msrs | own if own else self.msrs

    def wrmsr(self, msr: int, value: int, lp: int | None = None) -> None:
        """Set `msr` on every LP, or on `lp` only."""
        if lp is not None:
            self.lps[lp].msrs[msr] = value
            return
        self.msrs[msr] = value
        for each in self.lps:
            each.msrs.pop(msr, None)

    def cpuid_regs(self, leaf: int, subleaf: int = 0, lp: int = 0) -> CpuidRegs:
        """Execute CPUID natively on LP `lp`; a leaf that the table does not have reads as zeros."""
        own = self.lps[lp].cpuid
        if own and (leaf, subleaf) in own:
            return own[leaf, subleaf]
        regs = self.cpuid.get((leaf, subleaf))
        if regs is None:
            regs = self.cpuid.get((leaf, None), (0, 0, 0, 0))
        return regs

    def rdtsc(self) -> int:
        """Read the time-stamp counter."""
        ticks, nanoseconds = self._tsc_ratio
        return (self.clock() * ticks // nanoseconds + self.tsc_offset) & 0xFFFF_FFFF_FFFF_FFFF

    def rdrand(self) -> int | None:
        """Return 64 random bits, or None when RDRAND or RDSEED would clear CF."""
        if self.rand_fail:
            self.rand_fail -= 1
            return None
        return secrets.randbits(64)

    def interrupt_pending(self, lp: int) -> bool:
        """Tell whether the host on LP `lp` has an interrupt to serve (MSR_INTR_PENDING)."""
        return bool(self.rdmsr(lp, MSR_INTR_PENDING))


@lru_cache
def _profile(name: str) -> dict[str, Any]:
    text = (files("sim_backend.hw") / "profiles" / "platforms" / f"{name}.yaml").read_text()
    profile = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # noqa: S506  (safe loaders both)
    assert isinstance(profile, dict)
    return profile


def load_platform(
    name: str,
    *,
    lps: int | None = None,
    packages: int | None = None,
    cmrs: list[tuple[int, int]] | None = None,
    ram_bytes: int | None = None,
) -> Platform:
    """Return a new platform from `hw/profiles/platforms/NAME.yaml`; raise ``FileNotFoundError``.

    Keyword arguments replace the profile's values.
    """
    profile = _profile(name)
    return Platform(
        ram_bytes=profile["ram_bytes"] if ram_bytes is None else ram_bytes,
        tsc_hz=profile["tsc_hz"],
        seamdb_index=profile["seamdb_index"],
        lps=logical_processors(
            profile["logical_processors"] if lps is None else lps,
            profile["packages"] if packages is None else packages,
        ),
        cmrs=[(base, size) for base, size in (profile["cmrs"] if cmrs is None else cmrs)],
        cpuid={(leaf, subleaf): (a, b, c, d) for leaf, subleaf, a, b, c, d in profile["cpuid"]},
        msrs=dict(profile["msrs"]),
    )
