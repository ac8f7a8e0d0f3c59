import ctypes
import errno

import pytest

from tests.unit.kvm.tdx.vmm import TestTd
from uapi_ctypes.errors import KvmError
from uapi_ctypes.kvm_state import KvmCpuid2
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
