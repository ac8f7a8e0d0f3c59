"""The VM's clock: KVM_GET_CLOCK and KVM_SET_CLOCK."""

import errno
import struct
import time
from typing import TYPE_CHECKING, Final

from sim_backend.kvm.errors import Errno

if TYPE_CHECKING:
    from sim_backend.kvm.vm import Vm

_CLOCK: Final = struct.Struct("<QIIQQ16x")  # clock flags pad realtime host_tsc
KVM_CLOCK_TSC_STABLE: Final = 2
KVM_CLOCK_REALTIME: Final = 4
KVM_CLOCK_HOST_TSC: Final = 8


class KvmClockIoctls:
    """The clock of one VM: nanoseconds since it was created, unless set."""

    def __init__(self, vm: "Vm") -> None:
        self._vm: Final = vm

    def get_clock(self, argp: int) -> int:
        """KVM_GET_CLOCK."""
        profile = self._vm.host.profile
        now = time.monotonic_ns()
        flags = profile.clock_flags
        realtime = time.time_ns() if flags & KVM_CLOCK_REALTIME else 0
        host_tsc = now * profile.tsc_khz // 1_000_000 if flags & KVM_CLOCK_HOST_TSC else 0
        self._vm.mm.write(argp, _CLOCK.pack(now + self._vm.clock_offset_ns, flags, 0, realtime, host_tsc))
        return 0

    def set_clock(self, argp: int) -> int:
        """KVM_SET_CLOCK: of the flags only REALTIME means anything."""
        clock, flags, _pad, realtime, _tsc = _CLOCK.unpack(self._vm.mm.read(argp, 48))
        if flags & ~(KVM_CLOCK_TSC_STABLE | KVM_CLOCK_REALTIME | KVM_CLOCK_HOST_TSC):
            raise Errno(errno.EINVAL)
        if flags & KVM_CLOCK_REALTIME:
            clock += max(time.time_ns() - realtime, 0)
        self._vm.clock_offset_ns = clock - time.monotonic_ns()
        return 0
