"""Exceptions that cannot be delivered or that emulation ends in, and code at the end of memory."""

import pytest

from sim_backend.kernel import SimKernel
from tests.unit.kvm.small_vmm import CODE, MEMORY_BYTES, SmallVm
from uapi_ctypes.caps import KvmCap
from uapi_ctypes.kvm_run import KvmExit

RF = 1 << 16
UD = 6
EMULATION, DELIVERY_EV = 1, 3
BEYOND_THE_EMULATOR = b"\xd8\x07"  # fadds [bx]
NO_MEMORY = 0x10_0000
HANDLER = 0x5000


def with_stack_in(small: SmallVm, base: int) -> None:
    sregs = small.vcpu.get_sregs()
    sregs.ss.base = base
    small.vcpu.set_sregs(sregs)


def with_handlers(small: SmallVm) -> None:
    small.memory[HANDLER] = b"\xf4"
    for vector in range(32):
        small.memory[4 * vector] = HANDLER.to_bytes(4, "little")


def start_at(small: SmallVm, base: int, rip: int) -> None:
    sregs = small.vcpu.get_sregs()
    sregs.cs.base = base
    small.vcpu.set_sregs(sregs)
    regs = small.vcpu.get_regs()
    regs.rip = rip
    small.vcpu.set_regs(regs)


def test_an_exception_whose_stack_is_no_memory_waits_and_has_set_rf(kernel: SimKernel) -> None:
    with SmallVm(kernel, b"\x0f\x0b\xf4") as small:  # ud2
        with_handlers(small)
        with_stack_in(small, NO_MEMORY)
        assert small.vcpu.run() == KvmExit.KVM_EXIT_INTERNAL_ERROR
        assert small.vcpu.kvm_run.internal.suberror == DELIVERY_EV
        assert small.vcpu.kvm_run.internal.data[3] == NO_MEMORY + 0x7FFE, "the guest-physical address, to the byte"
        events = small.vcpu.get_vcpu_events()
        assert (events.exception.injected, events.exception.nr) == (1, UD)
        stopped = small.vcpu.get_regs()
        assert (stopped.rip, stopped.rflags & RF) == (CODE, RF)

        with_stack_in(small, 0)
        assert small.vcpu.run() == KvmExit.KVM_EXIT_HLT
        assert small.vcpu.get_regs().rip == HANDLER + 1
        assert small.memory.word(0x7FFA) & 0xFFFF == CODE, "the #UD that had waited was delivered"


def test_an_exception_of_the_cpu_itself_waits_likewise(kernel: SimKernel) -> None:
    with SmallVm(kernel, b"\x31\xc9\xf7\xf1\xf4") as small:  # xor cx, cx; div cx
        with_handlers(small)
        with_stack_in(small, NO_MEMORY)
        assert small.vcpu.run() == KvmExit.KVM_EXIT_INTERNAL_ERROR
        assert small.vcpu.kvm_run.internal.suberror == DELIVERY_EV
        events = small.vcpu.get_vcpu_events()
        assert (events.exception.injected, events.exception.nr) == (1, 0)


@pytest.mark.parametrize(("asked_for", "pending"), [(0, 1), (1, 0)])
def test_the_guest_takes_ud_for_a_failed_emulation_unless_user_space_wants_it_alone(
    kernel: SimKernel, asked_for: int, pending: int
) -> None:
    with SmallVm(kernel, BEYOND_THE_EMULATOR) as small:
        small.vm.enable_cap(KvmCap.KVM_CAP_EXIT_ON_EMULATION_FAILURE, asked_for)
        sregs = small.vcpu.get_sregs()
        sregs.ds.base = NO_MEMORY
        small.vcpu.set_sregs(sregs)
        assert small.vcpu.run() == KvmExit.KVM_EXIT_INTERNAL_ERROR
        assert small.vcpu.kvm_run.internal.suberror == EMULATION
        assert small.vcpu.get_vcpu_events().exception.pending == pending


def test_what_lies_before_the_end_of_memory_is_executed_first(kernel: SimKernel) -> None:
    with SmallVm(kernel) as small:
        base = MEMORY_BYTES - 0x1000
        small.memory[MEMORY_BYTES - 6] = b"\xbb\x34\x12" + b"\x88\x07\x90"  # mov bx, 0x1234; mov [bx], al; nop
        start_at(small, base, 0xFFA)
        regs = small.vcpu.get_regs()
        regs.rax = 0x5A
        small.vcpu.set_regs(regs)
        assert small.vcpu.run() == KvmExit.KVM_EXIT_INTERNAL_ERROR
        assert small.vcpu.get_regs().rip == 0x1000
        assert small.memory.word(0x1234) & 0xFF == 0x5A


@pytest.mark.parametrize("kernel", ["svm"], indirect=True)
def test_on_an_emulated_cpu_16_bit_code_goes_on_at_ip_0(kernel: SimKernel) -> None:
    with SmallVm(kernel) as small:
        small.memory[0xFFFF] = b"\x90"
        small.memory[0] = b"\xf4"
        start_at(small, 0, 0xFFFF)
        assert small.vcpu.run() == KvmExit.KVM_EXIT_HLT
        assert small.vcpu.get_regs().rip == 1


def test_elsewhere_it_is_gp(kernel: SimKernel) -> None:
    with SmallVm(kernel) as small:
        with_handlers(small)
        small.memory[0xFFFF] = b"\x90"
        start_at(small, 0, 0xFFFF)
        assert small.vcpu.run() == KvmExit.KVM_EXIT_HLT
        assert small.vcpu.get_regs().rip == HANDLER + 1


def test_a_call_through_mmio_beyond_the_segment_is_gp_before_it_pushes(kernel: SimKernel) -> None:
    with SmallVm(kernel, b"\x66\xff\x17\xf4") as small:  # call dword [bx]
        with_handlers(small)
        sregs = small.vcpu.get_sregs()
        sregs.ds.base = NO_MEMORY
        small.vcpu.set_sregs(sregs)
        assert small.vcpu.run() == KvmExit.KVM_EXIT_MMIO
        small.vcpu.kvm_run.mmio.data[:4] = (0x1_0000).to_bytes(4, "little")
        assert small.vcpu.run() == KvmExit.KVM_EXIT_HLT
        assert small.vcpu.get_regs().rsp == 0x8000 - 6, "flags, CS and IP of #GP alone"


def test_movbe_is_ud_for_a_guest_whose_cpuid_lacks_it(kernel: SimKernel) -> None:
    with SmallVm(kernel, b"\x0f\x38\xf1\x07\xf4") as small:  # movbe [bx], ax
        with_handlers(small)
        sregs = small.vcpu.get_sregs()
        sregs.ds.base = NO_MEMORY
        small.vcpu.set_sregs(sregs)
        assert small.vcpu.run() == KvmExit.KVM_EXIT_HLT
        assert small.vcpu.get_regs().rip == HANDLER + 1


def test_with_a_pic_in_the_kernel_user_space_need_not_wait_to_inject(kernel: SimKernel) -> None:
    with SmallVm(kernel, n_vcpus=0) as small:
        small.vm.create_irqchip()
        vcpu = small.vm.create_vcpu(0)  # its reset vector is no memory
        assert vcpu.run() == KvmExit.KVM_EXIT_INTERNAL_ERROR
        assert vcpu.kvm_run.ready_for_interrupt_injection == 1, "although a #UD is pending"
        vcpu.close()
