import ctypes
import errno

import pytest

from sim_backend.kvm.tdx.sysinfo import CpuidConfig, TdxSysInfo
from tests.unit.kvm.tdx.vmm import TestTd
from uapi_ctypes.errors import KvmError
from uapi_ctypes.tdx_mainline import KvmTdxCapabilities

UNREADABLE = 0x10
CAPABILITIES = 0


def sysinfo(td: TestTd) -> TdxSysInfo:
    assert td.machine.tdx is not None
    return td.machine.tdx.sysinfo


def failing(td: TestTd, data: int, flags: int = 0) -> int | None:
    with pytest.raises(KvmError) as raised:
        td.vm.tdx_command(td.dialect.capabilities_command, data, flags)
    return raised.value.errno


def test_flags_are_einval_before_the_pointer_is_looked_at(td: TestTd) -> None:
    assert failing(td, UNREADABLE, flags=1) == errno.EINVAL


def test_an_unreadable_count_is_efault(td: TestTd) -> None:
    assert failing(td, UNREADABLE) == errno.EFAULT


def test_too_little_room_is_e2big_and_the_count_stays(td: TestTd) -> None:
    capabilities = KvmTdxCapabilities.allocate(1)
    assert failing(td, ctypes.addressof(capabilities)) == errno.E2BIG
    assert capabilities.count == 1


def test_the_attributes_are_those_of_kvm_and_module_together(td: TestTd) -> None:
    capabilities = td.vm.tdx_capabilities(64)
    assert capabilities.supported_attrs == 1 << 28
    assert capabilities.supported_xfam & ~sysinfo(td).xfam_fixed0 == 0
    assert capabilities.supported_xfam & 3 == 3
    assert capabilities.user_tdvmcallinfo_1_r11 == 1 << 1
    assert capabilities.kernel_tdvmcallinfo_1_r11 == 0
    assert not any(capabilities.reserved)


def test_the_entries_are_the_modules_and_carry_no_flags(td: TestTd) -> None:
    capabilities = td.vm.tdx_capabilities(64)
    configs = sysinfo(td).cpuid_configs
    entries = capabilities.filled()
    assert [(e.function, e.index) for e in entries] == [
        (c.leaf, 0 if c.subleaf == 0xFFFFFFFF else c.subleaf) for c in configs
    ]
    assert all(entry.flags == 0 for entry in entries)
    size = next(entry for entry in entries if entry.function == 0x8000_0008)
    assert size.eax >> 16 & 0xFF == 0xFF


def test_what_would_corrupt_host_state_is_not_offered() -> None:
    everything = CpuidConfig(7, 0, *[0xFFFF_FFFF] * 4).without_host_state_features()
    assert everything.ebx == 0xFFFF_FFFF & ~(1 << 4 | 1 << 11), "HLE, RTM"
    assert everything.ecx == 0xFFFF_FFFF & ~(1 << 5), "WAITPKG"
    other = CpuidConfig(7, 1, *[0xFFFF_FFFF] * 4)
    assert other.without_host_state_features() == other


def test_it_works_in_every_state_of_the_td(td: TestTd) -> None:
    td.vm.tdx_capabilities(64)
    td.enable_caps().init_vm()
    td.vm.tdx_capabilities(64)
    td.create_vcpu()
    td.finalize()
    td.vm.tdx_capabilities(64)


def test_a_destination_that_cannot_be_written_is_efault(td: TestTd) -> None:
    assert failing(td, td.read_only_copy(KvmTdxCapabilities.allocate(64))) == errno.EFAULT
