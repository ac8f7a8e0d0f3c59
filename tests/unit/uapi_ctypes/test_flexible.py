"""Variable-length structures: room, count, and entries in place."""

import ctypes
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uapi_ctypes.flexible import Flexible
from uapi_ctypes.kvm_state import KvmCpuid2, KvmCpuidEntry2, KvmMsrList
from uapi_ctypes.tdx_mainline import KvmTdxCapabilities, KvmTdxInitVm
from uapi_ctypes.tdx_v17 import KvmTdxCapabilitiesV17, KvmTdxInitVmV17

LAYOUTS: list[type[Flexible[Any]]] = [
    KvmCpuid2,
    KvmMsrList,
    KvmTdxCapabilities,
    KvmTdxInitVm,
    KvmTdxCapabilitiesV17,
    KvmTdxInitVmV17,
]


@pytest.mark.parametrize("layout", LAYOUTS)
@given(capacity=st.integers(0, 300))
def test_has_room_for_what_was_asked(layout: type[Flexible[Any]], capacity: int) -> None:
    made = layout.allocate(capacity)
    assert made.count == made.capacity == len(made.entries) == capacity
    assert not any(bytes(made.entries))


@given(st.lists(st.integers(0, 0xFFFF_FFFF), max_size=40))
def test_holds_the_entries_it_is_made_of(functions: list[int]) -> None:
    made = KvmCpuid2.of(KvmCpuidEntry2(function=function, eax=function ^ 1) for function in functions)
    assert made.count == len(functions)
    assert [(entry.function, entry.eax) for entry in made.filled()] == [(f, f ^ 1) for f in functions]


def test_entries_are_written_in_place() -> None:
    made = KvmTdxInitVm.allocate(2)
    made.entries[1].ebx = 0xDEAD_BEEF
    assert bytes(made)[264 + 40 + 16 :][:4] == (0xDEAD_BEEF).to_bytes(4, "little")


def test_a_smaller_count_hides_entries_and_a_larger_one_adds_none() -> None:
    made = KvmMsrList.of([1, 2, 3])
    made.count = 2
    assert made.filled() == [1, 2]
    made.count = 50
    assert made.filled() == [1, 2, 3]


def test_v17_capabilities_are_never_smaller_than_the_header_the_kernel_copies() -> None:
    assert ctypes.sizeof(KvmTdxCapabilitiesV17.allocate(0)) == 2056
    assert ctypes.sizeof(KvmTdxCapabilitiesV17.allocate(1)) == 2052 + 24
