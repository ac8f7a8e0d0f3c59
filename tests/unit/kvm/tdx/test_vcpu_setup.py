"""A TD's vCPU before it runs: creation, CPUID, TSC, machine checks, statistics, protected registers."""

import ctypes
import errno

import pytest

from tests.unit.kvm.tdx.guest_code import Program
from tests.unit.kvm.tdx.vmm import GPAW48, SPLIT_IRQCHIP, X2APIC, TestTd, cpuid_entry, error_of
from uapi_ctypes.kvm_state import KvmCpuid2, KvmMsrEntry, KvmMsrs
from uapi_ctypes.vcpu import Vcpu

MAX_VCPU_ID = 128
BAD_POINTER = 0x10
SET_CPUID2, GET_DEVICE_ATTR, SET_DEVICE_ATTR = 0x4008AE90, 0x4018AEE2, 0x4018AEE1
FEAT_CTL = 0x3A
BASIC = [cpuid_entry(1, ecx=X2APIC), cpuid_entry(0x8000_0000, eax=0x8000_0008)]

SETTERS = {
    "REGS": 0x4090AE82, "SREGS": 0x4138AE84, "FPU": 0x41A0AE8D, "XSAVE": 0x5000AEA5, "XCRS": 0x4188AEA7,
    "DEBUGREGS": 0x4080AEA2, "LAPIC": 0x4400AE8F, "GUEST_DEBUG": 0x4048AE9B,
}  # fmt: skip
GETTERS = {
    "REGS": 0x8090AE81, "SREGS": 0x8138AE83, "SREGS2": 0x8140AECC, "FPU": 0x81A0AE8C, "XSAVE": 0x9000AEA4,
    "XSAVE2": 0x9000AECF, "XCRS": 0x8188AEA6, "DEBUGREGS": 0x8080AEA1, "LAPIC": 0x8400AE8E,
}  # fmt: skip


@pytest.fixture
def vcpu(td: TestTd) -> Vcpu:
    td.enable_caps().init_vm()
    return td.create_vcpu(init=False)


class TestCreation:
    """The order of its checks, each against the one that follows."""

    def test_an_impossible_id_comes_before_the_tds_state(self, td: TestTd) -> None:
        assert error_of(lambda: td.vm.create_vcpu(4096)) == errno.EINVAL
        assert error_of(lambda: td.vm.create_vcpu(4095)) == errno.EIO

    def test_too_many_comes_before_a_duplicate(self, td: TestTd) -> None:
        td.enable_caps().init_vm()
        for vcpu_id in range(td.machine.profile.n_cpus - 1):
            td.create_vcpu(vcpu_id, init=False)
        assert error_of(lambda: td.vm.create_vcpu(0)) == errno.EEXIST
        td.create_vcpu(7, init=False)
        assert error_of(lambda: td.vm.create_vcpu(0)) == errno.EINVAL

    def test_the_limit_that_user_space_set_comes_before_the_tds_state(self, td: TestTd) -> None:
        td.vm.enable_cap(MAX_VCPU_ID, 2)
        assert error_of(lambda: td.vm.create_vcpu(2)) == errno.EINVAL
        assert error_of(lambda: td.vm.create_vcpu(1)) == errno.EIO

    def test_the_tds_state_comes_before_the_irqchip(self, td: TestTd) -> None:
        assert error_of(lambda: td.vm.create_vcpu(0)) == errno.EIO
        td.init_vm()
        assert error_of(lambda: td.vm.create_vcpu(0)) == errno.EINVAL
        td.vm.enable_cap(SPLIT_IRQCHIP, 24)
        td.create_vcpu(init=False)


class TestCpuid:
    def test_more_than_256_entries_are_e2big_before_they_are_read(self, vcpu: Vcpu) -> None:
        header = (ctypes.c_uint32 * 2)(257, 0)
        assert error_of(lambda: vcpu.ioctl(SET_CPUID2, header)) == errno.E2BIG
        assert error_of(lambda: vcpu.ioctl(SET_CPUID2, BAD_POINTER)) == errno.EFAULT
        assert error_of(lambda: vcpu.set_cpuid2(KvmCpuid2.of([*BASIC] * 128))) == 0

    def test_amx_needs_the_permission_that_nobody_asked_for(self, vcpu: Vcpu) -> None:
        amx = cpuid_entry(0xD, 0, 1, eax=1 << 18 | 1 << 17 | 3)
        assert error_of(lambda: vcpu.set_cpuid2(KvmCpuid2.of([*BASIC, amx]))) == errno.EPERM
        amx.eax = 1 << 17 | 3
        assert error_of(lambda: vcpu.set_cpuid2(KvmCpuid2.of([*BASIC, amx]))) == 0

    def test_the_linear_width_is_checked_before_amx(self, vcpu: Vcpu) -> None:
        entries = [*BASIC, cpuid_entry(0xD, 0, 1, eax=1 << 18), cpuid_entry(0x8000_0008, eax=GPAW48 | 49 << 8)]
        assert error_of(lambda: vcpu.set_cpuid2(KvmCpuid2.of(entries))) == errno.EINVAL

    @pytest.mark.parametrize("width", [0, 48, 57])
    def test_a_linear_width_that_a_cpu_can_have_is_accepted(self, vcpu: Vcpu, width: int) -> None:
        entries = [*BASIC, cpuid_entry(0x8000_0008, eax=GPAW48 | width << 8)]
        assert error_of(lambda: vcpu.set_cpuid2(KvmCpuid2.of(entries))) == 0

    def test_reading_with_too_little_room_is_e2big_and_says_nothing(self, vcpu: Vcpu) -> None:
        vcpu.set_cpuid2(KvmCpuid2.of(BASIC))
        small = KvmCpuid2.allocate(1)
        assert error_of(lambda: vcpu.ioctl(0xC008AE91, small)) == errno.E2BIG
        assert small.nent == 1
        assert [entry.function for entry in vcpu.get_cpuid2(2).filled()] == [1, 0x8000_0000]

    @pytest.mark.parametrize("eax", [0, GPAW48 | 52, 52 << 16 | 52])
    def test_a_52_bit_td_runs_only_with_a_table_that_says_52(self, td: TestTd, eax: int) -> None:
        td.enable_caps().init_vm(entries=[cpuid_entry(0x8000_0008, eax=52 << 16)])
        vcpu = td.create_vcpu(init=False)
        vcpu.set_cpuid2(KvmCpuid2.of([*BASIC, cpuid_entry(0x8000_0008, eax=eax)] if eax else BASIC))
        vcpu.tdx_init_vcpu()
        td.finalize()
        expected = errno.EFAULT if eax >> 16 == 52 else errno.EIO  # no memory is there, so it faults at once
        assert error_of(vcpu.run) == expected
        assert error_of(vcpu.get_mp_state) == (0 if eax >> 16 == 52 else errno.EIO)


class TestTsc:
    def test_the_vms_frequency_is_limited_and_0_is_the_hosts(self, td: TestTd) -> None:
        profile = td.machine.profile
        assert error_of(lambda: td.vm.set_tsc_khz(profile.max_tsc_khz)) == errno.EINVAL
        assert error_of(lambda: td.vm.set_tsc_khz(profile.max_tsc_khz - 1)) == 0
        td.vm.set_tsc_khz(1_000_000)
        td.vm.set_tsc_khz(0)
        assert td.vm.get_tsc_khz() == profile.tsc_khz

    def test_a_vcpu_keeps_the_frequency_of_its_creation(self, td: TestTd) -> None:
        td.vm.set_tsc_khz(1_500_000)
        td.enable_caps().init_vm()
        assert td.create_vcpu(init=False).get_tsc_khz() == 1_500_000

    def test_the_offset_is_the_modules_and_setting_it_has_no_effect(self, td: TestTd, vcpu: Vcpu) -> None:
        value = ctypes.c_uint64()
        attribute = (ctypes.c_uint64 * 3)(0, 0, ctypes.addressof(value))
        vcpu.ioctl(GET_DEVICE_ATTR, attribute)
        module = td.ops.td.tsc_offset
        assert value.value == module
        value.value = module + 12345 & (1 << 64) - 1
        vcpu.ioctl(SET_DEVICE_ATTR, attribute)
        vcpu.ioctl(GET_DEVICE_ATTR, attribute)
        assert value.value == module


class TestMachineChecks:
    @pytest.mark.parametrize(("cap", "locked"), [(32, 1), (1 << 27 | 4, 1 | 1 << 20)])
    def test_local_machine_checks_show_in_the_feature_control(
        self, td: TestTd, vcpu: Vcpu, cap: int, locked: int
    ) -> None:
        vcpu.x86_setup_mce(cap)
        msrs = KvmMsrs.of([KvmMsrEntry(FEAT_CTL)])
        assert vcpu.get_msrs(msrs) == 1
        assert msrs.entries[0].data == locked

    @pytest.mark.parametrize("cap", [0, 33, 1 << 9 | 4])
    def test_what_the_host_does_not_support_is_einval(self, vcpu: Vcpu, cap: int) -> None:
        assert error_of(lambda: vcpu.x86_setup_mce(cap)) == errno.EINVAL


class TestProtectedState:
    """Registers are protected from the creation of the vCPU on, before the module knows it."""

    @pytest.mark.parametrize("name", SETTERS)
    def test_setting_reads_its_argument_first(self, vcpu: Vcpu, name: str) -> None:
        buffer = (ctypes.c_uint8 * 8192)()
        assert error_of(lambda: vcpu.ioctl(SETTERS[name], BAD_POINTER)) == errno.EFAULT
        assert error_of(lambda: vcpu.ioctl(SETTERS[name], buffer)) == errno.EINVAL

    @pytest.mark.parametrize("name", GETTERS)
    def test_reading_is_refused_before_anything_is_written(self, vcpu: Vcpu, name: str) -> None:
        assert error_of(lambda: vcpu.ioctl(GETTERS[name], BAD_POINTER)) == errno.EINVAL

    def test_set_sregs2_does_not_even_read(self, vcpu: Vcpu) -> None:
        assert error_of(lambda: vcpu.ioctl(0x4140AECD, BAD_POINTER)) == errno.EINVAL


def test_statistics_count_the_exits_of_a_td_and_keep_it_alive(td: TestTd) -> None:
    td.build(Program().out(0x40, 1).done())
    free = td.machine.free_hkids
    with td.vcpu.get_stats_fd() as stats, td.vm.get_stats_fd():
        td.run()
        assert td.ops.vm.vcpus[0].counters["io_exits"] == 1
        td.close()
        assert td.machine.free_hkids == free
        del stats
    assert td.machine.free_hkids == free + 1
