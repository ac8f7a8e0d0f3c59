"""The MSRs that KVM keeps for a TD: the whole set, from user space and from the guest."""

import ctypes
from collections.abc import Iterable

import pytest

from tests.unit.kvm.tdx.guest_code import R10, R11, Program
from tests.unit.kvm.tdx.vmm import TestTd
from uapi_ctypes.errors import KvmError
from uapi_ctypes.kvm import KvmMsrFilter
from uapi_ctypes.kvm_run import KvmExit
from uapi_ctypes.kvm_state import KvmMsrEntry, KvmMsrs
from uapi_ctypes.vcpu import Vcpu

RDMSR, WRMSR = 31, 32
INVALID_OPERAND = 1 << 63
USER_SPACE_MSR = 188
INVAL, FILTER = 1, 4
ARCH_CAPABILITIES, PLATFORM_INFO = 0x10A, 0xCE
FEAT_CTL, APICBASE, EFER = 0x3A, 0x1B, 0xC0000080
POLL_CONTROL = 0x4B564D05
MCG_CAP, MCG_STATUS, MCG_CTL, MC0_CTL = 0x179, 0x17A, 0x17B, 0x400
MCG_EXT_CTL, LMCE = 0x4D0, 1 << 27
LVTCMCI, CMCI = 0x82F, 1 << 10

PLAIN = [
    0x8B, ARCH_CAPABILITIES, 0x1FC, 0x277, 0x6E0, 0x1A0, PLATFORM_INFO, 0x140, MCG_CAP, MCG_STATUS,
    POLL_CONTROL, *range(MC0_CTL, MC0_CTL + 4 * 32),
]  # fmt: skip
MTRRS = [0xFE, 0x2FF, *range(0x200, 0x210), 0x250, 0x258, 0x259, *range(0x268, 0x270)]
MTRR_HOLES = [0x210, 0x24F, 0x251, 0x25A, 0x267]
X2APIC = [0x802, 0x803, 0x80D, 0x80F, 0x828, 0x830, *range(0x832, 0x83A), 0x83E]
READ_ONLY = [FEAT_CTL, APICBASE, EFER]
VIRTUALISED = [0x808, 0x80A, 0x80B, *range(0x810, 0x828), 0x83F]
OUTSIDE = [
    0x10, 0xE7, 0xE8, 0x174, 0x175, 0x176, 0x48, 0x3B, 0x345, 0xDA0, 0x1D9, 0x11, 0x12, 0x4B564D00, 0x4B564D01,
    0x4B564D02, 0x4B564D03, 0x4B564D04, 0x4B564D06, 0x4B564D07, 0xC0000081, 0xC0000082, 0xC0000084, 0xC0000100,
    0xC0000101, 0xC0000102, 0xC0000103,
]  # fmt: skip


def readable(vcpu: Vcpu, indices: Iterable[int]) -> list[int]:
    """Return those of the MSRs that KVM_GET_MSRS reads."""
    return [index for index in indices if vcpu.get_msrs(KvmMsrs.of([KvmMsrEntry(index)]))]


def set_msr(vcpu: Vcpu, index: int, value: int) -> int:
    return vcpu.set_msrs(KvmMsrs.of([KvmMsrEntry(index, 0, value)]))


def get_msr(vcpu: Vcpu, index: int) -> int:
    msrs = KvmMsrs.of([KvmMsrEntry(index)])
    assert vcpu.get_msrs(msrs) == 1
    return int(msrs.entries[0].data)


@pytest.fixture
def vcpu(td: TestTd) -> Vcpu:
    td.enable_caps().init_vm()
    return td.create_vcpu()


class TestTheSet:
    def test_it_is_what_can_be_read(self, vcpu: Vcpu) -> None:
        emulated = [*PLAIN, *MTRRS, *X2APIC, *READ_ONLY]
        assert readable(vcpu, emulated) == emulated
        assert readable(vcpu, [*VIRTUALISED, *OUTSIDE, *MTRR_HOLES]) == []

    @pytest.mark.parametrize("machine", ["v17"], indirect=True)
    def test_v17_has_two_mtrrs_and_the_self_ipi(self, vcpu: Vcpu) -> None:
        assert readable(vcpu, [*MTRRS, *MTRR_HOLES]) == [0xFE, 0x2FF]
        assert get_msr(vcpu, 0xFE) == 0
        assert [set_msr(vcpu, 0x2FF, value) for value in (0x806, 0x800, 0, 0xC06)] == [1, 0, 0, 0]
        assert set_msr(vcpu, 0x83F, 0x41) == 1
        assert readable(vcpu, [*VIRTUALISED, *OUTSIDE]) == []
        everything = [*PLAIN, *X2APIC, *READ_ONLY]
        assert readable(vcpu, everything) == everything

    def test_the_read_only_ones_are_constants(self, vcpu: Vcpu) -> None:
        before = [get_msr(vcpu, index) for index in READ_ONLY]
        assert before == [1, 0xFEE00D00, 0xD01]
        assert [set_msr(vcpu, index, value) for index, value in zip(READ_ONLY, before, strict=True)] == [0, 0, 0]

    def test_corrected_machine_checks_bring_their_lvt_entry(self, vcpu: Vcpu) -> None:
        assert readable(vcpu, [LVTCMCI]) == []
        version = get_msr(vcpu, 0x803)
        vcpu.x86_setup_mce(CMCI | 4)
        assert get_msr(vcpu, LVTCMCI) == 1 << 16, "masked"
        assert get_msr(vcpu, 0x803) == version + (1 << 16), "one LVT entry more"
        vcpu.x86_setup_mce(4)
        assert readable(vcpu, [LVTCMCI]) == []

    def test_machine_check_banks_are_as_configured(self, vcpu: Vcpu) -> None:
        assert readable(vcpu, [MCG_CTL]) == []
        vcpu.x86_setup_mce(1 << 8 | 2)
        banks = [MCG_CTL, *range(MC0_CTL, MC0_CTL + 8)]
        assert readable(vcpu, [*banks, MC0_CTL + 8, MC0_CTL + 11]) == banks
        assert get_msr(vcpu, MCG_CAP) == 1 << 8 | 2
        assert [set_msr(vcpu, MCG_CTL, value) for value in (0, (1 << 64) - 1, 5)] == [1, 1, 0]

    @pytest.mark.parametrize(
        ("index", "value", "taken"),
        [
            (0x2FF, 0xC06, 1),
            (0x2FF, 0x1000, 0),
            (0x2FF, 2, 0),
            (0x200, 6, 1),
            (0x200, 2, 0),
            (0x201, 1 << 11 | 0xFFFF_F000, 1),
            (0x201, 1 << 60, 0),
            (0x250, 0x0606060606060606, 1),
            (0x250, 0x0206060606060606, 0),
            (0xFE, 0x508, 0),
            (0x277, 0x0007040600070406, 1),
            (0x277, 2, 0),
            (POLL_CONTROL, 0, 1),
            (POLL_CONTROL, 2, 0),
        ],
    )
    def test_values_are_checked_as_for_an_ordinary_vm(self, vcpu: Vcpu, index: int, value: int, taken: int) -> None:
        assert set_msr(vcpu, index, value) == taken


class TestLocalMachineChecks:
    """IA32_MCG_EXT_CTL, which user space may always set and the guest has only where it was offered."""

    def test_user_space_may_set_its_one_bit(self, vcpu: Vcpu) -> None:
        assert [set_msr(vcpu, MCG_EXT_CTL, value) for value in (1, 2, 3, 0)] == [1, 0, 0, 1]
        assert get_msr(vcpu, MCG_EXT_CTL) == 0

    @pytest.mark.parametrize("offered", [True, False])
    def test_the_guest_needs_the_offer(self, td: TestTd, offered: bool) -> None:
        td.enable_caps().init_vm().add_memory()
        vcpu = td.create_vcpu()
        vcpu.x86_setup_mce(LMCE | 4 if offered else 4)
        program = Program().vmcall(WRMSR, MCG_EXT_CTL, 1).report(R10).vmcall(RDMSR, MCG_EXT_CTL).report(R10, R11)
        td.add_image(program.done()).finalize()
        assert td.run_to_end() == ([0, 0, 1] if offered else [INVALID_OPERAND, INVALID_OPERAND, 0])


class TestManyAtOnce:
    def test_256_are_e2big(self, vcpu: Vcpu) -> None:
        assert vcpu.get_msrs(KvmMsrs.of([KvmMsrEntry(0x277)] * 255)) == 255
        for call in (vcpu.get_msrs, vcpu.set_msrs):
            with pytest.raises(KvmError, match="E2BIG"):
                call(KvmMsrs.of([KvmMsrEntry(0x277)] * 256))

    def test_setting_stops_at_the_first_that_is_refused(self, vcpu: Vcpu) -> None:
        entries = [KvmMsrEntry(0x200, 0, 6), KvmMsrEntry(EFER, 0, 0xD01), KvmMsrEntry(0x202, 0, 6)]
        assert vcpu.set_msrs(KvmMsrs.of(entries)) == 1
        assert (get_msr(vcpu, 0x200), get_msr(vcpu, 0x202)) == (6, 0)


def test_after_the_first_entry_feature_msrs_only_take_their_own_value(td: TestTd) -> None:
    td.build(Program().out(0x40, 1).done())
    for index, other in ((ARCH_CAPABILITIES, 1 << 3), (PLATFORM_INFO, 0)):
        own = get_msr(td.vcpu, index)
        assert set_msr(td.vcpu, index, other) == 1
        assert set_msr(td.vcpu, index, own) == 1
    td.run()
    for index, other in ((ARCH_CAPABILITIES, 1 << 3), (PLATFORM_INFO, 0)):
        assert set_msr(td.vcpu, index, get_msr(td.vcpu, index)) == 1
        assert set_msr(td.vcpu, index, other) == 0


class TestFilter:
    def deny_all(self, td: TestTd) -> TestTd:
        """Let the guest read MSR 0x277 and nothing else."""
        td.enable_caps()
        bitmap = ctypes.c_uint64(1)
        msr_filter = KvmMsrFilter(1)
        row = msr_filter.ranges[0]
        row.flags, row.nmsrs, row.base, row.bitmap = 3, 1, 0x277, ctypes.addressof(bitmap)
        td.vm.x86_set_msr_filter(msr_filter)
        return td

    def test_the_x2apic_range_is_never_filtered(self, td: TestTd) -> None:
        self.deny_all(td).init_vm().add_memory()
        td.create_vcpu()
        program = Program()
        for index in (0x80F, 0x277, 0x200):
            program.vmcall(RDMSR, index).report(R10)
        td.add_image(program.vmcall(WRMSR, 0x80F, 0x1FF).report(R10).done()).finalize()
        assert td.run_to_end() == [0, 0, INVALID_OPERAND, 0]

    def test_user_space_hears_that_it_was_the_filter(self, td: TestTd) -> None:
        td.vm.enable_cap(USER_SPACE_MSR, INVAL | FILTER)
        self.deny_all(td).init_vm().add_memory()
        td.create_vcpu()
        program = Program().vmcall(RDMSR, 0x200).vmcall(WRMSR, 0x12345678, 5).vmcall(WRMSR, EFER, 0xD01).done()
        td.add_image(program).finalize()
        msr = td.vcpu.kvm_run.msr
        for expected in (KvmExit.KVM_EXIT_X86_RDMSR, KvmExit.KVM_EXIT_X86_WRMSR, KvmExit.KVM_EXIT_X86_WRMSR):
            assert td.run() == expected
            assert msr.reason == FILTER, "looked at before anybody knows whether the MSR exists"

    def test_user_space_itself_is_not_filtered(self, td: TestTd) -> None:
        self.deny_all(td).init_vm()
        vcpu = td.create_vcpu()
        assert set_msr(vcpu, 0x200, 6) == 1

    def test_a_write_to_a_read_only_msr_is_invalid_to_user_space(self, td: TestTd) -> None:
        td.vm.enable_cap(USER_SPACE_MSR, INVAL)
        td.build(Program().vmcall(WRMSR, EFER, 0xD01).report(R10).done())
        assert td.run() == KvmExit.KVM_EXIT_X86_WRMSR
        msr = td.vcpu.kvm_run.msr
        assert (msr.reason, msr.index, msr.data) == (INVAL, EFER, 0xD01)
        assert td.run_to_end() == [0]
