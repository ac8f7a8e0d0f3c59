"""KVM's own hypercalls, which a TD makes by a TDVMCALL with R10 ≠ 0: arguments in R11 to R14, the result in R10."""

import signal
import struct
import time

import pytest

from tests.unit.kvm.tdx.guest_code import R10, S_BIT, VMCALL_MASK, Program
from tests.unit.kvm.tdx.vmm import EXIT_HYPERCALL, TestTd, cpuid_entry
from uapi_ctypes.kvm_run import KvmExit
from uapi_ctypes.kvm_state import KvmCpuid2, KvmMsrEntry, KvmMsrs
from uapi_ctypes.vcpu import Vcpu

VAPIC_POLL_IRQ, KICK_CPU, CLOCK_PAIRING, SEND_IPI, SCHED_YIELD, MAP_GPA_RANGE = 1, 5, 9, 10, 11, 12
ENFORCE_PV_FEATURE_CPUID = 190
HLT, SPIV = 12, 0x80F
U64 = (1 << 64) - 1
ENOSYS = -1000 & U64
OFFERED_BY = {KICK_CPU: 7, SEND_IPI: 11, SCHED_YIELD: 13}  # bits of KVM's feature leaf


def call(number: int, *arguments: int) -> Program:
    """Make the hypercall and report its result."""
    named = dict(zip(("r11", "r12", "r13", "r14"), (*arguments, 0, 0, 0, 0), strict=False))
    return Program().tdcall(0, rcx=VMCALL_MASK, r10=number, **named).report(R10)


@pytest.mark.parametrize("number", [2, 3, 4, 6, 7, 8, 13, 1 << 32 | 1, U64])
def test_any_other_number_is_enosys(td: TestTd, number: int) -> None:
    td.build(call(number).done())
    assert td.run_to_end() == [ENOSYS]


class TestClockPairing:
    def test_it_is_written_through_the_slots_user_memory(self, td: TestTd) -> None:
        td.build(call(CLOCK_PAIRING, 0x5008, 0).done())
        before = time.time_ns()
        assert td.run_to_end() == [0]
        seconds, nanoseconds, _tsc, flags = struct.unpack("<qqQI", td.low.read(0x5008, 28))
        assert before <= seconds * 1_000_000_000 + nanoseconds <= time.time_ns()
        assert flags == 0

    @pytest.mark.parametrize(("gpa", "clock", "result"), [(0x5000, 1, -95), (0x4000_0000, 0, -14)])
    def test_other_clocks_and_addresses_without_memory_are_refused(
        self, td: TestTd, gpa: int, clock: int, result: int
    ) -> None:
        td.build(call(CLOCK_PAIRING, gpa, clock).done())
        assert td.run_to_end() == [result & U64]


class TestIpis:
    @pytest.mark.parametrize(("bitmap", "first", "taken"), [(0b11, 0, 2), (0b10, 0, 1), (0b1, 1, 1), (0b1, 5, 0)])
    def test_the_result_is_how_many_took_it(self, td: TestTd, bitmap: int, first: int, taken: int) -> None:
        td.build(call(SEND_IPI, bitmap, 0, first, 0x41).done(), n_vcpus=2)
        for vcpu in td.vcpus:
            assert vcpu.set_msrs(KvmMsrs.of([KvmMsrEntry(SPIV, 0, 0x1FF)])) == 1
        assert td.run_to_end() == [taken]

    @pytest.mark.parametrize("icr", [1 << 11 | 0x41, 1 << 18 | 0x41])
    def test_logical_destinations_and_shorthands_are_einval(self, td: TestTd, icr: int) -> None:
        td.build(call(SEND_IPI, 1, 0, 0, icr).done())
        assert td.run_to_end() == [-22 & U64]


def test_a_kick_wakes_a_vcpu_that_halted_with_interrupts_blocked(td: TestTd) -> None:
    kicker = call(KICK_CPU, 0, 0).done().code
    sleeper = Program().raw(bytes.fromhex("4885f6 0f84") + struct.pack("<i", len(kicker)) + kicker)  # by RSI, the index
    td.build(sleeper.out(0x40, 1).vmcall(HLT, 1).report(R10).done(), n_vcpus=2)
    assert td.run() == KvmExit.KVM_EXIT_IO
    halt(td.vcpu)
    assert td.run_to_end(td.vcpus[1]) == [0]
    assert td.run_to_end() == [0, 0]


def halt(vcpu: Vcpu) -> None:
    """Run into the halt, and come out by a signal."""
    previous = signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    try:
        with pytest.raises(OSError, match="EINTR"):
            vcpu.run()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert vcpu.get_mp_state() == 3


class TestEnforcedFeatures:
    """User space may want hypercalls to be offered by the table of KVM_SET_CPUID2 before they work."""

    def run(self, td: TestTd, number: int, features: int) -> list[int]:
        td.enable_caps().init_vm().add_memory()
        vcpu = td.create_vcpu()
        table = vcpu.get_cpuid2(16).filled()
        vcpu.set_cpuid2(KvmCpuid2.of([*table, cpuid_entry(0x4000_0001, eax=features)]))
        vcpu.enable_cap(ENFORCE_PV_FEATURE_CPUID, 1)
        td.add_image(call(number, 0, 0, 0, 0x41).done()).finalize()
        return td.run_to_end()

    @pytest.mark.parametrize("number", OFFERED_BY)
    def test_a_hypercall_that_is_not_offered_is_enosys(self, td: TestTd, number: int) -> None:
        assert self.run(td, number, ~(1 << OFFERED_BY[number]) & 0xFFFF_FFFF) == [ENOSYS]

    @pytest.mark.parametrize("number", OFFERED_BY)
    def test_one_that_is_offered_works(self, td: TestTd, number: int) -> None:
        assert self.run(td, number, 1 << OFFERED_BY[number]) == [0]

    @pytest.mark.parametrize("number", [VAPIC_POLL_IRQ, CLOCK_PAIRING])
    def test_the_others_need_no_offer(self, td: TestTd, number: int) -> None:
        assert self.run(td, number, 0) == [0]


class TestMapGpaRange:
    def test_without_the_capability_it_is_enosys(self, td: TestTd) -> None:
        td.enable_caps()
        td.vm.enable_cap(EXIT_HYPERCALL, 0)
        td.init_vm().add_memory()
        td.create_vcpu()
        td.add_image(call(MAP_GPA_RANGE, 0x1000, 1, 0).done()).finalize()
        assert td.run_to_end() == [ENOSYS]

    @pytest.mark.parametrize(("machine", "result"), [("7.3", 0x4711), ("v17", 0)], indirect=["machine"])
    def test_user_spaces_answer_never_reaches_a_guest_of_v17(self, td: TestTd, result: int) -> None:
        td.enable_caps()
        td.vm.enable_cap(EXIT_HYPERCALL, 1 << MAP_GPA_RANGE)
        td.init_vm().add_memory()
        td.create_vcpu()
        td.add_image(call(MAP_GPA_RANGE, S_BIT | 0x1000, 4096, 16).done()).finalize()
        assert td.run() == KvmExit.KVM_EXIT_HYPERCALL
        exit_ = td.vcpu.kvm_run.hypercall
        assert list(exit_.args) == [S_BIT | 0x1000, 4096, 16, 0, 0, 0], "in one piece"
        exit_.ret = 0x4711
        assert td.run_to_end() == [result]
