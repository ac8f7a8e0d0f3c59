"""Build the argument of KVM_X86_SET_MSR_FILTER."""

import ctypes
from dataclasses import dataclass

from uapi_ctypes.kvm import KVM_MSR_FILTER_DEFAULT_DENY, KVM_MSR_FILTER_READ, KVM_MSR_FILTER_WRITE, KvmMsrFilter


@dataclass(frozen=True, slots=True)
class MsrAllowance:
    """One MSR and what the guest may do with it."""

    msr: int
    read: bool = False
    write: bool = False


@dataclass(frozen=True)
class MsrFilter:
    """A filter and the bitmaps that it points to: they must live as long."""

    argument: KvmMsrFilter
    bitmaps: "tuple[ctypes.Array[ctypes.c_uint8], ...]"


def deny_all_but(*allowed: MsrAllowance) -> MsrFilter:
    """Return a filter that denies every access that `allowed` (at most 16) does not name."""
    argument = KvmMsrFilter(flags=KVM_MSR_FILTER_DEFAULT_DENY)
    bitmaps = []
    for entry, range_ in zip(allowed, argument.ranges, strict=False):
        bitmap = (ctypes.c_uint8 * 8)(1)
        bitmaps.append(bitmap)
        range_.flags = (KVM_MSR_FILTER_READ if entry.read else 0) | (KVM_MSR_FILTER_WRITE if entry.write else 0)
        range_.nmsrs, range_.base, range_.bitmap = 1, entry.msr, ctypes.addressof(bitmap)
    return MsrFilter(argument, tuple(bitmaps))
