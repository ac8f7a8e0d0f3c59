"""TDH.SYS.INIT."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from sim_backend.hw.gprs import R8, R9, R10, RCX, RDX, Gprs
from sim_backend.hw.lp import LogicalProcessor
from sim_backend.tdx_module import cpu_capabilities
from sim_backend.tdx_module import platform_checks as checks
from sim_backend.tdx_module.cpuid_checks import check_cpuid
from sim_backend.tdx_module.errors import LeafError
from sim_backend.tdx_module.kot import KeyOwnershipTable
from sim_backend.tdx_module.pamt import Pamt
from sim_backend.tdx_module.sys_state import SysState
from uapi_ctypes.tdx_status import Operand, Status

if TYPE_CHECKING:
    from sim_backend.tdx_module.module import TdxModule

WAITPKG: Final = 1 << 5  # CPUID(7, 0).ECX


def tdh_sys_init(module: TdxModule, lp: int, regs: Gprs) -> int:
    """Initialise the module: check the platform and remember what every LP has to agree with.

    ======= === ============================================================
    Operand     Meaning
    ======= === ============================================================
    RCX     in  attributes, all reserved: 0
    RCX-R10 out 0; when a CPUID value is wrong: leaf and sub-leaf, mask (RDX,
                R8), expected value (R9, R10)
    ======= === ============================================================

    Spec: TDX Module ABI Reference, TDH.SYS.INIT.
    """
    attributes = regs[RCX]
    regs[RCX] = regs[RDX] = regs[R8] = regs[R9] = regs[R10] = 0
    platform = module.platform

    def rdmsr(msr: int) -> int:
        return platform.rdmsr(lp, msr)

    def cpuid(leaf: int, subleaf: int) -> tuple[int, int, int, int]:
        return platform.cpuid_regs(leaf, subleaf, lp)

    # 1. Nobody else initialises the module; no reserved attribute is set; it is not initialised yet.
    if not module.global_lock.try_exclusive():
        raise LeafError(Status.SYS_BUSY)
    if attributes:
        raise LeafError(Status.OPERAND_INVALID, Operand.RCX)
    if module.sys_state != SysState.SYSINIT_PENDING:
        raise LeafError(Status.SYS_INIT_NOT_PENDING)

    # 2. MSRs, CPUID, VMX capabilities.
    checks.check_msrs(rdmsr)
    if rdmsr(checks.IA32_MISC_ENABLE) & checks.MISC_ENABLE_BOOT_NT4:
        raise LeafError(Status.LIMIT_CPUID_MAXVAL_SET)
    fms = min(_family_model_stepping(module), key=lambda value: value & 0xF)
    sampled = check_cpuid(cpuid, fms, regs)
    checks.check_vmx_msrs(rdmsr, waitpkg=bool(cpuid(7, 0)[2] & WAITPKG))

    # 3. Keys, CMRs, SMRRs.
    checks.check_key_management(rdmsr, without_integrity=platform.tdx_without_integrity)
    start_bit = platform.maxpa - (rdmsr(checks.IA32_TME_ACTIVATE) >> 32 & 0xF)
    hkid_mask = ((1 << platform.maxpa) - 1) & -(1 << start_bit)
    checks.check_cmrs(platform.cmrs, hkid_mask)
    checks.check_smrrs(rdmsr, platform)

    # 4. SEAM capabilities, entropy for the stack canary.
    if ~platform.seamops_capabilities & checks.SEAMOPS_TD_PRESERVING:
        raise LeafError(Status.INCOMPATIBLE_SEAM_CAPABILITIES)
    if platform.rdrand() is None:
        raise LeafError(Status.RND_NO_ENTROPY)

    # ---- Every check passed: from here on the leaf cannot fail. ----

    module.cpuid_sample = sampled
    module.capabilities = cpu_capabilities.sample(cpuid, rdmsr, fms)
    module.msrs = _sample_msrs(platform.lps[lp], platform.msrs)
    module.cache_blocks = rdmsr(checks.IA32_WBINVDP)
    module.first_private_hkid, module.last_private_hkid = checks.private_hkids(rdmsr)
    module.hkid_start_bit, module.hkid_mask = start_bit, hkid_mask
    module.shared_end = min(module.first_private_hkid << start_bit, 1 << platform.maxpa)
    module.kot = KeyOwnershipTable(checks.MAX_HKIDS)
    module.pamt = Pamt(module.memory, start_bit)
    module.cmrs = list(platform.cmrs)
    module.seamrr = platform.seamrr
    module.sys_state = SysState.SYSINIT_DONE
    return 0


def _family_model_stepping(module: TdxModule) -> list[int]:
    """Return CPUID(1).EAX of the first LP of each package."""
    first_lps = {lp.package: lp.index for lp in reversed(module.platform.lps)}
    return [module.platform.cpuid_regs(1, 0, index)[0] for index in first_lps.values()]


def _sample_msrs(lp: LogicalProcessor, shared: dict[int, int]) -> dict[int, int]:
    return {**shared, **lp.msrs}
