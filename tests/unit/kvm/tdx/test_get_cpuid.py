import ctypes
import errno

import pytest

from sim_backend.hw.gprs import R8, RAX
from tests.unit.kvm.tdx.scripted_seam import ScriptedSeam
from tests.unit.kvm.tdx.vmm import TestTd
from uapi_ctypes.errors import KvmError
from uapi_ctypes.kvm_state import KvmCpuid2
from uapi_ctypes.tdx_leaves import SeamcallLeaf as H
from uapi_ctypes.vcpu import Vcpu

SIGNIFICANT_INDEX = 1


@pytest.fixture
def vcpu(td: TestTd) -> Vcpu:
    td.enable_caps().init_vm()
    return td.create_vcpu(init=False)


def get(vcpu: Vcpu, data: int, flags: int = 0) -> int:
    command = vcpu.dialect.get_cpuid
    assert command is not None
    try:
        vcpu.tdx_command(command, data, flags)
    except KvmError as error:
        return error.errno or 0
    return 0


def test_an_unreadable_header_is_efault(vcpu: Vcpu) -> None:
    assert get(vcpu, 0x10) == errno.EFAULT


def test_too_little_room_is_e2big_and_says_how_much_is_needed(vcpu: Vcpu) -> None:
    cpuid = KvmCpuid2.allocate(1)
    assert get(vcpu, ctypes.addressof(cpuid)) == errno.E2BIG
    needed = cpuid.nent
    assert needed > 1
    fitting = KvmCpuid2.allocate(needed)
    assert get(vcpu, ctypes.addressof(fitting), flags=0xFF) == 0, "flags are not looked at"
    assert fitting.nent == needed


def field_of(leaf: int) -> int:
    """Return the first field of CPUID_VALUES for `leaf`; its sub-leaf and its half are in the low nine bits."""
    return 0x9410_0003_0000_0000 | (leaf >> 31) << 16 | (leaf & 0x7F) << 9


def fail_leaf(seam: ScriptedSeam, leaf: int, halves: tuple[int, ...] = (0, 1)) -> None:
    """Make the module refuse to show `leaf` with any sub-leaf: EAX and EBX (half 0), ECX and EDX (half 1)."""

    def refuse(lp: int, regs: list[int]) -> None:
        seam.execute(lp, regs)
        field = seam.calls[-1].rdx
        read = regs[RAX] == 0 and seam.calls[-1].leaf == H.TDH_MNG_RD
        if read and field & ~0x1FF == field_of(leaf) and field & 1 in halves:
            regs[RAX] = 0xC000_0100 << 32

    seam.hook = refuse


@pytest.mark.parametrize("leaf", [0, 0x8000_0000])
def test_without_a_maximum_it_is_eio_whatever_the_room(seam: ScriptedSeam, vcpu: Vcpu, leaf: int) -> None:
    fail_leaf(seam, leaf)
    cpuid = KvmCpuid2.allocate(1)
    assert get(vcpu, ctypes.addressof(cpuid)) == errno.EIO
    assert cpuid.nent == 1


@pytest.mark.parametrize("halves", [(0, 1), (0,), (1,)])
def test_a_leaf_of_which_the_module_refuses_a_part_is_left_out_silently(
    seam: ScriptedSeam, vcpu: Vcpu, halves: tuple[int, ...]
) -> None:
    before = [(e.function, e.index) for e in vcpu.tdx_get_cpuid(256).filled()]
    fail_leaf(seam, 4, halves)
    after = [(e.function, e.index) for e in vcpu.tdx_get_cpuid(256).filled()]
    assert after == [key for key in before if key[0] != 4]
    assert len(after) < len(before)


def claim_many_leaves(seam: ScriptedSeam, maximum: int, sub_leaves: int = 1) -> None:
    """Make the module's leaf 0 say that there are leaves up to `maximum`, each with as many sub-leaves."""

    def claim(lp: int, regs: list[int]) -> None:
        seam.execute(lp, regs)
        field = seam.calls[-1].rdx
        if seam.calls[-1].leaf != H.TDH_MNG_RD or field >> 16 != field_of(0) >> 16:
            return
        if field & ~0x1FF == field_of(0):
            regs[RAX] = 0 if field & 0x1FE == 0x1FE else regs[RAX]
            regs[R8] = maximum
        else:
            regs[RAX] = 0 if (field & 0x1FE) >> 1 < sub_leaves else 0xC000_0100 << 32

    seam.hook = claim


def test_leaves_whose_number_does_not_fit_into_a_field_are_skipped(seam: ScriptedSeam, vcpu: Vcpu) -> None:
    claim_many_leaves(seam, 0x200)
    functions = [e.function for e in vcpu.tdx_get_cpuid(256).filled() if e.function < 0x8000_0000]
    assert functions == list(range(0x80))


def test_there_are_never_more_than_256_entries(seam: ScriptedSeam, vcpu: Vcpu) -> None:
    claim_many_leaves(seam, 0x7F, sub_leaves=3)
    assert len(vcpu.tdx_get_cpuid(256).filled()) == 256


def test_a_destination_that_cannot_be_written_is_efault(vcpu: Vcpu, td: TestTd) -> None:
    assert get(vcpu, td.read_only_copy(KvmCpuid2.allocate(256))) == errno.EFAULT


def test_the_values_are_the_modules(vcpu: Vcpu) -> None:
    entries = {(e.function, e.index): e for e in vcpu.tdx_get_cpuid(256).filled()}
    assert entries[0, 0].eax == 0x23
    assert entries[0, 0].ebx.to_bytes(4, "little") == b"Genu"
    tdx = entries[0x21, 0]
    assert b"".join(r.to_bytes(4, "little") for r in (tdx.ebx, tdx.edx, tdx.ecx)) == b"IntelTDX    "
    assert entries[0x8000_0008, 0].eax >> 16 & 0xFF == 48


def test_only_leaves_with_sub_leaves_have_a_significant_index(vcpu: Vcpu) -> None:
    entries = vcpu.tdx_get_cpuid(256).filled()
    for entry in entries:
        assert entry.flags in (0, SIGNIFICANT_INDEX)
        if entry.index:
            assert entry.flags == SIGNIFICANT_INDEX
    assert {e.flags for e in entries if e.function == 4} == {SIGNIFICANT_INDEX}
    assert {e.flags for e in entries if e.function == 0x8000_0008} == {0}


def test_leaves_that_the_module_does_not_show_are_left_out(vcpu: Vcpu) -> None:
    functions = {e.function for e in vcpu.tdx_get_cpuid(256).filled()}
    assert functions <= set(range(0x24)) | set(range(0x8000_0000, 0x8000_0009))
    assert not functions & {0xB, 2}


def test_get_merge_set_init_is_the_idiom(vcpu: Vcpu) -> None:
    cpuid = vcpu.tdx_get_cpuid(256)
    for entry in cpuid.entries:
        if entry.function == 1:
            entry.ecx |= 1 << 21
    vcpu.set_cpuid2(cpuid)
    vcpu.tdx_init_vcpu()
