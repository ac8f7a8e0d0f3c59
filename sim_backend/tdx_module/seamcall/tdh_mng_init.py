"""TDH.MNG.INIT."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from sim_backend.hw.gprs import RCX, RDX, Gprs
from sim_backend.tdx_module import td_params
from sim_backend.tdx_module.cpu_capabilities import IA32_TSC_ADJUST
from sim_backend.tdx_module.cpuid_virtualization import CPUID_LOOKUP, CpuidConfigError
from sim_backend.tdx_module.errors import LeafError, SimBug
from sim_backend.tdx_module.msr_virtualization import build_bitmap, native_features
from sim_backend.tdx_module.op_states import ALLOWED, OpState
from sim_backend.tdx_module.tdcs import MSR_BITMAP_PAGE, ROOT_SEPT_PAGE, Tdcs
from sim_backend.tdx_module.virtual_vmx_msrs import virtual_vmx_msrs
from uapi_ctypes.tdx_leaves import SeamcallLeaf
from uapi_ctypes.tdx_status import Operand, Status

if TYPE_CHECKING:
    from sim_backend.tdx_module.module import TdxModule
    from sim_backend.tdx_module.tdr import Tdr

_ALLOWED: Final = ALLOWED[SeamcallLeaf.TDH_MNG_INIT]
IA32_MISC_ENABLE: Final = 0x1A0
MISC_ENABLE_BOOT_NT4: Final = 1 << 22


def tdh_mng_init(module: TdxModule, lp: int, regs: Gprs) -> int:
    """Configure a TD from TD_PARAMS.

    ======= === ============================================================
    Operand     Meaning
    ======= === ============================================================
    RCX     in  HPA of the TDR page
    RCX     out CPUID leaf and subleaf whose configuration is refused, or 0
    RDX     in  HPA of TD_PARAMS, shared, 1 KiB-aligned
    ======= === ============================================================

    Spec: TDX Module ABI Reference, TDH.MNG.INIT.
    """
    tdr_hpa, params_hpa = regs[RCX], regs[RDX]
    regs[RCX] = 0

    # 1. CPUID is not limited to the leaves of Windows NT 4.
    if module.platform.rdmsr(lp, IA32_MISC_ENABLE) & MISC_ENABLE_BOOT_NT4:
        raise LeafError(Status.LIMIT_CPUID_MAXVAL_SET)

    # 2. RCX is a TDR page that this LP can lock exclusively, of a TD that is not initialised yet.
    tdr = module.lock_tdr(tdr_hpa, Operand.RCX, 1)
    module.check_td_locked(tdr, _ALLOWED)

    # 3. RDX is shared memory.
    module.check_shared_hpa(params_hpa, td_params.TD_PARAMS_BYTES, Operand.RDX)

    # 4. TD_PARAMS is a legal configuration.
    capabilities = module.capabilities
    if capabilities is None:
        raise SimBug("a TD before TDH.SYS.INIT")
    params = td_params.TdParams.decode(module.read_shared(params_hpa, td_params.TD_PARAMS_BYTES))
    try:
        configuration = td_params.check(
            params,
            module.profile,
            capabilities,
            num_tdcx=tdr.num_tdcx,
            tsc_adjust=module.platform.rdmsr(lp, IA32_TSC_ADJUST),
            maxpa=module.platform.maxpa,
        )
    except CpuidConfigError as error:
        regs[RCX] = error.leaf_subleaf
        raise LeafError(Status.OPERAND_INVALID, Operand.CPUID_CONFIG) from None

    # ---- Every check passed: from here on the leaf cannot fail. ----

    _configure(module, tdr, configuration)
    tdr.tdcs.op_state = OpState.INITIALIZED
    return 0


def _configure(module: TdxModule, tdr: Tdr, configuration: td_params.TdConfiguration) -> None:
    params, tdcs, capabilities = configuration.params, tdr.tdcs, module.capabilities
    assert capabilities is not None, "checked before"
    tdcs.num_vcpus = tdcs.num_assoc_vcpus = 0
    tdcs.td_epoch = 1
    tdcs.refcount = [0, 0]
    tdcs.hp_lock_timeout = td_params.microseconds_to_tsc(
        td_params.DEFAULT_HP_LOCK_TIMEOUT_US, capabilities.native_tsc_frequency
    )
    tdcs.attributes = params.attributes
    tdcs.td_ctls = int(bool(params.attributes & td_params.ATTR_SEPT_VE_DISABLE))
    tdcs.xfam = params.xfam
    tdcs.xbuff_offsets = list(configuration.xbuff_offsets)
    tdcs.xbuff_size = configuration.xbuff_size
    tdcs.max_vcpus = params.max_vcpus
    tdcs.num_l2_vms = params.num_l2_vms
    tdcs.config_flags = params.config_flags
    tdcs.gpaw = bool(params.config_flags & td_params.FLAG_GPAW)
    tdcs.shared_bit = 51 if tdcs.gpaw else 47
    tdcs.sept_root = tdr.tdcx_pa[ROOT_SEPT_PAGE]
    tdcs.l2_sept_root = [*tdr.tdcx_pa[6 : 6 + params.num_l2_vms], 0, 0, 0][:3]
    tdcs.eptp = params.eptp_controls | tdcs.sept_root
    tdcs.pwl = params.eptp_controls >> 3 & 7
    tdcs.tsc_frequency = params.tsc_frequency
    tdcs.tsc_multiplier, tdcs.tsc_offset = td_params.tsc_parameters(
        module.platform.rdtsc(), capabilities.native_tsc_frequency, params.tsc_frequency
    )
    tdcs.mrconfigid, tdcs.mrowner, tdcs.mrownerconfig = params.mrconfigid, params.mrowner, params.mrownerconfig
    _configure_virtualization(module, tdr, tdcs, configuration)


def _configure_virtualization(
    module: TdxModule, tdr: Tdr, tdcs: Tdcs, configuration: td_params.TdConfiguration
) -> None:
    capabilities = module.capabilities
    assert capabilities is not None, "checked before"
    tdcs.cpuid_flags = configuration.cpuid_flags
    for row, (eax, ebx, ecx, edx) in zip(CPUID_LOOKUP, configuration.cpuid_values, strict=True):
        tdcs.cpuid_values[row.index] = (eax | ebx << 32, ecx | edx << 32)
        tdcs.cpuid_valid[row.index] = int(not row.faulting)
    tdcs.virtual_ia32_arch_capabilities = configuration.virtual_arch_capabilities
    tdcs.virtual_vmx_msrs = virtual_vmx_msrs(capabilities, tdcs.attributes, tdcs.xfam, tdcs.cpuid_flags)
    tdcs.msr_bitmap = build_bitmap(
        native_features(tdcs.attributes, tdcs.xfam, tdcs.cpuid_flags), capabilities.perf_capabilities
    )
    page = tdr.tdcx_pa[MSR_BITMAP_PAGE]
    module.memory.write(page, tdcs.msr_bitmap.page)
