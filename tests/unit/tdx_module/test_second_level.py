"""Address translation of a TD as its CPU sees it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim_backend.cpu.ept import LARGE, SUPPRESS_VE, EptMisconfiguration, page_of, walk
from sim_backend.seamcall_host import SeamcallHost
from sim_backend.tdx_module.not_modelled import NotModelled
from tests.unit.tdx_module.guest_side import FREE_GPA, GPA, SHARED, Guest
from uapi_ctypes.tdx_leaves import SeamcallLeaf, TdcallLeaf

SHARED_EPTP = 0x0024_0003_0000_203C
TABLES = 4 << 20  # the host's memory
RWX = 7
WB = 6 << 3


@pytest.fixture
def guest(host: SeamcallHost) -> Guest:
    return Guest(host, enter=False)


def translate(guest: Guest, gpa: int) -> int:
    return guest.cpu.second_level.walk(gpa)


def map_shared(guest: Guest, gpa: int, entry: int) -> None:
    """Build the host's EPT for one shared page and give it to the vCPU."""
    q = guest.module.q
    table = TABLES
    for level in (3, 2, 1):
        q[(table >> 3) + (gpa >> 12 + 9 * level & 0x1FF)] = table + 4096 | RWX
        table += 4096
    q[(table >> 3) + (gpa >> 12 & 0x1FF)] = entry
    guest.host.call(SeamcallLeaf.TDH_VP_WR, rcx=guest.tdvpr, rdx=SHARED_EPTP, r8=TABLES, r9=(1 << 64) - 1)


def test_a_private_page_is_mapped_with_all_rights(guest: Guest) -> None:
    assert translate(guest, GPA | 0x123) == guest.page | RWX | SUPPRESS_VE


@pytest.mark.parametrize("gpa", [FREE_GPA, 1 << 30, 1 << 46, 1 << 48, 1 << 51])
def test_what_is_not_mapped_is_not_present_and_no_ve(guest: Guest, gpa: int) -> None:
    assert translate(guest, gpa) & (RWX | SUPPRESS_VE) == SUPPRESS_VE


def test_a_pending_page_is_not_present_until_it_is_accepted(guest: Guest) -> None:
    page = guest.host.aug_page(guest.td, FREE_GPA)
    assert not translate(guest, FREE_GPA) & RWX
    guest.enter()
    guest.tdcall(TdcallLeaf.TDG_MEM_PAGE_ACCEPT, rcx=FREE_GPA)
    assert translate(guest, FREE_GPA) == page | RWX | SUPPRESS_VE


def test_a_blocked_page_is_not_present(guest: Guest) -> None:
    guest.host.call(SeamcallLeaf.TDH_MEM_RANGE_BLOCK, rcx=GPA, rdx=guest.td.tdr)
    assert not translate(guest, GPA) & RWX


def test_a_large_page_is_mapped_4_kib_at_a_time(guest: Guest) -> None:
    gpa = 1 << 30
    page = guest.host.aug_page(guest.td, gpa, level=1)
    guest.enter()
    guest.tdcall(TdcallLeaf.TDG_MEM_PAGE_ACCEPT, rcx=gpa | 1)
    for number in (0, 1, 511):
        assert translate(guest, gpa + number * 4096) == page + number * 4096 | RWX | SUPPRESS_VE


def test_a_shared_page_is_the_hosts_ept(guest: Guest) -> None:
    gpa = SHARED | 0x5000
    assert not translate(guest, gpa) & RWX
    map_shared(guest, gpa, 0x60_0000 | 0b011 | WB)
    assert translate(guest, gpa) == 0x60_0000 | 0b011
    map_shared(guest, gpa, 0x60_0000 | 0b001 | WB | SUPPRESS_VE)
    assert translate(guest, gpa) == 0x60_0000 | 0b001 | SUPPRESS_VE


def test_a_shared_page_without_suppress_ve_is_the_guests_business(guest: Guest) -> None:
    gpa = SHARED | 0x5000
    map_shared(guest, gpa, 0)
    assert translate(guest, gpa) == 0
    assert guest.cpu.second_level.deliver_ve(0x181, 0x77, gpa)
    assert not guest.cpu.second_level.deliver_ve(0x181, 0x88, gpa), "the area is busy"
    assert (guest.tdvps.ve_info.gla, guest.tdvps.ve_info.gpa) == (0x77, gpa)


@pytest.mark.parametrize("entry", [0x60_0000 | 0b010 | WB, 0x60_0000 | RWX | 2 << 3, 0x60_0000 | RWX | 7 << 3])
def test_a_misconfigured_shared_ept_stops_the_guest_loudly(guest: Guest, entry: int) -> None:
    map_shared(guest, SHARED | 0x5000, entry)
    with pytest.raises(NotModelled, match="EPT misconfiguration"):
        translate(guest, SHARED | 0x5000)


# The walk itself, over a few tables of 512 words


@given(gpa=st.integers(0, (1 << 48) - 1), rights=st.lists(st.sampled_from([1, 3, 5, 7]), min_size=4, max_size=4),
       leaf_level=st.integers(0, 2))  # fmt: skip
def test_a_path_has_the_rights_that_all_its_entries_have(gpa: int, rights: list[int], leaf_level: int) -> None:
    words = memoryview(bytearray(4096 * 4)).cast("Q")
    table = 0
    expected = RWX
    for level in range(3, leaf_level, -1):
        words[(table >> 3) + (gpa >> 12 + 9 * level & 0x1FF)] = table + 4096 | rights[level]
        expected &= rights[level]
        table += 4096
    page = 0x7_C000_0000
    leaf = page | rights[leaf_level] | WB | (LARGE if leaf_level else 0)
    words[(table >> 3) + (gpa >> 12 + 9 * leaf_level & 0x1FF)] = leaf
    expected &= rights[leaf_level]
    entry, level, access = walk(words, 0, 3, gpa)
    assert (entry, level, access) == (leaf, leaf_level, expected)
    offset = gpa & (1 << 12 + 9 * level) - 1 & ~0xFFF
    assert page_of(entry, level, gpa) == page + offset


def test_a_table_outside_memory_is_a_misconfiguration() -> None:
    words = memoryview(bytearray(4096)).cast("Q")
    words[0] = 1 << 40 | RWX
    with pytest.raises(EptMisconfiguration) as error:
        walk(words, 0, 3, 0)
    assert error.value.level == 2
