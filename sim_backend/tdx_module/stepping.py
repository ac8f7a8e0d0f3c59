"""Defence against zero-stepping: a host that keeps a vCPU faulting at one instruction is made to stop.

More than six EPT violations on private GPAs at one RIP start a list of the GPAs; while one of them would still fault,
TDH.VP.ENTER does not enter the TD but reports that fault. The single-step defence (the module steps 1 to 32
instructions before it lets an early interrupt out) is not modelled: the exit comes at once.

Spec: TDX Module Base Spec, "Single-Step and Zero-Step Attack Detection and Mitigation".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from sim_backend.cpu.engine import ExitReason
from sim_backend.tdx_module.sept import walk_to_leaf
from sim_backend.tdx_module.sept_states import PS, RWX
from sim_backend.tdx_module.td_vmcs import INTERRUPTIBILITY

if TYPE_CHECKING:
    from sim_backend.tdx_module.module import TdxModule
    from sim_backend.tdx_module.tdvps import Tdvps

_EPF_THRESHOLD: Final = 6
_GPA_LIST_SIZE: Final = 32
_NOTIFY_EPT_FAULTS: Final = 1 << 0  # TDCS.NOTIFY_ENABLES
_EPT_VIOLATION: Final = int(ExitReason.EPT_VIOLATION)
_NMI_UNBLOCKED: Final = 1 << 12  # in the exit qualification
_BLOCKING_BY_NMI: Final = 1 << 3


def reset(tdvps: Tdvps) -> None:
    """Forget the faults: the guest made progress."""
    tdvps.last_epf_gpa_list_idx = 0
    tdvps.possibly_epf_stepping = 0


def log_ept_violation(tdvps: Tdvps, gpa: int) -> None:
    """Count an EPT violation on a private GPA that is about to exit to the host."""
    assert tdvps.cpu is not None, "a running vCPU has a CPU"
    if tdvps.cpu.rip != tdvps.rip_on_entry:
        reset(tdvps)
    if tdvps.possibly_epf_stepping < _EPF_THRESHOLD:
        tdvps.possibly_epf_stepping += 1
        return
    count = tdvps.last_epf_gpa_list_idx
    if count < _GPA_LIST_SIZE and gpa not in tdvps.last_epf_gpa_list[:count]:
        tdvps.last_epf_gpa_list[count] = gpa
        tdvps.last_epf_gpa_list_idx = count + 1


def expected_fault(module: TdxModule, tdvps: Tdvps) -> int | None:
    """Return a listed GPA that the guest still cannot read, write and execute, or None. A pending page counts."""
    tdcs = tdvps.tdr.tdcs
    for gpa in tdvps.last_epf_gpa_list[: tdvps.last_epf_gpa_list_idx]:
        index, _ = walk_to_leaf(module.q, tdcs, gpa)
        entry = module.q[index]
        if not entry & PS or entry & RWX != RWX:
            return gpa
    return None


def is_to_be_notified(tdvps: Tdvps) -> bool:
    """Tell whether the guest asked to hear of a suspected attack, and may get a #VE now."""
    tdcs = tdvps.tdr.tdcs
    assert tdvps.cpu is not None, "an initialised vCPU has a CPU"
    last = tdvps.cpu.exit
    return bool(
        tdcs.notify_enables & _NOTIFY_EPT_FAULTS
        and last.reason & 0xFFFF == _EPT_VIOLATION
        and not last.gpa >> tdcs.shared_bit & 1
        and not last.qualification & _NMI_UNBLOCKED
        and not tdvps.vmcs.get(INTERRUPTIBILITY, 0) & _BLOCKING_BY_NMI
        and not tdvps.ve_info.valid
    )
