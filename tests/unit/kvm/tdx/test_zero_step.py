"""The module's defence against zero-stepping, seen from user space: who is suspected, and what that costs.

After more than six EPT violations at one instruction TDH.VP.ENTER lists the GPAs and reports the fault instead of
entering, as long as a Secure EPT walk to one of them fails. In 1.5.01 every entry suppresses #VE, so a pending page
still counts: only another vCPU can accept it then.
"""

import signal
from collections.abc import Iterator

import pytest

from tests.unit.kvm.tdx.guest_code import IMAGE_GPA, R9, TDG_MEM_PAGE_ACCEPT, Program
from tests.unit.kvm.tdx.vmm import PRIVATE, TestTd
from uapi_ctypes.errors import KvmError

PAGE = 0x1000
GPA = 0x7000
END = 0x2_4000
HANDLER = IMAGE_GPA + 0xA000
FAULTS_BEFORE_SUSPICION = 6
SAVED = tuple(bytes.fromhex(push) for push in ("50", "51", "52", "4150", "4151", "4152"))
RESTORED = tuple(bytes.fromhex(pop) for pop in ("415a", "4159", "4158", "5a", "59", "58"))
ACCEPT_FROM_VE = (
    b"".join(SAVED)
    + bytes.fromhex("b803000000 660f01cc")  # TDG.VP.VEINFO.GET: R9 is the GPA
    + bytes.fromhex("4c89c9 4881e100f0ffff b806000000 660f01cc")  # TDG.MEM.PAGE.ACCEPT of its page
    + b"".join(RESTORED)
    + bytes.fromhex("48cf")
)
LOOP_BOUNDS = bytes.fromhex("49c7c100000100")  # twenty pages to END
ACCEPT_LOOP = LOOP_BOUNDS + bytes.fromhex("4c89c9 b806000000 660f01cc 4981c100100000 4981f900400200 75e4")
STORE_LOOP = LOOP_BOUNDS + bytes.fromhex("458909 4981c100100000 4981f900400200 75ed")


@pytest.fixture
def alarm() -> Iterator[None]:
    """Interrupt a KVM_RUN that does not come back."""
    previous = signal.signal(signal.SIGALRM, lambda *_: None)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, previous)


def build(td: TestTd, program: Program, n_vcpus: int = 1) -> None:
    """Make the TD's #VE handler accept the page that it is told of."""
    td.enable_caps().init_vm().add_memory()
    for vcpu_id in range(n_vcpus):
        td.create_vcpu(vcpu_id)
    write = td.image_source.write

    def with_handler(data: bytes, offset: int = 0) -> None:
        at = HANDLER - IMAGE_GPA
        write(data[:at] + ACCEPT_FROM_VE + data[at + len(ACCEPT_FROM_VE) :], offset)

    td.image_source.write = with_handler  # type: ignore[method-assign]
    td.add_image(program).finalize()


@pytest.mark.parametrize("loop", [ACCEPT_LOOP, STORE_LOOP], ids=["TDG.MEM.PAGE.ACCEPT", "store, accepted in #VE"])
def test_a_loop_over_many_pages_at_one_instruction_runs_to_its_end(td: TestTd, alarm: None, loop: bytes) -> None:
    build(td, Program().raw(loop).report(R9).done())
    signal.setitimer(signal.ITIMER_REAL, 20)
    assert td.run_to_end() == [END]


def fault(td: TestTd) -> int:
    """Run into the memory fault and leave it unresolved; return its GPA."""
    with pytest.raises(KvmError, match="EFAULT"):
        td.vcpu.run()
    return int(td.vcpu.kvm_run.memory_fault.gpa)


def test_a_vmm_that_resolves_a_fault_in_time_is_not_suspected(td: TestTd, alarm: None) -> None:
    build(td, Program().store(GPA, 1).done())
    td.vm.set_memory_attributes(GPA, PAGE, 0)
    assert {fault(td) for _ in range(FAULTS_BEFORE_SUSPICION - 1)} == {GPA}
    td.vm.set_memory_attributes(GPA, PAGE, PRIVATE)
    signal.setitimer(signal.ITIMER_REAL, 20)
    td.run_to_end()


def test_a_vmm_that_let_a_vcpu_fault_too_often_needs_another_vcpu_to_accept_the_page(td: TestTd, alarm: None) -> None:
    other = Program().tdcall(TDG_MEM_PAGE_ACCEPT, rcx=GPA).done()
    build(td, Program().raw(b"\x48\x85\xf6\x74" + bytes([len(other.code)])).raw(other.code).store(GPA, 1).done(), 2)
    td.vm.set_memory_attributes(GPA, PAGE, 0)
    assert {fault(td) for _ in range(FAULTS_BEFORE_SUSPICION + 2)} == {GPA}
    td.vm.set_memory_attributes(GPA, PAGE, PRIVATE)

    signal.setitimer(signal.ITIMER_REAL, 0.1)
    with pytest.raises(KvmError, match="EINTR"):  # KVM finds the page mapped and enters again, for ever
        td.vcpu.run()
    signal.setitimer(signal.ITIMER_REAL, 20)
    td.run_to_end(td.vcpus[1])
    td.run_to_end()
