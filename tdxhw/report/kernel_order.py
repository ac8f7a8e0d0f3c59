"""Kernel releases in the order in which they came: ``6.18.0-rc2`` before ``6.18.0`` before ``6.18.0-3-generic``."""

import re
from typing import Final

_RELEASE: Final = re.compile(r"(\d+(?:\.\d+)*)(?:[-~]?rc(\d+))?(.*)", re.DOTALL)
_LONGEST: Final = 18  # [digits]
_FINAL: Final = 1 << 30  # a release is newer than all its candidates

Key = tuple[tuple[int, ...], int, tuple[tuple[int, str], ...], str]


def kernel_order(release: str) -> Key:
    """Return what to sort releases by. What is no release comes first."""
    found = _RELEASE.search(release)
    if found is None:
        return (), 0, (), release
    numbers = tuple(map(_number, found[1].split(".")))
    rest = tuple(
        (_number(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"([0-9]+)", found[3]) if part
    )
    return (*numbers, 0, 0, 0)[:4], _number(found[2]) if found[2] else _FINAL, rest, release


def _number(digits: str) -> int:
    """Return the number; one that is too long for Python to read is no version, but has its place behind them."""
    return int(digits) if len(digits) <= _LONGEST else 10**_LONGEST
