"""Halting, posted interrupts and NMIs of a TD's vCPU."""

import errno
import signal
import threading
import time

import pytest

from sim_backend.machine import Machine
from tests.unit.kvm.tdx.guest_code import EVENT_COUNT, R10, R11, RBX, Program
from tests.unit.kvm.tdx.vmm import TestTd
from uapi_ctypes.errors import KvmError
from uapi_ctypes.kvm_run import KvmExit
from uapi_ctypes.vcpu import Vcpu

HLT, RDMSR, WRMSR = 12, 31, 32
SPIV = 0x80F
HALTED, RUNNABLE = 3, 0
STI = b"\xfb"
MSI_BASE = 0xFEE0_0000


def halting(*, blocked: bool = False, enable_apic: bool = True) -> Program:
    program = Program()
    if enable_apic:
        program.vmcall(WRMSR, SPIV, 0x1FF)
    return program.out(0x40, 1).vmcall(HLT, int(blocked)).report(R10).load(RBX, EVENT_COUNT).report(RBX).done()


def run_for(vcpu: Vcpu, seconds: float) -> None:
    """Run until a signal ends KVM_RUN, which must be the only way out."""
    previous = signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        with pytest.raises(KvmError) as raised:
            vcpu.run()
        assert raised.value.errno == errno.EINTR
        assert vcpu.exit_reason == KvmExit.KVM_EXIT_INTR
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def later(action: object, seconds: float = 0.05) -> threading.Thread:
    def act() -> None:
        time.sleep(seconds)
        assert callable(action)
        action()

    thread = threading.Thread(target=act)
    thread.start()
    return thread


def test_a_halted_vcpu_sleeps_until_a_signal_and_stays_halted(td: TestTd) -> None:
    td.build(halting())
    assert td.run() == KvmExit.KVM_EXIT_IO
    run_for(td.vcpu, 0.05)
    assert td.vcpu.get_mp_state() == HALTED
    td.vcpu.set_mp_state(RUNNABLE)
    assert td.run_to_end() == [0, 0]


def test_an_msi_wakes_it_from_another_thread(td: TestTd) -> None:
    td.build(halting())
    assert td.run() == KvmExit.KVM_EXIT_IO
    taken: list[int] = []
    thread = later(lambda: taken.append(td.vm.signal_msi(MSI_BASE, 0x41)))
    assert td.run_to_end()[0] == 0
    thread.join()
    assert taken == [1]


def test_an_interrupt_that_came_before_the_halt_prevents_it(td: TestTd) -> None:
    td.build(halting())
    assert td.run() == KvmExit.KVM_EXIT_IO
    assert td.vm.signal_msi(MSI_BASE, 0x41) == 1
    assert td.run_to_end()[0] == 0


def test_an_apic_that_the_guest_did_not_enable_drops_interrupts(td: TestTd) -> None:
    td.build(halting(enable_apic=False))
    assert td.run() == KvmExit.KVM_EXIT_IO
    assert td.vm.signal_msi(MSI_BASE, 0x41) == 0
    run_for(td.vcpu, 0.05)
    assert td.vcpu.get_mp_state() == HALTED


def test_with_interrupts_blocked_only_an_nmi_wakes(td: TestTd) -> None:
    td.build(halting(blocked=True))
    assert td.run() == KvmExit.KVM_EXIT_IO
    assert td.vm.signal_msi(MSI_BASE, 0x41) == 1
    run_for(td.vcpu, 0.05)
    assert td.vcpu.get_mp_state() == HALTED
    td.vcpu.nmi()
    assert td.run_to_end() == [0, 1]


def test_only_a_halt_of_its_own_blocks_interrupts(td: TestTd, machine: Machine) -> None:
    td.build(halting(blocked=True))
    assert td.run() == KvmExit.KVM_EXIT_IO
    run_for(td.vcpu, 0.05)
    td.vcpu.nmi()
    assert td.run() == KvmExit.KVM_EXIT_IO
    td.vcpu.set_mp_state(HALTED)  # by user space, behind an exit that was no HLT
    vcpu = machine.host.vms[-1].vcpus[0]
    assert not vcpu.has_work()
    td.vm.signal_msi(MSI_BASE, 0x41)
    assert vcpu.has_work()


def test_an_enabled_interrupt_is_delivered_through_the_guests_idt(td: TestTd) -> None:
    program = Program().vmcall(WRMSR, SPIV, 0x1FF).raw(STI).out(0x40, 1).load(RBX, EVENT_COUNT).report(RBX).done()
    td.build(program)
    assert td.run() == KvmExit.KVM_EXIT_IO
    assert td.vm.signal_msi(MSI_BASE, 0x41) == 1
    assert td.run_to_end() == [1]


def test_nmis_collapse(td: TestTd) -> None:
    td.build(Program().out(0x40, 1).load(RBX, EVENT_COUNT).report(RBX).done())
    assert td.run() == KvmExit.KVM_EXIT_IO
    for _ in range(3):
        td.vcpu.nmi()
    assert td.run_to_end() == [1]


def test_an_ipi_from_the_guest_reaches_the_other_vcpu(td: TestTd) -> None:
    icr = 1 << 32 | 0x55
    program = Program().vmcall(WRMSR, SPIV, 0x1FF).out(0x40, 1).vmcall(WRMSR, 0x830, icr).report(R10, R11).done()
    td.build(program, n_vcpus=2)
    for vcpu in td.vcpus:
        assert td.run(vcpu) == KvmExit.KVM_EXIT_IO
    td.run_to_end()
    pir = td.machine.host.vms[-1].vcpus[1].vendor.pi_descriptor
    assert td.machine.memory.q[(pir >> 3) + 1] == 1 << 0x55 - 64


def test_smi_is_enotty_and_registers_are_protected(td: TestTd) -> None:
    td.build(Program().done())
    with pytest.raises(KvmError) as raised:
        td.vcpu.smi()
    assert raised.value.errno == errno.ENOTTY
    with pytest.raises(KvmError) as raised:
        td.vcpu.get_regs()
    assert raised.value.errno == errno.EINVAL
