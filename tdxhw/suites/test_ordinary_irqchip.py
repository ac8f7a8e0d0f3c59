"""Interrupt controllers of ordinary VMs: PIC, IOAPIC, local APIC, PIT, routing, eventfds, injection without them."""

import errno
import os
from collections.abc import Callable, Iterator
from typing import Final

import pytest

from tdxhw.exits import HALT
from tdxhw.ordinary_vm import OrdinaryVm
from tdxhw.vmm import Guest, Vmm
from uapi_ctypes.caps import KvmCap
from uapi_ctypes.errors import KvmError
from uapi_ctypes.kvm import (
    KVM_IOEVENTFD_FLAG_DATAMATCH,
    KVM_IOEVENTFD_FLAG_DEASSIGN,
    KVM_IOEVENTFD_FLAG_PIO,
    KVM_IRQ_ROUTING_IRQCHIP,
    KVM_IRQ_ROUTING_MSI,
    KVM_IRQFD_FLAG_DEASSIGN,
    KvmIrqchip,
    KvmIrqRoutingEntry,
    KvmMpStateValue,
)

pytestmark = pytest.mark.requires("kvm", "vm-type-default")

MAKE_VM = Callable[..., OrdinaryVm]
MAKE_VMM = Callable[[Guest], Vmm]
CHIPS: Final = (0, 1, 2)
SPLIT_PINS: Final = 24
APIC_ID: Final = 0x20
APIC_VERSION: Final = 0x30
APIC_SPIV: Final = 0xF0
APIC_IRR: Final = 0x200


@pytest.fixture
def eventfd() -> Iterator[int]:
    fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    yield fd
    os.close(fd)


def with_irqchip(ordinary_vm: MAKE_VM) -> OrdinaryVm:
    vm = ordinary_vm()
    vm.vm.create_irqchip()
    return vm


def refused(call: "pytest.ExceptionInfo[KvmError]") -> int | None:
    return call.value.errno


def test_there_is_one_irqchip_and_no_second(ordinary_vm: MAKE_VM) -> None:
    vm = with_irqchip(ordinary_vm).vm

    with pytest.raises(KvmError) as error:
        vm.create_irqchip()
    assert refused(error) == errno.EEXIST


def test_an_irqchip_comes_before_the_vcpus(ordinary_vm: MAKE_VM) -> None:
    vm = ordinary_vm()
    vm.create_vcpu()

    with pytest.raises(KvmError) as error:
        vm.vm.create_irqchip()
    assert refused(error) == errno.EINVAL


@pytest.mark.parametrize("chip", CHIPS)
def test_the_state_of_a_chip_reads_back(ordinary_vm: MAKE_VM, chip: int) -> None:
    vm = with_irqchip(ordinary_vm).vm
    before = vm.get_irqchip(chip)

    vm.set_irqchip(before)

    assert bytes(vm.get_irqchip(chip)) == bytes(before)


@pytest.mark.parametrize("chip", [3, 0xFFFF_FFFF])
def test_a_fourth_chip_is_einval(ordinary_vm: MAKE_VM, chip: int) -> None:
    vm = with_irqchip(ordinary_vm).vm

    with pytest.raises(KvmError) as error:
        vm.get_irqchip(chip)
    assert refused(error) == errno.EINVAL
    with pytest.raises(KvmError) as error:
        vm.set_irqchip(KvmIrqchip(chip))
    assert refused(error) == errno.EINVAL


@pytest.mark.parametrize("chip", CHIPS)
def test_without_an_irqchip_there_is_no_state_of_one(ordinary_vm: MAKE_VM, chip: int) -> None:
    with pytest.raises(KvmError) as error:
        ordinary_vm().vm.get_irqchip(chip)
    assert refused(error) == errno.ENXIO


@pytest.mark.parametrize("irq", [0, 1, 4, 7, 8, 12, 15])
def test_a_line_that_is_raised_shows_in_the_pic(ordinary_vm: MAKE_VM, irq: int) -> None:
    vm = with_irqchip(ordinary_vm)
    vm.create_vcpu()

    vm.vm.irq_line(irq, 1)
    raised = bytes(vm.vm.get_irqchip(irq // 8).chip)
    vm.vm.irq_line(irq, 0)

    lowered = bytes(vm.vm.get_irqchip(irq // 8).chip)
    last_irr, irr = raised[0], raised[1]
    assert last_irr >> irq % 8 & 1
    assert irr >> irq % 8 & 1
    assert not lowered[0] >> irq % 8 & 1


def test_irq_line_without_an_irqchip_is_enxio(ordinary_vm: MAKE_VM) -> None:
    with pytest.raises(KvmError) as error:
        ordinary_vm().vm.irq_line(4, 1)
    assert refused(error) == errno.ENXIO


@pytest.mark.parametrize("irq", [0, 4, 9, 16, 23])
def test_irq_line_status_is_an_answer_and_no_error(ordinary_vm: MAKE_VM, irq: int) -> None:
    vm = with_irqchip(ordinary_vm)
    vm.create_vcpu()

    first = vm.vm.irq_line_status(irq, 1)
    vm.vm.irq_line_status(irq, 0)

    assert first in (-1, 0, 1)


def test_a_new_local_apic_is_disabled_by_software(ordinary_vm: MAKE_VM) -> None:
    vm = with_irqchip(ordinary_vm)
    for vcpu_id in range(3):
        registers = bytes(vm.create_vcpu(vcpu_id).get_lapic())

        assert registers[APIC_ID + 3] == vcpu_id
        assert registers[APIC_SPIV : APIC_SPIV + 4] == b"\xff\0\0\0"
        assert registers[APIC_VERSION] & 0xF0 == 0x10


def test_the_local_apic_reads_back(ordinary_vm: MAKE_VM) -> None:
    vcpu = with_irqchip(ordinary_vm).create_vcpu()
    before = vcpu.get_lapic()

    vcpu.set_lapic(before)

    assert bytes(vcpu.get_lapic()) == bytes(before)


def test_with_an_irqchip_only_the_first_vcpu_is_runnable(ordinary_vm: MAKE_VM) -> None:
    vm = with_irqchip(ordinary_vm)
    states = [vm.create_vcpu(vcpu_id).get_mp_state() for vcpu_id in range(3)]

    assert states == [
        KvmMpStateValue.KVM_MP_STATE_RUNNABLE,
        KvmMpStateValue.KVM_MP_STATE_UNINITIALIZED,
        KvmMpStateValue.KVM_MP_STATE_UNINITIALIZED,
    ]


@pytest.mark.parametrize("state", [0, 1, 3])
def test_with_an_irqchip_the_state_can_be_set(ordinary_vm: MAKE_VM, state: int) -> None:
    vcpu = with_irqchip(ordinary_vm).create_vcpu()

    vcpu.set_mp_state(state)

    assert vcpu.get_mp_state() == state


def test_a_pit_needs_an_irqchip_and_there_is_one(ordinary_vm: MAKE_VM) -> None:
    vm = ordinary_vm().vm
    with pytest.raises(KvmError) as error:
        vm.create_pit2()
    assert refused(error) == errno.ENOENT
    with pytest.raises(KvmError) as error:
        vm.get_pit2()
    assert refused(error) == errno.ENXIO

    vm.create_irqchip()
    vm.create_pit2()
    with pytest.raises(KvmError) as error:
        vm.create_pit2()
    assert refused(error) == errno.EEXIST
    state = vm.get_pit2()
    vm.set_pit2(state)
    assert [channel.mode for channel in vm.get_pit2().channels] == [channel.mode for channel in state.channels]


def split(ordinary_vm: MAKE_VM, pins: int = SPLIT_PINS) -> OrdinaryVm:
    vm = ordinary_vm()
    vm.vm.enable_cap(KvmCap.KVM_CAP_SPLIT_IRQCHIP, pins)
    return vm


def test_a_split_irqchip_has_no_chips_to_read(ordinary_vm: MAKE_VM) -> None:
    vm = split(ordinary_vm)
    for chip in CHIPS:
        with pytest.raises(KvmError) as error:
            vm.vm.get_irqchip(chip)
        assert refused(error) == errno.ENXIO
    assert bytes(vm.create_vcpu().get_lapic())[APIC_VERSION] & 0xF0 == 0x10


@pytest.mark.parametrize("pins", [4097, 1 << 20])
def test_a_split_irqchip_has_a_limit_of_pins(ordinary_vm: MAKE_VM, pins: int) -> None:
    with pytest.raises(KvmError) as error:
        split(ordinary_vm, pins)
    assert refused(error) == errno.EINVAL


def test_a_split_irqchip_excludes_a_whole_one(ordinary_vm: MAKE_VM) -> None:
    with pytest.raises(KvmError) as error:
        split(ordinary_vm).vm.create_irqchip()
    assert refused(error) == errno.EEXIST
    with pytest.raises(KvmError) as error:
        with_irqchip(ordinary_vm).vm.enable_cap(KvmCap.KVM_CAP_SPLIT_IRQCHIP, SPLIT_PINS)
    assert refused(error) == errno.EEXIST


def route(gsi: int, kind: int, *words: int, flags: int = 0) -> KvmIrqRoutingEntry:
    entry = KvmIrqRoutingEntry(gsi, kind, flags)
    entry.u[: len(words)] = words
    return entry


@pytest.mark.parametrize(
    ("entry", "allowed"),
    [
        pytest.param(route(4, KVM_IRQ_ROUTING_IRQCHIP, 2, 4), True, id="ioapic"),
        pytest.param(route(4, KVM_IRQ_ROUTING_IRQCHIP, 0, 4), True, id="pic"),
        pytest.param(route(24, KVM_IRQ_ROUTING_MSI, 0xFEE0_0000, 0, 0x41), True, id="msi"),
        pytest.param(route(4, KVM_IRQ_ROUTING_IRQCHIP, 3, 4), False, id="no-such-chip"),
        pytest.param(route(4, KVM_IRQ_ROUTING_IRQCHIP, 0, 8), False, id="no-such-pin-of-the-pic"),
        pytest.param(route(4, KVM_IRQ_ROUTING_IRQCHIP, 2, 24), False, id="no-such-pin-of-the-ioapic"),
        pytest.param(route(4, 77), False, id="no-such-type"),
        pytest.param(route(4096, KVM_IRQ_ROUTING_MSI, 0xFEE0_0000), False, id="gsi-beyond-the-last"),
        pytest.param(route(4, KVM_IRQ_ROUTING_IRQCHIP, 2, 4, flags=1), False, id="flags-on-a-pin"),
    ],
)
def test_a_route_must_lead_somewhere(ordinary_vm: MAKE_VM, entry: KvmIrqRoutingEntry, allowed: bool) -> None:
    vm = with_irqchip(ordinary_vm).vm

    if allowed:
        vm.set_gsi_routing([entry])
        vm.set_gsi_routing([])
    else:
        with pytest.raises(KvmError) as error:
            vm.set_gsi_routing([entry])
        assert refused(error) == errno.EINVAL


@pytest.mark.parametrize("vector", [0x41, 0x80, 0xFF])
def test_an_msi_to_an_apic_that_is_off_stays_out_of_its_irr(ordinary_vm: MAKE_VM, vector: int) -> None:
    vm = with_irqchip(ordinary_vm)
    vcpu = vm.create_vcpu()

    vm.vm.signal_msi(0xFEE0_0000, vector)

    assert not any(bytes(vcpu.get_lapic())[APIC_IRR : APIC_IRR + 0x80])


def test_an_msi_without_an_apic_is_einval(ordinary_vm: MAKE_VM) -> None:
    with pytest.raises(KvmError) as error:
        ordinary_vm().vm.signal_msi(0xFEE0_0000, 0x41)
    assert refused(error) == errno.EINVAL


def test_an_irqfd_is_bound_once(ordinary_vm: MAKE_VM, eventfd: int) -> None:
    vm = with_irqchip(ordinary_vm).vm
    vm.irqfd(eventfd, 4)
    with pytest.raises(KvmError) as error:
        vm.irqfd(eventfd, 5)
    assert refused(error) == errno.EBUSY
    vm.irqfd(eventfd, 4, KVM_IRQFD_FLAG_DEASSIGN)
    vm.irqfd(eventfd, 5)
    for fd, flags, err in ((0xFFFF, 0, errno.EBADF), (vm.fd, 0, errno.EINVAL), (eventfd, 1 << 9, errno.EINVAL)):
        with pytest.raises(KvmError) as error:
            vm.irqfd(fd, 6, flags)
        assert refused(error) == err


@pytest.mark.parametrize("port", [0x10, 0x3F8])
def test_an_ioeventfd_takes_a_port_write_from_user_space(
    ordinary_vm: MAKE_VM, vmm: MAKE_VMM, eventfd: int, port: int
) -> None:
    vm = ordinary_vm()
    vm.add_slot(0, 0x10000)
    vm.start_real_mode(vm.create_vcpu(), b"\xba" + port.to_bytes(2, "little") + b"\xb0\x05\xee\xf4")  # out dx, al
    vm.vm.ioeventfd(eventfd, port, 1, KVM_IOEVENTFD_FLAG_PIO | KVM_IOEVENTFD_FLAG_DATAMATCH, 5)

    assert vmm(vm).run(vm.vcpus[0]) == HALT
    assert os.eventfd_read(eventfd) == 1


@pytest.mark.parametrize(
    ("length", "flags", "match"),
    [(3, KVM_IOEVENTFD_FLAG_PIO, 0), (16, 0, 0), (1, 1 << 12, 0), (0, KVM_IOEVENTFD_FLAG_DATAMATCH, 1)],
    ids=["three-bytes", "sixteen-bytes", "unknown-flag", "any-length-and-data"],
)
def test_refuses_a_malformed_ioeventfd(ordinary_vm: MAKE_VM, eventfd: int, length: int, flags: int, match: int) -> None:
    with pytest.raises(KvmError) as error:
        ordinary_vm().vm.ioeventfd(eventfd, 0x10, length, flags, match)
    assert refused(error) == errno.EINVAL


def test_an_ioeventfd_is_there_once_and_goes_when_asked(ordinary_vm: MAKE_VM, eventfd: int) -> None:
    vm = ordinary_vm().vm
    vm.ioeventfd(eventfd, 0x10, 1, KVM_IOEVENTFD_FLAG_PIO)
    with pytest.raises(KvmError) as error:
        vm.ioeventfd(eventfd, 0x10, 1, KVM_IOEVENTFD_FLAG_PIO)
    assert refused(error) == errno.EEXIST
    vm.ioeventfd(eventfd, 0x10, 1, KVM_IOEVENTFD_FLAG_PIO | KVM_IOEVENTFD_FLAG_DEASSIGN)
    with pytest.raises(KvmError) as error:
        vm.ioeventfd(eventfd, 0x10, 1, KVM_IOEVENTFD_FLAG_PIO | KVM_IOEVENTFD_FLAG_DEASSIGN)
    assert refused(error) == errno.ENOENT


@pytest.mark.parametrize("vector", [0x20, 0x80, 0xFF])
def test_an_interrupt_that_user_space_queues_wakes_the_guest(ordinary_vm: MAKE_VM, vmm: MAKE_VMM, vector: int) -> None:
    vm = ordinary_vm()
    vm.add_slot(0, 0x10000)
    vcpu = vm.create_vcpu()
    vm.start_real_mode(vcpu, b"\xfb\xf4")  # sti; hlt
    vm.memory.write(vector * 4, (0x3000).to_bytes(4, "little"))  # the real-mode vector: 0000:3000
    vm.memory.write(0x3000, b"\xb0\x77\xe6\x10\xf4")  # mov al, 0x77; out 0x10, al; hlt
    written: list[int] = []
    serve = vmm(vm)
    serve.on_port(0x10, write=lambda value, _size: written.append(value))
    assert serve.run(vcpu) == HALT
    assert vcpu.kvm_run.if_flag == vcpu.kvm_run.ready_for_interrupt_injection == 1

    vcpu.interrupt(vector)

    assert serve.run(vcpu) == HALT
    assert written == [0x77]
    assert vcpu.kvm_run.if_flag == 0


@pytest.mark.parametrize("vector", [256, 1 << 31])
def test_an_interrupt_beyond_the_last_vector_is_einval(ordinary_vm: MAKE_VM, vector: int) -> None:
    with pytest.raises(KvmError) as error:
        ordinary_vm().create_vcpu().interrupt(vector)
    assert refused(error) == errno.EINVAL


def test_with_a_pic_in_the_kernel_user_space_queues_none(ordinary_vm: MAKE_VM) -> None:
    with pytest.raises(KvmError) as error:
        with_irqchip(ordinary_vm).create_vcpu().interrupt(0x20)
    assert refused(error) == errno.ENXIO
