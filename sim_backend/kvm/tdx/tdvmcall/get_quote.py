"""TDG.VP.VMCALL<GetQuote>: user space turns a TDREPORT into a quote."""

from typing import TYPE_CHECKING, Final

from sim_backend.hw.gprs import R10, R12, R13
from sim_backend.kvm.kvm_run_page import EXIT_REASON, UNION_U64
from sim_backend.kvm.tdx.tdvmcall.get_td_vmcall_info import KVM_EXIT_TDX
from sim_backend.kvm.tdx.tdvmcall.status import INVALID_OPERAND, SUBFUNC_UNSUPPORTED

if TYPE_CHECKING:
    from sim_backend.kvm.tdx.ops import TdxOps
    from sim_backend.kvm.vcpu import Vcpu

GET_QUOTE: Final = 0x10002
RET_U64: Final = UNION_U64 + 2


def tdvmcall_get_quote(ops: "TdxOps", vcpu: "Vcpu", regs: list[int]) -> bool:
    """R12 = shared GPA, R13 = size [bytes]; neither alignment nor size is checked here."""
    gpa = regs[R12]
    shared_bit = ops.td.gfn_shared_bit << 12
    if not gpa & shared_bit:
        regs[R10] = INVALID_OPERAND
        return True
    words = vcpu.run.u64
    vcpu.run.u32[EXIT_REASON] = KVM_EXIT_TDX
    words[UNION_U64], words[UNION_U64 + 1], words[RET_U64] = 0, GET_QUOTE, SUBFUNC_UNSUPPORTED
    words[UNION_U64 + 3], words[UNION_U64 + 4] = gpa & ~shared_bit, regs[R13]
    vcpu.complete_userspace_io = lambda: complete_simple(vcpu)
    return False


def complete_simple(vcpu: "Vcpu") -> bool:
    """Return user space's status to the guest (`tdx_complete_simple()`)."""
    vcpu.vendor.regs[R10] = vcpu.run.u64[RET_U64]
    return True
