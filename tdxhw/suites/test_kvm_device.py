"""/dev/kvm itself: version, capabilities, error paths."""

import errno
import os

import pytest

from uapi_ctypes.caps import KvmCap
from uapi_ctypes.device import Kvm
from uapi_ctypes.errors import KvmError
from uapi_ctypes.ioctl import KvmRequest
from uapi_ctypes.kernel import Kernel
from uapi_ctypes.kvm import KvmVmType

pytestmark = pytest.mark.requires("kvm")


def test_api_version_is_12(kvm: Kvm) -> None:
    assert kvm.get_api_version() == 12


def test_the_run_area_of_a_vcpu_is_three_pages(kvm: Kvm) -> None:
    """kvm_run, the PIO data page, the coalesced MMIO ring."""
    assert kvm.get_vcpu_mmap_size() == 3 * 4096


def test_an_unknown_capability_is_absent_and_no_error(kvm: Kvm) -> None:
    assert kvm.check_extension(0x7FFF_FFFF) == 0


@pytest.mark.parametrize(
    "cap",
    [KvmCap.KVM_CAP_USER_MEMORY, KvmCap.KVM_CAP_IMMEDIATE_EXIT, KvmCap.KVM_CAP_MP_STATE],
    ids=lambda cap: cap.name,
)
def test_offers_what_every_x86_kernel_offers(kvm: Kvm, cap: KvmCap) -> None:
    assert kvm.check_extension(cap) > 0


def test_the_default_vm_type_is_in_the_bitmap_of_vm_types(kvm: Kvm) -> None:
    types = kvm.check_extension(KvmCap.KVM_CAP_VM_TYPES)

    assert types & 1 << KvmVmType.KVM_X86_DEFAULT_VM, f"VM_TYPES is {types:#x}"


def test_more_vcpus_are_possible_than_recommended_never_fewer(kvm: Kvm) -> None:
    assert kvm.check_extension(KvmCap.KVM_CAP_MAX_VCPUS) >= kvm.check_extension(KvmCap.KVM_CAP_NR_VCPUS) > 0


def test_an_ioctl_on_a_closed_fd_is_ebadf(kernel: Kernel) -> None:
    fd = kernel.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    kernel.close(fd)

    with pytest.raises(KvmError) as error:
        kernel.ioctl(fd, KvmRequest.KVM_GET_API_VERSION, 0)
    assert error.value.errno == errno.EBADF


def test_get_api_version_with_an_argument_is_einval(kvm: Kvm) -> None:
    with pytest.raises(KvmError) as error:
        kvm.ioctl(KvmRequest.KVM_GET_API_VERSION, 1)
    assert error.value.errno == errno.EINVAL


def test_a_vm_type_beyond_the_bitmap_is_einval(kvm: Kvm) -> None:
    with pytest.raises(KvmError) as error:
        kvm.create_vm(31)
    assert error.value.errno == errno.EINVAL


def test_an_unknown_request_on_a_vm_is_enotty(kvm: Kvm) -> None:
    with kvm.create_vm() as vm, pytest.raises(KvmError) as error:
        vm.ioctl(0xAEFF)
    assert error.value.errno == errno.ENOTTY


def test_supported_cpuid_says_e2big_when_there_is_no_room(kvm: Kvm) -> None:
    with pytest.raises(KvmError) as error:
        kvm.get_supported_cpuid(1)
    assert error.value.errno == errno.E2BIG


def test_supported_cpuid_offers_x2apic(kvm: Kvm) -> None:
    leaf_1 = next(entry for entry in kvm.get_supported_cpuid(256).filled() if entry.function == 1)

    assert leaf_1.ecx & 1 << 21
