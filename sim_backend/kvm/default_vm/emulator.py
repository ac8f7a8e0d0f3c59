"""Emulating an instruction that touched MMIO (`x86_emulate_instruction` and its MMIO exits).

An attempt runs the whole instruction on a copy of the registers. A read of MMIO that user space has not answered yet
abandons the attempt; it is made again when the answer is there, with the answers so far replayed. A write of MMIO is
posted: the instruction completes, and the exits follow, at most 8 bytes each.
"""

import struct
from collections.abc import Callable
from copy import copy
from typing import TYPE_CHECKING, ClassVar, Final

from sim_backend.cpu.engine import Cpu, ExitReason
from sim_backend.hw.gprs import RAX, RCX, RSP
from sim_backend.kvm.default_vm import alu, memory_instructions
from sim_backend.kvm.default_vm.attempt import (
    Attempt,
    Decoded,
    GuestException,
    NeedsPort,
    NeedsRead,
    PageFault,
    Unhandled,
    not_modelled,
)
from sim_backend.kvm.default_vm.guest_events import UD, raise_in_guest
from sim_backend.kvm.default_vm.instruction import DecodeError, Decoder, Instruction, NotDecoded, segment_of
from sim_backend.kvm.default_vm.io_exits import (
    exit_for_mmio_reads,
    exit_for_mmio_writes,
    exit_for_port_read,
    exit_for_port_write,
    port_data,
)
from sim_backend.kvm.default_vm.string_instructions import STRINGS, execute_string, goes_on
from sim_backend.kvm.kvm_run_page import EXIT_REASON, UNION_U32, UNION_U64

if TYPE_CHECKING:
    from sim_backend.kvm.vcpu import Vcpu

KVM_EXIT_INTERNAL_ERROR: Final = 17
KVM_INTERNAL_ERROR_EMULATION: Final = 1
_PREFIXES: Final = bytes((0x26, 0x2E, 0x36, 0x3E, 0x64, 0x65, 0x66, 0x67, 0xF0, 0xF2, 0xF3, *range(0x40, 0x50)))
_STRING_IO: Final = (b"\x6c", b"\x6d", b"\x6e", b"\x6f")
_FLAG_INSTRUCTION_BYTES: Final = 1
_INSTRUCTION: Final = struct.Struct("<QQ")  # size [bytes], then 15 bytes
_SVM: Final = 1  # KVM_STATE_NESTED_FORMAT_SVM
_SVM_EXIT_NPF: Final = 0x400
_NPF_WRITE, _NPF_USER, _NPF_RESERVED, _NPF_FETCH = 1 << 1, 1 << 2, 1 << 3, 1 << 4
_NPF_GUEST_PAGE: Final = 1 << 32  # it came from translating the final address
_RFLAGS_RF: Final = 1 << 16
_U64: Final = (1 << 64) - 1


def emulate_instruction(vcpu: "Vcpu", cpu: Cpu) -> bool:
    """Emulate the instruction at RIP; return as every exit handler does."""
    state = cpu.get_state()
    try:
        code = Execution.fetch(vcpu, cpu, state)
        instruction = Decoder(cpu, state, code).decode()
    except (DecodeError, Unhandled):
        return emulation_failure(vcpu, cpu)
    except NotDecoded:
        raise not_modelled(cpu, code) from None
    decoded = Decoded(state, list(cpu.gprs), cpu.rip, cpu.rflags, cpu.in_64bit_mode(), instruction, code, [])
    vcpu.registers_set = False
    return _execute(vcpu, cpu, decoded)


def at_string_io(vcpu: "Vcpu", cpu: Cpu) -> bool:
    """Tell whether INS or OUTS is at RIP."""
    try:
        code = Execution.fetch(vcpu, cpu, cpu.get_state())
    except Unhandled:
        return False
    return code.lstrip(_PREFIXES)[:1] in _STRING_IO


def _execute(vcpu: "Vcpu", cpu: Cpu, decoded: Decoded) -> bool:
    """Execute what was decoded, repeatedly where it is a repeated string instruction, or go to user space first."""
    decoded.stale |= vcpu.registers_set
    while True:
        attempt = Execution(vcpu, cpu, decoded)
        try:
            attempt.execute(copy(decoded.instruction))
        except (NeedsRead, NeedsPort) as read:
            return _ask(vcpu, cpu, decoded, read)
        except PageFault as fault:
            state = cpu.get_state()
            state.cr2 = fault.linear
            cpu.set_state(state)
            return raise_in_guest(vcpu, cpu, 14, (2 if fault.write else 0) | (4 if cpu.cpl() == 3 else 0))
        except GuestException as exception:
            return raise_in_guest(vcpu, cpu, exception.vector)
        except Unhandled:
            return emulation_failure(vcpu, cpu)
        exits = attempt.port_write is not None or bool(attempt.fragments)
        if exits or not goes_on(attempt, decoded):
            break
        attempt.commit_gprs()
        decoded.operands, decoded.rflags, decoded.reads = list(attempt.gprs), attempt.rflags, []
    attempt.commit()
    if attempt.port_write is not None:
        return exit_for_port_write(vcpu, *attempt.port_write)
    if attempt.fragments:
        return exit_for_mmio_writes(vcpu, attempt.fragments)
    return True


def _ask(vcpu: "Vcpu", cpu: Cpu, decoded: Decoded, read: NeedsRead | NeedsPort) -> bool:
    """Exit for a read; RIP and RFLAGS stay as they were until the instruction is over."""
    if isinstance(read, NeedsRead):
        parts = read.parts

        def resume(answers: list[bytes]) -> bool:
            data = b"".join(part if part is not None else answers.pop(0) for part in parts)
            decoded.reads.append(int.from_bytes(data, "little"))
            return _execute(vcpu, cpu, decoded)

        return exit_for_mmio_reads(vcpu, read.fragments, resume)
    length = read.size * read.count

    def resume_input() -> bool:
        decoded.port_data = port_data(vcpu, length)
        return _execute(vcpu, cpu, decoded)

    return exit_for_port_read(vcpu, read.port, read.size, read.count, resume_input)


def emulation_failure(vcpu: "Vcpu", cpu: Cpu) -> bool:
    """Report an instruction that cannot be emulated, or make it #UD (`handle_emulation_failure`).

    User space hears of it when it asked to, and the guest does not; or when it is the guest's kernel, which takes its
    #UD at the next entry. Not where kvm_pvm's interpreter met it: there the next entry tries again.
    """
    try:
        code = Execution.fetch(vcpu, cpu, cpu.get_state())
    except Unhandled:
        code = b""
    if not vcpu.vm.exit_on_emulation_failure:
        if cpu.cpl():
            return raise_in_guest(vcpu, cpu, UD)
        if not vcpu.vm.host.profile.behaves("interprets_guest_code"):
            vcpu.queue_exception(UD)
    words = [0]  # flags
    if code:
        in_first_page = code[: 0x1000 - (cpu.rip & 0xFFF)]
        words[0] = _FLAG_INSTRUCTION_BYTES
        words += _INSTRUCTION.unpack(bytes((len(in_first_page),)) + in_first_page.ljust(_INSTRUCTION.size - 1, b"\x90"))
    words += exit_information(vcpu, cpu)
    run = vcpu.run
    run.u32[EXIT_REASON] = KVM_EXIT_INTERNAL_ERROR
    run.u32[UNION_U32] = KVM_INTERNAL_ERROR_EMULATION
    run.u32[UNION_U32 + 1] = len(words)
    for index, word in enumerate(words, UNION_U64 + 1):
        run.u64[index] = word
    return False


def exit_information(vcpu: "Vcpu", cpu: Cpu) -> tuple[int, int, int, int, int]:
    """Return exit reason, its two words, interruption information and error code (`kvm_x86_ops.get_exit_info`)."""
    exit_ = cpu.exit
    if vcpu.vm.host.profile.nested_format != _SVM or exit_.reason != ExitReason.EPT_VIOLATION:
        return exit_.reason, exit_.qualification, exit_.gpa, 0, 0
    wanted = exit_.qualification & 7
    error_code = _NPF_GUEST_PAGE | _NPF_USER | (_NPF_WRITE if wanted & 2 else 0) | (_NPF_FETCH if wanted & 4 else 0)
    if vcpu.vendor.hit_mmio_mark:
        error_code |= _NPF_RESERVED
    return _SVM_EXIT_NPF, error_code, exit_.gpa, 0, 0


# ---- one attempt --------------------------------------------------------------------------------------------


class Execution(Attempt):
    """An attempt that knows the instructions."""

    # ---- instructions ---------------------------------------------------------------------------------------

    def execute(self, one: Instruction) -> None:
        """Execute `one`; raise what ends the attempt."""
        opcode = one.opcode
        self.rflags &= ~_RFLAGS_RF
        if opcode in STRINGS:
            execute_string(self, one)
            return
        self.rip += one.length
        size = 1 if not opcode & 1 else one.operand_bytes
        if opcode < 0x40 and opcode & 7 < 6:
            self._alu_form(one, size)
        elif opcode in self.HANDLERS:
            self.HANDLERS[opcode](self, one, size)
        elif opcode in memory_instructions.HANDLERS:
            memory_instructions.HANDLERS[opcode](self, one, size)
        else:
            raise Unhandled

    def _alu_form(self, one: Instruction, size: int) -> None:
        operation, form = one.opcode >> 3, one.opcode & 7
        if form in (4, 5):
            left, right = self.get(RAX, size, 1), one.immediate
        elif form in (0, 1):
            left, right = self.read_rm(one, size), self.get(one.reg, size, one.rex)
        else:
            left, right = self.get(one.reg, size, one.rex), self.read_rm(one, size)
        result, self.rflags = alu.alu(operation, left, right, 8 * size, self.rflags)
        if operation == alu.CMP:
            return
        if form in (0, 1):
            self.write_rm(one, size, result)
        else:
            self.put(RAX if form in (4, 5) else one.reg, size, result, one.rex if form in (2, 3) else 1)

    def _group1(self, one: Instruction, size: int) -> None:
        size = 1 if one.opcode in (0x80, 0x82) else one.operand_bytes
        operation = one.reg & 7
        result, self.rflags = alu.alu(operation, self.read_rm(one, size), one.immediate, 8 * size, self.rflags)
        if operation != alu.CMP:
            self.write_rm(one, size, result)

    def _mov_to_rm(self, one: Instruction, size: int) -> None:
        self.write_rm(one, size, self.get(one.reg, size, one.rex))

    def _mov_from_rm(self, one: Instruction, size: int) -> None:
        self.put(one.reg, size, self.read_rm(one, size), one.rex)

    def _mov_immediate(self, one: Instruction, size: int) -> None:
        self.write_rm(one, size, one.immediate)

    def _mov_from_offset(self, one: Instruction, size: int) -> None:
        self.put(RAX, size, self.read_rm(one, size), 1)

    def _mov_to_offset(self, one: Instruction, size: int) -> None:
        self.write_rm(one, size, self.get(RAX, size, 1))

    def _mov_from_segment(self, one: Instruction, _size: int) -> None:
        names = ("es", "cs", "ss", "ds", "fs", "gs")
        self.write_rm(one, 2, segment_of(self.state, names[one.reg & 7]).selector)

    def _extend(self, one: Instruction, _size: int) -> None:
        width = 1 if one.opcode in (0x0FB6, 0x0FBE) else 4 if one.opcode == 0x63 else 2
        value = self.read_rm(one, width)
        if one.opcode in (0x0FBE, 0x0FBF, 0x63) and value >> (8 * width - 1):
            value -= 1 << 8 * width
        self.put(one.reg, one.operand_bytes, value, one.rex)

    def _exchange(self, one: Instruction, size: int) -> None:
        old = self.read_rm(one, size)
        self.write_rm(one, size, self.get(one.reg, size, one.rex))
        self.put(one.reg, size, old, one.rex)

    def _compare_exchange(self, one: Instruction, size: int) -> None:
        old = self.read_rm(one, size)
        accumulator = self.gprs[RAX] & (1 << 8 * size) - 1
        _, self.rflags = alu.alu(alu.CMP, accumulator, old, 8 * size, self.rflags)
        if accumulator == old:
            self.write_rm(one, size, self.get(one.reg, size, one.rex))
        else:
            self.write_rm(one, size, old)
            self.put_late(RAX, size, old, 1)

    def _exchange_add(self, one: Instruction, size: int) -> None:
        old = self.read_rm(one, size)
        result, self.rflags = alu.alu(alu.ADD, old, self.get(one.reg, size, one.rex), 8 * size, self.rflags)
        self.write_rm(one, size, result)
        self.put(one.reg, size, old, one.rex)

    def _test(self, one: Instruction, size: int) -> None:
        _, self.rflags = alu.alu(
            alu.AND, self.read_rm(one, size), self.get(one.reg, size, one.rex), 8 * size, self.rflags
        )

    def _group3(self, one: Instruction, size: int) -> None:
        operation, bits = one.reg & 7, 8 * size
        value = self.read_rm(one, size)
        if operation in (0, 1):
            _, self.rflags = alu.alu(alu.AND, value, one.immediate, bits, self.rflags)
        elif operation == 2:
            self.write_rm(one, size, ~value)
        elif operation == 3:
            result, self.rflags = alu.alu(alu.SUB, 0, value, bits, self.rflags)
            self.write_rm(one, size, result)
        else:
            memory_instructions.multiply_or_divide(self, operation, value, size)

    def _group45(self, one: Instruction, size: int) -> None:
        operation = one.reg & 7
        if operation in (0, 1):
            delta = 1 if operation == 0 else -1
            result, self.rflags = alu.increment(self.read_rm(one, size), delta, 8 * size, self.rflags)
            self.write_rm(one, size, result)
        elif operation == 6 and one.opcode == 0xFF:
            self.push_value(one, self.read_rm(one, size))
        elif operation in (2, 4) and one.opcode == 0xFF:
            memory_instructions.jump_or_call(self, one)
        elif operation in (3, 5) and one.opcode == 0xFF:
            raise self.not_modelled()
        else:
            raise Unhandled

    def _shift(self, one: Instruction, size: int) -> None:
        if one.opcode in (0xC0, 0xC1):
            count = one.immediate & 0xFF
        else:
            count = 1 if one.opcode < 0xD2 else self.get(RCX, 1, 1)
        result, self.rflags = alu.shift(one.reg & 7, self.read_rm(one, size), count, 8 * size, self.rflags)
        self.write_rm(one, size, result)

    def _push_register(self, one: Instruction, _size: int) -> None:
        self.push_value(one, self.get(one.reg, 8, 1))

    def _push_immediate(self, one: Instruction, _size: int) -> None:
        self.push_value(one, one.immediate)

    def stack_bytes(self, one: Instruction) -> int:
        """Return the width of what the instruction pushes or pops [bytes]."""
        return 8 if self.long_mode and one.operand_bytes == 4 else one.operand_bytes

    def stack_mask(self) -> int:
        """Return the mask of the stack pointer."""
        if self.long_mode:
            return _U64
        return 0xFFFF_FFFF if self.state.ss.ar >> 14 & 1 else 0xFFFF

    def push_value(self, one: Instruction, value: int) -> None:
        """Push a value."""
        size, mask = self.stack_bytes(one), self.stack_mask()
        top = self.gprs[RSP] - size & mask
        self.store(self.linear("ss", top, 8 if mask == _U64 else 4, size, write=True), size, value)
        self.gprs[RSP] = self.gprs[RSP] & ~mask & _U64 | top

    def move_stack(self, delta: int) -> None:
        """Add to the stack pointer."""
        mask = self.stack_mask()
        self.gprs[RSP] = self.gprs[RSP] & ~mask & _U64 | self.gprs[RSP] + delta & mask

    def _pop_register(self, one: Instruction, _size: int) -> None:
        self.put(one.reg, self.stack_bytes(one), self.pop_value(one), 1)

    def pop_value(self, one: Instruction) -> int:
        """Pop a value."""
        size, mask = self.stack_bytes(one), self.stack_mask()
        top = self.gprs[RSP] & mask
        value = self.load(self.linear("ss", top, 8 if mask == _U64 else 4, size), size)
        self.gprs[RSP] = self.gprs[RSP] & ~mask & _U64 | top + size & mask
        return value

    HANDLERS: ClassVar[dict[int, "Callable[[Execution, Instruction, int], None]"]] = {
        **dict.fromkeys(range(0x50, 0x58), _push_register),
        **dict.fromkeys(range(0x58, 0x60), _pop_register),
        **dict.fromkeys((0x68, 0x6A), _push_immediate),
        **dict.fromkeys((0x80, 0x81, 0x82, 0x83), _group1),
        **dict.fromkeys((0x84, 0x85), _test),
        **dict.fromkeys((0x86, 0x87), _exchange),
        **dict.fromkeys((0x88, 0x89, 0x0FC3), _mov_to_rm),
        **dict.fromkeys((0x8A, 0x8B), _mov_from_rm),
        0x8C: _mov_from_segment,
        **dict.fromkeys((0xA0, 0xA1), _mov_from_offset),
        **dict.fromkeys((0xA2, 0xA3), _mov_to_offset),
        **dict.fromkeys((0xC0, 0xC1, 0xD0, 0xD1, 0xD2, 0xD3), _shift),
        **dict.fromkeys((0xC6, 0xC7), _mov_immediate),
        **dict.fromkeys((0xF6, 0xF7), _group3),
        **dict.fromkeys((0xFE, 0xFF), _group45),
        **dict.fromkeys((0x0FB6, 0x0FB7, 0x0FBE, 0x0FBF, 0x63), _extend),
        **dict.fromkeys((0x0FB0, 0x0FB1), _compare_exchange),
        **dict.fromkeys((0x0FC0, 0x0FC1), _exchange_add),
    }
