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
from uapi_ctypes.kvm_state import KvmMsrEntry, KvmMsrList, KvmMsrs

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


def test_a_vm_offers_nothing_else_once_it_has_a_vcpu(kvm: Kvm) -> None:
    """Over every number in use, and some that are not yet."""
    with kvm.create_vm() as vm:
        before = [vm.check_extension(cap) for cap in range(256)]
        vm.create_vcpu(0)

        assert [vm.check_extension(cap) for cap in range(256)] == before


def test_no_capability_is_negative(kvm: Kvm) -> None:
    assert min(kvm.check_extension(cap) for cap in range(256)) >= 0


@pytest.mark.parametrize("vm_type", [8, 30, 63, 1 << 16, 0x7FFF_FFFF])
def test_refuses_a_vm_type_that_nobody_has(kvm: Kvm, vm_type: int) -> None:
    with pytest.raises(KvmError) as error:
        kvm.create_vm(vm_type)
    assert error.value.errno == errno.EINVAL


@pytest.mark.parametrize("request_number", [0xAE99, 0xAEFE, 0x1234, 0], ids=hex)
def test_what_no_ioctl_is_fails_on_every_object(kvm: Kvm, request_number: int) -> None:
    with kvm.create_vm() as vm:
        vcpu = vm.create_vcpu(0)
        for handle, err in ((kvm, errno.EINVAL), (vm, errno.ENOTTY), (vcpu, errno.EINVAL)):
            with pytest.raises(KvmError) as error:
                handle.ioctl(request_number)
            assert error.value.errno == err


@pytest.mark.parametrize("name", ["KVM_GET_MSR_INDEX_LIST", "KVM_GET_MSR_FEATURE_INDEX_LIST"])
def test_an_msr_list_says_how_much_room_it_needs(kvm: Kvm, name: str) -> None:
    request = KvmRequest[name]
    short = KvmMsrList.allocate(0)
    with pytest.raises(KvmError) as error:
        kvm.ioctl(request, short)
    assert error.value.errno == errno.E2BIG
    needed = short.count

    exact = KvmMsrList.allocate(needed)
    kvm.ioctl(request, exact)

    assert len(set(exact.filled())) == needed > 0


@pytest.mark.parametrize(
    "name",
    [
        "KVM_GET_MSR_INDEX_LIST", "KVM_GET_MSR_FEATURE_INDEX_LIST", "KVM_GET_SUPPORTED_CPUID", "KVM_GET_EMULATED_CPUID",
        "KVM_GET_MSRS",
    ],
)  # fmt: skip
@pytest.mark.parametrize("pointer", [0, 1, 0xFFFF_8880_0000_0000], ids=["null", "bad", "kernel"])
def test_a_bad_pointer_is_efault(kvm: Kvm, name: str, pointer: int) -> None:
    with pytest.raises(KvmError) as error:
        kvm.ioctl(KvmRequest[name], pointer)
    assert error.value.errno == errno.EFAULT


def test_every_feature_msr_of_the_list_can_be_read(kvm: Kvm) -> None:
    msrs = KvmMsrList.allocate(256)
    kvm.get_msr_feature_index_list(msrs)

    for index in msrs.filled():
        assert kvm.get_msrs(KvmMsrs.of([KvmMsrEntry(index)])) == 1, hex(index)


@pytest.mark.parametrize("nent", [0, 1, 2, 8])
def test_emulated_cpuid_is_short(kvm: Kvm, nent: int) -> None:
    try:
        found = kvm.get_emulated_cpuid(nent)
    except KvmError as error:
        assert error.errno == errno.E2BIG  # noqa: PT017 (either is an answer)
    else:
        assert 0 < found.count <= nent


def test_descriptors_that_have_no_pages_cannot_be_mapped(kvm: Kvm) -> None:
    with kvm.create_vm() as vm:
        for handle in (kvm, vm):
            with pytest.raises(KvmError) as error:
                kvm.kernel.mmap(handle.fd, 4096)
            assert error.value.errno == errno.ENODEV


def test_space_can_be_reserved_in_no_kvm_descriptor(kvm: Kvm) -> None:
    with kvm.create_vm() as vm:
        for handle in (vm, vm.create_vcpu(0)):
            with pytest.raises(KvmError) as error:
                kvm.kernel.fallocate(handle.fd, 0, 0, 4096)
            assert error.value.errno == errno.ENODEV


@pytest.mark.parametrize("name", ["KVM_CREATE_VCPU", "KVM_RUN", "KVM_GET_REGS", "KVM_CREATE_IRQCHIP"])
def test_what_belongs_to_a_vm_or_vcpu_is_einval_on_the_device(kvm: Kvm, name: str) -> None:
    with pytest.raises(KvmError) as error:
        kvm.ioctl(KvmRequest[name])
    assert error.value.errno == errno.EINVAL


@pytest.mark.parametrize("cap", [0, 0x7FFF, KvmCap.KVM_CAP_USER_MEMORY, KvmCap.KVM_CAP_NR_VCPUS])
def test_enabling_what_cannot_be_enabled_is_einval(kvm: Kvm, cap: int) -> None:
    with kvm.create_vm() as vm:
        for handle in (vm, vm.create_vcpu(0)):
            with pytest.raises(KvmError) as error:
                handle.enable_cap(cap)
            assert error.value.errno == errno.EINVAL


@pytest.mark.parametrize("cap", [KvmCap.KVM_CAP_X2APIC_API, KvmCap.KVM_CAP_DISABLE_QUIRKS2], ids=lambda cap: cap.name)
def test_enabling_a_capability_with_unknown_bits_is_einval(kvm: Kvm, cap: KvmCap) -> None:
    with kvm.create_vm() as vm:
        for args, flags in (((1 << 63,), 0), ((0,), 1)):
            with pytest.raises(KvmError) as error:
                vm.enable_cap(cap, *args, flags=flags)
            assert error.value.errno == errno.EINVAL
