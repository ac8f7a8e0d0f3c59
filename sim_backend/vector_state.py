"""Locks that a record says another LP holds, and MSR bitmaps: state of the module as vectors show it."""

from sim_backend.tdx_module.locks import EXCLUSIVE, HOST_PRIORITY, HP_READER, READER


def held(word: int, mode: str, reader: int) -> int:
    """Return the lock word once another LP holds it too: `mode` ex, sh or hp, `reader` one reader's worth."""
    if mode == "ex":
        return word | EXCLUSIVE
    if mode == "sh":
        return word + reader
    if mode == "hp":
        return word | HOST_PRIORITY
    raise ValueError(f"unknown lock mode {mode!r}")


def released(word: int, mode: str, *, host_priority: bool) -> int:
    """Return the lock word once the other LP has released it, as the module releases it."""
    if mode == "ex":
        return word & HOST_PRIORITY if host_priority else 0
    if mode == "sh":
        return (word - (HP_READER if host_priority else READER)) & 0xFFFF
    if mode == "hp":
        return word & ~HOST_PRIORITY
    raise ValueError(f"unknown lock mode {mode!r}")


def native_msrs(bitmap: bytes) -> list[int]:
    """Return the MSRs whose bit is clear in one access's half of an MSR bitmap page."""
    ranges = (0, bitmap[:1024]), (0xC000_0000, bitmap[1024:])
    return [
        base + 8 * byte + bit
        for base, part in ranges
        for byte, value in enumerate(part)
        if value != 0xFF
        for bit in range(8)
        if not value >> bit & 1
    ]
