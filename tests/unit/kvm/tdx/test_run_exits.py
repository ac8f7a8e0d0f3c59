"""KVM_RUN of a TD: what is checked before the entry, and every exit that is not a TDVMCALL."""

import errno
import signal
import threading
import time

import pytest

from sim_backend.machine import Machine
from tests.unit.kvm.tdx.guest_code import EVENT_COUNT, IMAGE_GPA, S_BIT, SHARED_ALIAS, Program
from tests.unit.kvm.tdx.scripted_seam import ScriptedSeam
from tests.unit.kvm.tdx.vmm import PRIVATE, TestTd
from uapi_ctypes.errors import KvmError
from uapi_ctypes.kvm_run import KvmExit
from uapi_ctypes.tdx_leaves import SeamcallLeaf as H
from uapi_ctypes.vcpu import Vcpu

EXCEPTION_OR_NMI, EXTERNAL_INTERRUPT, TRIPLE_FAULT, SMI, EPT_VIOLATION, EPT_MISCONFIG, BUS_LOCK, NOTIFY = (
    0, 1, 2, 6, 48, 49, 74, 75,
)  # fmt: skip
NON_RECOVERABLE_VCPU = 0x4000_0001 << 32
NON_RECOVERABLE_TD = 0x6000_0002 << 32  # as module 1.5.01 has it
NOTIFY_VMEXIT = 219
EVENT_HANDLER = IMAGE_GPA + 0xA000
UNTOUCHED = 0xEEEE
EHWPOISON = 133


def failing(vcpu: Vcpu) -> int | None:
    vcpu.kvm_run.exit_reason = UNTOUCHED
    with pytest.raises(KvmError) as raised:
        vcpu.run()
    return raised.value.errno


class TestBeforeTheEntry:
    def test_an_uninitialised_boot_processor_is_einval(self, td: TestTd) -> None:
        td.enable_caps().init_vm()
        vcpu = td.create_vcpu(init=False)
        assert failing(vcpu) == errno.EINVAL
        assert vcpu.exit_reason == UNTOUCHED

    def test_an_unfinished_td_is_einval(self, td: TestTd) -> None:
        td.enable_caps().init_vm()
        vcpu = td.create_vcpu()
        assert failing(vcpu) == errno.EINVAL
        assert vcpu.exit_reason == UNTOUCHED

    def test_immediate_exit_wins_over_both(self, td: TestTd) -> None:
        td.enable_caps().init_vm()
        for vcpu in (td.create_vcpu(init=False), td.create_vcpu(1, init=False)):
            vcpu.kvm_run.immediate_exit = 1
            assert failing(vcpu) == errno.EINTR
            assert vcpu.exit_reason == UNTOUCHED

    def test_an_application_processor_that_was_never_initialised_blocks_until_a_signal(self, td: TestTd) -> None:
        td.enable_caps().init_vm()
        td.create_vcpu(init=False)
        other = td.create_vcpu(1, init=False)
        previous = signal.signal(signal.SIGALRM, lambda *_: None)
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        try:
            assert failing(other) == errno.EINTR
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, previous)
        assert other.exit_reason == KvmExit.KVM_EXIT_INTR

    def test_sync_regs_are_einval(self, td: TestTd) -> None:
        td.build(Program().done())
        td.vcpu.kvm_run.kvm_valid_regs = 1
        assert failing(td.vcpu) == errno.EINVAL
        td.vcpu.kvm_run.kvm_valid_regs = 0
        td.run_to_end()

    def test_an_argument_is_einval(self, td: TestTd) -> None:
        td.build(Program().done())
        with pytest.raises(KvmError) as raised:
            td.vcpu.ioctl(0xAE80, 1)
        assert raised.value.errno == errno.EINVAL


class TestModuleAnswers:
    @pytest.fixture
    def td(self, seam: ScriptedSeam, td: TestTd) -> TestTd:
        return td.build(Program().done())

    def internal_error(self, td: TestTd) -> list[int]:
        assert td.vcpu.run() == KvmExit.KVM_EXIT_INTERNAL_ERROR
        internal = td.vcpu.kvm_run.internal
        assert (internal.suberror, internal.ndata) == (4, 2)
        assert internal.data[1] == td.ops.vm.vcpus[0].lp
        return list(internal.data)[:2]

    def test_busy_enters_again_silently(self, seam: ScriptedSeam, td: TestTd) -> None:
        for _ in range(3):
            seam.td_exit(0x8000_0200 << 32 | 0x92)
        td.run_to_end()
        assert seam.leaves().count(H.TDH_VP_ENTER) == 4

    def test_a_seamcall_that_was_not_executed_bugs_the_vm(self, seam: ScriptedSeam, td: TestTd) -> None:
        seam.td_exit(0x8000_FF00 << 32 | 6)
        assert self.internal_error(td)[0] == 0x8000_FF00 << 32 | 6
        assert failing(td.vcpu) == errno.EIO

    @pytest.mark.parametrize("upper", [0, 0x4000_0001, 0x4000_0002, 0x6000_0005, 0x6000_0007])
    def test_a_failed_entry_with_a_status_that_kvm_knows(self, seam: ScriptedSeam, td: TestTd, upper: int) -> None:
        seam.td_exit(upper << 32 | 1 << 31 | 33)
        assert td.vcpu.run() == KvmExit.KVM_EXIT_FAIL_ENTRY
        assert td.vcpu.kvm_run.fail_entry.hardware_entry_failure_reason == 1 << 31 | 33
        assert td.vcpu.kvm_run.fail_entry.cpu < td.machine.profile.n_cpus

    @pytest.mark.parametrize(
        "status", [NON_RECOVERABLE_TD | 1 << 31 | 33, 0xE000_0007 << 32 | 1 << 31, 0xC000_0700 << 32]
    )
    def test_a_fatal_status_that_kvm_does_not_know_is_an_internal_error(
        self, seam: ScriptedSeam, td: TestTd, status: int
    ) -> None:
        seam.td_exit(status)
        assert self.internal_error(td)[0] == status
        td.run_to_end()

    @pytest.mark.parametrize("reason", [EXTERNAL_INTERRUPT, EPT_VIOLATION, 77])
    @pytest.mark.parametrize("upper", [0x4000_0001, 0x6000_0005, 0x8000_0000, 0xC000_0100])
    def test_an_error_is_an_internal_error_whatever_exit_reason_is_in_it(
        self, seam: ScriptedSeam, td: TestTd, upper: int, reason: int
    ) -> None:
        seam.td_exit(upper << 32 | reason, r8=0x3000)
        assert self.internal_error(td)[0] == upper << 32 | reason

    def test_an_unknown_reason_is_an_internal_error(self, seam: ScriptedSeam, td: TestTd) -> None:
        seam.td_exit(55)
        assert self.internal_error(td)[0] == 55

    def test_a_triple_fault_is_a_shutdown(self, seam: ScriptedSeam, td: TestTd) -> None:
        seam.td_exit(NON_RECOVERABLE_VCPU | TRIPLE_FAULT)
        assert td.vcpu.run() == KvmExit.KVM_EXIT_SHUTDOWN

    @pytest.mark.parametrize("info", [1 << 31 | 2 << 8 | 2, 1 << 31 | 3 << 8 | 18])
    def test_nmis_and_machine_checks_are_the_hosts(self, seam: ScriptedSeam, td: TestTd, info: int) -> None:
        seam.td_exit(EXCEPTION_OR_NMI, r9=info)
        td.run_to_end()

    def test_another_exception_goes_to_user_space_without_its_error_code(self, seam: ScriptedSeam, td: TestTd) -> None:
        seam.td_exit(EXCEPTION_OR_NMI, r9=1 << 31 | 1 << 11 | 3 << 8 | 14)
        td.vcpu.kvm_run.ex.error_code = 7
        assert td.vcpu.run() == KvmExit.KVM_EXIT_EXCEPTION
        assert (td.vcpu.kvm_run.ex.exception, td.vcpu.kvm_run.ex.error_code) == (14, 0)

    @pytest.mark.parametrize("reason", [EXTERNAL_INTERRUPT, SMI])
    def test_host_events_are_silent(self, seam: ScriptedSeam, td: TestTd, reason: int) -> None:
        seam.td_exit(reason)
        td.run_to_end()

    def test_an_ept_misconfiguration_bugs_the_vm(self, seam: ScriptedSeam, td: TestTd) -> None:
        seam.td_exit(EPT_MISCONFIG)
        assert failing(td.vcpu) == errno.EIO
        assert failing(td.vcpu) == errno.EIO

    def test_a_misconfiguration_is_known_by_the_whole_status_only(self, seam: ScriptedSeam, td: TestTd) -> None:
        seam.td_exit(EPT_MISCONFIG | 1 << 16)
        assert self.internal_error(td)[0] == EPT_MISCONFIG | 1 << 16
        td.run_to_end()

    def test_an_instruction_fetch_from_shared_memory_bugs_the_vm(self, seam: ScriptedSeam, td: TestTd) -> None:
        seam.td_exit(EPT_VIOLATION, rcx=4, r8=S_BIT)
        assert failing(td.vcpu) == errno.EIO
        assert failing(td.vcpu) == errno.EIO

    @pytest.mark.parametrize(("machine", "known"), [("7.3", True), ("7.2", False)], indirect=["machine"])
    def test_bus_locks_exit_since_7_3(self, seam: ScriptedSeam, td: TestTd, known: bool) -> None:
        seam.td_exit(BUS_LOCK)
        if known:
            assert td.vcpu.run() == KvmExit.KVM_EXIT_X86_BUS_LOCK
            assert td.vcpu.kvm_run.flags & 2
        else:
            self.internal_error(td)

    def test_a_bus_lock_seen_during_another_exit_is_reported_with_it(self, seam: ScriptedSeam, td: TestTd) -> None:
        seam.td_exit(EXTERNAL_INTERRUPT | 1 << 26)
        assert td.vcpu.run() == KvmExit.KVM_EXIT_X86_BUS_LOCK
        assert td.vcpu.kvm_run.flags & 2
        seam.td_exit(77 | 1 << 26, r11=30, r12=4, r13=1, r14=0x40, r15=9)
        assert td.vcpu.run() == KvmExit.KVM_EXIT_IO
        assert td.vcpu.kvm_run.flags & 2
        td.run_to_end()
        assert not td.vcpu.kvm_run.flags & 2

    @pytest.mark.parametrize(("machine", "known"), [("7.3", True), ("7.2", False)], indirect=["machine"])
    def test_an_invalid_context_is_notified_since_7_3(self, seam: ScriptedSeam, td: TestTd, known: bool) -> None:
        seam.td_exit(NOTIFY, rcx=1)
        if known:
            assert td.vcpu.run() == KvmExit.KVM_EXIT_NOTIFY
            assert td.vcpu.kvm_run.notify.flags == 1
        else:
            self.internal_error(td)

    @pytest.mark.parametrize("machine", ["7.3"], indirect=True)
    def test_a_valid_notification_is_user_spaces_when_it_wants_it(self, seam: ScriptedSeam, machine: Machine) -> None:
        with TestTd(machine) as td:
            td.vm.enable_cap(NOTIFY_VMEXIT, 0x1000 << 32 | 1 | 2)
            td.build(Program().done())
            seam.td_exit(NOTIFY, rcx=0)
            assert td.vcpu.run() == KvmExit.KVM_EXIT_NOTIFY
            assert td.vcpu.kvm_run.notify.flags == 0
            td.run_to_end()

    def test_a_valid_notification_without_the_user_flag_is_silent(self, seam: ScriptedSeam, td: TestTd) -> None:
        seam.td_exit(NOTIFY, rcx=0)
        td.run_to_end()


class TestRealGuests:
    def test_a_triple_fault_disables_the_vcpu(self, td: TestTd) -> None:
        no_idt = Program().mov(0, EVENT_COUNT + 0x100).raw(bytes.fromhex("0f0118"))  # lidt of ten zero bytes
        td.build(no_idt.raw(bytes.fromhex("0f0b")))  # ud2
        assert td.vcpu.run() == KvmExit.KVM_EXIT_SHUTDOWN
        assert td.vcpu.run() == KvmExit.KVM_EXIT_INTERNAL_ERROR
        internal = td.vcpu.kvm_run.internal
        assert (internal.suberror, internal.data[0] >> 32) == (4, 0xC0000700)

    def test_a_guest_that_spins_is_left_by_a_signal(self, td: TestTd) -> None:
        td.build(Program().spin())
        previous = signal.signal(signal.SIGALRM, lambda *_: None)
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        try:
            assert failing(td.vcpu) == errno.EINTR
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, previous)
        assert td.vcpu.exit_reason == KvmExit.KVM_EXIT_INTR

    def test_shared_memory_that_cannot_be_mapped_is_efault_and_the_reason_stays_unknown(self, td: TestTd) -> None:
        td.enable_caps().init_vm().add_memory()
        td.vm.set_user_memory_region2(2, 0x20_0000, 0x1000, td.read_only_copy(td.dialect.cmd()))
        td.create_vcpu()
        # The write below goes to GPA 0x1000 | S-bit; that page of slot 1 is made unwritable first.
        td.add_image(Program().store(SHARED_ALIAS + 0x1000, 1).done()).finalize()
        td.vm.set_memory_attributes(0x1000, 0x1000, 0)
        td.low.protect(0x1000, 0x1000)
        assert failing(td.vcpu) == errno.EFAULT
        assert td.vcpu.exit_reason == KvmExit.KVM_EXIT_UNKNOWN
        td.low.protect(0x1000, 0x1000, writable=True)
        td.run_to_end()
        assert td.low.read(0x1000, 1) == b"\x01"

    @pytest.mark.parametrize("attributes", [0, PRIVATE])
    def test_an_access_of_the_wrong_kind_is_a_memory_fault(self, td: TestTd, attributes: int) -> None:
        where = SHARED_ALIAS if attributes else 0
        td.enable_caps().init_vm().add_memory()
        td.create_vcpu()
        td.add_image(Program().load(3, where + 0x5678).done()).finalize()
        td.vm.set_memory_attributes(0x5000, 0x1000, attributes)
        assert failing(td.vcpu) == errno.EFAULT
        assert td.vcpu.exit_reason == KvmExit.KVM_EXIT_MEMORY_FAULT
        fault = td.vcpu.kvm_run.memory_fault
        assert (fault.flags, fault.gpa, fault.size) == (0 if attributes else 8, 0x5000, 0x1000)

    def test_private_memory_without_a_slot_is_a_memory_fault(self, td: TestTd) -> None:
        td.build(Program().load(3, 0x1F_F000).done())
        td.vm.set_user_memory_region2(1, 0, 0, td.low.hva)
        assert failing(td.vcpu) == errno.EFAULT
        fault = td.vcpu.kvm_run.memory_fault
        assert (td.vcpu.exit_reason, fault.flags, fault.gpa) == (KvmExit.KVM_EXIT_MEMORY_FAULT, 8, 0x1F_F000)

    @pytest.mark.parametrize("attributes", [0, PRIVATE])
    def test_shared_memory_without_a_slot_is_mmio_unless_it_is_meant_to_be_private(
        self, td: TestTd, attributes: int
    ) -> None:
        """An MMIO access is a #VE in the guest, and no exit; whoever handles it may ask for one."""
        handler = Program().out(0x55, 1).spin()
        td.enable_caps().init_vm().add_memory()
        td.create_vcpu()
        write = td.image_source.write

        def with_handler(data: bytes, offset: int = 0) -> None:
            at = EVENT_HANDLER - IMAGE_GPA
            write(data[:at] + handler.code + data[at + len(handler.code) :], offset)

        td.image_source.write = with_handler  # type: ignore[method-assign]
        td.add_image(Program().load(3, SHARED_ALIAS + 0x5678).done()).finalize()
        td.vm.set_user_memory_region2(1, 0, 0, td.low.hva)
        td.vm.set_memory_attributes(0x5000, 0x1000, attributes)
        if attributes:
            assert failing(td.vcpu) == errno.EFAULT
            fault = td.vcpu.kvm_run.memory_fault
            assert (td.vcpu.exit_reason, fault.flags, fault.gpa) == (KvmExit.KVM_EXIT_MEMORY_FAULT, 0, 0x5000)
        else:
            assert td.vcpu.run() == KvmExit.KVM_EXIT_IO
            assert td.vcpu.kvm_run.io.port == 0x55

    def test_private_memory_whose_file_is_closed_is_a_memory_fault(self, td: TestTd) -> None:
        td.build(Program().load(3, 0x3000).done())
        td.gmem1.close()
        assert failing(td.vcpu) == errno.EFAULT
        assert td.vcpu.kvm_run.memory_fault.flags == 8

    def test_a_poisoned_page_is_ehwpoison(self, td: TestTd) -> None:
        td.build(Program().load(3, 0x3000).done())
        td.machine.host.vms[-1].gmems[1].poisoned.add(3)
        assert failing(td.vcpu) == EHWPOISON
        assert td.vcpu.kvm_run.memory_fault.gpa == 0x3000

    def test_no_host_page_left_is_enomem(self, td: TestTd) -> None:
        td.build(Program().load(3, 0x3000).done())
        pages = td.machine.pages
        pages.limit_pages = pages.in_use
        try:
            assert failing(td.vcpu) == errno.ENOMEM
        finally:
            pages.limit_pages = pages.total_pages

    def test_an_unaccepted_page_with_sept_ve_disabled_kills_the_vm(self, td: TestTd) -> None:
        td.build(Program().load(3, 0x3000).done(), attributes=1 << 28)
        assert failing(td.vcpu) == errno.EIO
        assert failing(td.vcpu) == errno.EIO

    def test_several_vcpus_run_at_the_same_time(self, td: TestTd) -> None:
        td.build(Program().spin(), n_vcpus=3)
        errors: list[int | None] = []

        def run(vcpu: Vcpu) -> None:
            errors.append(failing(vcpu))

        threads = [threading.Thread(target=run, args=(vcpu,)) for vcpu in td.vcpus]
        for thread in threads:
            thread.start()
        time.sleep(0.1)
        previous = signal.signal(signal.SIGUSR2, lambda *_: None)
        for vcpu in td.vcpus:
            vcpu.kvm_run.immediate_exit = 1
        for thread in threads:
            signal.pthread_kill(thread.ident or 0, signal.SIGUSR2)
        for thread in threads:
            thread.join(5)
            assert not thread.is_alive()
        signal.signal(signal.SIGUSR2, previous)
        assert errors == [errno.EINTR] * 3
