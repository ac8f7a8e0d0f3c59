"""The simulated host: how it lays out memory, boots, and tells what is left over."""

import struct
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim_backend.machine import BootError, Machine, boot, tdmr_layout
from uapi_ctypes.device import Kvm

GIB = 1 << 30
PAGE = 4096


@pytest.fixture
def machine() -> Iterator[Machine]:
    machine = boot("mainline")
    yield machine
    machine.shutdown()


@given(base=st.integers(1, 1 << 15), size=st.integers(1, 1 << 12))
def test_pamts_lie_inside_their_tdmr_disjoint_and_large_enough(base: int, size: int) -> None:
    tdmr = tdmr_layout(base * GIB, size * GIB, entry_bytes=16)

    ranges = sorted(tdmr.pamt)
    assert tdmr.base < tdmr.pamt_start
    assert ranges[-1][0] + ranges[-1][1] <= tdmr.base + tdmr.size
    assert all(first[0] + first[1] <= second[0] for first, second in pairwise(ranges))
    for (_, table_bytes), page_bytes in zip(tdmr.pamt, (GIB, 2 << 20, PAGE), strict=True):
        assert table_bytes >= tdmr.size // page_bytes * 16
        assert table_bytes % PAGE == 0


def test_tdmr_info_names_the_pamts_as_one_reserved_area() -> None:
    tdmr = tdmr_layout(GIB, 2 * GIB, entry_bytes=16)

    words = struct.unpack("<64Q", tdmr.info())
    assert words[:2] == (GIB, 2 * GIB)
    assert words[8] + words[9] == 2 * GIB
    assert all(GIB + words[8] <= words[index] < 3 * GIB for index in (2, 4, 6))
    assert not any(words[10:])


@pytest.mark.parametrize("profile", ["mainline", "v17", "6.16", "6.18", "7.2", "7.3"])
def test_every_profile_boots_and_offers_its_vm_types(profile: str) -> None:
    machine = boot(profile)
    try:
        with Kvm(machine.kernel()) as kvm:
            vm_types = kvm.check_extension(235)
        assert vm_types >> (2 if profile == "v17" else 5) & 1
        assert machine.leftovers() == []
    finally:
        machine.shutdown()


def test_a_host_of_512_gib_is_up_in_half_a_second_and_costs_under_300_mib() -> None:
    boot("mainline").shutdown()  # modules imported, engine self-tested: that is the process's cost, not the host's

    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE

    before, start = resident_bytes(), time.process_time()
    machine = boot("mainline", ram_bytes=512 * GIB)
    try:
        assert time.process_time() - start <= 0.5
        assert resident_bytes() - before < 300 << 20
        assert machine.pages.total_pages > 500 * GIB // PAGE
    finally:
        machine.shutdown()


def test_an_open_file_is_a_leftover_until_it_is_closed(machine: Machine) -> None:
    kvm = Kvm(machine.kernel())
    assert machine.leftovers() == ["1 open file descriptors"]

    kvm.close()
    assert machine.leftovers() == []


def test_a_machine_that_the_module_refuses_says_which_step_failed() -> None:
    with pytest.raises(BootError, match="TDH_SYS_CONFIG on LP 0"):
        boot("mainline", ram_bytes=GIB)  # no whole gigabyte is left for a TDMR


def test_provenance_says_that_the_host_is_simulated_and_what_is_unchecked(machine: Machine) -> None:
    facts = machine.provenance()

    assert facts["backend"] == "sim"
    assert facts["tdx_module"] == "mainline-host"
    assert facts["tdx_module_exact"] is False
    assert any("TOPOLOGY_ENUM" in what for what in facts["tdx_module_additions"])
