"""KVM_X86_SET_MSR_FILTER: which MSR accesses of the guest are let through."""

import errno
import struct
from collections.abc import Sequence
from typing import Final, NamedTuple

from sim_backend.kvm.address_space import AddressSpace
from sim_backend.kvm.errors import Errno
from sim_backend.kvm.msrs import is_x2apic

KVM_MSR_FILTER_READ: Final = 1
KVM_MSR_FILTER_WRITE: Final = 2
KVM_MSR_FILTER_DEFAULT_DENY: Final = 1
_RANGES: Final = 16
_RANGE: Final = struct.Struct("<IIIIQ")  # flags, nmsrs, base, padding, bitmap pointer
_FILTER_BYTES: Final = 392
_MAX_BITMAP_BYTES: Final = 0x600


class FilterRange(NamedTuple):
    """One range: the bit of an MSR says that it is allowed."""

    base: int
    nmsrs: int
    flags: int
    bitmap: bytes


class MsrFilter:
    """A whole filter; replaced, never changed."""

    def __init__(self, default_allow: bool, ranges: Sequence[FilterRange]) -> None:
        self.default_allow: Final = default_allow
        self.ranges: Final = tuple(ranges)

    def allows(self, index: int, write: bool) -> bool:
        """Tell whether the guest may access MSR `index` (kvm_msr_allowed)."""
        if is_x2apic(index):
            return True
        kind = KVM_MSR_FILTER_WRITE if write else KVM_MSR_FILTER_READ
        for base, count, flags, bitmap in self.ranges:
            offset = index - base
            if 0 <= offset < count and flags & kind:
                return bool(bitmap[offset >> 3] >> (offset & 7) & 1)
        return self.default_allow


def read_filter(mm: AddressSpace, argp: int) -> MsrFilter | None:
    """Read ``struct kvm_msr_filter``; None when it filters nothing. Raise EFAULT or EINVAL."""
    data = mm.read(argp, _FILTER_BYTES)
    (flags,) = struct.unpack_from("<I", data)
    raw = [_RANGE.unpack_from(data, 8 + index * _RANGE.size) for index in range(_RANGES)]
    if flags & ~KVM_MSR_FILTER_DEFAULT_DENY:
        raise Errno(errno.EINVAL)
    default_allow = not flags & KVM_MSR_FILTER_DEFAULT_DENY
    if not default_allow and not any(count for _, count, _, _, _ in raw):
        raise Errno(errno.EINVAL)  # an empty deny-all would also deny what the guest cannot live without
    ranges = []
    for range_flags, count, base, _padding, pointer in raw:
        if not count:
            continue
        if range_flags & ~(KVM_MSR_FILTER_READ | KVM_MSR_FILTER_WRITE):
            raise Errno(errno.EINVAL)
        bitmap_bytes = (count + 63) // 64 * 8
        if bitmap_bytes > _MAX_BITMAP_BYTES:
            raise Errno(errno.EINVAL)
        if not range_flags:
            raise Errno(errno.EINVAL)
        ranges.append(FilterRange(base, count, range_flags, mm.read(pointer, bitmap_bytes)))
    return MsrFilter(default_allow, ranges)
