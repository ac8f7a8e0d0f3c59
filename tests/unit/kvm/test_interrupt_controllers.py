"""The IOAPIC, the 8259 pair, the local APIC and irqfds in interleaved order, as a real host (Linux 6.18) has them."""

import os
import select

import pytest

from sim_backend.kernel import SimKernel
from tests.unit.kvm.interrupting_vmm import (
    CPUID,
    DONE,
    HANDLED,
    STI,
    InterruptingVm,
    apic_write,
    ioapic_write,
    outb,
)
from tests.unit.kvm.small_vmm import wait_until

LEVEL, MASKED, REMOTE_IRR = 1 << 15, 1 << 16, 1 << 14
EOI = 0xB0
RESAMPLE, DEASSIGN = 2, 1
PIN = 20
IRR_61, ISR_61 = 0x230, 0x130  # vectors 0x60 to 0x7F
BIT_61 = 1 << 1


def test_an_edge_that_was_delivered_is_no_new_one_while_the_line_stays_high(kernel: SimKernel) -> None:
    with InterruptingVm(kernel) as vm:
        vm.port_after(ioapic_write(PIN, 0x61))
        assert vm.vm.irq_line_status(PIN, 1) == 1
        assert vm.port_after(STI + CPUID) == HANDLED
        assert vm.vm.irq_line_status(PIN, 1) == 0
        assert not vm.apic(IRR_61) & BIT_61
        vm.vm.irq_line_status(PIN, 0)
        assert vm.vm.irq_line_status(PIN, 1) == 1
        assert vm.apic(IRR_61) & BIT_61


def test_a_level_that_waits_for_its_eoi_is_refused_and_comes_again_at_the_eoi(kernel: SimKernel) -> None:
    with InterruptingVm(kernel) as vm:
        vm.port_after(ioapic_write(PIN, 0x61 | LEVEL))
        assert vm.vm.irq_line_status(PIN, 1) == 1
        assert vm.vm.irq_line_status(PIN, 1) == -1
        assert vm.entry(PIN) & REMOTE_IRR
        assert vm.port_after(STI + CPUID) == HANDLED
        assert not vm.apic(IRR_61) & BIT_61
        assert vm.port_after(apic_write(EOI, 0)) == DONE
        assert vm.apic(IRR_61) & BIT_61


def test_unmasking_a_level_in_service_does_not_deliver_it_twice(kernel: SimKernel) -> None:
    with InterruptingVm(kernel) as vm:
        vm.port_after(ioapic_write(PIN, 0x61 | LEVEL))
        vm.vm.irq_line(PIN, 1)
        assert vm.port_after(STI + CPUID) == HANDLED
        vm.port_after(ioapic_write(PIN, 0x61 | LEVEL | MASKED) + ioapic_write(PIN, 0x61 | LEVEL))
        assert not vm.apic(IRR_61) & BIT_61


def test_a_tick_of_the_rtc_that_the_guest_has_not_ended_is_coalesced_for_who_asks(kernel: SimKernel) -> None:
    with InterruptingVm(kernel) as vm:
        vm.port_after(outb(0x21, 0xFF) + outb(0xA1, 0xFF) + ioapic_write(8, 0x61))
        assert vm.vm.irq_line_status(8, 1) == 1
        vm.vm.irq_line(8, 0)
        assert vm.vm.irq_line_status(8, 1) == 0
        assert vm.port_after(STI + CPUID) == HANDLED
        assert vm.port_after(apic_write(EOI, 0)) == DONE
        vm.vm.irq_line(8, 0)
        assert vm.vm.irq_line_status(8, 1) == 1


def test_icw1_forgets_edges_and_keeps_what_is_in_service(kernel: SimKernel) -> None:
    with InterruptingVm(kernel) as vm:
        vm.set_apic({0x350: 0x700})
        vm.port_after(outb(0x20, 0x11) + outb(0x21, 0x40) + outb(0x21, 4) + outb(0x21, 1))
        vm.vm.irq_line(5, 1)
        assert vm.port_after(STI + CPUID) == HANDLED
        vm.vm.irq_line(4, 1)
        assert vm.master() == (1 << 4 | 1 << 5, 1 << 4, 1 << 5, 0)
        vm.port_after(outb(0x20, 0x11))
        assert vm.master() == (0, 0, 1 << 5, 1)
        assert vm.port_after(outb(0x21, 0x40) + outb(0x21, 4) + outb(0x21, 1)) == DONE


def test_the_split_irqchip_serves_the_xapic_page(kernel: SimKernel) -> None:
    with InterruptingVm(kernel, split=True) as vm:
        assert vm.port_after(apic_write(0x80, 0x30)) == DONE
        assert vm.apic(0x80) == 0x30


def test_a_resampled_line_goes_down_at_the_eoi_and_user_space_hears_of_it(kernel: SimKernel) -> None:
    fd, resample = os.eventfd(0, os.EFD_NONBLOCK), os.eventfd(0, os.EFD_NONBLOCK)
    with InterruptingVm(kernel) as vm:
        vm.port_after(ioapic_write(PIN, 0x61 | LEVEL))
        vm.vm.irqfd(fd, PIN, RESAMPLE, resample)
        for _ in range(2):
            os.eventfd_write(fd, 1)
            wait_until(lambda: bool(vm.apic(IRR_61) & BIT_61))
            assert not select.select([resample], [], [], 0)[0]
            assert vm.port_after(STI + CPUID) == HANDLED
            assert vm.port_after(apic_write(EOI, 0)) == DONE
            assert os.eventfd_read(resample) == 1
            assert not vm.entry(PIN) & REMOTE_IRR
            assert not vm.apic(IRR_61) & BIT_61, "the line went down: nothing to deliver again"
    os.close(fd)
    os.close(resample)


def test_deassigning_the_last_resampling_irqfd_lowers_its_line(kernel: SimKernel) -> None:
    fd, resample = os.eventfd(0, os.EFD_NONBLOCK), os.eventfd(0, os.EFD_NONBLOCK)
    with InterruptingVm(kernel) as vm:
        vm.port_after(ioapic_write(PIN, 0x61 | LEVEL | MASKED))
        vm.vm.irqfd(fd, PIN, RESAMPLE, resample)
        os.eventfd_write(fd, 1)
        wait_until(lambda: vm.is_high(PIN))
        vm.vm.irqfd(fd, PIN, DEASSIGN)
        assert not vm.is_high(PIN)
    os.close(fd)
    os.close(resample)


@pytest.mark.parametrize("high_before", [0, 1])
def test_an_irqfd_is_a_pulse_of_user_spaces_own_line(kernel: SimKernel, high_before: int) -> None:
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    with InterruptingVm(kernel) as vm:
        vm.port_after(ioapic_write(PIN, 0x61 | MASKED | LEVEL))
        vm.vm.irq_line(PIN, high_before)
        vm.vm.irqfd(fd, PIN)
        os.eventfd_write(fd, 1)
        wait_until(lambda: not select.select([fd], [], [], 0)[0])
        vm.vm.irqfd(fd, PIN, DEASSIGN)  # waits for one that is firing
        assert not vm.is_high(PIN)
    os.close(fd)
