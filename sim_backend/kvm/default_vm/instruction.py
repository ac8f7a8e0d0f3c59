"""Decoding one x86 instruction far enough to emulate its memory operand (Intel SDM Vol. 2, chapter 2)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from sim_backend.cpu.engine import Cpu, CpuState, Segment
from sim_backend.hw.gprs import RBP, RSP

_SEGMENT_PREFIXES: Final = {0x26: "es", 0x2E: "cs", 0x36: "ss", 0x3E: "ds", 0x64: "fs", 0x65: "gs"}
_U64: Final = (1 << 64) - 1
_CS_L: Final = 1 << 13
_CS_D: Final = 1 << 14
EFER_LMA: Final = 1 << 10
_NO_INDEX: Final = 4
_ARPL_OR_MOVSXD: Final = 0x63
_MOVNTI: Final = 0x0FC3

# 16-bit addressing: base registers by ModRM.rm, and the default segment.
_RM16: Final = ((3, 6), (3, 7), (5, 6), (5, 7), (6,), (7,), (5,), (3,))


class DecodeError(Exception):
    """The bytes end too early or are no instruction that KVM's emulator knows."""


class NotDecoded(Exception):  # noqa: N818 - control flow of an attempt
    """KVM's emulator knows the instruction and this decoder does not."""


@dataclass(slots=True)
class Instruction:
    """One decoded instruction."""

    opcode: int = 0  # 0xNN or 0x0FNN
    length: int = 0  # [bytes]
    operand_bytes: int = 0  # 2, 4 or 8
    address_bytes: int = 0  # 2, 4 or 8
    rex: int = 0
    lock: bool = False
    repeat: int = 0  # 0, 0xF2 or 0xF3
    mandatory_prefix: int = 0  # 0, 0x66, 0xF2 or 0xF3: chooses among SSE instructions
    segment: str = "ds"
    reg: int = 0
    rm: int = 0  # register number when `is_memory` is False
    is_memory: bool = False
    offset: int = 0  # effective address of the memory operand
    immediate: int = 0  # sign-extended


class Decoder:
    """Decodes the instruction at `cpu`'s RIP from `code`."""

    def __init__(self, cpu: Cpu, state: CpuState, code: bytes) -> None:
        self._gprs: Final[Sequence[int]] = cpu.gprs
        self._rip: Final = cpu.rip
        self._code: Final = code
        self._at = 0
        self._long = bool(state.efer & EFER_LMA and state.cs.ar & _CS_L)
        self._default_32 = bool(state.cs.ar & _CS_D) and bool(state.cr0 & 1)

    def _byte(self) -> int:
        try:
            value = self._code[self._at]
        except IndexError:
            raise DecodeError("the instruction is cut off") from None
        self._at += 1
        return value

    def _signed(self, size: int) -> int:
        data = self._code[self._at : self._at + size]
        if len(data) < size:
            raise DecodeError("the instruction is cut off")
        self._at += size
        return int.from_bytes(data, "little", signed=True)

    def decode(self) -> Instruction:
        """Return the instruction; raise `DecodeError`."""
        one = Instruction()
        operand_override = address_override = segment_given = False
        while True:
            byte = self._byte()
            if byte == 0x66:
                operand_override = True
            elif byte == 0x67:
                address_override = True
            elif byte == 0xF0:
                one.lock = True
            elif byte in (0xF2, 0xF3):
                one.repeat = byte
            elif byte in _SEGMENT_PREFIXES:
                if not self._long or byte in (0x64, 0x65):
                    one.segment, segment_given = _SEGMENT_PREFIXES[byte], True
            else:
                break
        if self._long and byte & 0xF0 == 0x40:
            one.rex = byte
            byte = self._byte()
        self._sizes(one, operand_override, address_override)
        one.opcode = byte if byte != 0x0F else 0x0F00 | self._byte()
        if one.opcode == 0x0F38:
            one.opcode = 0x0F3800 | self._byte()
            if one.opcode in (0x0F38F0, 0x0F38F1) and one.repeat:
                raise DecodeError("CRC32")  # KVM knows MOVBE under this opcode, and nothing with a prefix
        one.mandatory_prefix = one.repeat or (0x66 if operand_override else 0)
        if one.opcode == _MOVNTI:
            one.operand_bytes = max(one.operand_bytes, 4)
        layout = _LAYOUT.get(one.opcode)
        if one.opcode == _ARPL_OR_MOVSXD and not self._long:
            raise DecodeError("ARPL")
        if self._long and one.opcode < 0x20 and (one.opcode in PUSHED_SEGMENTS or one.opcode in POPPED_SEGMENTS):
            raise DecodeError("no instruction in 64-bit mode")
        if layout is None:
            if one.opcode in _KVM_EMULATES:
                raise NotDecoded
            raise DecodeError(f"opcode {one.opcode:#x}")
        if "m" in layout:
            self._modrm(one, segment_given)
        if "o" in layout:  # a memory offset instead of ModRM
            one.is_memory = True
            size = one.address_bytes
            one.offset = self._signed(size) & ((1 << 8 * size) - 1)
        if "r" in layout:
            one.reg = one.opcode & 7 | (one.rex & 1) << 3
        group3_test = one.opcode in (0xF6, 0xF7) and one.reg & 7 in (0, 1)
        if "b" in layout or (group3_test and one.opcode == 0xF6):
            one.immediate = self._signed(1)
        elif "w" in layout:
            one.immediate = self._signed(2)
        elif "z" in layout or (group3_test and one.opcode == 0xF7):
            one.immediate = self._signed(min(one.operand_bytes, 4))
        one.length = self._at
        return one

    def _sizes(self, one: Instruction, operand_override: bool, address_override: bool) -> None:
        if self._long:
            one.operand_bytes = 8 if one.rex & 8 else 2 if operand_override else 4
            one.address_bytes = 4 if address_override else 8
        else:
            one.operand_bytes = 4 if self._default_32 != operand_override else 2
            one.address_bytes = 4 if self._default_32 != address_override else 2

    def _modrm(self, one: Instruction, segment_given: bool) -> None:
        modrm = self._byte()
        mode, one.reg, rm = modrm >> 6, modrm >> 3 & 7 | (one.rex & 4) << 1, modrm & 7
        if mode == 3:
            one.rm = rm | (one.rex & 1) << 3
            return
        one.is_memory = True
        if one.address_bytes == 2:
            self._address16(one, mode, rm, segment_given)
        else:
            self._address32(one, mode, rm, segment_given)

    def _address16(self, one: Instruction, mode: int, rm: int, segment_given: bool) -> None:
        if mode == 0 and rm == 6:
            one.offset = self._signed(2) & 0xFFFF
            return
        offset = sum(self._gprs[base] for base in _RM16[rm])
        if RBP in _RM16[rm] and not segment_given:
            one.segment = "ss"
        if mode:
            offset += self._signed(mode)
        one.offset = offset & 0xFFFF

    def _address32(self, one: Instruction, mode: int, rm: int, segment_given: bool) -> None:
        mask = (1 << 8 * one.address_bytes) - 1
        offset = 0
        relative = False
        base = rm | (one.rex & 1) << 3
        if rm == 4:
            sib = self._byte()
            index, base = sib >> 3 & 7 | (one.rex & 2) << 2, sib & 7 | (one.rex & 1) << 3
            if index != _NO_INDEX:
                offset += self._gprs[index] << (sib >> 6)
            if sib & 7 == 5 and mode == 0:
                offset += self._signed(4)
                base = -1
        elif rm == 5 and mode == 0:
            offset += self._signed(4)
            relative, base = self._long, -1
        if base >= 0:
            offset += self._gprs[base]
            if base in (RSP, RBP) and not segment_given:
                one.segment = "ss"
        if mode:
            offset += self._signed(1 if mode == 1 else 4)
        if relative:
            # RIP-relative to the end: what follows the displacement is only the immediate.
            layout = _LAYOUT[one.opcode]
            tail = 1 if "b" in layout else min(one.operand_bytes, 4) if "z" in layout else 0
            offset += self._rip + self._at + tail
        one.offset = offset & mask


PUSHED_SEGMENTS: Final = {0x06: "es", 0x0E: "cs", 0x16: "ss", 0x1E: "ds", 0x0FA0: "fs", 0x0FA8: "gs"}
POPPED_SEGMENTS: Final = {0x07: "es", 0x17: "ss", 0x1F: "ds", 0x0FA1: "fs", 0x0FA9: "gs"}


def segment_of(state: CpuState, name: str) -> Segment:
    """Return the segment register called `name`."""
    segment: Segment = getattr(state, name)
    return segment


def _layouts() -> dict[int, str]:
    """Opcode to what follows it: m ModRM, b imm8, z imm16/32, o memory offset, w imm16, r register in the opcode."""
    table: dict[int, str] = {}
    for row in range(0, 0x40, 8):
        for column in range(4):
            table[row | column] = "m"
        table[row | 4], table[row | 5] = "b", "z"
    table |= dict.fromkeys(range(0x50, 0x60), "r")
    table |= {0x68: "z", 0x6A: "b", 0x80: "mb", 0x81: "mz", 0x82: "mb", 0x83: "mb", 0x84: "m", 0x85: "m"}
    table |= {0x86: "m", 0x87: "m", 0x88: "m", 0x89: "m", 0x8A: "m", 0x8B: "m", 0x8C: "m", 0x8E: "m", 0x8F: "m"}
    table |= dict.fromkeys((0xA0, 0xA1, 0xA2, 0xA3), "o")
    table |= {0xCC: "", 0xCD: "b"}
    table |= dict.fromkeys(PUSHED_SEGMENTS | POPPED_SEGMENTS, "")
    table |= dict.fromkeys((0x6C, 0x6D, 0x6E, 0x6F), "")
    table |= dict.fromkeys((0xA4, 0xA5, 0xA6, 0xA7, 0xAA, 0xAB, 0xAC, 0xAD, 0xAE, 0xAF), "")
    table |= {0xC0: "mb", 0xC1: "mb", 0xC6: "mb", 0xC7: "mz", 0xD0: "m", 0xD1: "m", 0xD2: "m", 0xD3: "m"}
    table |= {0xF6: "m", 0xF7: "m", 0xFE: "m", 0xFF: "m", 0x63: "m", 0x69: "mz", 0x6B: "mb"}
    table |= dict.fromkeys((0x0FB0, 0x0FB1, 0x0FB6, 0x0FB7, 0x0FBE, 0x0FBF, 0x0FC0, 0x0FC1, 0x0FAF, 0x0FC3), "m")
    table |= dict.fromkeys((0x0FA3, 0x0FAB, 0x0FB3, 0x0FBB, 0x0FBC, 0x0FBD, 0x0FC7), "m") | {0x0FBA: "mb"}
    table |= dict.fromkeys((0x0F01, 0x0F10, 0x0F11, 0x0F28, 0x0F29, 0x0F2B, 0x0F6F, 0x0F7F, 0x0FAE, 0x0FE7), "m")
    table |= {
        0x0F38F0: "m",
        0x0F38F1: "m",
        0xD9: "m",
        0xDD: "m",
        0xE8: "z",
        0xC2: "w",
        0xC3: "",
        0xCA: "w",
        0xCB: "",
        0x9C: "",
        0x9D: "",
    }
    table |= dict.fromkeys(range(0x0F40, 0x0F50), "m") | dict.fromkeys(range(0x0F90, 0x0FA0), "m")
    return table


_LAYOUT: Final = _layouts()
_KVM_EMULATES: Final = frozenset(
    {
        *(0x60, 0x61),  # PUSHA, POPA
        *(
            0x9A,
            0xC4,
            0xC5,
            0xC8,
            0xC9,
            0xCE,
            0xCF,
            0xD7,
            0xEA,
        ),  # far, LES, LDS, ENTER, INT, XLAT
        *(0x0F00, 0x0F0D, 0x0FA4, 0x0FA5, 0x0FAC, 0x0FAD, 0x0FB2, 0x0FB4, 0x0FB5),
        *range(0x0F18, 0x0F20),
    }
)
"""Opcodes with a memory operand, or the stack's, in KVM's `opcode_table` that are not decoded here."""
