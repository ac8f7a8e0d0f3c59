"""What holds between any two leaves, whatever the host did: PAMT, Secure EPTs, KOT and TDs agree.

For tests and for debugging the model; nothing here runs in a normal simulation. A violation is our bug: `SimBug`.
"""

import os
import struct
from collections import Counter
from collections.abc import Iterator
from typing import Final

from sim_backend.hw.memory import PhysicalMemory
from sim_backend.tdx_module.errors import SimBug
from sim_backend.tdx_module.kot import HkidState
from sim_backend.tdx_module.module import TdxModule
from sim_backend.tdx_module.op_states import OpState
from sim_backend.tdx_module.pamt import ENTRY_BYTES, PageType, Tdmr
from sim_backend.tdx_module.sept import LEVEL_SHIFT
from sim_backend.tdx_module.sept_states import FREE_ENTRY, HPA_MASK, PS, SeptState, state_of
from sim_backend.tdx_module.tdcs import MIN_TDCS_PAGES
from sim_backend.tdx_module.tdr import LifecycleState, Tdr

_RESERVED: Final = PageType.RSVD << 16  # unlocked: nothing to say about it
_RESERVED_PAGE: Final = struct.pack("<QQ", _RESERVED, 0) * (4096 // ENTRY_BYTES)  # of PAMT entries
_TD_STATES: Final = {
    LifecycleState.HKID_ASSIGNED: HkidState.ASSIGNED,
    LifecycleState.KEYS_CONFIGURED: HkidState.ASSIGNED,
    LifecycleState.BLOCKED: HkidState.FLUSHED,
}

Page = tuple[int, int]
"""HPA and level of a page."""


def check_invariants(module: TdxModule) -> None:
    """Check everything; raise `SimBug` naming what does not agree."""
    pages = dict(_allocated_pages(module))
    _check_keys(module)
    _check_tdrs(module, pages)
    seen: set[int] = set()
    for tdr in module.tdrs.values():
        if tdr.lifecycle_state == LifecycleState.TEARDOWN:
            continue  # pages go back one by one: the tree no longer means anything
        for page, page_type in _pages_of(module, tdr):
            if page[0] in seen:
                raise SimBug(f"the page at HPA {page[0]:#x} is in two places")
            seen.add(page[0])
            if pages.get(page) != (page_type, tdr.hpa):
                raise SimBug(f"PAMT says {pages.get(page)} of page {page}, its TD says {page_type, tdr.hpa}")


def _allocated_pages(module: TdxModule) -> Iterator[tuple[Page, tuple[int, int]]]:
    """Yield (page, (type, owner)) of each allocated page; check that no lock is left behind."""
    readers = Counter[int]()
    for tdvps in module.running:
        if tdvps is not None:
            readers[tdvps.hpa] += 1
            readers[tdvps.tdr.hpa] += 1
    pamt = module.pamt
    for tdmr in module.tdmrs:
        for level in (0, 1, 2):
            for page, word in touched_entries(module.memory, tdmr, level):
                lock = word & 0xFFFF
                if lock & 1 or (lock >> 2 and level == 0 and lock >> 2 != readers[page]):
                    raise SimBug(f"the lock word of the page at HPA {page:#x} level {level} is {lock:#x}")
                if word >> 16 & 0xFF > PageType.RSVD:
                    index = pamt.entry(page, level)
                    yield (page, level), (pamt.page_type(index), pamt.owner(index))


def touched_entries(memory: PhysicalMemory, tdmr: Tdmr, level: int) -> Iterator[tuple[int, int]]:
    """Yield (HPA, word 0) of the entries of a table that are not free or reserved; sparse memory knows where."""
    table = (tdmr.pamt_4k_base, tdmr.pamt_2m_base, tdmr.pamt_1g_base)[level]
    end = table + (tdmr.size >> LEVEL_SHIFT[level]) * ENTRY_BYTES
    at = table
    while at < end:
        try:
            at = os.lseek(memory.fd, at, os.SEEK_DATA) & -4096
        except OSError:  # ENXIO: no data from here on
            return
        if memory.b[at : at + 4096] == _RESERVED_PAGE:
            at += 4096
            continue
        first = (at - table) // ENTRY_BYTES
        for index, word in enumerate(memory.q[at >> 3 : min(at + 4096, end) >> 3 : 2].tolist(), first):
            if word and word != _RESERVED:
                yield tdmr.base + (index << LEVEL_SHIFT[level]), word
        at += 4096


def _check_keys(module: TdxModule) -> None:
    held = Counter(tdr.hkid for tdr in module.tdrs.values() if tdr.lifecycle_state != LifecycleState.TEARDOWN)
    for hkid in range(module.first_private_hkid, module.last_private_hkid + 1):
        owned = module.kot.state[hkid] in (HkidState.ASSIGNED, HkidState.FLUSHED)
        if held[hkid] != owned:
            state = HkidState(module.kot.state[hkid]).name
            raise SimBug(f"HKID {hkid} is {state}, and {held[hkid]} TDs have it")
    for tdr in module.tdrs.values():
        expected = _TD_STATES.get(LifecycleState(tdr.lifecycle_state))
        if expected is not None and module.kot.state[tdr.hkid] != expected:
            raise SimBug(f"the HKID of TDR {tdr.hpa:#x} is not {expected.name}")


def _check_tdrs(module: TdxModule, pages: dict[Page, tuple[int, int]]) -> None:
    children = Counter[int]()
    for (hpa, level), (page_type, owner) in pages.items():
        if page_type == PageType.TDR:
            if hpa not in module.tdrs:
                raise SimBug(f"PAMT has a TDR at HPA {hpa:#x} that the module does not know")
        elif owner not in module.tdrs:
            raise SimBug(f"the page at HPA {hpa:#x} belongs to HPA {owner:#x}, which is no TDR")
        else:
            children[owner] += 1 << 9 * level
        if page_type == PageType.TDVPR and hpa not in module.tdvpses:
            raise SimBug(f"PAMT has a TDVPR at HPA {hpa:#x} that the module does not know")
    for hpa, tdr in module.tdrs.items():
        if pages.get((hpa, 0), (0, 0))[0] != PageType.TDR:
            raise SimBug(f"PAMT has no TDR at HPA {hpa:#x}")
        if tdr.chldcnt != children[hpa]:
            raise SimBug(f"CHLDCNT of TDR {hpa:#x} is {tdr.chldcnt}, and {children[hpa]} pages name it")


def _pages_of(module: TdxModule, tdr: Tdr) -> Iterator[tuple[Page, int]]:
    """Yield what the structures of a TD say that it owns."""
    for hpa in tdr.tdcx_pa:
        yield (hpa, 0), PageType.TDCX
    associated = 0
    for tdvps in module.tdvpses.values():
        if tdvps.tdr is tdr:
            yield (tdvps.hpa, 0), PageType.TDVPR
            for hpa in tdvps.tdvps_page_pa[1:]:
                yield (hpa, 0), PageType.TDCX
            associated += tdvps.assoc_lpid < len(module.platform.lps)
    if tdr.num_tdcx >= MIN_TDCS_PAGES and tdr.tdcs.op_state != OpState.UNINITIALIZED:
        if associated != tdr.tdcs.num_assoc_vcpus:
            raise SimBug(f"NUM_ASSOC_VCPUS is {tdr.tdcs.num_assoc_vcpus}, and {associated} vCPUs are associated")
        yield from _mapped(module.memory, tdr.tdcs.sept_root, tdr.tdcs.pwl)


def _mapped(memory: PhysicalMemory, table: int, level: int) -> Iterator[tuple[Page, int]]:
    """Yield the pages that a Secure EPT table maps, and the tables below it."""
    for entry in memory.q[table >> 3 : (table >> 3) + 512].tolist():
        if entry == FREE_ENTRY:
            continue
        state = state_of(entry)
        if state in (SeptState.FREE, SeptState.REMOVED):
            continue
        if entry & PS:
            yield (entry & HPA_MASK & -(1 << LEVEL_SHIFT[level]), level), PageType.REG
        else:
            yield (entry & HPA_MASK, 0), PageType.EPT
            yield from _mapped(memory, entry & HPA_MASK, level - 1)
