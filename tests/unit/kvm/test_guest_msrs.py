"""What a guest's RDMSR and WRMSR are told apart from user space's ioctls: by CPUID, and by the kind of refusal."""

import pytest

from sim_backend.kernel import SimKernel
from tests.unit.kvm.small_vmm import CODE, SmallVm
from uapi_ctypes.caps import KvmCap
from uapi_ctypes.kvm_run import KvmExit
from uapi_ctypes.kvm_state import KvmCpuid2, KvmCpuidEntry2, KvmMsrEntry, KvmMsrs

INVALID, UNKNOWN, FILTERED = 1, 2, 4
RDMSR, WRMSR = b"\x0f\x32\xf4", b"\x0f\x30\xf4"
WORKS = 0

pytestmark = pytest.mark.parametrize("kernel", ["svm"], indirect=True)


def access(kernel: SimKernel, code: bytes, msr: int, value: int = 0, *cpuid: KvmCpuidEntry2) -> tuple[int, int]:
    """Return why the access left the guest, `WORKS` if it did not, and what it read."""
    with SmallVm(kernel, code) as small:
        small.vm.enable_cap(KvmCap.KVM_CAP_X86_USER_SPACE_MSR, INVALID | UNKNOWN | FILTERED)
        if cpuid:
            small.vcpu.set_cpuid2(KvmCpuid2.of(list(cpuid)))
        regs = small.vcpu.get_regs()
        regs.rcx, regs.rax, regs.rdx, regs.rip = msr, value & 0xFFFF_FFFF, value >> 32, CODE
        small.vcpu.set_regs(regs)
        reason = small.vcpu.run()
        if reason == KvmExit.KVM_EXIT_HLT:
            after = small.vcpu.get_regs()
            return WORKS, after.rdx << 32 | after.rax
        assert reason in (KvmExit.KVM_EXIT_X86_RDMSR, KvmExit.KVM_EXIT_X86_WRMSR)
        return int(small.vcpu.kvm_run.msr.reason), 0


def with_bit(function: int, register: str, bit: int, index: int = 0) -> KvmCpuidEntry2:
    entry = KvmCpuidEntry2(function=function, index=index, flags=1 if index or function in (7, 0xD) else 0)
    setattr(entry, register, 1 << bit)
    return entry


@pytest.mark.parametrize(
    ("code", "msr", "feature"),
    [
        pytest.param(RDMSR, 0x48, with_bit(7, "edx", 26), id="SPEC_CTRL"),
        pytest.param(WRMSR, 0x48, with_bit(0x8000_0008, "ebx", 14), id="SPEC_CTRL by AMD's IBRS"),
        pytest.param(RDMSR, 0xC000_0103, with_bit(0x8000_0001, "edx", 27), id="TSC_AUX by RDTSCP"),
        pytest.param(WRMSR, 0xC000_0103, with_bit(7, "ecx", 22), id="TSC_AUX by RDPID"),
        pytest.param(RDMSR, 0xC001_0140, with_bit(0x8000_0001, "ecx", 9), id="OSVW"),
        pytest.param(RDMSR, 0xC001_011F, with_bit(0x8000_0008, "ebx", 25), id="VIRT_SPEC_CTRL"),
    ],
)
def test_an_msr_of_a_feature_is_invalid_without_the_feature(
    kernel: SimKernel, code: bytes, msr: int, feature: KvmCpuidEntry2
) -> None:
    assert access(kernel, code, msr)[0] == INVALID
    assert access(kernel, code, msr, 0, feature)[0] == WORKS


@pytest.mark.parametrize(
    ("code", "msr", "value", "reason"),
    [
        pytest.param(WRMSR, 0xFE, 0, UNKNOWN, id="MTRRcap is read only, and nothing handles the write"),
        pytest.param(WRMSR, 0x179, 0, UNKNOWN, id="so is MCG_CAP"),
        pytest.param(RDMSR, 0x17B, 0, INVALID, id="MCG_CTL without MCG_CTL_P"),
        pytest.param(RDMSR, 0x9E, 0, INVALID, id="SMBASE outside SMM"),
        pytest.param(RDMSR, 0x345, 0, UNKNOWN, id="PERF_CAPABILITIES without PDCM"),
        pytest.param(RDMSR, 0x49, 0, UNKNOWN, id="PRED_CMD cannot be read"),
        pytest.param(WRMSR, 0x49, 0, INVALID, id="nor written without IBPB"),
        pytest.param(RDMSR, 0x4000_0004, 0, INVALID, id="the range of Hyper-V's is not unknown"),
        pytest.param(WRMSR, 0xC001_0117, 0x1001, INVALID, id="VM_HSAVE_PA is a page"),
        pytest.param(WRMSR, 0xC001_0117, 0x1000, WORKS, id="and takes one"),
        pytest.param(WRMSR, 0x1A0, 0, INVALID, id="MISC_ENABLE's PEBS bit is read only"),
        pytest.param(WRMSR, 0x1A0, 0x1801, WORKS, id="and the others are not"),
        pytest.param(RDMSR, 0xDEAD_BEEF, 0, UNKNOWN, id="no MSR"),
    ],
)
def test_the_reason_of_a_refusal(kernel: SimKernel, code: bytes, msr: int, value: int, reason: int) -> None:
    assert access(kernel, code, msr, value)[0] == reason


def test_misc_enable_says_that_there_is_neither_pebs_nor_bts(kernel: SimKernel) -> None:
    assert access(kernel, RDMSR, 0x1A0) == (WORKS, 0x1800)


def test_user_space_reaches_what_the_guest_may_not(kernel: SimKernel) -> None:
    with SmallVm(kernel) as small:
        for index in (0x48, 0xC000_0103, 0x9E):
            assert small.vcpu.get_msrs(KvmMsrs.of([KvmMsrEntry(index)])) == 1, hex(index)


def test_an_empty_filter_range_may_have_any_flags(kernel: SimKernel) -> None:
    with SmallVm(kernel) as small:
        filter_ = bytearray(8 + 16 * 24)
        filter_[8:12] = (4).to_bytes(4, "little")
        small.memory[0x3000] = bytes(filter_)
        request = 0x4188_AEC6  # KVM_X86_SET_MSR_FILTER
        assert small.vm.ioctl(request, small.memory.hva + 0x3000) == 0
