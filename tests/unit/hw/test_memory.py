"""`PhysicalMemory`: sparse RAM and the windows above it."""

import errno
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim_backend.hw.memory import PAGE_SIZE, PhysicalMemory, Window

GIB = 1 << 30


@pytest.fixture
def memory() -> Iterator[PhysicalMemory]:
    memory = PhysicalMemory(64 * PAGE_SIZE)
    yield memory
    memory.close()


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_SIZE


def test_half_a_tebibyte_costs_nothing_until_touched() -> None:
    before = resident_bytes()
    memory = PhysicalMemory(512 * GIB)
    memory.q[(511 * GIB) >> 3] = 7
    try:
        assert memory.read(511 * GIB, 8) == (7).to_bytes(8, "little")
        assert memory.read(256 * GIB, 8) == bytes(8)
        assert resident_bytes() - before < 1 << 20
    finally:
        memory.close()


@pytest.mark.parametrize("ram_bytes", [0, -4096, 1, 4097])
def test_ram_is_a_positive_number_of_whole_pages(ram_bytes: int) -> None:
    with pytest.raises(ValueError, match="multiple of 4096"):
        PhysicalMemory(ram_bytes)


def test_words_and_bytes_are_two_views_of_the_same_ram(memory: PhysicalMemory) -> None:
    memory.q[2] = 0x1122334455667788

    assert memory.read(16, 8) == bytes.fromhex("8877665544332211")


def test_a_discarded_page_reads_as_zeros(memory: PhysicalMemory) -> None:
    memory.write(PAGE_SIZE, b"\xff" * (2 * PAGE_SIZE))

    memory.discard(PAGE_SIZE, PAGE_SIZE)

    assert memory.read(PAGE_SIZE, PAGE_SIZE) == bytes(PAGE_SIZE)
    assert memory.read(2 * PAGE_SIZE, PAGE_SIZE) == b"\xff" * PAGE_SIZE


def window_on(memory: PhysicalMemory, store: bytearray) -> Window:
    def read(offset: int, length: int) -> bytes:
        if offset + length > len(store):
            raise OSError(errno.EFAULT, "gone")
        return bytes(store[offset : offset + length])

    def write(offset: int, data: bytes) -> None:
        store[offset : offset + len(data)] = data

    return memory.add_window(len(store), 0, read, write)


def test_a_window_reaches_foreign_memory_and_its_end_is_nothing(memory: PhysicalMemory) -> None:
    store = bytearray(PAGE_SIZE)
    window = window_on(memory, store)

    memory.write(window.base + 8, b"abc")

    assert store[8:11] == b"abc"
    assert memory.read(window.base + 8, 3) == b"abc"
    assert memory.backing(window.base + 8) == (window.base, PAGE_SIZE, 0)
    with pytest.raises(IndexError, match="no memory at HPA"):
        memory.read(window.base + PAGE_SIZE, 1)


def test_a_removed_window_is_gone_and_its_addresses_are_used_again(memory: PhysicalMemory) -> None:
    first = window_on(memory, bytearray(PAGE_SIZE))
    memory.remove_window(first)

    with pytest.raises(IndexError):
        memory.window_at(first.base)
    assert window_on(memory, bytearray(PAGE_SIZE)).base == first.base


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(1, 700), min_size=1, max_size=12), drop=st.sets(st.integers(0, 11)))
def test_live_windows_never_overlap(sizes: list[int], drop: set[int]) -> None:
    memory = PhysicalMemory(PAGE_SIZE)
    try:
        live = []
        for index, pages in enumerate(sizes):
            window = window_on(memory, bytearray(pages * PAGE_SIZE))
            if index in drop:
                memory.remove_window(window)
            else:
                live.append(window)
        live.sort(key=lambda window: window.base)
        assert all(a.base + a.length <= b.base for a, b in pairwise(live))
    finally:
        memory.close()
