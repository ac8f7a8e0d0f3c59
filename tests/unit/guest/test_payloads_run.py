"""Every payload does what its first comment says, on the CPU engine with a minimal TD around it."""

import hashlib
from collections.abc import Callable
from typing import Any

import pytest

from sim_backend.cpu.engine import ExitReason, Segment
from sim_backend.cpu.errors import UnsupportedInstruction
from sim_backend.cpu.unicorn_cpu import UnicornCpu
from sim_backend.cpu.unicorn_engine import UnicornEngine
from sim_backend.hw.gprs import R8, R9, R10, R11, R12, R13, R14, R15, RAX, RCX, RDX, RSI
from sim_backend.hw.memory import PhysicalMemory
from tdxhw.guest import layout
from tdxhw.guest.payload import load

INVALID_OPERAND = 1 << 63
SUCCESS = (layout.PORT_SUCCESS, 4, 0)
PAGE_GPA, PAGE_HPA, IMAGE_HPA = 0x10_0000, 0x30000, 0x10000
Boot = Callable[..., Any]


@pytest.mark.parametrize("gpaw", [48, 52])
def test_td_lifecycle_reports_success_and_halts(boot: Boot, gpaw: int) -> None:
    td = boot(load("td_lifecycle"), gpaw)
    td.cpu.gprs[RCX] = td.cpu.gprs[R8] = 0x1234_5678_9ABC_DEF0
    assert td.run().reason == ExitReason.TDCALL
    assert td.ports == [SUCCESS]
    assert td.cpu.in_64bit_mode()


def test_report_fatal_error_reports_its_code(boot: Boot) -> None:
    td = boot(load("report_fatal_error"))
    td.run()
    assert td.calls[0][:3] == (0x10003, 0x0BAA_AAAD_0000_0000, 0)


def test_td_ioexit_wants_one_more_than_it_wrote(boot: Boot) -> None:
    for answer, last in ((0xAC, SUCCESS), (0xAB, (layout.PORT_TEST, 1, 0xAB))):
        td = boot(load("td_ioexit"))
        td.inputs = [answer]
        td.run()
        assert td.ports[-1] == last
    assert td.calls == [(0x10003, layout.FAILED_CHECK + 3, 0, 0, 0)]


def test_guest_writes_and_reads_use_every_size(boot: Boot) -> None:
    td = boot(load("guest_writes"))
    td.run()
    assert td.ports == [(0x31, 1, 0xAB), (0x31, 2, 0xABCD), (0x31, 4, 0xFFAB_CDEF), SUCCESS]
    td = boot(load("guest_reads"))
    td.inputs = [0xAB, 0xABCD, 0xFFAB_CDEF]
    td.run()
    assert td.ports == [SUCCESS]


def answer_zero(td: Any, function: int) -> int:
    for register in (R11, R12, R13, R14):
        td.cpu.gprs[register] = 0
    return 0


def test_get_td_vmcall_info_wants_zeros(boot: Boot) -> None:
    td = boot(load("get_td_vmcall_info"))
    td.answer = answer_zero
    td.run()
    assert td.ports == [SUCCESS]
    td = boot(load("get_td_vmcall_info"))
    td.answer = lambda td, function: 0  # R13 stays -1
    td.run()
    assert td.calls[-1][:2] == (0x10003, layout.FAILED_CHECK + 2)


def test_cpuid_tdcall_sends_four_registers(boot: Boot) -> None:
    def answer(td: Any, function: int) -> int:
        assert (function, td.cpu.gprs[R12], td.cpu.gprs[R13]) == (10, 1, 0)
        for index, register in enumerate((R12, R13, R14, R15)):
            td.cpu.gprs[register] = 0x100 + index
        return 0

    td = boot(load("cpuid_tdcall"))
    td.answer = answer
    td.run()
    assert [value for _, _, value in td.ports] == [0x100, 0x101, 0x102, 0x103, 0]


def test_td_cpuid_executes_the_instruction(boot: Boot) -> None:
    td = boot(load("td_cpuid"))
    assert td.run().reason == ExitReason.CPUID
    assert td.cpu.gprs[RAX] == 1


def test_msr_payloads_want_exactly_the_filtered_ones_refused(boot: Boot) -> None:
    def answer(td: Any, function: int) -> int:
        msr = td.cpu.gprs[R12]
        td.cpu.gprs[R11] = msr & 0xF | 4
        return INVALID_OPERAND if (function, msr) in ((31, 0x204), (32, 0x202)) else 0

    for name, ports in (("msr_reads", [4, 6, 0]), ("msr_writes", [0])):
        td = boot(load(name))
        td.answer = answer
        td.run()
        assert [value for _, _, value in td.ports] == ports
    assert [call[:3] for call in td.calls] == [(32, 0x200, 4), (32, 0x202, 5), (32, 0x204, 6)]


def test_mmio_payloads_use_every_size(boot: Boot) -> None:
    def answer(td: Any, function: int) -> int:
        gprs = td.cpu.gprs
        size, gpa = gprs[R12], gprs[R14]
        if size not in (1, 2, 4, 8) or not gpa & td.shared_bit:
            return INVALID_OPERAND
        assert gpa & ~td.shared_bit == 0x8000_0000
        gprs[R11] = 0x1234_5678_90AB_CDEF >> (64 - 8 * size)
        return 0

    for name, calls in (("mmio_reads", 5), ("mmio_writes", 6)):
        td = boot(load(name))
        td.answer = answer
        td.run()
        assert td.ports == [SUCCESS]
        assert len(td.calls) == calls


def test_tdcall_vp_info_sends_both_halves(boot: Boot) -> None:
    def answer(td: Any, leaf: int) -> int:
        assert leaf == 1
        for index, register in enumerate((RCX, RDX, R8, R9, R10, R11)):
            td.cpu.gprs[register] = (0xA0 + index) << 32 | index
        return 0

    td = boot(load("tdcall_vp_info"))
    td.answer = answer
    td.run()
    values = [value for _, _, value in td.ports]
    assert values == [0, 0xA0, 1, 0xA1, 2, 0xA2, 3, 0xA3, 4, 0xA4, 5, 0xA5, 0]


def test_two_vcpus_wait_for_each_other(boot: Boot) -> None:
    payload = load("two_vcpus")
    td = boot(payload)
    counter = payload.symbols["counter"] - payload.gpa + IMAGE_HPA
    assert td.run().reason == ExitReason.EXTERNAL_INTERRUPT, "alone it waits"
    assert td.memory.read(counter, 4) == b"\1\0\0\0"
    td.memory.write(counter, b"\2")
    td.run()
    assert td.ports == [(0x31, 4, 0), SUCCESS]


def test_host_reading_private_mem_fills_its_page(boot: Boot) -> None:
    payload = load("host_reading_private_mem")
    td = boot(payload)
    td.run()
    assert td.ports == [(0x31, 4, payload.symbols["private_page"]), (0x31, 4, 0), SUCCESS]
    page = payload.symbols["private_page"] - payload.gpa + IMAGE_HPA
    assert td.memory.read(page, 4096) == b"\x5a" * 4096


@pytest.mark.parametrize("name", ["accept_page", "accept_page_on_ve"])
def test_a_pending_page_is_accepted(boot: Boot, name: str) -> None:
    td = boot(load(name))
    td.pending = {PAGE_GPA >> 12}
    td.run()
    assert td.ports == [SUCCESS]
    assert (td.ve is not None) == (name == "accept_page_on_ve")
    assert td.memory.read(PAGE_HPA, 2) == b"\x34\x12"


def test_the_page_is_a_parameter(boot: Boot) -> None:
    td = boot(load("touch_page").with_parameters((0xDEAD_0000).to_bytes(8, "little")))
    exit_ = td.run()
    assert (exit_.reason, exit_.gpa) == (ExitReason.EPT_VIOLATION, 0xDEAD_0000)


@pytest.mark.parametrize("gpaw", [48, 52])
def test_shared_mem_is_written_through_the_shared_bit(boot: Boot, gpaw: int) -> None:
    td = boot(load("shared_mem"), gpaw)
    td.run()
    assert td.ports == [(0x31, 4, PAGE_GPA), (0x31, 4, 0xCAFE), SUCCESS]
    assert td.converted == {PAGE_GPA}


def test_map_gpa_and_back_ends_private(boot: Boot) -> None:
    td = boot(load("map_gpa_and_back"))
    td.run()
    assert td.calls[-1][:2] == (0x10003, layout.FAILED_CHECK + 4), "this TD does not zero the page"
    assert td.converted == set()


@pytest.mark.parametrize("name", ["mr_report", "rtmr_extend"])
def test_a_report_is_left_in_the_shared_page(boot: Boot, name: str) -> None:
    digests: list[bytes] = []

    def answer(td: Any, leaf: int) -> int:
        gprs = td.cpu.gprs
        if leaf == 2:
            digests.append(td.memory.read(gprs[RCX] - layout.IMAGE_GPA + IMAGE_HPA, 48))
            return 0 if gprs[RDX] < 4 else 0xC000_0100_0000_0002
        assert (leaf, gprs[RCX] % 1024, gprs[RDX] % 64, gprs[R8]) == (4, 0, 0, 0)
        data = td.memory.read(gprs[RDX] - layout.IMAGE_GPA + IMAGE_HPA, 64)
        report = hashlib.sha512(data).digest() * 16
        td.memory.write(gprs[RCX] - layout.IMAGE_GPA + IMAGE_HPA, report)
        return 0

    td = boot(load(name))
    td.answer = answer
    td.run()
    assert td.ports == [(0x31, 4, PAGE_GPA), SUCCESS]
    data = bytes(range(64)) if name == "mr_report" else bytes(64)
    assert td.memory.read(PAGE_HPA, 1024) == hashlib.sha512(data).digest() * 16
    assert digests == ([b"\xa5" * 48] * 2 if name == "rtmr_extend" else [])


def test_bad_guests_end_as_they_should(boot: Boot) -> None:
    assert boot(load("triple_fault")).run().reason == ExitReason.TRIPLE_FAULT
    assert boot(load("endless_loop")).run().reason == ExitReason.EXTERNAL_INTERRUPT
    exit_ = boot(load("jump_into_nowhere")).run()
    assert (exit_.reason, exit_.gpa, exit_.qualification & 7) == (ExitReason.EPT_VIOLATION, 0xDEAD_0000, 4)
    td = boot(load("garbage_instructions"))
    td.run()
    assert td.calls[0][:2] == (0x10003, layout.UNHANDLED_EXCEPTION + 6)
    assert td.calls[0][3] == layout.CODE_GPA, "R14 is where it happened"
    with pytest.raises(UnsupportedInstruction, match="VEX"):
        boot(load("vex_instruction")).run()


def test_benchmarks_count_as_told(boot: Boot) -> None:
    td = boot(load("integer_loop").with_parameters((5).to_bytes(8, "little")))
    td.run()
    value = 1
    for _ in range(5):
        value = (value * 1664525 + 1013904223) & 0xFFFF_FFFF
        value ^= value >> 16
    assert td.ports == [(0x31, 4, value), SUCCESS]
    td = boot(load("tdvmcall_ping_pong").with_parameters((3).to_bytes(8, "little")))
    td.run()
    assert [value for _, _, value in td.ports] == [3, 2, 1, 0]


def test_guest_hlt_halts_with_interrupts_blocked(boot: Boot) -> None:
    td = boot(load("guest_hlt"))
    td.run()
    assert td.cpu.gprs[R12] == 1
    assert td.ports == []
    td.cpu.rip += 4
    td.cpu.gprs[R10] = 0
    td.run()
    assert td.ports == [SUCCESS]


def test_every_vcpu_has_its_own_stack(boot: Boot) -> None:
    stacks = set()
    for index in (0, 1, 15):
        td = boot(load("guest_hlt"))
        td.cpu.gprs[RSI] = index
        td.run()
        stacks.add(td.cpu.gprs[4] >> 9)
    assert len(stacks) == 3


class OrdinaryVm:
    """EPT of an ordinary VM with the image as its only memory."""

    def walk(self, gpa: int) -> int:
        return gpa - layout.IMAGE_GPA + IMAGE_HPA | 7 if gpa >= layout.IMAGE_GPA else 1 << 63

    def deliver_ve(self, qualification: int, gla: int, gpa: int) -> bool:
        return False


def test_pio_and_halt_boots_an_ordinary_vm_from_real_mode() -> None:
    memory = PhysicalMemory(0x10_0000)
    memory.write(IMAGE_HPA, load("pio_and_halt").image)
    cpu = UnicornEngine(memory).new_cpu()
    assert isinstance(cpu, UnicornCpu)
    cpu.second_level = OrdinaryVm()
    written = []
    while True:
        exit_ = cpu.run()
        if exit_.reason == ExitReason.CR_ACCESS:
            state = cpu.get_state()
            setattr(state, f"cr{exit_.qualification & 15}", cpu.gprs[exit_.qualification >> 8])
            cpu.set_state(state)
        elif exit_.reason == ExitReason.MSR_WRITE:
            state = cpu.get_state()
            state.efer = cpu.gprs[RAX]
            cpu.set_state(state)
        elif exit_.reason == ExitReason.IO_INSTRUCTION and exit_.qualification & 8:
            cpu.gprs[RAX] = 0x41
        elif exit_.reason == ExitReason.IO_INSTRUCTION:
            size = (exit_.qualification & 7) + 1
            written.append((exit_.qualification >> 16, size, cpu.gprs[RAX] & ((1 << 8 * size) - 1)))
        elif exit_.reason == ExitReason.HLT:
            break
        elif exit_.reason in (ExitReason.CPUID, ExitReason.MSR_READ):
            cpu.gprs[RAX] = cpu.gprs[RDX] = cpu.gprs[3] = 0
        else:
            assert exit_.reason == ExitReason.EXTERNAL_INTERRUPT
        cpu.rip += exit_.instruction_length
    assert written == [(0x31, 1, 0xAB), (0x31, 1, 0x42), SUCCESS]
    assert cpu.in_64bit_mode()
    assert cpu.get_state().cs == Segment(8, 0, 0xFFFF_FFFF, 0xA09B)
    cpu.close()
    memory.close()
