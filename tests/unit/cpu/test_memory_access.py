"""Both levels of paging, seen from the guest."""

import ctypes
import mmap
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sim_backend.cpu.engine import ExitReason
from sim_backend.cpu.paging import FETCH, READ, WRITE, PageFault, Paging
from sim_backend.hw.gprs import RAX, RBX, RCX

CODE, HANDLERS, PML4, PDPT, PD = 0x2000, 0x9000, 0x4000, 0x5000, 0x6000
LOAD, STORE, CALL = "488b03", "488903", "ffd3"  # through RBX


@pytest.mark.parametrize(("code", "access"), [(LOAD, READ), (STORE, WRITE), (CALL, FETCH)])
@pytest.mark.parametrize("allowed", [0, 1, 3, 4, 5])
def test_the_second_level_forbids_what_its_entry_does_not_allow(
    machine: Any, code: str, access: int, allowed: int
) -> None:
    cpu = machine.long_mode()
    machine.code(code + "f4")
    machine.code("c3", at=0x20120)
    machine.ept.entries[0x20] = 0x20000 | allowed | 1 << 63
    cpu.gprs[RBX] = 0x20120
    exit_ = cpu.run()
    if allowed & access:
        assert exit_.reason == ExitReason.HLT
        return
    assert exit_.reason == ExitReason.EPT_VIOLATION
    assert exit_.qualification == access | allowed << 3 | 0x180
    rip = 0x20120 if access == FETCH else CODE
    assert (exit_.gpa, exit_.gla, cpu.rip) == (0x20120, 0x20120, rip)


def test_a_permission_gained_later_needs_no_invalidation(machine: Any) -> None:
    cpu = machine.long_mode()
    machine.code(LOAD + STORE + "f4")
    machine.ept.entries[0x20] = 0x20000 | 1
    cpu.gprs[RBX] = 0x20000
    assert cpu.run().reason == ExitReason.EPT_VIOLATION
    machine.ept.entries[0x20] = 0x20000 | 3
    assert cpu.run().reason == ExitReason.HLT


def test_a_translation_taken_away_is_gone_after_invalidate(machine: Any) -> None:
    cpu = machine.long_mode()
    machine.code(LOAD + "f4")
    cpu.gprs[RBX] = 0x20000
    cpu.run()
    machine.ept.entries[0x20] = 1 << 63
    machine.begin(cpu).gprs[RBX] = 0x20000
    cpu.invalidate()
    assert cpu.run().reason == ExitReason.EPT_VIOLATION


def test_a_missing_page_table_is_a_violation_of_the_walk(machine: Any) -> None:
    cpu = machine.long_mode()
    machine.entry(PDPT + 8, 0x30000 | 7)
    machine.ept.entries[0x30] = 1 << 63
    machine.code("488b042538120040")
    exit_ = cpu.run()
    assert exit_.reason == ExitReason.EPT_VIOLATION
    assert exit_.qualification == 0x81
    assert (exit_.gpa, exit_.gla) == (0x30000, 0x4000_1238)


def test_an_entry_that_asks_for_ve_raises_it_and_a_retry_succeeds(machine: Any) -> None:
    cpu = machine.long_mode()
    machine.code(STORE + "f4")
    machine.ept.entries[0x20] = 0
    cpu.gprs[RBX] = 0x20008
    cpu.run()
    assert cpu.rip == HANDLERS + 16 * 20
    assert machine.ept.ve == [(0x182, 0x20008, 0x20008)]
    assert machine.stack(cpu, 1) == [CODE]


def test_a_busy_ve_area_exits(machine: Any) -> None:
    cpu = machine.long_mode()
    machine.code(STORE + "f4")
    machine.ept.entries[0x20] = 0
    machine.ept.ve_enabled = False
    cpu.gprs[RBX] = 0x20008
    assert cpu.run().reason == ExitReason.EPT_VIOLATION


def test_accessed_and_dirty_bits_are_set_by_what_needs_them(machine: Any) -> None:
    cpu = machine.long_mode()
    machine.entry(PD + 8, 0x00083)  # a second view of the same 2 MiB
    machine.code(LOAD + "f4")
    cpu.gprs[RBX] = 0x20_0000 + 0x1000
    cpu.run()
    assert machine.memory.read(PD + 8, 1)[0] & 0x60 == 0x20
    machine.code(STORE + "f4")
    machine.begin(cpu).gprs[RBX] = 0x20_0000 + 0x1000
    cpu.invalidate_code(CODE, 8)
    cpu.run()
    assert machine.memory.read(PD + 8, 1)[0] & 0x60 == 0x60


def test_a_store_that_crosses_into_a_forbidden_page_stores_nothing(machine: Any) -> None:
    cpu = machine.long_mode()
    machine.code(STORE + "f4")
    machine.ept.entries[0x21] = 1 << 63
    cpu.gprs[RBX], cpu.gprs[RAX] = 0x20FFC, 2**64 - 1
    exit_ = cpu.run()
    assert exit_.reason == ExitReason.EPT_VIOLATION
    assert exit_.gpa & ~0xFFF == 0x21000
    assert machine.memory.read(0x20FFC, 4) == bytes(4)


def test_smep_and_smap_keep_the_supervisor_out_of_user_pages(machine: Any) -> None:
    cpu = machine.long_mode()
    machine.entry(PD, 0x83)  # code and data: supervisor
    machine.entry(PD + 8, 0x87)  # the same memory for the user
    state = cpu.get_state()
    state.cr4 |= 1 << 20 | 1 << 21
    cpu.set_state(state)
    for code, error in ((LOAD, 1), (CALL, 0x11)):
        machine.code(code + "f4")
        cpu.invalidate_code(CODE, 8)
        machine.begin(cpu).gprs[RBX] = 0x20_0000 + 0x20000
        cpu.run()
        assert cpu.rip == HANDLERS + 16 * 14
        assert machine.stack(cpu, 1) == [error]
    machine.code("0f01cb" + LOAD + "f4")  # STAC
    cpu.invalidate_code(CODE, 8)
    machine.begin(cpu).gprs[RBX] = 0x20_0000 + 0x20000
    cpu.run()
    assert cpu.rip == CODE + 6


def test_code_that_the_host_rewrites_runs_anew_after_invalidate_code(machine: Any) -> None:
    cpu = machine.long_mode()
    for value in (1, 2):
        machine.code(f"b8{value:02x}000000f4")
        cpu.invalidate_code(CODE, 5)
        machine.begin(cpu)
        cpu.run()
        assert cpu.gprs[RAX] == value


def test_self_modifying_code_runs_as_written(machine: Any) -> None:
    cpu = machine.long_mode()
    machine.code("c604250920000007 b800000000 f4")  # MOV BYTE [0x2009], 7; MOV EAX, 0
    cpu.run()
    assert cpu.gprs[RAX] == 7


class Window:
    """One page of our own memory as a window onto physical memory."""

    def __init__(self, machine: Any) -> None:
        self.map = mmap.mmap(-1, 4096)
        anchor = ctypes.c_char.from_buffer(self.map)
        self.address = ctypes.addressof(anchor)
        del anchor
        self.window = machine.memory.add_window(
            4096, self.address, lambda offset, length: self.map[offset : offset + length], lambda _o, _d: None
        )
        self.libc = ctypes.CDLL(None)

    def protect(self, protection: int) -> None:
        assert self.libc.mprotect(ctypes.c_void_p(self.address), ctypes.c_size_t(4096), protection) == 0


@pytest.fixture
def window(machine: Any) -> Iterator[Window]:
    window = Window(machine)
    machine.ept.entries[0x20] = window.window.base | 7
    yield window
    window.protect(3)


def test_a_window_is_the_users_memory(machine: Any, window: Window) -> None:
    cpu = machine.long_mode()
    machine.code(STORE + LOAD + "f4")
    cpu.gprs[RBX], cpu.gprs[RAX] = 0x20010, 0xFEED
    assert cpu.run().reason == ExitReason.HLT
    assert window.map[0x10:0x12] == b"\xed\xfe"


def test_user_memory_that_vanishes_is_a_violation_and_not_a_crash(machine: Any, window: Window) -> None:
    cpu = machine.long_mode()
    machine.code(LOAD + "f4" + LOAD + "f4")
    cpu.gprs[RBX] = 0x20010
    assert cpu.run().reason == ExitReason.HLT
    window.protect(0)
    cpu.rip += 1
    exit_ = cpu.run()
    assert (exit_.reason, exit_.gpa) == (ExitReason.EPT_VIOLATION, 0x20010)
    window.protect(3)
    assert cpu.run().reason == ExitReason.HLT


def test_user_memory_that_is_read_only_refuses_the_write(machine: Any, window: Window) -> None:
    cpu = machine.long_mode()
    window.protect(1)
    machine.code(LOAD + STORE + "f4")
    cpu.gprs[RBX] = 0x20010
    exit_ = cpu.run()
    assert (exit_.reason, exit_.qualification & 7, cpu.rip) == (ExitReason.EPT_VIOLATION, WRITE, CODE + 3)


def test_a_window_that_takes_anothers_place_is_seen_after_invalidate(machine: Any, window: Window) -> None:
    cpu = machine.long_mode()
    machine.code(LOAD + "f4")
    window.map[0x10:0x12] = b"\x11\x11"
    cpu.gprs[RBX] = 0x20010
    cpu.run()
    assert cpu.gprs[RAX] == 0x1111
    machine.memory.remove_window(window.window)
    other = Window(machine)
    assert other.window.base == window.window.base
    other.map[0x10:0x12] = b"\x22\x22"
    machine.begin(cpu).gprs[RBX] = 0x20010
    cpu.invalidate()
    cpu.run()
    assert cpu.gprs[RAX] == 0x2222


def test_read_linear_says_where_there_is_nothing(machine: Any) -> None:
    cpu = machine.long_mode()
    machine.memory.write(0x1FFE, b"abcd")
    assert cpu.read_linear(0x1FFE, 4) == b"abcd"
    with pytest.raises(LookupError, match="0x40000000"):
        cpu.read_linear(0x4000_0000, 4)


# ---- The walk itself, against a rule written down independently ----


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    levels=st.lists(st.tuples(st.booleans(), st.booleans(), st.booleans()), min_size=4, max_size=4),
    access=st.sampled_from([READ, WRITE, FETCH]),
    user=st.booleans(),
    write_protect=st.booleans(),
)
def test_permissions_of_all_levels_combine(
    machine: Any, levels: list[tuple[bool, bool, bool]], access: int, user: bool, write_protect: bool
) -> None:
    tables = [0x10000, 0x11000, 0x12000, 0x13000, 0x20000]
    gla = 0x0000_1234_5678_9ABC
    for level, (writable, for_user, no_execute) in enumerate(levels):
        index = gla >> (39 - 9 * level) & 0x1FF
        flags = 1 | writable << 1 | for_user << 2 | no_execute << 63
        machine.entry(tables[level] + 8 * index, tables[level + 1] | flags)
    paging = Paging(machine.memory, machine.ept)
    paging.configure(0x8000_0001 | write_protect << 16, tables[0], 0x20, 0xD01 | 1 << 10)
    allowed = not (
        (user and not all(level[1] for level in levels))
        or (access == WRITE and not all(level[0] for level in levels) and (user or write_protect))
        or (access == FETCH and any(level[2] for level in levels))
    )
    if allowed:
        assert paging.translate(gla, access, user, False) & ~0xFFF == 0x20000
    else:
        with pytest.raises(PageFault) as fault:
            paging.translate(gla, access, user, False)
        assert fault.value.error_code == 1 | (access == WRITE) << 1 | user << 2 | (access == FETCH) << 4


def test_legacy_paging_modes_walk_their_tables(machine: Any) -> None:
    paging = Paging(machine.memory, machine.ept)
    machine.entry(0x10000 + 4 * 1, 0x11007, 4)  # 4 MiB to 8 MiB through a page table
    machine.entry(0x11000 + 4 * 2, 0x20003, 4)
    machine.entry(0x10000 + 4 * 3, 0x0000_0083, 4)  # 12 MiB: one 4 MiB page
    paging.configure(0x8000_0001, 0x10000, 0x10, 0)
    assert paging.translate(0x40_2123, WRITE, False, False) & ~0xFFF == 0x20000
    assert paging.translate(0xC0_5000, READ, False, False) & ~0xFFF == 0x5000
    with pytest.raises(PageFault):
        paging.translate(0x40_2123, READ, True, False)
    machine.entry(0x12020 + 8, 0x13001)  # PAE: the second GiB
    machine.entry(0x13000, 0x14003)
    machine.entry(0x14000 + 8, 0x21003)
    paging.configure(0x8000_0001, 0x12020, 0x20, 0)
    assert paging.translate(0x4000_1000, READ, False, False) & ~0xFFF == 0x21000


def test_five_level_paging_uses_the_extra_level(machine: Any) -> None:
    paging = Paging(machine.memory, machine.ept)
    gla = 1 << 48
    for table, following in ((0x10008, 0x11003), (0x11000, 0x12003), (0x12000, 0x13003), (0x13000, 0x14003)):
        machine.entry(table, following)
    machine.entry(0x14000, 0x22003)
    paging.configure(0x8000_0001, 0x10000, 0x1020, 0x500)
    assert paging.translate(gla, READ, False, False) & ~0xFFF == 0x22000


def test_large_pages_of_one_gib_keep_the_offset(machine: Any) -> None:
    cpu = machine.long_mode()
    machine.entry(PDPT + 8, 0x83)
    machine.memory.write(0x55550, b"\x11\x22\x33\x44")
    machine.code("8b042550550540 f4")
    cpu.gprs[RCX] = 0
    cpu.run()
    assert cpu.gprs[RAX] == 0x44332211
