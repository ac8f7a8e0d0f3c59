"""KVM_MEMORY_ENCRYPT_OP on a TD: the prologue of both fds, its order, and what is written back."""

import ctypes
import errno

import pytest

from tests.unit.kvm.tdx.vmm import TestTd
from uapi_ctypes.device import Kvm
from uapi_ctypes.errors import KvmError
from uapi_ctypes.handle import Handle
from uapi_ctypes.tdx_mainline import KvmTdxCapabilities, KvmTdxCmd

BAD_POINTER = 0x10
CAPABILITIES, INIT_VM, INIT_VCPU, INIT_MEM_REGION, FINALIZE_VM, GET_CPUID = range(6)
MEMORY_ENCRYPT_OP = 0xC008AEBA


def issue(target: Handle, cmd: "KvmTdxCmd | int") -> int:
    """Return the errno of the command, 0 for success."""
    try:
        target.ioctl(MEMORY_ENCRYPT_OP, cmd)
    except KvmError as error:
        return error.errno or 0
    return 0


def test_an_ordinary_vm_does_not_know_the_ioctl(td: TestTd) -> None:
    kvm = Kvm(td.machine.kernel())
    with kvm.create_vm(0) as vm, kvm:
        assert issue(vm, KvmTdxCmd(CAPABILITIES)) == errno.ENOTTY
        with vm.create_vcpu(0) as vcpu:
            assert issue(vcpu, KvmTdxCmd(INIT_VCPU)) == errno.EINVAL


def test_an_ordinary_vm_does_not_even_read_the_command(td: TestTd) -> None:
    with Kvm(td.machine.kernel()) as kvm, kvm.create_vm(0) as vm:
        assert issue(vm, BAD_POINTER) == errno.ENOTTY


def test_an_unknown_ioctl_is_enotty_on_the_vm_and_einval_on_a_vcpu(td: TestTd) -> None:
    td.enable_caps().init_vm()
    vcpu = td.create_vcpu(init=False)
    for target, expected in ((td.vm, errno.ENOTTY), (vcpu, errno.EINVAL)):
        with pytest.raises(KvmError) as raised:
            target.ioctl(0xAEFF)
        assert raised.value.errno == expected


def test_an_unreadable_command_is_efault_on_the_vm(td: TestTd) -> None:
    assert issue(td.vm, BAD_POINTER) == errno.EFAULT


@pytest.mark.parametrize("number", [CAPABILITIES, INIT_VM, INIT_VCPU, 77])
def test_a_stale_hw_error_is_einval_before_the_id_is_looked_at(td: TestTd, number: int) -> None:
    assert issue(td.vm, KvmTdxCmd(number, 0, BAD_POINTER, 1)) == errno.EINVAL


@pytest.mark.parametrize("number", [INIT_VCPU, INIT_MEM_REGION, GET_CPUID, 6, 0xFFFFFFFF])
def test_vcpu_commands_and_unknown_ids_are_einval_on_the_vm_fd(td: TestTd, number: int) -> None:
    assert issue(td.vm, KvmTdxCmd(number)) == errno.EINVAL


@pytest.mark.parametrize("number", [INIT_VCPU, INIT_MEM_REGION, GET_CPUID, 6])
def test_what_the_vm_fd_does_not_know_is_not_written_back(td: TestTd, number: int) -> None:
    assert issue(td.vm, td.read_only_copy(KvmTdxCmd(number))) == errno.EINVAL


def test_a_naive_retry_after_a_module_failure_trips_over_hw_error(td: TestTd) -> None:
    td.enable_caps()
    td.vm.set_tsc_khz(50_000)  # the module wants at least 100 MHz
    init = td.init_vm_argument()
    cmd = KvmTdxCmd(INIT_VM, 0, ctypes.addressof(init))
    assert issue(td.vm, cmd) == errno.EINVAL
    assert cmd.hw_error >> 32 == 0xC0000100
    td.vm.set_tsc_khz(1_000_000)
    assert issue(td.vm, cmd) == errno.EINVAL, "hw_error was not cleared"
    cmd.hw_error = 0
    assert issue(td.vm, cmd) == 0


def test_a_kvm_side_failure_leaves_hw_error_zero(td: TestTd) -> None:
    cmd = KvmTdxCmd(INIT_VM, 1)
    assert issue(td.vm, cmd) == errno.EINVAL
    assert cmd.hw_error == 0


@pytest.mark.parametrize("machine", ["7.3", "6.16"], indirect=True)
def test_only_6_16_writes_the_capabilities_command_back(td: TestTd) -> None:
    capabilities = KvmTdxCapabilities.allocate(64)
    page = td.read_only_copy(KvmTdxCmd(CAPABILITIES, 0, ctypes.addressof(capabilities)))
    expected = errno.EFAULT if td.machine.profile.name == "6.16" else 0
    assert issue(td.vm, page) == expected


def test_a_faulting_write_back_is_efault_although_the_td_was_initialised(td: TestTd) -> None:
    td.enable_caps()
    init = td.init_vm_argument()
    assert issue(td.vm, td.read_only_copy(KvmTdxCmd(INIT_VM, 0, ctypes.addressof(init)))) == errno.EFAULT
    assert issue(td.vm, KvmTdxCmd(INIT_VM, 0, ctypes.addressof(init))) == errno.EINVAL
    td.create_vcpu(init=False)


def test_a_faulting_write_back_is_efault_although_the_td_was_finalised(td: TestTd) -> None:
    td.enable_caps().init_vm()
    td.create_vcpu()
    assert issue(td.vm, td.read_only_copy(KvmTdxCmd(FINALIZE_VM))) == errno.EFAULT
    assert issue(td.vm, KvmTdxCmd(FINALIZE_VM)) == errno.EINVAL
    with pytest.raises(KvmError) as raised:
        td.create_vcpu(1, init=False)
    assert raised.value.errno == errno.EIO, "the TD is runnable"


class TestVcpuFd:
    @pytest.fixture
    def td(self, td: TestTd) -> TestTd:
        td.enable_caps().init_vm()
        td.create_vcpu(init=False)
        return td

    def test_an_unreadable_command_is_efault(self, td: TestTd) -> None:
        assert issue(td.vcpu, BAD_POINTER) == errno.EFAULT

    def test_a_stale_hw_error_is_einval(self, td: TestTd) -> None:
        assert issue(td.vcpu, KvmTdxCmd(INIT_VCPU, 0, 0, 5)) == errno.EINVAL

    @pytest.mark.parametrize("number", [CAPABILITIES, INIT_VM, FINALIZE_VM, 6])
    def test_vm_commands_and_unknown_ids_are_einval(self, td: TestTd, number: int) -> None:
        assert issue(td.vcpu, KvmTdxCmd(number)) == errno.EINVAL

    def test_the_command_is_never_written_back(self, td: TestTd) -> None:
        td.set_cpuid(td.vcpu)
        assert issue(td.vcpu, td.read_only_copy(KvmTdxCmd(INIT_VCPU))) == 0

    @pytest.mark.parametrize("machine", ["7.3", "6.16"], indirect=True)
    def test_after_finalize_6_16_looks_at_the_state_before_the_pointer(self, td: TestTd) -> None:
        td.set_cpuid(td.vcpu)
        td.vcpu.tdx_init_vcpu()
        td.finalize()
        expected = errno.EINVAL if td.machine.profile.name == "6.16" else errno.EFAULT
        assert issue(td.vcpu, BAD_POINTER) == expected

    @pytest.mark.parametrize("number", range(6))
    def test_after_finalize_every_vcpu_command_is_einval(self, td: TestTd, number: int) -> None:
        td.set_cpuid(td.vcpu)
        td.vcpu.tdx_init_vcpu()
        td.finalize()
        assert issue(td.vcpu, KvmTdxCmd(number)) == errno.EINVAL
