"""The TDX module: its global state, and the checks that many leaves share.

The module is an instruction: the host executes SEAMCALL (`seamcall`), a TD exits to it (`vmexit`). Calls must not
overlap in time; the machine that owns the LPs serialises them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from sim_backend.hw.gprs import Gprs
from sim_backend.hw.keys import PconfigResult
from sim_backend.hw.memory import PhysicalMemory
from sim_backend.hw.platform import Platform
from sim_backend.tdx_module import dispatch, page_build
from sim_backend.tdx_module.cpu_capabilities import CpuCapabilities
from sim_backend.tdx_module.cpuid_virtualization import CpuidValues
from sim_backend.tdx_module.errors import LeafError, SimBug
from sim_backend.tdx_module.kot import KeyOwnershipTable
from sim_backend.tdx_module.locks import SharexLock
from sim_backend.tdx_module.mrtd import PageExtender
from sim_backend.tdx_module.not_modelled import NotModelled
from sim_backend.tdx_module.pamt import GIB, PageType, Pamt, Tdmr
from sim_backend.tdx_module.sys_state import SysState
from sim_backend.tdx_module.tdr import LifecycleState, Tdr
from sim_backend.tdx_module.tdvps import Tdvps
from sim_backend.tdx_module.wbcache import CacheWriteBack
from uapi_ctypes.tdx_status import Operand, Status

if TYPE_CHECKING:
    from sim_backend.cpu.engine import CpuFactory
    from sim_backend.tdx_module.cpu_capabilities import CpuCapabilities
    from sim_backend.tdx_module.profile import ModuleProfile

_TDR: Final = int(PageType.TDR)
_TDVPR: Final = int(PageType.TDVPR)
_KEYS_CONFIGURED: Final = int(LifecycleState.KEYS_CONFIGURED)
_MIN_TDCS_PAGES: Final = 6
_RDSEED_ATTEMPTS: Final = 6
_TDMR_INIT_BYTES: Final = 1024 * 4096  # per call


class TdxModule:
    """One loaded TDX module.

    `running[lp]` is the vCPU that LP `lp` executes, between a `seamcall` and a `vmexit` that return True.
    """

    __slots__ = (
        "cache_blocks",
        "capabilities",
        "capabilities",
        "cmrs",
        "cpuid_sample",
        "cpus",
        "extender",
        "first_private_hkid",
        "global_hkid",
        "global_lock",
        "hkid_mask",
        "hkid_start_bit",
        "kot",
        "last_private_hkid",
        "lp_is_init",
        "memory",
        "msrs",
        "pamt",
        "pkg_config_bitmap",
        "platform",
        "profile",
        "q",
        "running",
        "seamrr",
        "shared_end",
        "statuses",
        "sys_fields",
        "sys_state",
        "tdmrs",
        "tdrs",
        "tdvpses",
        "wbcache",
    )

    def __init__(
        self,
        platform: Platform,
        memory: PhysicalMemory,
        profile: ModuleProfile,
        cpus: CpuFactory,
    ) -> None:
        """Load the module: state SYSINIT_PENDING, nothing known of the platform."""
        self.platform: Final[Platform] = platform
        self.memory: Final[PhysicalMemory] = memory
        self.q: Final[memoryview] = memory.q
        self.profile: Final[ModuleProfile] = profile
        self.statuses = profile.statuses
        self.cpus: Final[CpuFactory] = cpus
        self.extender = PageExtender()
        self.sys_state: int = SysState.SYSINIT_PENDING
        self.global_lock = SharexLock()
        self.lp_is_init = [False] * len(platform.lps)
        self.running: list[Tdvps | None] = [None] * len(platform.lps)
        # Filled by TDH.SYS.INIT
        self.capabilities: CpuCapabilities | None = None
        self.first_private_hkid = 0
        self.last_private_hkid = 0
        self.hkid_start_bit = platform.keyids.start_bit
        self.hkid_mask = ((1 << platform.maxpa) - 1) & -(1 << self.hkid_start_bit)
        self.seamrr = (0, 0)  # HPA, size [bytes]
        self.shared_end = 0  # where HPAs with private HKIDs begin
        self.cache_blocks = 0  # steps of TDH.PHYMEM.CACHE.WB between which an interrupt is served
        self.cpuid_sample: list[CpuidValues] = []  # native answers, in the order of the lookup table
        self.cmrs: list[tuple[int, int]] = []
        self.msrs: dict[int, int] = {}  # MSR values that every LP must share
        self.sys_fields: dict[int, int] = {}  # metadata field id -> value, for fields with no attribute
        # Filled by TDH.SYS.CONFIG and TDH.SYS.KEY.CONFIG
        self.global_hkid = 0
        self.tdmrs: list[Tdmr] = []
        self.pkg_config_bitmap = 0  # bit n: package n has the global key
        self.kot = KeyOwnershipTable(0)
        self.pamt = Pamt(memory, self.hkid_start_bit)
        self.tdrs: dict[int, Tdr] = {}  # HPA -> TDR
        self.tdvpses: dict[int, Tdvps] = {}  # HPA of the TDVPR -> TDVPS
        self.wbcache = [CacheWriteBack() for _ in range(platform.packages)]

    # The two ways in

    def seamcall(self, lp: int, regs: Gprs) -> bool:
        """Execute SEAMCALL on LP `lp`: the leaf in RAX, the completion status in RAX afterwards.

        Return True when the LP has entered a TD (run ``running[lp].cpu``, then call `vmexit`).
        Raise `NotModelled` where the model knows too little.
        """
        return dispatch.seamcall(self, lp, regs)

    def vmexit(self, lp: int, regs: Gprs) -> bool:
        """Handle the exit that the CPU of ``running[lp]`` reports.

        Return True on a TD exit: `regs` are what the host sees after TDH.VP.ENTER. False: resume the guest.
        """
        return dispatch.vmexit(self, lp, regs)

    # Checks that many leaves share. Each raises LeafError; locks taken are released when the leaf ends.

    def lock_tdr(self, hpa: int, operand: int, exclusive: int = 0) -> Tdr:
        """Check that `hpa` is a TDR page and lock it; `exclusive` is 1 or 0."""
        self.pamt.lock(hpa, _TDR, operand, exclusive)
        return self.tdrs[hpa]

    def lock_tdvpr(self, hpa: int, operand: int, exclusive: int = 0) -> Tdvps:
        """Check that `hpa` is a TDVPR page, lock it, and lock its TDR shared (OPERAND_BUSY names TDR)."""
        tdvps = self.tdvpses.get(hpa)
        if tdvps is not None and not exclusive and self.pamt.lock_path(tdvps.pamt_path):
            return tdvps  # the usual case in one go
        index = self.pamt.lock(hpa, _TDVPR, operand, exclusive)
        self.pamt.lock_entry(self.pamt.entry_4k(self.q[index] >> 24 << 12), Operand.TDR, 0)
        return self.tdvpses[hpa]

    def check_td(self, tdr: Tdr, allowed: int) -> None:
        """Check TD_FATAL, keys, TDCS pages and OP_STATE (a mask of allowed states), with its lock tried shared."""
        if tdr.fatal:
            raise LeafError(Status.TD_FATAL)
        if tdr.lifecycle_state != _KEYS_CONFIGURED:
            raise LeafError(Status.TD_KEYS_NOT_CONFIGURED)
        if tdr.num_tdcx < _MIN_TDCS_PAGES:
            raise LeafError(Status.TDCS_NOT_ALLOCATED)
        tdcs = tdr.tdcs
        if tdcs.op_state_lock.raw and not tdcs.op_state_lock.try_shared():
            raise LeafError(Status.OPERAND_BUSY, Operand.OP_STATE)
        if not allowed >> tdcs.op_state & 1:
            raise LeafError(Status.OP_STATE_INCORRECT)

    def check_td_locked(self, tdr: Tdr, allowed: int) -> None:
        """Check the same without the OP_STATE lock: the caller holds the TDR exclusively."""
        if tdr.fatal:
            raise LeafError(Status.TD_FATAL)
        if tdr.lifecycle_state != _KEYS_CONFIGURED:
            raise LeafError(Status.TD_KEYS_NOT_CONFIGURED)
        if tdr.num_tdcx < _MIN_TDCS_PAGES:
            raise LeafError(Status.TDCS_NOT_ALLOCATED)
        if not allowed >> tdr.tdcs.op_state & 1:
            raise LeafError(Status.OP_STATE_INCORRECT)

    def check_td_exclusive(self, tdr: Tdr, allowed: int) -> None:
        """Check the same with the OP_STATE lock tried exclusively."""
        if tdr.fatal:
            raise LeafError(Status.TD_FATAL)
        if tdr.lifecycle_state != _KEYS_CONFIGURED:
            raise LeafError(Status.TD_KEYS_NOT_CONFIGURED)
        if tdr.num_tdcx < _MIN_TDCS_PAGES:
            raise LeafError(Status.TDCS_NOT_ALLOCATED)
        if not tdr.tdcs.op_state_lock.try_exclusive():
            raise LeafError(Status.OPERAND_BUSY, Operand.OP_STATE)
        if not allowed >> tdr.tdcs.op_state & 1:
            raise LeafError(Status.OP_STATE_INCORRECT)

    def check_shared_hpa(self, hpa: int, alignment: int, operand: int) -> None:
        """Check that `hpa` [bytes, aligned to `alignment`] is memory the host may hand in: a shared HKID, no SEAMRR.

        Such pages may lie inside TDMRs. Raise OPERAND_INVALID naming `operand`.
        """
        if hpa & (alignment - 1) or hpa >= self.shared_end:
            raise LeafError(Status.OPERAND_INVALID, operand)
        base, size = self.seamrr
        hpa &= ~self.hkid_mask
        if base < hpa + alignment and hpa < base + size:
            raise LeafError(Status.OPERAND_INVALID, operand)

    def read_shared(self, hpa: int, length: int) -> bytes:
        """Read `length` bytes at `hpa`, whatever shared HKID it carries."""
        try:
            return self.memory.read(hpa & ~self.hkid_mask, length)
        except IndexError as error:
            raise NotModelled(str(error)) from None

    def write_shared(self, hpa: int, data: bytes) -> None:
        """Write `data` at `hpa`, whatever shared HKID it carries."""
        try:
            self.memory.write(hpa & ~self.hkid_mask, data)
        except IndexError as error:
            raise NotModelled(str(error)) from None

    def copy_from_shared(self, source: int, page: int) -> None:
        """Copy the 4 KiB at `source`, which may carry a shared HKID, into the RAM page at HPA `page`."""
        source &= ~self.hkid_mask
        memory = self.memory
        if source < memory.ram_bytes:
            memory.b[page : page + 4096] = memory.b[source : source + 4096]
        else:
            memory.b[page : page + 4096] = self.read_shared(source, 4096)

    # Hardware that several leaves ask for

    def random_256(self) -> list[int]:
        """Return four 64-bit random numbers; raise RND_NO_ENTROPY when RDSEED fails too often."""
        numbers: list[int] = []
        for _ in range(_RDSEED_ATTEMPTS):
            number = self.platform.rdrand()
            if number is not None:
                numbers.append(number)
                if len(numbers) == 4:
                    return numbers
        raise LeafError(Status.RND_NO_ENTROPY)

    def program_key(self) -> None:
        """Execute PCONFIG to program a random key; raise KEY_GENERATION_FAILED or OPERAND_BUSY(KET)."""
        result = self.platform.pconfig_result
        if result == PconfigResult.DEVICE_BUSY:
            raise LeafError(Status.OPERAND_BUSY, Operand.KET)
        if result == PconfigResult.ENTROPY_ERROR:
            raise LeafError(Status.KEY_GENERATION_FAILED)
        if result != PconfigResult.SUCCESS:
            raise NotModelled(f"PCONFIG result {result}: the module shuts the platform down")

    def sampled_capabilities(self) -> CpuCapabilities:
        """Return what TDH.SYS.INIT found out about the CPU."""
        if self.capabilities is None:
            raise SimBug("the CPU's capabilities before TDH.SYS.INIT")
        return self.capabilities

    def forget_vcpu(self, tdvpr: int) -> None:
        """Drop the vCPU whose TDVPR page was reclaimed."""
        tdvps = self.tdvpses.pop(tdvpr)
        if tdvps.cpu is not None:
            tdvps.cpu.close()

    # What nobody can tell from the leaves, done faster

    def tdmr_init_all(self, base: int) -> tuple[int, int]:
        """Do what TDH.SYS.TDMR.INIT of the TDMR at `base`, repeated until it is done, does.

        Return how many calls that takes, and RDX after the last. Raise ``LookupError`` for an unknown TDMR, or when
        the module is not ready.
        """
        if self.sys_state != SysState.SYS_READY:
            raise LookupError("the module is not ready")
        tdmr = next((tdmr for tdmr in self.tdmrs if tdmr.base == base), None)
        if tdmr is None:
            raise LookupError(f"no TDMR starts at HPA {base:#x}")
        end = tdmr.base + tdmr.size
        calls = (end - tdmr.next_to_initialize) // _TDMR_INIT_BYTES
        self.pamt.initialize(tdmr, tdmr.next_to_initialize, end)
        tdmr.next_to_initialize = end
        return calls, end & -GIB

    def mem_page_add_extend(self, lp: int, regs: Gprs) -> None:
        """Execute TDH.MEM.PAGE.ADD with `regs`, and when it succeeds, TDH.MR.EXTEND of all of the page's chunks.

        `regs` are TDH.MEM.PAGE.ADD's in and out. (The extensions cannot fail: the page was just mapped.)
        """
        page_build.add_and_extend(self, lp, regs)
