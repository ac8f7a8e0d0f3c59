"""Emulating an instruction that touched MMIO (`x86_emulate_instruction` and its MMIO exits).

An attempt runs the whole instruction on a copy of the registers. A read of MMIO that user space has not answered yet
abandons the attempt; it is made again when the answer is there, with the answers so far replayed. A write of MMIO is
posted: the instruction completes, and the exits follow, at most 8 bytes each.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar, Final

from sim_backend.cpu.engine import Cpu
from sim_backend.hw.gprs import RAX, RCX, RDI, RSI, RSP
from sim_backend.kvm.default_vm import alu, memory_instructions
from sim_backend.kvm.default_vm.attempt import (
    FRAGMENT,
    LONGEST,
    Attempt,
    GuestException,
    NeedsRead,
    PageFault,
    Unhandled,
)
from sim_backend.kvm.default_vm.guest_events import UD, raise_in_guest
from sim_backend.kvm.default_vm.instruction import DecodeError, Decoder, Instruction, NotDecoded, segment_of
from sim_backend.kvm.guest_paging import read_guest, translate
from sim_backend.kvm.kvm_run_page import EXIT_REASON, UNION, UNION_U32, UNION_U64

if TYPE_CHECKING:
    from sim_backend.kvm.vcpu import Vcpu

KVM_EXIT_MMIO: Final = 6
KVM_EXIT_INTERNAL_ERROR: Final = 17
KVM_INTERNAL_ERROR_EMULATION: Final = 1
_RFLAGS_DF: Final = 1 << 10
_U64: Final = (1 << 64) - 1


def emulate_instruction(vcpu: "Vcpu", cpu: Cpu, gpa: int, gla: int) -> bool:
    """Emulate the instruction at RIP; return as every exit handler does."""
    del gpa, gla
    return _attempt(vcpu, cpu, [])


def _attempt(vcpu: "Vcpu", cpu: Cpu, answers: list[bytes]) -> bool:
    state = cpu.get_state()
    attempt = Execution(vcpu, cpu, state, answers)
    try:
        code = attempt.fetch()
        instruction = Decoder(cpu, state, code).decode()
        attempt.execute(instruction)
    except NeedsRead as read:
        return _exit_for_read(vcpu, cpu, answers, read.gpa, read.size)
    except PageFault as fault:
        state.cr2 = fault.linear
        cpu.set_state(state)
        return raise_in_guest(vcpu, cpu, 14, (2 if fault.write else 0) | (4 if cpu.cpl() == 3 else 0))
    except GuestException as exception:
        return raise_in_guest(vcpu, cpu, exception.vector)
    except (DecodeError, Unhandled):
        return emulation_failure(vcpu, cpu)
    except NotDecoded:
        raise attempt.not_modelled() from None
    attempt.commit()
    if attempt.fragments:
        return _exit_for_writes(vcpu, attempt.fragments)
    return True


def emulation_failure(vcpu: "Vcpu", cpu: Cpu) -> bool:
    """Report an instruction that cannot be emulated (prepare_emulation_failure_exit); #UD waits for the next entry.

    Not where kvm_pvm's interpreter could not even fetch it: there the next entry tries to fetch again.
    """
    run = vcpu.run
    code = b""
    state = cpu.get_state()
    physical = translate(vcpu, state.cs.base + cpu.rip & _U64)
    if physical is not None:
        code = read_guest(vcpu.vm, physical, LONGEST) or b""
    run.u32[EXIT_REASON] = KVM_EXIT_INTERNAL_ERROR
    run.u32[UNION_U32] = KVM_INTERNAL_ERROR_EMULATION
    run.u32[UNION_U32 + 1] = 1
    run.u64[UNION_U64 + 1] = 0
    if code or not vcpu.vm.host.profile.behaves("interprets_guest_code"):
        vcpu.queue_exception(UD)
    if code:
        run.u32[UNION_U32 + 1] = 4
        run.u64[UNION_U64 + 1] = 1  # KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES
        run.u8[UNION + 16 : UNION + 32] = (bytes((len(code),)) + code).ljust(16, b"\0")
    return False


# ---- exits --------------------------------------------------------------------------------------------------


def _fill_mmio(vcpu: "Vcpu", gpa: int, size: int, data: bytes | None) -> None:
    run = vcpu.run
    run.u32[EXIT_REASON] = KVM_EXIT_MMIO
    run.u64[UNION_U64] = gpa
    if data is not None:
        run.u8[UNION + 8 : UNION + 8 + size] = data
    run.u32[UNION_U32 + 4] = size
    run.u8[UNION + 20] = data is not None


def _exit_for_read(vcpu: "Vcpu", cpu: Cpu, answers: list[bytes], gpa: int, size: int) -> bool:
    pieces: list[bytes] = []

    def ask(offset: int) -> bool:
        part = min(FRAGMENT, size - offset)
        _fill_mmio(vcpu, gpa + offset, part, None)

        def complete() -> bool:
            pieces.append(bytes(vcpu.run.u8[UNION + 8 : UNION + 8 + part]))
            if offset + part < size:
                return ask(offset + part)
            return _attempt(vcpu, cpu, [*answers, b"".join(pieces)])

        vcpu.complete_userspace_io = complete
        return False

    return ask(0)


def _exit_for_writes(vcpu: "Vcpu", fragments: list[tuple[int, bytes]]) -> bool:
    def tell(index: int) -> bool:
        gpa, data = fragments[index]
        _fill_mmio(vcpu, gpa, len(data), data)

        def complete() -> bool:
            return True if index + 1 == len(fragments) else tell(index + 1)

        vcpu.complete_userspace_io = complete
        return False

    return tell(0)


# ---- one attempt --------------------------------------------------------------------------------------------


class Execution(Attempt):
    """An attempt that knows the instructions."""

    # ---- instructions ---------------------------------------------------------------------------------------

    def execute(self, one: Instruction) -> None:
        """Execute `one`; raise what ends the attempt."""
        opcode = one.opcode
        if 0xA4 <= opcode <= 0xAF and opcode not in (0xA8, 0xA9):
            self._string(one)
            return
        self.rip += one.length
        size = 1 if not opcode & 1 else one.operand_bytes
        if opcode < 0x40:
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
        accumulator = self.get(RAX, size, 1)
        _, self.rflags = alu.alu(alu.CMP, accumulator, old, 8 * size, self.rflags)
        if accumulator == old:
            self.write_rm(one, size, self.get(one.reg, size, one.rex))
        else:
            self.write_rm(one, size, old)
            self.put(RAX, size, old, 1)

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
            count = 1 if one.opcode < 0xD2 else self.gprs[RCX] & 0xFF
        result, self.rflags = alu.shift(one.reg & 7, self.read_rm(one, size), count, 8 * size, self.rflags)
        self.write_rm(one, size, result)

    def _push_register(self, one: Instruction, _size: int) -> None:
        self.push_value(one, self.gprs[one.reg])

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
        self.store(self.linear("ss", top, 8 if mask == _U64 else 4), size, value)
        self.gprs[RSP] = self.gprs[RSP] & ~mask & _U64 | top

    def _pop_register(self, one: Instruction, _size: int) -> None:
        self.put(one.reg, self.stack_bytes(one), self.pop_value(one), 1)

    def pop_value(self, one: Instruction) -> int:
        """Pop a value."""
        size, mask = self.stack_bytes(one), self.stack_mask()
        top = self.gprs[RSP] & mask
        value = self.load(self.linear("ss", top, 8 if mask == _U64 else 4), size)
        self.gprs[RSP] = self.gprs[RSP] & ~mask & _U64 | top + size & mask
        return value

    # ---- strings --------------------------------------------------------------------------------------------

    def _string(self, one: Instruction) -> None:
        """One element; with a repeat prefix RIP stays until the count is used up."""
        size = 1 if not one.opcode & 1 else one.operand_bytes
        mask = (1 << 8 * one.address_bytes) - 1
        step = -size if self.rflags & _RFLAGS_DF else size
        gprs = self.gprs
        if one.repeat and not gprs[RCX] & mask:
            self.rip += one.length
            return
        source = self.linear(one.segment, gprs[RSI], one.address_bytes)
        destination = self.linear("es", gprs[RDI], one.address_bytes)
        kind = one.opcode & ~1
        if kind == 0xA4:
            self.store(destination, size, self.load(source, size))
        elif kind == 0xAA:
            self.store(destination, size, self.get(RAX, size, 1))
        elif kind == 0xAC:
            self.put(RAX, size, self.load(source, size), 1)
        else:
            left = self.load(source, size) if kind == 0xA6 else self.get(RAX, size, 1)
            right = self.load(destination, size)
            _, self.rflags = alu.alu(alu.CMP, left, right, 8 * size, self.rflags)
        if kind in (0xA4, 0xA6, 0xAC):
            self._advance(RSI, step, mask)
        if kind != 0xAC:
            self._advance(RDI, step, mask)
        if not one.repeat:
            self.rip += one.length
            return
        self._advance(RCX, -1, mask)
        stopped = kind in (0xA6, 0xAE) and bool(self.rflags & alu.ZF) != (one.repeat == 0xF3)
        if not gprs[RCX] & mask or stopped:
            self.rip += one.length

    def _advance(self, register: int, delta: int, mask: int) -> None:
        value = self.gprs[register] + delta & mask
        self.gprs[register] = value if mask >> 16 else self.gprs[register] & ~mask | value

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
