"""KVM_PRE_FAULT_MEMORY: map guest memory ahead of time (`kvm_vcpu_pre_fault_memory`)."""

import errno
import struct
from typing import TYPE_CHECKING, Final

from sim_backend.kvm.errors import Errno
from sim_backend.kvm.signals import SIGNALS

if TYPE_CHECKING:
    from sim_backend.kvm.vcpu import Vcpu

_PRE_FAULT: Final = struct.Struct("<QQQ40x")
_U64: Final = (1 << 64) - 1


def pre_fault_memory(vcpu: "Vcpu", argp: int) -> int:
    """KVM_PRE_FAULT_MEMORY: 0 when any page was mapped; the range is advanced and written back in any case."""
    vm = vcpu.vm
    mm, ops = vm.mm, vm.ops
    gpa, size, flags = _PRE_FAULT.unpack(mm.read(argp, 64))
    if flags:
        raise Errno(errno.EINVAL)
    if (gpa | size) & 0xFFF or not size or gpa + size > _U64:
        raise Errno(errno.EINVAL)
    vcpu.signal_mark = SIGNALS.mark()
    progress = False
    failure: Errno | None = None
    try:
        with vcpu.on_processor():
            while size:
                if vcpu.signal_pending():
                    failure = Errno(errno.EINTR)
                    break
                if not ops.pre_fault_allowed():
                    failure = Errno(errno.EOPNOTSUPP)
                    break
                try:
                    ops.pre_fault_page(vcpu, gpa)
                except Errno as error:
                    failure = error
                    break
                gpa, size, progress = gpa + 4096, size - 4096, True
    finally:
        mm.write(argp, struct.pack("<QQ", gpa, size))
    if failure is not None and not progress:
        raise failure
    return 0
