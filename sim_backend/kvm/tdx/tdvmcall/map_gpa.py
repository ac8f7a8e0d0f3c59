"""TDG.VP.VMCALL<MapGPA>: the guest asks for a range to become private or shared."""

import errno
from typing import TYPE_CHECKING, Final

from sim_backend.hw.gprs import R10, R11, R12, R13
from sim_backend.kvm.errors import Errno
from sim_backend.kvm.kvm_run_page import EXIT_REASON, UNION_U64
from sim_backend.kvm.tdx.interrupts import posted_interrupt_pending
from sim_backend.kvm.tdx.tdvmcall.status import ALIGN_ERROR, INVALID_OPERAND, RETRY, SUBFUNC_UNSUPPORTED

if TYPE_CHECKING:
    from sim_backend.kvm.tdx.ops import TdxOps
    from sim_backend.kvm.vcpu import Vcpu

KVM_EXIT_HYPERCALL: Final = 3
KVM_EXIT_HYPERCALL_LONG_MODE: Final = 1
KVM_HC_MAP_GPA_RANGE: Final = 12
MAP_GPA_RANGE_ENCRYPTED: Final = 1 << 4
_CHUNK: Final = 2 << 20  # [bytes] the most that one exit asks for
_U64: Final = (1 << 64) - 1
_NR_U64, _ARGS_U64 = UNION_U64, UNION_U64 + 1
_RET_U64: Final = UNION_U64 + 7
_FLAGS_U64: Final = UNION_U64 + 8


def tdvmcall_map_gpa(ops: "TdxOps", vcpu: "Vcpu", regs: list[int]) -> bool:
    """R12 = GPA (with the S-bit: to shared), R13 = size [bytes] (`tdx_map_gpa()`, checks in its order)."""
    gpa, size = regs[R12], regs[R13]
    status = _refusal(ops, vcpu, gpa, size)
    if status:
        regs[R10], regs[R11] = status, gpa
        return True
    vendor = vcpu.vendor
    vendor.map_gpa_next, vendor.map_gpa_end = gpa, gpa + size
    _next_chunk(ops, vcpu)
    return False


def _refusal(ops: "TdxOps", vcpu: "Vcpu", gpa: int, size: int) -> int:
    if not vcpu.vm.exit_hypercall_mask >> KVM_HC_MAP_GPA_RANGE & 1:
        return SUBFUNC_UNSUPPORTED
    shared_bit = ops.td.gfn_shared_bit << 12
    end = gpa + size
    width = vcpu.cpuid.maxphyaddr
    if end > _U64 or size == 0 or gpa >> width or end - 1 >> width or gpa & shared_bit != end - 1 & shared_bit:
        return INVALID_OPERAND
    if gpa % 4096 or size % 4096:
        return ALIGN_ERROR
    return 0


def _next_chunk(ops: "TdxOps", vcpu: "Vcpu") -> None:
    """Ask user space for the next chunk (`__tdx_map_gpa()`)."""
    vendor, run = vcpu.vendor, vcpu.run
    shared_bit = ops.td.gfn_shared_bit << 12
    gpa = vendor.map_gpa_next
    size = min(vendor.map_gpa_end - gpa, _CHUNK)
    vendor.map_gpa_next = gpa + size
    run.u32[EXIT_REASON] = KVM_EXIT_HYPERCALL
    run.u64[_NR_U64] = KVM_HC_MAP_GPA_RANGE
    run.u64[_ARGS_U64] = gpa & ~shared_bit
    run.u64[_ARGS_U64 + 1] = size >> 12
    run.u64[_ARGS_U64 + 2] = 0 if gpa & shared_bit else MAP_GPA_RANGE_ENCRYPTED
    for word in range(_ARGS_U64 + 3, _RET_U64):
        run.u64[word] = 0
    run.u64[_RET_U64] = 0  # user space that does not know the exit says "done"
    run.u64[_FLAGS_U64] = KVM_EXIT_HYPERCALL_LONG_MODE
    vcpu.complete_userspace_io = lambda: _complete(ops, vcpu, gpa)


def _complete(ops: "TdxOps", vcpu: "Vcpu", chunk: int) -> bool:
    """Take user space's answer for the chunk at `chunk`; False: another chunk is in `kvm_run`.

    Raise ``Errno(EINVAL)`` on an answer that is no answer (`tdx_complete_vmcall_map_gpa()`).
    """
    vendor = vcpu.vendor
    regs = vendor.regs
    answer = vcpu.run.u64[_RET_U64]
    if answer:
        if not ops.host.profile.behaves("mapgpa_ret_codes"):
            regs[R10] = INVALID_OPERAND
        elif answer == errno.EAGAIN:
            regs[R10] = RETRY
        elif answer == errno.EINVAL:
            regs[R10] = INVALID_OPERAND
        else:
            raise Errno(errno.EINVAL)
        regs[R11] = chunk
        return True
    if vendor.map_gpa_next >= vendor.map_gpa_end:
        return True
    if vcpu.nmi_queued or vcpu.nmi_pending or posted_interrupt_pending(ops, vcpu):
        # The guest shall take its interrupt first, and ask for the rest again.
        regs[R10], regs[R11] = RETRY, vendor.map_gpa_next
        return True
    _next_chunk(ops, vcpu)
    return False
