"""An instruction on MMIO does what the same instruction does on memory, where the CPU executes it itself."""

import struct

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sim_backend.kernel import SimKernel
from sim_backend.kvm.default_vm import alu
from tests.unit.kvm.small_vmm import CODE, SmallVm
from uapi_ctypes.kvm_run import KvmExit

IN_MEMORY, IN_MMIO = 0x4000, 0x1_0000 - 0x1000 + 0x1000  # inside the slot, and right behind it
ARITHMETIC = alu.ARITHMETIC
DEFINED_BY_LOGIC = ARITHMETIC & ~alu.AF

# Instruction with its memory operand at [ds:bx], the other one in AX or an immediate. 16-bit code.
BINARY = {
    "add": b"\x01\x07",
    "or": b"\x09\x07",
    "adc": b"\x11\x07",
    "sbb": b"\x19\x07",
    "and": b"\x21\x07",
    "sub": b"\x29\x07",
    "xor": b"\x31\x07",
    "cmp": b"\x39\x07",
    "add32": b"\x66\x01\x07",
    "adc8": b"\x10\x07",
    "sub8": b"\x28\x07",
    "cmp from": b"\x3b\x07",
    "add from": b"\x03\x07",
    "test": b"\x85\x07",
    "mov": b"\x89\x07",
    "mov from": b"\x8b\x07",
    "movzx": b"\x0f\xb6\x07",
    "movsx": b"\x0f\xbe\x07",
    "xchg": b"\x87\x07",
    "xadd": b"\x0f\xc1\x07",
    "cmpxchg": b"\x0f\xb1\x0f",
    "inc": b"\xff\x07",
    "dec": b"\xff\x0f",
    "not": b"\xf7\x17",
    "neg": b"\xf7\x1f",
    "add imm8": b"\x83\x07\x9c",
    "mov imm": b"\xc7\x07\x34\x12",
    "rol 1": b"\xd1\x07",
    "ror 1": b"\xd1\x0f",
    "rcl 1": b"\xd1\x17",
    "rcr 1": b"\xd1\x1f",
    "shl 1": b"\xd1\x27",
    "shr 1": b"\xd1\x2f",
    "sar 1": b"\xd1\x3f",
    "shl 5": b"\xc1\x27\x05",
    "rol 3": b"\xc1\x07\x03",
    "push": b"\xff\x37",
}
NO_AUXILIARY_CARRY = {"or", "and", "xor", "test", "rol 1", "ror 1", "rcl 1", "rcr 1", "shl 1", "shr 1", "sar 1"}
OVERFLOW_UNDEFINED = {"shl 5", "rol 3"}


def run(small: SmallVm, operand: int, value: int, ax: int, flags: int) -> tuple[int, dict[str, int], int]:
    """Run the instruction on the operand at `operand`; return its new value, the registers, the stack top."""
    segment = operand >> 4
    small.memory[IN_MEMORY] = struct.pack("<I", value)
    sregs = small.vcpu.get_sregs()
    sregs.ds.base, sregs.ds.selector = segment << 4, segment
    small.vcpu.set_sregs(sregs)
    regs = small.vcpu.get_regs()
    regs.rip, regs.rax, regs.rbx, regs.rcx, regs.rsp = CODE, ax, 0, 0x1357, 0x8000
    regs.rflags = 2 | flags
    small.vcpu.set_regs(regs)
    current = bytearray(struct.pack("<I", value))
    while small.vcpu.run() == KvmExit.KVM_EXIT_MMIO:
        mmio = small.vcpu.kvm_run.mmio
        offset = mmio.phys_addr - operand
        assert 0 <= offset < 4
        if mmio.is_write:
            current[offset : offset + mmio.len] = bytes(mmio.data)[: mmio.len]
        else:
            for index in range(mmio.len):
                mmio.data[index] = current[offset + index]
    assert small.vcpu.exit_reason == KvmExit.KVM_EXIT_HLT
    after = small.vcpu.get_regs()
    result = small.memory.word(IN_MEMORY) if operand == IN_MEMORY else struct.unpack("<I", current)[0]
    return (
        result,
        {"rax": after.rax, "rcx": after.rcx, "rip": after.rip, "rflags": after.rflags},
        small.memory.word(0x7FFC),
    )


@pytest.mark.parametrize("name", BINARY)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    value=st.integers(0, 0xFFFF_FFFF),
    ax=st.integers(0, 0xFFFF_FFFF),
    flags=st.sampled_from([0, alu.CF, ARITHMETIC]),
)
def test_on_mmio_as_on_memory(kernel: SimKernel, name: str, value: int, ax: int, flags: int) -> None:
    with SmallVm(kernel, BINARY[name] + b"\xf4") as small:
        small.memory[0x7FFC] = bytes(4)
        expected_value, expected, expected_stack = run(small, IN_MEMORY, value, ax, flags)
        small.memory[0x7FFC] = bytes(4)
        got_value, got, got_stack = run(small, IN_MMIO, value, ax, flags)
    mask = ARITHMETIC
    if name in NO_AUXILIARY_CARRY | OVERFLOW_UNDEFINED:
        mask &= ~alu.AF
    if name in OVERFLOW_UNDEFINED:
        mask &= ~alu.OF
    for side in (expected, got):
        side["rflags"] &= mask
    assert (hex(got_value), got, got_stack) == (hex(expected_value), expected, expected_stack)


def test_a_read_wider_than_8_bytes_and_a_page_crossing_are_split(kernel: SimKernel) -> None:
    with SmallVm(kernel, b"\x66\x8b\x07\xf4") as small:  # mov eax, [bx]
        regs = small.vcpu.get_regs()
        regs.rbx = 0xFFFE
        small.vcpu.set_regs(regs)
        small.memory[0xFFFE] = b"\xcd\xab"
        assert small.vcpu.run() == KvmExit.KVM_EXIT_MMIO
        mmio = small.vcpu.kvm_run.mmio
        assert (mmio.phys_addr, mmio.len, mmio.is_write) == (0x1_0000, 2, 0)
        mmio.data[0], mmio.data[1] = 0x34, 0x12
        assert small.vcpu.run() == KvmExit.KVM_EXIT_HLT
        assert small.vcpu.get_regs().rax & 0xFFFF_FFFF == 0x1234_ABCD


def test_an_instruction_beyond_the_emulator_is_an_emulation_error_with_its_bytes(kernel: SimKernel) -> None:
    with SmallVm(kernel, b"\xd8\x07\xf4") as small:  # fadds [bx]
        regs = small.vcpu.get_regs()
        regs.rbx = 0
        small.vcpu.set_regs(regs)
        sregs = small.vcpu.get_sregs()
        sregs.ds.base = 0x10_0000
        small.vcpu.set_sregs(sregs)
        assert small.vcpu.run() == KvmExit.KVM_EXIT_INTERNAL_ERROR
        assert small.vcpu.kvm_run.internal.suberror == 1
        assert small.vcpu.get_regs().rip == CODE
