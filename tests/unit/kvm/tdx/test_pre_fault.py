"""KVM_PRE_FAULT_MEMORY on a TD: the order of its checks, and what is left when it stops half way."""

import errno
import signal

import pytest

from tests.unit.kvm.tdx.guest_code import S_BIT, Program
from tests.unit.kvm.tdx.scripted_seam import ScriptedSeam
from tests.unit.kvm.tdx.vmm import PRIVATE, TestTd, error_of
from uapi_ctypes.kvm import KvmPreFaultMemory
from uapi_ctypes.kvm_run import KvmExit
from uapi_ctypes.tdx_leaves import SeamcallLeaf as H

PAGE = 0x1000
PRE_FAULT_MEMORY = 0xC040AED5
EHWPOISON = 133
NOWHERE = 0x4000_0000
U64 = 1 << 64


def pre_fault(td: TestTd, gpa: int, size: int, flags: int = 0) -> tuple[int, int, int]:
    """Return the errno, and address and size as the structure shows them afterwards."""
    region = KvmPreFaultMemory(gpa, size, flags)
    return error_of(lambda: td.vcpu.pre_fault_memory(region)), region.gpa, region.size


@pytest.fixture
def td(td: TestTd) -> TestTd:
    return td.build(Program().done())


def test_an_unreadable_argument_is_efault(td: TestTd) -> None:
    assert error_of(lambda: td.vcpu.ioctl(PRE_FAULT_MEMORY, 0x10)) == errno.EFAULT


@pytest.mark.parametrize(
    ("gpa", "size", "flags"),
    [(0, PAGE, 1), (0, PAGE + 1, 0), (1, PAGE, 0), (0, 0, 0), (U64 - PAGE, 2 * PAGE, 0), (S_BIT, PAGE, 0)],
)
def test_malformed(td: TestTd, gpa: int, size: int, flags: int) -> None:
    assert pre_fault(td, gpa, size, flags) == (errno.EINVAL, gpa, size)


@pytest.mark.parametrize("gpa", [0x1_2000, S_BIT])
def test_that_it_is_too_early_comes_before_the_s_bit(td: TestTd, gpa: int) -> None:
    with TestTd(td.machine) as early:
        early.enable_caps().init_vm().add_memory()
        early.create_vcpu()
        assert pre_fault(early, gpa, PAGE) == (errno.EOPNOTSUPP, gpa, PAGE)
        assert pre_fault(early, gpa + 1, PAGE)[0] == errno.EINVAL, "and after what is malformed"


@pytest.mark.parametrize("why", ["slot", "file", "gmem"])
def test_private_memory_that_has_no_page_is_efault_with_a_memory_fault(td: TestTd, why: str) -> None:
    gpa = 0x3000 if why == "gmem" else NOWHERE
    if why == "gmem":
        td.gmem1.close()
    elif why == "file":
        td.vm.set_user_memory_region2(8, NOWHERE, PAGE, td.low.hva)
    td.vm.set_memory_attributes(NOWHERE, PAGE, PRIVATE)
    assert pre_fault(td, gpa, PAGE) == (errno.EFAULT, gpa, PAGE)
    assert td.vcpu.exit_reason == KvmExit.KVM_EXIT_MEMORY_FAULT
    fault = td.vcpu.kvm_run.memory_fault
    assert (fault.flags, fault.gpa, fault.size) == (8, gpa, PAGE)


def test_a_poisoned_page_is_ehwpoison(td: TestTd) -> None:
    td.ops.vm.gmems[1].poisoned.add(3)
    assert pre_fault(td, 0x3000, PAGE) == (EHWPOISON, 0x3000, PAGE)


class TestShared:
    def test_it_is_mapped_for_reading(self, td: TestTd) -> None:
        td.vm.set_memory_attributes(0x3000, PAGE, 0)
        assert pre_fault(td, 0x3000, PAGE) == (0, 0x4000, 0)

    def test_without_a_slot_it_is_enoent_and_no_exit(self, td: TestTd) -> None:
        td.vcpu.kvm_run.exit_reason = 0x77
        assert pre_fault(td, NOWHERE, PAGE) == (errno.ENOENT, NOWHERE, PAGE)
        assert td.vcpu.exit_reason == 0x77

    def test_without_user_memory_it_is_efault_and_no_exit(self, td: TestTd) -> None:
        td.vm.set_memory_attributes(0x3000, PAGE, 0)
        td.low.protect(0x3000, PAGE)
        td.vcpu.kvm_run.exit_reason = 0x77
        assert pre_fault(td, 0x3000, PAGE) == (errno.EFAULT, 0x3000, PAGE)
        assert td.vcpu.exit_reason == 0x77
        td.low.protect(0x3000, PAGE, writable=True)


def test_a_failure_after_some_progress_is_0_and_the_rest_shows(td: TestTd) -> None:
    td.ops.vm.gmems[1].poisoned.add(5)
    assert pre_fault(td, 0x3000, 4 * PAGE) == (0, 0x5000, 2 * PAGE)
    assert pre_fault(td, 0x5000, 2 * PAGE) == (EHWPOISON, 0x5000, 2 * PAGE)


def test_a_signal_ends_it_between_two_pages(seam: ScriptedSeam, td: TestTd) -> None:
    previous = signal.signal(signal.SIGUSR1, lambda *_: None)

    def interrupt(lp: int, regs: list[int]) -> None:
        if regs[0] == H.TDH_MEM_PAGE_AUG:
            signal.raise_signal(signal.SIGUSR1)
        seam.execute(lp, regs)

    seam.hook = interrupt
    try:
        assert pre_fault(td, 0x3000, 4 * PAGE) == (0, 0x4000, 3 * PAGE)
    finally:
        seam.hook = None
        signal.signal(signal.SIGUSR1, previous)


def test_a_signal_ends_the_wait_for_a_busy_module(seam: ScriptedSeam, td: TestTd) -> None:
    previous = signal.signal(signal.SIGUSR1, lambda *_: None)

    def busy(lp: int, regs: list[int]) -> None:
        if regs[0] == H.TDH_MEM_PAGE_AUG:
            if len(seam.calls) > 100:
                signal.raise_signal(signal.SIGUSR1)
            seam.fail(H.TDH_MEM_PAGE_AUG, 0x8000_0200 << 32)
        seam.execute(lp, regs)

    seam.calls.clear()
    seam.hook = busy
    try:
        assert pre_fault(td, 0x3000, PAGE) == (errno.EINTR, 0x3000, PAGE)
    finally:
        seam.hook = None
        signal.signal(signal.SIGUSR1, previous)


def test_a_vm_that_dies_meanwhile_is_eio(seam: ScriptedSeam, td: TestTd) -> None:
    def busy(lp: int, regs: list[int]) -> None:
        if regs[0] == H.TDH_MEM_PAGE_AUG:
            if len(seam.calls) > 100:
                td.ops.vm.die()
            seam.fail(H.TDH_MEM_PAGE_AUG, 0x8000_0200 << 32)
        seam.execute(lp, regs)

    seam.calls.clear()
    seam.hook = busy
    assert pre_fault(td, 0x3000, PAGE) == (errno.EIO, 0x3000, PAGE)
    seam.hook = None


def test_a_module_that_refuses_is_eio_and_the_end_of_the_vm(seam: ScriptedSeam, td: TestTd) -> None:
    seam.fail(H.TDH_MEM_PAGE_AUG, 0xC000_0100 << 32)
    assert pre_fault(td, 0x3000, PAGE) == (errno.EIO, 0x3000, PAGE)
    assert error_of(td.vcpu.get_mp_state) == errno.EIO


def test_a_structure_that_cannot_be_written_back_is_efault_although_the_page_is_there(
    seam: ScriptedSeam, td: TestTd
) -> None:
    seam.calls.clear()
    address = td.read_only_copy(KvmPreFaultMemory(0x3000, PAGE))
    assert error_of(lambda: td.vcpu.ioctl(PRE_FAULT_MEMORY, address)) == errno.EFAULT
    assert seam.leaves().count(H.TDH_MEM_PAGE_AUG) == 1
    assert pre_fault(td, 0x3000, PAGE) == (0, 0x4000, 0)
    assert seam.leaves().count(H.TDH_MEM_PAGE_AUG) == 1, "it is there"
