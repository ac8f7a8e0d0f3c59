"""KVM_CREATE_DEVICE: VFIO is the only device type that x86 has, and no group can be added to it here."""

import errno
import os
import struct
from typing import TYPE_CHECKING, Final

from sim_backend.kvm.dispatch import CallTable
from sim_backend.kvm.errors import Errno
from sim_backend.kvm.files import Files
from uapi_ctypes.ioctl import KvmRequest

if TYPE_CHECKING:
    from sim_backend.kvm.vm import Vm

_CREATE: Final = struct.Struct("<III")  # type fd flags
KVM_DEV_TYPE_VFIO: Final = 4
KVM_CREATE_DEVICE_TEST: Final = 1
KVM_DEV_VFIO_FILE: Final = 1


def create_device(vm: "Vm", files: Files, argp: int) -> int:
    """KVM_CREATE_DEVICE: ENODEV for a type that is not there."""
    kind, _fd, flags = _CREATE.unpack(vm.mm.read(argp, 12))
    if kind != KVM_DEV_TYPE_VFIO or not vm.host.profile.has_vfio:
        raise Errno(errno.ENODEV)
    if flags & KVM_CREATE_DEVICE_TEST:
        return 0
    with vm.lock:
        if vm.has_vfio_device:
            raise Errno(errno.EBUSY)
        vm.has_vfio_device = True
    vm.get()

    def attr(argp: int) -> int:
        _flags, group, number, pointer = struct.unpack("<IIQQ", vm.mm.read(argp, 24))
        if group != KVM_DEV_VFIO_FILE or number not in (1, 2):
            raise Errno(errno.ENXIO)
        return int(pointer)

    def has_attr(argp: int) -> int:
        attr(argp)
        return 0

    def set_attr(argp: int) -> int:
        pointer = attr(argp)
        (fd,) = struct.unpack("<i", vm.mm.read(pointer, 4))
        files.object_of(fd)
        raise Errno(errno.EINVAL)  # no file of this process is a VFIO group or device

    def get_attr(argp: int) -> int:
        vm.mm.read(argp, 24)
        raise Errno(errno.EPERM)

    def release() -> None:
        vm.has_vfio_device = False
        vm.call_tables.remove(table)
        vm.put()

    table = CallTable(
        {
            int(KvmRequest.KVM_HAS_DEVICE_ATTR): has_attr,
            int(KvmRequest.KVM_SET_DEVICE_ATTR): set_attr,
            int(KvmRequest.KVM_GET_DEVICE_ATTR): get_attr,
        },
        errno.ENOTTY,
    )
    vm.call_tables.append(table)
    fd = files.add_file(os.memfd_create("kvm-device", os.MFD_CLOEXEC), "kvm-device", table, None, release)
    vm.mm.write(argp + 4, struct.pack("<I", fd))
    return 0
