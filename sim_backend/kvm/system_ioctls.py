"""The ioctls of /dev/kvm itself (`kvm_dev_ioctl`, `kvm_arch_dev_ioctl`)."""

import errno
import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from sim_backend.kvm.caps import system_extension
from sim_backend.kvm.dispatch import CallTable
from sim_backend.kvm.errors import Errno
from sim_backend.kvm.files import Files
from sim_backend.kvm.kvm_run_page import RUN_BYTES
from sim_backend.kvm.signals import SIGNALS
from sim_backend.kvm.system_queries import MAX_IO_MSRS, write_cpuid
from sim_backend.kvm.vm import Vm
from sim_backend.kvm.vm_ioctls import publish_vm
from uapi_ctypes.ioctl import KvmRequest

if TYPE_CHECKING:
    from sim_backend.kvm.host import KvmHost

KVM_API_VERSION: Final = 12
_MSRS_HEADER: Final = struct.Struct("<II")
_MSR_ENTRY: Final = struct.Struct("<IIQ")
KVM_X86_GRP_SYSTEM: Final = 0
KVM_X86_XCOMP_GUEST_SUPP: Final = 0


class SystemIoctls:
    """One open of /dev/kvm."""

    def __init__(self, host: "KvmHost", files: Files) -> None:
        self._host: Final = host
        self._files: Final = files

    def table(self) -> CallTable:
        """Return the handlers by request number."""
        profile = self._host.profile
        handlers = {
            KvmRequest.KVM_GET_API_VERSION: self.get_api_version,
            KvmRequest.KVM_CREATE_VM: self.create_vm,
            KvmRequest.KVM_CHECK_EXTENSION: system_extension(profile),
            KvmRequest.KVM_GET_VCPU_MMAP_SIZE: self.get_vcpu_mmap_size,
            KvmRequest.KVM_GET_MSR_INDEX_LIST: self.get_msr_index_list,
            KvmRequest.KVM_GET_MSR_FEATURE_INDEX_LIST: self.get_msr_feature_index_list,
            KvmRequest.KVM_GET_SUPPORTED_CPUID: self.get_supported_cpuid,
            KvmRequest.KVM_GET_EMULATED_CPUID: self.get_emulated_cpuid,
            KvmRequest.KVM_GET_MSRS: self.get_msrs,
            KvmRequest.KVM_X86_GET_MCE_CAP_SUPPORTED: self.get_mce_cap_supported,
            KvmRequest.KVM_GET_DEVICE_ATTR: self.get_device_attr,
            KvmRequest.KVM_HAS_DEVICE_ATTR: self.has_device_attr,
        }
        if profile.hyperv_cpuid:
            handlers[KvmRequest.KVM_GET_SUPPORTED_HV_CPUID] = self.get_supported_hv_cpuid
        return CallTable({int(request): handler for request, handler in handlers.items()}, errno.EINVAL)

    def get_api_version(self, arg: int) -> int:
        """KVM_GET_API_VERSION."""
        if arg:
            raise Errno(errno.EINVAL)
        return KVM_API_VERSION

    def get_vcpu_mmap_size(self, arg: int) -> int:
        """KVM_GET_VCPU_MMAP_SIZE [bytes]."""
        if arg:
            raise Errno(errno.EINVAL)
        return RUN_BYTES

    def create_vm(self, vm_type: int) -> int:
        """KVM_CREATE_VM: EINVAL for a type that this host does not offer."""
        host = self._host
        if vm_type not in host.vm_types:
            raise Errno(errno.EINVAL)
        SIGNALS.mark()  # becomes the wakeup descriptor, which the threads that will call KVM_RUN cannot
        vm = Vm(host, vm_type, self._files.mm)
        vm.ops.vm_init()
        with host.lock:
            host.vms.append(vm)
        return publish_vm(vm, self._files)

    def get_supported_cpuid(self, argp: int) -> int:
        """KVM_GET_SUPPORTED_CPUID."""
        return write_cpuid(self._files.mm, argp, self._host.profile.supported_cpuid)

    def get_emulated_cpuid(self, argp: int) -> int:
        """KVM_GET_EMULATED_CPUID."""
        # Room is asked for before each function is tried, so one entry more than there are.
        return write_cpuid(self._files.mm, argp, self._host.profile.emulated_cpuid, spare=1)

    def get_supported_hv_cpuid(self, argp: int) -> int:
        """KVM_GET_SUPPORTED_HV_CPUID on the system fd."""
        return write_cpuid(self._files.mm, argp, self._host.profile.hyperv_cpuid)

    def get_msr_index_list(self, argp: int) -> int:
        """KVM_GET_MSR_INDEX_LIST."""
        return self._write_msr_list(argp, self._host.profile.msr_index_list)

    def get_msr_feature_index_list(self, argp: int) -> int:
        """KVM_GET_MSR_FEATURE_INDEX_LIST."""
        return self._write_msr_list(argp, self._host.profile.msr_feature_index_list)

    def get_msrs(self, argp: int) -> int:
        """KVM_GET_MSRS on the system fd: the feature MSRs; returns how many were read."""
        mm = self._files.mm
        nmsrs, _pad = _MSRS_HEADER.unpack(mm.read(argp, 8))
        if nmsrs >= MAX_IO_MSRS:
            raise Errno(errno.E2BIG)
        data = bytearray(mm.read(argp + 8, nmsrs * 16))
        features = self._host.profile.feature_msrs
        done = 0
        for offset in range(0, nmsrs * 16, 16):
            index, reserved, _ = _MSR_ENTRY.unpack_from(data, offset)
            if index not in features:
                break
            _MSR_ENTRY.pack_into(data, offset, index, reserved, features[index])
            done += 1
        mm.write(argp + 8, data)
        return done

    def get_mce_cap_supported(self, argp: int) -> int:
        """KVM_X86_GET_MCE_CAP_SUPPORTED."""
        self._files.mm.write(argp, struct.pack("<Q", self._host.profile.mce_cap_supported))
        return 0

    def has_device_attr(self, argp: int) -> int:
        """KVM_HAS_DEVICE_ATTR on the system fd."""
        _flags, group, attr, _addr = struct.unpack("<IIQQ", self._files.mm.read(argp, 24))
        if group != KVM_X86_GRP_SYSTEM or attr != KVM_X86_XCOMP_GUEST_SUPP:
            raise Errno(errno.ENXIO)
        return 0

    def get_device_attr(self, argp: int) -> int:
        """KVM_GET_DEVICE_ATTR on the system fd: the XCR0 and XSS bits that guests may have."""
        mm = self._files.mm
        _flags, group, attr, addr = struct.unpack("<IIQQ", mm.read(argp, 24))
        if group != KVM_X86_GRP_SYSTEM or attr != KVM_X86_XCOMP_GUEST_SUPP:
            raise Errno(errno.ENXIO)
        mm.write(addr, struct.pack("<Q", self._host.profile.xcomp_guest_supported))
        return 0

    def _write_msr_list(self, argp: int, indices: Sequence[int]) -> int:
        mm = self._files.mm
        (room,) = struct.unpack("<I", mm.read(argp, 4))
        mm.write(argp, struct.pack("<I", len(indices)))
        if room < len(indices):
            raise Errno(errno.E2BIG)
        mm.write(argp + 4, struct.pack(f"<{len(indices)}I", *indices))
        return 0
