"""Integer arithmetic with flags, for emulated instructions."""

from typing import Final

CF: Final = 1
PF: Final = 4
AF: Final = 0x10
ZF: Final = 0x40
SF: Final = 0x80
OF: Final = 0x800
ARITHMETIC: Final = CF | PF | AF | ZF | SF | OF

ADD, OR, ADC, SBB, AND, SUB, XOR, CMP = range(8)


def _szp(value: int, bits: int) -> int:
    flags = 0 if value else ZF
    if value >> (bits - 1) & 1:
        flags |= SF
    if not (value & 0xFF).bit_count() & 1:
        flags |= PF
    return flags


def alu(operation: int, left: int, right: int, bits: int, rflags: int) -> tuple[int, int]:
    """Return (result, RFLAGS) of one of the eight classic operations on `bits`-wide values."""
    mask = (1 << bits) - 1
    left, right = left & mask, right & mask
    if operation in (OR, AND, XOR):
        result = left | right if operation == OR else left & right if operation == AND else left ^ right
        return result, rflags & ~ARITHMETIC | _szp(result, bits)
    carry = rflags & CF if operation in (ADC, SBB) else 0
    if operation in (ADD, ADC):
        full = left + right + carry
        result = full & mask
        overflow = ~(left ^ right) & (left ^ result)
        flags = CF if full > mask else 0
    else:
        result = left - right - carry & mask
        overflow = (left ^ right) & (left ^ result)
        flags = CF if left < right + carry else 0
    if (left ^ right ^ result) & 0x10:
        flags |= AF
    if overflow >> (bits - 1) & 1:
        flags |= OF
    return result, rflags & ~ARITHMETIC | flags | _szp(result, bits)


def increment(value: int, delta: int, bits: int, rflags: int) -> tuple[int, int]:
    """Return (result, RFLAGS) of INC (+1) or DEC (-1), which leave CF alone."""
    result, flags = alu(ADD if delta > 0 else SUB, value, 1, bits, rflags)
    return result, flags & ~CF | rflags & CF


def shift(operation: int, value: int, count: int, bits: int, rflags: int) -> tuple[int, int]:
    """Return (result, RFLAGS) of ROL, ROR, RCL, RCR, SHL, SHR, SAL, SAR (ModRM.reg 0-7)."""
    mask = (1 << bits) - 1
    count &= 63 if bits == 64 else 31
    value &= mask
    if not count:
        return value, rflags
    if operation in (4, 6):
        result = value << count & mask
        carry = value >> (bits - count) & 1 if count <= bits else 0
        overflow = (result >> (bits - 1) & 1) ^ carry
    elif operation == 5:
        result = value >> count
        carry = value >> (count - 1) & 1
        overflow = value >> (bits - 1) & 1
    elif operation == 7:
        signed = value - (1 << bits) if value >> (bits - 1) & 1 else value
        result = signed >> count & mask
        carry = signed >> (count - 1) & 1
        overflow = 0
    else:
        return _rotate(operation, value, count, bits, rflags)
    flags = rflags & ~(ARITHMETIC & ~AF) | _szp(result, bits) | carry | (OF if overflow else 0)
    return result, flags


def _rotate(operation: int, value: int, count: int, bits: int, rflags: int) -> tuple[int, int]:
    mask = (1 << bits) - 1
    if operation in (2, 3):
        wide, width = value | (rflags & CF) << bits, bits + 1
        count %= width
        if operation == 3:
            count = width - count
        turned = (wide << count | wide >> (width - count)) & ((1 << width) - 1)
        result, carry = turned & mask, turned >> bits & 1
    else:
        count %= bits
        if operation == 1:
            count = bits - count
        result = (value << count | value >> (bits - count)) & mask
        carry = result & 1 if operation == 0 else result >> (bits - 1) & 1
    top = result >> (bits - 1) & 1
    overflow = top ^ carry if operation in (0, 2) else top ^ (result >> (bits - 2) & 1)
    return result, rflags & ~(CF | OF) | carry | (OF if overflow else 0)
