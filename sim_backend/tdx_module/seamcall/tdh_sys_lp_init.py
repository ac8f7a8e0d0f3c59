"""TDH.SYS.LP.INIT."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from sim_backend.hw.gprs import R8, RCX, RDX, Gprs
from sim_backend.tdx_module import platform_checks as checks
from sim_backend.tdx_module.cpuid_checks import compare_cpuid
from sim_backend.tdx_module.errors import LeafError
from sim_backend.tdx_module.sys_state import SysState
from uapi_ctypes.tdx_status import Status

if TYPE_CHECKING:
    from sim_backend.tdx_module.module import TdxModule

_SAME_FIRST: Final = (
    checks.IA32_CORE_CAPABILITIES,
    checks.IA32_ARCH_CAPABILITIES,
    checks.IA32_MISC_PACKAGE_CTLS,
    checks.IA32_XAPIC_DISABLE_STATUS,
)
_SAME_LAST: Final = (
    checks.IA32_VMX_BASIC,
    checks.IA32_VMX_TRUE_PINBASED_CTLS,
    checks.IA32_VMX_TRUE_PROCBASED_CTLS,
    checks.IA32_VMX_PROCBASED_CTLS2,
    checks.IA32_VMX_PROCBASED_CTLS3,
    checks.IA32_VMX_TRUE_EXIT_CTLS,
    checks.IA32_VMX_TRUE_ENTRY_CTLS,
    checks.IA32_VMX_MISC,
    checks.IA32_VMX_EPT_VPID_CAP,
    checks.IA32_VMX_CR0_FIXED0,
    checks.IA32_VMX_CR0_FIXED1,
    checks.IA32_VMX_CR4_FIXED0,
    checks.IA32_VMX_CR4_FIXED1,
    checks.IA32_PERF_CAPABILITIES,
    checks.IA32_TME_CAPABILITY,
    checks.IA32_TME_ACTIVATE,
    checks.IA32_MKTME_KEYID_PARTITIONING,
    checks.IA32_WBINVDP,
    checks.IA32_WBNOINVDP,
)


def tdh_sys_lp_init(module: TdxModule, lp: int, regs: Gprs) -> int:
    """Initialise the module on this LP: it must agree with the one that ran TDH.SYS.INIT.

    ======== === ===========================================================
    Operand      Meaning
    ======== === ===========================================================
    RCX      out 0; when a CPUID value disagrees: leaf and sub-leaf
    RDX, R8  out 0; when a CPUID value disagrees: the bits that must agree
    ======== === ===========================================================

    Spec: TDX Module ABI Reference, TDH.SYS.LP.INIT.
    """
    regs[RCX] = regs[RDX] = regs[R8] = 0
    platform = module.platform

    def check_same(*msrs: int) -> None:
        for msr in msrs:
            if platform.rdmsr(lp, msr) != module.msrs.get(msr, 0):
                raise LeafError(Status.INCONSISTENT_MSR, msr)

    # 1. The module is initialised but not configured, and this LP is not initialised yet.
    if not module.global_lock.try_shared():
        raise LeafError(Status.SYS_BUSY)
    if module.sys_state != SysState.SYSINIT_DONE:
        raise LeafError(Status.SYS_LP_INIT_NOT_PENDING)
    if module.lp_is_init[lp]:
        raise LeafError(Status.SYS_LP_INIT_DONE)

    # 2. There is entropy for the single-step defence.
    seed = platform.rdrand()
    if seed is None or not seed & 0xFFFF_FFFF:
        raise LeafError(Status.RND_NO_ENTROPY)

    # 3. MSRs and CPUID agree, and the package number is small enough.
    check_same(*_SAME_FIRST)
    if platform.rdmsr(lp, checks.IA32_MISC_ENABLE) & checks.MISC_ENABLE_BOOT_NT4:
        raise LeafError(Status.LIMIT_CPUID_MAXVAL_SET)
    compare_cpuid(
        lambda leaf, subleaf: platform.cpuid_regs(leaf, subleaf, lp),
        module.cpuid_sample,
        platform.lps[lp].package,
        regs,
    )
    check_same(checks.IA32_TSC_ADJUST, checks.IA32_MTRRCAP)
    for smrr in range(checks.smrr_count(platform.rdmsr(lp, checks.IA32_MTRRCAP), platform)):
        check_same(checks.IA32_SMRR_PHYSBASE[smrr], checks.IA32_SMRR_PHYSMASK[smrr])
    check_same(*_SAME_LAST)

    # ---- Every check passed: from here on the leaf cannot fail. ----

    module.lp_is_init[lp] = True
    return 0
