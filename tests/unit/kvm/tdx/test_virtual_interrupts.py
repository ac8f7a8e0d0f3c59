"""Interrupts of a TD from where they arise to the guest's handler, and the x2APIC registers that the guest has."""

import os
import struct
import threading
from collections.abc import Callable
from typing import Self

import pytest

from sim_backend.cpu.virtual_apic import (
    IA32_X2APIC_EOI,
    IA32_X2APIC_IRR0,
    IA32_X2APIC_ISR0,
    IA32_X2APIC_PPR,
    IA32_X2APIC_SELF_IPI,
    IA32_X2APIC_TPR,
)
from tests.unit.kvm.tdx.guest_code import EVENT_COUNT, IMAGE_GPA, R10, RAX, RBX, Program
from tests.unit.kvm.tdx.vmm import TestTd
from uapi_ctypes.kvm import KvmIrqRoutingEntry
from uapi_ctypes.kvm_run import KvmExit

pytestmark = pytest.mark.parametrize("machine", ["7.3", "6.16", "v17"], indirect=True)

HLT, WRMSR = 12, 32
SPIV = 0x80F
HALTED = 3
CLI, STI, NOP = b"\xfa", b"\xfb", b"\x90"
MSI_BASE = 0xFEE0_0000
MSI_ROUTE = 2
IDT = IMAGE_GPA + 0x9000
LOG = IMAGE_GPA + 0xA900  # how many, then a byte each
APIC_WRITE = 56
TDG_VP_VEINFO_GET = 3


class InterruptProgram(Program):
    """A program with handlers of its own, each of which logs its vector; the APIC is on from the start."""

    def __init__(self) -> None:
        super().__init__()
        self.vmcall(WRMSR, SPIV, 0x1FF)

    def log(self, what: int) -> Self:
        """Append a byte to the log (clobbers RAX, RCX)."""
        return self.mov(RAX, LOG).raw(bytes.fromhex("488b08 c6440808") + bytes((what,)) + bytes.fromhex("48ff00"))

    def wrmsr(self, msr: int, value: int) -> Self:
        """WRMSR (clobbers RAX, RCX, RDX)."""
        return self.raw(struct.pack("<BIBI", 0xB9, msr, 0xB8, value) + bytes.fromhex("31d2 0f30"))

    def rdmsr(self, register: int, msr: int) -> Self:
        """MOV the MSR's lower half to a register (clobbers RAX, RCX, RDX)."""
        return self.raw(struct.pack("<BI", 0xB9, msr) + bytes.fromhex("0f32")).copy(register, RAX)

    def handler(self, vector: int, inside: Callable[["InterruptProgram"], object] | None = None) -> Self:
        """Handle `vector`: log it, do what `inside` appends, EOI, return."""
        body = InterruptProgram.__new__(InterruptProgram)
        Program.__init__(body)
        body.raw(bytes.fromhex("50 51 52")).log(vector)
        if inside is not None:
            inside(body)
        body.wrmsr(IA32_X2APIC_EOI, 0).raw(bytes.fromhex("5a 59 58 48cf"))
        # The handler's address, behind the jump over it, goes to the gate; all code has the same bits 63:16.
        gate = IDT + 16 * vector
        jump = b"\xe9" + struct.pack("<i", len(body.code))
        setup = b"\x48\xb9" + struct.pack("<Q", gate) + b"\x66\x89\x01"  # mov rcx, gate; mov [rcx], ax
        lea = b"\x48\x8d\x05" + struct.pack("<i", len(setup) + len(jump))
        return self.raw(lea + setup + jump + body.code)

    def report_log(self) -> Self:
        """Report how many interrupts were logged, and the first eight as bytes from low to high."""
        return self.load(RBX, LOG).report(RBX).load(RBX, LOG + 8).report(RBX)


def logged(*vectors: int) -> list[int]:
    """Return what `report_log` reports."""
    return [len(vectors), int.from_bytes(bytes(vectors), "little")]


def in_the_background(action: Callable[[], object], delay_s: float = 0.03) -> threading.Timer:
    timer = threading.Timer(delay_s, action)
    timer.start()
    return timer


def wait_for_log() -> bytes:
    """Spin until something is logged: mov rax, LOG; cmp qword [rax], 0; je -6."""
    return b"\x48\xb8" + struct.pack("<Q", LOG) + bytes.fromhex("48833800 74fa")


def test_an_msi_that_came_while_the_vcpu_was_out_is_handled_at_the_next_entry(td: TestTd) -> None:
    td.build(InterruptProgram().handler(0x41).raw(STI).out(0x40, 1).report_log().done())
    assert td.run() == KvmExit.KVM_EXIT_IO
    assert td.vm.signal_msi(MSI_BASE, 0x41) == 1
    assert td.run_to_end() == logged(0x41)


def test_an_msi_reaches_a_running_vcpu(td: TestTd) -> None:
    td.build(InterruptProgram().handler(0x41).raw(STI).out(0x40, 1).raw(wait_for_log()).report_log().done())
    assert td.run() == KvmExit.KVM_EXIT_IO
    timer = in_the_background(lambda: td.vm.signal_msi(MSI_BASE, 0x41))
    assert td.run_to_end() == logged(0x41)
    timer.join()


def test_every_msi_to_a_running_vcpu_arrives_whenever_it_comes(td: TestTd) -> None:
    loop = Program().raw(wait_for_log()).store(LOG, 0).out(0x40, 1).code
    program = InterruptProgram().handler(0x41).raw(STI).out(0x40, 1).raw(loop)
    td.build(program.raw(b"\xe9" + struct.pack("<i", -len(loop) - 5)))
    assert td.run() == KvmExit.KVM_EXIT_IO
    for number in range(30):
        timer = in_the_background(lambda: td.vm.signal_msi(MSI_BASE, 0x41), 0.0003 * number)
        assert td.run() == KvmExit.KVM_EXIT_IO
        timer.join()


def test_the_higher_priority_goes_first_and_the_lower_after_its_eoi(td: TestTd) -> None:
    program = InterruptProgram().handler(0x41).handler(0x81).handler(0x83).out(0x40, 1).raw(STI + NOP + NOP)
    td.build(program.report_log().done())
    assert td.run() == KvmExit.KVM_EXIT_IO
    for vector in (0x41, 0x83, 0x81):
        assert td.vm.signal_msi(MSI_BASE, vector) == 1
    assert td.run_to_end() == logged(0x83, 0x81, 0x41)


def test_a_handler_that_enables_interrupts_is_interrupted_by_a_higher_class_only(td: TestTd) -> None:
    def inside(body: InterruptProgram) -> None:
        body.raw(STI).wrmsr(IA32_X2APIC_SELF_IPI, 0x4F).wrmsr(IA32_X2APIC_SELF_IPI, 0x51).log(0xEE).raw(CLI)

    program = InterruptProgram().handler(0x41, inside).handler(0x4F).handler(0x51).raw(STI)
    td.build(program.wrmsr(IA32_X2APIC_SELF_IPI, 0x41).report_log().done())
    assert td.run_to_end() == logged(0x41, 0x51, 0xEE, 0x4F)


def test_a_self_ipi_is_not_kvms_business(td: TestTd) -> None:
    td.build(InterruptProgram().handler(0x41).raw(STI).wrmsr(IA32_X2APIC_SELF_IPI, 0x41).report_log().done())
    assert td.run_to_end() == logged(0x41)
    assert not td.ops.vm.vcpus[0].vendor.interrupt_since_halt


def test_a_self_ipi_of_a_reserved_vector_is_a_ve(td: TestTd) -> None:
    program = InterruptProgram().wrmsr(IA32_X2APIC_SELF_IPI, 5).tdcall(TDG_VP_VEINFO_GET).copy(RBX, 1)
    td.build(program.copy(R10, 2).report(RBX, R10).load(RBX, EVENT_COUNT).report(RBX).done())
    assert td.run_to_end() == [APIC_WRITE, 0x3F0, 1]


def test_the_tpr_holds_interrupts_back_until_it_is_lowered(td: TestTd) -> None:
    program = InterruptProgram().handler(0x41).raw(STI).wrmsr(IA32_X2APIC_TPR, 0x40).out(0x40, 1)
    program.load(RBX, LOG).report(RBX).rdmsr(RBX, IA32_X2APIC_IRR0 + 2).report(RBX).rdmsr(RBX, IA32_X2APIC_PPR)
    td.build(program.report(RBX).wrmsr(IA32_X2APIC_TPR, 0x30).report_log().done())
    assert td.run() == KvmExit.KVM_EXIT_IO
    assert td.vm.signal_msi(MSI_BASE, 0x41) == 1
    assert td.run_to_end() == [0, 1 << 0x41 - 64, 0x40, *logged(0x41)]


def test_the_guest_sees_in_isr_what_it_handles(td: TestTd) -> None:
    def inside(body: InterruptProgram) -> None:
        body.rdmsr(RBX, IA32_X2APIC_ISR0 + 2)

    program = InterruptProgram().handler(0x41, inside).raw(STI).wrmsr(IA32_X2APIC_SELF_IPI, 0x41).report(RBX)
    td.build(program.rdmsr(RBX, IA32_X2APIC_ISR0 + 2).report(RBX).done())
    assert td.run_to_end() == [1 << 0x41 - 64, 0]


def test_with_if_clear_an_interrupt_waits_for_sti(td: TestTd) -> None:
    program = InterruptProgram().handler(0x41).out(0x40, 1).load(RBX, LOG).report(RBX).raw(STI + NOP + NOP)
    td.build(program.report_log().done())
    assert td.run() == KvmExit.KVM_EXIT_IO
    assert td.vm.signal_msi(MSI_BASE, 0x41) == 1
    assert td.run_to_end() == [0, *logged(0x41)]


def test_an_interrupt_wakes_a_halted_vcpu_and_is_handled(td: TestTd) -> None:
    td.build(InterruptProgram().handler(0x41).raw(STI).out(0x40, 1).vmcall(HLT, 0).report(R10).report_log().done())
    assert td.run() == KvmExit.KVM_EXIT_IO
    timer = in_the_background(lambda: td.vm.signal_msi(MSI_BASE, 0x41))
    assert td.run_to_end() == [0, *logged(0x41)]
    timer.join()


def test_an_interrupt_that_waits_for_if_keeps_the_vcpu_from_halting(td: TestTd) -> None:
    """The kernel's idle loop: HLT is asked for with IF clear, and interrupts are enabled after it."""
    program = InterruptProgram().handler(0x41).out(0x40, 1).out(0x41, 1)  # the second entry has taken it to VIRR
    td.build(program.vmcall(HLT, 0).raw(STI + NOP + NOP).report_log().done())
    assert td.run() == KvmExit.KVM_EXIT_IO
    assert td.vm.signal_msi(MSI_BASE, 0x41) == 1
    assert td.run() == KvmExit.KVM_EXIT_IO
    descriptor = td.ops.vm.vcpus[0].vendor.pi_descriptor >> 3
    assert not any(td.machine.memory.q[descriptor : descriptor + 5]), "nothing is posted any more"
    assert td.run_to_end() == logged(0x41)


def test_an_irqfd_interrupts_the_guest(td: TestTd) -> None:
    td.build(InterruptProgram().handler(0x61).raw(STI).out(0x40, 1).raw(wait_for_log()).report_log().done())
    route = KvmIrqRoutingEntry(gsi=5, type=MSI_ROUTE)
    route.u[0], route.u[2] = MSI_BASE, 0x61
    td.vm.set_gsi_routing([route])
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    td.vm.irqfd(fd, 5)
    assert td.run() == KvmExit.KVM_EXIT_IO
    timer = in_the_background(lambda: os.eventfd_write(fd, 1))
    assert td.run_to_end() == logged(0x61)
    timer.join()
    os.close(fd)


def test_an_ipi_through_the_host_interrupts_the_other_vcpu(td: TestTd) -> None:
    """The first waits in a loop, the second sends it an IPI by TDVMCALL. RSI is the index at reset."""
    icr = 0 << 32 | 0x55
    program = InterruptProgram().handler(0x55).raw(STI).out(0x40, 1)
    sender = Program().vmcall(WRMSR, 0x830, icr).done().code
    program.raw(bytes.fromhex("4885f6 0f84") + struct.pack("<i", len(sender)) + sender)  # test rsi, rsi; jz
    td.build(program.raw(wait_for_log()).report_log().done(), n_vcpus=2)
    for vcpu in td.vcpus:
        assert td.run(vcpu) == KvmExit.KVM_EXIT_IO
    timer = in_the_background(lambda: td.vcpus[1].run())
    assert td.run_to_end() == logged(0x55)
    timer.join()
