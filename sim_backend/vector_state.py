"""State of the module as vectors show it: locks that another LP holds, MSR bitmaps, TD_UUIDs."""

from typing import Any

from sim_backend.tdx_module.locks import EXCLUSIVE, HOST_PRIORITY, HP_READER, READER
from sim_backend.tdx_module.module import TdxModule
from sim_backend.tdx_module.servtd import MAX_SERVTDS

_U64_END = 1 << 64


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


def adopt_uuids(module: TdxModule, bind: dict[str, Any]) -> None:
    """Give the two TDs of a recorded TDH.SERVTD.BIND that succeeded the TD_UUIDs that the recorder drew for them.

    UUIDs are random and not compared, but the service TD calls on with the handle and the UUID that it was given.
    """
    target_hpa, service_hpa = (int(bind["in"].get(name, "0"), 16) for name in ("rcx", "rdx"))
    slot = int(bind["in"].get("r8", "0"), 16)
    target, service = module.tdrs.get(target_hpa), module.tdrs.get(service_hpa)
    if target is None or service is None or slot >= MAX_SERVTDS:
        return
    handle, *uuid = (int(bind["out"].get(name, "0"), 16) for name in ("rcx", "r10", "r11", "r12", "r13"))
    target.td_uuid[:] = uuid
    service.td_uuid[0] = (handle - (target_hpa | slot)) % _U64_END
