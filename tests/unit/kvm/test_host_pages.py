from collections.abc import Iterator

import pytest

from sim_backend.hw.memory import PhysicalMemory
from sim_backend.kvm.host_pages import HostPages, OutOfMemory


@pytest.fixture
def memory() -> Iterator[PhysicalMemory]:
    ram = PhysicalMemory(1 << 20)
    yield ram
    ram.close()


def test_every_page_of_every_range_is_handed_out_once(memory: PhysicalMemory) -> None:
    pages = HostPages(memory, [(0x1000, 0x3000), (0x8000, 0x9000)])
    assert [pages.alloc() for _ in range(3)] == [0x1000, 0x2000, 0x8000]
    with pytest.raises(OutOfMemory):
        pages.alloc()


def test_a_freed_page_is_reused_first_and_zeroed_on_request(memory: PhysicalMemory) -> None:
    pages = HostPages(memory, [(0, 0x4000)])
    first = pages.alloc()
    memory.write(first, b"secret")
    pages.free(first)
    assert pages.in_use == 0
    assert pages.alloc_zeroed() == first
    assert memory.read(first, 6) == bytes(6)


def test_many_pages_are_all_or_none(memory: PhysicalMemory) -> None:
    pages = HostPages(memory, [(0, 0x4000)])
    pages.limit_pages = 3
    with pytest.raises(OutOfMemory):
        pages.alloc_many(4)
    assert pages.in_use == 0
    assert len(set(pages.alloc_many(3))) == 3


def test_a_range_that_is_no_page_range_is_refused(memory: PhysicalMemory) -> None:
    with pytest.raises(ValueError, match="0x800"):
        HostPages(memory, [(0x800, 0x2000)])
    with pytest.raises(ValueError, match="no page range"):
        HostPages(memory, [(0, 2 << 20)])
