"""What a TD asks of KVM with TDG.VP.VMCALL: one file a sub-function, found by R11."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, TypeAlias

from sim_backend.kvm.tdx.tdvmcall.cpuid import tdvmcall_cpuid
from sim_backend.kvm.tdx.tdvmcall.get_quote import tdvmcall_get_quote
from sim_backend.kvm.tdx.tdvmcall.get_td_vmcall_info import tdvmcall_get_td_vmcall_info
from sim_backend.kvm.tdx.tdvmcall.hlt import tdvmcall_hlt
from sim_backend.kvm.tdx.tdvmcall.io import tdvmcall_io
from sim_backend.kvm.tdx.tdvmcall.map_gpa import tdvmcall_map_gpa
from sim_backend.kvm.tdx.tdvmcall.mmio import tdvmcall_mmio
from sim_backend.kvm.tdx.tdvmcall.msr import tdvmcall_rdmsr, tdvmcall_wrmsr
from sim_backend.kvm.tdx.tdvmcall.report_fatal_error import tdvmcall_report_fatal_error
from sim_backend.kvm.tdx.tdvmcall.setup_event_notify import tdvmcall_setup_event_notify_interrupt

if TYPE_CHECKING:
    from sim_backend.kvm.tdx.ops import TdxOps
    from sim_backend.kvm.vcpu import Vcpu

TdvmcallHandler: TypeAlias = "Callable[[TdxOps, Vcpu, list[int]], bool]"
"""Handles one TDVMCALL: True to enter the guest again, False when `kvm_run` tells user space what to do."""

INSTRUCTION_LEAVES: Final[Mapping[int, TdvmcallHandler]] = MappingProxyType(
    {
        10: tdvmcall_cpuid,
        12: tdvmcall_hlt,
        30: tdvmcall_io,
        31: tdvmcall_rdmsr,
        32: tdvmcall_wrmsr,
        48: tdvmcall_mmio,
        0x10000: tdvmcall_get_td_vmcall_info,
    }
)
"""Leaves that both dialects serve in the kernel; below 0x10000 they are VM-exit reasons."""

MAINLINE_LEAVES: Final[Mapping[int, TdvmcallHandler]] = MappingProxyType(
    {
        **INSTRUCTION_LEAVES,
        0x10001: tdvmcall_map_gpa,
        0x10002: tdvmcall_get_quote,
        0x10003: tdvmcall_report_fatal_error,
        0x10004: tdvmcall_setup_event_notify_interrupt,
    }
)
