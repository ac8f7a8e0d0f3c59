"""TDG.VP.VMCALL<GetTdVmCallInfo>: which sub-functions the host serves."""

from typing import TYPE_CHECKING, Final

from sim_backend.hw.gprs import R10, R11, R12, R13, R14
from sim_backend.kvm.kvm_run_page import EXIT_REASON, UNION_U64
from sim_backend.kvm.tdx.tdvmcall.status import INVALID_OPERAND, SUCCESS

if TYPE_CHECKING:
    from sim_backend.kvm.tdx.ops import TdxOps
    from sim_backend.kvm.vcpu import Vcpu

KVM_EXIT_TDX: Final = 40
GET_TD_VM_CALL_INFO: Final = 0x10000
_FLAGS, _NR, _RET, _LEAF, _R11 = (UNION_U64 + word for word in range(5))


def tdvmcall_get_td_vmcall_info(ops: "TdxOps", vcpu: "Vcpu", regs: list[int]) -> bool:
    """R12 = leaf. 0 is answered here; 1 goes to user space; there is no other."""
    leaf = regs[R12]
    if leaf == 0:
        regs[R11] = regs[R12] = regs[R13] = regs[R14] = 0
        return True
    if leaf != 1 or ops.host.is_v17:
        regs[R10] = INVALID_OPERAND
        return True
    words = vcpu.run.u64
    vcpu.run.u32[EXIT_REASON] = KVM_EXIT_TDX
    words[_FLAGS], words[_NR], words[_RET], words[_LEAF] = 0, GET_TD_VM_CALL_INFO, SUCCESS, leaf
    for word in range(_R11, _R11 + 4):
        words[word] = 0
    vcpu.complete_userspace_io = lambda: _complete(vcpu)
    return False


def _complete(vcpu: "Vcpu") -> bool:
    words, regs = vcpu.run.u64, vcpu.vendor.regs
    regs[R10] = words[_RET]
    regs[R11], regs[R12], regs[R13], regs[R14] = words[_R11 : _R11 + 4]
    return True
