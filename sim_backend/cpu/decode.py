"""Instruction boundaries and the few instructions that the engine must recognise by their bytes.

Source: Intel SDM Vol. 2, "Instruction Format" and the opcode maps.
"""

import re
from dataclasses import dataclass
from typing import Final

_LEGACY_PREFIXES: Final = frozenset(b"\x66\x67\xf2\xf3\xf0\x2e\x36\x3e\x26\x64\x65")
_LONGEST: Final = 15  # [bytes]

_MODRM: Final = frozenset(
    [row | column for row in range(0, 0x40, 8) for column in range(4)]
    + [0x63, 0x69, 0x6B, *range(0x80, 0x90), 0xC0, 0xC1, 0xC4, 0xC5, 0xC6, 0xC7]
    + [0x62, *range(0xD0, 0xD4), *range(0xD8, 0xE0), 0xF6, 0xF7, 0xFE, 0xFF]
)
_IMM8: Final = frozenset(
    [row | 4 for row in range(0, 0x40, 8)]
    + [0x6A, 0x6B, *range(0x70, 0x81), 0x82, 0x83, 0xA8, *range(0xB0, 0xB8), 0xC0, 0xC1, 0xC6]
    + [0xCD, 0xD4, 0xD5, *range(0xE0, 0xE8), 0xEB]
)
_IMMZ: Final = frozenset([row | 5 for row in range(0, 0x40, 8)] + [0x68, 0x69, 0x81, 0xA9, 0xC7, 0xE8, 0xE9])
_NO_MODRM_0F: Final = frozenset(
    [*range(0x04, 0x0D), 0x0E, *range(0x30, 0x38), 0x77, *range(0x80, 0x90),
     0xA0, 0xA1, 0xA2, 0xA8, 0xA9, 0xAA, *range(0xC8, 0xD0)]
)  # fmt: skip
_IMM8_0F: Final = frozenset([0x0F, *range(0x70, 0x74), 0xA4, 0xAC, 0xBA, 0xC2, 0xC4, 0xC5, 0xC6])

# VEX instructions on general registers, which TCG executes right: (map, opcode).
_VEX_OK: Final = frozenset([(2, 0xF2), (2, 0xF3), (2, 0xF5), (2, 0xF6), (2, 0xF7), (3, 0xF0)])

# A block without any of these bytes holds nothing that TCG executes wrongly.
_SUSPECT: Final = re.compile(rb"[\xc4\xc5\x62\x8f\xf0]|\x0f\xae|\x0f\x78|\x0f\x79", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Instruction:
    """One decoded instruction: what is needed to name it and to step over it."""

    length: int  # [bytes]
    prefixes: bytes
    rex: int
    opcode: int  # 0xNN, 0x0FNN, 0x0F38NN or 0x0F3ANN
    modrm: int  # 0 where there is none
    encoding: str = ""  # "VEX", "EVEX" or "XOP"

    @property
    def register(self) -> int:
        """ModRM.reg with REX.R."""
        return (self.modrm >> 3 & 7) | (self.rex & 4) << 1

    @property
    def rm(self) -> int:
        """ModRM.rm with REX.B."""
        return (self.modrm & 7) | (self.rex & 1) << 3


def decode(code: bytes, *, long_mode: bool, default_32: bool) -> Instruction | None:
    """Decode the instruction at the start of `code`; None when it is cut off or longer than 15 bytes.

    `long_mode` means a 64-bit code segment; otherwise `default_32` is the code segment's D bit.
    """
    try:
        instruction = _decode(code, long_mode, default_32)
    except IndexError:
        return None
    return instruction if instruction.length <= min(len(code), _LONGEST) else None


def _decode(code: bytes, long_mode: bool, default_32: bool) -> Instruction:
    position = 0
    while code[position] in _LEGACY_PREFIXES:
        position += 1
    prefixes = code[:position]
    rex = 0
    if long_mode and code[position] & 0xF0 == 0x40:
        rex = code[position]
        position += 1
    operand_32 = (default_32 or long_mode) != (0x66 in prefixes)
    address_bits = 64 if long_mode else 32 if default_32 else 16
    if 0x67 in prefixes:
        address_bits = {64: 32, 32: 16, 16: 32}[address_bits]
    byte = code[position]
    encoding = ""
    immediate = 0
    if byte in (0xC4, 0xC5, 0x62) and (long_mode or code[position + 1] >= 0xC0):
        encoding = "EVEX" if byte == 0x62 else "VEX"
    elif byte == 0x8F and code[position + 1] & 0x1F >= 8:
        encoding = "XOP"
    if encoding:
        opcode_map = 1 if byte == 0xC5 else code[position + 1] & (7 if byte == 0x62 else 0x1F)
        position += {0xC5: 2, 0xC4: 3, 0x8F: 3, 0x62: 4}[byte]
        opcode = {1: 0x0F00, 2: 0x0F3800, 3: 0x0F3A00}.get(opcode_map, opcode_map << 24) | code[position]
        immediate = 1 if opcode_map == 3 or (opcode_map == 1 and code[position] in _IMM8_0F) else 0
        has_modrm = not (opcode_map == 1 and code[position] == 0x77)
        position += 1
    elif byte == 0x0F:
        byte = code[position + 1]
        position += 2
        if byte in (0x38, 0x3A):
            opcode = 0x0F0000 | byte << 8 | code[position]
            position += 1
            has_modrm = True
            immediate = 1 if byte == 0x3A else 0
        else:
            opcode = 0x0F00 | byte
            has_modrm = byte not in _NO_MODRM_0F
            immediate = 1 if byte in _IMM8_0F else 0
            if 0x80 <= byte < 0x90:
                immediate = 4 if operand_32 or long_mode else 2
    else:
        opcode = byte
        position += 1
        has_modrm = byte in _MODRM
        immediate = _immediate_bytes(byte, rex, operand_32, address_bits, long_mode)
    modrm = 0
    if has_modrm:
        modrm = code[position]
        position += _modrm_bytes(code, position, address_bits)
        if opcode in (0xF6, 0xF7) and modrm & 0x30 == 0:
            immediate = 1 if opcode == 0xF6 else 4 if operand_32 else 2
    return Instruction(position + immediate, prefixes, rex, opcode, modrm, encoding)


def _immediate_bytes(byte: int, rex: int, operand_32: bool, address_bits: int, long_mode: bool) -> int:
    if byte in _IMM8:
        return 1
    if byte in _IMMZ:
        return 4 if operand_32 or (long_mode and byte in (0xE8, 0xE9)) else 2
    if 0xB8 <= byte < 0xC0:
        return 8 if rex & 8 else 4 if operand_32 else 2
    if 0xA0 <= byte < 0xA4:
        return address_bits // 8
    if byte in (0xC2, 0xCA):
        return 2
    if byte == 0xC8:
        return 3
    if byte in (0x9A, 0xEA):
        return 6 if operand_32 else 4
    return 0


def _modrm_bytes(code: bytes, position: int, address_bits: int) -> int:
    """Return how many bytes ModRM, SIB and displacement take."""
    mod, rm = code[position] >> 6, code[position] & 7
    if mod == 3:
        return 1
    if address_bits == 16:
        return 1 + (2 if mod == 2 or (mod == 0 and rm == 6) else mod)
    length = 1
    if rm == 4:
        length += 1
        if mod == 0 and code[position + 1] & 7 == 5:
            return length + 4
    elif mod == 0 and rm == 5:
        return length + 4
    return length + (0, 1, 4)[mod]


def find_misexecuted(block: bytes, *, long_mode: bool, default_32: bool) -> tuple[int, Instruction] | None:
    """Return the first instruction of `block` that TCG would execute wrongly, with its offset."""
    if _SUSPECT.search(block) is None:
        return None
    offset = 0
    while offset < len(block):
        instruction = decode(block[offset : offset + _LONGEST], long_mode=long_mode, default_32=default_32)
        if instruction is None:
            return None  # cut off or invalid: faults by itself
        if is_misexecuted(instruction):
            return offset, instruction
        offset += instruction.length
    return None


_ANY_MODRM: Final = frozenset(range(8))
_LOCKABLE: Final = {  # opcode to the values of ModRM.reg; the destination must be memory
    **dict.fromkeys((row | form for row in range(0, 0x38, 8) for form in (0, 1)), _ANY_MODRM),
    **dict.fromkeys((0x80, 0x81, 0x82, 0x83), frozenset(range(7))),
    **dict.fromkeys((0x86, 0x87, 0x0FAB, 0x0FB0, 0x0FB1, 0x0FB3, 0x0FBB, 0x0FC0, 0x0FC1), _ANY_MODRM),
    **dict.fromkeys((0xF6, 0xF7), frozenset({2, 3})),
    **dict.fromkeys((0xFE, 0xFF), frozenset({0, 1})),
    0x0FBA: frozenset({5, 6, 7}),
    0x0FC7: frozenset({1}),
}


def is_misexecuted(instruction: Instruction) -> bool:
    """Tell whether TCG gives a wrong result for a valid instruction, or none of the #UD that a LOCK prefix makes."""
    if 0xF0 in instruction.prefixes:
        allowed = _LOCKABLE.get(instruction.opcode, ())
        return instruction.modrm >= 0xC0 or instruction.modrm >> 3 & 7 not in allowed
    if instruction.encoding:
        opcode_map = {0x0F: 1, 0x0F38: 2, 0x0F3A: 3}.get(instruction.opcode >> 8, 0)
        return instruction.encoding != "VEX" or (opcode_map, instruction.opcode & 0xFF) not in _VEX_OK
    if instruction.opcode == 0x0FAE and instruction.modrm >= 0xC0:  # TPAUSE, UMONITOR, UMWAIT
        return instruction.modrm >> 3 & 7 == 6 and any(p in instruction.prefixes for p in b"\x66\xf2\xf3")
    return instruction.opcode in (0x0F78, 0x0F79) and any(p in instruction.prefixes for p in b"\x66\xf2")


# Instructions that the modelled CPU has and TCG answers with #UD.
_MISSING: Final = {
    0x0F38F8: "MOVDIR64B/ENQCMD",
    0x0F38F9: "MOVDIRI",
    0x0F38CF: "GF2P8MULB",
    0x0F3ACE: "GF2P8AFFINEQB",
    0x0F3ACF: "GF2P8AFFINEINVQB",
    0x0F3ACC: "SHA1RNDS4",
    0x0F38C8: "SHA1NEXTE",
    0x0F38C9: "SHA1MSG1",
    0x0F38CA: "SHA1MSG2",
    0x0F38CB: "SHA256RNDS2",
    0x0F38CC: "SHA256MSG1",
    0x0F38CD: "SHA256MSG2",
}
_MISSING_0FC7_MEMORY: Final = {3: "XRSTORS", 4: "XSAVEC", 5: "XSAVES"}


def missing_instruction(instruction: Instruction) -> str | None:
    """Name the instruction if the modelled CPU has it though TCG raises #UD."""
    if instruction.encoding:
        return f"a {instruction.encoding}-encoded instruction"
    if instruction.opcode == 0x0FC7:
        operation = instruction.modrm >> 3 & 7
        if instruction.modrm < 0xC0:
            return _MISSING_0FC7_MEMORY.get(operation)
        return "RDPID" if operation == 7 and 0xF3 in instruction.prefixes else None
    return _MISSING.get(instruction.opcode)
