"""What KVM_RUN of a TD looks at before the guest is entered: the first thing that is wrong decides."""

import ctypes
import errno
import signal

import pytest

from tests.unit.kvm.tdx.guest_code import R10, R11, Program
from tests.unit.kvm.tdx.scripted_seam import ScriptedSeam
from tests.unit.kvm.tdx.vmm import TestTd, error_of
from uapi_ctypes.errors import KvmError
from uapi_ctypes.kvm_run import KvmExit
from uapi_ctypes.tdx_leaves import SeamcallLeaf as H
from uapi_ctypes.vcpu import Vcpu

IO, GET_QUOTE = 30, 0x10002
INIT_RECEIVED, UNINITIALIZED, RUNNABLE = 2, 1, 0
BUS_LOCK_FLAG = 2
UNTOUCHED = 0xEEEE


def refused(vcpu: Vcpu) -> tuple[int, int]:
    """Run; return the errno and the exit reason that was left."""
    vcpu.kvm_run.exit_reason = UNTOUCHED
    return error_of(vcpu.run), int(vcpu.exit_reason)


@pytest.fixture
def td(seam: ScriptedSeam, td: TestTd) -> TestTd:
    return td.build(Program().vmcall(IO, 4, 0, 0x40).report(R10, R11).done(), n_vcpus=2)


def entries(seam: ScriptedSeam) -> int:
    return seam.leaves().count(H.TDH_VP_ENTER)


def test_an_uninitialised_state_comes_before_sync_regs(td: TestTd, seam: ScriptedSeam) -> None:
    td.vcpu.set_mp_state(UNINITIALIZED)
    td.vcpu.kvm_run.kvm_valid_regs = 1
    td.vcpu.kvm_run.immediate_exit = 1
    assert refused(td.vcpu) == (errno.EINTR, UNTOUCHED)


@pytest.mark.parametrize("field", ["kvm_valid_regs", "kvm_dirty_regs"])
@pytest.mark.parametrize("bits", [1, 7, 1 << 63])
def test_sync_regs_come_before_the_completion_and_immediate_exit(td: TestTd, field: str, bits: int) -> None:
    assert td.vcpu.run() == KvmExit.KVM_EXIT_IO
    td.vcpu.io_data()[:] = b"\x01\x02\x03\x04"
    td.vcpu.kvm_run.immediate_exit = 1
    setattr(td.vcpu.kvm_run, field, bits)
    assert refused(td.vcpu) == (errno.EINVAL, UNTOUCHED)
    setattr(td.vcpu.kvm_run, field, 0)
    td.vcpu.kvm_run.immediate_exit = 0
    assert td.run_to_end() == [0, 0x04030201], "the completion is still to come"


def test_the_completion_comes_before_immediate_exit(td: TestTd) -> None:
    assert td.vcpu.run() == KvmExit.KVM_EXIT_IO
    td.vcpu.io_data()[:] = b"\x01\x02\x03\x04"
    td.vcpu.kvm_run.immediate_exit = 1
    assert refused(td.vcpu) == (errno.EINTR, UNTOUCHED)
    td.vcpu.io_data()[:] = bytes(4)
    td.vcpu.kvm_run.immediate_exit = 0
    assert td.run_to_end() == [0, 0x04030201]


def test_immediate_exit_comes_before_the_tds_own_checks(td: TestTd) -> None:
    td.vcpu.set_mp_state(INIT_RECEIVED)
    td.vcpu.kvm_run.immediate_exit = 1
    assert refused(td.vcpu) == (errno.EINTR, UNTOUCHED)
    td.vcpu.kvm_run.immediate_exit = 0
    assert refused(td.vcpu) == (errno.EINVAL, UNTOUCHED)


def test_nothing_of_this_enters_the_guest(td: TestTd, seam: ScriptedSeam) -> None:
    before = entries(seam)
    td.vcpu.kvm_run.immediate_exit = 1
    refused(td.vcpu)
    td.vcpu.kvm_run.immediate_exit = 0
    td.vcpu.set_mp_state(INIT_RECEIVED)
    refused(td.vcpu)
    assert entries(seam) == before


def test_a_signal_that_is_pending_and_let_through_ends_the_call_before_the_guest_runs(
    td: TestTd, seam: ScriptedSeam
) -> None:
    before = entries(seam)
    previous = signal.signal(signal.SIGUSR1, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    td.vcpu.set_signal_mask(bytes(8))
    try:
        signal.raise_signal(signal.SIGUSR1)
        assert refused(td.vcpu) == (errno.EINTR, KvmExit.KVM_EXIT_INTR)
        assert entries(seam) == before
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
        signal.signal(signal.SIGUSR1, previous)
    td.vcpu.set_signal_mask(None)
    assert td.vcpu.run() == KvmExit.KVM_EXIT_IO


def test_the_flags_are_cleared_by_every_call(td: TestTd) -> None:
    td.vcpu.kvm_run.flags = BUS_LOCK_FLAG
    td.vcpu.kvm_run.immediate_exit = 1
    refused(td.vcpu)
    assert td.vcpu.kvm_run.flags == 0


def test_a_completion_may_fail_and_is_not_repeated(td: TestTd, seam: ScriptedSeam) -> None:
    """`hypercall.ret` of MapGPA is the one answer that can be wrong."""
    gpa = 0x7000
    seam.td_exit(77, r11=0x10001, r12=gpa, r13=0x1000)
    assert td.vcpu.run() == KvmExit.KVM_EXIT_HYPERCALL
    td.vcpu.kvm_run.hypercall.ret = 99
    assert refused(td.vcpu) == (errno.EINVAL, UNTOUCHED)
    assert td.vcpu.run() == KvmExit.KVM_EXIT_IO


def test_a_dead_vm_is_eio_whatever_else_is_wrong(td: TestTd, seam: ScriptedSeam) -> None:
    seam.td_exit(49)
    assert refused(td.vcpu) == (errno.EIO, KvmExit.KVM_EXIT_UNKNOWN)
    td.vcpu.kvm_run.immediate_exit = 1
    assert refused(td.vcpu) == (errno.EIO, UNTOUCHED)
    with pytest.raises(KvmError) as raised:
        td.vcpu.ioctl(0xAE80, 1)
    assert raised.value.errno == errno.EIO


def test_a_vcpu_that_runs_leaves_with_eio_when_its_vm_dies(td: TestTd, seam: ScriptedSeam) -> None:
    seam.td_exit(1)  # an external interrupt, during which the other vCPU's exit bugs the VM
    issue = seam.execute

    def die_meanwhile(lp: int, regs: list[int]) -> None:
        issue(lp, regs)
        if seam.calls[-1].leaf == H.TDH_VP_ENTER:
            td.ops.vm.bug()

    seam.hook = die_meanwhile
    assert refused(td.vcpu) == (errno.EIO, KvmExit.KVM_EXIT_UNKNOWN)


def test_the_run_page_shows_no_register_of_a_td(td: TestTd) -> None:
    run = td.vcpu.kvm_run
    assert td.vcpu.run() == KvmExit.KVM_EXIT_IO
    assert (run.if_flag, run.cr8) == (0, 0)
    assert bytes((ctypes.c_uint8 * 2048).from_buffer(td.vcpu.run_area.memory, 304)) == bytes(2048)
