"""NMIs that the host asks the module to inject: TDVPS.PEND_NMI.

Spec: TDX Module Base Spec, "Virtual NMI Injection".
"""

from collections.abc import Callable

from sim_backend.tdx_module.event_injection import inject_nmi
from sim_backend.tdx_module.td_vmcs import PROC_CONTROLS, PROC_NMI_WINDOW
from sim_backend.tdx_module.tdvps import Tdvps


def _request_window(tdvps: Tdvps, *, wanted: bool) -> bool:
    """Ask for an NMI_WINDOW exit, or take the request back; return False from a CPU that has no such exit."""
    # The exit is an extension of `Cpu`: an engine that does not track NMI blocking leaves it out.
    request: Callable[[bool], None] | None = getattr(tdvps.cpu, "request_nmi_window", None)
    if request is None:
        return False
    request(wanted)
    return True


def arm_window(tdvps: Tdvps) -> None:
    """Set NMI-window exiting. A CPU without the exit takes the NMI at once: it does not track NMI blocking."""
    tdvps.vmcs[PROC_CONTROLS] |= PROC_NMI_WINDOW
    if not _request_window(tdvps, wanted=True):
        deliver(tdvps)


def deliver(tdvps: Tdvps) -> None:
    """Inject the pending NMI, unless the guest has a #VE to read first; clear NMI-window exiting."""
    if tdvps.pend_nmi and not tdvps.ve_info.valid:
        inject_nmi(tdvps)
        tdvps.pend_nmi = 0
    tdvps.vmcs[PROC_CONTROLS] &= ~PROC_NMI_WINDOW
    _request_window(tdvps, wanted=False)
