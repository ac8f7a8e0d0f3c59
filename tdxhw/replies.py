"""Answer an exit in ``struct kvm_run``; the guest sees the answer at the next KVM_RUN.

The vocabulary is the GHCI's; where mainline wants an errno instead (KVM_HC_MAP_GPA_RANGE), it is translated here.
"""

import errno
from collections.abc import Sequence
from typing import Final

from tdxhw.exits import MapGpa
from uapi_ctypes.kvm_run import KvmExit, KvmRun
from uapi_ctypes.tdx_status import TdvmcallStatus
from uapi_ctypes.vcpu import Vcpu

_MAP_GPA_ERRNO: Final = {
    TdvmcallStatus.SUCCESS: 0,
    TdvmcallStatus.RETRY: errno.EAGAIN,
    TdvmcallStatus.INVALID_OPERAND: errno.EINVAL,
}
_V17_OUTPUTS: Final = ("out_r11", "out_r12", "out_r13", "out_r14", "out_r15")


def reply_port(vcpu: Vcpu, values: Sequence[int], size_bytes: int) -> None:
    """Answer port reads of `size_bytes` each."""
    mask = (1 << 8 * size_bytes) - 1
    vcpu.io_data()[:] = b"".join((value & mask).to_bytes(size_bytes, "little") for value in values)


def reply_mmio(run: KvmRun, value: int) -> None:
    """Answer an MMIO read."""
    run.mmio.data[:] = (value & 0xFFFF_FFFF_FFFF_FFFF).to_bytes(8, "little")


def reply_msr(run: KvmRun, value: int | None) -> None:
    """Answer an MSR access with a value, or make it fail with None."""
    run.msr.error = value is None
    if value is not None and run.exit_reason == KvmExit.KVM_EXIT_X86_RDMSR:
        run.msr.data = value


def reply_map_gpa(run: KvmRun, request: MapGpa, status: TdvmcallStatus) -> None:
    """Answer MapGPA. Raise ``KeyError`` on a status that mainline cannot convey."""
    if run.exit_reason == KvmExit.KVM_EXIT_HYPERCALL:
        run.hypercall.ret = _MAP_GPA_ERRNO[status]
        return
    call = run.tdx_v17.vmcall
    call.status_code = status
    if status is not TdvmcallStatus.SUCCESS:
        call.out_r11 = request.gpa  # where the guest has to go on


def reply_tdvmcall(run: KvmRun, status: TdvmcallStatus, outputs: Sequence[int] = ()) -> None:
    """Answer another TDVMCALL: its status, and values for r11, r12, ... where the leaf has any."""
    if run.tdx_v17.type:
        call = run.tdx_v17.vmcall
        call.status_code = status
        for name, value in zip(_V17_OUTPUTS, outputs, strict=False):
            setattr(call, name, value)
        return
    run.tdx.unknown.ret = status
    # get_tdvmcall_info: ret, leaf, then r11 to r14.
    for index, value in enumerate(outputs, start=1):
        run.tdx.unknown.data[index] = value
