"""Where v17 reports to user space what mainline treats as a bug of the host or the guest."""

import errno
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from sim_backend.kvm.errors import Errno
from sim_backend.kvm.kvm_run_page import EXIT_REASON, UNION_U32, UNION_U64

if TYPE_CHECKING:
    from sim_backend.kvm.tdx.ops import TdxOps
    from sim_backend.kvm.vcpu import Vcpu

KVM_EXIT_UNKNOWN: Final = 0
KVM_EXIT_EXCEPTION: Final = 1
KVM_CAP_MAX_VCPUS: Final = 66
_PF_VECTOR: Final = 14
_EPT_MISCONFIGURATION: Final = 49
_TDX_MAX_VCPUS: Final = 0xFFFF


def shared_instruction_fetch(vcpu: "Vcpu", qualification: int) -> bool:
    """KVM_EXIT_EXCEPTION with vector 14 and the exit qualification as its error code."""
    run = vcpu.run
    run.u32[EXIT_REASON] = KVM_EXIT_EXCEPTION
    run.u32[UNION_U32] = _PF_VECTOR
    run.u32[UNION_U32 + 1] = qualification & 0xFFFF_FFFF
    return False


def ept_misconfiguration(vcpu: "Vcpu") -> bool:
    """KVM_EXIT_UNKNOWN with the hardware's exit reason."""
    run = vcpu.run
    run.u32[EXIT_REASON] = KVM_EXIT_UNKNOWN
    run.u64[UNION_U64] = _EPT_MISCONFIGURATION
    return False


def enable_cap(ops: "TdxOps", capability: int, args: Sequence[int]) -> int | None:
    """KVM_CAP_MAX_VCPUS. Raise ``Errno``: EINVAL (zero), E2BIG, EBUSY (vCPUs exist). None for any other."""
    if capability != KVM_CAP_MAX_VCPUS:
        return None
    vm = ops.vm
    wanted = args[0]
    if wanted == 0:
        raise Errno(errno.EINVAL)
    if wanted > min(vm.host.profile.max_vcpus, _TDX_MAX_VCPUS):
        raise Errno(errno.E2BIG)
    with vm.lock:
        if vm.created_vcpus:
            raise Errno(errno.EBUSY)
        vm.max_vcpus = wanted
    return 0
