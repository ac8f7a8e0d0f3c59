"""KVM_{SET,GET,HAS}_DEVICE_ATTR, which /dev/kvm, VMs, vCPUs and in-kernel devices all take."""

from typing import Final

from uapi_ctypes.handle import Handle
from uapi_ctypes.ioctl import KvmRequest
from uapi_ctypes.kvm import KvmDeviceAttr

KVM_X86_XCOMP_GUEST_SUPP: Final = 0
"""`attr` of group 0 on /dev/kvm: the XCR0 bits that a guest may have."""


class AttributeHandle(Handle):
    """A file descriptor with device attributes."""

    def set_device_attr(self, group: int, attr: int, addr: int, flags: int = 0) -> None:
        """KVM_SET_DEVICE_ATTR: store what is at `addr`, an HVA."""
        self.ioctl(KvmRequest.KVM_SET_DEVICE_ATTR, KvmDeviceAttr(flags, group, attr, addr))

    def get_device_attr(self, group: int, attr: int, addr: int, flags: int = 0) -> None:
        """KVM_GET_DEVICE_ATTR: fetch the value to `addr`, an HVA."""
        self.ioctl(KvmRequest.KVM_GET_DEVICE_ATTR, KvmDeviceAttr(flags, group, attr, addr))

    def has_device_attr(self, group: int, attr: int, flags: int = 0) -> None:
        """KVM_HAS_DEVICE_ATTR: raise `KvmError` when there is no such attribute."""
        self.ioctl(KvmRequest.KVM_HAS_DEVICE_ATTR, KvmDeviceAttr(flags, group, attr, 0))


class Device(AttributeHandle):
    """An in-kernel device, from KVM_CREATE_DEVICE."""
