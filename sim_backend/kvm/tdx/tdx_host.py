"""The host-wide part of KVM's TDX support: the module's metadata, the key ids, the packages, cache rules."""

import errno
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeAlias

from sim_backend.hw.gprs import Gprs
from sim_backend.hw.memory import PhysicalMemory
from sim_backend.kvm.errors import Errno
from sim_backend.kvm.host_pages import HostPages
from sim_backend.kvm.lp_pool import LpPool
from sim_backend.kvm.profile import HostProfile
from sim_backend.kvm.seam import Seam
from sim_backend.kvm.tdx.hkid import HkidPool
from sim_backend.kvm.tdx.seamcalls import Seamcalls
from sim_backend.kvm.tdx.sysinfo import (
    FEATURE_NO_RBP_MOD,
    FEATURE_TOPOLOGY_ENUM,
    TdxSysInfo,
    TdxUnavailable,
    read_sysinfo,
)
from sim_backend.kvm.tdx.td_control import flush_vcpu

if TYPE_CHECKING:
    from sim_backend.kvm.tdx.ops import TdxOps

AddAndExtend: TypeAlias = Callable[[int, Gprs], None]
"""TDH.MEM.PAGE.ADD on an LP with the registers given and, when it succeeds, TDH.MR.EXTEND of all chunks."""

KVM_SUPPORTED_XSS: Final = 3 << 11  # CET; supervisor states that KVM_GET_SUPPORTED_CPUID shows may be more
KVM_SUPPORTED_TD_ATTRIBUTES: Final = 1 << 28  # SEPT_VE_DISABLE


@dataclass(frozen=True, slots=True)
class KeyIds:
    """How this machine splits its KeyIDs: TDX's begin at `global_hkid`, which encrypts TDRs itself."""

    global_hkid: int
    private_hkids: int  # how many private ones there are, the global one included
    hkid_shift: int  # [bits] position of the KeyID in a physical address


class TdxHost:
    """What is common to all TDs of a host. Made once, after the module has been brought up."""

    def __init__(
        self,
        profile: HostProfile,
        seam: Seam,
        memory: PhysicalMemory,
        pages: HostPages,
        lps: LpPool,
        key_ids: KeyIds,
    ) -> None:
        self.profile: Final = profile
        self.seam: Final = seam
        self.memory: Final = memory
        self.pages: Final = pages
        self.lps: Final = lps
        self.seamcalls: Final = Seamcalls(seam)
        # A platform may take PAGE.ADD and its sixteen MR.EXTENDs in one go: same results, fewer calls.
        self.add_and_extend: Final[AddAndExtend | None] = getattr(seam, "mem_page_add_extend", None)
        self.key_ids: Final = key_ids
        self.hkids: Final = HkidPool(key_ids.global_hkid + 1, key_ids.private_hkids - 1)
        self.misc_cg_max: int | None = None  # key ids that user space's misc control group may have, None: any
        self.tds: Final[list[TdxOps]] = []
        self.is_v17: Final = profile.dialect == "v17"
        lp = lps.get()
        try:
            self.sysinfo: Final[TdxSysInfo] = read_sysinfo(self.seamcalls, lp)
        finally:
            lps.put()
        xcr0, xss = _supported_xstate(profile)
        self.supported_xcr0: Final = xcr0
        self.supported_xss: Final = xss
        if not self.is_v17:
            self._check_mainline_requirements()

    def _check_mainline_requirements(self) -> None:
        features = self.sysinfo.features0
        for bit, name in ((FEATURE_NO_RBP_MOD, "NO_RBP_MOD"), (FEATURE_TOPOLOGY_ENUM, "TOPOLOGY_ENUM")):
            if not features & bit:
                raise TdxUnavailable(f"the TDX module does not support {name}, which KVM requires")
        if not self.supported_attributes or not self.supported_xfam:
            raise TdxUnavailable("the TDX module fixes attributes or XFAM bits that KVM does not support")

    @property
    def supported_attributes(self) -> int:
        """TD attributes that a TD may have; 0 when the module insists on one that KVM does not know.

        Zero cannot mean "none": KVM always supports SEPT_VE_DISABLE where the module does.
        """
        info = self.sysinfo
        if KVM_SUPPORTED_TD_ATTRIBUTES & info.attributes_fixed1 != info.attributes_fixed1:
            return 0
        return KVM_SUPPORTED_TD_ATTRIBUTES & info.attributes_fixed0

    @property
    def supported_xfam(self) -> int:
        """XFAM bits that a TD may have; 0 when the module insists on one that the host lacks."""
        info = self.sysinfo
        supported = self.supported_xcr0 | self.supported_xss
        if supported & info.xfam_fixed1 != info.xfam_fixed1:
            return 0
        return supported & info.xfam_fixed0

    def package_lps(self) -> list[int]:
        """Return one online LP of each package; -1 for a package that has none."""
        per_package = self.profile.n_cpus // self.profile.packages
        result = []
        for package in range(self.profile.packages):
            first = package * per_package
            online = [lp for lp in range(first, first + per_package) if self.lps.online[lp]]
            result.append(online[0] if online else -1)
        return result

    def offline_cpu(self, lp: int) -> None:
        """Take the processor `lp` away, its vCPUs flushed (`tdx_offline_cpu()`).

        Raise ``Errno(EBUSY)`` for the last one of a package while a TD exists: keys are freed package by package.
        """
        per_package = self.profile.n_cpus // self.profile.packages
        first = lp // per_package * per_package
        others = [other for other in range(first, first + per_package) if other != lp and self.lps.online[other]]
        if not others and any(ops.td.hkid for ops in self.tds):
            raise Errno(errno.EBUSY)
        self.lps.set_online(lp, False)
        for ops in self.tds:
            for vcpu in ops.vm.vcpus:
                if vcpu.vendor.associated_lp == lp:
                    flush_vcpu(ops, vcpu)

    def keyed(self, hpa: int, hkid: int) -> int:
        """Return the physical address of `hpa` under `hkid`."""
        return hpa | hkid << self.key_ids.hkid_shift


def _supported_xstate(profile: HostProfile) -> tuple[int, int]:
    """Return the (XCR0, XSS) bits of the host that KVM can virtualise, whatever a process has to ask for first."""
    xss = 0
    for entry in profile.supported_cpuid:
        if entry.function == 0xD and entry.index == 1:
            xss = (entry.ecx | entry.edx << 32) & KVM_SUPPORTED_XSS
    return profile.xcomp_guest_supported, xss
