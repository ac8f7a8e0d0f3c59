"""TDX sub-commands through the binding, with a kernel that writes down what it is asked."""

import ctypes
import errno
import os
from collections.abc import Callable
from typing import Any

import pytest

from uapi_ctypes.device import Kvm
from uapi_ctypes.dialect import MAINLINE, V17, Dialect, NoSuchCommandError
from uapi_ctypes.errors import KvmError
from uapi_ctypes.ioctl import KvmRequest
from uapi_ctypes.kernel import IoctlArg, Kernel
from uapi_ctypes.mapping import Mapping
from uapi_ctypes.tdx_mainline import KVM_TDX_MEASURE_MEMORY_REGION, KvmTdxCmd, KvmTdxInitMemRegion
from uapi_ctypes.tdx_v17 import KvmTdxCmdV17
from uapi_ctypes.vcpu import Vcpu
from uapi_ctypes.vm import Vm

FD_KVM, FD_VM, FD_VCPU = 1000, 1001, 1002


class RecordingKernel:
    """Answers the few calls that lead to a vCPU; records sub-commands; may fail them."""

    name = "recording"

    def __init__(self) -> None:
        self.commands: list[tuple[int, int, int, int]] = []
        self.closed: list[int] = []
        self.answer: Callable[[Any], None] = lambda _: None

    def open(self, path: str, flags: int = os.O_RDWR) -> int:
        return FD_KVM

    def ioctl(self, fd: int, request: int, arg: IoctlArg = 0) -> int:
        match request:
            case KvmRequest.KVM_CREATE_VM:
                return FD_VM
            case KvmRequest.KVM_CREATE_VCPU:
                return FD_VCPU
            case KvmRequest.KVM_GET_VCPU_MMAP_SIZE:
                return 12288
            case KvmRequest.KVM_MEMORY_ENCRYPT_OP:
                cmd: Any = arg
                self.commands.append((fd, cmd.id, cmd.flags, cmd.data))
                self.answer(cmd)
                return 0
        raise KvmError(hex(request), errno.ENOTTY)

    def fallocate(self, fd: int, mode: int, offset: int, length: int) -> None:
        raise KvmError("fallocate", errno.EBADF)

    def mmap(self, fd: int, length: int) -> Mapping:
        return Mapping(length)

    def close(self, fd: int) -> None:
        self.closed.append(fd)


def build(dialect: Dialect) -> tuple[RecordingKernel, Vm, Vcpu]:
    kernel = RecordingKernel()
    seam: Kernel = kernel
    vm = Kvm(seam).create_vm(dialect.tdx_vm_type, dialect=dialect)
    return kernel, vm, vm.create_vcpu(0)


@pytest.mark.parametrize(("dialect", "region_fd"), [(MAINLINE, FD_VCPU), (V17, FD_VM)], ids=str)
def test_each_command_goes_where_its_dialect_has_it(dialect: Dialect, region_fd: int) -> None:
    kernel, vm, vcpu = build(dialect)
    capabilities = vm.tdx_capabilities(7)
    init_vm = dialect.init_vm.allocate(0)
    region = KvmTdxInitMemRegion(0x10000, 0x20000, 3)

    vm.tdx_init_vm(init_vm)
    vcpu.tdx_init_vcpu(0x1234_5678_9ABC)
    vcpu.tdx_init_mem_region(region, KVM_TDX_MEASURE_MEMORY_REGION)
    vm.tdx_finalize_vm()

    assert type(capabilities) is dialect.capabilities
    assert capabilities.count == 7
    assert kernel.commands == [
        (FD_VM, 0, 0, ctypes.addressof(capabilities)),
        (FD_VM, 1, 0, ctypes.addressof(init_vm)),
        (FD_VCPU, 2, 0, 0x1234_5678_9ABC),
        (region_fd, 3, 1, ctypes.addressof(region)),
        (FD_VM, 4, 0, 0),
    ]


def test_command_five_exists_in_one_form_per_dialect() -> None:
    kernel, vm, vcpu = build(MAINLINE)
    assert vcpu.tdx_get_cpuid(9).capacity == 9
    with pytest.raises(NoSuchCommandError, match="mainline has no KVM_TDX_RELEASE_VM"):
        vm.tdx_release_vm()
    assert [command[:2] for command in kernel.commands] == [(FD_VCPU, 5)]

    kernel, vm, vcpu = build(V17)
    vm.tdx_release_vm()
    with pytest.raises(NoSuchCommandError, match="v17 has no KVM_TDX_GET_CPUID"):
        vcpu.tdx_get_cpuid(9)
    assert [command[:2] for command in kernel.commands] == [(FD_VM, 5)]


@pytest.mark.parametrize("dialect", [MAINLINE, V17], ids=str)
def test_a_failure_names_the_command_and_what_the_module_said(dialect: Dialect) -> None:
    kernel, vm, _ = build(dialect)

    def fail(cmd: Any) -> None:
        cmd.hw_error = 0xC000010000000045
        raise KvmError("KVM_MEMORY_ENCRYPT_OP", errno.EINVAL)

    kernel.answer = fail
    with pytest.raises(KvmError) as error:
        vm.tdx_init_vm(dialect.init_vm.allocate(0))
    assert str(error.value) == "KVM_TDX_INIT_VM: EINVAL; TDX module: OPERAND_INVALID(CPUID_CONFIG)"
    assert error.value.hw_error == 0xC000010000000045


@pytest.mark.parametrize("cmd", [KvmTdxCmd(4, hw_error=1), KvmTdxCmdV17(4, hw_error=1)], ids=["mainline", "v17"])
def test_what_the_caller_put_in_hw_error_is_not_taken_for_the_modules_word(cmd: Any) -> None:
    kernel, vm, _ = build(MAINLINE if isinstance(cmd, KvmTdxCmd) else V17)

    def fail(_: Any) -> None:
        raise KvmError("KVM_MEMORY_ENCRYPT_OP", errno.EINVAL)

    kernel.answer = fail
    with pytest.raises(KvmError, match=r"^KVM_TDX_FINALIZE_VM: EINVAL$"):
        vm.memory_encrypt_op(cmd)


def test_any_command_can_be_sent_to_the_wrong_descriptor() -> None:
    kernel, vm, vcpu = build(MAINLINE)
    vm.tdx_command(MAINLINE.init_vcpu, 5, flags=3)
    vcpu.tdx_command(MAINLINE.finalize_vm)
    assert kernel.commands == [(FD_VM, 2, 3, 5), (FD_VCPU, 4, 0, 0)]


def test_closing_the_vm_closes_newest_first_and_once() -> None:
    kernel, vm, vcpu = build(MAINLINE)
    with vm, vcpu:
        pass
    vm.close()
    assert kernel.closed == [FD_VCPU, FD_VM]


def test_a_vcpu_whose_run_area_cannot_be_mapped_leaks_no_descriptor() -> None:
    kernel, vm, _ = build(MAINLINE)

    def refuse(fd: int, length: int) -> Mapping:
        raise KvmError("mmap", errno.ENOMEM)

    kernel.mmap = refuse  # type: ignore[method-assign]
    with pytest.raises(KvmError, match="mmap: ENOMEM"):
        vm.create_vcpu(1)
    assert kernel.closed == [FD_VCPU]
