"""A minimal host above the TDX module: brings it up and builds TDs with nothing but SEAMCALLs.

For measuring, benchmarks and tests, where a KVM model would be in the way. Every call goes through `SeamcallHost.call`,
which raises on a status that the caller did not expect.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from struct import Struct
from typing import Final

from sim_backend.hw.gprs import R8, R9, RAX, RCX, RDX, Gprs, new_gprs
from sim_backend.hw.platform import Platform
from sim_backend.tdx_module.module import TdxModule
from uapi_ctypes.tdx_leaves import SeamcallLeaf
from uapi_ctypes.tdx_status import Status, describe

GIB: Final = 1 << 30
_TDMR_INFO: Final = Struct("<8Q")
_TD_PARAMS: Final = Struct("<QQHBB4xQQH")
_TD_PARAMS_BYTES: Final = 1024
EPTP_4_LEVEL: Final = 0x1E
EPTP_5_LEVEL: Final = 0x26
TDCS_PAGES: Final = 6
TDVPS_PAGES: Final = 6


class SeamcallError(Exception):
    """A SEAMCALL completed with a status that its caller did not expect."""

    def __init__(self, leaf: int, regs: Gprs) -> None:
        super().__init__(f"{SeamcallLeaf(leaf).name}: {describe(regs[RAX])}")
        self.rax = regs[RAX]
        self.regs = list(regs)


@dataclass(frozen=True, slots=True)
class TdParams:
    """What a test or a measurement varies of TD_PARAMS; the rest is zero."""

    attributes: int = 0
    xfam: int = 3
    max_vcpus: int = 4
    num_l2_vms: int = 0
    eptp_controls: int = EPTP_4_LEVEL
    config_flags: int = 0
    tsc_frequency: int = 84  # [25 MHz]

    def encode(self) -> bytes:
        """Return the TD_PARAMS structure."""
        head = _TD_PARAMS.pack(
            self.attributes,
            self.xfam,
            self.max_vcpus,
            self.num_l2_vms,
            0,
            self.eptp_controls,
            self.config_flags,
            self.tsc_frequency,
        )
        return head.ljust(_TD_PARAMS_BYTES, b"\0")


@dataclass(slots=True)
class Td:
    """A TD as its host knows it: the HPAs it gave away."""

    tdr: int
    hkid: int
    tdcx: list[int] = field(default_factory=list)
    vcpus: list[int] = field(default_factory=list)  # TDVPR HPAs
    tdvpx: list[int] = field(default_factory=list)
    tables: dict[tuple[int, int], int] = field(default_factory=dict)  # (level, GPA) -> HPA
    pages: dict[int, int] = field(default_factory=dict)  # GPA -> HPA

    def all_pages(self) -> Iterator[int]:
        """Yield every page that the TD holds, the TDR last."""
        yield from self.pages.values()
        yield from self.tables.values()
        yield from self.tdvpx
        yield from self.vcpus
        yield from self.tdcx
        yield self.tdr


class SeamcallHost:
    """Drives one module: layout of memory, free pages, HKIDs, and one method for each step of a TD's life.

    The first gigabyte is the host's; TDMRs cover the next ones, with the PAMTs below 1 GiB.
    """

    def __init__(self, module: TdxModule, *, tdmr_gib: int = 2) -> None:
        self.module = module
        self.tdmr_gib = tdmr_gib
        self.free_pages: list[int] = []
        self._next_page = GIB
        self.free_hkids: list[int] = []
        self._regs = new_gprs()

    @property
    def platform(self) -> Platform:
        """The hardware below."""
        return self.module.platform

    def call(
        self,
        leaf: int,
        *,
        rcx: int = 0,
        rdx: int = 0,
        r8: int = 0,
        r9: int = 0,
        lp: int = 0,
        version: int = 0,
        accept: Status = Status.SUCCESS,
    ) -> Gprs:
        """Execute a SEAMCALL that must complete with `accept`, whatever its details; return the registers.

        The list is reused by the next call. Raise `SeamcallError` otherwise.
        """
        regs = self._regs
        regs[:] = _ZERO_GPRS
        regs[RAX], regs[RCX], regs[RDX], regs[R8], regs[R9] = leaf | version << 16, rcx, rdx, r8, r9
        if not self.module.seamcall(lp, regs) and regs[RAX] >> 32 != accept:
            raise SeamcallError(leaf, regs)
        return regs

    def bring_up(self) -> None:
        """Take the module from SYSINIT_PENDING to ready, all of the TDMRs initialised."""
        self.configure()
        for lp in self.first_lp_of_each_package():
            self.call(SeamcallLeaf.TDH_SYS_KEY_CONFIG, lp=lp)
        for index in range(self.tdmr_gib):
            self.module.tdmr_init_all((1 + index) * GIB)
        keyids = self.platform.keyids
        self.free_hkids = list(range(keyids.last_private, keyids.first_private, -1))

    def configure(self) -> None:
        """Take the module from SYSINIT_PENDING to SYSCONFIG_DONE."""
        memory, leaf = self.module.memory, SeamcallLeaf
        self.call(leaf.TDH_SYS_INIT)
        for each in self.platform.lps:
            self.call(leaf.TDH_SYS_LP_INIT, lp=each.index)
        array = 16 << 20
        pamt = 32 << 20
        for index in range(self.tdmr_gib):
            info = array + 4096 + index * 512
            base = (1 + index) * GIB
            info_words = (base, GIB, pamt, 4096, pamt + 4096, 8192, pamt + 16384, 4 << 20)
            memory.write(info, _TDMR_INFO.pack(*info_words).ljust(512, b"\0"))
            memory.q[(array >> 3) + index] = info
            pamt += 8 << 20
        hkid = self.platform.keyids.first_private
        self.call(leaf.TDH_SYS_CONFIG, rcx=array, rdx=self.tdmr_gib, r8=hkid)

    def first_lp_of_each_package(self) -> list[int]:
        """Return one LP of each package."""
        return list({lp.package: lp.index for lp in reversed(self.platform.lps)}.values())

    def page(self) -> int:
        """Return the HPA of a free page of a TDMR."""
        if self.free_pages:
            return self.free_pages.pop()
        hpa = self._next_page
        if hpa >= (1 + self.tdmr_gib) * GIB:
            raise MemoryError("the TDMRs are full")
        self._next_page += 4096
        return hpa

    def aligned_page(self, size: int) -> int:
        """Return the HPA of `size` free bytes [power of two] of a TDMR, aligned to `size`."""
        hpa = -(-self._next_page // size) * size
        self.free_pages += range(self._next_page, hpa, 4096)
        self._next_page = hpa + size
        return hpa

    # The life of a TD

    def create_td(self, params: TdParams | None = None, *, init: bool = True) -> Td:
        """Make a TD with its key and its TDCS pages, and initialise it with `params` unless `init` is False."""
        leaf = SeamcallLeaf
        td = Td(tdr=self.page(), hkid=self.free_hkids.pop())
        self.call(leaf.TDH_MNG_CREATE, rcx=td.tdr, rdx=td.hkid)
        for lp in self.first_lp_of_each_package():
            self.call(leaf.TDH_MNG_KEY_CONFIG, rcx=td.tdr, lp=lp)
        params = params or TdParams()
        for _ in range(TDCS_PAGES + params.num_l2_vms):
            td.tdcx.append(self.page())
            self.call(leaf.TDH_MNG_ADDCX, rcx=td.tdcx[-1], rdx=td.tdr)
        if init:
            self.init_td(td, params)
        return td

    def init_td(self, td: Td, params: TdParams) -> None:
        """Execute TDH.MNG.INIT."""
        buffer = 8 << 20
        self.module.memory.write(buffer, params.encode())
        self.call(SeamcallLeaf.TDH_MNG_INIT, rcx=td.tdr, rdx=buffer)

    def create_vcpu(self, td: Td, *, init: bool = True, lp: int = 0, rcx: int = 0) -> int:
        """Make a vCPU with its TDVPS pages, and initialise it unless `init` is False; return its TDVPR's HPA."""
        tdvpr = self.page()
        self.call(SeamcallLeaf.TDH_VP_CREATE, rcx=tdvpr, rdx=td.tdr)
        td.vcpus.append(tdvpr)
        for _ in range(TDVPS_PAGES - 1):
            td.tdvpx.append(self.page())
            self.call(SeamcallLeaf.TDH_VP_ADDCX, rcx=td.tdvpx[-1], rdx=tdvpr)
        if init:
            self.call(SeamcallLeaf.TDH_VP_INIT, rcx=tdvpr, rdx=rcx, lp=lp)
        return tdvpr

    def add_tables(self, td: Td, gpa: int, *, to_level: int = 1, root_level: int = 3) -> None:
        """Add the Secure EPT pages that a mapping of `gpa` at `to_level` - 1 still needs."""
        for level in range(root_level, to_level - 1, -1):
            base = gpa & -(1 << 12 + 9 * level)
            if (level, base) not in td.tables:
                table = self.page()
                self.call(SeamcallLeaf.TDH_MEM_SEPT_ADD, rcx=base | level, rdx=td.tdr, r8=table)
                td.tables[level, base] = table

    def add_page(self, td: Td, gpa: int, source: int, *, root_level: int = 3) -> int:
        """Add a 4 KiB page with the contents at HPA `source`, tables included; return its HPA."""
        self.add_tables(td, gpa, root_level=root_level)
        page = self.page()
        self.call(SeamcallLeaf.TDH_MEM_PAGE_ADD, rcx=gpa, rdx=td.tdr, r8=page, r9=source)
        td.pages[gpa] = page
        return page

    def extend_page(self, td: Td, gpa: int) -> None:
        """Measure the 16 chunks of the page at `gpa`."""
        for chunk in range(gpa, gpa + 4096, 256):
            self.call(SeamcallLeaf.TDH_MR_EXTEND, rcx=chunk, rdx=td.tdr)

    def aug_page(self, td: Td, gpa: int, *, level: int = 0, root_level: int = 3) -> int:
        """Add a pending page of `level`, tables included; return its HPA."""
        self.add_tables(td, gpa, to_level=level + 1, root_level=root_level)
        page = self.aligned_page(4096 << 9 * level) if level else self.page()
        self.call(SeamcallLeaf.TDH_MEM_PAGE_AUG, rcx=gpa | level, rdx=td.tdr, r8=page)
        td.pages[gpa] = page
        return page

    def finalize(self, td: Td) -> bytes:
        """Execute TDH.MR.FINALIZE; return MRTD."""
        self.call(SeamcallLeaf.TDH_MR_FINALIZE, rcx=td.tdr)
        return self.module.tdrs[td.tdr].tdcs.mrtd

    def destroy(self, td: Td) -> None:
        """Tear the TD down and take every page and its HKID back."""
        leaf = SeamcallLeaf
        for tdvpr in td.vcpus:
            lp = self.module.tdvpses[tdvpr].assoc_lpid
            if lp < len(self.platform.lps):
                self.call(leaf.TDH_VP_FLUSH, rcx=tdvpr, lp=lp)
        self.call(leaf.TDH_MNG_VPFLUSHDONE, rcx=td.tdr)
        for lp in self.first_lp_of_each_package():
            self.call(leaf.TDH_PHYMEM_CACHE_WB, lp=lp)
        self.call(leaf.TDH_MNG_KEY_FREEID, rcx=td.tdr)
        self.free_hkids.append(td.hkid)
        for page in td.all_pages():
            size = self.call(leaf.TDH_PHYMEM_PAGE_RECLAIM, rcx=page)[R8]
            self.free_pages += range(page, page + (4096 << 9 * size), 4096)


_ZERO_GPRS: Final = new_gprs()
