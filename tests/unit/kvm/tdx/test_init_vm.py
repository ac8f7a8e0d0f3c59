"""KVM_TDX_INIT_VM: one function breaks one check of the kernel, in the kernel's order."""

import ctypes
import errno
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from sim_backend.kvm.tdx.sysinfo import TdxUnavailable
from sim_backend.machine import Machine, boot
from tests.unit.kvm.tdx.scripted_seam import ScriptedSeam
from tests.unit.kvm.tdx.vmm import GPAW48, TestTd, cpuid_entry
from uapi_ctypes.errors import KvmError
from uapi_ctypes.tdx_leaves import SeamcallLeaf as H
from uapi_ctypes.tdx_mainline import KvmTdxCmd

MEMORY_ENCRYPT_OP = 0xC008AEBA
INIT_VM = 1
BUSY = 0x8000_0200 << 32
NO_ENTROPY = 0x8000_0203 << 32
INVALID = 0xC000_0100 << 32
BUILDING = (H.TDH_MNG_CREATE, H.TDH_MNG_KEY_CONFIG, H.TDH_MNG_ADDCX, H.TDH_MNG_INIT)


@dataclass
class Attempt:
    """One KVM_TDX_INIT_VM that is about to be made."""

    td: TestTd
    init: Any
    cmd: KvmTdxCmd

    def make(self) -> int:
        """Issue it and return the errno, 0 for success."""
        try:
            self.td.vm.ioctl(MEMORY_ENCRYPT_OP, self.cmd)
        except KvmError as error:
            return error.errno or 0
        return 0


def attempt(td: TestTd) -> Attempt:
    entries = [cpuid_entry(0x8000_0008, eax=GPAW48), cpuid_entry(7, 0, 1), *[cpuid_entry(0x0) for _ in range(2)]]
    init = td.init_vm_argument(entries=entries)
    init.count = 2
    return Attempt(td, init, KvmTdxCmd(INIT_VM, 0, ctypes.addressof(init)))


def flags(a: Attempt) -> None:
    a.cmd.flags = 1


def unreadable_count(a: Attempt) -> None:
    a.cmd.data = 0x10


def too_many_entries(a: Attempt) -> None:
    a.init.count = 257


def reserved_word(a: Attempt) -> None:
    a.init.reserved[11] = 1


def padding(a: Attempt) -> None:
    a.init.cpuid.padding = 1


def unsupported_attribute(a: Attempt) -> None:
    a.init.attributes = 1


def unsupported_xfam(a: Attempt) -> None:
    a.init.xfam |= 1 << 15


def no_physical_address_size(a: Attempt) -> None:
    a.init.entries[0].function = 0x1234


def entry_that_configures_nothing(a: Attempt) -> None:
    a.init.entries[1].function = 0x5555


PRECONDITIONS: list[tuple[Callable[[Attempt], None], int]] = [
    (flags, errno.EINVAL),
    (unreadable_count, errno.EFAULT),
    (too_many_entries, errno.E2BIG),
    (reserved_word, errno.EINVAL),
    (padding, errno.EINVAL),
    (unsupported_attribute, errno.EINVAL),
    (unsupported_xfam, errno.EINVAL),
    (no_physical_address_size, errno.EINVAL),
    (entry_that_configures_nothing, errno.EINVAL),
]
IDS = [violate.__name__ for violate, _ in PRECONDITIONS]


def test_the_attempt_itself_succeeds(td: TestTd) -> None:
    assert attempt(td).make() == 0


@pytest.mark.parametrize(("violate", "expected"), PRECONDITIONS, ids=IDS)
def test_refuses_and_a_retry_is_legal(
    td: TestTd, violate: Callable[[Attempt], None], expected: int, machine: Machine
) -> None:
    broken = attempt(td)
    violate(broken)
    free = machine.free_hkids
    assert broken.make() == expected
    assert broken.cmd.hw_error == 0
    assert machine.free_hkids == free
    assert attempt(td).make() == 0


@pytest.mark.parametrize("first", range(len(PRECONDITIONS)), ids=IDS)
def test_reports_the_first_violated_precondition(td: TestTd, first: int) -> None:
    broken = attempt(td)
    # An unreadable structure hides everything that is wrong inside it, so it is broken last.
    for violate, _ in sorted(PRECONDITIONS[first:], key=lambda pair: pair[0] is unreadable_count):
        violate(broken)
    assert broken.make() == PRECONDITIONS[first][1]


def test_a_second_time_is_einval_before_flags(td: TestTd) -> None:
    assert attempt(td).make() == 0
    again = attempt(td)
    again.cmd.data = 0x10
    assert again.make() == errno.EINVAL


@pytest.mark.parametrize(
    ("gpaw", "expected"), [(0, errno.EINVAL), (47, errno.EINVAL), (48, 0), (52, 0), (57, errno.EINVAL)]
)
def test_the_guest_physical_size_is_48_or_52_bits(td: TestTd, gpaw: int, expected: int) -> None:
    assert td.machine.profile.five_level_ept
    one = attempt(td)
    one.init.entries[0].eax = gpaw << 16
    assert one.make() == expected


def test_a_host_without_5_level_ept_has_no_52_bit_tds() -> None:
    machine = boot("7.3", five_level_ept=False)
    with TestTd(machine) as td:
        one = attempt(td)
        one.init.entries[0].eax = 52 << 16
        assert one.make() == errno.EINVAL
        assert attempt(td).make() == 0
    machine.shutdown()


def test_a_count_that_changes_between_the_two_reads_is_einval(td: TestTd) -> None:
    one = attempt(td)
    mm = td.ops.vm.mm
    read = mm.read

    def read_and_change(address: int, length: int) -> bytes:
        data = read(address, length)
        if address == one.cmd.data + 256:
            one.init.count = 1
        return data

    mm.read = read_and_change  # type: ignore[method-assign]
    try:
        assert one.make() == errno.EINVAL
    finally:
        del mm.read
    assert attempt(td).make() == 0


def test_mainline_needs_a_module_with_topology_enumeration() -> None:
    """The published 1.5.01 has none, so no real machine runs that kernel on it."""
    with pytest.raises(TdxUnavailable, match="TOPOLOGY_ENUM"):
        boot("7.3", tdx_module="1.5.01")


def test_mainline_needs_a_host_that_supports_what_the_module_insists_on() -> None:
    with pytest.raises(TdxUnavailable, match="XFAM"):
        boot("7.3", xcomp_guest_supported=0)


@pytest.mark.parametrize(("ebx", "ecx"), [(1 << 4, 0), (1 << 11, 0), (0, 1 << 5)])
def test_tsx_and_waitpkg_are_refused(td: TestTd, ebx: int, ecx: int) -> None:
    one = attempt(td)
    one.init.entries[1].ebx, one.init.entries[1].ecx = ebx, ecx
    assert one.make() == errno.EINVAL


class TestEntriesWithoutSignificantIndex:
    def make(self, td: TestTd, *entries: Any) -> int:
        init = td.init_vm_argument(entries=[cpuid_entry(0x8000_0008, eax=GPAW48), *entries])
        return Attempt(td, init, KvmTdxCmd(INIT_VM, 0, ctypes.addressof(init))).make()

    def test_one_that_matches_every_sub_leaf_counts_once_for_each(self, td: TestTd) -> None:
        assert self.make(td, cpuid_entry(4)) == errno.EINVAL

    def test_as_many_as_there_are_sub_leaves_pass_and_all_get_the_values_of_the_first(
        self, td: TestTd, seam: ScriptedSeam
    ) -> None:
        seen = td_params_of(td, seam)
        configs = td.ops.host.sysinfo.cpuid_configs
        positions = [number for number, config in enumerate(configs) if config.leaf == 4]
        assert len(positions) > 1
        given = [cpuid_entry(4, index, eax=0x100 * (index + 1)) for index in range(len(positions))]
        assert self.make(td, *given) == 0
        for position in positions:
            assert cpuid_value(seen[0], position) == (0x100, 0, 0, 0)

    def test_one_more_or_one_less_than_there_are_sub_leaves_is_refused(self, td: TestTd) -> None:
        leaves = sum(config.leaf == 4 for config in td.ops.host.sysinfo.cpuid_configs)
        for number in (leaves - 1, leaves + 1):
            assert self.make(td, *[cpuid_entry(4)] * number) == errno.EINVAL

    def test_a_duplicate_is_refused(self, td: TestTd) -> None:
        assert self.make(td, cpuid_entry(7, 0, 1), cpuid_entry(7, 0, 1)) == errno.EINVAL

    def test_a_sub_leaf_that_is_not_configurable_is_refused(self, td: TestTd) -> None:
        assert self.make(td, cpuid_entry(7, 9, 1)) == errno.EINVAL


def test_value_bits_that_are_not_configurable_are_for_the_module_to_refuse(td: TestTd) -> None:
    one = attempt(td)
    one.init.entries[1].edx = 1 << 31
    assert one.make() == errno.EINVAL
    assert one.cmd.hw_error >> 32 == 0xC0000100


def td_params_of(td: TestTd, seam: ScriptedSeam) -> list[bytes]:
    """Return a list that the TD_PARAMS of every TDH.MNG.INIT to come will be added to."""
    seen: list[bytes] = []

    def spy(lp: int, regs: list[int]) -> None:
        if regs[0] == H.TDH_MNG_INIT:
            seen.append(td.machine.memory.read(regs[2], 1024))
        seam.execute(lp, regs)

    seam.hook = spy
    return seen


def cpuid_value(params: bytes, position: int) -> tuple[int, ...]:
    """Return EAX, EBX, ECX and EDX of a leaf in TD_PARAMS, by its position among the configurable ones."""
    return struct.unpack_from("<4I", params, 256 + 16 * position)


def test_a_leaf_that_is_left_out_is_all_zero_and_the_address_width_is_taken_out(td: TestTd, seam: ScriptedSeam) -> None:
    seen = td_params_of(td, seam)
    entries = [cpuid_entry(0x8000_0008, eax=GPAW48), cpuid_entry(1, eax=0x806F8)]
    td.vm.tdx_init_vm(td.init_vm_argument(entries=entries))
    for position, config in enumerate(td.ops.host.sysinfo.cpuid_configs):
        expected = (0x806F8, 0, 0, 0) if config.leaf == 1 else (0, 0, 0, 0)
        assert cpuid_value(seen[0], position) == expected


def test_52_bit_guests_get_5_levels_and_an_s_bit_at_51(td: TestTd, seam: ScriptedSeam) -> None:
    seen = td_params_of(td, seam)
    td.vm.tdx_init_vm(td.init_vm_argument(entries=[cpuid_entry(0x8000_0008, eax=52 << 16)]))
    assert int.from_bytes(seen[0][24:32], "little") == 0x26
    assert int.from_bytes(seen[0][32:40], "little") == 1 << 2 | 1 << 0, "NO_RBP_MOD, MAX_GPAW"
    with pytest.raises(KvmError) as raised:
        td.vm.set_user_memory_region2(0, 1 << 51, 4096, td.low.hva)
    assert raised.value.errno == errno.EINVAL
    td.vm.set_user_memory_region2(0, 1 << 47, 4096, td.low.hva)


def test_bits_that_the_module_insists_on_are_added_silently(td: TestTd, seam: ScriptedSeam) -> None:
    seen = td_params_of(td, seam)
    info = td.ops.host.sysinfo
    assert info.xfam_fixed1
    td.vm.tdx_init_vm(td.init_vm_argument(xfam=0))
    assert int.from_bytes(seen[0][8:16], "little") == info.xfam_fixed1
    assert int.from_bytes(seen[0][0:8], "little") == info.attributes_fixed1


def test_attributes_xfam_and_measured_owner_reach_the_module(td: TestTd, seam: ScriptedSeam) -> None:
    seen = td_params_of(td, seam)
    td.vm.set_tsc_khz(1_500_000)
    init = td.init_vm_argument(attributes=1 << 28, xfam=7)
    init.mrowner[0] = 0xAB
    td.vm.tdx_init_vm(init)
    params = seen[0]
    assert int.from_bytes(params[0:8], "little") == 1 << 28
    assert int.from_bytes(params[8:16], "little") == 7
    assert int.from_bytes(params[16:18], "little") == td.machine.profile.n_cpus
    assert int.from_bytes(params[24:32], "little") == 0x1E
    assert int.from_bytes(params[32:40], "little") == 1 << 2, "NO_RBP_MOD"
    assert int.from_bytes(params[40:42], "little") == 60
    assert params[0x80] == 0xAB


def test_the_seamcalls_come_in_the_kernels_order(td: TestTd, seam: ScriptedSeam) -> None:
    td.init_vm()
    packages = td.machine.profile.packages
    expected = [H.TDH_MNG_CREATE] + [H.TDH_MNG_KEY_CONFIG] * packages + [H.TDH_MNG_ADDCX] * 6
    assert seam.leaves() == [*expected, H.TDH_MNG_INIT, H.TDH_MNG_RD, H.TDH_MNG_RD]
    lps = [call.lp for call in seam.calls if call.leaf == H.TDH_MNG_KEY_CONFIG]
    per_package = td.machine.profile.n_cpus // packages
    assert [lp // per_package for lp in lps] == list(range(packages))


class TestModuleFailures:
    @pytest.mark.parametrize("leaf", [H.TDH_MNG_CREATE, H.TDH_MNG_ADDCX])
    def test_no_entropy_is_eagain_and_a_retry_is_legal(
        self, td: TestTd, seam: ScriptedSeam, machine: Machine, leaf: H
    ) -> None:
        seam.fail(leaf, *[NO_ENTROPY] * 10)
        free, pages = machine.free_hkids, machine.pages.in_use
        assert attempt(td).make() == errno.EAGAIN
        assert machine.pages.in_use == pages
        assert attempt(td).make() == 0
        del free

    def test_the_wrapper_hides_nine_entropy_failures(self, td: TestTd, seam: ScriptedSeam) -> None:
        seam.fail(H.TDH_MNG_CREATE, *[NO_ENTROPY] * 9)
        assert attempt(td).make() == 0

    @pytest.mark.parametrize("leaf", BUILDING)
    def test_anything_else_is_eio_and_bugs_the_vm(
        self, td: TestTd, seam: ScriptedSeam, machine: Machine, leaf: H
    ) -> None:
        seam.fail(leaf, BUSY)
        pages = machine.pages.in_use
        one = attempt(td)
        assert one.make() == errno.EIO
        assert one.cmd.hw_error == 0
        assert machine.pages.in_use == pages
        building = [call for call in seam.leaves() if call in BUILDING]
        assert building[-1] == leaf, "it stopped there"
        assert building.count(leaf) == 1
        assert attempt(td).make() == errno.EIO
        with pytest.raises(KvmError) as raised:
            td.vm.check_extension(66)
        assert raised.value.errno == errno.EIO

    def test_operand_invalid_from_mng_init_is_einval_with_the_whole_status(
        self, td: TestTd, seam: ScriptedSeam
    ) -> None:
        seam.fail(H.TDH_MNG_INIT, INVALID | 64)
        one = attempt(td)
        assert one.make() == errno.EINVAL
        assert one.cmd.hw_error == INVALID | 64
        assert attempt(td).make() == 0

    def test_a_tsc_offset_that_cannot_be_read_is_only_logged_and_reads_0(self, td: TestTd, seam: ScriptedSeam) -> None:
        seam.fail(H.TDH_MNG_RD, BUSY, BUSY)
        assert attempt(td).make() == 0
        assert (td.ops.td.tsc_offset, td.ops.td.tsc_multiplier) == (0, 0)


class TestHostLimits:
    def test_no_key_id_left_is_enospc_and_one_that_comes_back_can_be_used(self, machine: Machine) -> None:
        tds = []
        while machine.free_hkids:
            tds.append(TestTd(machine))
            assert attempt(tds[-1]).make() == 0
        with TestTd(machine) as last:
            assert attempt(last).make() == errno.ENOSPC
            tds.pop().close()
            assert attempt(last).make() == 0
        for td in tds:
            td.close()

    def test_out_of_memory_at_every_page_gives_everything_back(self, td: TestTd, machine: Machine) -> None:
        base, free = machine.pages.in_use, machine.free_hkids
        try:
            for allowed in range(8):
                machine.pages.limit_pages = base + allowed
                assert attempt(td).make() == errno.ENOMEM
                assert (machine.pages.in_use, machine.free_hkids) == (base, free)
        finally:
            machine.pages.limit_pages = machine.pages.total_pages
        assert attempt(td).make() == 0

    def test_a_package_without_an_online_cpu_is_eio_and_not_fatal(self, td: TestTd, machine: Machine) -> None:
        per_package = machine.profile.n_cpus // machine.profile.packages
        last = range(machine.profile.n_cpus - per_package, machine.profile.n_cpus)
        for lp in last:
            machine.lps.set_online(lp, False)
        try:
            assert attempt(td).make() == errno.EIO
        finally:
            for lp in last:
                machine.lps.set_online(lp, True)
        assert attempt(td).make() == 0
