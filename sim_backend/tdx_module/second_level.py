"""Address translation of a TD, for its CPU: private GPAs through the Secure EPT, shared ones through the shared EPT.

Spec: TDX Module Base Spec, "Secure EPT and Shared EPT"; Intel SDM Vol. 3, "Convertible EPT Violations".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from sim_backend.cpu.engine import ExitReason
from sim_backend.cpu.ept import HPA_MASK, RWX, SUPPRESS_VE, EptMisconfiguration, page_of, walk
from sim_backend.tdx_module.not_modelled import NotModelled
from sim_backend.tdx_module.td_vmcs import SHARED_EPTP

if TYPE_CHECKING:
    from sim_backend.tdx_module.module import TdxModule
    from sim_backend.tdx_module.tdvps import Tdvps

_EPT_VIOLATION: Final = int(ExitReason.EPT_VIOLATION)
NOT_PRESENT: Final = SUPPRESS_VE
"""What a translation that has nothing to do with a page of its own comes to: a plain EPT violation."""


class TdSecondLevel:
    """Implements `cpu.engine.SecondLevel` for one vCPU."""

    __slots__ = ("_hpa_mask", "_q", "_tdcs", "_tdvps")

    def __init__(self, module: TdxModule, tdvps: Tdvps) -> None:
        self._q = module.q
        self._hpa_mask = HPA_MASK & ~module.hkid_mask
        self._tdvps = tdvps
        self._tdcs = tdvps.tdr.tdcs

    def walk(self, gpa: int) -> int:
        """Return the leaf entry for the 4 KiB page of `gpa`; see the protocol."""
        tdcs = self._tdcs
        above = gpa >> tdcs.shared_bit
        if not above:
            root = tdcs.sept_root
        elif above == 1:
            root = self._tdvps.vmcs[SHARED_EPTP] & self._hpa_mask
        else:
            return NOT_PRESENT  # beyond GPAW: the module turns the violation into a #PF
        try:
            entry, level, access = walk(self._q, root, tdcs.pwl, gpa, self._hpa_mask)
        except EptMisconfiguration as error:
            raise NotModelled(f"an EPT misconfiguration exit ({error})") from None
        suppress_ve = entry & SUPPRESS_VE if above else SUPPRESS_VE
        if not access:
            return suppress_ve
        return page_of(entry, level, gpa, self._hpa_mask) | access & RWX | suppress_ve

    def deliver_ve(self, qualification: int, gla: int, gpa: int) -> bool:
        """Store the information of an EPT-violation #VE; False when the guest has not read the last one."""
        ve_info = self._tdvps.ve_info
        if ve_info.valid:
            return False
        ve_info.set(_EPT_VIOLATION, qualification, gla, gpa)
        return True
