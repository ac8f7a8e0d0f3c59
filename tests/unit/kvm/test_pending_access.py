"""KVM_SET_REGS while an instruction waits for an MMIO read: it goes on as it was decoded, and its result is lost."""

import pytest

from sim_backend.kernel import SimKernel
from tests.unit.kvm.small_vmm import CODE, SmallVm
from uapi_ctypes.kvm_run import KvmExit

MMIO = 0x2_0000
ELSEWHERE = 0x1100


def waiting(kernel: SimKernel, code: bytes, **registers: int) -> SmallVm:
    """Return a VM whose `code` reads MMIO at DS:BX or DS:SI and waits for the answer."""
    small = SmallVm(kernel, code + b"\xf4")
    sregs = small.vcpu.get_sregs()
    sregs.ds.base = MMIO
    small.vcpu.set_sregs(sregs)
    set_registers(small, **registers)
    assert small.vcpu.run() == KvmExit.KVM_EXIT_MMIO
    small.vcpu.kvm_run.mmio.data[:2] = b"\x34\x12"
    return small


def set_registers(small: SmallVm, **registers: int) -> None:
    regs = small.vcpu.get_regs()
    for name, value in registers.items():
        setattr(regs, name, value)
    small.vcpu.set_regs(regs)


def test_without_it_the_result_arrives(kernel: SimKernel) -> None:
    with waiting(kernel, b"\x8b\x07", rax=7) as small:  # mov ax, [bx]
        assert small.vcpu.get_regs().rip == CODE
        assert small.vcpu.run() == KvmExit.KVM_EXIT_HLT
        assert small.vcpu.get_regs().rax == 0x1234


@pytest.mark.parametrize("rip", [CODE, ELSEWHERE], ids=["the same RIP", "another RIP"])
def test_the_result_in_a_register_is_lost_and_rip_goes_on_behind_the_instruction(kernel: SimKernel, rip: int) -> None:
    with waiting(kernel, b"\x8b\x07", rax=7) as small:  # mov ax, [bx]
        set_registers(small, rax=8, rip=rip)
        assert small.vcpu.run() == KvmExit.KVM_EXIT_HLT
        after = small.vcpu.get_regs()
        assert (after.rax, after.rip) == (8, CODE + 3)


def test_a_result_in_memory_has_the_operands_and_the_address_of_before(kernel: SimKernel) -> None:
    with waiting(kernel, b"\x01\x07", rax=1, rbx=0x10) as small:  # add [bx], ax
        set_registers(small, rax=0x100, rbx=0x20, rflags=0x8D7)
        assert small.vcpu.run() == KvmExit.KVM_EXIT_MMIO
        written = small.vcpu.kvm_run.mmio
        assert (written.is_write, written.phys_addr, bytes(written.data)[:2]) == (1, MMIO + 0x10, b"\x35\x12")
        assert small.vcpu.get_regs().rflags & 0x8D5 == 0x4, "PF of the sum alone"


def test_what_an_instruction_increments_it_increments_from_the_new_value(kernel: SimKernel) -> None:
    with waiting(kernel, b"\xf3\xa4", rsi=0x10, rdi=0x3000, rcx=2) as small:  # rep movsb
        set_registers(small, rsi=0x50, rdi=0x4000, rcx=9)
        assert small.vcpu.run() == KvmExit.KVM_EXIT_MMIO
        after = small.vcpu.get_regs()
        assert (after.rsi, after.rdi, after.rcx) == (0x51, 0x4001, 8)
        assert small.memory.word(0x3000) & 0xFF == 0x34, "the first byte went where it was to go"


def test_an_operand_across_two_pages_is_asked_for_whole_whatever_is_set_meanwhile(kernel: SimKernel) -> None:
    with SmallVm(kernel, b"\x8f\x06\x00\x30\xf4") as small:  # pop word [0x3000]
        sregs = small.vcpu.get_sregs()
        sregs.ss.base = MMIO
        small.vcpu.set_sregs(sregs)
        set_registers(small, rsp=0xFFF)
        exits = []
        for answer in (b"\x34", b"\x12"):
            assert small.vcpu.run() == KvmExit.KVM_EXIT_MMIO
            mmio = small.vcpu.kvm_run.mmio
            exits.append((mmio.phys_addr, mmio.len))
            mmio.data[:1] = answer
            set_registers(small, rsp=0x4000)
        assert exits == [(MMIO + 0xFFF, 1), (MMIO + 0x1000, 1)]
        assert small.vcpu.run() == KvmExit.KVM_EXIT_HLT
        assert small.memory.word(0x3000) & 0xFFFF == 0x1234
        assert small.vcpu.get_regs().rsp == 0x4002
