"""What the binding says of each structure that it shares with the kernel, in both dialects.

A field that C names differently, or only the binding has, is named here; everything else is compared by its name.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Final

from tdxhw.abi.layout import Field, Layout, of_ctypes
from uapi_ctypes import kvm, kvm_run, kvm_state, tdx_mainline, tdx_v17
from uapi_ctypes.flexible import Flexible

_PADDING: Final = re.compile(r"(^|\.)(pad|padding|reserved)\d*$")


@dataclass(frozen=True, slots=True)
class Bound:
    """A kernel structure and the class that stands for it."""

    name: str  # "kvm_tdx_cmd"
    structure: type[Any]
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Path here: path in the kernel."""
    ours: tuple[str, ...] = ()
    """Paths that only the binding has, and all below them."""
    also: Mapping[str, str] = field(default_factory=dict)
    """Path: what the kernel calls it in its own code (``#ifdef __KERNEL__``)."""
    open_ended: bool = False
    """Whether the kernel's own code has something behind the end that user space sees."""
    may_lack: str = ""
    """Why a kernel of this dialect may do without it; nothing for what each has."""

    def layout(self) -> Layout:
        """Return the layout under the kernel's names."""
        layout = of_ctypes(self.structure)
        fields = {
            self._kernel_path(path): where
            for path, where in layout.fields.items()
            if not any(path == mine or path.startswith(f"{mine}.") for mine in self.ours)
        }
        return Layout(layout.size, fields)

    def _kernel_path(self, path: str) -> str:
        for mine, theirs in self.aliases.items():
            if path == mine or path.startswith(f"{mine}."):
                return theirs + path[len(mine) :]
        return path

    def entries_offset(self) -> int | None:
        """Return where the flexible array begins [bytes], None for a structure of fixed size."""
        if not issubclass(self.structure, Flexible):
            return None
        return self.structure._offset()  # noqa: SLF001 (the binding's own rule)


def is_padding(path: str) -> bool:
    """Whether the field means nothing, so that a newer kernel may put something there."""
    return _PADDING.search(path) is not None


def free_space(layout: Layout) -> list[Field]:
    """Return where the binding has padding and nothing else: the padding of a union makes it long, not free."""
    taken = [where for path, where in layout.fields.items() if not is_padding(path)]
    return [
        where
        for path, where in layout.fields.items()
        if is_padding(path) and "." not in path and not any(_overlap(where, one) for one in taken)
    ]


def _overlap(one: Field, other: Field) -> bool:
    return one.offset < other.offset + other.size and other.offset < one.offset + one.size


_RUN_ALIASES: Final = {
    # C wraps the architecture's part once more.
    "debug.exception": "debug.arch.exception",
    "debug.pad": "debug.arch.pad",
    "debug.pc": "debug.arch.pc",
    "debug.dr6": "debug.arch.dr6",
    "debug.dr7": "debug.arch.dr7",
}
_RUN_ALSO: Final = {"immediate_exit": "immediate_exit__unsafe"}
_V17_RUN_ALIASES: Final = {**_RUN_ALIASES, "tdx_v17.vmcall": "tdx.u.vmcall", "tdx_v17": "tdx"}

_BOTH: Final = (
    Bound("kvm_userspace_memory_region", kvm.KvmUserspaceMemoryRegion),
    Bound("kvm_userspace_memory_region2", kvm.KvmUserspaceMemoryRegion2),
    Bound("kvm_enable_cap", kvm.KvmEnableCap),
    Bound("kvm_regs", kvm_state.KvmRegs),
    Bound("kvm_segment", kvm_state.KvmSegment),
    Bound("kvm_dtable", kvm_state.KvmDtable),
    Bound("kvm_sregs", kvm_state.KvmSregs),
    Bound("kvm_sregs2", kvm_state.KvmSregs2),
    Bound("kvm_fpu", kvm_state.KvmFpu),
    Bound("kvm_lapic_state", kvm_state.KvmLapicState),
    Bound("kvm_xsave", kvm_state.KvmXsave),
    Bound("kvm_xcr", kvm_state.KvmXcr),
    Bound("kvm_xcrs", kvm_state.KvmXcrs),
    Bound("kvm_debugregs", kvm_state.KvmDebugregs),
    Bound("kvm_mp_state", kvm_state.KvmMpState),
    Bound("kvm_vcpu_events", kvm_state.KvmVcpuEvents),
    Bound("kvm_interrupt", kvm_state.KvmInterrupt),
    Bound("kvm_translation", kvm_state.KvmTranslation),
    Bound("kvm_tpr_access_ctl", kvm_state.KvmTprAccessCtl),
    Bound("kvm_vapic_addr", kvm_state.KvmVapicAddr),
    Bound("kvm_guest_debug", kvm_state.KvmGuestDebug, {"debugreg": "arch.debugreg"}),
    Bound("kvm_x86_mce", kvm_state.KvmX86Mce),
    Bound("kvm_one_reg", kvm_state.KvmOneReg, may_lack="x86 has KVM_GET_ONE_REG only in newer kernels"),
    Bound("kvm_cpuid_entry", kvm_state.KvmCpuidEntry),
    Bound("kvm_cpuid", kvm_state.KvmCpuid),
    Bound("kvm_cpuid_entry2", kvm_state.KvmCpuidEntry2),
    Bound("kvm_cpuid2", kvm_state.KvmCpuid2),
    Bound("kvm_msr_entry", kvm_state.KvmMsrEntry),
    Bound("kvm_msrs", kvm_state.KvmMsrs),
    Bound("kvm_msr_list", kvm_state.KvmMsrList),
    Bound("kvm_signal_mask", kvm_state.KvmSignalMask),
    Bound("kvm_nested_state", kvm_state.KvmNestedState),
    Bound("kvm_irq_level", kvm.KvmIrqLevel),
    Bound("kvm_msi", kvm.KvmMsi),
    Bound("kvm_irqchip", kvm.KvmIrqchip),
    Bound("kvm_irqfd", kvm.KvmIrqfd),
    Bound("kvm_ioeventfd", kvm.KvmIoeventfd),
    Bound("kvm_irq_routing_entry", kvm.KvmIrqRoutingEntry),
    Bound("kvm_irq_routing", kvm.KvmIrqRouting),
    Bound("kvm_pit_config", kvm.KvmPitConfig),
    Bound("kvm_pit_channel_state", kvm.KvmPitChannelState),
    Bound("kvm_pit_state2", kvm.KvmPitState2),
    Bound("kvm_reinject_control", kvm.KvmReinjectControl),
    Bound("kvm_dirty_log", kvm.KvmDirtyLog),
    Bound("kvm_clear_dirty_log", kvm.KvmClearDirtyLog),
    Bound("kvm_clock_data", kvm.KvmClockData),
    Bound("kvm_create_device", kvm.KvmCreateDevice),
    Bound("kvm_device_attr", kvm.KvmDeviceAttr),
    Bound("kvm_coalesced_mmio_zone", kvm.KvmCoalescedMmioZone),
    Bound("kvm_msr_filter_range", kvm.KvmMsrFilterRange),
    Bound("kvm_msr_filter", kvm.KvmMsrFilter),
    Bound("kvm_pmu_event_filter", kvm.KvmPmuEventFilter),
    Bound("kvm_enc_region", kvm.KvmEncRegion),
    Bound("kvm_stats_header", kvm.KvmStatsHeader),
    Bound("kvm_stats_desc", kvm.KvmStatsDesc, ours=("name",), open_ended=True),
    Bound("kvm_sync_regs", kvm_run.KvmSyncRegs),
)

_PRIVATE_MEMORY: Final = (
    Bound("kvm_create_guest_memfd", kvm.KvmCreateGuestMemfd),
    Bound("kvm_memory_attributes", kvm.KvmMemoryAttributes),
)

TDX: Final[Mapping[str, tuple[Bound, ...]]] = {
    "mainline": (
        Bound("kvm_tdx_cmd", tdx_mainline.KvmTdxCmd),
        Bound("kvm_tdx_capabilities", tdx_mainline.KvmTdxCapabilities),
        Bound("kvm_tdx_init_vm", tdx_mainline.KvmTdxInitVm),
        Bound("kvm_tdx_init_mem_region", tdx_mainline.KvmTdxInitMemRegion),
        *_PRIVATE_MEMORY,
    ),
    "v17": (
        Bound("kvm_tdx_cmd", tdx_v17.KvmTdxCmdV17, ours=("hw_error",)),
        Bound("kvm_tdx_capabilities", tdx_v17.KvmTdxCapabilitiesV17),
        Bound("kvm_tdx_cpuid_config", tdx_v17.KvmTdxCpuidConfig),
        Bound("kvm_tdx_init_vm", tdx_v17.KvmTdxInitVmV17),
        Bound("kvm_tdx_init_mem_region", tdx_v17.KvmTdxInitMemRegion),
        *_PRIVATE_MEMORY,
    ),
}
"""What a TD needs, by dialect. A kernel without TDX need not have them."""

KVM: Final[Mapping[str, tuple[Bound, ...]]] = {
    "mainline": (
        Bound("kvm_run", kvm_run.KvmRun, _RUN_ALIASES, ours=("tdx_v17",), also=_RUN_ALSO),
        Bound("kvm_pre_fault_memory", kvm.KvmPreFaultMemory),
        *_BOTH,
    ),
    "v17": (Bound("kvm_run", kvm_run.KvmRun, _V17_RUN_ALIASES, ours=("tdx",), also=_RUN_ALSO), *_BOTH),
}
"""The structures that every KVM of the dialect's age has."""

WITHOUT_TDX: Final = (Bound("kvm_run", kvm_run.KvmRun, _RUN_ALIASES, ours=("tdx", "tdx_v17"), also=_RUN_ALSO), *_BOTH)
"""The structures of a KVM that has no TDX at all."""


@dataclass(frozen=True, slots=True)
class BoundEnumeration:
    """A kernel enumeration and the class that stands for it."""

    name: str  # "kvm_tdx_cmd_id"
    values: type[IntEnum]


COMMANDS: Final[Mapping[str, BoundEnumeration]] = {
    "mainline": BoundEnumeration("kvm_tdx_cmd_id", tdx_mainline.KvmTdxCmdId),
    "v17": BoundEnumeration("kvm_tdx_cmd_id", tdx_v17.KvmTdxCmdIdV17),
}
"""The numbers of KVM_MEMORY_ENCRYPT_OP's sub-commands, by dialect: the only enumeration that the binding shares.

Requests, capabilities, exit reasons and flags are macros of the kernel's headers; no type information has those.
"""

NOT_CHECKED: Final = {
    "kvm_sev_cmd": "of kvm-amd; the binding has it only to tell SEV's sub-commands from TDX's",
}
"""Structures of the binding that a TDX kernel need not describe, and why."""
