"""Which instructions leave the guest, and with what."""

from typing import Any

import pytest

from sim_backend.cpu.engine import ExitReason
from sim_backend.cpu.errors import UnsupportedInstruction
from sim_backend.hw.gprs import RAX, RBX, RCX, RDI, RDX, RSI, RSP

CODE, STACK, HANDLERS = 0x2000, 0x8000, 0x9000

EXITING = [
    ("660f01cc", ExitReason.TDCALL, 4, 0),
    ("660f01cf", ExitReason.SEAMCALL, 4, 0),
    ("0f01c1", ExitReason.VMCALL, 3, 0),
    ("0f01c2", ExitReason.VMLAUNCH, 3, 0),
    ("0f01c4", ExitReason.VMXOFF, 3, 0),
    ("0f78c8", ExitReason.VMREAD, 3, 0),
    ("660fc730", ExitReason.VMCLEAR, 4, 0),
    ("0fc730", ExitReason.VMPTRLD, 3, 0),
    ("f30fc730", ExitReason.VMXON, 4, 0),
    ("660f388008", ExitReason.INVEPT, 5, 0),
    ("0f37", ExitReason.GETSEC, 2, 0),
    ("0fa2", ExitReason.CPUID, 2, 0),
    ("f30fa2", ExitReason.CPUID, 3, 0),
    ("f4", ExitReason.HLT, 1, 0),
    ("0f08", ExitReason.INVD, 2, 0),
    ("0f09", ExitReason.WBINVD, 2, 0),
    ("0f01c8", ExitReason.MONITOR, 3, 0),
    ("0f01c9", ExitReason.MWAIT, 3, 0),
    ("0f33", ExitReason.RDPMC, 2, 0),
    ("0f01d1", ExitReason.XSETBV, 3, 0),
    ("0f22c1", ExitReason.CR_ACCESS, 3, 0x100),
    ("410f22e7", ExitReason.CR_ACCESS, 4, 0xF04),
    ("440f22c3", ExitReason.CR_ACCESS, 4, 0x308),
    ("0f06", ExitReason.CR_ACCESS, 2, 0x20),
    ("0f01f0", ExitReason.CR_ACCESS, 3, 0x30),
    ("e410", ExitReason.IO_INSTRUCTION, 2, 0x10_0048),
    ("66e711", ExitReason.IO_INSTRUCTION, 3, 0x11_0041),
    ("ee", ExitReason.IO_INSTRUCTION, 1, 0),
    ("ed", ExitReason.IO_INSTRUCTION, 1, 0xB),
]


@pytest.mark.parametrize(("code", "reason", "length", "qualification"), EXITING, ids=[e[0] for e in EXITING])
def test_exits_at_the_instruction(machine: Any, code: str, reason: ExitReason, length: int, qualification: int) -> None:
    cpu = machine.long_mode()
    machine.code("90" + code + "48ffc3" * 3)  # INC RBX must not run
    exit_ = cpu.run()
    assert ExitReason(exit_.reason) is reason
    assert (cpu.rip, exit_.instruction_length) == (CODE + 1, length)
    assert exit_.qualification == qualification
    assert cpu.gprs == [0, 0, 0, 0, STACK] + [0] * 11


def test_all_registers_go_in_and_come_out(machine: Any) -> None:
    cpu = machine.long_mode()
    machine.code("49ffc7 660f01cc")
    cpu.gprs[:] = values = [0x0123_4567_89AB_0000 + index for index in range(16)]
    cpu.rflags = 0xAD7
    cpu.run()
    assert cpu.gprs == [*values[:15], values[15] + 1]
    assert cpu.rflags & 0x601 == 0x201  # INC keeps CF, and nothing touches IF or DF


def test_a_port_write_changes_no_register_even_in_a_long_block(machine: Any) -> None:
    cpu = machine.long_mode()
    machine.code("b8aa000000 e630 b8bb000000 e631 f4")
    assert (cpu.run().qualification >> 16, cpu.gprs[RAX], cpu.rip) == (0x30, 0xAA, CODE + 5)
    cpu.rip += cpu.exit.instruction_length
    assert (cpu.run().qualification >> 16, cpu.gprs[RAX]) == (0x31, 0xBB)


def test_rep_outsb_exits_once_for_each_element_with_its_address(machine: Any) -> None:
    cpu = machine.long_mode()
    machine.code("f36e f4")
    machine.memory.write(0x1000, b"abc")
    cpu.gprs[RSI], cpu.gprs[RCX], cpu.gprs[RDX] = 0x1000, 3, 0x3F8
    sent = b""
    while cpu.run().reason == ExitReason.IO_INSTRUCTION:
        assert cpu.exit.qualification == 0x3F8_0030
        sent += cpu.read_linear(cpu.exit.gla, 1)
        cpu.gprs[RSI] += 1  # the handler completes the element
        cpu.gprs[RCX] -= 1
    assert sent == b"abc"
    assert cpu.rip == CODE + 2


def test_insb_names_its_destination_and_leaves_the_registers(machine: Any) -> None:
    cpu = machine.long_mode()
    machine.code("6c f4")
    cpu.gprs[RDI], cpu.gprs[RDX] = 0x1234, 0x60
    exit_ = cpu.run()
    assert (exit_.qualification, exit_.gla, cpu.gprs[RDI]) == (0x60_0018, 0x1234, 0x1234)


def test_user_mode_port_io_is_a_general_protection_fault_without_the_bitmap(machine: Any) -> None:
    cpu = machine.user_mode()
    machine.code("ec f4")
    cpu.gprs[RDX] = 0x60
    assert cpu.run().reason == ExitReason.HLT
    assert cpu.rip == HANDLERS + 16 * 13
    assert machine.stack(cpu, 2) == [0, CODE]


def test_an_msr_acts_on_the_state_unless_the_policy_says_exit(machine: Any) -> None:
    cpu = machine.long_mode()
    state = cpu.get_state()
    state.msrs = {0xC000_0103: 0x77, 0x1D9: 5}
    cpu.set_state(state)
    machine.msrs.exiting = {0x1B}
    machine.code("b9030100c0 0f32 89c3 31c0 31d2 b9d9010000 0f30 b91b000000 0f32")
    assert cpu.run().reason == ExitReason.MSR_READ
    assert cpu.gprs[RBX] == 0x77
    assert cpu.get_state().msrs == {0xC000_0103: 0x77, 0x1D9: 0}


def test_an_msr_that_nobody_has_is_a_general_protection_fault(machine: Any) -> None:
    cpu = machine.long_mode()
    machine.code("b934120000 0f32")
    cpu.run()
    assert cpu.rip == HANDLERS + 16 * 13


def test_writing_fs_base_moves_the_segment(machine: Any) -> None:
    cpu = machine.long_mode()
    machine.entry(0x1508, 0xFEED)
    machine.code("b9000100c0 b800150000 31d2 0f30 64488b042508000000 f4")
    cpu.run()
    assert cpu.gprs[RAX] == 0xFEED
    assert cpu.get_state().fs.base == 0x1500


def test_debug_registers_keep_what_the_guest_writes(machine: Any) -> None:
    cpu = machine.long_mode()
    machine.code("b878560000 0f23c8 0f21cb f4")
    cpu.run()
    assert cpu.gprs[RBX] == 0x5678
    assert cpu.get_state().dr[1] == 0x5678


UNSUPPORTED = ["c5f1fec2", "c4e27158c1", "62f17c4858c1", "0fc720", "f30fc7f8", "660f38f801", "660faef0", "0f38c8c1"]


@pytest.mark.parametrize("code", UNSUPPORTED)
def test_an_instruction_that_the_engine_lacks_is_a_clear_stop_every_time(machine: Any, code: str) -> None:
    cpu = machine.long_mode()
    machine.code("90" + code + "f4")
    for _ in range(2):
        machine.begin(cpu)
        with pytest.raises(UnsupportedInstruction, match=bytes.fromhex(code).hex(" ")) as stop:
            cpu.run()
        assert stop.value.rip == CODE + 1


def test_vex_encoded_bmi_instructions_run(machine: Any) -> None:
    cpu = machine.long_mode()
    machine.code("c4e270f2c3 f4")  # ANDN EAX, ECX, EBX
    cpu.gprs[RCX], cpu.gprs[RBX] = 0xF0, 0xFF
    assert cpu.run().reason == ExitReason.HLT
    assert cpu.gprs[RAX] == 0x0F


@pytest.mark.parametrize("code", ["0f0b", "d6", "0f04", "0fff"])
def test_garbage_is_an_invalid_opcode_in_the_guest(machine: Any, code: str) -> None:
    cpu = machine.long_mode()
    machine.code(code)
    cpu.run()
    assert cpu.rip == HANDLERS + 16 * 6
    assert machine.stack(cpu, 1) == [CODE]
    assert cpu.gprs[RSP] == STACK - 40
