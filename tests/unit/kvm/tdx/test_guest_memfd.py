"""guest_memfd of a TD: which files there are, what system calls on them do, and what the guest's pages come from."""

import ctypes
import errno
import fcntl
import os
import signal

import pytest

from sim_backend.file_calls import MAP_PRIVATE, FileCalls
from sim_backend.kvm.host_pages import HostPages
from tests.unit.kvm.tdx.guest_code import RBX, SHARED_ALIAS, Program
from tests.unit.kvm.tdx.vmm import GUEST_MEMFD, PRIVATE, TestTd, error_of
from uapi_ctypes.guest_memfd import GuestMemfd

PAGE = 4096
MMAP, INIT_SHARED = 1, 2
KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE = 1, 2, 0x10
MAP_SHARED = 1
READ_WRITE = 3
S64_MAX = (1 << 63) - 1


@pytest.fixture
def gmem(td: TestTd) -> GuestMemfd:
    return td.vm.create_guest_memfd(4 * PAGE)


class TestCreation:
    @pytest.mark.parametrize(
        ("size", "flags"), [(0, 0), (PAGE + 1, 0), (1 << 63, 0), (PAGE, INIT_SHARED), (PAGE, 3), (PAGE, 4)]
    )
    def test_malformed(self, td: TestTd, size: int, flags: int) -> None:
        assert error_of(lambda: td.vm.create_guest_memfd(size, flags)) == errno.EINVAL

    @pytest.mark.parametrize("machine", ["6.16"], indirect=True)
    def test_6_16_knows_no_flag(self, td: TestTd) -> None:
        assert error_of(lambda: td.vm.create_guest_memfd(PAGE, MMAP)) == errno.EINVAL

    def test_reserved_words_are_not_looked_at(self, td: TestTd) -> None:
        argument = (ctypes.c_uint64 * 8)(PAGE, 0, *[0xFFFF_FFFF_FFFF_FFFF] * 6)
        td.machine.kernel().close(td.vm.ioctl(0xC040AED4, argument))

    def test_alone_of_all_descriptors_it_survives_an_exec(self, td: TestTd, gmem: GuestMemfd) -> None:
        td.enable_caps().init_vm()
        vcpu = td.create_vcpu(init=False)
        flags = [fcntl.fcntl(each.fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC for each in (td.vm, vcpu, gmem)]
        assert flags == [fcntl.FD_CLOEXEC, fcntl.FD_CLOEXEC, 0]

    def test_it_works_in_every_state_of_the_td(self, td: TestTd) -> None:
        td.vm.create_guest_memfd(PAGE)
        td.build(Program().done())
        td.vm.create_guest_memfd(PAGE)


class TestFallocate:
    @pytest.mark.parametrize(
        ("mode", "offset", "length", "expected"),
        [
            (KEEP_SIZE, 0, PAGE, 0),
            (KEEP_SIZE, 0, 4 * PAGE, 0),
            (KEEP_SIZE | PUNCH_HOLE, 0, PAGE, 0),
            (KEEP_SIZE | PUNCH_HOLE, 64 * PAGE, PAGE, 0),
            (KEEP_SIZE, 4 * PAGE, PAGE, errno.EINVAL),
            (KEEP_SIZE, 0, 5 * PAGE, errno.EINVAL),
            (KEEP_SIZE, -PAGE, PAGE, errno.EINVAL),
            (KEEP_SIZE, 0, 0, errno.EINVAL),
            (KEEP_SIZE, 0, -PAGE, errno.EINVAL),
            (KEEP_SIZE, 1, PAGE, errno.EINVAL),
            (KEEP_SIZE, 0, PAGE + 1, errno.EINVAL),
            (KEEP_SIZE | PUNCH_HOLE, 1, PAGE, errno.EINVAL),
            (0, 0, PAGE, errno.EOPNOTSUPP),
            (PUNCH_HOLE, 0, PAGE, errno.EOPNOTSUPP),
            (KEEP_SIZE | ZERO_RANGE, 0, PAGE, errno.EOPNOTSUPP),
            (KEEP_SIZE | 0x4000, 0, PAGE, errno.EOPNOTSUPP),
            (0, 0, 0, errno.EINVAL),
            (0, 1, PAGE, errno.EOPNOTSUPP),
        ],
    )
    def test_its_checks(self, gmem: GuestMemfd, mode: int, offset: int, length: int, expected: int) -> None:
        assert error_of(lambda: gmem.fallocate(mode, offset, length)) == expected

    def test_pages_are_taken_from_the_host_and_given_back(self, td: TestTd, gmem: GuestMemfd) -> None:
        pages: HostPages = td.machine.pages
        before = pages.in_use
        gmem.fallocate(KEEP_SIZE, 0, 3 * PAGE)
        assert pages.in_use == before + 3
        gmem.fallocate(KEEP_SIZE | PUNCH_HOLE, PAGE, PAGE)
        assert pages.in_use == before + 2

    def test_an_allocation_without_memory_is_enomem(self, td: TestTd, gmem: GuestMemfd) -> None:
        pages = td.machine.pages
        pages.limit_pages = pages.in_use + 1
        try:
            assert error_of(lambda: gmem.fallocate(KEEP_SIZE, 0, 2 * PAGE)) == errno.ENOMEM
        finally:
            pages.limit_pages = pages.total_pages

    def test_a_signal_ends_an_allocation(self, td: TestTd) -> None:
        large = td.vm.create_guest_memfd(1 << 30)
        previous = signal.signal(signal.SIGALRM, lambda *_: None)
        signal.setitimer(signal.ITIMER_REAL, 0.01)
        try:
            assert error_of(lambda: large.fallocate(KEEP_SIZE, 0, 1 << 30)) == errno.EINTR
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, previous)
        assert 0 < len(td.ops.vm.gmems[-1].private_pages()) < 1 << 18


class TestOtherCalls:
    @pytest.fixture
    def calls(self, td: TestTd) -> FileCalls:
        return FileCalls(td.vm.kernel)

    def test_it_cannot_be_read_written_or_truncated(self, calls: FileCalls, gmem: GuestMemfd) -> None:
        assert error_of(lambda: calls.read(gmem.fd, 8)) == errno.EINVAL
        assert error_of(lambda: calls.write(gmem.fd, b"x")) == errno.EINVAL
        for length in (0, PAGE, 4 * PAGE):
            assert error_of(lambda length=length: calls.ftruncate(gmem.fd, length)) == errno.EINVAL  # type: ignore[misc]

    def test_without_the_flag_it_cannot_be_mapped(self, calls: FileCalls, gmem: GuestMemfd) -> None:
        assert error_of(lambda: gmem.mmap(PAGE)) == errno.ENODEV
        for kind in (MAP_SHARED, MAP_PRIVATE):
            assert error_of(lambda kind=kind: calls.mmap(gmem.fd, PAGE, READ_WRITE, kind, 0)) == errno.ENODEV  # type: ignore[misc]

    def test_with_the_flag_only_a_shared_mapping_is_made(self, td: TestTd, calls: FileCalls) -> None:
        gmem = td.vm.create_guest_memfd(PAGE, MMAP)
        assert error_of(lambda: calls.mmap(gmem.fd, PAGE, READ_WRITE, MAP_PRIVATE, 0)) == errno.EINVAL
        calls.mmap(gmem.fd, PAGE, READ_WRITE, MAP_SHARED, 0).close()

    def test_every_touch_of_a_mapping_is_sigbus(self, td: TestTd) -> None:
        gmem = td.vm.create_guest_memfd(PAGE, MMAP)
        gmem.fallocate(KEEP_SIZE, 0, PAGE)
        mapping = gmem.mmap(PAGE)
        read, write = os.pipe()
        try:
            # A system call is told by an errno what would be a signal for us.
            libc = ctypes.CDLL(None, use_errno=True)
            assert libc.write(write, ctypes.c_void_p(mapping.address), 1) == -1
            assert ctypes.get_errno() == errno.EFAULT
        finally:
            os.close(read)
            os.close(write)
            mapping.close()


def test_a_mappable_file_backs_the_guests_shared_pages_as_well(td: TestTd) -> None:
    td.enable_caps().init_vm().add_memory()
    td.vm.set_user_memory_region2(1, 0, 0, td.low.hva)
    gmem = td.vm.create_guest_memfd(0x20_0000, MMAP)
    td.vm.set_user_memory_region2(1, 0, 0x20_0000, td.low.hva, GUEST_MEMFD, guest_memfd=gmem.fd)
    td.create_vcpu()
    td.vm.set_memory_attributes(0x7000, PAGE, 0)
    program = Program().store(SHARED_ALIAS + 0x7000, 0x77).load(RBX, SHARED_ALIAS + 0x7000).report(RBX)
    td.add_image(program.done()).finalize()
    assert td.run_to_end() == [0x77]
    assert td.low.read(0x7000, 8) == bytes(8), "the slot's user memory is not used"
    assert 7 in td.ops.vm.gmems[-1].private_pages()


def test_user_memory_that_goes_away_does_not_touch_private_pages(td: TestTd) -> None:
    """An mmu notifier is about shared mappings only."""
    program = Program().tdcall(6, rcx=0x7000).store(0x7000, 0x1234).load(RBX, SHARED_ALIAS + 0x9000).out(0x40, 1)
    program.load(RBX, 0x7000).report(RBX).load(RBX, SHARED_ALIAS + 0x9000).done()
    td.build(program)
    td.vm.set_memory_attributes(0x9000, PAGE, 0)
    td.run()
    td.low.protect(0, 0x20_0000)
    assert error_of(td.run) == errno.EFAULT
    assert td.reported == [0x1234]
    td.low.protect(0, 0x20_0000, writable=True)
    td.vm.set_memory_attributes(0x9000, PAGE, PRIVATE)
