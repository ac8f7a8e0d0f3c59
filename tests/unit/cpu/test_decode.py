"""Instruction lengths, against encodings whose length the manual gives."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim_backend.cpu.decode import decode, find_misexecuted

LONG = [
    "90", "48ffc3", "c3", "c20800", "b878563412", "48b8efcdab8967452301", "66b83412", "0f01cc", "660f01cc",
    "488b042538120040", "488b0512345678", "8b4424 10".replace(" ", ""), "c7840800010000 01000000".replace(" ", ""),
    "f6c301", "f7c378563412", "f7d8", "66f7c33412", "e900000000", "0f8400000000", "6683c001", "0f3a0fc108",
    "0fbae007", "660f3a0fc108", "c5f1fec2", "c4e27158c1", "c4e3790fc108", "62f17c4858c1", "a13412000000000000",
    "67a134120000", "6a01", "6801020304", "69c001020304", "6bc001", "c8100002", "cd80", "e430", "0f0d08", "0fa2",
    "f30f1efa", "64488b042528000000", "0fc7f8", "480fc708", "d9c0", "dd05 00000000".replace(" ", ""), "0fa4c101",
]  # fmt: skip
PROTECTED = ["90", "40", "b878563412", "66b83412", "9a000000000800", "ea000000000800", "a100000000", "c40418", "8b4608"]
REAL = [
    "b83412",
    "66b878563412",
    "8b4608",
    "8b860001",
    "8b1e3412",
    "ea00000800",
    "0f8400 00".replace(" ", ""),
    "678b0424",
]


@pytest.mark.parametrize("code", LONG)
def test_64_bit_lengths(code: str) -> None:
    data = bytes.fromhex(code)
    found = decode(data + b"\x90" * 8, long_mode=True, default_32=True)
    assert found is not None
    assert found.length == len(data)


@pytest.mark.parametrize("code", PROTECTED)
def test_32_bit_lengths(code: str) -> None:
    data = bytes.fromhex(code)
    found = decode(data + b"\x00" * 8, long_mode=False, default_32=True)
    assert found is not None
    assert found.length == len(data)


@pytest.mark.parametrize("code", REAL)
def test_16_bit_lengths(code: str) -> None:
    data = bytes.fromhex(code)
    found = decode(data + b"\x00" * 8, long_mode=False, default_32=False)
    assert found is not None
    assert found.length == len(data)


def test_registers_include_the_rex_bits() -> None:
    found = decode(bytes.fromhex("450f22e7"), long_mode=True, default_32=True)
    assert found is not None
    assert (found.opcode, found.register, found.rm) == (0x0F22, 12, 15)


@given(st.binary(max_size=20))
def test_a_decoded_instruction_lies_within_its_bytes(code: bytes) -> None:
    found = decode(code, long_mode=True, default_32=True)
    assert found is None or 1 <= found.length <= min(15, len(code))


def test_lds_in_32_bit_code_is_not_vex() -> None:
    found = decode(bytes.fromhex("c40418"), long_mode=False, default_32=True)
    assert found is not None
    assert not found.encoding


@given(st.lists(st.sampled_from([code for code in LONG if code[:2] not in ("c4", "c5", "62")]), max_size=12))
def test_bytes_inside_other_instructions_are_not_mistaken_for_vex(codes: list[str]) -> None:
    innocent = bytes.fromhex("".join(codes) + "b8c5f1fec2")
    assert find_misexecuted(innocent, long_mode=True, default_32=True) is None
    guilty = innocent + bytes.fromhex("c5f1fec2")
    found = find_misexecuted(guilty, long_mode=True, default_32=True)
    assert found is not None
    assert found[0] == len(innocent)


@pytest.mark.parametrize(
    ("code", "allowed"),
    [
        ("f0ff07", True),  # LOCK INC [rdi]
        ("f048 0fc70f", True),  # LOCK CMPXCHG16B
        ("f0830424 00", True),  # LOCK ADD [rsp], 0
        ("f00fba2b03", True),  # LOCK BTS [rbx], 3
        ("f0ffc0", False),  # of a register
        ("f08907", False),  # MOV
        ("f0ee", False),  # OUT
        ("f03807", False),  # CMP
        ("f00fba2303", False),  # BT
    ],
)
def test_a_lock_prefix_is_let_through_where_the_architecture_has_one(code: str, allowed: bool) -> None:
    found = find_misexecuted(bytes.fromhex(code), long_mode=True, default_32=True)
    assert (found is None) is allowed
