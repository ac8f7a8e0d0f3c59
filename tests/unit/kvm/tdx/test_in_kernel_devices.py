"""ioeventfds and coalesced zones: a TD's TDVMCALLs reach them before they become exits."""

import os
import struct
from collections.abc import Iterator

import pytest

from tests.unit.kvm.tdx.guest_code import R10, R11, S_BIT, Program
from tests.unit.kvm.tdx.vmm import TestTd
from uapi_ctypes.kvm_run import KvmExit

IO, MMIO = 30, 48
DATAMATCH, PIO = 1, 2
GPA = 0x4000_0000
COALESCED_RING = 8192

pytestmark = pytest.mark.parametrize("machine", ["7.3", "v17"], indirect=True)


@pytest.fixture
def event() -> Iterator[int]:
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    yield fd
    os.close(fd)


def signals(fd: int) -> int:
    """Return how often the eventfd was signalled since the last look."""
    try:
        return os.eventfd_read(fd)
    except BlockingIOError:
        return 0


def write(leaf: int, address: int, size: int, value: int) -> Program:
    return Program().vmcall(leaf, size, 1, address, value).report(R10, R11).done()


def test_a_port_write_that_matches_signals_and_does_not_exit(td: TestTd, event: int) -> None:
    td.vm.ioeventfd(event, 0x510, 2, PIO | DATAMATCH, 7)
    td.build(write(IO, 0x510, 2, 0xABCD_0007))
    assert td.run_to_end() == [0, IO]
    assert signals(event) == 1


@pytest.mark.parametrize(("port", "size", "value"), [(0x511, 2, 7), (0x510, 4, 7), (0x510, 2, 8)])
def test_a_port_write_that_does_not_match_exits(td: TestTd, event: int, port: int, size: int, value: int) -> None:
    td.vm.ioeventfd(event, 0x510, 2, PIO | DATAMATCH, 7)
    td.build(write(IO, port, size, value))
    assert td.run() == KvmExit.KVM_EXIT_IO
    assert td.vcpu.kvm_run.io.port == port
    assert signals(event) == 0


def test_a_port_read_exits_all_the_same(td: TestTd, event: int) -> None:
    td.vm.ioeventfd(event, 0x510, 2, PIO)
    td.build(Program().vmcall(IO, 2, 0, 0x510).done())
    assert td.run() == KvmExit.KVM_EXIT_IO
    assert td.vcpu.kvm_run.io.direction == 0
    assert signals(event) == 0


def test_mmio_is_matched_without_the_s_bit(td: TestTd, event: int) -> None:
    td.vm.ioeventfd(event, GPA, 4)
    td.build(write(MMIO, GPA | S_BIT, 4, 1))
    assert td.run_to_end() == [0, MMIO]
    assert signals(event) == 1


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_a_zero_length_ioeventfd_takes_a_write_of_any_size(td: TestTd, event: int, size: int) -> None:
    td.vm.ioeventfd(event, GPA, 0)
    td.build(write(MMIO, GPA | S_BIT, size, 1))
    assert td.run_to_end() == [0, MMIO]
    assert signals(event) == 1


def test_a_zero_length_ioeventfd_comes_first(td: TestTd, event: int) -> None:
    """Two that would answer the same write exclude each other, so its rival is a coalesced zone."""
    td.vm.register_coalesced_mmio(GPA, 0x1000)
    td.vm.ioeventfd(event, GPA, 0)
    td.build(write(MMIO, GPA | S_BIT, 4, 1))
    td.run_to_end()
    assert signals(event) == 1
    assert td.vcpu.run_area.memory[COALESCED_RING : COALESCED_RING + 8] == bytes(8)


@pytest.mark.parametrize(("leaf", "address"), [(MMIO, GPA + 8), (IO, 0x608)])
def test_a_coalesced_write_is_queued(td: TestTd, leaf: int, address: int) -> None:
    td.vm.register_coalesced_mmio(address - 8, 16, int(leaf == IO))
    td.build(write(leaf, address | S_BIT if leaf == MMIO else address, 4, 0x11223344))
    assert td.run_to_end() == [0, leaf]
    ring = td.vcpu.run_area.memory
    first, last = struct.unpack_from("<II", ring, COALESCED_RING)
    assert (first, last) == (0, 1)
    entry = struct.unpack_from("<QII8s", ring, COALESCED_RING + 8)
    assert entry == (address, 4, int(leaf == IO), bytes.fromhex("4433221100000000"))
