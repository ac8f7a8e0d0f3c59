"""Memory slots of a TD: what KVM_SET_USER_MEMORY_REGION2 checks, in its order."""

import errno
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from sim_backend.machine import boot
from tests.unit.kvm.tdx.guest_code import S_BIT
from tests.unit.kvm.tdx.vmm import GUEST_MEMFD, TestTd, UserMemory, error_of
from uapi_ctypes.guest_memfd import GuestMemfd

PAGE = 4096
LOG_DIRTY, READONLY = 1, 2
SLOTS = 32764
U64 = 1 << 64


@dataclass
class Attempt:
    """One slot with guest_memfd that is about to be made."""

    td: TestTd
    gmem: GuestMemfd
    slot: int = 0
    gpa: int = 0x40_0000
    size: int = 2 * PAGE
    hva: int = 0
    flags: int = GUEST_MEMFD
    offset: int = 0
    fd: int = -1

    def make(self) -> int:
        """Issue it and return the errno."""
        td = self.td
        hva = self.hva or td.low.hva
        fd = self.gmem.fd if self.fd < 0 else self.fd
        return error_of(
            lambda: td.vm.set_user_memory_region2(
                self.slot, self.gpa, self.size, hva, self.flags, guest_memfd=fd, guest_memfd_offset=self.offset
            )
        )


@pytest.fixture
def one(td: TestTd) -> Attempt:
    td.init_vm()
    return Attempt(td, td.vm.create_guest_memfd(4 * PAGE))


def slot_number(a: Attempt) -> None:
    a.slot = SLOTS


def flags(a: Attempt) -> None:
    a.flags |= LOG_DIRTY


def alignment(a: Attempt) -> None:
    a.hva = a.td.low.hva + 1


def overlap(a: Attempt) -> None:
    a.td.vm.set_user_memory_region2(7, a.gpa, PAGE, a.td.low.hva)


def closed_file(a: Attempt) -> None:
    a.fd = 1000


def past_the_end(a: Attempt) -> None:
    a.offset = 3 * PAGE


def bound_already(a: Attempt) -> None:
    other = Attempt(a.td, a.gmem, slot=9, gpa=0x80_0000, offset=PAGE)
    assert other.make() == 0


def at_the_s_bit(a: Attempt) -> None:
    a.gpa = S_BIT


# A slot that overlaps another one is EEXIST before its file is looked up; what the file is bound to comes last.
ORDER: list[tuple[Callable[[Attempt], None], int]] = [
    (slot_number, errno.EINVAL),
    (flags, errno.EINVAL),
    (alignment, errno.EINVAL),
    (overlap, errno.EEXIST),
    (closed_file, errno.EBADF),
    (past_the_end, errno.EINVAL),
    (bound_already, errno.EEXIST),
]
IDS = [violate.__name__ for violate, _ in ORDER]


def test_the_attempt_itself_succeeds(one: Attempt) -> None:
    assert one.make() == 0


@pytest.mark.parametrize("first", range(len(ORDER)), ids=IDS)
def test_a_slot_that_breaks_several_rules_reports_the_first(one: Attempt, first: int) -> None:
    for violate, _ in reversed(ORDER[first:]):
        violate(one)
    assert one.make() == ORDER[first][1]


@pytest.mark.parametrize(
    ("machine", "expected"),
    [("7.3", errno.EINVAL), ("7.2", errno.EEXIST), ("6.16", errno.EINVAL)],
    indirect=["machine"],
)
def test_the_s_bit_comes_before_a_second_binding_since_7_3(one: Attempt, expected: int) -> None:
    """6.16 answers EINVAL to a second binding, so nobody can tell."""
    bound_already(one)
    at_the_s_bit(one)
    assert one.make() == expected


@pytest.mark.parametrize("machine", ["6.16"], indirect=True)
def test_a_second_binding_is_einval_in_6_16(one: Attempt) -> None:
    bound_already(one)
    assert one.make() == errno.EINVAL


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("gpa", 1),
        ("size", PAGE + 1),
        ("offset", 1),
        ("offset", U64 - PAGE),
        ("gpa", U64 - PAGE),
        ("hva", (1 << 63)),
        ("slot", 1 << 16),
        ("flags", GUEST_MEMFD | READONLY),
        ("flags", 8),
        ("flags", READONLY),
    ],
)
def test_malformed(one: Attempt, field: str, value: int) -> None:
    setattr(one, field, value)
    assert one.make() == errno.EINVAL


def test_more_than_2_to_the_31_pages_are_refused(one: Attempt) -> None:
    one.flags, one.hva, one.size = 0, PAGE, (1 << 31) * PAGE
    assert one.make() == errno.EINVAL


def test_the_last_page_decides_about_the_s_bit_and_only_after_init_vm(td: TestTd) -> None:
    assert Attempt(td, td.vm.create_guest_memfd(4 * PAGE), gpa=S_BIT | 0x10_0000).make() == 0
    td.init_vm()
    late = Attempt(td, td.vm.create_guest_memfd(4 * PAGE), slot=1, gpa=S_BIT - PAGE)
    assert late.make() == errno.EINVAL
    late.gpa = 2 * S_BIT - PAGE
    assert late.make() == 0, "its first page has the S-bit, its last has not"


def test_above_the_physical_limit_is_einval_even_before_init_vm() -> None:
    machine = boot("7.3", host_phys_bits=46)
    with TestTd(machine) as td:
        gmem = td.vm.create_guest_memfd(4 * PAGE)
        assert Attempt(td, gmem, gpa=(1 << 46) - PAGE).make() == errno.EINVAL
        assert Attempt(td, gmem, gpa=(1 << 46) - 2 * PAGE).make() == 0
    machine.shutdown()


class TestExistingSlots:
    @pytest.fixture
    def plain(self, one: Attempt) -> Attempt:
        one.flags = 0
        assert one.make() == 0
        return one

    def test_the_same_again_is_0(self, plain: Attempt) -> None:
        assert plain.make() == 0

    def test_it_may_move_and_its_logging_may_change(self, plain: Attempt) -> None:
        plain.gpa = 0x100_0000
        assert plain.make() == 0
        plain.flags = LOG_DIRTY
        assert plain.make() == 0

    @pytest.mark.parametrize("field", ["size", "hva", "flags"])
    def test_its_memory_may_not_change(self, plain: Attempt, field: str) -> None:
        changed = {"size": PAGE, "hva": plain.td.low.hva + PAGE, "flags": GUEST_MEMFD}
        setattr(plain, field, changed[field])
        assert plain.make() == errno.EINVAL

    def test_a_move_onto_another_slot_is_eexist(self, plain: Attempt) -> None:
        plain.td.vm.set_user_memory_region2(5, 0x100_0000, PAGE, plain.td.low.hva)
        plain.gpa = 0x100_0000
        assert plain.make() == errno.EEXIST

    def test_a_gmem_slot_cannot_even_be_set_unchanged(self, one: Attempt) -> None:
        assert one.make() == 0
        assert one.make() == errno.EINVAL
        one.flags = 0
        assert one.make() == errno.EINVAL

    def test_size_0_deletes_and_a_slot_that_is_not_there_is_einval(self, one: Attempt) -> None:
        assert one.make() == 0
        one.size = 0
        assert one.make() == 0
        assert one.make() == errno.EINVAL


@pytest.fixture
def pipe() -> Iterator[int]:
    read, write = os.pipe()
    yield read
    os.close(read)
    os.close(write)


def test_a_file_that_is_no_guest_memfd_is_einval(one: Attempt, pipe: int) -> None:
    one.fd = pipe
    assert one.make() == errno.EINVAL


def test_the_older_ioctl_knows_no_guest_memfd(td: TestTd) -> None:
    assert error_of(lambda: td.vm.set_user_memory_region(0, 0, PAGE, td.low.hva, GUEST_MEMFD)) == errno.EINVAL
    assert error_of(lambda: td.vm.set_user_memory_region(0, 0, PAGE, td.low.hva)) == 0


def test_an_unreadable_argument_is_efault(td: TestTd) -> None:
    assert error_of(lambda: td.vm.ioctl(0x40A0AE49, 0x10)) == errno.EFAULT


class TestDirtyLog:
    def test_bad_slots_are_einval_and_slots_without_a_log_enoent(self, td: TestTd) -> None:
        memory = UserMemory(PAGE)
        td.vm.set_user_memory_region2(3, 0, PAGE, td.low.hva)
        assert error_of(lambda: td.vm.get_dirty_log(SLOTS, memory.hva)) == errno.EINVAL
        assert error_of(lambda: td.vm.get_dirty_log(1 << 16 | 3, memory.hva)) == errno.EINVAL
        assert error_of(lambda: td.vm.get_dirty_log(4, memory.hva)) == errno.ENOENT
        assert error_of(lambda: td.vm.get_dirty_log(3, memory.hva)) == errno.ENOENT
        td.vm.set_user_memory_region2(3, 0, PAGE, td.low.hva, LOG_DIRTY)
        assert error_of(lambda: td.vm.get_dirty_log(3, memory.hva)) == 0
