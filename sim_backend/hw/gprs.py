"""General-purpose registers as a plain list, indexed by their architectural number.

The number is also the operand id that a completion status carries in its lower half
(RCX is operand 1, R8 is operand 8), so ``regs[RCX]`` and ``Operand.RCX`` agree by construction.
"""

from typing import Final, TypeAlias

Gprs: TypeAlias = list[int]
"""Sixteen unsigned 64-bit values, RAX first."""

RAX: Final = 0
RCX: Final = 1
RDX: Final = 2
RBX: Final = 3
RSP: Final = 4
RBP: Final = 5
RSI: Final = 6
RDI: Final = 7
R8: Final = 8
R9: Final = 9
R10: Final = 10
R11: Final = 11
R12: Final = 12
R13: Final = 13
R14: Final = 14
R15: Final = 15

GPR_NAMES: Final = (
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi",
    "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15",
)  # fmt: skip
"""Lower-case names in index order."""


def new_gprs() -> Gprs:
    """Return sixteen zero registers."""
    return [0] * 16
