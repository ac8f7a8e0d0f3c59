"""CPUID tables and MSRs of ordinary vCPUs: what reads back, what is refused, and how far a list got."""

import errno
from collections.abc import Callable
from typing import Final

import pytest

from tdxhw.ordinary_vm import OrdinaryVm
from uapi_ctypes.errors import KvmError
from uapi_ctypes.kvm_state import KvmCpuid2, KvmMsrEntry, KvmMsrs

pytestmark = pytest.mark.requires("kvm", "vm-type-default")

MAKE_VM = Callable[..., OrdinaryVm]

WRITABLE_MSRS: Final = {
    "IA32_SYSENTER_CS": (0x174, 0x10),
    "IA32_SYSENTER_ESP": (0x175, 0x1234_5000),
    "IA32_SYSENTER_EIP": (0x176, 0x1234_6000),
    "IA32_PAT": (0x277, 0x0007_0406_0007_0406),
    "IA32_STAR": (0xC000_0081, 0x0023_0010_0000_0000),
    "IA32_LSTAR": (0xC000_0082, 0x7000_0000),
    "IA32_CSTAR": (0xC000_0083, 0x7000_1000),
    "IA32_FMASK": (0xC000_0084, 0x4_7700),
    "IA32_KERNEL_GS_BASE": (0xC000_0102, 0x7000_2000),
    "IA32_FS_BASE": (0xC000_0100, 0x7000_3000),
    "IA32_GS_BASE": (0xC000_0101, 0x7000_4000),
    "IA32_TSC_ADJUST": (0x3B, 0),
    "IA32_MISC_ENABLE": (0x1A0, 1),
    "IA32_MTRR_DEF_TYPE": (0x2FF, 0xC06),
    "IA32_MTRR_FIX64K_00000": (0x250, 0x0606_0606_0606_0606),
    "KVM_WALL_CLOCK_NEW": (0x4B56_4D00, 0),
}


@pytest.mark.parametrize("name", WRITABLE_MSRS)
def test_an_msr_reads_back_as_it_was_set(ordinary_vm: MAKE_VM, name: str) -> None:
    vm = ordinary_vm()
    vcpu = vm.create_vcpu()
    vm.set_supported_cpuid(vcpu)
    index, value = WRITABLE_MSRS[name]

    assert vcpu.set_msrs(KvmMsrs.of([KvmMsrEntry(index, 0, value)])) == 1

    read = KvmMsrs.of([KvmMsrEntry(index)])
    assert vcpu.get_msrs(read) == 1
    assert read.entries[0].data == value


@pytest.mark.parametrize(
    ("index", "value"),
    [(0xC000_0080, 1 << 63), (0x277, 0x0808), (0x2FF, 0x02), (0x1B, 1 << 60), (0x17A, 1 << 40), (0xDEAD_0000, 1)],
    ids=["efer", "pat", "mtrr-type", "apic-base", "mcg-status", "no-msr"],
)
def test_the_count_of_written_msrs_says_how_far_it_got(ordinary_vm: MAKE_VM, index: int, value: int) -> None:
    vm = ordinary_vm()
    vcpu = vm.create_vcpu()
    vm.set_supported_cpuid(vcpu)
    good = KvmMsrEntry(0x174, 0, 0x20)

    done = vcpu.set_msrs(KvmMsrs.of([good, KvmMsrEntry(index, 0, value), KvmMsrEntry(0x174, 0, 0x30)]))

    read = KvmMsrs.of([KvmMsrEntry(0x174)])
    vcpu.get_msrs(read)
    assert (done, read.entries[0].data) in ((1, 0x20), (3, 0x30))


def test_reading_stops_at_an_msr_that_does_not_exist(ordinary_vm: MAKE_VM) -> None:
    vcpu = ordinary_vm().create_vcpu()

    assert vcpu.get_msrs(KvmMsrs.of([KvmMsrEntry(0x174), KvmMsrEntry(0xDEAD_0000), KvmMsrEntry(0x175)])) == 1


@pytest.mark.parametrize("count", [1 << 16, 256 + 1])
def test_too_many_msrs_are_e2big(ordinary_vm: MAKE_VM, count: int) -> None:
    msrs = KvmMsrs.of([KvmMsrEntry(0x174)])
    msrs.count = count

    with pytest.raises(KvmError) as error:
        ordinary_vm().create_vcpu().get_msrs(msrs)
    assert error.value.errno == errno.E2BIG


def supported(vm: OrdinaryVm) -> KvmCpuid2:
    return vm.kvm.get_supported_cpuid(256)


def leaves(cpuid: KvmCpuid2) -> set[tuple[int, int]]:
    return {(entry.function, entry.index) for entry in cpuid.filled()}


def test_the_cpuid_of_a_vcpu_reads_back(ordinary_vm: MAKE_VM) -> None:
    vm = ordinary_vm()
    vcpu = vm.create_vcpu()
    cpuid = supported(vm)

    vcpu.set_cpuid2(cpuid)

    assert leaves(vcpu.get_cpuid2(256)) >= leaves(cpuid)


def test_an_empty_cpuid_may_be_set(ordinary_vm: MAKE_VM) -> None:
    vcpu = ordinary_vm().create_vcpu()

    vcpu.set_cpuid2(KvmCpuid2.allocate(0))


@pytest.mark.parametrize("count", [257, 1 << 20])
def test_too_many_cpuid_entries_are_e2big(ordinary_vm: MAKE_VM, count: int) -> None:
    cpuid = KvmCpuid2.allocate(0)
    cpuid.count = count

    with pytest.raises(KvmError) as error:
        ordinary_vm().create_vcpu().set_cpuid2(cpuid)
    assert error.value.errno == errno.E2BIG


def test_reading_the_cpuid_with_too_little_room_is_e2big(ordinary_vm: MAKE_VM) -> None:
    vm = ordinary_vm()
    vcpu = vm.create_vcpu()
    vcpu.set_cpuid2(supported(vm))

    with pytest.raises(KvmError) as error:
        vcpu.get_cpuid2(1)
    assert error.value.errno == errno.E2BIG
