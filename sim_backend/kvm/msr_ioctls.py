"""Reading and writing MSRs from user space: KVM_GET_MSRS, KVM_SET_MSRS and the register ids."""

import errno
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from sim_backend.kvm.errors import Errno
from sim_backend.kvm.msrs import MsrRefused, MsrUnknown
from sim_backend.kvm.system_queries import MAX_IO_MSRS

if TYPE_CHECKING:
    from sim_backend.kvm.vcpu import Vcpu

_MSRS_HEADER: Final = struct.Struct("<II")
_MSR_ENTRY: Final = struct.Struct("<IIQ")
_REG_X86_U64_MSR: Final = 0x2030_0002  # architecture, size and type in the upper half of a register id


class MsrIoctls:
    """The MSR ioctls of one vCPU (vcpu->mutex held)."""

    def __init__(self, vcpu: "Vcpu") -> None:
        self._vcpu: Final = vcpu
        self._vm: Final = vcpu.vm
        # Protected vCPUs answer for their own set only.
        self._advertised: Final = (
            frozenset() if vcpu.vm.ops.has_protected_state else frozenset(vcpu.vm.host.profile.msr_index_list)
        )

    def get_msrs(self, argp: int) -> int:
        """KVM_GET_MSRS: returns how many were read, stopping at the first that cannot be."""
        vcpu, ops = self._vcpu, self._vm.ops

        advertised = self._advertised

        def one(data: bytearray, offset: int) -> None:
            index, reserved, _ = _MSR_ENTRY.unpack_from(data, offset)
            try:
                value = ops.get_msr(vcpu, index, True)
            except MsrUnknown:
                _MSR_ENTRY.pack_into(data, offset, index, reserved, 0)
                if index not in advertised:
                    raise
                return
            _MSR_ENTRY.pack_into(data, offset, index, reserved, value)

        return self._each_msr(argp, one, write_back=True)

    def set_msrs(self, argp: int) -> int:
        """KVM_SET_MSRS: returns how many were set, stopping at the first that cannot be."""
        vcpu, ops, advertised = self._vcpu, self._vm.ops, self._advertised

        def one(data: bytearray, offset: int) -> None:
            index, _reserved, value = _MSR_ENTRY.unpack_from(data, offset)
            try:
                ops.set_msr(vcpu, index, value, True)
            except MsrUnknown:
                # User space saves and restores every advertised MSR, also those that this vCPU has not.
                if value or index not in advertised:
                    raise

        return self._each_msr(argp, one, write_back=False)

    def _each_msr(self, argp: int, one: Callable[[bytearray, int], None], *, write_back: bool) -> int:
        mm = self._vm.mm
        nmsrs, _pad = _MSRS_HEADER.unpack(mm.read(argp, 8))
        if nmsrs >= MAX_IO_MSRS:
            raise Errno(errno.E2BIG)
        data = bytearray(mm.read(argp + 8, nmsrs * 16))
        done = 0
        for offset in range(0, nmsrs * 16, 16):
            try:
                one(data, offset)
            except (MsrUnknown, MsrRefused):
                break
            done += 1
        if write_back:
            mm.write(argp + 8, data)
        return done

    def get_one_reg(self, argp: int) -> int:
        """KVM_GET_ONE_REG: an MSR by its register id."""
        index, address = self._one_reg(argp)
        try:
            value = self._vm.ops.get_msr(self._vcpu, index, True)
        except (MsrUnknown, MsrRefused):
            raise Errno(errno.EINVAL) from None
        self._vm.mm.write(address, struct.pack("<Q", value))
        return 0

    def set_one_reg(self, argp: int) -> int:
        """KVM_SET_ONE_REG."""
        index, address = self._one_reg(argp)
        (value,) = struct.unpack("<Q", self._vm.mm.read(address, 8))
        try:
            self._vm.ops.set_msr(self._vcpu, index, value, True)
        except (MsrUnknown, MsrRefused):
            raise Errno(errno.EINVAL) from None
        return 0

    def _one_reg(self, argp: int) -> tuple[int, int]:
        """Return MSR index and user address of a ``struct kvm_one_reg``; EINVAL for any id but an MSR's."""
        register, address = struct.unpack("<QQ", self._vm.mm.read(argp, 16))
        if register >> 32 != _REG_X86_U64_MSR:
            raise Errno(errno.EINVAL)
        return register & 0xFFFF_FFFF, address
