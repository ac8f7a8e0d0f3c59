"""Exceptions, interrupts and system calls arrive in the guest as hardware delivers them."""

from typing import Any

import pytest

from sim_backend.cpu.engine import ExitReason, Segment
from sim_backend.hw.gprs import R11, RAX, RBX, RCX, RSP

CODE, STACK, HANDLERS, IDT, PD, TSS = 0x2000, 0x8000, 0x9000, 0x3000, 0x6000, 0x7800
UNMAPPED = 0x4000_1238
VALID = 1 << 31


def test_a_page_fault_has_its_address_and_error_code(machine: Any) -> None:
    cpu = machine.long_mode()
    machine.code("4889042538120040")  # MOV [0x40001238], RAX
    assert cpu.run().reason == ExitReason.HLT
    assert cpu.rip == HANDLERS + 16 * 14
    assert cpu.get_state().cr2 == UNMAPPED
    error, rip, cs, flags, rsp, ss = machine.stack(cpu, 6)
    assert (error, rip, cs, rsp, ss) == (2, CODE, 8, STACK, 16)
    assert flags & 1 << 16, "a fault is pushed with RF"


def test_a_page_fault_from_user_mode_switches_to_the_supervisor_stack(machine: Any) -> None:
    cpu = machine.user_mode()
    machine.code("488b042538120040")
    cpu.run()
    assert cpu.cpl() == 0
    error, rip, cs, _, rsp, ss = machine.stack(cpu, 6)
    assert (error, rip, cs, rsp, ss) == (4, CODE, 0x2B, STACK, 0x23)
    assert cpu.gprs[RSP] == 0xF000 - 48


def test_iretq_returns_to_user_mode(machine: Any) -> None:
    cpu = machine.user_mode()
    machine.code("cd80 0f0b")
    machine.code("48cf", at=HANDLERS + 16 * 0x80)
    machine.code("f4", at=HANDLERS + 16 * 6)
    cpu.run()
    assert machine.stack(cpu, 2)[0] == CODE + 2
    assert cpu.rip == HANDLERS + 16 * 6


def test_user_mode_may_not_raise_a_kernel_vector(machine: Any) -> None:
    cpu = machine.user_mode()
    machine.code("cd20")
    cpu.run()
    assert cpu.rip == HANDLERS + 16 * 13
    assert machine.stack(cpu, 2) == [0x20 << 3 | 2, CODE]


def test_a_breakpoint_returns_behind_the_instruction(machine: Any) -> None:
    cpu = machine.long_mode()
    machine.code("90cc")
    cpu.run()
    assert machine.stack(cpu, 1) == [CODE + 2]


def test_a_fault_during_delivery_is_a_double_fault_on_its_own_stack(machine: Any) -> None:
    cpu = machine.long_mode()
    machine.code("0f0b")
    machine.entry(IDT + 16 * 6, 0)  # #UD has no gate: #GP, which is contributory only with a contributory
    machine.entry(IDT + 16 * 13, 0)
    cpu.run()
    assert cpu.rip == HANDLERS + 16 * 8
    assert cpu.gprs[RSP] == 0xE000 - 48
    assert machine.stack(cpu, 1) == [0]


def test_no_way_to_deliver_a_double_fault_is_a_triple_fault(machine: Any) -> None:
    cpu = machine.long_mode()
    machine.code("0f0b")
    state = cpu.get_state()
    state.idtr_limit = 0
    cpu.set_state(state)
    assert cpu.run().reason == ExitReason.TRIPLE_FAULT


def test_an_exception_in_the_bitmap_exits_instead(machine: Any) -> None:
    cpu = machine.long_mode()
    cpu.exception_bitmap = 1 << 3 | 1 << 14
    machine.code("cc")
    exit_ = cpu.run()
    assert exit_.reason == ExitReason.EXCEPTION_OR_NMI
    assert exit_.interruption_info == VALID | 6 << 8 | 3
    machine.code("488b042538120040")
    cpu.invalidate_code(CODE, 16)
    exit_ = cpu.run()
    assert exit_.interruption_info == VALID | 1 << 11 | 3 << 8 | 14
    assert (exit_.qualification, exit_.interruption_error) == (UNMAPPED, 0)


def test_an_injected_interrupt_is_delivered_before_the_next_instruction(machine: Any) -> None:
    cpu = machine.long_mode()
    machine.code("48ffc0f4")
    cpu.rflags = 0x202
    assert cpu.can_take_interrupt()
    cpu.inject(VALID | 0x31)
    assert cpu.run().reason == ExitReason.HLT
    assert cpu.rip == HANDLERS + 16 * 0x31
    assert not cpu.can_take_interrupt(), "an interrupt gate clears IF"
    assert cpu.gprs[RAX] == 0


def test_an_injected_exception_carries_its_error_code(machine: Any) -> None:
    cpu = machine.long_mode()
    cpu.inject(VALID | 1 << 11 | 3 << 8 | 13, 0x1234)
    cpu.run()
    assert machine.stack(cpu, 2) == [0x1234, CODE]


def test_the_interrupt_window_opens_one_instruction_after_sti(machine: Any) -> None:
    cpu = machine.long_mode()
    machine.code("48ffc3 fb 48ffc3 48ffc3 f4")
    cpu.request_interrupt_window(True)
    assert cpu.run().reason == ExitReason.INTERRUPT_WINDOW
    assert (cpu.rip, cpu.gprs[RBX]) == (CODE + 7, 2)
    assert cpu.can_take_interrupt()
    cpu.request_interrupt_window(False)
    assert cpu.run().reason == ExitReason.HLT


def test_the_window_exits_at_once_when_it_is_open(machine: Any) -> None:
    cpu = machine.long_mode()
    machine.code("f4")
    cpu.rflags = 0x202
    cpu.request_interrupt_window(True)
    assert cpu.run().reason == ExitReason.INTERRUPT_WINDOW
    assert cpu.rip == CODE


def test_no_interrupt_can_be_taken_in_the_shadow_of_sti(machine: Any) -> None:
    cpu = machine.long_mode()
    machine.code("fbf4")
    cpu.run()
    assert cpu.rip == CODE + 1
    assert not cpu.can_take_interrupt()


def test_syscall_and_sysret_change_privilege(machine: Any) -> None:
    cpu = machine.user_mode()
    state = cpu.get_state()
    state.msrs = {0xC000_0081: 0x0008 << 32 | 0x001B << 48, 0xC000_0082: 0x2800, 0xC000_0084: 0x200}
    cpu.set_state(state)
    cpu.rflags = 0x202
    machine.code("0f05 0f0b")
    machine.code("f4 480f07", at=0x2800)
    cpu.run()
    assert (cpu.rip, cpu.cpl()) == (0x2800, 0)
    assert (cpu.gprs[RCX], cpu.gprs[R11] & 0x200, cpu.rflags & 0x200) == (CODE + 2, 0x200, 0)
    cpu.rip += 1
    cpu.run()
    assert machine.stack(cpu, 2) == [CODE + 2, 0x2B]


def test_single_stepping_raises_a_debug_exception_after_the_instruction(machine: Any) -> None:
    cpu = machine.long_mode()
    machine.code("48ffc0 48ffc0 f4")
    cpu.rflags = 0x102
    cpu.run()
    assert cpu.rip == HANDLERS + 16
    assert machine.stack(cpu, 1) == [CODE + 3]
    assert cpu.gprs[RAX] == 1
    assert cpu.get_state().dr[4] & 1 << 14


def test_real_mode_uses_the_vector_table(machine: Any) -> None:
    cpu = machine.cpu
    state = cpu.get_state()
    state.cs = Segment(0x200, 0x2000, 0xFFFF, 0x9B)
    state.idtr_base, state.idtr_limit = 0, 0x3FF
    cpu.set_state(state)
    cpu.gprs[RSP], cpu.rip, cpu.rflags = 0x8000, 0, 2
    machine.code("cd21")
    machine.memory.write(0x21 * 4, (0x0010).to_bytes(2, "little") + (0x0300).to_bytes(2, "little"))
    machine.code("f4", at=0x3010)
    assert cpu.run().reason == ExitReason.HLT
    assert (cpu.rip, cpu.get_state().cs.selector) == (0x10, 0x300)
    assert machine.memory.read(0x7FFA, 6) == bytes.fromhex("020000020200")


def test_protected_mode_pushes_a_32_bit_frame(machine: Any) -> None:
    machine.long_mode()
    cpu = machine.protected_mode()
    gate = 0x2800 | 0x18 << 16 | 0x8E00 << 32
    machine.entry(IDT + 8 * 13, gate)
    state = cpu.get_state()
    machine.entry(0x7018, 0x00CF9B000000FFFF)
    cpu.set_state(state)
    machine.code("66b80010 8ed8")
    machine.code("f4", at=0x2800)
    cpu.run()
    assert cpu.rip == 0x2800
    frame = machine.memory.read(cpu.gprs[RSP], 16)
    assert [int.from_bytes(frame[i : i + 4], "little") for i in (0, 4, 8)] == [0x1000, CODE + 4, 8]


@pytest.mark.parametrize("vector", [0, 16, 17, 19])
def test_fpu_state_survives_a_round_trip(machine: Any, vector: int) -> None:
    cpu = machine.long_mode()
    machine.code("d9e8 d9eb 660f6ec0 f4")  # FLD1; FLDPI; MOVD XMM0, EAX
    cpu.gprs[RAX] = vector
    cpu.run()
    state = cpu.get_state()
    assert state.fxsave[160] == vector
    assert state.fxsave[4] == 0xC0, "two registers are in use"
    cpu.set_state(state)
    assert cpu.get_state().fxsave == state.fxsave
    state.fxsave = b""
    cpu.set_state(state)
    assert cpu.get_state().fxsave[:5] == bytes.fromhex("7f03000000")
