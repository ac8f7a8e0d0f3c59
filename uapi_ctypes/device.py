"""`Kvm`: /dev/kvm, the system file descriptor."""

from typing import Final

from uapi_ctypes.device_attr import AttributeHandle
from uapi_ctypes.dialect import MAINLINE, Dialect
from uapi_ctypes.ioctl import KvmRequest
from uapi_ctypes.kernel import Kernel
from uapi_ctypes.kvm_state import KvmCpuid2, KvmMsrList, KvmMsrs
from uapi_ctypes.vm import Vm

_CHECK_EXTENSION: Final = int(KvmRequest.KVM_CHECK_EXTENSION)


class Kvm(AttributeHandle):
    """The KVM device of `kernel`. One method per ioctl; every one raises `KvmError` on failure."""

    def __init__(self, kernel: Kernel, path: str = "/dev/kvm") -> None:
        super().__init__(kernel, kernel.open(path))
        self._ioctl = kernel.ioctl

    def get_api_version(self) -> int:
        """KVM_GET_API_VERSION: 12 ever since."""
        return self.ioctl(KvmRequest.KVM_GET_API_VERSION)

    def check_extension(self, cap: int) -> int:
        """KVM_CHECK_EXTENSION: 0 when `cap`, a `KvmCap`, is absent. A VM may answer otherwise."""
        return self._ioctl(self.fd, _CHECK_EXTENSION, cap)

    def get_vcpu_mmap_size(self) -> int:
        """KVM_GET_VCPU_MMAP_SIZE: how much of a vCPU fd to map [bytes]."""
        return self.ioctl(KvmRequest.KVM_GET_VCPU_MMAP_SIZE)

    def create_vm(self, vm_type: int = 0, *, dialect: Dialect = MAINLINE) -> Vm:
        """KVM_CREATE_VM. `dialect` is how the VM's TDX sub-commands are spoken, see `dialect.detect`."""
        fd = self.ioctl(KvmRequest.KVM_CREATE_VM, vm_type)
        try:
            size = self.get_vcpu_mmap_size()
        except OSError:
            self.kernel.close(fd)
            raise
        return Vm(self.kernel, fd, vcpu_mmap_size=size, dialect=dialect)

    def get_supported_cpuid(self, nent: int) -> KvmCpuid2:
        """KVM_GET_SUPPORTED_CPUID with room for `nent` entries; E2BIG when that is not enough."""
        cpuid = KvmCpuid2.allocate(nent)
        self.ioctl(KvmRequest.KVM_GET_SUPPORTED_CPUID, cpuid)
        return cpuid

    def get_emulated_cpuid(self, nent: int) -> KvmCpuid2:
        """KVM_GET_EMULATED_CPUID with room for `nent` entries; E2BIG when that is not enough."""
        cpuid = KvmCpuid2.allocate(nent)
        self.ioctl(KvmRequest.KVM_GET_EMULATED_CPUID, cpuid)
        return cpuid

    def get_supported_hv_cpuid(self, nent: int) -> KvmCpuid2:
        """KVM_GET_SUPPORTED_HV_CPUID with room for `nent` entries; E2BIG when that is not enough."""
        cpuid = KvmCpuid2.allocate(nent)
        self.ioctl(KvmRequest.KVM_GET_SUPPORTED_HV_CPUID, cpuid)
        return cpuid

    def get_msr_index_list(self, msrs: KvmMsrList) -> None:
        """KVM_GET_MSR_INDEX_LIST; E2BIG sets the count to what is needed."""
        self.ioctl(KvmRequest.KVM_GET_MSR_INDEX_LIST, msrs)

    def get_msr_feature_index_list(self, msrs: KvmMsrList) -> None:
        """KVM_GET_MSR_FEATURE_INDEX_LIST; E2BIG sets the count to what is needed."""
        self.ioctl(KvmRequest.KVM_GET_MSR_FEATURE_INDEX_LIST, msrs)

    def get_msrs(self, msrs: KvmMsrs) -> int:
        """KVM_GET_MSRS of feature MSRs: return how many were read; it stops at the first unknown one."""
        return self.ioctl(KvmRequest.KVM_GET_MSRS, msrs)
