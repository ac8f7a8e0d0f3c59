"""Random sequences of SEAMCALLs: after each, PAMT, Secure EPTs, KOT and TDs agree; in the end nothing is left over."""

import hypothesis.strategies as st
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sim_backend.cpu.engine import ExitReason
from sim_backend.cpu.static_cpu import StaticCpus
from sim_backend.hw.gprs import R8, R9, RAX, RCX, RDX, new_gprs
from sim_backend.hw.memory import PhysicalMemory
from sim_backend.hw.platform import load_platform
from sim_backend.seamcall_host import SeamcallHost, TdParams
from sim_backend.tdx_module.invariants import check_invariants
from sim_backend.tdx_module.kot import HkidState
from sim_backend.tdx_module.module import TdxModule
from sim_backend.tdx_module.pamt import PageType
from sim_backend.tdx_module.profile import load_profile
from sim_backend.tdx_module.sys_state import SysState
from sim_backend.tdx_module.tdr import LifecycleState
from uapi_ctypes.tdx_leaves import SeamcallLeaf as Leaf
from uapi_ctypes.tdx_status import Rax, Status

LARGE = 2 << 20
POOL = 1 << 30
LARGE_POOL = POOL + 4 * LARGE
POOL_PAGES = [POOL + index * 4096 for index in range(64)]
CHOICE = st.integers(0, 997)
"""Picks one of the things that make sense; every seventh number picks anything."""
GPAS = st.sampled_from([0, 0, 0, 0x1000, 0x1000, 0x2000, LARGE, LARGE, LARGE + 0x1000, 1 << 30, 1 << 39])
LEVELS = st.sampled_from([0] * 4 + [1] * 6 + [2, 3])
LPS = st.integers(0, 3)
PARAMS_PAGE = 8 << 20
SOURCE = 9 << 20

TDR_LEAVES = (
    Leaf.TDH_MNG_KEY_CONFIG, Leaf.TDH_MNG_VPFLUSHDONE, Leaf.TDH_MNG_KEY_FREEID, Leaf.TDH_MR_FINALIZE,
    Leaf.TDH_MEM_TRACK,
)  # fmt: skip
GPA_LEAVES = (
    Leaf.TDH_MEM_SEPT_ADD, Leaf.TDH_MEM_PAGE_ADD, Leaf.TDH_MEM_PAGE_AUG, Leaf.TDH_MEM_RANGE_BLOCK,
    Leaf.TDH_MEM_RANGE_UNBLOCK, Leaf.TDH_MEM_PAGE_REMOVE, Leaf.TDH_MEM_SEPT_REMOVE, Leaf.TDH_MEM_PAGE_RELOCATE,
    Leaf.TDH_MEM_PAGE_DEMOTE, Leaf.TDH_MEM_PAGE_PROMOTE, Leaf.TDH_MEM_SEPT_RD, Leaf.TDH_MR_EXTEND, Leaf.TDH_MEM_RD,
)  # fmt: skip

AFTER_BLOCKING = (
    Leaf.TDH_MEM_RANGE_UNBLOCK, Leaf.TDH_MEM_PAGE_REMOVE, Leaf.TDH_MEM_SEPT_REMOVE, Leaf.TDH_MEM_PAGE_RELOCATE,
    Leaf.TDH_MEM_PAGE_DEMOTE, Leaf.TDH_MEM_PAGE_PROMOTE,
)  # fmt: skip


class LeafSequences(RuleBasedStateMachine):
    """A host that calls leaves in any order, on any of a few pages."""

    def __init__(self) -> None:
        super().__init__()
        platform = load_platform("golden")
        self.memory = PhysicalMemory(platform.ram_bytes)
        self.host = SeamcallHost(TdxModule(platform, self.memory, load_profile("1.5.01"), StaticCpus()), tdmr_gib=1)
        self.module = self.host.module
        self.host.bring_up()
        self.regs = new_gprs()

    def seamcall(self, leaf: int, *, rcx: int = 0, rdx: int = 0, r8: int = 0, r9: int = 0, lp: int = 0) -> Rax:
        regs = self.regs
        regs[:] = new_gprs()
        regs[RAX], regs[RCX], regs[RDX], regs[R8], regs[R9] = leaf, rcx, rdx, r8, r9
        if self.module.running[lp] is not None or self.module.seamcall(lp, regs):
            return Rax(Status.SUCCESS)
        return Rax.decode(regs[RAX])

    def free_page(self, choice: int, size: int = 4096) -> int:
        """Return a page of the pool, mostly a free one."""
        pamt = self.module.pamt
        if size > 4096 and choice % 7:
            return LARGE_POOL + choice % 3 * LARGE
        free = [page for page in POOL_PAGES if pamt.page_type(pamt.entry_4k(page)) == PageType.NDA]
        if choice % 7 == 0 or not free:
            return POOL_PAGES[choice % len(POOL_PAGES)]
        return free[choice % len(free)]

    def tdr(self, choice: int) -> int:
        """Return the HPA of a TDR, mostly."""
        tdrs = sorted(self.module.tdrs)
        if choice % 7 == 0 or not tdrs:
            return POOL_PAGES[choice % len(POOL_PAGES)]
        return tdrs[0] if choice % 4 else tdrs[choice % len(tdrs)]

    def tdvpr(self, choice: int) -> int:
        """Return the HPA of a TDVPR, mostly."""
        tdvprs = sorted(self.module.tdvpses)
        if choice % 7 == 0 or not tdvprs:
            return POOL_PAGES[choice % len(POOL_PAGES)]
        return tdvprs[choice % len(tdvprs)]

    @initialize(debug=st.booleans(), vcpus=st.integers(1, 3), stage=st.sampled_from([0, 1, 2, 2, 3, 3]))
    def build_a_td(self, debug: bool, vcpus: int, stage: int) -> None:
        """Begin with nothing, with a TD that is initialised, that has memory and a vCPU, or that may run."""
        self.memory.write(PARAMS_PAGE, TdParams(attributes=int(debug), max_vcpus=vcpus).encode())
        if not stage:
            return
        self.create(1, 40)
        self.give_it_its_key(1)
        for _ in range(6):
            self.addcx(1, 1)
        self.init(1)
        if stage == 1:
            return
        for gpa in (0, LARGE):
            self.tables(1, gpa, 0 if gpa == 0 else 1)
        self.gpa_leaf(Leaf.TDH_MEM_PAGE_ADD, 0, 0, 1, 1, False)
        self.gpa_leaf(Leaf.TDH_MEM_PAGE_AUG, 0x1000, 0, 1, 1, False)
        self.gpa_leaf(Leaf.TDH_MEM_PAGE_AUG, LARGE, 1, 1, 1, False)
        self.vcpu(1, 1, 0, True)
        if stage == 3:
            assert self.seamcall(Leaf.TDH_MR_FINALIZE, rcx=self.tdr(1)) == Rax(Status.SUCCESS)

    @rule(choice=CHOICE)
    def init(self, choice: int) -> None:
        self.seamcall(Leaf.TDH_MNG_INIT, rcx=self.tdr(choice), rdx=PARAMS_PAGE)

    @rule(choice=CHOICE, hkid=st.integers(31, 64))
    def create(self, choice: int, hkid: int) -> None:
        self.seamcall(Leaf.TDH_MNG_CREATE, rcx=self.free_page(choice), rdx=hkid)

    @rule(choice=CHOICE)
    def give_it_its_key(self, choice: int) -> None:
        for lp in (0, 2):
            self.seamcall(Leaf.TDH_MNG_KEY_CONFIG, rcx=self.tdr(choice), lp=lp)

    @rule(leaf=st.sampled_from(TDR_LEAVES), choice=CHOICE, lp=LPS)
    def tdr_leaf(self, leaf: Leaf, choice: int, lp: int) -> None:
        self.seamcall(leaf, rcx=self.tdr(choice), lp=lp)

    @rule(page=CHOICE, tdr=CHOICE)
    def addcx(self, page: int, tdr: int) -> None:
        self.seamcall(Leaf.TDH_MNG_ADDCX, rcx=self.free_page(page), rdx=self.tdr(tdr))

    @rule(choice=CHOICE, tdr=CHOICE, lp=LPS, init=st.booleans())
    def vcpu(self, choice: int, tdr: int, lp: int, init: bool) -> None:
        tdvpr = self.free_page(choice)
        self.seamcall(Leaf.TDH_VP_CREATE, rcx=tdvpr, rdx=self.tdr(tdr))
        for _ in range(5):
            self.seamcall(Leaf.TDH_VP_ADDCX, rcx=self.free_page(choice), rdx=tdvpr)
        if init:
            self.seamcall(Leaf.TDH_VP_INIT, rcx=tdvpr, rdx=5, lp=lp)

    @rule(
        leaf=st.sampled_from(GPA_LEAVES), gpa=GPAS, level=LEVELS, tdr=CHOICE, page=CHOICE, allow_existing=st.booleans()
    )  # fmt: skip
    def gpa_leaf(self, leaf: Leaf, gpa: int, level: int, tdr: int, page: int, allow_existing: bool) -> None:
        flag = int(allow_existing and leaf == Leaf.TDH_MEM_SEPT_ADD)
        target = self.free_page(page, 4096 << 9 * level if leaf == Leaf.TDH_MEM_PAGE_AUG else 4096)
        base = gpa & -(1 << 12 + 9 * level)
        self.seamcall(leaf, rcx=base | level, rdx=self.tdr(tdr) | flag, r8=target, r9=SOURCE)

    @rule(tdr=CHOICE, gpa=GPAS, level=st.integers(0, 1))
    def tables(self, tdr: int, gpa: int, level: int) -> None:
        for at in range(3, level, -1):
            base = gpa & -(1 << 12 + 9 * at)
            self.seamcall(Leaf.TDH_MEM_SEPT_ADD, rcx=base | at, rdx=self.tdr(tdr), r8=self.free_page(1))

    @rule(tdr=CHOICE, gpa=GPAS, level=LEVELS, leaf=st.sampled_from(AFTER_BLOCKING), page=CHOICE)
    def block_track_and(self, tdr: int, gpa: int, level: int, leaf: Leaf, page: int) -> None:
        base = gpa & -(1 << 12 + 9 * level)
        self.seamcall(Leaf.TDH_MEM_RANGE_BLOCK, rcx=base | level, rdx=self.tdr(tdr))
        self.seamcall(Leaf.TDH_MEM_TRACK, rcx=self.tdr(tdr))
        self.seamcall(leaf, rcx=base | level, rdx=self.tdr(tdr), r8=self.free_page(page))

    @rule(choice=CHOICE, lp=LPS)
    def flush(self, choice: int, lp: int) -> None:
        self.seamcall(Leaf.TDH_VP_FLUSH, rcx=self.tdvpr(choice), lp=lp)

    @rule(choice=CHOICE)
    def reclaim(self, choice: int) -> None:
        self.seamcall(Leaf.TDH_PHYMEM_PAGE_RECLAIM, rcx=POOL_PAGES[choice % len(POOL_PAGES)])

    @rule(lp=LPS)
    def write_caches_back(self, lp: int) -> None:
        self.seamcall(Leaf.TDH_PHYMEM_CACHE_WB, lp=lp)

    @precondition(lambda self: self.module.tdvpses)
    @rule(lp=LPS, choice=CHOICE)
    def enter(self, lp: int, choice: int) -> None:
        self.seamcall(Leaf.TDH_VP_ENTER, rcx=self.tdvpr(choice), lp=lp)

    @rule(lp=LPS)
    def leave(self, lp: int) -> None:
        tdvps = self.module.running[lp]
        if tdvps is not None and tdvps.cpu is not None:
            tdvps.cpu.exit.reason = ExitReason.EXTERNAL_INTERRUPT
            assert self.module.vmexit(lp, self.regs)

    @invariant()
    def everything_agrees(self) -> None:
        if self.module.sys_state == SysState.SYS_READY:
            check_invariants(self.module)

    def teardown(self) -> None:
        """Tear every TD down: the machine is as good as new."""
        module = self.module
        for lp in range(4):
            self.leave(lp)
        for tdvps in list(module.tdvpses.values()):
            if tdvps.assoc_lpid < 4:
                self.seamcall(Leaf.TDH_VP_FLUSH, rcx=tdvps.hpa, lp=tdvps.assoc_lpid)
        for tdr in list(module.tdrs.values()):
            if tdr.lifecycle_state < LifecycleState.BLOCKED:
                assert self.seamcall(Leaf.TDH_MNG_VPFLUSHDONE, rcx=tdr.hpa) == Rax(Status.SUCCESS)
        for lp in (0, 2):
            self.seamcall(Leaf.TDH_PHYMEM_CACHE_WB, lp=lp)
        for tdr in list(module.tdrs.values()):
            if tdr.lifecycle_state == LifecycleState.BLOCKED:
                assert self.seamcall(Leaf.TDH_MNG_KEY_FREEID, rcx=tdr.hpa) == Rax(Status.SUCCESS)
        tdrs = set(module.tdrs)
        large = [LARGE_POOL + offset for offset in range(0, 3 * LARGE, 4096)]
        for page in (page for page in POOL_PAGES + large if page not in tdrs):
            self.seamcall(Leaf.TDH_PHYMEM_PAGE_RECLAIM, rcx=page)
        for page in tdrs:
            assert self.seamcall(Leaf.TDH_PHYMEM_PAGE_RECLAIM, rcx=page) == Rax(Status.SUCCESS)
        check_invariants(module)
        assert not module.tdrs
        assert not module.tdvpses
        assert set(module.kot.state[33:64]) == {HkidState.FREE}
        assert all(module.pamt.page_type(module.pamt.entry_4k(page)) == PageType.NDA for page in tdrs)
        td = self.host.create_td()
        self.host.create_vcpu(td)
        self.host.finalize(td)
        self.host.destroy(td)
        self.memory.close()


LeafSequences.TestCase.settings = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
TestLeafSequences = LeafSequences.TestCase
