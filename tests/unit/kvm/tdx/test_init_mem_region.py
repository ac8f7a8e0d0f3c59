"""KVM_TDX_INIT_MEM_REGION: checks in the kernel's order, progress, and what each failure leaves behind."""

import ctypes
import errno
import hashlib
import mmap
import signal
from collections.abc import Callable
from typing import TypeAlias

import pytest

from sim_backend.machine import Machine
from tests.unit.kvm.tdx.guest_code import S_BIT, Program
from tests.unit.kvm.tdx.scripted_seam import ScriptedSeam
from tests.unit.kvm.tdx.vmm import LOW_BYTES, MEASURE, PRIVATE, X2APIC, TestTd, UserMemory, cpuid_entry
from uapi_ctypes.errors import KvmError
from uapi_ctypes.kvm_state import KvmCpuid2
from uapi_ctypes.tdx_leaves import SeamcallLeaf as H
from uapi_ctypes.tdx_mainline import KvmTdxInitMemRegion as Region

BUSY = 0x8000_0200 << 32
INVALID = 0xC000_0100 << 32
PAGE = 4096
EHWPOISON = 133
LAST_CALL = 40


@pytest.fixture
def td(td: TestTd) -> TestTd:
    """Return a TD with 2 MiB of private memory at 0 and an initialised vCPU."""
    td.enable_caps().init_vm().add_memory()
    td.create_vcpu()
    return td


@pytest.fixture
def source() -> UserMemory:
    memory = UserMemory(16 * PAGE)
    memory.write(bytes(range(256)) * 256)
    return memory


def add(td: TestTd, region: Region, flags: int = 0) -> int:
    try:
        td.vcpu.tdx_init_mem_region(region, flags)
    except KvmError as error:
        return error.errno or 0
    return 0


def fields(region: Region) -> tuple[int, int, int]:
    return region.source_addr, region.gpa, region.nr_pages


def test_pages_are_added_and_the_region_shows_it(td: TestTd, source: UserMemory) -> None:
    region = Region(source.hva, 0x1000, 3)
    assert add(td, region) == 0
    assert fields(region) == (source.hva + 3 * PAGE, 0x4000, 0)


def test_the_vcpu_must_be_initialised(td: TestTd, source: UserMemory) -> None:
    other = td.create_vcpu(1, init=False)
    with pytest.raises(KvmError) as raised:
        other.tdx_init_mem_region(Region(source.hva, 0, 1))
    assert raised.value.errno == errno.EINVAL


def test_flags_come_before_the_pointer(td: TestTd) -> None:
    with pytest.raises(KvmError) as raised:
        td.vcpu.tdx_command(td.dialect.init_mem_region, 0x10, 2)
    assert raised.value.errno == errno.EINVAL
    with pytest.raises(KvmError) as raised:
        td.vcpu.tdx_command(td.dialect.init_mem_region, 0x10, 1)
    assert raised.value.errno == errno.EFAULT


@pytest.mark.parametrize(
    ("source_offset", "gpa", "nr_pages"),
    [(1, 0, 1), (0, 1, 1), (0, 0, 0), (0, 0x1000, (1 << 52) - 1), (0, S_BIT, 1), (0, S_BIT - PAGE, 2), (0, 0, 1 << 52)],
)
def test_bad_regions_are_einval_and_stay_as_they_were(
    td: TestTd, source: UserMemory, source_offset: int, gpa: int, nr_pages: int
) -> None:
    region = Region(source.hva + source_offset, gpa, nr_pages)
    before = fields(region)
    assert add(td, region) == errno.EINVAL
    assert fields(region) == before
    with pytest.raises(KvmError, match="EINVAL"):  # it is not even written back: that would be EFAULT
        td.vcpu.tdx_command(td.dialect.init_mem_region, td.read_only_copy(region))


def test_a_count_that_loses_its_top_bits_runs_page_by_page_until_something_fails(
    td: TestTd, source: UserMemory
) -> None:
    region = Region(source.hva, LOW_BYTES - PAGE, (1 << 52) + 1)
    assert add(td, region) == errno.EINVAL
    assert fields(region) == (source.hva + PAGE, LOW_BYTES, 1 << 52)


@pytest.mark.parametrize(
    ("machine", "expected"),
    [("7.3", errno.EINVAL), ("7.2", errno.EOPNOTSUPP), ("6.16", errno.EFAULT)],
    indirect=["machine"],
)
def test_source_0_fails_in_each_release_differently(td: TestTd, expected: int) -> None:
    region = Region(0, 0, 1)
    assert add(td, region) == expected


@pytest.mark.parametrize("machine", ["7.2"], indirect=True)
def test_in_7_2_source_0_is_looked_at_after_the_attribute(td: TestTd) -> None:
    td.vm.set_memory_attributes(0, PAGE, 0)
    assert add(td, Region(0, 0, 1)) == errno.EINVAL


def test_a_gpa_without_a_slot_is_einval(td: TestTd, source: UserMemory) -> None:
    assert add(td, Region(source.hva, 0x4000_0000, 1)) == errno.EINVAL


def test_a_slot_without_guest_memfd_is_einval(td: TestTd, source: UserMemory) -> None:
    td.vm.set_user_memory_region2(5, 0x4000_0000, PAGE, source.hva)
    td.vm.set_memory_attributes(0x4000_0000, PAGE, PRIVATE)
    assert add(td, Region(source.hva, 0x4000_0000, 1)) == errno.EINVAL


def test_a_closed_guest_memfd_is_efault(td: TestTd, source: UserMemory) -> None:
    td.gmem1.close()
    assert add(td, Region(source.hva, 0, 1)) == errno.EFAULT


def unreadable_page() -> UserMemory:
    memory = UserMemory(PAGE)
    libc = ctypes.CDLL(None)
    assert libc.mprotect(ctypes.c_void_p(memory.hva), PAGE, 0) == 0
    return memory


def without_slot(td: TestTd, region: Region) -> None:
    td.vm.set_user_memory_region2(1, 0, 0, td.low.hva)


def file_is_gone(td: TestTd, region: Region) -> None:
    td.gmem1.close()


def source_is_unreadable(td: TestTd, region: Region) -> None:
    source = unreadable_page()
    region.source_addr, region.keeps_alive = source.hva, source


def page_is_poisoned(td: TestTd, region: Region) -> None:
    td.ops.vm.gmems[1].poisoned.add(0)


def page_is_shared(td: TestTd, region: Region) -> None:
    td.vm.set_memory_attributes(0, PAGE, 0)


def tables_are_too_deep(td: TestTd, region: Region) -> None:
    table = [cpuid_entry(1, ecx=X2APIC), cpuid_entry(0x80000000, eax=0x80000008)]
    td.vcpu.set_cpuid2(KvmCpuid2.of([*table, cpuid_entry(0x80000008, eax=52 << 16 | 0x3034)]))


Violation: TypeAlias = "tuple[Callable[[TestTd, Region], None], int]"
SLOT: Violation = (without_slot, errno.EINVAL)
GONE: Violation = (file_is_gone, errno.EFAULT)
SOURCE: Violation = (source_is_unreadable, errno.EFAULT)
POISON: Violation = (page_is_poisoned, EHWPOISON)
ATTRIBUTE: Violation = (page_is_shared, errno.EINVAL)
ROOT: Violation = (tables_are_too_deep, errno.EIO)
PER_PAGE = {
    "7.3": [SLOT, GONE, SOURCE, POISON, ATTRIBUTE, ROOT],
    "6.16": [SLOT, GONE, POISON, ATTRIBUTE, SOURCE, ROOT],
}
"""What is checked for every page, in each release's order."""


@pytest.mark.parametrize("first", range(6))
@pytest.mark.parametrize("machine", PER_PAGE, indirect=True)
def test_a_page_that_breaks_several_rules_reports_the_first(td: TestTd, source: UserMemory, first: int) -> None:
    region = Region(source.hva, 0, 1)
    rules = PER_PAGE[td.machine.profile.name][first:]
    for violate, _ in reversed(rules):  # a slot that is gone hides its file, so it goes last
        violate(td, region)
    assert add(td, region) == rules[0][1]


def test_a_source_that_ends_in_the_middle_adds_what_there_is(td: TestTd) -> None:
    memory = UserMemory(4 * PAGE)
    libc = ctypes.CDLL(None)
    assert libc.mprotect(ctypes.c_void_p(memory.hva + 2 * PAGE), 2 * PAGE, 0) == 0
    region = Region(memory.hva, 0, 4)
    assert add(td, region) == errno.EFAULT
    assert fields(region) == (memory.hva + 2 * PAGE, 2 * PAGE, 2)
    assert libc.mprotect(ctypes.c_void_p(memory.hva), 4 * PAGE, mmap.PROT_READ) == 0
    assert add(td, region) == 0


@pytest.mark.parametrize("machine", ["7.3"], indirect=True)
def test_a_page_whose_attribute_is_shared_is_einval(td: TestTd, source: UserMemory) -> None:
    td.vm.set_memory_attributes(PAGE, PAGE, 0)
    region = Region(source.hva, 0, 2)
    assert add(td, region) == errno.EINVAL
    assert region.nr_pages == 1


@pytest.mark.parametrize(("machine", "expected"), [("7.3", errno.EIO), ("6.16", errno.EEXIST)], indirect=["machine"])
def test_a_page_can_be_added_once(td: TestTd, source: UserMemory, expected: int) -> None:
    assert add(td, Region(source.hva, 0, 1)) == 0
    assert add(td, Region(source.hva, 0, 1)) == expected
    assert add(td, Region(source.hva, PAGE, 1)) == 0, "the VM is not bugged"


def test_an_attribute_round_trip_or_a_hole_makes_room_again(td: TestTd, source: UserMemory) -> None:
    assert add(td, Region(source.hva, 0, 2)) == 0
    td.vm.set_memory_attributes(0, PAGE, 0)
    td.vm.set_memory_attributes(0, PAGE, PRIVATE)
    td.gmem1.punch_hole(PAGE, PAGE)
    assert add(td, Region(source.hva, 0, 2)) == 0


@pytest.mark.parametrize(
    ("machine", "expected"), [("7.2", 0), ("6.18", errno.EEXIST), ("6.16", errno.EEXIST)], indirect=["machine"]
)
def test_before_7_0_a_filled_page_is_new_only_after_a_hole(td: TestTd, source: UserMemory, expected: int) -> None:
    assert add(td, Region(source.hva, 0, 1)) == 0
    td.vm.set_memory_attributes(0, PAGE, 0)
    td.vm.set_memory_attributes(0, PAGE, PRIVATE)
    assert add(td, Region(source.hva, 0, 1)) == expected
    td.gmem1.punch_hole(0, PAGE)
    assert add(td, Region(source.hva, 0, 1)) == 0


def test_a_region_that_cannot_be_written_back_is_efault_although_pages_were_added(
    td: TestTd, source: UserMemory
) -> None:
    address = td.read_only_copy(Region(source.hva, 0, 1))
    with pytest.raises(KvmError) as raised:
        td.vcpu.tdx_command(td.dialect.init_mem_region, address)
    assert raised.value.errno == errno.EFAULT
    assert add(td, Region(source.hva, 0, 1)) == errno.EIO, "it is there"


def test_a_vcpu_whose_gpaw_is_not_the_tds_bugs_the_vm_at_the_first_root_load(
    machine: Machine, source: UserMemory
) -> None:
    with TestTd(machine) as td:
        td.enable_caps().init_vm().add_memory()
        vcpu = td.create_vcpu(init=False)
        table = [cpuid_entry(1, ecx=X2APIC), cpuid_entry(0x80000000, eax=0x80000008)]
        vcpu.set_cpuid2(KvmCpuid2.of([*table, cpuid_entry(0x80000008, eax=52 << 16 | 0x3034)]))
        vcpu.tdx_init_vcpu()
        assert add(td, Region(source.hva, 0, 1)) == errno.EIO
        with pytest.raises(KvmError) as raised:
            td.vm.check_extension(66)
        assert raised.value.errno == errno.EIO


class TestModule:
    def test_tables_pages_and_measurements_come_in_order(
        self, seam: ScriptedSeam, td: TestTd, source: UserMemory
    ) -> None:
        seam.calls.clear()
        assert add(td, Region(source.hva, 0x1F_F000, 1), MEASURE) == 0
        assert seam.leaves() == [
            H.TDH_VP_WR,
            *[H.TDH_MEM_SEPT_ADD] * 3,
            H.TDH_MEM_PAGE_ADD,
            *[H.TDH_MR_EXTEND] * 16,
        ]
        assert [call.rcx for call in seam.calls[1:4]] == [3, 2, 1], "level in the low bits, GPA 0"
        assert [call.rcx for call in seam.calls[5:]] == list(range(0x1F_F000, 0x20_0000, 256))

    def test_unmeasured_pages_are_not_extended(self, seam: ScriptedSeam, td: TestTd, source: UserMemory) -> None:
        assert add(td, Region(source.hva, 0, 2)) == 0
        assert H.TDH_MR_EXTEND not in seam.leaves()

    @pytest.mark.parametrize(
        ("machine", "leaf"),
        [("7.3", H.TDH_MEM_PAGE_ADD), ("7.3", H.TDH_MEM_SEPT_ADD), ("6.16", H.TDH_MEM_SEPT_ADD)],
        indirect=["machine"],
    )
    def test_busy_is_retried_until_it_succeeds(
        self, seam: ScriptedSeam, td: TestTd, source: UserMemory, leaf: H
    ) -> None:
        seam.fail(leaf, *[BUSY] * 50)
        assert add(td, Region(source.hva, 0, 1)) == 0

    @pytest.mark.parametrize("leaf", [H.TDH_MEM_PAGE_ADD, H.TDH_MEM_SEPT_ADD])
    def test_a_module_that_stays_busy_is_left_by_a_signal(
        self, seam: ScriptedSeam, td: TestTd, source: UserMemory, leaf: H
    ) -> None:
        previous = signal.signal(signal.SIGUSR1, lambda *_: None)

        def busy(lp: int, regs: list[int]) -> None:
            if regs[0] == leaf and len(seam.calls) < LAST_CALL:
                seam.fail(leaf, BUSY)
            elif regs[0] == leaf:
                signal.raise_signal(signal.SIGUSR1)
                seam.fail(leaf, BUSY)
            seam.execute(lp, regs)

        seam.calls.clear()
        seam.hook = busy
        try:
            region = Region(source.hva, 0, 2)
            before = fields(region)
            assert add(td, region) == errno.EINTR
            assert fields(region) == before
            assert len(seam.calls) >= LAST_CALL
            seam.hook = None
            assert add(td, region) == 0
        finally:
            signal.signal(signal.SIGUSR1, previous)

    @pytest.mark.parametrize("leaf", [H.TDH_MEM_PAGE_ADD, H.TDH_MEM_SEPT_ADD, H.TDH_MR_EXTEND])
    def test_anything_else_is_eio_and_bugs_the_vm(
        self, seam: ScriptedSeam, td: TestTd, source: UserMemory, leaf: H
    ) -> None:
        seam.fail(leaf, INVALID)
        assert add(td, Region(source.hva, 0, 1), MEASURE) == errno.EIO
        assert add(td, Region(source.hva, PAGE, 1), MEASURE) == errno.EIO

    @pytest.mark.parametrize("machine", ["6.16"], indirect=True)
    @pytest.mark.parametrize(
        ("leaf", "status", "expected"),
        [
            (H.TDH_MEM_PAGE_ADD, BUSY, errno.EBUSY),
            (H.TDH_MEM_PAGE_ADD, INVALID, errno.EIO),
            (H.TDH_MR_EXTEND, INVALID, errno.EIO),
        ],
    )
    def test_6_16_does_not_bug_the_vm(
        self, seam: ScriptedSeam, td: TestTd, source: UserMemory, leaf: H, status: int, expected: int
    ) -> None:
        seam.fail(leaf, status)
        assert add(td, Region(source.hva, 0, 1), MEASURE) == expected
        assert add(td, Region(source.hva, PAGE, 1), MEASURE) == 0


class TestMeasurement:
    def test_the_batch_measures_what_single_leaves_measure(self, machine: Machine, source: UserMemory) -> None:
        expected = hashlib.sha384()
        for page in range(2):
            gpa = page * PAGE
            expected.update(b"MEM.PAGE.ADD".ljust(16, b"\0") + gpa.to_bytes(8, "little").ljust(112, b"\0"))
            for chunk in range(0, PAGE, 256):
                expected.update(b"MR.EXTEND".ljust(16, b"\0") + (gpa + chunk).to_bytes(8, "little").ljust(112, b"\0"))
                expected.update(source.read(page * PAGE + chunk, 256))
        with TestTd(machine) as td:
            td.enable_caps().init_vm().add_memory()
            td.create_vcpu()
            assert add(td, Region(source.hva, 0, 2), MEASURE) == 0
            td.finalize()
            assert machine.module is not None
            (tdr,) = machine.module.tdrs.values()
            assert tdr.tdcs.mrtd == expected.digest()


def test_a_signal_is_eintr_and_the_call_can_be_reissued(seam: ScriptedSeam, td: TestTd, source: UserMemory) -> None:
    previous = signal.signal(signal.SIGUSR1, lambda *_: None)
    issue = seam.execute
    count = 0

    def spy(lp: int, regs: list[int]) -> None:
        nonlocal count
        if regs[0] == H.TDH_MEM_PAGE_ADD:
            count += 1
            if count == 2:
                signal.raise_signal(signal.SIGUSR1)
        issue(lp, regs)

    seam.hook = spy
    try:
        region = Region(source.hva, 0, 4)
        assert add(td, region) == errno.EINTR
        assert fields(region) == (source.hva + 2 * PAGE, 2 * PAGE, 2)
        assert add(td, region) == 0
    finally:
        seam.hook = None
        signal.signal(signal.SIGUSR1, previous)


def test_a_guest_sees_the_contents_and_the_source_is_not_retained(machine: Machine) -> None:
    with TestTd(machine) as td:
        td.enable_caps().init_vm().add_memory()
        td.create_vcpu()
        memory = UserMemory(PAGE)
        memory.write(b"initial!")
        assert add(td, Region(memory.hva, 0x3000, 1)) == 0
        memory.write(b"changed!")
        td.add_image(Program().load(3, 0x3000).report(3).done()).finalize()
        (value,) = td.run_to_end()
        assert value.to_bytes(8, "little") == b"initial!"
