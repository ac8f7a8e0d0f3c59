"""String instructions of KVM's emulator: MOVS, CMPS, STOS, LODS, SCAS, and INS and OUTS, which always come here.

One element at a time. With a repeat prefix RIP stays at the instruction, even behind the last element: that the count
is used up is seen when it executes again. RFLAGS.RF is set meanwhile. KVM goes on with the next element by itself.
"""

from typing import TYPE_CHECKING, Final

from sim_backend.hw.gprs import RAX, RCX, RDI, RDX, RSI
from sim_backend.kvm.default_vm import alu
from sim_backend.kvm.default_vm.guest_events import RFLAGS_RF
from sim_backend.kvm.default_vm.instruction import Instruction

if TYPE_CHECKING:
    from sim_backend.kvm.default_vm.attempt import Attempt, Decoded

_INS, _OUTS, _MOVS, _CMPS, _STOS, _LODS, _SCAS = 0x6C, 0x6E, 0xA4, 0xA6, 0xAA, 0xAC, 0xAE
STRINGS: Final = frozenset(kind | wide for kind in (_INS, _OUTS, _MOVS, _CMPS, _STOS, _LODS, _SCAS) for wide in (0, 1))
_RFLAGS_DF: Final = 1 << 10
_WIDEST_PORT: Final = 4  # [bytes]
_READ_AHEAD: Final = 1024  # [bytes] of INS in one exit (``struct read_cache``)
_RESTARTS: Final = 0x3FF  # of the count: elements that are emulated in a row


def execute_string(at: "Attempt", one: Instruction) -> None:
    """Execute one element; of INS as many as were asked for at once."""
    kind = one.opcode & ~1
    size = 1 if not one.opcode & 1 else one.operand_bytes
    if kind in (_INS, _OUTS):
        size = min(size, _WIDEST_PORT)
    mask = (1 << 8 * one.address_bytes) - 1
    step = -size if at.rflags & _RFLAGS_DF else size
    if one.repeat and not at.gprs[RCX] & mask:
        at.rip += one.length
        return
    elements = 1
    if kind == _INS:
        elements = _input(at, one, size, step)
    elif kind == _OUTS:
        data = at.load(_source(at, one, size), size).to_bytes(size, "little")
        at.write_port(at.get(RDX, 2, 1), data)
    elif kind == _MOVS:
        value = at.load(_source(at, one, size), size)
        at.store(_destination(at, one, size, write=True), size, value)
    elif kind == _STOS:
        at.store(_destination(at, one, size, write=True), size, at.get(RAX, size, 1))
    elif kind == _LODS:
        at.put(RAX, size, at.load(_source(at, one, size), size), 1)
    else:
        left = at.load(_source(at, one, size), size) if kind == _CMPS else at.get(RAX, size, 1)
        right = at.load(_destination(at, one, size), size)
        _, at.rflags = alu.alu(alu.CMP, left, right, 8 * size, at.rflags)
    if kind in (_OUTS, _MOVS, _CMPS, _LODS):
        _advance(at, RSI, step, mask)
    if kind not in (_OUTS, _LODS):
        _advance(at, RDI, step * elements, mask)
    if not one.repeat:
        at.rip += one.length
        return
    _advance(at, RCX, -elements, mask)
    if kind in (_CMPS, _SCAS) and bool(at.rflags & alu.ZF) != (one.repeat == 0xF3):
        at.rip += one.length
    else:
        at.rflags |= RFLAGS_RF


def goes_on(at: "Attempt", decoded: "Decoded") -> bool:
    """Tell whether KVM executes the next element itself; now and then it looks into the guest first."""
    one = decoded.instruction
    if one.opcode not in STRINGS or one.opcode & ~1 == _INS or at.rip != decoded.rip:
        return False
    return bool(at.gprs[RCX] & (1 << 8 * one.address_bytes) - 1 & _RESTARTS)


def _input(at: "Attempt", one: Instruction, size: int, step: int) -> int:
    """INS: as many elements as fit in a page and the buffer, all stored at once; return how many."""
    remaining = at.gprs[RCX] & (1 << 8 * one.address_bytes) - 1 if one.repeat else 1
    in_page = at.gprs[RDI] & 0xFFF
    # The kernel compares a number of bytes with numbers of elements here.
    in_page = in_page if step < 0 else 4096 - in_page
    count = max(min(in_page, _READ_AHEAD // size, remaining), 1)
    data = at.port_read(at.get(RDX, 2, 1), size, count)
    # Counted once more when the data is there, by what the registers are then.
    data = data[: size * count].ljust(size * count, b"\0")
    if step > 0 or count == 1:
        at.store_bytes(_destination(at, one, len(data), write=True), data)
        return count
    for index in range(count):  # downwards one at a time, and what follows an exit is asked for again
        linear = _destination(at, one, size, write=True, offset=index * step)
        at.store_bytes(linear, data[index * size : (index + 1) * size])
        if at.fragments:
            return index + 1
    return count


def _source(at: "Attempt", one: Instruction, size: int) -> int:
    return at.linear(one.segment, at.address(RSI), one.address_bytes, size)


def _destination(at: "Attempt", one: Instruction, size: int, *, write: bool = False, offset: int = 0) -> int:
    return at.linear("es", at.address(RDI) + offset, one.address_bytes, size, write=write)


def _advance(at: "Attempt", register: int, delta: int, mask: int) -> None:
    value = at.gprs[register] + delta & mask
    at.gprs[register] = value if mask >> 16 else at.gprs[register] & ~mask | value
