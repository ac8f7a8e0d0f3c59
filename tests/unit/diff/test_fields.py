"""uapi structures as flat fields, without what belongs to one process."""

import os

import pytest

from tdxhw.diff.fields import changes, fields_of
from tdxhw.diff.names import Names
from uapi_ctypes.kvm import KvmCreateGuestMemfd, KvmUserspaceMemoryRegion, KvmUserspaceMemoryRegion2
from uapi_ctypes.kvm_run import KvmExitInternal
from uapi_ctypes.kvm_state import (
    KvmCpuid2,
    KvmCpuidEntry2,
    KvmFpu,
    KvmLapicState,
    KvmMsrEntry,
    KvmMsrList,
    KvmMsrs,
    KvmSregs,
    KvmVcpuEvents,
)


def test_zero_fields_are_left_out_and_nested_ones_are_paths() -> None:
    sregs = KvmSregs()
    sregs.cs.base, sregs.cr0, sregs.interrupt_bitmap[1] = 0xFFFF_0000, 0x10, 1

    assert fields_of(sregs, Names()) == {"cs.base": 0xFFFF_0000, "cr0": 0x10, "interrupt_bitmap[1]": 1}


def test_long_byte_areas_are_shown_by_word_and_short_ones_as_bytes() -> None:
    lapic, fpu = KvmLapicState(), KvmFpu()
    lapic.regs[0x390] = 0x21
    fpu.xmm[3][0] = 0x5A

    assert fields_of(lapic, Names()) == {"regs[0x390]": 0x21}
    assert fields_of(fpu, Names()) == {"xmm[3]": "hex:5a"}


def test_the_data_of_an_internal_error_is_64_bit() -> None:
    internal = KvmExitInternal(suberror=1, ndata=1)
    internal.data[0] = 1 << 63

    assert fields_of(internal, Names())["data[0]"] == 1 << 63


def test_cpuid_is_shown_by_leaf_and_a_leaf_of_zeros_is_no_missing_one() -> None:
    cpuid = KvmCpuid2.of([KvmCpuidEntry2(7, 1, 1, 0x30), KvmCpuidEntry2(8), KvmCpuidEntry2(8)])

    assert fields_of(cpuid, Names()) == {
        "nent": 3, "cpuid[0x7,0x1].flags": 1, "cpuid[0x7,0x1].eax": 0x30, "cpuid[0x8,0x0]": "zeros",
        "cpuid[0x8,0x0]#2": "zeros",
    }  # fmt: skip


def test_msrs_are_shown_by_index_and_zero_is_a_value() -> None:
    assert fields_of(KvmMsrs.of([KvmMsrEntry(0x174, 0, 0), KvmMsrEntry(0x10, 0, 5)]), Names()) == {
        "nmsrs": 2, "msr[0x174]": 0, "msr[0x10]": 5,
    }  # fmt: skip


def test_a_count_beyond_the_room_is_not_followed() -> None:
    short = KvmMsrList.allocate(1)
    short.count = 1 << 20

    assert fields_of(short, Names()) == {"nmsrs": 1 << 20}


def test_changes_name_what_became_zero() -> None:
    assert changes({"a": 1, "b": 2, "c": 3}, {"a": 1, "b": 5}) == {"b": 5, "c": 0}


def test_addresses_become_buffers_with_offsets() -> None:
    names = Names()
    first = KvmUserspaceMemoryRegion(0, 0, 0, 0x4000, 0x7F12_3456_7000)
    second = KvmUserspaceMemoryRegion(1, 0, 0, 0x1000, 0x7F12_3456_9010)
    other = KvmUserspaceMemoryRegion(2, 0, 0, 0x1000, 0x7F99_0000_0010)

    assert [fields_of(region, names)["userspace_addr"] for region in (first, second, other)] == [
        "buf0+0x0", "buf0+0x2010", "buf1+0x10",
    ]  # fmt: skip


@pytest.mark.parametrize("address", [1, 0xFFF, 0xFFFF_8880_0000_0000])
def test_what_is_deliberately_no_address_stays_a_number(address: int) -> None:
    region = KvmUserspaceMemoryRegion(0, 0, 0, 0x1000, address)

    assert fields_of(region, Names())["userspace_addr"] == address


def test_descriptors_become_objects_and_closed_ones_stay_numbers() -> None:
    names = Names()
    fd = os.open(os.devnull, os.O_RDONLY)
    try:
        assert names.created("gmem", fd) == "gmem0"
        assert fields_of(KvmUserspaceMemoryRegion2(guest_memfd=fd), names) == {"guest_memfd": "gmem0"}
        assert fields_of(KvmUserspaceMemoryRegion2(guest_memfd=fd), Names()) == {"guest_memfd": "file0"}
    finally:
        os.close(fd)
    assert fields_of(KvmUserspaceMemoryRegion2(guest_memfd=0xFFFF_FFFF), Names()) == {"guest_memfd": 0xFFFF_FFFF}


def test_the_memory_behind_a_structure_is_not_touched() -> None:
    events = KvmVcpuEvents(flags=5)
    before = bytes(events)

    assert fields_of(events, Names()) == {"flags": 5}
    assert bytes(events) == before
    assert fields_of(KvmCreateGuestMemfd(0x1000, 1), Names()) == {"size": 0x1000, "flags": 1}
