"""TDG.VP.VMCALL<ReportFatalError>: the guest gives up, and says why."""

from typing import TYPE_CHECKING, Final

from sim_backend.hw.gprs import R8, R15, RAX, RBX, RCX, RDI, RDX, RSI
from sim_backend.kvm.kvm_run_page import EXIT_REASON, UNION_U32, UNION_U64

if TYPE_CHECKING:
    from sim_backend.kvm.tdx.ops import TdxOps
    from sim_backend.kvm.vcpu import Vcpu

KVM_EXIT_SYSTEM_EVENT: Final = 24
KVM_SYSTEM_EVENT_TDX_FATAL: Final = 7
_NDATA: Final = 16


def tdvmcall_report_fatal_error(ops: "TdxOps", vcpu: "Vcpu", regs: list[int]) -> bool:
    """R12 = error code, R13 = GPA of more; the registers go to user space as they are.

    Resuming is legal and the guest sees success (`tdx_report_fatal_error()`).
    """
    del ops
    run = vcpu.run
    run.u32[EXIT_REASON] = KVM_EXIT_SYSTEM_EVENT
    run.u32[UNION_U32] = KVM_SYSTEM_EVENT_TDX_FATAL
    run.u32[UNION_U32 + 1] = _NDATA
    data = [regs[RAX], regs[RCX], regs[RDX], regs[RBX], 0, 0, regs[RSI], regs[RDI], *regs[R8 : R15 + 1]]
    for word, value in enumerate(data, UNION_U64 + 1):
        run.u64[word] = value
    return False
