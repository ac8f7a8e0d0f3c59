"""MSRs of an ordinary vCPU: what user space may read and write, as kvm_get_msr_common() and kvm_set_msr_common() do."""

import pytest

from sim_backend.kernel import SimKernel
from sim_backend.kvm.errors import NotModelled
from tests.unit.kvm.small_vmm import SmallVm
from uapi_ctypes.caps import KvmCap
from uapi_ctypes.kvm_state import KvmCpuid2, KvmCpuidEntry2, KvmMsrEntry, KvmMsrs
from uapi_ctypes.vcpu import Vcpu

ALL_ONES = (1 << 64) - 1
P6_PERFCTR, P6_EVNTSEL, K7_PERFCTR = 0xC1, 0x186, 0xC001_0004
EBL_CR_POWERON, PERF_STATUS, BBL_CR_CTL3, UCODE_WRITE = 0x2A, 0x198, 0x11E, 0x79
MC0_CTL, MC0_CTL2, HWCR, XFD, MMIO_CONF_BASE = 0x400, 0x280, 0xC001_0015, 0x1C4, 0xC001_0058
ASYNC_PF_EN, PV_EOI_EN, ASYNC_PF_INT = 0x4B56_4D02, 0x4B56_4D04, 0x4B56_4D06
PERF_CAPABILITIES = 0x345
PLATFORM_INFO = 0xCE


def read(vcpu: Vcpu, index: int) -> int | None:
    """Return the value, None when it cannot be read."""
    msrs = KvmMsrs.of([KvmMsrEntry(index)])
    return int(msrs.entries[0].data) if vcpu.get_msrs(msrs) else None


def write(vcpu: Vcpu, index: int, value: int) -> bool:
    """Tell whether the write is accepted."""
    return vcpu.set_msrs(KvmMsrs.of([KvmMsrEntry(index, 0, value)])) == 1


@pytest.mark.parametrize("index", [P6_PERFCTR, P6_EVNTSEL, K7_PERFCTR, BBL_CR_CTL3])
def test_a_write_is_taken_and_forgotten(kernel: SimKernel, index: int) -> None:
    with SmallVm(kernel) as small:
        before = read(small.vcpu, index)
        assert before == (0xBE70_2111 if index == BBL_CR_CTL3 else 0)
        assert write(small.vcpu, index, ALL_ONES)
        assert read(small.vcpu, index) == before


@pytest.mark.parametrize(("index", "value"), [(EBL_CR_POWERON, 0), (PERF_STATUS, 1000 | 4 << 40)])
def test_a_constant_can_be_read_and_not_written(kernel: SimKernel, index: int, value: int) -> None:
    with SmallVm(kernel) as small:
        assert read(small.vcpu, index) == value
        assert not write(small.vcpu, index, value)


def test_a_microcode_update_is_ignored_and_cannot_be_read(kernel: SimKernel) -> None:
    with SmallVm(kernel) as small:
        assert write(small.vcpu, UCODE_WRITE, 0x1000)
        assert read(small.vcpu, UCODE_WRITE) is None


@pytest.mark.parametrize(
    ("index", "value", "accepted"),
    [
        (MC0_CTL, 0, True),
        (MC0_CTL, 1, False),
        (MC0_CTL, ALL_ONES, True),
        (MC0_CTL, ALL_ONES & ~(1 << 10), True),
        (MC0_CTL2, 0, True),
        (MC0_CTL2, 1, False),
        (HWCR, 0x148, True),
        (HWCR, 1 << 24, True),
        (HWCR, 1, False),
        (XFD, 1, False),
        (MMIO_CONF_BASE, 0, True),
        (MMIO_CONF_BASE, 1, False),
        (PERF_CAPABILITIES, 1 << 40, False),
        (ASYNC_PF_EN, 0, True),
        (ASYNC_PF_EN, 1, False),
        (ASYNC_PF_INT, 0x40, False),
        (PV_EOI_EN, 1, True),
        (PV_EOI_EN, 0x100_0001, False),
    ],
)
def test_a_value_is_taken_or_refused(kernel: SimKernel, index: int, value: int, accepted: bool) -> None:
    with SmallVm(kernel) as small:
        assert write(small.vcpu, index, value) is accepted


def test_the_interrupt_of_asynchronous_page_faults_needs_a_local_apic(kernel: SimKernel) -> None:
    with SmallVm(kernel, split=True) as small:
        assert write(small.vcpu, ASYNC_PF_INT, 0x40)
        assert not write(small.vcpu, ASYNC_PF_INT, 0x140)
        assert write(small.vcpu, ASYNC_PF_EN, 1)


@pytest.mark.parametrize(("kernel", "value"), [("pvm", 1), ("svm", 0x1800), ("7.3", 0x1800)], indirect=["kernel"])
def test_misc_enable_after_reset_is_the_kernel_s(kernel: SimKernel, value: int) -> None:
    with SmallVm(kernel) as small:
        assert read(small.vcpu, 0x1A0) == value


def test_hwcr_drops_the_bits_that_mean_nothing_here(kernel: SimKernel) -> None:
    with SmallVm(kernel) as small:
        assert write(small.vcpu, HWCR, 0x148 | 1 << 18)
        assert read(small.vcpu, HWCR) == 1 << 18


def test_every_bank_reports_everything_once_machine_checks_are_set_up(kernel: SimKernel) -> None:
    with SmallVm(kernel) as small:
        assert read(small.vcpu, MC0_CTL) == 0
        small.vcpu.x86_setup_mce(2)
        assert [read(small.vcpu, MC0_CTL + 4 * bank) for bank in range(3)] == [ALL_ONES, ALL_ONES, None]


@pytest.mark.parametrize(("quirks", "value"), [(0x100, 0), (0x0FF, 1 << 31)])
def test_a_vcpu_created_without_the_quirk_of_feature_msrs_has_zero_there(
    kernel: SimKernel, quirks: int, value: int
) -> None:
    with SmallVm(kernel, n_vcpus=0) as small:
        small.vm.enable_cap(KvmCap.KVM_CAP_DISABLE_QUIRKS2, quirks)
        small.vcpus.append(small.vm.create_vcpu(0))
        assert read(small.vcpu, PLATFORM_INFO) == value
        small.vm.enable_cap(KvmCap.KVM_CAP_DISABLE_QUIRKS2, 0x100)
        assert read(small.vcpu, PLATFORM_INFO) == value, "only what was off when the vCPU was made counts"


def test_the_clock_msrs_have_two_names_and_the_wall_clock_is_the_vm_s(kernel: SimKernel) -> None:
    with SmallVm(kernel, n_vcpus=2) as small:
        first, second = small.vcpus
        assert write(first, 0x11, 0x3000)
        assert [read(vcpu, index) for vcpu in (first, second) for index in (0x11, 0x4B56_4D00)] == [0x3000] * 4
        assert write(first, 0x4B56_4D01, 0x3001)
        assert [read(first, index) for index in (0x12, 0x4B56_4D01)] == [0x3001] * 2
        assert read(second, 0x12) == 0


def offer(small: SmallVm, features: int) -> None:
    """Offer KVM's paravirtual features by CPUID, and make the kernel insist on that."""
    base = KvmCpuidEntry2(0x4000_0000, eax=0x4000_0001, ebx=0x4B4D_564B, ecx=0x564B_4D56, edx=0x4D)
    small.vcpu.set_cpuid2(KvmCpuid2.of([base, KvmCpuidEntry2(0x4000_0001, eax=features)]))
    small.vcpu.enable_cap(KvmCap.KVM_CAP_ENFORCE_PV_FEATURE_CPUID, 1)


@pytest.mark.parametrize(
    ("index", "feature", "value"),
    [(0x12, 0, 0x3001), (0x4B56_4D01, 3, 0x3001), (0x4B56_4D02, 4, 0), (0x4B56_4D03, 5, 0x3001), (0x4B56_4D05, 12, 1)],
)
def test_a_paravirtual_msr_that_the_table_does_not_offer_takes_zero_only(
    kernel: SimKernel, index: int, feature: int, value: int
) -> None:
    with SmallVm(kernel, split=True) as small:
        offer(small, ~(1 << feature) & 0xFFFF_FFFF)
        assert read(small.vcpu, index) == 0
        assert write(small.vcpu, index, 0)
        assert not write(small.vcpu, index, 1)
    with SmallVm(kernel, split=True) as small:
        offer(small, 1 << feature)
        assert write(small.vcpu, index, value)


# Hyper-V's MSRs, on the kernel that has them.

HYPERV = pytest.mark.parametrize("kernel", ["svm"], indirect=True)
GUEST_OS_ID, HYPERCALL, VP_INDEX, TIME_REF_COUNT = 0x4000_0000, 0x4000_0001, 0x4000_0002, 0x4000_0020
TSC_FREQUENCY, VP_ASSIST_PAGE, SCONTROL, SVERSION, SINT0 = (
    0x4000_0022,
    0x4000_0073,
    0x4000_0080,
    0x4000_0081,
    0x4000_0090,
)
CRASH_CTL, TSC_INVARIANT_CONTROL, VM_HSAVE_PA = 0x4000_0105, 0x4000_0118, 0xC001_0117


@HYPERV
@pytest.mark.parametrize(
    ("index", "value", "accepted", "after"),
    [
        (GUEST_OS_ID, ALL_ONES, True, ALL_ONES),
        (HYPERCALL, 0x1000, True, 0),  # nobody has said which system it is
        (VP_INDEX, 1023, True, 1023),
        (VP_INDEX, 1024, False, 0),
        (VP_INDEX, 1 << 32 | 5, True, 5),
        (TSC_FREQUENCY, 1, True, 2_596_097_000),
        (VP_ASSIST_PAGE, 1 << 40 | 1, False, 0),  # there is no memory
        (VP_ASSIST_PAGE, 0x1000, True, 0x1000),
        (SCONTROL, 1, False, 0),
        (SINT0, 0x30, False, 1 << 16),
        (SVERSION, 1, False, 1),
        (CRASH_CTL, ALL_ONES, True, 1 << 63),
        (TSC_INVARIANT_CONTROL, 2, False, 0),
        (VM_HSAVE_PA, ALL_ONES, True, ALL_ONES & ~0xFFF),
    ],
)
def test_a_hyperv_msr_takes_what_the_kernel_takes(
    kernel: SimKernel, index: int, value: int, accepted: bool, after: int
) -> None:
    with SmallVm(kernel) as small:
        assert write(small.vcpu, index, value) is accepted
        assert read(small.vcpu, index) == after


@HYPERV
def test_hyperv_s_clock_runs_and_cannot_be_set(kernel: SimKernel) -> None:
    with SmallVm(kernel) as small:
        first = read(small.vcpu, TIME_REF_COUNT)
        assert not write(small.vcpu, TIME_REF_COUNT, 0)
        second = read(small.vcpu, TIME_REF_COUNT)
        assert first is not None
        assert second is not None
        assert 0 <= first <= second < 10_000_000 * 60


@HYPERV
def test_what_hyperv_would_do_in_guest_memory_is_refused_by_name(kernel: SimKernel) -> None:
    with SmallVm(kernel) as small:
        assert write(small.vcpu, GUEST_OS_ID, 1)
        with pytest.raises(NotModelled, match="hypercall page"):
            write(small.vcpu, HYPERCALL, 0x1001)
        with pytest.raises(NotModelled, match="VP assist page"):
            write(small.vcpu, VP_ASSIST_PAGE, 0x1001)


def test_a_kernel_without_hyperv_knows_none_of_its_msrs(kernel: SimKernel) -> None:
    with SmallVm(kernel) as small:
        assert read(small.vcpu, GUEST_OS_ID) is None
        assert not write(small.vcpu, GUEST_OS_ID, 0)
