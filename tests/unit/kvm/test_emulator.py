"""An instruction on MMIO does what the same instruction does on memory, where the CPU executes it itself."""

import struct

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sim_backend.kernel import SimKernel
from sim_backend.kvm.default_vm import alu
from sim_backend.kvm.errors import NotModelled
from tests.unit.kvm.small_vmm import CODE, SmallVm
from uapi_ctypes.kvm_run import KvmExit
from uapi_ctypes.kvm_state import KvmCpuid2, KvmCpuidEntry2

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
    "bt imm": b"\x0f\xba\x27\x03",
    "bts imm": b"\x0f\xba\x2f\x03",
    "btr imm": b"\x0f\xba\x37\x07",
    "btc imm": b"\x0f\xba\x3f\x0f",
    "bsf": b"\x0f\xbc\x0f",
    "bsr": b"\x0f\xbd\x0f",
    "setc": b"\x0f\x92\x07",
    "setle": b"\x0f\x9e\x07",
    "cmovs": b"\x0f\x48\x0f",
    "cmovnz": b"\x0f\x45\x07",
    "mul": b"\xf7\x27",
    "mul8": b"\xf6\x27",
    "imul": b"\xf7\x2f",
    "imul reg": b"\x0f\xaf\x07",
    "imul imm": b"\x69\x07\x34\x12",
    "smsw": b"\x0f\x01\x27",
}
ONLY_CARRY = {"bt imm", "bts imm", "btr imm", "btc imm"}
ONLY_ZERO = {"bsf", "bsr"}
CARRY_AND_OVERFLOW = {"mul", "mul8", "imul", "imul reg", "imul imm"}
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
    if name in ONLY_CARRY:
        mask = alu.CF
    if name in ONLY_ZERO:
        mask = alu.ZF
    if name in CARRY_AND_OVERFLOW:
        mask = alu.CF | alu.OF
    for side in (expected, got):
        side["rflags"] &= mask
    assert (hex(got_value), got, got_stack) == (hex(expected_value), expected, expected_stack)


def test_a_read_wider_than_8_bytes_and_a_page_crossing_are_split(kernel: SimKernel) -> None:
    with SmallVm(kernel, b"\x66\x8b\x07\xf4") as small:  # mov eax, [bx]
        regs = small.vcpu.get_regs()
        regs.rbx = 0x7FFE
        small.vcpu.set_regs(regs)
        sregs = small.vcpu.get_sregs()
        sregs.ds.base = 0x8000  # the operand lies inside the segment, and half of it in the slot
        small.vcpu.set_sregs(sregs)
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


def mmio_vm(kernel: SimKernel, code: bytes, **registers: int) -> SmallVm:
    """Return a VM whose DS:BX is outside its memory, about to run `code`."""
    small = SmallVm(kernel, code + b"\xf4")
    sregs = small.vcpu.get_sregs()
    sregs.ds.base = IN_MMIO
    small.vcpu.set_sregs(sregs)
    regs = small.vcpu.get_regs()
    for name, value in registers.items():
        setattr(regs, name, value)
    small.vcpu.set_regs(regs)
    return small


@pytest.mark.parametrize("code", [b"\xc4\x07", b"\x0f\x01\x07", b"\xff\x2f", b"\x0f\xa4\x07\x01", b"\x0f\xae\x07"])
def test_what_only_kvm_can_emulate_is_refused_with_bytes_and_registers(kernel: SimKernel, code: bytes) -> None:
    with (
        mmio_vm(kernel, code, rcx=0x1234) as small,
        pytest.raises(NotModelled, match=rf"RIP 0x1000: bytes {code.hex(' ')}.*rcx=0x1234") as refusal,
    ):
        small.vcpu.run()
    assert refusal.value.registers["rip"] == CODE


def test_a_division_by_an_mmio_register_divides_or_raises_de(kernel: SimKernel) -> None:
    with mmio_vm(kernel, b"\xf7\x37", rax=1000, rdx=0) as small:  # div word [bx]
        small.memory[0] = struct.pack("<HH", 0x5000, 0)
        small.memory[0x5000] = b"\xf4"
        assert small.vcpu.run() == KvmExit.KVM_EXIT_MMIO
        small.vcpu.kvm_run.mmio.data[0] = 7
        assert small.vcpu.run() == KvmExit.KVM_EXIT_HLT
        after = small.vcpu.get_regs()
        assert (after.rax, after.rdx, after.rip) == (1000 // 7, 1000 % 7, CODE + 3)
        regs = small.vcpu.get_regs()
        regs.rip = CODE
        small.vcpu.set_regs(regs)
        assert small.vcpu.run() == KvmExit.KVM_EXIT_MMIO
        small.vcpu.kvm_run.mmio.data[0] = 0
        assert small.vcpu.run() == KvmExit.KVM_EXIT_HLT
        assert small.vcpu.get_regs().rip == 0x5001, "the handler of #DE"


def test_a_jump_through_mmio_goes_where_the_device_says(kernel: SimKernel) -> None:
    with mmio_vm(kernel, b"\xff\x17") as small:  # call [bx]
        small.memory[0x6000] = b"\xf4"
        assert small.vcpu.run() == KvmExit.KVM_EXIT_MMIO
        small.vcpu.kvm_run.mmio.data[0], small.vcpu.kvm_run.mmio.data[1] = 0x00, 0x60
        assert small.vcpu.run() == KvmExit.KVM_EXIT_HLT
        assert small.vcpu.get_regs().rip == 0x6001
        assert small.memory.word(0x7FFE) & 0xFFFF == CODE + 2


@pytest.mark.parametrize(("index", "gpa", "bit"), [(0x13, 0x1_0002, 3), (0xFFF5, 0x1_FFFE, 5)])
def test_a_bit_string_reaches_beyond_its_operand(kernel: SimKernel, index: int, gpa: int, bit: int) -> None:
    with mmio_vm(kernel, b"\x0f\xab\x0f", rcx=index) as small:  # bts [bx], cx
        assert small.vcpu.run() == KvmExit.KVM_EXIT_MMIO
        assert (small.vcpu.kvm_run.mmio.phys_addr, small.vcpu.kvm_run.mmio.len) == (gpa, 2)
        assert small.vcpu.run() == KvmExit.KVM_EXIT_MMIO
        assert bytes(small.vcpu.kvm_run.mmio.data)[:2] == bytes((1 << bit, 0))
        assert small.vcpu.run() == KvmExit.KVM_EXIT_HLT


def test_movbe_swaps_the_bytes_of_an_mmio_register(kernel: SimKernel) -> None:
    with mmio_vm(kernel, b"\x0f\x38\xf1\x07", rax=0x1234) as small:  # movbe [bx], ax
        small.vcpu.set_cpuid2(KvmCpuid2.of([KvmCpuidEntry2(function=1, ecx=1 << 22)]))
        assert small.vcpu.run() == KvmExit.KVM_EXIT_MMIO
        assert bytes(small.vcpu.kvm_run.mmio.data)[:2] == b"\x12\x34"
        assert small.vcpu.run() == KvmExit.KVM_EXIT_HLT


@pytest.mark.parametrize("code", [b"\xf2\x0f\x38\xf0\x07", b"\xf2\x0f\x38\xf1\x07"], ids=["byte", "word"])
def test_a_crc32_of_mmio_is_an_emulation_failure(kernel: SimKernel, code: bytes) -> None:
    with mmio_vm(kernel, code) as small:  # crc32 eax, [bx]
        assert small.vcpu.run() == KvmExit.KVM_EXIT_INTERNAL_ERROR
        assert small.vcpu.kvm_run.internal.suberror == 1


def test_a_far_return_pops_its_target_and_its_segment_from_mmio(kernel: SimKernel) -> None:
    with SmallVm(kernel, b"\xca\x04\x00") as small:  # retf 4
        small.memory[0x2340 + 0x10] = b"\xf4"
        sregs = small.vcpu.get_sregs()
        sregs.ss.base = 0x10_0000
        small.vcpu.set_sregs(sregs)
        mmio = small.vcpu.kvm_run.mmio
        for gpa, answer in ((0x10_8000, b"\x10\x00"), (0x10_8002, b"\x34\x02")):
            assert small.vcpu.run() == KvmExit.KVM_EXIT_MMIO
            assert (mmio.phys_addr, mmio.len, mmio.is_write) == (gpa, 2, 0)
            mmio.data[0], mmio.data[1] = answer
        assert small.vcpu.run() == KvmExit.KVM_EXIT_HLT
        regs, sregs = small.vcpu.get_regs(), small.vcpu.get_sregs()
        assert (regs.rip, regs.rsp, sregs.cs.selector, sregs.cs.base) == (0x11, 0x8008, 0x234, 0x2340)


@pytest.mark.parametrize(("kernel", "pending"), [("svm", True), ("7.3", True), ("pvm", False)], indirect=["kernel"])
def test_an_emulation_failure_of_the_guest_s_kernel_queues_ud_unless_its_code_is_interpreted(
    kernel: SimKernel, pending: bool
) -> None:
    with SmallVm(kernel, b"\xd9\x07\xf4") as small:  # fld dword [bx]
        regs = small.vcpu.get_regs()
        regs.rbx = 0
        small.vcpu.set_regs(regs)
        sregs = small.vcpu.get_sregs()
        sregs.ds.base = 0x10_0000
        small.vcpu.set_sregs(sregs)
        assert small.vcpu.run() == KvmExit.KVM_EXIT_INTERNAL_ERROR
        exception = small.vcpu.get_vcpu_events().exception
        assert bool(exception.injected or exception.pending) is pending


@pytest.mark.parametrize(("prefix", "moved", "size"), [(b"", 2, 2), (b"\x66", 4, 2)], ids=["16 bits", "32 bits"])
def test_a_segment_register_pushed_to_mmio_is_its_selector_alone(
    kernel: SimKernel, prefix: bytes, moved: int, size: int
) -> None:
    with SmallVm(kernel, prefix + b"\x1e\xf4") as small:  # push ds
        sregs = small.vcpu.get_sregs()
        sregs.ss.base, sregs.ds.selector = IN_MMIO, 0x1234
        small.vcpu.set_sregs(sregs)
        assert small.vcpu.run() == KvmExit.KVM_EXIT_MMIO
        written = small.vcpu.kvm_run.mmio
        assert (written.phys_addr, written.len) == (IN_MMIO + 0x8000 - moved, size)
        assert bytes(written.data)[:2] == b"\x34\x12"
        assert small.vcpu.get_regs().rsp == 0x8000 - moved


@pytest.mark.parametrize("code", [b"\x1f", b"\x8e\x1f"], ids=["pop ds", "mov ds, [bx]"])
def test_a_segment_register_loaded_from_mmio_in_real_mode_keeps_its_limit(kernel: SimKernel, code: bytes) -> None:
    with SmallVm(kernel, code + b"\xf4") as small:
        sregs = small.vcpu.get_sregs()
        sregs.ss.base = sregs.ds.base = IN_MMIO
        sregs.ds.limit = 0xABCD
        small.vcpu.set_sregs(sregs)
        assert small.vcpu.run() == KvmExit.KVM_EXIT_MMIO
        small.vcpu.kvm_run.mmio.data[:2] = b"\x34\x12"
        assert small.vcpu.run() == KvmExit.KVM_EXIT_HLT
        after = small.vcpu.get_sregs().ds
        assert (after.selector, after.base, after.limit) == (0x1234, 0x12340, 0xABCD)
