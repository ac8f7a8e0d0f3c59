"""Channel 0 of the in-kernel 8254 interrupts a guest that waits for it."""

import time

import pytest

from sim_backend.kernel import SimKernel
from tests.unit.kvm.small_vmm import SmallVm, in_thread
from uapi_ctypes.kvm_run import KvmExit
from uapi_ctypes.kvm_state import KvmLapicState

VECTOR = 0x20
HANDLER = 0x1200
COUNT_20_MS = 23864  # at 1.193182 MHz
IRET = b"\xcf"
NMI_VECTOR, NMI, EXTINT = 2, 4, 7
HPET_LEGACY = 1


def out(port: int, value: int) -> bytes:
    """Return the code of ``mov al, value; out port, al``."""
    return bytes((0xB0, value, 0xE6, port))


def program(mode: int) -> bytes:
    """Return code that sets the 8259 up, starts the timer, waits for interrupts and tells user space of each."""
    setup = b"".join(
        out(port, value)
        for port, value in (
            *((0x20, 0x11), (0x21, VECTOR), (0x21, 4), (0x21, 1), (0x21, 0xFE)),
            *((0x43, 0x30 | mode << 1), (0x40, COUNT_20_MS & 0xFF), (0x40, COUNT_20_MS >> 8)),
        )
    )
    return setup + b"\xfb\xf4" + out(0x80, 1) + b"\xeb\xf9"  # sti; 1: hlt; out 0x80; jmp 1b


@pytest.mark.parametrize(("mode", "interrupts"), [(2, 3), (3, 3), (0, 1), (4, 1)])
def test_its_interrupts_come_in_time_and_as_often_as_its_mode_says(
    kernel: SimKernel, mode: int, interrupts: int
) -> None:
    with SmallVm(kernel, n_vcpus=0) as small:
        small.vm.create_irqchip()
        small.vm.create_pit2()
        small.memory[0x1000] = program(mode)
        small.memory[4 * VECTOR] = HANDLER.to_bytes(4, "little")
        small.memory[HANDLER] = out(0x20, 0x20) + IRET  # end of interrupt
        small.vcpus.append(small.vm.create_vcpu(0))
        small.start(small.vcpu, 0x1000)
        small.vcpu.set_lapic(with_lint0(small, EXTINT))
        begin = time.monotonic()
        for number in range(1, interrupts + 1):
            assert small.vcpu.run() == KvmExit.KVM_EXIT_IO
            assert small.vcpu.kvm_run.io.port == 0x80
            assert 0.018 * number < time.monotonic() - begin < 10 * number, "one that is late does not move the next"


def test_a_local_apic_with_lint0_in_nmi_mode_gets_each_tick_as_an_nmi(kernel: SimKernel) -> None:
    with SmallVm(kernel, n_vcpus=0) as small:
        small.vm.create_irqchip()
        small.vm.create_pit2()
        small.memory[0x1000] = program(2)
        small.memory[4 * NMI_VECTOR] = HANDLER.to_bytes(4, "little")
        small.memory[HANDLER] = out(0x81, 7) + IRET
        small.vcpus.append(small.vm.create_vcpu(0))
        small.start(small.vcpu, 0x1000)
        small.vcpu.set_lapic(with_lint0(small, NMI))
        for port in (0x81, 0x80, 0x81):
            assert small.vcpu.run() == KvmExit.KVM_EXIT_IO
            assert small.vcpu.kvm_run.io.port == port


def test_the_hpet_in_legacy_mode_takes_the_timer_s_place(kernel: SimKernel) -> None:
    with SmallVm(kernel, n_vcpus=0) as small:
        small.vm.create_irqchip()
        small.vm.create_pit2()
        small.memory[0x1000] = program(2)
        small.memory[4 * VECTOR] = HANDLER.to_bytes(4, "little")
        small.memory[HANDLER] = out(0x20, 0x20) + IRET
        small.vcpus.append(small.vm.create_vcpu(0))
        small.start(small.vcpu, 0x1000)
        small.vcpu.set_lapic(with_lint0(small, EXTINT))
        assert small.vcpu.run() == KvmExit.KVM_EXIT_IO
        state = small.vm.get_pit2()
        state.flags |= HPET_LEGACY
        small.vm.set_pit2(state)
        thread, answer = in_thread(small.vcpu.run)
        thread.join(0.2)
        assert not answer, "nothing interrupts the guest's HLT"
        state.flags = 0
        small.vm.set_pit2(state)
        thread.join(10)
        assert answer == [KvmExit.KVM_EXIT_IO]


def with_lint0(small: SmallVm, mode: int) -> KvmLapicState:
    """Return the local APIC's state, enabled, with LINT0 in that delivery mode."""
    state = small.vcpu.get_lapic()
    for offset, value in {0xF0: 0x1FF, 0x350: mode << 8}.items():
        state.regs[offset : offset + 4] = value.to_bytes(4, "little")
    return state
