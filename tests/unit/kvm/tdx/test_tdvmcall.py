"""TDG.VP.VMCALL as mainline serves it: every leaf with its checks, exits and results, seen from the guest."""

import ctypes
import errno

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sim_backend.machine import Machine
from tests.unit.kvm.tdx.guest_code import (
    R10,
    R11,
    R12,
    R13,
    R14,
    R15,
    S_BIT,
    VMCALL_MASK,
    Program,
)
from tests.unit.kvm.tdx.vmm import TestTd
from uapi_ctypes.errors import KvmError
from uapi_ctypes.kvm import KvmMsrFilter
from uapi_ctypes.kvm_run import KvmExit
from uapi_ctypes.kvm_state import KvmMsrEntry, KvmMsrs

INVALID_OPERAND = 1 << 63
UNSUPPORTED = 1 << 63 | 3
CPUID, HLT, IO, RDMSR, WRMSR, MMIO = 10, 12, 30, 31, 32, 48
INFO, MAP_GPA, GET_QUOTE, FATAL, NOTIFY = range(0x10000, 0x10005)
OUT = KvmExit.KVM_EXIT_IO
USER_SPACE_MSR = 188


def ask(*calls: tuple[int, ...], r10: int = 0) -> Program:
    """Return a program that makes the TDVMCALLs and reports R10 and R11 after each."""
    program = Program()
    for leaf, *arguments in calls:
        program.vmcall(leaf, *arguments, r10=r10).report(R10, R11)
    return program.done()


class TestIo:
    @pytest.mark.parametrize(("size", "value"), [(1, 0xAB), (2, 0xABCD), (4, 0xABCD1234)])
    def test_a_write_reaches_user_space(self, td: TestTd, size: int, value: int) -> None:
        td.build(Program().vmcall(IO, size, 1, 0x123, value | 0xFFFF << 48).done())
        page = td.vcpu.run_area.memory
        page[4096:4104] = b"\xee" * 8
        assert td.run() == OUT
        assert page[4096 + size : 4104] == b"\xee" * (8 - size)
        io = td.vcpu.kvm_run.io
        assert (io.direction, io.size, io.port, io.count, io.data_offset) == (1, size, 0x123, 1, 4096)
        assert int.from_bytes(td.vcpu.io_data(), "little") == value

    @pytest.mark.parametrize("size", [1, 2, 4])
    def test_a_read_returns_what_user_space_stored_at_the_next_run(self, td: TestTd, size: int) -> None:
        td.build(ask((IO, size, 0, 0x123, 0)))
        assert td.run() == OUT
        assert td.vcpu.kvm_run.io.direction == 0
        td.vcpu.io_data()[:] = bytes(range(1, size + 1))
        assert td.run_to_end() == [0, int.from_bytes(bytes(range(1, size + 1)), "little")]

    @pytest.mark.parametrize(
        ("size", "direction"), [(3, 1), (5, 1), (8, 0), (0, 0), (4, 2), (1 << 32 | 4, 1), (4, 1 << 32)]
    )
    def test_other_sizes_and_directions_do_not_exit(self, td: TestTd, size: int, direction: int) -> None:
        td.build(ask((IO, size, direction, 0x30, 0)))
        assert td.run_to_end()[0] == INVALID_OPERAND

    def test_the_port_is_cut_to_16_bits(self, td: TestTd) -> None:
        td.build(Program().vmcall(IO, 1, 1, 0x7_1234_5678, 1).done())
        assert td.run() == OUT
        assert td.vcpu.kvm_run.io.port == 0x5678


class TestMmio:
    @pytest.mark.parametrize("size", [1, 2, 4, 8])
    def test_an_access_reaches_user_space_without_the_s_bit(self, td: TestTd, size: int) -> None:
        td.build(
            Program()
            .vmcall(MMIO, size, 1, S_BIT | 0x1_0003, 0x8877665544332211)
            .vmcall(MMIO, size, 0, S_BIT | 0x1_0003)
            .report(R10, R11)
            .done()
        )
        assert td.run() == KvmExit.KVM_EXIT_MMIO
        mmio = td.vcpu.kvm_run.mmio
        assert (mmio.phys_addr, mmio.len, mmio.is_write) == (0x1_0003, size, 1)
        assert bytes(mmio.data)[:size] == bytes.fromhex("1122334455667788")[:size]
        assert td.run() == KvmExit.KVM_EXIT_MMIO
        assert (mmio.phys_addr, mmio.len, mmio.is_write) == (0x1_0003, size, 0)
        mmio.data[:] = bytes.fromhex("F1F2F3F4F5F6F7F8")
        assert td.run_to_end() == [0, int.from_bytes(bytes.fromhex("F1F2F3F4F5F6F7F8")[:size], "little")]

    @pytest.mark.parametrize(
        ("size", "direction", "gpa"),
        [(3, 1, S_BIT), (10, 0, S_BIT), (4, 2, S_BIT), (4, 1, 0x1000), (8, 1, S_BIT - 4), (8, 1, 4095)],
    )
    def test_bad_sizes_directions_and_private_bytes_do_not_exit(
        self, td: TestTd, size: int, direction: int, gpa: int
    ) -> None:
        td.build(ask((MMIO, size, direction, gpa, 0)))
        assert td.run_to_end()[0] == INVALID_OPERAND

    def test_garbage_in_the_upper_half_of_size_and_direction_passes(self, td: TestTd) -> None:
        td.build(ask((MMIO, 1 << 40 | 4, 7 << 32 | 1, S_BIT | 0x5000, 1)))
        assert td.run() == KvmExit.KVM_EXIT_MMIO
        assert td.vcpu.kvm_run.mmio.len == 4


class TestCpuid:
    def test_the_answer_is_the_table_of_set_cpuid2(self, td: TestTd) -> None:
        td.build(Program().vmcall(CPUID, 1, 0).report(R10, R12, R13, R14, R15).done())
        r10, eax, _ebx, ecx, _edx = td.run_to_end()
        assert (r10, eax) == (0, 0x806F8)
        assert ecx >> 21 & 1

    def test_a_leaf_that_is_not_in_the_table_is_the_highest_basic_one(self, td: TestTd) -> None:
        td.build(Program().vmcall(CPUID, 5, 0).vmcall(CPUID, 0x5000, 0).report(R10, R12, R13).done())
        assert td.run_to_end() == [0, 0, 0]


class TestMsrs:
    def test_a_write_is_kept_and_user_space_sees_it(self, td: TestTd) -> None:
        td.build(ask((WRMSR, 0x200, 6), (RDMSR, 0x200)))
        assert td.run_to_end() == [0, WRMSR, 0, 6]
        msrs = KvmMsrs.of([KvmMsrEntry(0x200)])
        assert td.vcpu.get_msrs(msrs) == 1
        assert msrs.entries[0].data == 6

    @pytest.mark.parametrize("index", [0x10, 0xE7, 0x174, 0xC0000081, 0xC0000100, 0xC0000103, 0x12345678])
    def test_an_msr_outside_the_set_is_invalid_operand(self, td: TestTd, index: int) -> None:
        td.build(ask((RDMSR, index), (WRMSR, index, 0)))
        answers = td.run_to_end()
        assert (answers[0], answers[2]) == (INVALID_OPERAND, INVALID_OPERAND)

    @pytest.mark.parametrize("index", [0x1B, 0xC0000080, 0x3A])
    def test_read_only_msrs_can_be_read(self, td: TestTd, index: int) -> None:
        td.build(ask((RDMSR, index), (WRMSR, index, 1)))
        answers = td.run_to_end()
        assert (answers[0], answers[2]) == (0, INVALID_OPERAND)
        assert answers[1] == {0x1B: 0xFEE00D00, 0xC0000080: 0xD01, 0x3A: 1}[index]

    @pytest.mark.parametrize("index", [0x808, 0x80A, 0x80B, 0x810, 0x83F])
    def test_what_the_processor_virtualises_is_not_in_the_set(self, td: TestTd, index: int) -> None:
        td.build(ask((RDMSR, index)))
        assert td.run_to_end()[0] == INVALID_OPERAND

    def test_spiv_enables_the_apic_that_kvm_keeps(self, td: TestTd) -> None:
        td.build(ask((WRMSR, 0x80F, 0x1FF), (RDMSR, 0x80F)))
        assert td.run_to_end() == [0, WRMSR, 0, 0x1FF]

    def test_user_space_hears_inval_never_unknown(self, td: TestTd) -> None:
        td.vm.enable_cap(USER_SPACE_MSR, 7)
        td.build(ask((RDMSR, 0x12345678), (WRMSR, 0x12345678, 9), (RDMSR, 0x12345678)))
        assert td.run() == KvmExit.KVM_EXIT_X86_RDMSR
        msr = td.vcpu.kvm_run.msr
        assert (msr.error, msr.reason, msr.index) == (0, 1, 0x12345678)
        msr.data = 0x55
        assert td.run() == KvmExit.KVM_EXIT_X86_WRMSR
        assert (msr.reason, msr.index, msr.data) == (1, 0x12345678, 9)
        assert td.reported == [0, 0x55]
        assert td.run() == KvmExit.KVM_EXIT_X86_RDMSR
        msr.error = 1
        assert td.run_to_end() == [0, 0x55, 0, WRMSR, INVALID_OPERAND, RDMSR]

    def test_only_a_reason_that_was_enabled_exits(self, td: TestTd) -> None:
        td.vm.enable_cap(USER_SPACE_MSR, 2 | 4)
        td.build(ask((RDMSR, 0x12345678)))
        assert td.run_to_end()[0] == INVALID_OPERAND

    def test_a_filter_denies_reads_and_writes_separately(self, td: TestTd) -> None:
        td.enable_caps()
        bitmaps = [(ctypes.c_uint64)(1) for _ in range(3)]
        msr_filter = KvmMsrFilter(1)
        for number, (base, allowed) in enumerate(((0x200, 3), (0x202, 1), (0x204, 2))):
            row = msr_filter.ranges[number]
            row.flags, row.nmsrs, row.base = allowed, 1, base
            row.bitmap = ctypes.addressof(bitmaps[number])
        td.vm.x86_set_msr_filter(msr_filter)
        td.init_vm().add_memory()
        td.create_vcpu()
        td.add_image(
            ask((WRMSR, 0x200, 4), (WRMSR, 0x202, 5), (WRMSR, 0x204, 6), (RDMSR, 0x200), (RDMSR, 0x202), (RDMSR, 0x204))
        ).finalize()
        answers = td.run_to_end()
        assert answers[0::2] == [0, INVALID_OPERAND, 0, 0, 0, INVALID_OPERAND]


class TestInfo:
    def test_leaf_0_is_answered_in_the_kernel(self, td: TestTd) -> None:
        td.build(Program().vmcall(INFO, 0, 1, 2, 3).report(R10, R11, R12, R13, R14).done())
        assert td.run_to_end() == [0, 0, 0, 0, 0]

    def test_leaf_1_is_user_spaces(self, td: TestTd) -> None:
        td.build(Program().vmcall(INFO, 1).report(R10, R11, R12, R13, R14).done())
        assert td.run() == KvmExit.KVM_EXIT_TDX
        tdx = td.vcpu.kvm_run.tdx
        info = tdx.get_tdvmcall_info
        assert (tdx.flags, tdx.nr, info.ret, info.leaf) == (0, INFO, 0, 1)
        assert (info.r11, info.r12, info.r13, info.r14) == (0, 0, 0, 0)
        info.r11, info.r12, info.r13, info.r14 = 2, 3, 4, 5
        assert td.run_to_end() == [0, 2, 3, 4, 5]

    def test_there_is_no_other_leaf(self, td: TestTd) -> None:
        td.build(ask((INFO, 2)))
        assert td.run_to_end()[0] == INVALID_OPERAND


class TestGetQuote:
    def test_a_private_buffer_is_invalid(self, td: TestTd) -> None:
        td.build(ask((GET_QUOTE, 0x1000, 0x1000)))
        assert td.run_to_end()[0] == INVALID_OPERAND

    def test_user_space_gets_the_address_without_the_s_bit_and_alignment_is_its_business(self, td: TestTd) -> None:
        td.build(ask((GET_QUOTE, S_BIT | 0x1234, 0x777), (GET_QUOTE, S_BIT, 1)))
        assert td.run() == KvmExit.KVM_EXIT_TDX
        tdx = td.vcpu.kvm_run.tdx
        assert (tdx.nr, tdx.get_quote.gpa, tdx.get_quote.size) == (GET_QUOTE, 0x1234, 0x777)
        tdx.get_quote.ret = 0
        assert td.run() == KvmExit.KVM_EXIT_TDX
        assert td.run_to_end()[0::2] == [0, UNSUPPORTED], "a VMM that ignores the exit reports unsupported"


class TestSetupEventNotify:
    @pytest.mark.parametrize("vector", [0, 31, 256, 1 << 40])
    def test_other_vectors_are_invalid(self, td: TestTd, vector: int) -> None:
        td.build(ask((NOTIFY, vector)))
        assert td.run_to_end()[0] == INVALID_OPERAND

    @pytest.mark.parametrize("vector", [32, 255])
    def test_user_space_gets_the_vector(self, td: TestTd, vector: int) -> None:
        td.build(ask((NOTIFY, vector)))
        assert td.run() == KvmExit.KVM_EXIT_TDX
        tdx = td.vcpu.kvm_run.tdx
        assert (tdx.nr, tdx.setup_event_notify.vector) == (NOTIFY, vector)
        tdx.setup_event_notify.ret = 0
        assert td.run_to_end()[0] == 0


class TestReportFatalError:
    def test_the_registers_go_to_user_space_and_resuming_is_legal(self, td: TestTd) -> None:
        mask = 0xFFCC
        td.build(
            Program()
            .vmcall(
                FATAL, 0x0BAAAAAD << 32, 0x1000, 0x22, 0x33, mask=mask, rbx=0x44, rdi=0x55, rsi=0x66, r8=7, r9=8, rdx=9
            )
            .report(R10)
            .done()
        )
        assert td.run() == KvmExit.KVM_EXIT_SYSTEM_EVENT
        event = td.vcpu.kvm_run.system_event
        assert (event.type, event.ndata) == (7, 16)
        data = list(event.data)
        assert data[:8] == [77, mask, 9, 0x44, 0, 0, 0x66, 0x55]
        assert data[8:] == [7, 8, 0, FATAL, 0x0BAAAAAD << 32, 0x1000, 0x22, 0x33]
        assert td.run_to_end() == [0]


@pytest.mark.parametrize("leaf", [0, 1, 2, 18, 49, 77, 0x10005, 0x1_0000_001E, 1 << 63])
def test_any_other_leaf_is_unsupported(td: TestTd, leaf: int) -> None:
    td.build(ask((leaf, 1, 2, 3, 4)))
    assert td.run_to_end()[0] == UNSUPPORTED


class TestHypercalls:
    def test_an_unknown_number_is_enosys(self, td: TestTd) -> None:
        td.build(ask((1,), r10=999))
        assert td.run_to_end()[0] == -1000 & (1 << 64) - 1

    @pytest.mark.parametrize("number", [1, 5, 11])
    def test_what_the_kernel_serves_returns_0(self, td: TestTd, number: int) -> None:
        td.build(ask((0, 77), r10=number))
        assert td.run_to_end()[0] == 0

    def test_map_gpa_range_goes_to_user_space_verbatim(self, td: TestTd) -> None:
        gpa = S_BIT | 0x10_0000
        td.build(Program().tdcall(0, rcx=VMCALL_MASK, r10=12, r11=gpa, r12=1000, r13=16, r14=0).report(R10).done())
        assert td.run() == KvmExit.KVM_EXIT_HYPERCALL
        call = td.vcpu.kvm_run.hypercall
        assert (call.nr, list(call.args)[:3], call.flags) == (12, [gpa, 1000, 16], 1)
        call.ret = 0x4711
        assert td.run_to_end() == [0x4711], "unchecked"

    @pytest.mark.parametrize(("gpa", "pages"), [(0x1001, 1), (0x1000, 0), (0x1000, (1 << 64) - 1)])
    def test_map_gpa_range_checks_its_range(self, td: TestTd, gpa: int, pages: int) -> None:
        td.build(ask((gpa, pages, 0), r10=12))
        assert td.run_to_end()[0] == -22 & (1 << 64) - 1


class TestWidths:
    """The answers of IO and MMIO depend on nothing but the documented bits."""

    @settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        size=st.one_of(st.sampled_from([1, 2, 4, 8]), st.integers(0, (1 << 64) - 1)),
        direction=st.one_of(st.sampled_from([0, 1]), st.integers(0, (1 << 64) - 1)),
        gpa=st.one_of(st.integers(0, 1 << 48), st.integers(S_BIT - 8, S_BIT + 8)),
    )
    def test_mmio(self, machine: Machine, size: int, direction: int, gpa: int) -> None:
        low_size, low_direction = size & 0xFFFFFFFF, direction & 0xFFFFFFFF
        served = (
            low_size in (1, 2, 4, 8)
            and low_direction in (0, 1)
            and bool(gpa & S_BIT)
            and bool(gpa + low_size - 1 & S_BIT)
        )
        with TestTd(machine) as td:
            td.build(ask((MMIO, size, direction, gpa, 0x1234)))
            exit_reason = td.run()
            assert (exit_reason == KvmExit.KVM_EXIT_MMIO) == served
            if not served:
                assert td.reported[0] == INVALID_OPERAND


def test_a_register_outside_the_guests_mask_is_not_exchanged(td: TestTd) -> None:
    td.build(Program().mov(R15, 0x1111).tdcall(0, rcx=0x7C00, r10=0, r11=CPUID, r12=1, r13=0).report(R12, R15).done())
    eax, r15 = td.run_to_end()
    assert eax == 0x806F8
    assert r15 == 0x1111


def test_an_immediate_exit_completes_the_io_and_returns_eintr(td: TestTd) -> None:
    td.build(ask((IO, 4, 0, 0x40, 0)))
    assert td.run() == OUT
    td.vcpu.io_data()[:] = b"\x01\x02\x03\x04"
    td.vcpu.kvm_run.immediate_exit = 1
    with pytest.raises(KvmError) as raised:
        td.vcpu.run()
    assert raised.value.errno == errno.EINTR
    td.vcpu.io_data()[:] = b"\xff\xff\xff\xff"
    td.vcpu.kvm_run.immediate_exit = 0
    assert td.run_to_end() == [0, 0x04030201], "the value is from the moment of completion"
