"""The dialect of November 2023: where its commands differ from mainline's."""

import ctypes
import errno

import pytest

from sim_backend.machine import Machine
from tests.unit.kvm.tdx.guest_code import S_BIT, Program
from tests.unit.kvm.tdx.scripted_seam import ScriptedSeam
from tests.unit.kvm.tdx.vmm import MEASURE, PRIVATE, V17_CONFIGURED, TestTd, UserMemory, cpuid_entry
from uapi_ctypes.errors import KvmError
from uapi_ctypes.handle import Handle
from uapi_ctypes.kvm_run import KvmExit
from uapi_ctypes.kvm_state import KvmCpuid2, KvmCpuidEntry2
from uapi_ctypes.tdx_leaves import SeamcallLeaf as H
from uapi_ctypes.tdx_v17 import KvmTdxCapabilitiesV17, KvmTdxCmdV17
from uapi_ctypes.tdx_v17 import KvmTdxInitMemRegion as Region

pytestmark = pytest.mark.parametrize("machine", ["v17"], indirect=True)

MEMORY_ENCRYPT_OP = 0xC008AEBA
CAPABILITIES, INIT_VM, INIT_VCPU, INIT_MEM_REGION, FINALIZE_VM, RELEASE_VM = range(6)
MAX_VCPUS = 66
PAGE = 4096
BUSY = 0x8000_0200 << 32
NO_ENTROPY = 0x8000_0203 << 32
INVALID = 0xC000_0100 << 32
KEY_GENERATION_FAILED = 0x8000_0800 << 32


def issue(target: Handle, cmd: "KvmTdxCmdV17 | int") -> int:
    try:
        return target.ioctl(MEMORY_ENCRYPT_OP, cmd)
    except KvmError as error:
        return -(error.errno or 0)


def command(number: int, data: "int | ctypes.Structure" = 0, flags: int = 0) -> KvmTdxCmdV17:
    address = data if isinstance(data, int) else ctypes.addressof(data)
    cmd = KvmTdxCmdV17(number, flags, address)
    cmd.keeps_alive = data
    return cmd


def end_of_memory(td: TestTd, init: ctypes.Structure) -> int:
    """Return the address of a copy of the structure's header, behind which nothing can be read."""
    memory = UserMemory(4 * PAGE)
    memory.write(ctypes.string_at(ctypes.addressof(init), 2 * PAGE))
    memory.protect(2 * PAGE, 2 * PAGE)
    init.keeps_alive = memory
    return memory.hva


class TestPrologue:
    def test_every_known_command_is_written_back_even_when_it_failed(self, td: TestTd) -> None:
        for number in (CAPABILITIES, INIT_VM, INIT_MEM_REGION, FINALIZE_VM):
            assert issue(td.vm, td.read_only_copy(command(number, 0x10, flags=4))) == -errno.EFAULT
        for number in (INIT_VCPU, 6):
            assert issue(td.vm, td.read_only_copy(command(number))) == -errno.EINVAL

    def test_a_stale_error_is_einval(self, td: TestTd) -> None:
        cmd = command(RELEASE_VM)
        cmd.error = 1
        assert issue(td.vm, cmd) == -errno.EINVAL


class TestCapabilities:
    def test_the_modules_words_are_not_narrowed(self, td: TestTd, machine: Machine) -> None:
        assert machine.tdx is not None
        info = machine.tdx.sysinfo
        capabilities = td.vm.tdx_capabilities(32)
        assert (capabilities.attrs_fixed0, capabilities.attrs_fixed1) == (
            info.attributes_fixed0,
            info.attributes_fixed1,
        )
        assert (capabilities.xfam_fixed0, capabilities.xfam_fixed1) == (info.xfam_fixed0, info.xfam_fixed1)
        assert capabilities.supported_gpaw == 2
        entries = capabilities.filled()
        assert [(e.leaf, e.sub_leaf) for e in entries] == [(c.leaf, c.subleaf) for c in info.cpuid_configs]
        assert [e.eax for e in entries] == [c.eax for c in info.cpuid_configs]

    def test_too_little_room_is_e2big_and_the_count_stays(self, td: TestTd) -> None:
        capabilities = KvmTdxCapabilitiesV17.allocate(3)
        assert issue(td.vm, command(CAPABILITIES, capabilities)) == -errno.E2BIG
        assert capabilities.nr_cpuid_configs == 3

    def test_flags_come_first(self, td: TestTd) -> None:
        assert issue(td.vm, command(CAPABILITIES, 0x10, flags=1)) == -errno.EINVAL
        assert issue(td.vm, command(CAPABILITIES, 0x10)) == -errno.EFAULT


class TestInitVm:
    def test_attributes_that_the_module_refuses_are_einval_with_its_status(self, td: TestTd) -> None:
        cmd = command(INIT_VM, td.init_vm_argument(attributes=1 << 27))
        assert issue(td.vm, cmd) == -errno.EINVAL
        assert cmd.error == INVALID | 64
        cmd.error = 0
        good = td.init_vm_argument()
        cmd.data = ctypes.addressof(good)
        assert issue(td.vm, cmd) == 0, "everything was unwound"

    def test_what_mainline_refuses_is_the_modules_business(self, td: TestTd) -> None:
        assert issue(td.vm, command(INIT_VM, td.init_vm_argument(attributes=1))) == 0, "DEBUG"

    def test_xfam_without_lbr_comes_from_the_cpuid_table(self, seam: ScriptedSeam, td: TestTd) -> None:
        seen: list[bytes] = []

        def spy(lp: int, regs: list[int]) -> None:
            if regs[0] == H.TDH_MNG_INIT:
                seen.append(td.machine.memory.read(regs[2], 1024))
            seam.execute(lp, regs)

        seam.hook = spy
        entries = [cpuid_entry(0xD, 0, 1, eax=7), cpuid_entry(0xD, 1, 1, ecx=1 << 15 | 3 << 11)]
        assert issue(td.vm, command(INIT_VM, td.init_vm_argument(entries=entries))) == 0
        assert int.from_bytes(seen[0][8:16], "little") == 7 | 3 << 11, "LBR is not KVM's: dropped"
        assert int.from_bytes(seen[0][32:40], "little") == 0, "no NO_RBP_MOD"

    def test_wide_physical_addresses_select_gpaw_52(self, td: TestTd) -> None:
        entries = [cpuid_entry(0xD, 0, 1, eax=3), cpuid_entry(0x8000_0008, eax=52)]
        assert issue(td.vm, command(INIT_VM, td.init_vm_argument(entries=entries))) == 0
        assert td.ops.td.gpaw52

    def test_unknown_leaves_are_ignored_and_values_masked(self, td: TestTd) -> None:
        entries = [
            cpuid_entry(0xD, 0, 1, eax=3),
            cpuid_entry(0x5555, eax=1),
            cpuid_entry(7, 0, 1, edx=0xFFFFFFFF),
            cpuid_entry(7, 0, 1),
        ]
        assert issue(td.vm, command(INIT_VM, td.init_vm_argument(entries=entries))) == 0

    def test_order_held_key_then_flags_then_pointer(self, td: TestTd) -> None:
        assert issue(td.vm, command(INIT_VM, 0x10, flags=1)) == -errno.EINVAL
        assert issue(td.vm, command(INIT_VM, 0x10)) == -errno.EFAULT
        td.init_vm()
        assert issue(td.vm, command(INIT_VM, 0x10)) == -errno.EINVAL

    @pytest.mark.parametrize("first", range(5))
    def test_a_structure_that_breaks_several_rules_reports_the_first(self, td: TestTd, first: int) -> None:
        init = td.init_vm_argument()
        cmd = command(INIT_VM, init)
        expected = errno.E2BIG, errno.EFAULT, errno.EINVAL, errno.EINVAL, errno.EBUSY
        td.enable_caps()
        td.create_vcpu(init=False)
        if first <= 3:
            init.cpuid.padding = 1
        if first <= 2:
            init.reserved[1003] = 1
        if first <= 1:
            cmd.data = end_of_memory(td, init)
        if first == 0:
            ctypes.c_uint32.from_address(cmd.data + 8184).value = 257
        assert issue(td.vm, cmd) == -expected[first]

    def test_reserved_words_and_padding_are_einval_and_a_retry_is_legal(self, td: TestTd) -> None:
        init = td.init_vm_argument()
        init.reserved[0] = 1
        assert issue(td.vm, command(INIT_VM, init)) == -errno.EINVAL
        init.reserved[0], init.cpuid.padding = 0, 1
        assert issue(td.vm, command(INIT_VM, init)) == -errno.EINVAL
        init.cpuid.padding = 0
        assert issue(td.vm, command(INIT_VM, init)) == 0

    def test_a_vcpu_makes_it_ebusy(self, td: TestTd) -> None:
        td.enable_caps()
        td.create_vcpu(init=False)
        assert issue(td.vm, command(INIT_VM, td.init_vm_argument())) == -errno.EBUSY

    @pytest.mark.parametrize("leaf", [H.TDH_MNG_CREATE, H.TDH_MNG_ADDCX, H.TDH_MNG_INIT])
    def test_nothing_bugs_the_vm(self, seam: ScriptedSeam, td: TestTd, leaf: H) -> None:
        seam.fail(leaf, BUSY)
        cmd = command(INIT_VM, td.init_vm_argument())
        assert issue(td.vm, cmd) == -errno.EIO
        assert cmd.error == 0
        good = td.init_vm_argument()
        assert issue(td.vm, command(INIT_VM, good)) == 0

    def test_no_entropy_is_eio(self, seam: ScriptedSeam, td: TestTd) -> None:
        seam.fail(H.TDH_MNG_CREATE, *[NO_ENTROPY] * 10)
        assert issue(td.vm, command(INIT_VM, td.init_vm_argument())) == -errno.EIO

    def test_a_failed_key_generation_is_retried_forever(self, seam: ScriptedSeam, td: TestTd) -> None:
        seam.fail(H.TDH_MNG_KEY_CONFIG, *[KEY_GENERATION_FAILED] * 30)
        assert issue(td.vm, command(INIT_VM, td.init_vm_argument())) == 0

    def test_out_of_memory_returns_the_key_id(self, td: TestTd, machine: Machine) -> None:
        pages = machine.pages
        pages.limit_pages = pages.in_use + 2
        init = td.init_vm_argument()
        try:
            assert machine.tdx is not None
            assert issue(td.vm, command(INIT_VM, init)) == machine.tdx.hkids.first
        finally:
            pages.limit_pages = pages.total_pages
        assert issue(td.vm, command(INIT_VM, init)) == 0


class TestMaxVcpus:
    def test_it_can_be_lowered_and_reads_back(self, td: TestTd) -> None:
        td.vm.enable_cap(MAX_VCPUS, 2)
        assert td.vm.check_extension(MAX_VCPUS) == 2

    @pytest.mark.parametrize(("value", "expected"), [(0, errno.EINVAL), (1 << 20, errno.E2BIG)])
    def test_bad_values(self, td: TestTd, value: int, expected: int) -> None:
        with pytest.raises(KvmError) as raised:
            td.vm.enable_cap(MAX_VCPUS, value)
        assert raised.value.errno == expected

    def test_flags_are_einval_and_vcpus_make_it_ebusy(self, td: TestTd) -> None:
        with pytest.raises(KvmError) as raised:
            td.vm.enable_cap(MAX_VCPUS, 2, flags=1)
        assert raised.value.errno == errno.EINVAL
        td.enable_caps().init_vm()
        td.create_vcpu(init=False)
        with pytest.raises(KvmError) as raised:
            td.vm.enable_cap(MAX_VCPUS, 2)
        assert raised.value.errno == errno.EBUSY


class TestSetCpuid:
    def refused(self, td: TestTd, *entries: KvmCpuidEntry2) -> bool:
        try:
            td.vcpus[0].set_cpuid2(KvmCpuid2.of(entries))
        except KvmError as error:
            return error.errno == errno.EINVAL
        return False

    def test_configurable_leaves_must_agree_with_init_vm(self, td: TestTd) -> None:
        td.enable_caps().init_vm()
        td.create_vcpu(init=False)
        leaf1, *others = V17_CONFIGURED
        assert not self.refused(td, leaf1, *others, cpuid_entry(0x2222, eax=5))
        assert self.refused(td, *others), "leaf 1 is missing"
        assert self.refused(td, cpuid_entry(1, ebx=1 << 16), *others), "a configurable bit differs"
        assert self.refused(td, leaf1, *others, cpuid_entry(7, 0, 1)), "INIT_VM had no leaf 7"

    def test_without_init_vm_any_configurable_leaf_is_refused(self, td: TestTd) -> None:
        td.enable_caps()
        td.create_vcpu(init=False)
        assert self.refused(td, cpuid_entry(1))
        assert not self.refused(td, cpuid_entry(0x2222))


class TestInitVcpu:
    def test_a_vcpu_may_be_created_before_init_vm_but_not_initialised(self, td: TestTd) -> None:
        td.enable_caps()
        vcpu = td.create_vcpu(init=False)
        assert issue(vcpu, 0x10) == -errno.EINVAL, "the state comes before the pointer"

    def test_only_init_vcpu_is_known(self, td: TestTd) -> None:
        td.enable_caps().init_vm()
        vcpu = td.create_vcpu(init=False)
        assert issue(vcpu, 0x10) == -errno.EFAULT
        assert issue(vcpu, command(INIT_VCPU)) == -errno.EINVAL, "no X2APIC yet"
        td.set_cpuid(vcpu)
        for number in (CAPABILITIES, INIT_MEM_REGION, RELEASE_VM):
            assert issue(vcpu, command(number)) == -errno.EINVAL
        assert issue(vcpu, command(INIT_VCPU, flags=1)) == -errno.EINVAL
        assert issue(vcpu, command(INIT_VCPU)) == 0
        assert issue(vcpu, command(INIT_VCPU)) == -errno.EINVAL


class TestInitMemRegion:
    @pytest.fixture
    def td(self, td: TestTd) -> TestTd:
        td.enable_caps().init_vm().add_memory()
        return td

    def add(self, td: TestTd, region: Region, flags: int = 0) -> int:
        return -issue(td.vm, command(INIT_MEM_REGION, region, flags))

    @pytest.fixture
    def source(self) -> UserMemory:
        return UserMemory(4 * PAGE)

    def test_it_needs_a_vcpu_and_checks_flags_before_the_pointer(self, td: TestTd, source: UserMemory) -> None:
        assert self.add(td, Region(source.hva, 0, 1)) == errno.EINVAL
        td.create_vcpu()
        assert -issue(td.vm, command(INIT_MEM_REGION, 0x10, flags=2)) == errno.EINVAL
        assert -issue(td.vm, command(INIT_MEM_REGION, 0x10)) == errno.EFAULT
        assert self.add(td, Region(source.hva, 0, 1)) == 0

    @pytest.mark.parametrize(
        ("offset", "gpa", "pages"),
        [
            (1, 0, 1),
            (0, 1, 1),
            (0, 0, 0),
            (0, 0, 1 << 51),
            (0, (1 << 64) - PAGE, 2),
            (0, S_BIT, 1),
            (0, S_BIT - PAGE, 1),
        ],
    )
    def test_malformed_regions_are_einval_and_not_written_back(
        self, td: TestTd, source: UserMemory, offset: int, gpa: int, pages: int
    ) -> None:
        """The last one ends exactly where the S-bit begins."""
        td.create_vcpu()
        region = td.read_only_copy(Region(source.hva + offset, gpa, pages))
        assert issue(td.vm, command(INIT_MEM_REGION, region)) == -errno.EINVAL

    def test_after_finalize_it_is_einval_before_anything_is_read(self, td: TestTd) -> None:
        td.create_vcpu()
        assert issue(td.vm, command(INIT_MEM_REGION, 0x10)) == -errno.EFAULT
        td.finalize()
        assert issue(td.vm, command(INIT_MEM_REGION, 0x10)) == -errno.EINVAL

    def test_a_page_that_is_there_counts_as_done_and_is_not_measured_again(
        self, seam: ScriptedSeam, td: TestTd, source: UserMemory
    ) -> None:
        td.create_vcpu()
        assert self.add(td, Region(source.hva, 0, 1), MEASURE) == 0
        seam.calls.clear()
        region = Region(source.hva, 0, 1)
        assert self.add(td, region, MEASURE) == 0
        assert region.nr_pages == 0
        assert seam.calls == []

    @pytest.mark.parametrize("why", ["attribute", "slot", "file"])
    def test_a_page_that_cannot_be_private_is_eio_with_a_memory_fault(
        self, td: TestTd, source: UserMemory, why: str
    ) -> None:
        vcpu = td.create_vcpu()
        gpa = 0x4000_0000 if why == "slot" else 0
        if why == "slot":
            td.vm.set_memory_attributes(gpa, PAGE, PRIVATE)
        elif why == "attribute":
            td.vm.set_memory_attributes(0, PAGE, 0)
        else:
            td.gmem1.close()
        assert self.add(td, Region(source.hva, gpa, 1)) == errno.EIO
        assert vcpu.exit_reason == KvmExit.KVM_EXIT_MEMORY_FAULT

    def test_any_failure_after_a_page_is_eagain(self, td: TestTd, source: UserMemory) -> None:
        td.create_vcpu()
        td.vm.set_memory_attributes(PAGE, PAGE, 0)
        region = Region(source.hva, 0, 2)
        assert self.add(td, region) == errno.EAGAIN
        assert (region.gpa, region.nr_pages) == (PAGE, 1)

    @pytest.mark.parametrize("leaf", [H.TDH_MEM_PAGE_ADD, H.TDH_MR_EXTEND])
    def test_a_module_failure_bugs_the_vm_and_reads_efault(
        self, seam: ScriptedSeam, td: TestTd, source: UserMemory, leaf: H
    ) -> None:
        td.create_vcpu()
        seam.fail(leaf, INVALID)
        assert self.add(td, Region(source.hva, 0, 1), MEASURE) == errno.EFAULT
        assert self.add(td, Region(source.hva, 0, 1)) == errno.EIO

    def test_a_first_vcpu_that_was_not_initialised_bugs_the_vm(self, td: TestTd, source: UserMemory) -> None:
        td.create_vcpu(init=False)
        assert self.add(td, Region(source.hva, 0, 1)) == errno.EFAULT
        assert self.add(td, Region(source.hva, 0, 1)) == errno.EIO


class TestFinalizeAndRelease:
    def test_a_module_error_is_eio_without_a_status_and_the_vm_lives(self, td: TestTd) -> None:
        td.enable_caps().init_vm()
        cmd = command(FINALIZE_VM)
        assert issue(td.vm, cmd) == -errno.EIO, "NO_VCPUS"
        assert cmd.error == 0
        td.create_vcpu()
        assert issue(td.vm, command(FINALIZE_VM)) == 0
        assert issue(td.vm, command(FINALIZE_VM)) == -errno.EINVAL

    def test_release_gives_the_key_id_back_while_the_vm_lives(self, td: TestTd, machine: Machine) -> None:
        td.build(Program().done())
        td.run_to_end()
        free = machine.free_hkids
        assert issue(td.vm, command(RELEASE_VM, 0x10, flags=9)) == 0
        assert machine.free_hkids == free + 1
        assert issue(td.vm, command(FINALIZE_VM)) == -errno.EINVAL
        assert td.vcpu.run() == KvmExit.KVM_EXIT_INTERNAL_ERROR
        assert td.vcpu.kvm_run.internal.suberror == 4

    def test_release_before_init_vm_is_0(self, td: TestTd) -> None:
        assert issue(td.vm, command(RELEASE_VM)) == 0

    def test_get_cpuid_and_pre_fault_do_not_exist(self, td: TestTd) -> None:
        td.build(Program().done())
        assert td.vm.check_extension(236) == 0
        with pytest.raises(KvmError) as raised:
            td.vcpu.ioctl(0xC040AED5, 0)
        assert raised.value.errno == errno.EINVAL
