"""Sizes and offsets as data, measured on the uapi headers of Linux 7.2 and 7.3 and on the v17 layout."""

import ctypes
from typing import Any

import pytest

from uapi_ctypes import kvm, kvm_run, kvm_state, tdx_mainline, tdx_v17

SIZES: list[tuple[type[Any], int]] = [
    (tdx_mainline.KvmTdxCmd, 24),
    (tdx_mainline.KvmTdxCapabilities, 2056),
    (tdx_mainline.KvmTdxInitVm, 264),
    (tdx_mainline.KvmTdxInitMemRegion, 24),
    (tdx_v17.KvmTdxCmdV17, 24),
    (tdx_v17.KvmTdxCapabilitiesV17, 2056),
    (tdx_v17.KvmTdxCpuidConfig, 24),
    (tdx_v17.KvmTdxInitVmV17, 8192),
    (kvm_state.KvmCpuid2, 8),
    (kvm_state.KvmCpuidEntry2, 40),
    (kvm.KvmUserspaceMemoryRegion2, 160),
    (kvm.KvmCreateGuestMemfd, 64),
    (kvm.KvmMemoryAttributes, 32),
    (kvm.KvmPreFaultMemory, 64),
    (kvm.KvmEnableCap, 104),
    (kvm.KvmMsi, 32),
    (kvm_state.KvmMpState, 4),
    (kvm_state.KvmVcpuEvents, 64),
    (kvm_state.KvmRegs, 144),
    (kvm_state.KvmSregs, 312),
    (kvm_state.KvmSregs2, 320),
    (kvm_state.KvmFpu, 416),
    (kvm_state.KvmXsave, 4096),
    (kvm_state.KvmXcrs, 392),
    (kvm_state.KvmDebugregs, 128),
    (kvm_state.KvmLapicState, 1024),
    (kvm.KvmMsrFilter, 392),
    (kvm_run.KvmRun, 2352),
    (kvm_run.KvmRunUnion, 256),
    (kvm_run.KvmRunSyncUnion, 2048),
    (kvm_run.KvmTdxVmcallV17, 200),
]

OFFSETS: list[tuple[type[Any], dict[str, int]]] = [
    (tdx_mainline.KvmTdxCmd, {"id": 0, "flags": 4, "data": 8, "hw_error": 16}),
    (
        tdx_mainline.KvmTdxCapabilities,
        {
            "supported_attrs": 0,
            "supported_xfam": 8,
            "kernel_tdvmcallinfo_1_r11": 16,
            "user_tdvmcallinfo_1_r11": 24,
            "kernel_tdvmcallinfo_1_r12": 32,
            "user_tdvmcallinfo_1_r12": 40,
            "reserved": 48,
            "cpuid": 2048,
        },
    ),
    (
        tdx_mainline.KvmTdxInitVm,
        {
            "attributes": 0,
            "xfam": 8,
            "mrconfigid": 16,
            "mrowner": 64,
            "mrownerconfig": 112,
            "reserved": 160,
            "cpuid": 256,
        },
    ),
    (tdx_mainline.KvmTdxInitMemRegion, {"source_addr": 0, "gpa": 8, "nr_pages": 16}),
    (tdx_v17.KvmTdxCmdV17, {"id": 0, "flags": 4, "data": 8, "error": 16, "hw_error": 16}),
    (
        tdx_v17.KvmTdxCapabilitiesV17,
        {
            "attrs_fixed0": 0,
            "attrs_fixed1": 8,
            "xfam_fixed0": 16,
            "xfam_fixed1": 24,
            "supported_gpaw": 32,
            "padding": 36,
            "reserved": 40,
            "nr_cpuid_configs": 2048,
        },
    ),
    (
        tdx_v17.KvmTdxCpuidConfig,
        {"leaf": 0, "sub_leaf": 4, "eax": 8, "ebx": 12, "ecx": 16, "edx": 20},
    ),
    (
        tdx_v17.KvmTdxInitVmV17,
        {
            "attributes": 0,
            "mrconfigid": 8,
            "mrowner": 56,
            "mrownerconfig": 104,
            "reserved": 152,
            "cpuid": 8184,
        },
    ),
    (
        kvm.KvmUserspaceMemoryRegion2,
        {
            "slot": 0,
            "flags": 4,
            "guest_phys_addr": 8,
            "memory_size": 16,
            "userspace_addr": 24,
            "guest_memfd_offset": 32,
            "guest_memfd": 40,
            "pad1": 44,
            "pad2": 48,
        },
    ),
    (kvm.KvmCreateGuestMemfd, {"size": 0, "flags": 8, "reserved": 16}),
    (kvm.KvmMemoryAttributes, {"address": 0, "size": 8, "attributes": 16, "flags": 24}),
    (kvm.KvmPreFaultMemory, {"gpa": 0, "size": 8, "flags": 16, "padding": 24}),
    (kvm.KvmEnableCap, {"cap": 0, "flags": 4, "args": 8, "pad": 40}),
    (
        kvm_state.KvmCpuidEntry2,
        {"function": 0, "index": 4, "flags": 8, "eax": 12, "ebx": 16, "ecx": 20, "edx": 24, "padding": 28},
    ),
    (
        kvm_run.KvmRun,
        {
            "request_interrupt_window": 0,
            "immediate_exit": 1,
            "exit_reason": 8,
            "ready_for_interrupt_injection": 12,
            "if_flag": 13,
            "flags": 14,
            "cr8": 16,
            "apic_base": 24,
            "kvm_valid_regs": 288,
            "kvm_dirty_regs": 296,
            "s": 304,
        },
    ),
]

RUN_OFFSETS: dict[str, int] = {
    "ex.exception": 32,
    "ex.error_code": 36,
    "io.direction": 32,
    "io.size": 33,
    "io.port": 34,
    "io.count": 36,
    "io.data_offset": 40,
    "hypercall.nr": 32,
    "hypercall.args": 40,
    "hypercall.ret": 88,
    "hypercall.flags": 96,
    "mmio.phys_addr": 32,
    "mmio.data": 40,
    "mmio.len": 48,
    "mmio.is_write": 52,
    "fail_entry.hardware_entry_failure_reason": 32,
    "fail_entry.cpu": 40,
    "internal.suberror": 32,
    "internal.ndata": 36,
    "internal.data": 40,
    "system_event.type": 32,
    "system_event.ndata": 36,
    "system_event.data": 40,
    "eoi.vector": 32,
    "msr.error": 32,
    "msr.reason": 40,
    "msr.index": 44,
    "msr.data": 48,
    "notify.flags": 32,
    "memory_fault.flags": 32,
    "memory_fault.gpa": 40,
    "memory_fault.size": 48,
    "tdx.flags": 32,
    "tdx.nr": 40,
    "tdx.unknown.ret": 48,
    "tdx.unknown.data": 56,
    "tdx.get_tdvmcall_info.ret": 48,
    "tdx.get_tdvmcall_info.leaf": 56,
    "tdx.get_tdvmcall_info.r11": 64,
    "tdx.get_tdvmcall_info.r12": 72,
    "tdx.get_tdvmcall_info.r13": 80,
    "tdx.get_tdvmcall_info.r14": 88,
    "tdx.get_quote.ret": 48,
    "tdx.get_quote.gpa": 56,
    "tdx.get_quote.size": 64,
    "tdx.setup_event_notify.ret": 48,
    "tdx.setup_event_notify.vector": 56,
    "tdx_v17.type": 32,
    "tdx_v17.pad": 36,
    "tdx_v17.vmcall.reg_mask": 40,
    "tdx_v17.vmcall.in_rcx": 40,
    "tdx_v17.vmcall.type": 48,
    "tdx_v17.vmcall.in_r10": 48,
    "tdx_v17.vmcall.subfunction": 56,
    "tdx_v17.vmcall.in_r11": 56,
    "tdx_v17.vmcall.in_r12": 64,
    "tdx_v17.vmcall.in_r13": 72,
    "tdx_v17.vmcall.in_r14": 80,
    "tdx_v17.vmcall.in_r15": 88,
    "tdx_v17.vmcall.in_rbx": 96,
    "tdx_v17.vmcall.in_rdi": 104,
    "tdx_v17.vmcall.in_rsi": 112,
    "tdx_v17.vmcall.in_r8": 120,
    "tdx_v17.vmcall.in_r9": 128,
    "tdx_v17.vmcall.in_rdx": 136,
    "tdx_v17.vmcall.status_code": 144,
    "tdx_v17.vmcall.out_r10": 144,
    "tdx_v17.vmcall.out_r11": 152,
    "tdx_v17.vmcall.out_r12": 160,
    "tdx_v17.vmcall.out_r13": 168,
    "tdx_v17.vmcall.out_r14": 176,
    "tdx_v17.vmcall.out_r15": 184,
    "tdx_v17.vmcall.out_rbx": 192,
    "tdx_v17.vmcall.out_rdi": 200,
    "tdx_v17.vmcall.out_rsi": 208,
    "tdx_v17.vmcall.out_r8": 216,
    "tdx_v17.vmcall.out_r9": 224,
    "tdx_v17.vmcall.out_rdx": 232,
}


@pytest.mark.parametrize(("layout", "size"), SIZES, ids=lambda value: getattr(value, "__name__", value))
def test_has_the_size_that_the_kernel_gives_it(layout: type[Any], size: int) -> None:
    assert ctypes.sizeof(layout) == size


@pytest.mark.parametrize(("layout", "offsets"), OFFSETS, ids=lambda value: getattr(value, "__name__", ""))
def test_has_every_field_where_the_kernel_has_it(layout: type[Any], offsets: dict[str, int]) -> None:
    assert {name: getattr(layout, name).offset for name in offsets} == offsets


def field_type(layout: Any, name: str) -> Any:
    """Return the ctypes type of `name`, looking through anonymous members."""
    for member in layout._fields_:
        if member[0] == name:
            return member[1]
    for anonymous in getattr(layout, "_anonymous_", ()):
        found = field_type(field_type(layout, anonymous), name)
        if found is not None:
            return found
    return None


@pytest.mark.parametrize(("path", "offset"), RUN_OFFSETS.items(), ids=RUN_OFFSETS)
def test_kvm_run_has_the_exit_field_at(path: str, offset: int) -> None:
    layout: Any = kvm_run.KvmRun
    position = 0
    for name in path.split("."):
        position += getattr(layout, name).offset
        layout = field_type(layout, name)
    assert position == offset


@pytest.mark.parametrize(
    ("layout", "offset", "entry_size"),
    [
        (tdx_mainline.KvmTdxCapabilities, 2056, 40),
        (tdx_mainline.KvmTdxInitVm, 264, 40),
        (tdx_v17.KvmTdxCapabilitiesV17, 2052, 24),
        (tdx_v17.KvmTdxInitVmV17, 8192, 40),
        (kvm_state.KvmMsrs, 8, 16),
        (kvm_state.KvmMsrList, 4, 4),
        (kvm.KvmIrqRouting, 8, 48),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_entries_begin_at(layout: type[Any], offset: int, entry_size: int) -> None:
    made = layout.allocate(3)
    assert ctypes.addressof(made.entries) - ctypes.addressof(made) == offset
    assert ctypes.sizeof(made) >= offset + 3 * entry_size
    assert len(made.entries) == made.capacity == made.count == 3
