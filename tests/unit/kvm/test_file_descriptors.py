"""Descriptors: what is not ours, what lives how long, and what another process may do with it."""

import errno
import os
import struct

import pytest

from sim_backend.kernel import SimKernel
from tests.unit.kvm.small_vmm import MEMORY_BYTES, SmallVm, errno_of
from uapi_ctypes.device import Kvm
from uapi_ctypes.errors import KvmError
from uapi_ctypes.ioctl import KvmRequest
from uapi_ctypes.kvm_run import KvmExit

GET_API_VERSION = int(KvmRequest.KVM_GET_API_VERSION)
CHECK_EXTENSION = int(KvmRequest.KVM_CHECK_EXTENSION)


def test_an_ioctl_on_a_closed_descriptor_is_ebadf(kernel: SimKernel) -> None:
    fd = kernel.open("/dev/kvm")
    kernel.close(fd)
    assert errno_of(lambda: kernel.ioctl(fd, GET_API_VERSION)) == "EBADF"
    assert errno_of(lambda: kernel.close(fd)) == "EBADF"


def test_an_ioctl_on_a_foreign_file_is_enotty(kernel: SimKernel) -> None:
    fd = os.open(os.devnull, os.O_RDWR)
    assert errno_of(lambda: kernel.ioctl(fd, GET_API_VERSION)) == "ENOTTY"
    kernel.close(fd)


@pytest.mark.parametrize("fd", [-1, 996, 1 << 31, 1 << 40])
def test_a_number_that_never_was_a_descriptor_is_ebadf(kernel: SimKernel, fd: int) -> None:
    assert errno_of(lambda: kernel.ioctl(fd, GET_API_VERSION)) == "EBADF"


def test_an_unknown_request_is_refused_as_each_kind_of_file_does(kernel: SimKernel) -> None:
    with SmallVm(kernel) as small:
        assert errno_of(lambda: kernel.ioctl(small.kvm.fd, 0xAEFF)) == "EINVAL"
        assert errno_of(lambda: kernel.ioctl(small.vm.fd, 0xAEFF)) == "ENOTTY"
        assert errno_of(lambda: kernel.ioctl(small.vcpu.fd, 0xAEFF)) == "EINVAL"


def test_close_on_exec_can_be_set_like_on_any_file(kernel: SimKernel) -> None:
    with Kvm(kernel) as kvm:
        os.set_inheritable(kvm.fd, True)
        assert kernel.ioctl(kvm.fd, 0x5451) == 0  # FIOCLEX
        assert not os.get_inheritable(kvm.fd)


def test_a_vm_lives_until_its_last_vcpu_is_closed(kernel: SimKernel) -> None:
    small = SmallVm(kernel)
    small.vm.close_fd()
    assert len(kernel.host.vms) == 1
    assert small.vcpu.run() == KvmExit.KVM_EXIT_HLT
    small.close()
    assert not kernel.host.vms


def test_a_mapped_vcpu_keeps_the_vm_although_every_descriptor_is_closed(kernel: SimKernel) -> None:
    kvm = kernel.open("/dev/kvm")
    vm = kernel.ioctl(kvm, int(KvmRequest.KVM_CREATE_VM), 0)
    vcpu = kernel.ioctl(vm, int(KvmRequest.KVM_CREATE_VCPU), 0)
    run = kernel.mmap(vcpu, 12288)
    for fd in (vcpu, vm, kvm):
        kernel.close(fd)
    assert len(kernel.host.vms) == 1
    run.close()
    assert not kernel.host.vms


def test_a_guest_memfd_keeps_the_vm_whether_it_is_bound_or_not(kernel: SimKernel) -> None:
    with Kvm(kernel) as kvm:
        vm = kvm.create_vm()
        gmem = vm.create_guest_memfd(MEMORY_BYTES)
        vm.close_fd()
        assert len(kernel.host.vms) == 1
        gmem.close()
        assert not kernel.host.vms


def test_statistics_name_the_vm_and_keep_it(kernel: SimKernel) -> None:
    with Kvm(kernel) as kvm:
        vm = kvm.create_vm()
        stats = vm.get_stats_fd()
        vm.close_fd()
        assert len(kernel.host.vms) == 1
        header = os.pread(stats.fd, 24, 0)
        name_size, _count, id_offset = (int.from_bytes(header[at : at + 4], "little") for at in (4, 8, 12))
        assert os.pread(stats.fd, name_size, id_offset).startswith(b"kvm-")
        stats.close()
        assert not kernel.host.vms


def read_stats(fd: int) -> dict[str, int]:
    """Read a binary statistics file as Documentation/virt/kvm/api.rst describes it."""
    _flags, name_size, count, _id, descriptors, data = struct.unpack("<6I", os.pread(fd, 24, 0))
    found = {}
    for index in range(count):
        raw = os.pread(fd, 16 + name_size, descriptors + index * (16 + name_size))
        _kind, _exponent, size, offset, _bucket = struct.unpack_from("<IhHII", raw)
        assert size == 1
        name = raw[16:].rstrip(b"\0").decode()
        (found[name],) = struct.unpack("<Q", os.pread(fd, 8, data + offset))
    return found


def test_the_statistics_of_a_vcpu_count_its_exits(kernel: SimKernel) -> None:
    with SmallVm(kernel, b"\xe6\x80\xe6\x80\xf4") as small:  # two OUTs and HLT
        assert small.vcpu.run() == KvmExit.KVM_EXIT_IO
        stats = small.vcpu.get_stats_fd()
        assert read_stats(stats.fd)["io_exits"] == 1
        small.vcpu.run()
        small.vcpu.run()
        counted = read_stats(stats.fd)
        assert (counted["io_exits"], counted["halt_exits"]) == (2, 1)
        assert counted["exits"] >= 3
        stats.close()


def test_a_forked_child_gets_eio_from_what_belongs_to_the_parents_memory(kernel: SimKernel) -> None:
    with SmallVm(kernel) as small:
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            answers = [
                errno_of(lambda: kernel.ioctl(small.vm.fd, CHECK_EXTENSION, 9)),
                errno_of(small.vcpu.get_regs),
                str(kernel.ioctl(small.kvm.fd, GET_API_VERSION)),
            ]
            os.write(writer, " ".join(str(answer) for answer in answers).encode())
            os._exit(0)
        os.close(writer)
        os.waitpid(child, 0)
        assert os.read(reader, 100) == b"EIO EIO 12"
        os.close(reader)
        assert small.vcpu.run() == KvmExit.KVM_EXIT_HLT


def test_another_process_with_the_same_descriptors_is_refused_likewise(kernel: SimKernel) -> None:
    with SmallVm(kernel) as small:
        with kernel.in_another_process():
            assert errno_of(lambda: kernel.ioctl(small.vm.fd, CHECK_EXTENSION, 9)) == "EIO"
        assert small.vm.check_extension(9) > 0


def test_a_dead_vm_answers_eio_to_everything_and_can_be_closed(kernel: SimKernel) -> None:
    with SmallVm(kernel) as small:
        kernel.host.vms[-1].bug()
        assert errno_of(lambda: small.vm.check_extension(9)) == "EIO"
        assert errno_of(small.vcpu.get_regs) == "EIO"
        assert errno_of(small.vcpu.run) == "EIO"


@pytest.mark.parametrize("pointer", [0, 1, 4095, 0xFFFF_8880_0000_0000, (1 << 64) - 8])
def test_a_bad_user_pointer_is_efault_and_nothing_worse(kernel: SimKernel, pointer: int) -> None:
    with SmallVm(kernel) as small:
        for fd, request in (
            (small.vm.fd, KvmRequest.KVM_SET_USER_MEMORY_REGION2),
            (small.vm.fd, KvmRequest.KVM_ENABLE_CAP),
            (small.vcpu.fd, KvmRequest.KVM_SET_REGS),
            (small.vcpu.fd, KvmRequest.KVM_GET_SREGS),
            (small.vcpu.fd, KvmRequest.KVM_SET_CPUID2),
        ):
            with pytest.raises(KvmError) as refused:
                kernel.ioctl(fd, int(request), pointer)
            assert refused.value.errno == errno.EFAULT
            assert refused.value.request == request.name
