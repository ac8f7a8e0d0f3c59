"""What TDH.SYS.INIT remembers of the processor: the facts that TD configuration and virtualisation rest on.

The checks that make SYS.INIT fail are the leaf's; this is the sampling, so that the same facts serve MNG.INIT, the
virtual VMX MSRs, CR and XCR0 emulation and SYS.RD.

Spec: TDX Module Base Spec, "TDX Module Initialization: Platform Configuration Checks".
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeAlias

from sim_backend.tdx_module.cpuid_virtualization import (
    CPUID_LOOKUP,
    SUBLEAF_NA,
    ZERO,
    CpuidPlatform,
    CpuidValues,
    apply_fixed_bits,
)

CpuidSource: TypeAlias = Callable[[int, int], CpuidValues]
MsrSource: TypeAlias = Callable[[int], int]

XCR0_USER_MASK: Final = 0x0006_02FF
XSS_SUPERVISOR_MASK: Final = 0x0001_FD00
XFAM_FIXED0: Final = 0x0006_DBE7  # XFAM bits that the module supports
XFAM_FIXED1: Final = 0x3

IA32_TSC_ADJUST: Final = 0x3B
IA32_ARCH_CAPABILITIES: Final = 0x10A
IA32_PERF_CAPABILITIES: Final = 0x345
IA32_VMX_EPT_VPID_CAP: Final = 0x48C
IA32_VMX_CR0_FIXED0: Final = 0x486
IA32_VMX_CR0_FIXED1: Final = 0x487
IA32_VMX_CR4_FIXED0: Final = 0x488
IA32_VMX_CR4_FIXED1: Final = 0x489
IA32_VMX_PROCBASED_CTLS2: Final = 0x48B
IA32_VMX_TRUE_PINBASED_CTLS: Final = 0x48D
IA32_VMX_TRUE_PROCBASED_CTLS: Final = 0x48E
IA32_VMX_TRUE_EXIT_CTLS: Final = 0x48F
IA32_VMX_TRUE_ENTRY_CTLS: Final = 0x490

_EN_GUEST_WAIT_PAUSE: Final = 1 << 26
_EN_ENCLV_EXITING: Final = 1 << 28


@dataclass(frozen=True, slots=True)
class VmcsControls:
    """Initial VMX controls of a VMCS: the module's constants plus what the CPU requires to be 1."""

    pin: int
    proc: int
    proc2: int
    proc3: int
    exit: int
    entry: int


@dataclass(frozen=True, slots=True)
class CpuCapabilities:
    """The processor as TDH.SYS.INIT found it."""

    cpuid: CpuidPlatform
    xcr0_supported: int
    xss_supported: int
    xsave_components: tuple[tuple[int, bool], ...]  # by XFAM bit: (size [bytes], aligned to 64 bytes)
    native_tsc_frequency: int  # [Hz]
    last_extended_leaf: int
    max_lbr_depth: int
    waitpkg: bool
    ddpd: bool
    rtm: bool
    tsc_adjust: int
    arch_capabilities: int
    perf_capabilities: int
    ept_vpid_cap: int
    cr0_fixed0: int
    cr0_fixed1: int
    cr4_fixed0: int
    cr4_fixed1: int
    l1_controls: VmcsControls
    l2_controls: VmcsControls

    @property
    def xfam_fixed0(self) -> int:
        """XFAM bits that a TD may set: known to the module and supported by the CPU."""
        return XFAM_FIXED0 & (self.xcr0_supported | self.xss_supported)


def sample(cpuid: CpuidSource, rdmsr: MsrSource, fms: int) -> CpuCapabilities:
    """Sample the processor. `fms` is CPUID(1).EAX of the package with the lowest stepping."""
    last_base, last_extended = cpuid(0, 0)[0], cpuid(0x8000_0000, 0)[0]
    values: list[CpuidValues] = []
    for row in CPUID_LOOKUP:
        if row.leaf <= last_base or 0x8000_0000 <= row.leaf <= last_extended:
            value = cpuid(row.leaf, SUBLEAF_NA if row.subleaf is None else row.subleaf)
        else:
            value = ZERO
        values.append((fms, *value[1:]) if row.leaf == 1 else value)
    by_leaf = {(row.leaf, row.subleaf): value for row, value in zip(CPUID_LOOKUP, values, strict=True)}

    xfd = bool(by_leaf[0xD, 1][0] & 1 << 4)
    components: list[tuple[int, bool]] = [(0, False), (0, False)]
    xfd_faulting = 0
    for bit in range(2, 19):
        size, _, ecx, _ = by_leaf[0xD, bit]
        components.append((size, bool(ecx & 2)))
        if xfd and ecx & 4:
            xfd_faulting |= 1 << bit
    denominator, numerator, crystal, _ = by_leaf[0x15, None]
    arch_capabilities = rdmsr(IA32_ARCH_CAPABILITIES)
    waitpkg = bool(by_leaf[0x7, 0][2] & 1 << 5)
    return CpuCapabilities(
        cpuid=CpuidPlatform(
            values=apply_fixed_bits(tuple(values)),
            fms=fms,
            xfd_faulting_mask=xfd_faulting,
            tsx_ctrl=bool(arch_capabilities & 1 << 7),
            xsave_area_size=cpuid(0xD, 0)[1],
        ),
        xcr0_supported=by_leaf[0xD, 0][0] & XCR0_USER_MASK,
        xss_supported=by_leaf[0xD, 1][2] & XSS_SUPERVISOR_MASK,
        xsave_components=tuple(components),
        native_tsc_frequency=crystal * numerator // denominator if denominator else 0,
        last_extended_leaf=last_extended,
        max_lbr_depth=8 * (by_leaf[0x1C, None][0] & 0xFF).bit_length(),
        waitpkg=waitpkg,
        ddpd=bool(by_leaf[0x7, 2][3] & 1 << 3),
        rtm=bool(by_leaf[0x7, 0][1] & 1 << 11),
        tsc_adjust=rdmsr(IA32_TSC_ADJUST),
        arch_capabilities=arch_capabilities,
        perf_capabilities=rdmsr(IA32_PERF_CAPABILITIES),
        ept_vpid_cap=rdmsr(IA32_VMX_EPT_VPID_CAP),
        cr0_fixed0=rdmsr(IA32_VMX_CR0_FIXED0),
        cr0_fixed1=rdmsr(IA32_VMX_CR0_FIXED1),
        cr4_fixed0=rdmsr(IA32_VMX_CR4_FIXED0),
        cr4_fixed1=rdmsr(IA32_VMX_CR4_FIXED1),
        l1_controls=_controls(rdmsr, waitpkg=waitpkg, proc2=0x133C_B3FA),
        l2_controls=_controls(rdmsr, waitpkg=waitpkg, proc2=0x1338_B3FA),
    )


def _controls(rdmsr: MsrSource, *, waitpkg: bool, proc2: int) -> VmcsControls:
    """Return the initial controls: the spec's initial value, plus the bits that the CPU does not allow to be 0."""
    ctls2 = rdmsr(IA32_VMX_PROCBASED_CTLS2)
    proc2 = proc2 & ~_EN_GUEST_WAIT_PAUSE | (_EN_GUEST_WAIT_PAUSE if waitpkg else 0)
    if not ctls2 >> 32 & _EN_ENCLV_EXITING:
        proc2 &= ~_EN_ENCLV_EXITING

    def with_required(initial: int, msr: int) -> int:
        return initial | rdmsr(msr) & 0xFFFF_FFFF

    return VmcsControls(
        pin=with_required(0x0000_0029, IA32_VMX_TRUE_PINBASED_CTLS),
        proc=with_required(0x9122_0088, IA32_VMX_TRUE_PROCBASED_CTLS),
        proc2=proc2 | ctls2 & 0xFFFF_FFFF,
        proc3=0x80,
        exit=with_required(0x1F3C_8204, IA32_VMX_TRUE_EXIT_CTLS),
        entry=with_required(0x003E_C004, IA32_VMX_TRUE_ENTRY_CTLS),
    )
