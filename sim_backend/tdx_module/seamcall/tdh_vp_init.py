"""TDH.VP.INIT."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from sim_backend.cpu.virtual_apic import VirtualApic
from sim_backend.hw.gprs import R8, RAX, RBX, RCX, RDX, RSI, Gprs, new_gprs
from sim_backend.tdx_module import metadata_vp, td_vmcs
from sim_backend.tdx_module.errors import LeafError
from sim_backend.tdx_module.op_states import ALLOWED
from sim_backend.tdx_module.second_level import TdSecondLevel
from sim_backend.tdx_module.tdvps import VAPIC_PAGE, LastTdExit, Tdvps, VcpuState, needed_tdvps_pages
from uapi_ctypes.tdx_leaves import SeamcallLeaf
from uapi_ctypes.tdx_status import Operand, Status

if TYPE_CHECKING:
    from sim_backend.tdx_module.module import TdxModule

_ALLOWED: Final = ALLOWED[SeamcallLeaf.TDH_VP_INIT]
_MSR_IA32_TSC_ADJUST: Final = 0x3B


def tdh_vp_init(module: TdxModule, lp: int, regs: Gprs) -> int:
    """Bring a vCPU into its initial state and associate it with this LP.

    ======= === ============================================================
    Operand     Meaning
    ======= === ============================================================
    RCX     in  HPA of the TDVPR page
    RDX     in  initial value of the guest's RCX and R8
    R8      in  version 1 (`mainline-host` profile): the vCPU's x2APIC id
    ======= === ============================================================

    Spec: TDX Module ABI Reference, TDH.VP.INIT.
    """
    # 1. The version is 0, or 1 where the profile has it.
    version = regs[RAX] >> 16
    if version > 1:
        raise LeafError(Status.OPERAND_INVALID, Operand.RAX)

    # 2. RCX is a TDVPR page that this LP can lock exclusively, of a TD that is being built.
    tdvps = module.lock_tdvpr(regs[RCX], Operand.RCX, 1)
    tdr = tdvps.tdr
    tdcs = tdr.tdcs
    module.check_td(tdr, _ALLOWED)

    # 3. The TDVPS is complete, and not initialised yet.
    if tdvps.num_tdvps_pages < needed_tdvps_pages(tdcs.num_l2_vms):
        raise LeafError(Status.TDCX_NUM_INCORRECT)
    if tdvps.vcpu_state != VcpuState.UNINITIALIZED:
        raise LeafError(Status.VCPU_STATE_INCORRECT)

    # 4. The TD may have one more vCPU. (NUM_VCPUS counts the attempt even if the next check fails.)
    if tdcs.num_vcpus >= tdcs.max_vcpus:
        raise LeafError(Status.MAX_VCPUS_EXCEEDED)
    tdvps.vcpu_index = tdcs.num_vcpus
    tdcs.num_vcpus += 1

    # 5. Nobody has moved the TSC since TDH.SYS.INIT.
    if module.platform.rdmsr(lp, _MSR_IA32_TSC_ADJUST) != module.msrs[_MSR_IA32_TSC_ADJUST]:
        raise LeafError(Status.INCONSISTENT_MSR, _MSR_IA32_TSC_ADJUST)

    # ---- Every check passed: from here on the leaf cannot fail. ----

    tdvps.last_exit_tsc = module.platform.rdtsc()
    tdvps.xfam = tdcs.xfam
    if version:
        tdvps.x2apic_id = regs[R8] & 0xFFFF_FFFF
    _start_cpu(module, tdvps, regs[RDX])
    metadata_vp.initialize(module, tdvps)
    tdvps.vcpu_state = VcpuState.READY
    tdvps.last_td_exit = LastTdExit.ASYNC_FAULT
    tdvps.assoc_lpid = lp
    tdcs.num_assoc_vcpus += 1
    return 0


def _start_cpu(module: TdxModule, tdvps: Tdvps, init_rcx: int) -> None:
    """Make the CPU context: 32-bit protected mode at the reset vector, GPRs as the spec's table says."""
    tdcs = tdvps.tdr.tdcs
    gprs = new_gprs()
    gprs[RBX] = 52 if tdcs.gpaw else 48
    gprs[RCX] = gprs[R8] = init_rcx
    gprs[RDX] = module.sampled_capabilities().cpuid.fms
    gprs[RSI] = tdvps.vcpu_index
    cpu = module.cpus.new_cpu()
    cpu.gprs[:] = gprs
    cpu.rip = 0xFFFF_FFF0
    cpu.rflags = 2
    cpu.set_state(td_vmcs.initial_cpu_state())
    cpu.msr_policy = tdcs.msr_bitmap
    cpu.second_level = TdSecondLevel(module, tdvps)
    cpu.virtual_apic = VirtualApic(module.memory, tdvps.tdvps_page_pa[VAPIC_PAGE])
    tdvps.cpu = cpu
    td_vmcs.initialize(tdvps.tdr, tdvps, module.sampled_capabilities(), module.hkid_start_bit)
