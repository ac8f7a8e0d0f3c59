"""Instructions that the emulator meets less often: bits, products, conditions, wide moves and near control transfers.

Each is a function of the attempt, the decoded instruction and its operand size, as the others in `emulator`. Flags that
the manuals leave undefined are QEMU's, or stay as they are.
"""

from collections.abc import Callable
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, TypeAlias

from sim_backend.hw.gprs import RAX, RBX, RCX, RDX, RSP
from sim_backend.kvm.default_vm import alu
from sim_backend.kvm.default_vm.attempt import GuestException, Unhandled
from sim_backend.kvm.default_vm.guest_events import GP, UD
from sim_backend.kvm.default_vm.instruction import POPPED_SEGMENTS, PUSHED_SEGMENTS, Instruction, segment_of
from sim_backend.kvm.guest_paging import read_guest

if TYPE_CHECKING:
    from sim_backend.kvm.default_vm.emulator import Execution

Handler: TypeAlias = Callable[["Execution", Instruction, int], None]

_DE: Final = 0
_CF_OF: Final = alu.CF | alu.OF
_BT, _BTS, _BTR, _BTC = range(4)
_CPUID_MOVBE: Final = 1 << 22  # leaf 1, ECX
_XMM_AREA: Final = 160  # [bytes] into an FXSAVE image
_RFLAGS_POPF: Final = 0x24_4FD5 | 1 << 9  # what POPF at CPL 0 loads, VM, VIP, VIF and RF left out
_RFLAGS_INT_CLEARS: Final = 1 << 8 | 1 << 9 | 1 << 18  # TF, IF, AC
_RFLAGS_PUSHF_HIDES: Final = 0x3_0000  # VM and RF


# ---- bits -----------------------------------------------------------------------------------------------------


def _bit_operation(at: "Execution", one: Instruction, size: int, operation: int, index: int) -> None:
    value = at.read_rm(one, size)
    mask = 1 << (index & 8 * size - 1)
    at.rflags = at.rflags & ~alu.CF | bool(value & mask)
    if operation == _BTS:
        at.write_rm(one, size, value | mask)
    elif operation == _BTR:
        at.write_rm(one, size, value & ~mask)
    elif operation == _BTC:
        at.write_rm(one, size, value ^ mask)


def _bit_of_register(at: "Execution", one: Instruction, _size: int) -> None:
    """BT, BTS, BTR, BTC with a register: a bit string in memory, of which the register may leave the operand."""
    size = one.operand_bytes
    index = at.get(one.reg, size, one.rex)
    if one.is_memory:
        signed = index - (1 << 8 * size) if index >> 8 * size - 1 else index
        one.offset += (signed & -8 * size) >> 3
    _bit_operation(at, one, size, one.opcode >> 3 & 3, index)


def _bit_of_immediate(at: "Execution", one: Instruction, _size: int) -> None:
    if not one.reg & 4:
        raise Unhandled
    _bit_operation(at, one, one.operand_bytes, one.reg & 3, one.immediate)


def _bit_scan(at: "Execution", one: Instruction, _size: int) -> None:
    size = one.operand_bytes
    value = at.read_rm(one, size)
    _undefined_flags(at, value, 8 * size)
    if value:
        forward = one.opcode == 0x0FBC
        at.put(one.reg, size, (value & -value).bit_length() - 1 if forward else value.bit_length() - 1, one.rex)


# ---- products and quotients -----------------------------------------------------------------------------------


def _signed(value: int, bits: int) -> int:
    return value - (1 << bits) if value >> bits - 1 else value


def _undefined_flags(at: "Execution", value: int, bits: int) -> None:
    """Set the flags that the manuals leave undefined as QEMU does: by `value`."""
    _, at.rflags = alu.alu(alu.OR, value, value, bits, at.rflags)


def _set_overflow(at: "Execution", overflow: bool) -> None:
    at.rflags = at.rflags & ~_CF_OF | (_CF_OF if overflow else 0)


def multiply_or_divide(at: "Execution", operation: int, operand: int, size: int) -> None:
    """MUL, IMUL, DIV, IDIV of the accumulator (F6 and F7 /4 to /7)."""
    bits = 8 * size
    signed = operation in (5, 7)
    if signed:
        operand = _signed(operand, bits)
    if operation in (4, 5):
        left = at.get(RAX, size, 1)
        product = (_signed(left, bits) if signed else left) * operand
        _put_pair(at, size, product)
        low = product & (1 << bits) - 1
        _undefined_flags(at, low, bits)
        _set_overflow(at, product != (_signed(low, bits) if signed else low))
        return
    dividend = at.get(RAX, 2, 1) if size == 1 else at.get(RDX, size, 1) << bits | at.get(RAX, size, 1)
    if signed:
        dividend = _signed(dividend, 2 * bits)
    if not operand:
        raise GuestException(_DE)
    quotient = abs(dividend) // abs(operand)
    if (dividend < 0) != (operand < 0):
        quotient = -quotient
    remainder = dividend - quotient * operand
    if not (-(1 << bits - 1) <= quotient < 1 << bits - 1 if signed else quotient < 1 << bits):
        raise GuestException(_DE)
    mask = (1 << bits) - 1
    _put_pair(at, size, (remainder & mask) << bits | quotient & mask)


def _put_pair(at: "Execution", size: int, value: int) -> None:
    """Store a double-width result in AX, or in xDX:xAX."""
    if size == 1:
        at.put(RAX, 2, value, 1)
        return
    at.put(RAX, size, value, 1)
    at.put(RDX, size, value >> 8 * size, 1)


def _multiply_register(at: "Execution", one: Instruction, _size: int) -> None:
    """IMUL with two operands, or three (69, 6B)."""
    size = one.operand_bytes
    bits = 8 * size
    operand = _signed(at.read_rm(one, size), bits)
    other = one.immediate if one.opcode in (0x69, 0x6B) else _signed(at.get(one.reg, size, one.rex), bits)
    product = operand * other
    _undefined_flags(at, product & (1 << bits) - 1, bits)
    at.put(one.reg, size, product, one.rex)
    _set_overflow(at, product != _signed(product & (1 << bits) - 1, bits))


# ---- conditions -----------------------------------------------------------------------------------------------


def _condition(rflags: int, code: int) -> bool:
    less = bool(rflags & alu.SF) != bool(rflags & alu.OF)
    zero = bool(rflags & alu.ZF)
    holds = (
        bool(rflags & alu.OF),
        bool(rflags & alu.CF),
        zero,
        bool(rflags & alu.CF) or zero,
        bool(rflags & alu.SF),
        bool(rflags & alu.PF),
        less,
        less or zero,
    )[code >> 1 & 7]
    return holds != bool(code & 1)


def _set_byte(at: "Execution", one: Instruction, _size: int) -> None:
    at.write_rm(one, 1, _condition(at.rflags, one.opcode & 15))


def _conditional_move(at: "Execution", one: Instruction, _size: int) -> None:
    size = one.operand_bytes
    value = at.read_rm(one, size)
    if _condition(at.rflags, one.opcode & 15):
        at.put(one.reg, size, value, one.rex)
    elif size == 4:
        at.put(one.reg, size, at.get(one.reg, size, one.rex), one.rex)


# ---- moves ----------------------------------------------------------------------------------------------------


def _pop_to_rm(at: "Execution", one: Instruction, _size: int) -> None:
    if one.reg & 7:
        raise Unhandled
    size = at.stack_bytes(one)
    at.write_rm(one, size, at.pop_value(one))


def _load_segment(at: "Execution", one: Instruction, _size: int) -> None:
    """MOV to a segment register; in real mode the limit and the rest stay."""
    number = one.reg & 7
    if number in (1, 6, 7):
        raise GuestException(UD)
    selector = at.read_rm(one, 2)
    if at.state.cr0 & 1 or number == 2:
        raise at.not_modelled()  # descriptors; and the shadow that loading SS casts
    at.load_real_segment(("es", "cs", "ss", "ds", "fs", "gs")[number], selector)


def _push_segment(at: "Execution", one: Instruction, _size: int) -> None:
    """PUSH of a segment register: of four bytes only the selector's two are written."""
    selector = segment_of(at.state, PUSHED_SEGMENTS[one.opcode]).selector
    if at.stack_bytes(one) == 4:
        at.move_stack(-2)
        one.operand_bytes = 2
    at.push_value(one, selector)


def _pop_segment(at: "Execution", one: Instruction, _size: int) -> None:
    name = POPPED_SEGMENTS[one.opcode]
    if at.state.cr0 & 1 or name == "ss":
        raise at.not_modelled()  # descriptors; and the shadow that loading SS casts
    size, one.operand_bytes = at.stack_bytes(one), 2
    selector = at.pop_value(one)
    at.move_stack(size - 2)
    at.load_real_segment(name, selector)


def _store_machine_status(at: "Execution", one: Instruction, _size: int) -> None:
    """SMSW, of group 7; the other members touch descriptor tables."""
    if one.reg & 7 == 5:
        raise Unhandled
    if one.reg & 7 != 4:
        raise at.not_modelled()
    at.write_rm(one, 2 if one.is_memory else one.operand_bytes, at.state.cr0)


def _compare_exchange_pair(at: "Execution", one: Instruction, _size: int) -> None:
    """CMPXCHG8B; CMPXCHG16B the kernel does not emulate."""
    if one.reg & 7 != 1 or one.operand_bytes == 8:
        raise Unhandled
    old = at.read_rm(one, 8)
    if old == at.get(RDX, 4, 1) << 32 | at.get(RAX, 4, 1):
        at.rflags |= alu.ZF
        at.write_rm(one, 8, at.get(RCX, 4, 1) << 32 | at.get(RBX, 4, 1))
    else:
        at.rflags &= ~alu.ZF
        at.put_late(RAX, 4, old, 1)
        at.put_late(RDX, 4, old >> 32, 1)


def _move_swapped(at: "Execution", one: Instruction, _size: int) -> None:
    """MOVBE, which is #UD unless the guest's CPUID has it (`guest_cpuid_has_movbe`)."""
    size = one.operand_bytes
    if not one.is_memory:
        raise Unhandled
    loads = one.opcode == 0x0F38F0
    value = at.read_rm(one, size) if loads else at.get(one.reg, size, one.rex)
    features = at.vcpu.cpuid.find(1)
    if features is None or not features.ecx & _CPUID_MOVBE:
        raise GuestException(UD)
    swapped = int.from_bytes(value.to_bytes(size, "little"))
    if loads:
        at.put(one.reg, size, swapped, one.rex)
    else:
        at.write_rm(one, size, swapped)


_UNALIGNED: Final = {(0x0F10, 0), (0x0F11, 0), (0x0F10, 0x66), (0x0F11, 0x66), (0x0F6F, 0xF3), (0x0F7F, 0xF3)}
_ALIGNED: Final = {
    *((opcode, prefix) for opcode in (0x0F28, 0x0F29, 0x0F2B) for prefix in (0, 0x66)),
    *((opcode, 0x66) for opcode in (0x0F6F, 0x0F7F, 0x0FE7)),
}
_XMM_STORES: Final = (0x0F11, 0x0F29, 0x0F2B, 0x0F7F, 0x0FE7)


def _move_xmm(at: "Execution", one: Instruction, _size: int) -> None:
    """Move 16 bytes between memory and an XMM register."""
    form = (one.opcode, one.mandatory_prefix)
    if form in ((0x0F6F, 0), (0x0F7F, 0)):
        raise at.not_modelled()
    if not one.is_memory or (form not in _UNALIGNED and form not in _ALIGNED):
        raise Unhandled
    if form in _ALIGNED and at.linear(one.segment, one.offset, one.address_bytes, 16) & 15:
        raise GuestException(GP)
    image = at.state.fxsave
    place = _XMM_AREA + 16 * one.reg
    if one.opcode in _XMM_STORES:
        at.write_rm(one, 16, int.from_bytes(image[place : place + 16], "little"))
        return
    at.set_fxsave(image[:place] + at.read_rm(one, 16).to_bytes(16, "little") + image[place + 16 :])


def _x87_or_group15(at: "Execution", one: Instruction, _size: int) -> None:
    """Of x87 the kernel has FNSTCW and FNSTSW, of group 15 FXSAVE, FXRSTOR and CLFLUSH."""
    if one.opcode == 0x0FAE and one.reg & 7 == 7:
        return
    known = (0, 1) if one.opcode == 0x0FAE else (7,)
    if one.reg & 7 in known:
        raise at.not_modelled()
    raise Unhandled


# ---- near control transfers -----------------------------------------------------------------------------------


def jump_or_call(at: "Execution", one: Instruction) -> None:
    """CALL and JMP through memory (FF /2 and /4)."""
    target = at.branch_target(at.read_rm(one, at.stack_bytes(one)))
    if one.reg & 7 == 2:
        at.push_value(one, at.rip)
    at.rip = target


def _call_relative(at: "Execution", one: Instruction, _size: int) -> None:
    target = at.branch_target(at.rip + one.immediate & (1 << 8 * at.stack_bytes(one)) - 1)
    at.push_value(one, at.rip)
    at.rip = target


def _return(at: "Execution", one: Instruction, _size: int) -> None:
    target = at.branch_target(at.pop_value(one))
    if one.opcode == 0xC2:
        mask = at.stack_mask()
        at.gprs[RSP] = at.gprs[RSP] & ~mask | at.gprs[RSP] + (one.immediate & 0xFFFF) & mask
    at.rip = target


def _return_far(at: "Execution", one: Instruction, _size: int) -> None:
    """RETF in real mode (`em_ret_far`)."""
    if at.state.cr0 & 1:
        raise at.not_modelled()
    target, selector = at.pop_value(one), at.pop_value(one)
    if one.opcode == 0xCA:
        mask = at.stack_mask()
        at.gprs[RSP] = at.gprs[RSP] & ~mask | at.gprs[RSP] + (one.immediate & 0xFFFF) & mask
    at.load_real_segment("cs", selector & 0xFFFF)
    at.rip = at.branch_target(target)


def _interrupt(at: "Execution", one: Instruction, _size: int) -> None:
    """INT3 and INT in real mode; elsewhere the kernel does not emulate them."""
    if at.state.cr0 & 1:
        raise Unhandled
    vector = 3 if one.opcode == 0xCC else one.immediate & 0xFF
    at.push_value(one, at.rflags)
    at.rflags &= ~_RFLAGS_INT_CLEARS
    at.push_value(one, at.state.cs.selector)
    at.push_value(one, at.rip)
    entry = read_guest(at.vcpu.vm, at.state.idtr_base + 4 * vector, 4)
    if entry is None:
        raise Unhandled
    at.load_real_segment("cs", int.from_bytes(entry[2:], "little"))
    at.rip = int.from_bytes(entry[:2], "little")


def _push_flags(at: "Execution", one: Instruction, _size: int) -> None:
    at.push_value(one, at.rflags & ~_RFLAGS_PUSHF_HIDES)


def _pop_flags(at: "Execution", one: Instruction, _size: int) -> None:
    if at.cpl():
        raise at.not_modelled()  # IOPL and IF depend on the privilege level
    mask = _RFLAGS_POPF & (1 << 8 * at.stack_bytes(one)) - 1
    at.rflags = at.rflags & ~mask | at.pop_value(one) & mask


HANDLERS: Final = MappingProxyType[int, Handler](
    {
        **dict.fromkeys((0x0FA3, 0x0FAB, 0x0FB3, 0x0FBB), _bit_of_register),
        0x0FBA: _bit_of_immediate,
        0x0FBC: _bit_scan,
        0x0FBD: _bit_scan,
        **dict.fromkeys((0x0FAF, 0x69, 0x6B), _multiply_register),
        **dict.fromkeys(range(0x0F90, 0x0FA0), _set_byte),
        **dict.fromkeys(range(0x0F40, 0x0F50), _conditional_move),
        0x8E: _load_segment,
        **dict.fromkeys(PUSHED_SEGMENTS, _push_segment),
        **dict.fromkeys(POPPED_SEGMENTS, _pop_segment),
        0x8F: _pop_to_rm,
        0x0F01: _store_machine_status,
        0x0FC7: _compare_exchange_pair,
        0x0F38F0: _move_swapped,
        0x0F38F1: _move_swapped,
        **dict.fromkeys((0x0F10, 0x0F11, 0x0F28, 0x0F29, 0x0F2B, 0x0F6F, 0x0F7F, 0x0FE7), _move_xmm),
        **dict.fromkeys((0xD9, 0xDD, 0x0FAE), _x87_or_group15),
        0xCC: _interrupt,
        0xCD: _interrupt,
        0xE8: _call_relative,
        0xC2: _return,
        0xC3: _return,
        0xCA: _return_far,
        0xCB: _return_far,
        0x9C: _push_flags,
        0x9D: _pop_flags,
    }
)
