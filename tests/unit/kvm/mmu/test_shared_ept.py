from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim_backend.hw.memory import PhysicalMemory
from sim_backend.kvm.host_pages import HostPages, OutOfMemory
from sim_backend.kvm.mmu.shared_ept import EXECUTE, HPA_MASK, MMIO, READ, SUPPRESS_VE, WRITE, SharedEpt

ALL = READ | WRITE | EXECUTE
S_BIT_GFN = 1 << 47 - 12


@pytest.fixture(scope="module")
def memory() -> Iterator[PhysicalMemory]:
    ram = PhysicalMemory(64 << 20)
    yield ram
    ram.close()


@pytest.fixture
def pages(memory: PhysicalMemory) -> HostPages:
    return HostPages(memory, [(0, 64 << 20)])


def walk(memory: PhysicalMemory, root: int, levels: int, gpa: int) -> int:
    """Walk the tables as the processor does (Intel SDM Vol. 3, 30.3.2)."""
    table = root
    for level in range(levels - 1, 0, -1):
        entry = memory.q[(table >> 3) + (gpa >> 12 + 9 * level & 511)]
        if not entry & 7:
            return entry
        table = entry & HPA_MASK
    return memory.q[(table >> 3) + (gpa >> 12 & 511)]


@pytest.mark.parametrize("levels", [4, 5])
def test_the_processor_finds_what_was_mapped(memory: PhysicalMemory, pages: HostPages, levels: int) -> None:
    ept = SharedEpt(memory, pages, levels)
    ept.map(0x12345, 0x777000, ALL)
    entry = walk(memory, ept.root, levels, 0x12345 << 12)
    assert entry & 7 == ALL
    assert entry & HPA_MASK == 0x777000
    assert entry >> 3 & 7 == 6, "write-back"


def test_a_td_is_walked_with_the_s_bit_in_place(memory: PhysicalMemory, pages: HostPages) -> None:
    ept = SharedEpt(memory, pages, 4, gfn_bits=S_BIT_GFN, absent=SUPPRESS_VE)
    ept.map(0x80, 0x5000, READ)
    assert walk(memory, ept.root, 4, (0x80 | S_BIT_GFN) << 12) & HPA_MASK == 0x5000
    assert walk(memory, ept.root, 4, 0x80 << 12) == SUPPRESS_VE
    assert ept.entry(0x80) & HPA_MASK == 0x5000


def test_an_absent_entry_of_a_td_suppresses_ve_and_an_mmio_mark_does_not(
    memory: PhysicalMemory, pages: HostPages
) -> None:
    ept = SharedEpt(memory, pages, 4, gfn_bits=S_BIT_GFN, absent=SUPPRESS_VE)
    ept.map(1, 0x5000, ALL)
    ept.mark_mmio(2)
    assert ept.entry(3) == SUPPRESS_VE
    assert ept.entry(2) == MMIO
    assert not ept.entry(2) & (SUPPRESS_VE | ALL)


def test_a_slot_that_appears_later_takes_the_mmio_mark_away(memory: PhysicalMemory, pages: HostPages) -> None:
    ept = SharedEpt(memory, pages, 4, absent=SUPPRESS_VE)
    ept.mark_mmio(7)
    ept.unmap(0, 16)
    assert ept.entry(7) == SUPPRESS_VE


def test_write_protection_keeps_the_mapping(memory: PhysicalMemory, pages: HostPages) -> None:
    ept = SharedEpt(memory, pages, 4)
    ept.map(5, 0x9000, ALL)
    ept.map(6, 0xA000, READ)
    assert ept.write_protect(0, 100) == 1
    assert ept.entry(5) & 7 == READ | EXECUTE
    assert ept.entry(5) & HPA_MASK == 0x9000


@settings(max_examples=50)
@given(
    st.dictionaries(st.integers(0, 3000), st.integers(1, 100), max_size=50),
    st.integers(0, 3000),
    st.integers(0, 3000),
)
def test_unmapping_a_range_leaves_the_rest(mapped: dict[int, int], low: int, high: int) -> None:
    memory = PhysicalMemory(16 << 20)
    pages = HostPages(memory, [(0, 16 << 20)])
    ept = SharedEpt(memory, pages, 4, gfn_bits=S_BIT_GFN, absent=SUPPRESS_VE)
    for gfn, page in mapped.items():
        ept.map(gfn, page << 12, ALL)
    start, end = min(low, high), max(low, high)
    assert ept.unmap(start, end) == sum(start <= gfn < end for gfn in mapped)
    for gfn, page in mapped.items():
        expected = SUPPRESS_VE if start <= gfn < end else page << 12
        assert ept.entry(gfn) & (HPA_MASK | SUPPRESS_VE) == expected
    assert ept.mapped_pages == sum(not start <= gfn < end for gfn in mapped)
    ept.free()
    assert pages.in_use == 0
    memory.close()


def test_running_out_of_pages_raises_and_the_rest_can_be_freed(memory: PhysicalMemory, pages: HostPages) -> None:
    ept = SharedEpt(memory, pages, 4)
    pages.limit_pages = pages.in_use + 2
    with pytest.raises(OutOfMemory):
        ept.map(0, 0x1000, ALL)
    ept.free()
    assert pages.in_use == 0
