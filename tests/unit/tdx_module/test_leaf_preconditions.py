"""Each leaf's preconditions as data: what breaks each one, in the spec's order, and the status that reports it.

A `Scene` is a call that succeeds. Breaking one precondition makes it fail with that one's status and change nothing;
breaking several reports the first.
"""

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from sim_backend.hw.gprs import R8, RAX, RCX, RDX, new_gprs
from sim_backend.seamcall_host import EPTP_4_LEVEL, SeamcallHost, Td, TdParams
from sim_backend.tdx_module.kot import HkidState
from sim_backend.tdx_module.op_states import OpState
from sim_backend.tdx_module.pamt import PageType
from sim_backend.tdx_module.sept import walk
from sim_backend.tdx_module.sept_states import ENCODING, STATE_MASK, TDEL, SeptState
from sim_backend.tdx_module.tdr import LifecycleState
from sim_backend.tdx_module.tdvps import VcpuState
from uapi_ctypes.tdx_leaves import SeamcallLeaf as Leaf
from uapi_ctypes.tdx_status import Operand, Rax, Status

SOURCE = 0x200000
GPA = 0x4000
LARGE_GPA = 0x4000_0000
NOT_STATE = frozenset({"cpu", "tdr", "q", "walked_range", "walked_table"})  # the last two remember a walk


@dataclass
class Scene:
    """One call, ready to succeed, and what its violations may touch."""

    host: SeamcallHost
    leaf: Leaf
    td: Td
    lp: int = 0
    regs: dict[int, int] = field(default_factory=dict)
    page: int = 0  # the free page that the call would take
    tdvpr: int = 0
    level: int = 0  # of the Secure EPT entry
    gpa: int = GPA

    def call(self) -> Rax:
        regs = new_gprs()
        regs[RAX] = self.leaf
        for register, value in self.regs.items():
            regs[register] = value
        entered = self.host.module.seamcall(self.lp, regs)
        assert not entered
        return Rax.decode(regs[RAX])

    @property
    def module(self) -> Any:
        return self.host.module

    @property
    def tdr(self) -> Any:
        return self.module.tdrs[self.td.tdr]

    def entry(self) -> int:
        """Return the word index of the Secure EPT entry that the call is about."""
        index, level = walk(self.module.q, self.tdr.tdcs, self.gpa, self.level)
        assert level == self.level
        return index

    def hold(self, page: int) -> None:
        self.module.q[self.module.pamt.entry_4k(page)] |= 1

    def set_entry_state(self, state: SeptState) -> None:
        index = self.entry()
        self.module.q[index] = self.module.q[index] & ~STATE_MASK | ENCODING[state]


def snapshot(scene: Scene) -> object:
    """Everything that a failed leaf must not change."""
    module = scene.module
    return (
        list(_memory(module.memory)),
        {hpa: _fields(tdr) for hpa, tdr in module.tdrs.items()},
        {hpa: _fields(tdvps) for hpa, tdvps in module.tdvpses.items()},
        _fields(module.kot),
        module.sys_state,
    )


def _memory(memory: Any) -> Iterator[tuple[int, bytes]]:
    at = 0
    while True:
        try:
            at = os.lseek(memory.fd, at, os.SEEK_DATA)
        except OSError:
            return
        end = os.lseek(memory.fd, at, os.SEEK_HOLE)
        for page in range(at, end, 4096):
            data = memory.read(page, 4096)
            if any(data):
                yield page, hashlib.md5(data, usedforsecurity=False).digest()
        at = end


def _fields(value: Any) -> object:
    if hasattr(value, "digest"):
        return value.digest()
    if hasattr(value, "raw"):
        return value.raw
    if hasattr(value, "__slots__") and type(value).__name__ in {"Tdr", "Tdcs", "Tdvps", "KeyOwnershipTable"}:
        return {name: _fields(getattr(value, name)) for name in value.__slots__ if name not in NOT_STATE}
    if isinstance(value, (list, dict, bytearray)):
        return repr(value)
    return value


# Scenes


def building(host: SeamcallHost) -> Td:
    """Make a TD that is being built, with the Secure EPT for GPA 0."""
    td = host.create_td(TdParams(attributes=1, max_vcpus=2))
    host.add_tables(td, 0)
    return td


def runnable(host: SeamcallHost) -> Td:
    """Make a finalized TD with one page at `GPA`."""
    td = building(host)
    host.add_page(td, GPA, SOURCE)
    host.create_vcpu(td)
    host.finalize(td)
    return td


def block_and_track(host: SeamcallHost, td: Td, gpa: int, level: int) -> None:
    host.call(Leaf.TDH_MEM_RANGE_BLOCK, rcx=gpa | level, rdx=td.tdr)
    host.call(Leaf.TDH_MEM_TRACK, rcx=td.tdr)


def mng_create(host: SeamcallHost) -> Scene:
    page = host.page()
    td = Td(tdr=page, hkid=host.free_hkids.pop())
    return Scene(host, Leaf.TDH_MNG_CREATE, td, regs={RCX: page, RDX: td.hkid}, page=page)


def mng_key_config(host: SeamcallHost) -> Scene:
    td = Td(tdr=host.page(), hkid=host.free_hkids.pop())
    host.call(Leaf.TDH_MNG_CREATE, rcx=td.tdr, rdx=td.hkid)
    return Scene(host, Leaf.TDH_MNG_KEY_CONFIG, td, regs={RCX: td.tdr})


def mng_addcx(host: SeamcallHost) -> Scene:
    td = host.create_td(init=False)
    page = host.page()
    return Scene(host, Leaf.TDH_MNG_ADDCX, td, regs={RCX: page, RDX: td.tdr}, page=page)


def mng_vpflushdone(host: SeamcallHost) -> Scene:
    td = runnable(host)
    host.call(Leaf.TDH_VP_FLUSH, rcx=td.vcpus[0])
    return Scene(host, Leaf.TDH_MNG_VPFLUSHDONE, td, regs={RCX: td.tdr})


def mng_key_freeid(host: SeamcallHost) -> Scene:
    scene = mng_vpflushdone(host)
    scene.call()
    for lp in (0, 2):
        host.call(Leaf.TDH_PHYMEM_CACHE_WB, lp=lp)
    scene.leaf = Leaf.TDH_MNG_KEY_FREEID
    return scene


def page_reclaim(host: SeamcallHost) -> Scene:
    scene = mng_key_freeid(host)
    scene.call()
    scene.leaf, scene.page = Leaf.TDH_PHYMEM_PAGE_RECLAIM, scene.td.pages[GPA]
    scene.regs = {RCX: scene.page}
    return scene


def vp_create(host: SeamcallHost) -> Scene:
    page = host.page()
    td = building(host)
    return Scene(host, Leaf.TDH_VP_CREATE, td, regs={RCX: page, RDX: td.tdr}, page=page)


def vp_addcx(host: SeamcallHost) -> Scene:
    td = building(host)
    tdvpr, page = host.create_vcpu(td, init=False), host.page()
    return Scene(host, Leaf.TDH_VP_ADDCX, td, regs={RCX: page, RDX: tdvpr}, page=page, tdvpr=tdvpr)


def vp_init(host: SeamcallHost) -> Scene:
    td = building(host)
    tdvpr = host.create_vcpu(td, init=False)
    return Scene(host, Leaf.TDH_VP_INIT, td, regs={RCX: tdvpr}, tdvpr=tdvpr)


def vp_flush(host: SeamcallHost) -> Scene:
    td = runnable(host)
    return Scene(host, Leaf.TDH_VP_FLUSH, td, regs={RCX: td.vcpus[0]}, tdvpr=td.vcpus[0])


def mr_extend(host: SeamcallHost) -> Scene:
    td = building(host)
    host.add_page(td, GPA, SOURCE)
    return Scene(host, Leaf.TDH_MR_EXTEND, td, regs={RCX: GPA, RDX: td.tdr})


def mr_finalize(host: SeamcallHost) -> Scene:
    td = building(host)
    host.create_vcpu(td)
    return Scene(host, Leaf.TDH_MR_FINALIZE, td, regs={RCX: td.tdr})


def mem_track(host: SeamcallHost) -> Scene:
    td = runnable(host)
    return Scene(host, Leaf.TDH_MEM_TRACK, td, regs={RCX: td.tdr})


def mem_sept_add(host: SeamcallHost) -> Scene:
    td = building(host)
    page = host.page()
    regs = {RCX: 0x20_0000 | 1, RDX: td.tdr, R8: page}
    return Scene(host, Leaf.TDH_MEM_SEPT_ADD, td, regs=regs, page=page, level=1, gpa=0x20_0000)


def mem_page_add(host: SeamcallHost) -> Scene:
    td = building(host)
    page = host.page()
    return Scene(host, Leaf.TDH_MEM_PAGE_ADD, td, regs={RCX: GPA, RDX: td.tdr, R8: page, 9: SOURCE}, page=page)


def mem_page_aug(host: SeamcallHost) -> Scene:
    td = runnable(host)
    page = host.page()
    regs = {RCX: 0x6000, RDX: td.tdr, R8: page}
    return Scene(host, Leaf.TDH_MEM_PAGE_AUG, td, regs=regs, page=page, gpa=0x6000)


def mem_range_block(host: SeamcallHost) -> Scene:
    td = runnable(host)
    return Scene(host, Leaf.TDH_MEM_RANGE_BLOCK, td, regs={RCX: GPA, RDX: td.tdr})


def mem_range_unblock(host: SeamcallHost) -> Scene:
    td = runnable(host)
    block_and_track(host, td, GPA, 0)
    return Scene(host, Leaf.TDH_MEM_RANGE_UNBLOCK, td, regs={RCX: GPA, RDX: td.tdr})


def mem_page_remove(host: SeamcallHost) -> Scene:
    scene = mem_range_unblock(host)
    scene.leaf, scene.page = Leaf.TDH_MEM_PAGE_REMOVE, scene.td.pages[GPA]
    return scene


def mem_page_relocate(host: SeamcallHost) -> Scene:
    scene = mem_range_unblock(host)
    scene.leaf, scene.page = Leaf.TDH_MEM_PAGE_RELOCATE, host.page()
    scene.regs[R8] = scene.page
    return scene


def mem_sept_remove(host: SeamcallHost) -> Scene:
    td = building(host)
    host.add_tables(td, 0x20_0000)
    host.create_vcpu(td)
    host.finalize(td)
    block_and_track(host, td, 0x20_0000, 1)
    regs = {RCX: 0x20_0000 | 1, RDX: td.tdr}
    return Scene(host, Leaf.TDH_MEM_SEPT_REMOVE, td, regs=regs, level=1, gpa=0x20_0000)


def mem_page_demote(host: SeamcallHost) -> Scene:
    td = building(host)
    host.create_vcpu(td)
    host.finalize(td)
    host.aug_page(td, LARGE_GPA, level=1)
    block_and_track(host, td, LARGE_GPA, 1)
    page = host.page()
    regs = {RCX: LARGE_GPA | 1, RDX: td.tdr, R8: page}
    return Scene(host, Leaf.TDH_MEM_PAGE_DEMOTE, td, regs=regs, page=page, level=1, gpa=LARGE_GPA)


def mem_page_promote(host: SeamcallHost) -> Scene:
    scene = mem_page_demote(host)
    scene.call()
    block_and_track(host, scene.td, LARGE_GPA, 1)
    scene.leaf, scene.regs = Leaf.TDH_MEM_PAGE_PROMOTE, {RCX: LARGE_GPA | 1, RDX: scene.td.tdr}
    return scene


def mem_sept_rd(host: SeamcallHost) -> Scene:
    td = runnable(host)
    return Scene(host, Leaf.TDH_MEM_SEPT_RD, td, regs={RCX: GPA, RDX: td.tdr})


def mem_rd(host: SeamcallHost) -> Scene:
    td = runnable(host)
    return Scene(host, Leaf.TDH_MEM_RD, td, regs={RCX: GPA + 8, RDX: td.tdr})


# Violations. Those of one list can be combined: each leaves in place what the ones before it broke.

Violation = Callable[[Scene], None]
TDR_IN_RCX = (
    Leaf.TDH_MNG_KEY_CONFIG, Leaf.TDH_MNG_VPFLUSHDONE, Leaf.TDH_MNG_KEY_FREEID, Leaf.TDH_MR_FINALIZE,
    Leaf.TDH_MEM_TRACK,
)  # fmt: skip
TDR_REGISTER = dict.fromkeys(TDR_IN_RCX, RCX)


def tdr_has_hkid_bits(scene: Scene) -> None:
    scene.regs[TDR_REGISTER.get(scene.leaf, RDX)] |= 1 << 50


def tdr_outside_tdmr(scene: Scene) -> None:
    scene.regs[TDR_REGISTER.get(scene.leaf, RDX)] += 3 << 30


def tdr_busy(scene: Scene) -> None:
    scene.hold(scene.td.tdr)


def tdr_is_not_a_tdr(scene: Scene) -> None:
    pamt = scene.module.pamt
    pamt.set_page_type(pamt.entry_4k(scene.td.tdr), PageType.REG)


def td_is_fatal(scene: Scene) -> None:
    scene.tdr.fatal = True


def td_has_no_key(scene: Scene) -> None:
    scene.tdr.lifecycle_state = LifecycleState.HKID_ASSIGNED


def td_is_torn_down(scene: Scene) -> None:
    scene.tdr.lifecycle_state = LifecycleState.TEARDOWN


def td_lacks_tdcs_pages(scene: Scene) -> None:
    scene.tdr.num_tdcx = 5


def op_state_busy(scene: Scene) -> None:
    scene.tdr.tdcs.op_state_lock.raw = 1


def td_is_not_initialized(scene: Scene) -> None:
    scene.tdr.tdcs.op_state = OpState.UNINITIALIZED


def td_is_runnable(scene: Scene) -> None:
    scene.tdr.tdcs.op_state = OpState.RUNNABLE


def gpa_is_shared(scene: Scene) -> None:
    scene.regs[RCX] |= 1 << 47


def gpa_reserved_bits(scene: Scene) -> None:
    scene.regs[RCX] |= 8


def gpa_level_too_high(scene: Scene) -> None:
    scene.regs[RCX] |= 7


def sept_tree_busy(scene: Scene) -> None:
    scene.tdr.tdcs.sept_lock.raw = 1


def no_sept_page(scene: Scene) -> None:
    scene.regs[RCX] |= 1 << 39


def entry_busy(scene: Scene) -> None:
    scene.module.q[scene.entry()] |= TDEL


def entry_is_free(scene: Scene) -> None:
    scene.set_entry_state(SeptState.FREE)


def entry_is_mapped(scene: Scene) -> None:
    scene.set_entry_state(SeptState.MAPPED)


def entry_is_exported(scene: Scene) -> None:
    scene.set_entry_state(SeptState.EXPORTED_BLOCKEDW)


def entry_is_a_table(scene: Scene) -> None:
    scene.set_entry_state(SeptState.NL_MAPPED)


def entry_is_not_blocked(scene: Scene) -> None:
    index = scene.entry()
    scene.module.q[index] &= ~(1 << 55)


def page_busy(scene: Scene) -> None:
    entry = scene.module.q[scene.entry()]
    scene.hold(entry & 0xFFFF_FFFF_F000)


def tlb_not_tracked(scene: Scene) -> None:
    scene.tdr.tdcs.td_epoch -= 1


def source_unaligned(scene: Scene) -> None:
    scene.regs[9] |= 0x10


def source_in_seamrr(scene: Scene) -> None:
    scene.regs[9] = 0xF000_0000 | scene.regs[9] & 0xFFF


def source_has_private_hkid(scene: Scene) -> None:
    scene.regs[9] |= 40 << 46


def new_page_has_hkid_bits(scene: Scene) -> None:
    scene.regs[R8 if R8 in scene.regs else RCX] |= 1 << 50


def new_page_outside_tdmr(scene: Scene) -> None:
    scene.regs[R8 if R8 in scene.regs else RCX] += 3 << 30


def new_page_busy(scene: Scene) -> None:
    scene.hold(scene.page)


def new_page_not_free(scene: Scene) -> None:
    pamt = scene.module.pamt
    pamt.set_page_type(pamt.entry_4k(scene.page), PageType.RSVD)


def hkid_is_shared(scene: Scene) -> None:
    scene.regs[RDX] = 1


def hkid_is_taken(scene: Scene) -> None:
    scene.module.kot.state[scene.regs[RDX]] = HkidState.ASSIGNED


def kot_busy(scene: Scene) -> None:
    scene.module.kot.lock.raw = 2


def no_entropy(scene: Scene) -> None:
    scene.host.platform.rand_fail = 100


def key_already_configured(scene: Scene) -> None:
    scene.tdr.pkg_config_bitmap = 1


def pconfig_busy(scene: Scene) -> None:
    scene.host.platform.pconfig_result = 5


def tdcs_is_full(scene: Scene) -> None:
    scene.tdr.num_tdcx = 9


def vcpu_is_associated(scene: Scene) -> None:
    scene.tdr.tdcs.num_assoc_vcpus = 1


def caches_not_written_back(scene: Scene) -> None:
    scene.module.kot.wbinvd_bitmap[scene.td.hkid] = 1


def td_is_not_blocked(scene: Scene) -> None:
    scene.tdr.lifecycle_state = LifecycleState.KEYS_CONFIGURED


def reclaimed_page_is_free(scene: Scene) -> None:
    pamt = scene.module.pamt
    pamt.set_page_type(pamt.entry_4k(scene.page), PageType.NDA)


def tdvpr_is_not_a_tdvpr(scene: Scene) -> None:
    pamt = scene.module.pamt
    pamt.set_page_type(pamt.entry_4k(scene.tdvpr), PageType.TDCX)


def tdvpr_busy(scene: Scene) -> None:
    scene.hold(scene.tdvpr)


def vcpu_is_ready(scene: Scene) -> None:
    scene.module.tdvpses[scene.tdvpr].vcpu_state = VcpuState.READY


def tdvps_is_full(scene: Scene) -> None:
    scene.module.tdvpses[scene.tdvpr].num_tdvps_pages = 15


def tdvps_is_incomplete(scene: Scene) -> None:
    scene.module.tdvpses[scene.tdvpr].num_tdvps_pages = 5


def no_room_for_a_vcpu(scene: Scene) -> None:
    scene.tdr.tdcs.num_vcpus = scene.tdr.tdcs.max_vcpus


def vcpu_belongs_to_another_lp(scene: Scene) -> None:
    scene.module.tdvpses[scene.tdvpr].assoc_lpid = 1


def gpa_unaligned(scene: Scene) -> None:
    scene.regs[RCX] |= 4


def td_is_not_debug(scene: Scene) -> None:
    scene.tdr.tdcs.attributes = 0


def no_initialized_vcpu(scene: Scene) -> None:
    scene.tdr.tdcs.num_vcpus = 0


def epoch_busy(scene: Scene) -> None:
    scene.tdr.tdcs.epoch_lock.raw = 2


def vcpu_runs_in_the_previous_epoch(scene: Scene) -> None:
    tdcs = scene.tdr.tdcs
    tdcs.refcount[1 - (tdcs.td_epoch & 1)] = 1


def target_is_the_page_itself(scene: Scene) -> None:
    scene.regs[R8] = scene.td.pages[GPA]


def table_is_not_empty(scene: Scene) -> None:
    table = scene.td.tables[1, 0x20_0000]
    scene.module.q[(table >> 3) + 77] &= ~STATE_MASK


def pages_not_contiguous(scene: Scene) -> None:
    table = scene.module.q[scene.entry()] & 0xFFFF_FFFF_F000
    scene.module.q[(table >> 3) + 300] += 4096


_INVALID, _RANGE, _BUSY = Status.OPERAND_INVALID, Status.OPERAND_ADDR_RANGE_ERROR, Status.OPERAND_BUSY
_METADATA, _STATE = Status.PAGE_METADATA_INCORRECT, Status.EPT_ENTRY_STATE_INCORRECT
_RCX, _RDX, _R8, _R9 = Operand.RCX, Operand.RDX, Operand.R8, Operand.R9
Preconditions = list[tuple[Violation, Rax]]


def tdr(operand: Operand) -> Preconditions:
    """Return what the TDR operand needs."""
    return [
        (tdr_has_hkid_bits, Rax(_INVALID, operand)),
        (tdr_outside_tdmr, Rax(_RANGE, operand)),
        (tdr_busy, Rax(_BUSY, operand)),
        (tdr_is_not_a_tdr, Rax(_METADATA, operand)),
    ]


def td_state(*, lock: bool = True) -> Preconditions:
    """Return what the state of the TD needs."""
    states: Preconditions = [
        (td_is_fatal, Rax(Status.TD_FATAL)),
        (td_has_no_key, Rax(Status.TD_KEYS_NOT_CONFIGURED)),
        (td_lacks_tdcs_pages, Rax(Status.TDCS_NOT_ALLOCATED)),
    ]
    if lock:
        states.append((op_state_busy, Rax(_BUSY, Operand.OP_STATE)))
    return [*states, (td_is_not_initialized, Rax(Status.OP_STATE_INCORRECT))]


def new_page(operand: Operand) -> Preconditions:
    """Return what a free page needs."""
    return [
        (new_page_has_hkid_bits, Rax(_INVALID, operand)),
        (new_page_outside_tdmr, Rax(_RANGE, operand)),
        (new_page_busy, Rax(_BUSY, operand)),
        (new_page_not_free, Rax(_METADATA, operand)),
    ]


GPA_OPERAND: Preconditions = [
    (gpa_reserved_bits, Rax(_INVALID, _RCX)),
    (gpa_level_too_high, Rax(_INVALID, _RCX)),
    (gpa_is_shared, Rax(_INVALID, _RCX)),
]
WALK: Preconditions = [
    (sept_tree_busy, Rax(_BUSY, Operand.SEPT_TREE)),
    (no_sept_page, Rax(Status.EPT_WALK_FAILED, _RCX)),
    (entry_busy, Rax(_BUSY, _RCX)),
]
TRACKED: Preconditions = [
    (entry_is_not_blocked, Rax(Status.GPA_RANGE_NOT_BLOCKED, _RCX)),
    (tlb_not_tracked, Rax(Status.TLB_TRACKING_NOT_DONE, _RCX)),
]
MEMORY: Preconditions = [*tdr(_RDX), *td_state(), *GPA_OPERAND, *WALK]

LEAVES: dict[Callable[[SeamcallHost], Scene], Preconditions] = {
    mng_create: [
        (hkid_is_shared, Rax(_INVALID, _RDX)),
        *new_page(_RCX),
        (kot_busy, Rax(_BUSY, Operand.KOT)),
        (hkid_is_taken, Rax(Status.HKID_NOT_FREE)),
        (no_entropy, Rax(Status.RND_NO_ENTROPY)),
    ],
    mng_key_config: [
        *tdr(_RCX),
        (td_is_fatal, Rax(Status.TD_FATAL)),
        (td_is_torn_down, Rax(Status.LIFECYCLE_STATE_INCORRECT)),
        (key_already_configured, Rax(Status.KEY_CONFIGURED)),
        (pconfig_busy, Rax(_BUSY, Operand.KET)),
    ],
    mng_addcx: [
        *tdr(_RDX),
        (td_is_fatal, Rax(Status.TD_FATAL)),
        (td_has_no_key, Rax(Status.TD_KEYS_NOT_CONFIGURED)),
        (tdcs_is_full, Rax(Status.TDCX_NUM_INCORRECT)),
        *new_page(_RCX),
        (td_is_runnable, Rax(Status.OP_STATE_INCORRECT)),
    ],
    mng_vpflushdone: [
        *tdr(_RCX),
        (kot_busy, Rax(_BUSY, Operand.KOT)),
        (td_is_torn_down, Rax(Status.LIFECYCLE_STATE_INCORRECT)),
        (vcpu_is_associated, Rax(Status.FLUSHVP_NOT_DONE)),
    ],
    mng_key_freeid: [
        *tdr(_RCX),
        (td_is_not_blocked, Rax(Status.LIFECYCLE_STATE_INCORRECT)),
        (kot_busy, Rax(_BUSY, Operand.KOT)),
        (caches_not_written_back, Rax(Status.WBCACHE_NOT_COMPLETE)),
    ],
    page_reclaim: [
        (new_page_has_hkid_bits, Rax(_INVALID, _RCX)),
        (new_page_outside_tdmr, Rax(_RANGE, _RCX)),
        (new_page_busy, Rax(_BUSY, _RCX)),
        (reclaimed_page_is_free, Rax(_METADATA, _RCX)),
        (tdr_busy, Rax(_BUSY, Operand.TDR)),
        (td_is_not_blocked, Rax(Status.LIFECYCLE_STATE_INCORRECT)),
    ],
    vp_create: [*tdr(_RDX), *td_state(), *new_page(_RCX)],
    vp_addcx: [
        (tdvpr_busy, Rax(_BUSY, _RDX)),
        (tdvpr_is_not_a_tdvpr, Rax(_METADATA, _RDX)),
        (tdr_busy, Rax(_BUSY, Operand.TDR)),
        *td_state(),
        (vcpu_is_ready, Rax(Status.VCPU_STATE_INCORRECT)),
        (tdvps_is_full, Rax(Status.TDCX_NUM_INCORRECT)),
        *new_page(_RCX),
    ],
    vp_init: [
        (tdvpr_busy, Rax(_BUSY, _RCX)),
        (tdvpr_is_not_a_tdvpr, Rax(_METADATA, _RCX)),
        (tdr_busy, Rax(_BUSY, Operand.TDR)),
        *td_state(),
        (tdvps_is_incomplete, Rax(Status.TDCX_NUM_INCORRECT)),
        (vcpu_is_ready, Rax(Status.VCPU_STATE_INCORRECT)),
        (no_room_for_a_vcpu, Rax(Status.MAX_VCPUS_EXCEEDED)),
    ],
    vp_flush: [
        (tdvpr_busy, Rax(_BUSY, _RCX)),
        (tdvpr_is_not_a_tdvpr, Rax(_METADATA, _RCX)),
        (tdr_busy, Rax(_BUSY, Operand.TDR)),
        (td_has_no_key, Rax(Status.TD_KEYS_NOT_CONFIGURED)),
        (tdvps_is_incomplete, Rax(Status.TDCX_NUM_INCORRECT)),
        (vcpu_belongs_to_another_lp, Rax(Status.VCPU_NOT_ASSOCIATED)),
    ],
    mr_extend: [
        *tdr(_RDX),
        *td_state(lock=False),
        (gpa_unaligned, Rax(_INVALID, _RCX)),
        (gpa_is_shared, Rax(_INVALID, _RCX)),
        (no_sept_page, Rax(Status.EPT_ENTRY_NOT_PRESENT, _RCX)),
        (entry_is_exported, Rax(Status.EPT_ENTRY_NOT_PRESENT)),
    ],
    mr_finalize: [*tdr(_RCX), *td_state(lock=False), (no_initialized_vcpu, Rax(Status.NO_VCPUS))],
    mem_track: [
        *tdr(_RCX),
        *td_state(),
        (epoch_busy, Rax(_BUSY, Operand.TD_EPOCH)),
        (vcpu_runs_in_the_previous_epoch, Rax(Status.PREVIOUS_TLB_EPOCH_BUSY)),
    ],
    mem_sept_add: [*MEMORY, (entry_is_mapped, Rax(_STATE, _RCX)), *new_page(_R8)],
    mem_page_add: [
        *tdr(_RDX),
        *td_state(lock=False),
        *GPA_OPERAND,
        (no_sept_page, Rax(Status.EPT_WALK_FAILED, _RCX)),
        (entry_is_mapped, Rax(_STATE, _RCX)),
        (source_unaligned, Rax(_INVALID, _R9)),
        (source_in_seamrr, Rax(_INVALID, _R9)),
        (source_has_private_hkid, Rax(_INVALID, _R9)),
        *new_page(_R8),
    ],
    mem_page_aug: [*MEMORY, (entry_is_mapped, Rax(_STATE, _RCX)), *new_page(_R8)],
    mem_range_block: [*MEMORY, (entry_is_free, Rax(_STATE, _RCX))],
    mem_range_unblock: [
        *MEMORY,
        (entry_is_free, Rax(_STATE, _RCX)),
        (tlb_not_tracked, Rax(Status.TLB_TRACKING_NOT_DONE, Operand.SEPT_TREE)),
    ],
    mem_page_remove: [
        *MEMORY,
        (entry_is_a_table, Rax(_STATE, _RCX)),
        (page_busy, Rax(_BUSY, _RCX)),
        *TRACKED,
    ],
    mem_page_relocate: [
        *MEMORY,
        (entry_is_free, Rax(_STATE, _RCX)),
        (page_busy, Rax(_BUSY, _RCX)),
        *TRACKED,
        *new_page(_R8),
    ],
    mem_sept_remove: [
        *MEMORY,
        (entry_is_mapped, Rax(_STATE, _RCX)),
        (page_busy, Rax(_BUSY, _RCX)),
        *TRACKED,
        (table_is_not_empty, Rax(Status.EPT_PAGE_NOT_FREE, _RCX)),
    ],
    mem_page_demote: [*MEMORY, (entry_is_a_table, Rax(_STATE, _RCX)), *TRACKED, *new_page(_R8)],
    mem_page_promote: [
        *MEMORY,
        (entry_is_mapped, Rax(_STATE, _RCX)),
        (page_busy, Rax(_BUSY, _RCX)),
        *TRACKED,
        (pages_not_contiguous, Rax(Status.EPT_INVALID_PROMOTE_CONDITIONS, _RCX)),
    ],
    mem_sept_rd: MEMORY,
    mem_rd: [
        *tdr(_RDX),
        *td_state(),
        (td_is_not_debug, Rax(Status.TD_NON_DEBUG)),
        (gpa_unaligned, Rax(_INVALID, _RCX)),
        (sept_tree_busy, Rax(_BUSY, Operand.SEPT_TREE)),
        (gpa_is_shared, Rax(_INVALID, _RCX)),
        (no_sept_page, Rax(Status.EPT_ENTRY_NOT_PRESENT, _RCX)),
        (entry_busy, Rax(_BUSY, _RCX)),
    ],
}
CASES = [
    pytest.param(build, number, id=f"{build.__name__}-{violate.__name__}")
    for build, preconditions in LEAVES.items()
    for number, (violate, _) in enumerate(preconditions)
]
# A failed attempt on a lock leaves a mark (a reader, host priority); a vCPU index is used up before the TSC is checked.
MARKS_ITS_FAILURE = frozenset({
    tdr_busy, op_state_busy, new_page_busy, page_busy, tdvpr_busy, entry_busy, sept_tree_busy, kot_busy,
})  # fmt: skip


@pytest.mark.parametrize("build", LEAVES, ids=lambda build: build.__name__)
def test_the_scene_succeeds(host: SeamcallHost, build: Callable[[SeamcallHost], Scene]) -> None:
    assert build(host).call() == Rax(Status.SUCCESS)


@pytest.mark.parametrize(("build", "number"), CASES)
def test_refuses_and_changes_nothing(host: SeamcallHost, build: Callable[[SeamcallHost], Scene], number: int) -> None:
    violate, expected = LEAVES[build][number]
    scene = build(host)
    violate(scene)
    before = snapshot(scene)

    assert scene.call() == expected
    if violate not in MARKS_ITS_FAILURE:
        assert snapshot(scene) == before, "a failed leaf changed state"


@pytest.mark.parametrize(("build", "number"), CASES)
def test_reports_the_first_violated_precondition(
    host: SeamcallHost, build: Callable[[SeamcallHost], Scene], number: int
) -> None:
    scene = build(host)
    for violate, _ in reversed(LEAVES[build][number:]):
        violate(scene)

    assert scene.call() == LEAVES[build][number][1]


def test_relocate_refuses_the_page_itself(host: SeamcallHost) -> None:
    scene = mem_page_relocate(host)
    target_is_the_page_itself(scene)
    assert scene.call() == Rax(_INVALID, _R8)


def test_the_default_eptp_has_four_levels() -> None:
    assert TdParams().eptp_controls == EPTP_4_LEVEL
