"""What KVM_RUN delivers, when, and what it keeps for later (`kvm_check_and_inject_events`, `kvm_vcpu_has_events`)."""

import os
import signal
import threading
import time

import pytest

from sim_backend.kernel import SimKernel
from sim_backend.kvm.signals import SignalWatch
from sim_backend.kvm.vcpu import MpState
from tests.unit.kvm.interrupting_vmm import CPUID, DONE, HANDLED, HLT, STI, InterruptingVm
from tests.unit.kvm.small_vmm import CODE, SmallVm, errno_of, in_thread, wait_until
from uapi_ctypes.kvm import KvmIrqchip
from uapi_ctypes.kvm_run import KvmExit

MSI = 0xFEE0_0000
NMI, RESERVED_MODE = 4 << 8, 3 << 8
NMI_HANDLED = 0x97
IF = 0x202
LVT0, EXTINT, MASKED = 0x350, 0x700, 1 << 16
VALID_SHADOW = 4
NOP = b"\x90"
SPIN = b"\xeb\xfe"


def with_nmi_handler(vm: InterruptingVm) -> None:
    vm.memory[4 * 2] = (0x3100).to_bytes(4, "little")
    vm.memory[0x3100] = b"\xe6\x97\xcf"


# ---- nothing is lost -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("meanwhile", [0x58, NMI])
def test_an_interrupt_that_a_kick_kept_out_of_the_guest_goes_in_first(kernel: SimKernel, meanwhile: int) -> None:
    with InterruptingVm(kernel, split=True) as vm:
        with_nmi_handler(vm)
        vm.memory[4 * 0x58] = (0x3100).to_bytes(4, "little")
        vm.put(NOP * 4, rflags=IF)
        vm.vm.signal_msi(MSI, 0x50)
        model = kernel.host.vms[-1]
        vcpu = model.vcpus[0]
        assert vcpu.cpu is not None
        vcpu.kicked = False
        vcpu.cpu.kick()
        assert model.ops.vcpu_run(vcpu)
        events = vm.vcpu.get_vcpu_events()
        assert (events.interrupt.injected, events.interrupt.nr) == (1, 0x50)
        vm.vm.signal_msi(MSI, meanwhile)
        ports = [vm.next_port() for _ in range(2)]
        assert set(ports) == ({HANDLED, NMI_HANDLED} if meanwhile == NMI else {HANDLED, DONE})
        assert vm.memory.word(0x7FFC) >> 16 == IF, "the flags that the interrupt pushed: no trap flag of ours"


def test_an_nmi_comes_right_behind_an_exception(kernel: SimKernel) -> None:
    with InterruptingVm(kernel, split=True) as vm:
        with_nmi_handler(vm)
        vm.memory[0x3000] = NOP * 2 + SPIN
        vm.put(NOP)
        events = vm.vcpu.get_vcpu_events()
        events.exception.injected, events.exception.nr = 1, 6
        vm.vcpu.set_vcpu_events(events)
        vm.vm.signal_msi(MSI, NMI)
        assert vm.next_port() == NMI_HANDLED
        (return_to,) = vm.memory.map[0x7FF4:0x7FF6][:1]
        assert return_to <= 2, "at the handler's beginning, not when it was interrupted by the host's timer"


@pytest.mark.parametrize("rflags", [2, IF])
def test_what_was_acknowledged_goes_in_whatever_if_says(kernel: SimKernel, rflags: int) -> None:
    with InterruptingVm(kernel, split=True) as vm:
        vm.put(NOP, rflags=rflags)
        events = vm.vcpu.get_vcpu_events()
        events.interrupt.injected, events.interrupt.nr = 1, 0x44
        vm.vcpu.set_vcpu_events(events)
        assert vm.next_port() == HANDLED


# ---- what wakes a halted vCPU --------------------------------------------------------------------------------


@pytest.mark.parametrize("state", [MpState.HALTED, MpState.AP_RESET_HOLD])
def test_a_message_of_the_reserved_mode_wakes_from_hlt(kernel: SimKernel, state: int) -> None:
    with InterruptingVm(kernel, split=True) as vm:
        vm.put(NOP)
        vm.vcpu.set_mp_state(state)
        assert vm.vm.signal_msi(MSI, RESERVED_MODE) == 1
        assert vm.vcpu.get_mp_state() == MpState.RUNNABLE
        assert vm.next_port() == DONE


def test_a_message_of_the_reserved_mode_makes_one_hlt_fall_through(kernel: SimKernel) -> None:
    with InterruptingVm(kernel, split=True) as vm:
        vm.put(HLT)
        vm.vm.signal_msi(MSI, RESERVED_MODE)
        assert vm.next_port() == DONE
        assert vm.vcpu.get_mp_state() == MpState.RUNNABLE


def test_running_uses_such_a_message_up(kernel: SimKernel) -> None:
    with InterruptingVm(kernel, split=True) as vm:
        vm.put(HLT)
        vm.vm.signal_msi(MSI, RESERVED_MODE)
        vm.vcpu.set_mp_state(MpState.RUNNABLE)
        thread, _ = in_thread(vm.vcpu.run)
        wait_until(lambda: kernel.host.vms[-1].vcpus[0].mp_state == MpState.HALTED)
        vm.vm.signal_msi(MSI, RESERVED_MODE)
        thread.join(5)
        assert vm.vcpu.exit_reason == KvmExit.KVM_EXIT_IO


def test_an_exception_that_went_in_already_wakes_nobody(kernel: SimKernel) -> None:
    with InterruptingVm(kernel, split=True) as vm:
        vm.put(NOP)
        events = vm.vcpu.get_vcpu_events()
        events.exception.injected, events.exception.nr = 1, 6
        vm.vcpu.set_vcpu_events(events)
        vm.vcpu.set_mp_state(MpState.HALTED)
        assert not kernel.host.vms[-1].vcpus[0].has_work()


@pytest.mark.parametrize(("lint0", "port"), [(EXTINT, HANDLED), (EXTINT | MASKED, DONE)])
def test_user_spaces_vector_comes_through_lint0(kernel: SimKernel, lint0: int, port: int) -> None:
    with InterruptingVm(kernel, split=True) as vm:
        vm.set_apic({LVT0: lint0})
        vm.put(CPUID * 2, rflags=IF)
        vm.vcpu.interrupt(0x44)
        assert vm.next_port() == port
        vm.vcpu.set_mp_state(MpState.HALTED)
        if lint0 & MASKED:
            assert not kernel.host.vms[-1].vcpus[0].has_work()
            assert errno_of(lambda: vm.vcpu.interrupt(0x45)) == "EEXIST"


# ---- the interrupt window ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("lint0", "reason"), [(EXTINT, 7), (EXTINT | MASKED, 2)])
def test_the_interrupt_window_opens_with_a_split_irqchip(kernel: SimKernel, lint0: int, reason: int) -> None:
    with InterruptingVm(kernel, split=True) as vm:
        vm.set_apic({LVT0: lint0})
        vm.vcpu.kvm_run.request_interrupt_window = 1
        vm.put(CPUID + STI + CPUID)
        vm.vcpu.run()
        assert vm.vcpu.exit_reason == reason
        assert bool(vm.vcpu.kvm_run.ready_for_interrupt_injection) == (reason == 7)


@pytest.mark.parametrize(("data", "port"), [(0x50, HANDLED), (NMI, NMI_HANDLED)])
@pytest.mark.parametrize("shadow", [0, 1, 2])
def test_the_shadow_that_user_space_sets_lasts_for_one_instruction(
    kernel: SimKernel, shadow: int, data: int, port: int
) -> None:
    with InterruptingVm(kernel, split=True) as vm:
        with_nmi_handler(vm)
        vm.put(b"\xfe\xc0" * 4, rflags=IF)  # inc al
        regs = vm.vcpu.get_regs()
        regs.rax = 0
        vm.vcpu.set_regs(regs)
        events = vm.vcpu.get_vcpu_events()
        events.interrupt.shadow, events.flags = shadow, events.flags | VALID_SHADOW
        vm.vcpu.set_vcpu_events(events)
        vm.vm.signal_msi(MSI, data)
        assert vm.next_port() == port
        assert vm.vcpu.get_regs().rax == bool(shadow)
        assert vm.vcpu.get_vcpu_events().interrupt.shadow == 0


# ---- threads, signals and descriptors ------------------------------------------------------------------------


@pytest.mark.parametrize("code", [SPIN, HLT])
def test_closing_its_descriptors_does_not_end_a_run(kernel: SimKernel, code: bytes) -> None:
    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    try:
        small = SmallVm(kernel, code, split=True)
        model = kernel.host.vms[-1]
        thread, result = in_thread(small.vcpu.run)
        wait_until(lambda: model.vcpus[0].mutex.locked())
        small.memory[CODE] = code
        small.close()
        thread.join(0.1)
        assert thread.is_alive()
        assert model in kernel.host.vms
        assert thread.ident is not None
        signal.pthread_kill(thread.ident, signal.SIGUSR1)
        thread.join(5)
        assert result == ["EINTR"]
        wait_until(lambda: model not in kernel.host.vms)
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_mark_from_before_the_memory_began_anew_was_followed_by_a_signal() -> None:
    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    outside = signal.set_wakeup_fd(-1)
    try:
        watch = SignalWatch()
        old = watch.mark()
        assert not watch.since(old)
        for number in range(1 << 16):
            if not number % 4096:
                watch.mark()
            signal.raise_signal(signal.SIGUSR1)
        new = watch.mark()
        assert watch.since(old)
        assert not watch.since(new)
        signal.raise_signal(signal.SIGUSR1)
        assert watch.since(new)
    finally:
        signal.set_wakeup_fd(outside)
        signal.signal(signal.SIGUSR1, before)


def test_events_from_all_sides_are_all_taken(kernel: SimKernel) -> None:
    """Edges that one thread waits for, while others send NMIs, messages to no effect, and signals."""
    with InterruptingVm(kernel) as vm:
        with_nmi_handler(vm)
        vm.memory[0x3000] = b"\xe6\x98" + bytes.fromhex("6631c02666a3b000") + b"\xcf"  # EOI behind the port
        vm.vm.set_irqchip(entry_of_pin_20(vm))
        vm.put(STI + HLT + b"\xeb\xfd")
        fd = os.eventfd(0, os.EFD_NONBLOCK)
        vm.vm.irqfd(fd, 20)
        stop, taken = threading.Event(), threading.Semaphore(0)
        nmis = [0, 0]

        def run() -> None:
            while not stop.is_set():
                if errno_of(vm.vcpu.run) is None:
                    assert vm.vcpu.exit_reason == KvmExit.KVM_EXIT_IO
                    if vm.vcpu.kvm_run.io.port == HANDLED:
                        taken.release()
                    else:
                        nmis[1] += 1

        def disturb() -> None:
            while not stop.is_set():
                vm.vm.signal_msi(MSI, NMI)
                nmis[0] += 1
                vm.vm.signal_msi(MSI, RESERVED_MODE)
                vm.vm.irq_line(5, nmis[0] & 1)
                time.sleep(0.001)

        threads = [threading.Thread(target=body, daemon=True) for body in (run, disturb)]
        for thread in threads:
            thread.start()
        end = time.monotonic() + 0.7
        edges = 0
        while time.monotonic() < end:
            os.eventfd_write(fd, 1)
            assert taken.acquire(timeout=5), f"edge {edges} was lost"
            edges += 1
        stop.set()
        vm.vcpu.kvm_run.immediate_exit = 1
        for thread in threads:
            thread.join(5)
            assert not thread.is_alive()
        assert not taken.acquire(blocking=False), "an edge came twice"
        assert edges > 20
        assert 0 < nmis[1] <= nmis[0]
        os.close(fd)


def entry_of_pin_20(vm: InterruptingVm) -> KvmIrqchip:
    chip = vm.vm.get_irqchip(2)
    chip.chip[24 + 8 * 20 : 24 + 8 * 21] = (0x61).to_bytes(8, "little")
    return chip
