"""Real eventfds: a guest's write signals one, one raises an interrupt in a guest."""

import os

import pytest

from sim_backend.kernel import SimKernel
from tests.unit.kvm.small_vmm import SmallVm, errno_of, in_thread, wait_until
from uapi_ctypes.kvm import KvmIrqRoutingEntry
from uapi_ctypes.kvm_run import KvmExit

PIO, DATAMATCH, DEASSIGN = 2, 1, 4
RESAMPLE = 2
HALTED = 3
OUT_41_THEN_OUT_42 = b"\xb0\x41\xe6\x80\xb0\x42\xe6\x80\xf4"
MSI_ROUTE = 2


def test_a_matching_port_write_signals_and_does_not_exit(kernel: SimKernel) -> None:
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    with SmallVm(kernel, OUT_41_THEN_OUT_42) as small:
        small.vm.ioeventfd(fd, 0x80, 1, PIO | DATAMATCH, 0x41)
        assert small.vcpu.run() == KvmExit.KVM_EXIT_IO
        assert small.vcpu.io_data()[0] == 0x42
        assert os.eventfd_read(fd) == 1
        small.vm.ioeventfd(fd, 0x80, 1, PIO | DATAMATCH | DEASSIGN, 0x41)
        assert errno_of(lambda: small.vm.ioeventfd(fd, 0x80, 1, PIO | DATAMATCH | DEASSIGN, 0x41)) == "ENOENT"
    os.close(fd)


def test_two_eventfds_for_the_same_write_collide(kernel: SimKernel) -> None:
    first, second = os.eventfd(0), os.eventfd(0)
    with SmallVm(kernel) as small:
        small.vm.ioeventfd(first, 0x80, 1, PIO)
        assert errno_of(lambda: small.vm.ioeventfd(second, 0x80, 1, PIO | DATAMATCH, 5)) == "EEXIST"
        small.vm.ioeventfd(second, 0x80, 2, PIO)
    os.close(first)
    os.close(second)


def test_an_irqfd_delivers_its_route_to_a_halted_guest(kernel: SimKernel) -> None:
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    with SmallVm(kernel, b"\xfb\xf4\xe6\x80\xf4", split=True) as small:
        small.memory[4 * 0x61] = b"\x00\x12\x00\x00"
        small.memory[0x1200] = b"\xcf"
        state = small.vcpu.get_lapic()
        state.regs[0xF0:0xF2] = b"\xff\x01"
        small.vcpu.set_lapic(state)
        route = KvmIrqRoutingEntry(gsi=5, type=MSI_ROUTE)
        route.u[0], route.u[2] = 0xFEE0_0000, 0x61
        small.vm.set_gsi_routing([route])
        small.vm.irqfd(fd, 5)
        assert errno_of(lambda: small.vm.irqfd(fd, 5)) == "EBUSY"
        thread, result = in_thread(small.vcpu.run)
        wait_until(lambda: kernel.host.vms[-1].vcpus[0].mp_state == HALTED)
        os.eventfd_write(fd, 1)
        thread.join(2)
        assert result == [KvmExit.KVM_EXIT_IO]
        with pytest.raises(BlockingIOError):  # the irqfd has taken it
            os.eventfd_read(fd)
    os.close(fd)


def test_resampling_needs_a_full_irqchip(kernel: SimKernel) -> None:
    fd, resample = os.eventfd(0), os.eventfd(0)
    with SmallVm(kernel, split=True) as small:
        assert errno_of(lambda: small.vm.irqfd(fd, 5, RESAMPLE, resample)) == "EINVAL"
    os.close(fd)
    os.close(resample)


def test_closing_the_vm_shuts_its_irqfds_down(kernel: SimKernel) -> None:
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    small = SmallVm(kernel, split=True)
    small.vm.irqfd(fd, 5)
    small.vm.close_fd()
    os.eventfd_write(fd, 3)
    assert os.eventfd_read(fd) == 3
    small.close()
    os.close(fd)
