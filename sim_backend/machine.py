"""A simulated TDX host, wired and booted: hardware, TDX module, KVM. The only file that knows them all.

What a real host does at boot is done here with real SEAMCALLs: SYS.INIT, LP.INIT on every LP, SYS.CONFIG with
TDMRs whose PAMTs lie in reserved areas at their own ends (as `arch/x86/virt/vmx/tdx/tdx.c` lays them out),
KEY.CONFIG on every package, TDMR.INIT.
"""

import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from sim_backend.cpu.engine import Cpu, CpuFactory
from sim_backend.cpu.unicorn_engine import UnicornEngine, ensure_self_tested
from sim_backend.faults import Fault, FaultError, Faults, FaultySeam
from sim_backend.hw.gprs import R8, RAX, RCX, RDX, Gprs, new_gprs
from sim_backend.hw.memory import PAGE_SIZE, PhysicalMemory
from sim_backend.hw.platform import MSR_IA32_MKTME_KEYID_PARTITIONING, Platform, load_platform
from sim_backend.kernel import SimKernel
from sim_backend.kvm.default_vm import DefaultVmOps, SwProtectedVmOps
from sim_backend.kvm.host import KvmHost
from sim_backend.kvm.host_pages import HostPages
from sim_backend.kvm.lp_pool import LpPool
from sim_backend.kvm.ops import VmOpsFactory
from sim_backend.kvm.profile import HostProfile, load_profile
from sim_backend.kvm.seam import Seam
from sim_backend.kvm.tdx.ops import tdx_ops_factory
from sim_backend.kvm.tdx.tdx_host import KeyIds, TdxHost
from sim_backend.kvm.vcpu import Vcpu
from sim_backend.oracle import CheckedKernel, Oracle
from sim_backend.seam_port import SeamPort
from sim_backend.tdx_module.module import TdxModule
from sim_backend.tdx_module.profile import load_profile as load_module_profile
from uapi_ctypes.tdx_leaves import SeamcallLeaf
from uapi_ctypes.tdx_status import describe

GIB: Final = 1 << 30
_LOW_RAM_END: Final = 3 * GIB  # the PCI hole, SEAMRR and SMRR follow, up to 4 GiB
_SYS_CONFIG_AREA: Final = 16 << 20  # HPA of the TDMR_INFO array: below the first TDMR
_TDMR_INFO_BYTES: Final = 512


class BootError(Exception):
    """The simulated host cannot come up as described; the message says which step and why."""


@dataclass(frozen=True, slots=True)
class TdmrLayout:
    """One TDMR with its PAMTs in reserved areas at its end. Addresses and sizes in bytes."""

    base: int
    size: int
    pamt: tuple[tuple[int, int], ...]  # (base, size) of the 1 GiB, 2 MiB and 4 KiB tables

    @property
    def pamt_start(self) -> int:
        """HPA where usable memory ends."""
        return min(base for base, _ in self.pamt)

    def info(self) -> bytes:
        """Return the 512-byte TDMR_INFO structure."""
        words = [self.base, self.size]
        for base, size in self.pamt:
            words += [base, size]
        words += [self.pamt_start - self.base, self.base + self.size - self.pamt_start]
        return struct.pack(f"<{len(words)}Q", *words).ljust(_TDMR_INFO_BYTES, b"\0")


def tdmr_layout(base: int, size: int, entry_bytes: int) -> TdmrLayout:
    """Lay out the TDMR [base, base + size), both multiples of 1 GiB, with `entry_bytes` a PAMT entry."""
    end = base + size
    pamt = []
    for page_bytes in (GIB, 2 << 20, PAGE_SIZE):
        table_bytes = -(-(size // page_bytes) * entry_bytes // PAGE_SIZE) * PAGE_SIZE
        end -= table_bytes
        pamt.append((end, table_bytes))
    return TdmrLayout(base, size, tuple(pamt))


class Machine:
    """One simulated host, up and ready for `kernel().open("/dev/kvm")`."""

    def __init__(
        self, profile: HostProfile, *, oracle: bool = False, faults: "Iterable[Fault | str] | None" = None
    ) -> None:
        """Boot; raise `BootError` where the module or KVM refuses the machine, `FaultError` for a fault it cannot have.

        With `oracle`, KVM and the module are compared after every system call. `faults` makes `Machine.faults`
        available and arms these once the machine is up; None leaves SEAMCALLs the short way.
        """
        self.profile: Final = profile
        ensure_self_tested()
        ram_bytes = profile.ram_bytes
        self.platform: Final[Platform] = load_platform(
            "golden",
            lps=profile.n_cpus,
            packages=profile.packages,
            ram_bytes=ram_bytes,
            cmrs=list(_cmrs(ram_bytes)),
        )
        shared_keyids = self.platform.keyids.num_mktme
        self.platform.wrmsr(MSR_IA32_MKTME_KEYID_PARTITIONING, profile.private_hkids << 32 | shared_keyids)
        self.memory: Final = PhysicalMemory(max(ram_bytes, 4 * GIB))
        self.cpus: Final[CpuFactory] = UnicornEngine(self.memory)
        self.lps: Final = LpPool(profile.n_cpus)
        self.module: Final[TdxModule | None] = None if profile.tdx_module == "none" else self._load_module()
        tdmrs = list(_tdmr_layouts(ram_bytes))
        self.pages: Final = HostPages(self.memory, [(tdmr.base, tdmr.pamt_start) for tdmr in tdmrs])
        self.seam: Final = SeamPort(self.module) if self.module is not None else None
        vm_types: dict[str, VmOpsFactory] = {"default": DefaultVmOps, "sw_protected": SwProtectedVmOps}
        self.tdx: TdxHost | None = None
        self.faults: Faults | None = None
        if self.module is not None and self.seam is not None:
            self._bring_up(self.module, self.seam, tdmrs)
            seam: Seam = self.seam
            if faults is not None:
                seam = faulty = FaultySeam(self.seam)
                self.faults = Faults(self, faulty)
            self.tdx = TdxHost(
                profile,
                seam,
                self.memory,
                self.pages,
                self.lps,
                KeyIds(self.platform.keyids.first_private, profile.private_hkids, self.platform.keyids.start_bit),
            )
            vm_types["tdx"] = tdx_ops_factory(self.tdx)
        self.host: Final = KvmHost(
            profile=profile,
            memory=self.memory,
            pages=self.pages,
            cpus=self.cpus,
            seam=self.seam,
            lps=self.lps,
            vm_types={number: vm_types[kind] for number, kind in profile.vm_types.items() if kind in vm_types},
        )
        self._kernel: SimKernel | None = None
        self.oracle: Final = Oracle(self.host, self.tdx, self.module) if oracle else None
        if faults is not None:
            if self.faults is None:
                raise FaultError(f"profile {profile.name} has no TDX module: faults need one")
            self.faults.inject_all(faults)

    def _load_module(self) -> TdxModule:
        module_profile = load_module_profile(self.profile.tdx_module)
        return TdxModule(self.platform, self.memory, module_profile, self.cpus)

    def _bring_up(self, module: TdxModule, seam: SeamPort, tdmrs: list[TdmrLayout]) -> None:
        leaf = SeamcallLeaf
        first_lp_of_package = {lp.package: lp.index for lp in reversed(self.platform.lps)}
        _expect_success(seam, 0, leaf.TDH_SYS_INIT)
        for lp in self.platform.lps:
            _expect_success(seam, lp.index, leaf.TDH_SYS_LP_INIT)
        for index, tdmr in enumerate(tdmrs):
            info = _SYS_CONFIG_AREA + PAGE_SIZE + index * _TDMR_INFO_BYTES
            self.memory.write(info, tdmr.info())
            self.memory.q[(_SYS_CONFIG_AREA >> 3) + index] = info
        global_hkid = self.platform.keyids.first_private
        _expect_success(seam, 0, leaf.TDH_SYS_CONFIG, rcx=_SYS_CONFIG_AREA, rdx=len(tdmrs), r8=global_hkid)
        for lp_index in first_lp_of_package.values():
            _expect_success(seam, lp_index, leaf.TDH_SYS_KEY_CONFIG)
        for tdmr in tdmrs:
            module.tdmr_init_all(tdmr.base)

    def kernel(self) -> SimKernel:
        """Return the system-call interface of this host."""
        if self._kernel is None:
            oracle = self.oracle
            self._kernel = SimKernel(self.host) if oracle is None else CheckedKernel(self.host, oracle)
            self._kernel.protected_cpu = self._protected_cpu
        return self._kernel

    def _protected_cpu(self, vcpu: Vcpu) -> Cpu | None:
        """Find the CPU of a TD's vCPU in the module, for a failure message."""
        tdvps = self.module.tdvpses.get(getattr(vcpu.vendor, "tdvpr", 0)) if self.module is not None else None
        return tdvps.cpu if tdvps is not None else None

    @property
    def free_hkids(self) -> int:
        """How many HKIDs a new TD could get."""
        return self.tdx.hkids.available if self.tdx is not None else 0

    def leftovers(self) -> list[str]:
        """Say what is still held once everything should be closed: fds, VMs, pages, HKIDs, TDs in the module."""
        found = []
        if self._kernel is not None and self._kernel.fds.files:
            found.append(f"{len(self._kernel.fds.files)} open file descriptors")
        if self.host.vms:
            found.append(f"{len(self.host.vms)} VMs in KVM")
        if self.pages.in_use:
            found.append(f"{self.pages.in_use} host pages")
        if self.tdx is not None and self.tdx.hkids.available != self.tdx.hkids.count:
            found.append(f"{self.tdx.hkids.count - self.tdx.hkids.available} HKIDs")
        if self.module is not None:
            if self.module.tdrs:
                found.append(f"{len(self.module.tdrs)} TDs in the TDX module")
            if self.module.tdvpses:
                found.append(f"{len(self.module.tdvpses)} vCPUs in the TDX module")
        return found

    def provenance(self) -> Mapping[str, Any]:
        """Say what this machine stands for, and what of it was never checked against a real one."""
        facts: dict[str, Any] = {
            "backend": "sim",
            "profile": self.profile.name,
            "dialect": self.profile.dialect if self.module is not None else "none",
            "kernel": f"simulated {self.profile.kernel_release}",
            "cpu": "simulated Intel Xeon (Sapphire Rapids, family 6 model 143)",
            "microcode": "none",
        }
        if self.module is not None:
            module = self.module.profile
            facts["tdx_module"] = module.name
            facts["tdx_module_version"] = f"{module.major_version}.{module.minor_version}.{module.update_version:02}"
            facts["tdx_module_exact"] = module.exact
            facts["tdx_module_additions"] = [addition.what for addition in module.additions]
        return facts

    def shutdown(self) -> None:
        """Close what is still open and give the memory back."""
        if self._kernel is not None:
            for fd in list(self._kernel.fds.files):
                self._kernel.close(fd)
        self.memory.close()


def boot(
    profile: str = "mainline",
    *,
    oracle: bool = False,
    faults: "Iterable[Fault | str] | None" = None,
    **overrides: Any,
) -> Machine:
    """Boot the host profile of that name, single keys of it replaced (``ram_bytes=512 << 30``); see `Machine`."""
    return Machine(load_profile(profile, **overrides), oracle=oracle, faults=faults)


def _cmrs(ram_bytes: int) -> Iterator[tuple[int, int]]:
    yield 1 << 20, min(ram_bytes, _LOW_RAM_END) - (1 << 20)
    if ram_bytes > 4 * GIB:
        yield 4 * GIB, ram_bytes - 4 * GIB


def _tdmr_layouts(ram_bytes: int) -> Iterator[TdmrLayout]:
    """Cover all whole gigabytes from 1 GiB on; the first stays with the host."""
    for start, end in ((GIB, min(ram_bytes, _LOW_RAM_END)), (4 * GIB, ram_bytes)):
        size = (end - start) // GIB * GIB
        if size > 0:
            yield tdmr_layout(start, size, entry_bytes=16)


def _expect_success(seam: SeamPort, lp: int, leaf: SeamcallLeaf, *, rcx: int = 0, rdx: int = 0, r8: int = 0) -> Gprs:
    regs = new_gprs()
    regs[RAX], regs[RCX], regs[RDX], regs[R8] = leaf, rcx, rdx, r8
    seam.seamcall(lp, regs)
    if regs[RAX]:
        raise BootError(f"{leaf.name} on LP {lp}: {describe(regs[RAX])}")
    return regs
