"""The raw exits of November 2023, and what else its KVM_RUN does differently."""

import errno
import signal

import pytest

from tests.unit.kvm.tdx.guest_code import R10, R11, R12, RBX, RDX, S_BIT, Program
from tests.unit.kvm.tdx.scripted_seam import ScriptedSeam
from tests.unit.kvm.tdx.vmm import TestTd
from uapi_ctypes.errors import KvmError
from uapi_ctypes.kvm_run import KvmExit

pytestmark = pytest.mark.parametrize("machine", ["v17"], indirect=True)

INVALID_OPERAND = 1 << 63
IO, RDMSR, WRMSR, MMIO = 30, 31, 32, 48
INFO, MAP_GPA, GET_QUOTE, FATAL, NOTIFY = range(0x10000, 0x10005)
EPT_VIOLATION, EPT_MISCONFIG = 48, 49


@pytest.mark.parametrize("leaf", [MAP_GPA, GET_QUOTE, FATAL, NOTIFY, 0x12345, 99])
def test_what_the_kernel_does_not_serve_comes_out_raw(td: TestTd, leaf: int) -> None:
    td.build(Program().vmcall(leaf, 1, 2, 3, 4).report(R10, R11, R12).done())
    assert td.run() == KvmExit.KVM_EXIT_TDX
    exit_ = td.vcpu.kvm_run.tdx_v17
    call = exit_.vmcall
    assert (exit_.type, call.reg_mask, call.type, call.subfunction) == (1, 0xFC00, 0, leaf)
    assert (call.in_r12, call.in_r13, call.in_r14, call.in_r15) == (1, 2, 3, 4)
    assert (call.in_rbx, call.in_rdi, call.in_rsi, call.in_r8, call.in_r9, call.in_rdx) == (0,) * 6
    assert (call.status_code, call.out_r11, call.out_r12) == (0, leaf, 1), "outputs are pre-loaded"
    call.status_code, call.out_r11, call.out_r12 = 7, 8, 9
    call.reg_mask = 0
    assert td.run_to_end() == [7, 8, 9], "the guest's own mask counts"


def test_rbx_and_rdx_are_the_wrong_way_round_in_the_mask(td: TestTd) -> None:
    td.build(Program().vmcall(FATAL, mask=0xFC08, rbx=0x1111, rdx=0x2222).report(RBX, RDX).done())
    assert td.run() == KvmExit.KVM_EXIT_TDX
    call = td.vcpu.kvm_run.tdx_v17.vmcall
    assert (call.in_rbx, call.in_rdx) == (0, 0), "bit 3 selects RBX for the module and RDX for this kernel"
    assert td.run_to_end() == [0x1111, 0x2222]


def test_get_td_vmcall_info_has_only_leaf_0(td: TestTd) -> None:
    td.build(Program().vmcall(INFO, 0, 5).report(R10, R12).vmcall(INFO, 1).report(R10).done())
    assert td.run_to_end() == [0, 0, INVALID_OPERAND]


class TestInstructions:
    def test_io_cuts_the_size_to_32_bits_and_any_direction_is_a_write(self, td: TestTd) -> None:
        td.build(Program().vmcall(IO, 1 << 32 | 2, 0x100, 0x77, 0x1234).done())
        assert td.run() == KvmExit.KVM_EXIT_IO
        io = td.vcpu.kvm_run.io
        assert (io.direction, io.size, io.port) == (1, 2, 0x77)

    @pytest.mark.parametrize("gpa", [0x4000_0000, 0x4000_0000 | S_BIT])
    def test_mmio_takes_both_kinds_of_address(self, td: TestTd, gpa: int) -> None:
        td.build(Program().vmcall(MMIO, 4, 1, gpa, 5).done())
        assert td.run() == KvmExit.KVM_EXIT_MMIO
        assert td.vcpu.kvm_run.mmio.phys_addr == 0x4000_0000

    @pytest.mark.parametrize("gpa", [0x4000_0FFE, 0x1000, 0x1000 | S_BIT])
    def test_mmio_across_a_page_or_into_a_slot_is_invalid(self, td: TestTd, gpa: int) -> None:
        td.build(Program().vmcall(MMIO, 4, 1, gpa, 5).report(R10).done())
        assert td.run_to_end() == [INVALID_OPERAND]

    def test_msr_exits_never_happen(self, td: TestTd) -> None:
        td.vm.enable_cap(188, 7)
        td.build(Program().vmcall(RDMSR, 0x12345).report(R10).vmcall(WRMSR, 0x12345, 1).report(R10).done())
        assert td.run_to_end() == [INVALID_OPERAND] * 2

    def test_of_the_mtrrs_only_two_exist(self, td: TestTd) -> None:
        program = Program().vmcall(RDMSR, 0xFE).report(R10, R11).vmcall(RDMSR, 0x200).report(R10)
        program.vmcall(RDMSR, 0x2FF).report(R10, R11)
        program.vmcall(WRMSR, 0x2FF, 0x806).report(R10).vmcall(WRMSR, 0x2FF, 0x800).report(R10).done()
        td.build(program)
        assert td.run_to_end() == [0, 0, INVALID_OPERAND, 0, 0x806, 0, INVALID_OPERAND]


class TestModuleAnswers:
    @pytest.fixture
    def td(self, seam: ScriptedSeam, td: TestTd) -> TestTd:
        return td.build(Program().done())

    def test_a_shared_instruction_fetch_is_an_exception_exit(self, seam: ScriptedSeam, td: TestTd) -> None:
        seam.td_exit(EPT_VIOLATION, rcx=0x184, r8=S_BIT)
        assert td.vcpu.run() == KvmExit.KVM_EXIT_EXCEPTION
        assert (td.vcpu.kvm_run.ex.exception, td.vcpu.kvm_run.ex.error_code) == (14, 0x184)

    def test_an_ept_misconfiguration_is_an_unknown_exit(self, seam: ScriptedSeam, td: TestTd) -> None:
        seam.td_exit(EPT_MISCONFIG)
        assert td.vcpu.run() == KvmExit.KVM_EXIT_UNKNOWN
        assert td.vcpu.kvm_run.hw.hardware_exit_reason == 49
        td.run_to_end()

    def test_another_exception_is_efault(self, seam: ScriptedSeam, td: TestTd) -> None:
        seam.td_exit(0, r9=1 << 31 | 3 << 8 | 14)
        with pytest.raises(KvmError) as raised:
            td.vcpu.run()
        assert raised.value.errno == errno.EFAULT

    def test_a_failed_entry_of_any_status_without_error_bits(self, seam: ScriptedSeam, td: TestTd) -> None:
        seam.td_exit(0x0000_1234 << 32 | 1 << 31 | 33)
        assert td.vcpu.run() == KvmExit.KVM_EXIT_FAIL_ENTRY


class TestNoPreRunChecks:
    def test_an_uninitialised_boot_processor_bugs_the_vm(self, td: TestTd) -> None:
        td.enable_caps().init_vm()
        td.create_vcpu(init=False)
        for _ in range(2):
            with pytest.raises(KvmError) as raised:
                td.vcpu.run()
            assert raised.value.errno == errno.EIO

    def test_a_td_that_was_never_initialised_bugs_the_vm(self, td: TestTd) -> None:
        td.enable_caps()
        td.create_vcpu(init=False)
        for _ in range(2):
            with pytest.raises(KvmError) as raised:
                td.vcpu.run()
            assert raised.value.errno == errno.EIO

    def test_an_unfinished_td_is_an_internal_error(self, td: TestTd) -> None:
        td.enable_caps().init_vm()
        td.create_vcpu()
        assert td.vcpu.run() == KvmExit.KVM_EXIT_INTERNAL_ERROR
        internal = td.vcpu.kvm_run.internal
        assert (internal.suberror, internal.data[0] >> 32) == (4, 0xC0000608)


def test_an_unaccepted_page_with_sept_ve_disabled_faults_for_ever(td: TestTd) -> None:
    td.build(Program().load(3, 0x3000).done(), attributes=1 << 28)
    previous = signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    try:
        with pytest.raises(KvmError) as raised:
            td.vcpu.run()
        assert raised.value.errno == errno.EINTR
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert td.vm.check_extension(235) > 0, "the VM is not dead"
