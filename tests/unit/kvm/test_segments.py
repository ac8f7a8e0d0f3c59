"""KVM_GET_SREGS shows a segment register as the vendor module keeps it (vmx_get_segment, svm_get_segment)."""

from typing import Any

import pytest

from sim_backend.kernel import SimKernel
from sim_backend.kvm.errors import NotModelled
from tests.unit.kvm.small_vmm import SmallVm
from uapi_ctypes.kvm_run import KvmExit
from uapi_ctypes.kvm_state import KvmSregs2

CR0_PAGING, CR4_PAE, PDPTRS_VALID = 0x8000_0011, 1 << 5, 1


def set_and_read(kernel: SimKernel, segment: str, **fields: int) -> Any:
    """Change fields of a segment register; return what is read back."""
    with SmallVm(kernel) as small:
        sregs = small.vcpu.get_sregs()
        for name, value in fields.items():
            setattr(getattr(sregs, segment), name, value)
        small.vcpu.set_sregs(sregs)
        return getattr(small.vcpu.get_sregs(), segment)


@pytest.mark.parametrize("kernel", ["7.3", "svm"], indirect=True)
@pytest.mark.parametrize("fields", [{"present": 0}, {"unusable": 1}])
def test_a_segment_is_either_present_or_unusable(kernel: SimKernel, fields: dict[str, int]) -> None:
    shown = set_and_read(kernel, "ds", **fields)
    assert (shown.present, shown.unusable) == (0, 1)


@pytest.mark.parametrize(
    ("kernel", "limit", "given", "shown"),
    [("7.3", 0xFFFF, 1, 1), ("7.3", 0x1F_FFFF, 0, 0), ("svm", 0xFFFF, 1, 0), ("svm", 0x1F_FFFF, 0, 1)],
    indirect=["kernel"],
)
def test_svm_derives_the_granularity_from_the_limit(kernel: SimKernel, limit: int, given: int, shown: int) -> None:
    assert set_and_read(kernel, "es", limit=limit, g=given).g == shown


@pytest.mark.parametrize(
    ("kernel", "segment", "given", "shown"),
    [
        ("7.3", "ds", 2, 2),
        ("svm", "ds", 2, 3),  # accessed
        ("svm", "ss", 2, 2),
        ("svm", "tr", 9, 11),  # busy
        ("svm", "ldt", 2, 2),
    ],
    indirect=["kernel"],
)
def test_svm_shows_a_data_segment_as_accessed_and_a_task_as_busy(
    kernel: SimKernel, segment: str, given: int, shown: int
) -> None:
    assert set_and_read(kernel, segment, type=given).type == shown


def test_page_directory_pointers_are_those_that_were_set_until_the_guest_runs(kernel: SimKernel) -> None:
    with SmallVm(kernel) as small:
        small.memory[0x3000] = (0x83).to_bytes(8, "little")  # never looked at: the directory is at 0x4000
        small.memory[0x2000] = (0x4001).to_bytes(8, "little")
        small.memory[0x4000] = (0x83).to_bytes(8, "little")
        sregs = small.vcpu.get_sregs2()
        sregs.cr0, sregs.cr3, sregs.cr4 = CR0_PAGING, 0x2000, CR4_PAE
        sregs.flags, sregs.pdptrs[0] = PDPTRS_VALID, 0x3001
        small.vcpu.set_sregs2(sregs)
        assert small.vcpu.get_sregs2().pdptrs[0] == 0x3001
        with pytest.raises(NotModelled, match="PDPTRs"):
            small.vcpu.run()
        sregs.pdptrs[0] = 0x4001
        small.vcpu.set_sregs2(sregs)
        assert small.vcpu.run() == KvmExit.KVM_EXIT_HLT


def test_page_directory_pointers_without_pae_paging_are_einval(kernel: SimKernel) -> None:
    with SmallVm(kernel) as small:
        sregs: KvmSregs2 = small.vcpu.get_sregs2()
        before = bytes(small.vcpu.get_sregs2())
        sregs.flags, sregs.cr2 = PDPTRS_VALID, 0x1234
        with pytest.raises(OSError, match="EINVAL"):
            small.vcpu.set_sregs2(sregs)
        assert bytes(small.vcpu.get_sregs2()) == before
