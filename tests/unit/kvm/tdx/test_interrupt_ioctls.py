"""The ioctls that interrupt a TD: who takes a message, what is refused, what is lost."""

import errno
import os
import signal
from collections.abc import Iterator

import pytest

from tests.unit.kvm.tdx.guest_code import EVENT_COUNT, R10, RBX, Program
from tests.unit.kvm.tdx.vmm import TestTd, error_of
from uapi_ctypes.kvm import KvmIrqchip, KvmIrqRoutingEntry, KvmMsi
from uapi_ctypes.kvm_run import KvmExit
from uapi_ctypes.kvm_state import KvmMsrEntry, KvmMsrs
from uapi_ctypes.vcpu import Vcpu

MSI = 0xFEE0_0000
BROADCAST = 0xFFFF_FF00 << 32 | MSI | 0xFF << 12  # APIC 0xFFFFFFFF
LOGICAL = 1 << 2
FIXED, LOWEST, SMI, NMI, INIT, SIPI, EXTINT = 0, 1 << 8, 2 << 8, 4 << 8, 5 << 8, 6 << 8, 7 << 8
SIGNAL_MSI = 0x4020AEA5
HLT, WRMSR, SPIV = 12, 32, 0x80F
RUNNABLE, UNINITIALIZED, HALTED = 0, 1, 3
IRQCHIP_ROUTE, MSI_ROUTE = 1, 2
RESAMPLE, DEASSIGN = 2, 1


def enable_apic(vcpu: Vcpu) -> None:
    """Do from outside what the guest does by a TDVMCALL."""
    assert vcpu.set_msrs(KvmMsrs.of([KvmMsrEntry(SPIV, 0, 0x1FF)])) == 1


def run_into_a_signal(vcpu: Vcpu, seconds: float = 0.05) -> None:
    previous = signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        assert error_of(vcpu.run) == errno.EINTR
        assert vcpu.exit_reason == KvmExit.KVM_EXIT_INTR
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


@pytest.fixture
def two(td: TestTd) -> TestTd:
    """Return a TD with two vCPUs, of which the first has its local APIC enabled."""
    td.enable_caps().init_vm().add_memory()
    for vcpu_id in (0, 1):
        td.create_vcpu(vcpu_id)
    enable_apic(td.vcpus[0])
    td.add_image(Program().out(0x40, 1).load(RBX, EVENT_COUNT).report(RBX).done()).finalize()
    return td


def posted(td: TestTd, vcpu: int) -> list[int]:
    """Return the vectors in the posted-interrupt requests of a vCPU."""
    base = td.ops.vm.vcpus[vcpu].vendor.pi_descriptor >> 3
    words = [td.machine.memory.q[base + word] for word in range(4)]
    return [vector for vector in range(256) if words[vector >> 6] >> (vector & 63) & 1]


class TestSignalMsi:
    @pytest.mark.parametrize(
        ("destination", "data", "taken"),
        [
            (0, FIXED | 0x41, 1),
            (1, FIXED | 0x41, 0),
            (7, FIXED | 0x41, 0),
            (0, LOWEST | 0x41, 1),
            (1, LOWEST | 0x41, 0),
            (0, SMI, 0),
            (0, EXTINT | 0x41, 0),
            (1, NMI, 1),
            (1, INIT, 1),
            (1, SIPI, 1),
        ],
    )
    def test_the_result_is_how_many_took_it(self, two: TestTd, destination: int, data: int, taken: int) -> None:
        assert two.vm.signal_msi(MSI | destination << 12, data) == taken

    def test_a_broadcast_reaches_everybody_whose_apic_is_enabled(self, two: TestTd) -> None:
        assert two.vm.signal_msi(BROADCAST, 0x41) == 1
        enable_apic(two.vcpus[1])
        assert two.vm.signal_msi(BROADCAST, 0x41) == 2
        assert (posted(two, 0), posted(two, 1)) == ([0x41], [0x41])

    def test_a_broadcast_without_vcpus_is_eperm(self, td: TestTd) -> None:
        td.enable_caps()
        assert error_of(lambda: td.vm.signal_msi(BROADCAST, 0x41)) == errno.EPERM

    @pytest.mark.parametrize(("mask", "taken"), [(1, [0]), (2, [1]), (3, [0, 1])])
    def test_a_logical_destination_is_a_set(self, two: TestTd, mask: int, taken: list[int]) -> None:
        enable_apic(two.vcpus[1])
        assert two.vm.signal_msi(MSI | mask << 12 | LOGICAL, 0x41) == len(taken)
        assert [number for number in (0, 1) if posted(two, number)] == taken

    def test_lowest_priority_goes_to_one_that_the_vector_chooses_be_its_apic_enabled_or_not(self, two: TestTd) -> None:
        both = MSI | 3 << 12 | LOGICAL
        assert [two.vm.signal_msi(both, LOWEST | vector) for vector in (0x40, 0x41)] == [1, 0]
        enable_apic(two.vcpus[1])
        assert [two.vm.signal_msi(both, LOWEST | vector) for vector in (0x42, 0x43)] == [1, 1]
        assert (posted(two, 0), posted(two, 1)) == ([0x40, 0x42], [0x43])

    def test_flags_other_than_devid_are_einval(self, two: TestTd) -> None:
        for flags in (2, 3, 1 << 31):
            message = KvmMsi(MSI, 0, 0x41, flags)
            assert error_of(lambda message=message: two.vm.ioctl(SIGNAL_MSI, message)) == errno.EINVAL  # type: ignore[misc]
        assert two.vm.ioctl(SIGNAL_MSI, KvmMsi(MSI, 0, 0x41, 1, 99)) == 1

    def test_with_32_bit_ids_the_low_byte_of_the_upper_half_must_be_zero(self, two: TestTd) -> None:
        for low_byte in (1, 0x80):
            message = KvmMsi(MSI, low_byte, 0x41)
            assert error_of(lambda message=message: two.vm.ioctl(SIGNAL_MSI, message)) == errno.EINVAL  # type: ignore[misc]
        assert two.vm.ioctl(SIGNAL_MSI, KvmMsi(MSI, 0x100, 0x41)) == 0, "APIC 0x100 does not exist"

    def test_init_stays_pending_for_ever_and_sipi_is_cleared(self, two: TestTd) -> None:
        for data in (INIT, SIPI | 0x10):
            assert two.vm.signal_msi(MSI, data) == 1
        assert two.run() == KvmExit.KVM_EXIT_IO
        assert two.run_to_end() == [0]
        assert two.vcpu.get_mp_state() == RUNNABLE
        assert two.vcpu.get_vcpu_events().smi.latched_init == 1
        apic = two.ops.vm.vcpus[0].apic
        assert apic is not None
        assert not apic.sipi_pending

    def test_an_nmi_reaches_the_guest(self, two: TestTd) -> None:
        assert two.run() == KvmExit.KVM_EXIT_IO
        assert two.vm.signal_msi(MSI, NMI) == 1
        assert two.run_to_end() == [1]


class TestNmi:
    def test_events_can_make_one_pending(self, two: TestTd) -> None:
        assert two.run() == KvmExit.KVM_EXIT_IO
        events = two.vcpu.get_vcpu_events()
        events.flags, events.nmi.pending = 1, 1
        two.vcpu.set_vcpu_events(events)
        assert two.run_to_end() == [1]


class TestInterrupt:
    """KVM_INTERRUPT, which no TD ever gets to see."""

    def test_the_boot_processor_takes_it_at_the_next_run_and_loses_it(self, two: TestTd) -> None:
        two.vcpu.interrupt(0x41)
        assert error_of(lambda: two.vcpu.interrupt(0x42)) == errno.EEXIST
        assert two.run() == KvmExit.KVM_EXIT_IO
        two.vcpu.interrupt(0x42)
        assert two.run_to_end() == [0], "no handler ran"

    def test_elsewhere_it_stays_for_ever(self, two: TestTd) -> None:
        other = two.vcpus[1]
        other.interrupt(0x41)
        assert two.run(other) == KvmExit.KVM_EXIT_IO
        assert error_of(lambda: other.interrupt(0x42)) == errno.EEXIST

    def test_who_the_boot_processor_is_decides(self, td: TestTd) -> None:
        td.vm.set_boot_cpu_id(1)
        td.build(Program().out(0x40, 1).done(), n_vcpus=2)
        for vcpu, expected in zip(td.vcpus, (errno.EEXIST, 0), strict=True):
            vcpu.interrupt(0x41)
            assert td.run(vcpu) == KvmExit.KVM_EXIT_IO
            assert error_of(lambda vcpu=vcpu: vcpu.interrupt(0x42)) == expected  # type: ignore[misc]

    @pytest.mark.parametrize(
        ("machine", "blocked", "wakes"),
        [("7.3", 0, True), ("7.3", 1, False), ("v17", 0, True), ("v17", 1, True)],
        indirect=["machine"],
    )
    def test_it_wakes_a_halted_boot_processor_that_takes_interrupts(
        self, td: TestTd, blocked: int, wakes: bool
    ) -> None:
        """v17 thinks of its HLT's flag only where no interrupt is pending at all."""
        td.build(Program().out(0x40, 1).vmcall(HLT, blocked).report(R10).done())
        td.run()
        run_into_a_signal(td.vcpu)
        assert td.vcpu.get_mp_state() == HALTED
        td.vcpu.interrupt(0x41)
        if wakes:
            assert td.run_to_end() == [0]
        else:
            run_into_a_signal(td.vcpu)

    def test_256_is_einval(self, two: TestTd) -> None:
        assert error_of(lambda: two.vcpu.interrupt(256)) == errno.EINVAL
        assert error_of(lambda: two.vcpu.interrupt(255)) == 0


@pytest.fixture
def event() -> Iterator[int]:
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    yield fd
    os.close(fd)


def msi_route(gsi: int, vector: int, destination: int = 0) -> KvmIrqRoutingEntry:
    route = KvmIrqRoutingEntry(gsi=gsi, type=MSI_ROUTE)
    route.u[0], route.u[2] = MSI | destination << 12, vector
    return route


class TestRoutes:
    def test_without_an_irqchip_nothing_is_accepted(self, td: TestTd, event: int) -> None:
        assert error_of(lambda: td.vm.set_gsi_routing([msi_route(1, 0x41)])) == errno.EINVAL
        assert error_of(lambda: td.vm.irqfd(event, 1)) == errno.EINVAL
        assert error_of(lambda: td.vm.irq_line(1, 1)) == errno.ENXIO
        assert error_of(lambda: td.vm.irq_line_status(1, 1)) == errno.ENXIO

    def test_a_split_irqchip_has_no_pins(self, two: TestTd) -> None:
        route = KvmIrqRoutingEntry(gsi=1, type=IRQCHIP_ROUTE)
        route.u[0], route.u[1] = 2, 1
        assert error_of(lambda: two.vm.set_gsi_routing([route])) == errno.EINVAL

    def test_flags_and_too_many_are_einval(self, two: TestTd) -> None:
        route = msi_route(1, 0x41)
        route.flags = 2
        assert error_of(lambda: two.vm.set_gsi_routing([route])) == errno.EINVAL
        too_many = [msi_route(gsi % 4096, 0x41) for gsi in range(4097)]
        assert error_of(lambda: two.vm.set_gsi_routing(too_many)) == errno.EINVAL
        assert error_of(lambda: two.vm.set_gsi_routing(too_many[:4096])) == 0

    def test_resampling_needs_a_full_irqchip(self, two: TestTd, event: int) -> None:
        assert error_of(lambda: two.vm.irqfd(event, 1, RESAMPLE, event)) == errno.EINVAL

    @pytest.mark.parametrize(("destination", "delivered"), [(0, 1), (1, 0)])
    def test_irq_line_fires_its_route_and_status_says_who_took_it(
        self, two: TestTd, destination: int, delivered: int
    ) -> None:
        two.vm.set_gsi_routing([msi_route(5, 0x61, destination)])
        assert two.vm.irq_line_status(5, 1) == delivered
        assert posted(two, 0) == [0x61] * delivered
        assert two.vm.irq_line_status(6, 1) == -1, "there is no such route"
        two.vm.irq_line(5, 1)

    def test_an_eventfd_is_bound_once_and_let_go(self, two: TestTd, event: int) -> None:
        two.vm.irqfd(event, 5)
        assert error_of(lambda: two.vm.irqfd(event, 6)) == errno.EBUSY
        two.vm.irqfd(event, 5, DEASSIGN)
        two.vm.irqfd(event, 6)

    @pytest.mark.parametrize("chip", [0, 1, 2, 3])
    def test_chips_can_be_neither_read_nor_written(self, two: TestTd, chip: int) -> None:
        assert error_of(lambda: two.vm.get_irqchip(chip)) == errno.ENXIO
        assert error_of(lambda: two.vm.set_irqchip(KvmIrqchip(chip))) == errno.ENXIO


class TestMpState:
    def test_a_vcpu_put_into_uninitialized_blocks(self, two: TestTd) -> None:
        two.vcpu.set_mp_state(UNINITIALIZED)
        run_into_a_signal(two.vcpu)
        assert two.vcpu.get_mp_state() == UNINITIALIZED

    def test_a_fresh_application_processor_is_woken_by_an_nmi_and_not_by_init(self, td: TestTd) -> None:
        td.enable_caps().init_vm()
        td.create_vcpu(init=False)
        other = td.create_vcpu(1, init=False)
        td.create_vcpu(2, init=False)  # KVM's map of APIC ids has the newest vCPU only when the next one comes
        assert td.vm.signal_msi(MSI | 1 << 12, INIT) == 1
        assert td.vm.signal_msi(MSI | 1 << 12, SIPI) == 1
        run_into_a_signal(other)
        assert td.vm.signal_msi(MSI | 1 << 12, NMI) == 1
        assert error_of(other.run) == errno.EAGAIN
        assert other.get_mp_state() == UNINITIALIZED
