"""The virtual APIC by itself, against a model of sets, and as the CPU takes interrupts from it."""

import threading
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim_backend.cpu.engine import ExitReason
from sim_backend.cpu.errors import EngineError
from sim_backend.cpu.static_cpu import StaticCpu
from sim_backend.cpu.unicorn_cpu import UnicornCpu
from sim_backend.cpu.virtual_apic import (
    IA32_X2APIC_EOI,
    IA32_X2APIC_IRR0,
    IA32_X2APIC_ISR0,
    IA32_X2APIC_PPR,
    IA32_X2APIC_SELF_IPI,
    IA32_X2APIC_TMR0,
    IA32_X2APIC_TPR,
    NO_VECTOR,
    ApicWriteExit,
    VirtualApic,
)
from sim_backend.hw.gprs import RAX, RBX, RCX, RDX, RSP
from sim_backend.hw.memory import PhysicalMemory
from tests.unit.cpu.conftest import CODE, HANDLERS, STACK

PAGE, DESCRIPTOR = 0x1000, 0x2000
NOTIFICATION = 0xF2
CONTROL = (DESCRIPTOR >> 3) + 4
ON = 1
VECTORS = st.integers(16, 255)


def post(memory: PhysicalMemory, apic: VirtualApic, *vectors: int, descriptor: int = DESCRIPTOR) -> None:
    for vector in vectors:
        memory.q[(descriptor >> 3) + (vector >> 6)] |= 1 << (vector & 63)
    memory.q[(descriptor >> 3) + 4] |= ON
    apic.notify()


@pytest.fixture
def memory() -> Iterator[PhysicalMemory]:
    memory = PhysicalMemory(0x10000)
    yield memory
    memory.close()


@pytest.fixture
def apic(memory: PhysicalMemory) -> VirtualApic:
    apic = VirtualApic(memory, PAGE)
    apic.process_posted_interrupts(NOTIFICATION, DESCRIPTOR)
    return apic


def registers(apic: VirtualApic, first: int) -> set[int]:
    """Return the vectors that are set in ISR or IRR, as the guest reads them."""
    bits = sum(apic.read_msr(first + index) << 32 * index for index in range(8))
    return {vector for vector in range(256) if bits >> vector & 1}


# ---- The state machine ----


def test_a_new_apic_wants_no_attention(apic: VirtualApic) -> None:
    assert not apic.attention
    assert apic.recognized() == NO_VECTOR


def test_posted_requests_move_to_irr_and_on_is_cleared(memory: PhysicalMemory, apic: VirtualApic) -> None:
    post(memory, apic, 0x31, 0x5F, 0x60, 0xE0)
    memory.q[CONTROL] |= 0xF2 << 16
    assert apic.recognized() == 0xE0
    assert registers(apic, IA32_X2APIC_IRR0) == {0x31, 0x5F, 0x60, 0xE0}
    assert list(memory.q[DESCRIPTOR >> 3 : CONTROL + 1]) == [0, 0, 0, 0, 0xF2 << 16]


def test_without_a_notification_nothing_is_taken(memory: PhysicalMemory, apic: VirtualApic) -> None:
    memory.q[(DESCRIPTOR >> 3)] = 1 << 0x31
    assert apic.recognized() == NO_VECTOR
    assert memory.q[(DESCRIPTOR >> 3)] == 1 << 0x31


def test_switched_off_posting_forgets_the_notification(memory: PhysicalMemory, apic: VirtualApic) -> None:
    post(memory, apic, 0x31)
    apic.ignore_posted_interrupts()
    assert apic.recognized() == NO_VECTOR
    assert apic.notification_vector == NO_VECTOR


def test_a_descriptor_outside_ram_is_refused_by_name(memory: PhysicalMemory, apic: VirtualApic) -> None:
    apic.process_posted_interrupts(NOTIFICATION, memory.ram_bytes - 32)
    apic.notify()
    with pytest.raises(EngineError, match="0xffe0 is not in RAM"):
        apic.recognized()


def test_an_interrupt_in_service_holds_back_its_class_until_eoi(memory: PhysicalMemory, apic: VirtualApic) -> None:
    post(memory, apic, 0x45, 0x41)
    assert apic.recognized() == 0x45
    apic.acknowledge()
    assert apic.guest_interrupt_status == 0x45 << 8 | 0x41
    assert apic.read_msr(IA32_X2APIC_PPR) == 0x40
    assert (apic.recognized(), apic.attention) == (NO_VECTOR, False)
    apic.write_msr(IA32_X2APIC_EOI, 0)
    assert (apic.attention, apic.recognized()) == (True, 0x41)


def test_a_higher_class_interrupts_the_handler(memory: PhysicalMemory, apic: VirtualApic) -> None:
    post(memory, apic, 0x41)
    apic.recognized()
    apic.acknowledge()
    post(memory, apic, 0x51)
    assert apic.recognized() == 0x51
    apic.acknowledge()
    assert registers(apic, IA32_X2APIC_ISR0) == {0x41, 0x51}
    apic.write_msr(IA32_X2APIC_EOI, 0)
    assert apic.guest_interrupt_status == 0x41 << 8
    apic.write_msr(IA32_X2APIC_EOI, 0)
    assert (apic.guest_interrupt_status, apic.read_msr(IA32_X2APIC_PPR)) == (0, 0)


def test_the_tpr_holds_back_classes_up_to_its_own(apic: VirtualApic) -> None:
    apic.write_msr(IA32_X2APIC_TPR, 0x4F)
    apic.write_msr(IA32_X2APIC_SELF_IPI, 0x4F)
    assert apic.recognized() == NO_VECTOR
    assert apic.read_msr(IA32_X2APIC_PPR) == 0x4F, "the whole TPR where it is not below SVI's class"
    apic.write_msr(IA32_X2APIC_TPR, 0x30)
    assert apic.recognized() == 0x4F


def test_the_host_may_set_rvi_and_svi(apic: VirtualApic) -> None:
    apic.guest_interrupt_status = 0x6071
    assert apic.attention
    assert apic.recognized() == 0x71
    assert apic.read_msr(IA32_X2APIC_PPR) == 0x60


@pytest.mark.parametrize(
    ("msr", "value", "error"),
    [
        (IA32_X2APIC_EOI, 1, ValueError),
        (IA32_X2APIC_EOI, 1 << 32, ValueError),
        (IA32_X2APIC_TPR, 0x100, ValueError),
        (IA32_X2APIC_SELF_IPI, 0x141, ValueError),
        (IA32_X2APIC_SELF_IPI, 1 << 40, ValueError),
        (IA32_X2APIC_SELF_IPI, 0x0F, ApicWriteExit),
        (IA32_X2APIC_PPR, 0, KeyError),
        (IA32_X2APIC_ISR0, 0, KeyError),
        (IA32_X2APIC_TMR0 + 7, 0, KeyError),
        (IA32_X2APIC_IRR0, 0, KeyError),
    ],
)
def test_refused_writes_leave_nothing_pending(apic: VirtualApic, msr: int, value: int, error: type[Exception]) -> None:
    with pytest.raises(error):
        apic.write_msr(msr, value)
    assert (apic.attention, apic.guest_interrupt_status) == (False, 0)
    assert apic.read_msr(IA32_X2APIC_TPR) == 0


class Model:
    """What the guest's software may rely on, told with sets."""

    def __init__(self) -> None:
        self.requested: set[int] = set()
        self.in_service: list[int] = []
        self.tpr = 0

    def priority(self) -> int:
        return max(self.tpr & 0xF0, (self.in_service[-1] if self.in_service else 0) & 0xF0)

    def next(self) -> int:
        highest = max(self.requested, default=0)
        return highest if highest & 0xF0 > self.priority() else NO_VECTOR


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("post"), st.lists(VECTORS, min_size=1, max_size=4)),
        st.tuples(st.just("self"), VECTORS),
        st.tuples(st.just("tpr"), st.integers(0, 255)),
        st.tuples(st.just("take"), st.none()),
        st.tuples(st.just("eoi"), st.none()),
    ),
    max_size=40,
)


@settings(max_examples=150, deadline=None)
@given(STEPS)
def test_every_history_agrees_with_the_model(steps: list[tuple[str, Any]]) -> None:
    memory = PhysicalMemory(0x10000)
    apic, model = VirtualApic(memory, PAGE), Model()
    apic.process_posted_interrupts(NOTIFICATION, DESCRIPTOR)
    for what, value in steps:
        if what == "post":
            post(memory, apic, *value)
            model.requested.update(value)
        elif what == "self":
            apic.write_msr(IA32_X2APIC_SELF_IPI, value)
            model.requested.add(value)
        elif what == "tpr":
            apic.write_msr(IA32_X2APIC_TPR, value)
            model.tpr = value
        elif what == "take":
            if apic.recognized() != NO_VECTOR:
                apic.acknowledge()
            if (vector := model.next()) != NO_VECTOR:
                model.requested.remove(vector)
                model.in_service.append(vector)
        else:
            apic.write_msr(IA32_X2APIC_EOI, 0)
            if model.in_service:
                model.in_service.pop()
        wants_attention = apic.attention
        assert apic.recognized() == model.next()
        assert wants_attention or model.next() == NO_VECTOR, "a deliverable interrupt would be forgotten"
        assert registers(apic, IA32_X2APIC_IRR0) == model.requested
        assert registers(apic, IA32_X2APIC_ISR0) == set(model.in_service)
        assert apic.svi == (model.in_service[-1] if model.in_service else 0)
        assert apic.rvi == max(model.requested, default=0)
        assert apic.read_msr(IA32_X2APIC_PPR) & 0xF0 == model.priority()
    memory.close()


# ---- The CPU ----

APIC_PAGE, PID = 0xB000, 0xC000


@pytest.fixture
def cpu(machine: Any) -> UnicornCpu:
    cpu: UnicornCpu = machine.long_mode()
    cpu.virtual_apic = VirtualApic(machine.memory, APIC_PAGE)
    cpu.virtual_apic.process_posted_interrupts(NOTIFICATION, PID)
    return cpu


def arrive(machine: Any, cpu: UnicornCpu, *vectors: int) -> None:
    """Post and notify, as another processor does."""
    for vector in vectors:
        machine.memory.q[(PID >> 3) + (vector >> 6)] |= 1 << (vector & 63)
    machine.memory.q[(PID >> 3) + 4] |= ON
    cpu.external_interrupt(NOTIFICATION)


def test_a_posted_interrupt_is_delivered_before_the_next_instruction(machine: Any, cpu: UnicornCpu) -> None:
    machine.code("48ffc0 f4")
    cpu.rflags = 0x202
    arrive(machine, cpu, 0x31)
    assert cpu.run().reason == ExitReason.HLT
    assert (cpu.rip, cpu.gprs[RAX]) == (HANDLERS + 16 * 0x31, 0)


def test_with_if_clear_it_waits_for_sti_and_the_instruction_after_it(machine: Any, cpu: UnicornCpu) -> None:
    machine.code("48ffc3 fb 48ffc3 48ffc3 f4")
    arrive(machine, cpu, 0x31)
    assert cpu.run().reason == ExitReason.HLT
    assert (cpu.rip, cpu.gprs[RBX]) == (HANDLERS + 16 * 0x31, 2)
    assert machine.stack(cpu, 1) == [CODE + 7]


def test_popf_and_iret_open_the_window_at_once(machine: Any, cpu: UnicornCpu) -> None:
    machine.code("6802020000 9d 48ffc3 f4")
    arrive(machine, cpu, 0x31)
    cpu.run()
    assert (cpu.rip, cpu.gprs[RBX]) == (HANDLERS + 16 * 0x31, 0)


def test_an_interrupt_survives_an_exit_while_it_waits(machine: Any, cpu: UnicornCpu) -> None:
    machine.code("0fa2 fb 90 90 f4")
    arrive(machine, cpu, 0x31)
    assert cpu.run().reason == ExitReason.CPUID
    cpu.rip += 2
    assert cpu.run().reason == ExitReason.HLT
    assert cpu.rip == HANDLERS + 16 * 0x31


def test_a_window_that_closed_again_leaves_nothing_behind(machine: Any, cpu: UnicornCpu) -> None:
    assert cpu.virtual_apic is not None
    machine.code("fb 90 90 f4")
    arrive(machine, cpu, 0x31)
    cpu.run()
    machine.begin(cpu)
    cpu.virtual_apic.write_msr(IA32_X2APIC_EOI, 0)
    assert cpu.run().reason == ExitReason.HLT
    assert cpu.rip == CODE + 3


def test_an_exception_that_was_injected_goes_first(machine: Any, cpu: UnicornCpu) -> None:
    cpu.rflags = 0x202
    arrive(machine, cpu, 0x31)
    cpu.inject(1 << 31 | 3 << 8 | 6)
    assert cpu.run().reason == ExitReason.HLT
    assert cpu.rip == HANDLERS + 16 * 6, "its gate has cleared IF"
    cpu.rflags |= 0x200
    cpu.run()
    assert machine.stack(cpu, 1) == [HANDLERS + 16 * 6]


def test_a_trap_gate_lets_a_higher_one_in_before_the_handlers_first_instruction(machine: Any, cpu: UnicornCpu) -> None:
    gate = machine.memory.read(0x3000 + 16 * 0x51, 16)
    machine.memory.write(0x3000 + 16 * 0x31, gate[:5] + b"\x8f" + gate[6:])  # a trap gate keeps IF
    machine.code("f4")
    cpu.rflags = 0x202
    arrive(machine, cpu, 0x31)
    cpu.run()
    arrive(machine, cpu, 0x41)
    cpu.run()
    assert cpu.rip == HANDLERS + 16 * 0x41
    assert machine.stack(cpu, 1) == [HANDLERS + 16 * 0x51]
    assert cpu.gprs[RSP] == STACK - 2 * 40 - 8, "the second frame is aligned"


def wrmsr(msr: int, value: int) -> str:
    return "b9" + msr.to_bytes(4, "little").hex() + "b8" + value.to_bytes(4, "little").hex() + "31d2 0f30"


def test_self_ipi_is_delivered_behind_its_wrmsr(machine: Any, cpu: UnicornCpu) -> None:
    machine.code(wrmsr(IA32_X2APIC_SELF_IPI, 0x77) + "f4")
    cpu.rflags = 0x202
    cpu.run()
    assert cpu.rip == HANDLERS + 16 * 0x77
    assert machine.stack(cpu, 1) == [CODE + 14]


def test_self_ipi_of_a_low_vector_is_an_apic_write_exit_behind_the_instruction(machine: Any, cpu: UnicornCpu) -> None:
    machine.code(wrmsr(IA32_X2APIC_SELF_IPI, 0x0E) + "f4")
    exit_ = cpu.run()
    assert (exit_.reason, exit_.qualification) == (ExitReason.APIC_WRITE, 0x3F0)
    assert cpu.rip == CODE + 14
    assert cpu.run().reason == ExitReason.HLT


@pytest.mark.parametrize("msr", [IA32_X2APIC_PPR, IA32_X2APIC_ISR0, IA32_X2APIC_IRR0 + 7, 0x809])
def test_a_read_only_apic_msr_raises_gp_on_write_and_not_on_read(machine: Any, cpu: UnicornCpu, msr: int) -> None:
    machine.code("b9" + msr.to_bytes(4, "little").hex() + "31c0 31d2 0f32 0f30")
    cpu.gprs[RDX] = 7
    cpu.run()
    assert cpu.rip == HANDLERS + 16 * 13
    assert machine.stack(cpu, 2)[1] == CODE + 11, "at the WRMSR"
    assert cpu.gprs[RDX] == 0


def test_rdmsr_reads_the_page(machine: Any, cpu: UnicornCpu) -> None:
    machine.entry(APIC_PAGE + 0x270, 0x8000_0001, 4)
    machine.code("b927080000 0f32 f4")
    cpu.gprs[RCX] = 0
    cpu.run()
    assert (cpu.gprs[RAX], cpu.gprs[RDX]) == (0x8000_0001, 0)


def test_cr8_is_the_upper_half_of_the_tpr(machine: Any, cpu: UnicornCpu) -> None:
    assert cpu.virtual_apic is not None
    machine.code("b805000000 440f22c0 440f20c3 f4")  # mov cr8, rax; mov rbx, cr8
    arrive(machine, cpu, 0x51)
    cpu.rflags = 2
    assert cpu.run().reason == ExitReason.HLT
    assert (cpu.virtual_apic.tpr, cpu.gprs[RBX], cpu.get_state().cr8) == (0x50, 5, 5)
    cpu.set_state(cpu.get_state())
    assert cpu.virtual_apic.tpr == 0x50


def test_cr8_takes_four_bits_only(machine: Any, cpu: UnicornCpu) -> None:
    machine.code("b810000000 440f22c0")
    cpu.run()
    assert cpu.rip == HANDLERS + 16 * 13
    assert cpu.get_state().cr8 == 0


def test_lowering_cr8_lets_the_interrupt_in(machine: Any, cpu: UnicornCpu) -> None:
    machine.code("b805000000 440f22c0 fb 90 90 48ffc3 31c0 440f22c0 48ffc3 f4")
    arrive(machine, cpu, 0x51)
    cpu.run()
    assert (cpu.rip, cpu.gprs[RBX]) == (HANDLERS + 16 * 0x51, 1)


def test_a_running_guest_takes_a_posted_interrupt_without_an_exit(machine: Any, cpu: UnicornCpu) -> None:
    machine.code("48ffc3 ebfb")
    cpu.rflags = 0x202
    timer = threading.Timer(0.002, lambda: arrive(machine, cpu, 0x31))
    timer.start()
    exits = 0
    while cpu.run().reason == ExitReason.EXTERNAL_INTERRUPT:
        exits += 1  # the ticker's
    timer.join()
    assert cpu.rip == HANDLERS + 16 * 0x31
    assert exits <= 4


def test_another_vector_is_an_exit(cpu: UnicornCpu) -> None:
    cpu.rflags = 0x202
    cpu.external_interrupt(NOTIFICATION - 1)
    assert cpu.run().reason == ExitReason.EXTERNAL_INTERRUPT
    assert cpu.rip == CODE


def test_a_cpu_without_a_virtual_apic_exits_on_every_vector(machine: Any) -> None:
    cpu = machine.long_mode()
    cpu.external_interrupt(NOTIFICATION)
    assert cpu.run().reason == ExitReason.EXTERNAL_INTERRUPT


def test_without_room_for_the_frame_the_interrupt_is_delivered_again_later(machine: Any, cpu: UnicornCpu) -> None:
    machine.code("f4")
    cpu.rflags = 0x202
    cpu.gprs[RSP] = 0xE000
    machine.ept.entries[0xD] = 1 << 63
    arrive(machine, cpu, 0x31)
    assert cpu.run().reason == ExitReason.EPT_VIOLATION
    assert cpu.rip == CODE
    del machine.ept.entries[0xD]
    cpu.invalidate()
    assert cpu.run().reason == ExitReason.HLT
    assert cpu.rip == HANDLERS + 16 * 0x31
    assert cpu.virtual_apic is not None
    assert cpu.virtual_apic.guest_interrupt_status == 0x31 << 8, "it has been in service all along"


def test_a_static_cpu_takes_note(memory: PhysicalMemory, apic: VirtualApic) -> None:
    cpu = StaticCpu()
    cpu.virtual_apic = apic
    cpu.external_interrupt(NOTIFICATION)
    assert (apic.attention, cpu.kicked) == (True, False)
    cpu.external_interrupt(0x20)
    assert cpu.kicked
