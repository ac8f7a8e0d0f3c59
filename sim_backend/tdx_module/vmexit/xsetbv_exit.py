"""XSETBV in a TD.

Spec: TDX Module Base Spec, "Extended Feature Set Virtualization".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from sim_backend.hw.gprs import RAX, RCX, RDX, Gprs
from sim_backend.tdx_module.event_injection import inject_gp
from sim_backend.tdx_module.metadata_sys import capabilities_of
from sim_backend.tdx_module.outcome import Outcome
from sim_backend.tdx_module.td_params import is_xcr0_allowed

if TYPE_CHECKING:
    from sim_backend.tdx_module.module import TdxModule
    from sim_backend.tdx_module.tdvps import Tdvps

_LOW: Final = 0xFFFF_FFFF


def xsetbv_exit(module: TdxModule, lp: int, regs: Gprs, tdvps: Tdvps) -> Outcome:  # noqa: ARG001
    """Set XCR0 to a value that the CPU and XFAM allow; anything else is a #GP(0)."""
    cpu = tdvps.cpu
    assert cpu is not None, "a running vCPU has a CPU"
    gprs = cpu.gprs
    xcr0 = (gprs[RDX] & _LOW) << 32 | gprs[RAX] & _LOW
    supported = capabilities_of(module).xcr0_supported
    if gprs[RCX] & _LOW or not is_xcr0_allowed(xcr0, tdvps.tdr.tdcs.xfam, supported):
        inject_gp(tdvps)
        return Outcome.RESUME
    state = cpu.get_state()
    state.xcr0 = xcr0
    cpu.set_state(state)
    return Outcome.COMPLETED
