"""Large pages: what splitting and removing them shows and leaves behind."""

from sim_backend.hw.gprs import RCX, RDX
from sim_backend.seamcall_host import SeamcallHost, Td
from sim_backend.tdx_module.locks import HOST_PRIORITY, HP_READER
from sim_backend.tdx_module.pamt import PageType
from uapi_ctypes.tdx_leaves import SeamcallLeaf
from uapi_ctypes.tdx_status import Status

GPA = 2 << 20
LEVEL_2M = 1
PENDING_LEAF = 0x8000_0000_0000_00F0
ACCEPTED_HALF = 0x100 << 12
"""Bits 20:12 of a 2 MiB entry while TDG.MEM.PAGE.ACCEPT of it is interrupted: 256 of 512 pages are done."""


def td_with_large_page(host: SeamcallHost) -> tuple[Td, int]:
    td = host.create_td()
    host.create_vcpu(td)
    return td, host.aug_page(td, GPA, level=LEVEL_2M)


def interrupt_accept(host: SeamcallHost, td: Td) -> int:
    """Leave the page as an interrupted TDG.MEM.PAGE.ACCEPT does; return the word index of its entry."""
    index = (td.tables[2, 0] >> 3) + (GPA >> 21)
    host.module.q[index] |= ACCEPTED_HALF
    return index


def test_a_refused_removal_does_not_show_how_far_the_guest_had_accepted(host: SeamcallHost) -> None:
    td, page = td_with_large_page(host)
    interrupt_accept(host, td)
    host.finalize(td)
    leaf = SeamcallLeaf.TDH_MEM_PAGE_REMOVE
    regs = host.call(leaf, rcx=GPA | LEVEL_2M, rdx=td.tdr, accept=Status.GPA_RANGE_NOT_BLOCKED)
    assert (regs[RCX], regs[RDX]) == (page | PENDING_LEAF, 0x201)


def test_reading_the_entry_shows_how_far_the_guest_had_accepted(host: SeamcallHost) -> None:
    td, page = td_with_large_page(host)
    interrupt_accept(host, td)
    regs = host.call(SeamcallLeaf.TDH_MEM_SEPT_RD, rcx=GPA | LEVEL_2M, rdx=td.tdr)
    assert regs[RCX] == page | PENDING_LEAF | ACCEPTED_HALF


def test_splitting_a_page_leaves_the_locks_of_its_parts_alone(host: SeamcallHost) -> None:
    td, page = td_with_large_page(host)
    pamt, q = host.module.pamt, host.module.q
    first, last = pamt.entry_4k(page), pamt.entry_4k(page + (511 << 12))
    q[first] |= HP_READER
    q[last] |= HOST_PRIORITY
    host.call(SeamcallLeaf.TDH_MEM_PAGE_DEMOTE, rcx=GPA | LEVEL_2M, rdx=td.tdr, r8=host.page())
    assert [q[entry] & 0xFFFF for entry in (first, first + 2, last)] == [HP_READER, 0, HOST_PRIORITY]
    assert {pamt.page_type(entry) for entry in range(first, last + 1, 2)} == {PageType.REG}
    assert {pamt.owner(entry) for entry in range(first, last + 1, 2)} == {td.tdr}
