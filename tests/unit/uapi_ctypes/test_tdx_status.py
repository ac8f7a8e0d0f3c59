"""Completion statuses: every code decodes, its detail reads as what it is, and the unknown stays in hex."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uapi_ctypes.tdx_status import (
    KvmTdxStatus,
    Operand,
    Rax,
    Status,
    TdvmcallStatus,
    describe,
    explain,
)

WORDS: list[tuple[int, str]] = [
    (0xC000010000000045, "OPERAND_INVALID(CPUID_CONFIG)"),
    (0xC000010000000000, "OPERAND_INVALID(RAX)"),
    (0xC000010000000077, "OPERAND_INVALID(0x77)"),
    (0xC0000B0D00000001, "EPT_ENTRY_STATE_INCORRECT(RCX)"),
    (0x8000020000000092, "OPERAND_BUSY(SEPT_TREE)"),
    (0x80000200000000A9, "OPERAND_BUSY(TD_EPOCH)"),
    (0xC000030000000080, "PAGE_METADATA_INCORRECT(TDR)"),
    (0xC000060800000000, "OP_STATE_INCORRECT"),
    (0xC000060900000000, "NO_VCPUS"),
    (0x8000020300000000, "RND_NO_ENTROPY"),
    (0, "SUCCESS"),
    (77, "SUCCESS(exit reason TDCALL(77))"),
    (0x4000000100000002, "NON_RECOVERABLE_VCPU(exit reason TRIPLE_FAULT(2))"),
    (0x6000000500000029, "NON_RECOVERABLE_TD_NON_ACCESSIBLE(exit reason FAILED_ENTRY_MACHINE_CHECK(41))"),
    (0x00001100000003E7, "L2_EXIT_HOST_ROUTED_ASYNC(exit reason 0x3e7)"),
    (0xC0000A0000000005, "INVALID_TDMR(TDMR 5)"),
    (0xC0000A2100000302, "NON_ORDERED_RESERVED_IN_TDMR(TDMR 2, reserved area 3)"),
    (0xC0000A1000000204, "INVALID_PAMT(TDMR 4, 1G PAMT)"),
    (0xC0000A1200070001, "PAMT_OVERLAP(TDMR 1, 4K PAMT, TDMR 7)"),
    (0xC000091200000301, "SMRR_OVERLAPS_CMR(SMRR 1, CMR 3)"),
    (0xC00009000000001F, "INCORRECT_CPUID_VALUE(CPUID leaf 0x1f)"),
    (0xC00009210000010A, "INCORRECT_MSR_VALUE(MSR 0x10a)"),
    (0xC0000B0F00010002, "L2_SEPT_WALK_FAILED(VM 1, level 2)"),
    (0x00000B0A00000001, "PAGE_ALREADY_ACCEPTED(level 1)"),
    (0xC0000B0B00000001, "PAGE_SIZE_MISMATCH(level 1)"),
    (0xC000082500000800, "NUM_ACTIVATED_HKIDS_NOT_SUPPORTED(limit 2048)"),
    # KVM's own
    (0x4000000200000002, "KVM_NON_RECOVERABLE_TD(exit reason TRIPLE_FAULT(2))"),
    (0x6000000700000000, "KVM_TD_WRONG_APIC_MODE"),
    (0x8000FF00FFFF0000, "KVM_SW_ERROR(VMfailInvalid: the P-SEAMLDR or the TDX module is not loaded)"),
    (0x8000FF000000000D, "KVM_SW_ERROR(#GP: SEAMCALL is not possible on this CPU in this mode)"),
    (0x8000FF0000000001, "KVM_SW_ERROR(0x1)"),
    # nobody's
    (0x1234567800000000, "0x1234567800000000"),
    (0xFFFFFFFFFFFFFFFF, "KVM_SW_ERROR(0xffffffff)"),
]


@pytest.mark.parametrize(("rax", "words"), WORDS, ids=[f"{rax:#x}" for rax, _ in WORDS])
def test_reads_as(rax: int, words: str) -> None:
    assert describe(rax) == words


def test_there_are_as_many_statuses_as_the_module_has() -> None:
    assert len(Status) == 165
    assert len(Status.__members__) == len(Status), "two names for one code"


@given(st.sampled_from(list(Status)), st.integers(0, 0xFFFF_FFFF))
def test_every_status_survives_the_round_trip(status: Status, detail: int) -> None:
    rax = int(Rax(status, detail))
    assert Rax.decode(rax) == Rax(status, detail)
    assert describe(rax).startswith(status.name)


@given(st.integers(0, (1 << 64) - 1))
def test_anything_of_64_bits_can_be_explained(value: int) -> None:
    lines = explain(value)
    assert len(lines) >= 2
    assert lines[-1].startswith(f"{value:#018x}: ")


@pytest.mark.parametrize("value", [-1, 1 << 64])
def test_more_than_64_bits_is_no_status(value: int) -> None:
    with pytest.raises(ValueError, match="not a 64-bit status"):
        explain(value)


def test_bits_say_what_kind_of_status_it_is() -> None:
    assert Status.OPERAND_INVALID.is_error
    assert Status.OPERAND_INVALID.is_non_recoverable
    assert not Status.OPERAND_BUSY.is_non_recoverable
    assert not Status.PAGE_ALREADY_FREE.is_error
    assert Status.TD_FATAL.is_fatal
    assert not Status.NON_RECOVERABLE_VCPU.is_fatal


def test_fatal_codes_of_the_module_differ_from_those_that_kvm_knows() -> None:
    known = {int(status) for status in Status}
    assert known.isdisjoint(int(status) for status in KvmTdxStatus)


def test_register_operands_have_the_registers_numbers() -> None:
    registers = ("RAX", "RCX", "RDX", "RBX", None, "RBP", "RSI", "RDI", *(f"R{n}" for n in range(8, 16)))
    for number, name in enumerate(registers):
        if name is not None:
            assert Operand(number).name == name


def test_an_ambiguous_value_shows_every_reading() -> None:
    lines = "\n".join(explain(int(TdvmcallStatus.GPA_INUSE)))
    assert "GPA_INUSE" in lines
    assert "TDREPORT_FAILED" in lines
    assert "TDVMCALL (R10): RETRY" in explain(1)
    assert explain(0x1234567800000000)[0] == "unknown to TDX module 1.5.01, KVM and the GHCI"
