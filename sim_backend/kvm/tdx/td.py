"""KVM's own state of a TD and of its vCPUs (`struct kvm_tdx`, `struct vcpu_tdx`)."""

import threading
from enum import Enum, auto
from typing import Final

from sim_backend.hw.gprs import Gprs, new_gprs
from sim_backend.kvm.cpuid import CpuidEntry
from sim_backend.kvm.mmu.mirror_ept import MirrorEpt
from sim_backend.kvm.mmu.shared_ept import SharedEpt


class TdState(Enum):
    """`enum kvm_tdx_state`: what the VM-scoped commands have reached.

    UNINITIALIZED --KVM_TDX_INIT_VM--> INITIALIZED --KVM_TDX_FINALIZE_VM--> RUNNABLE
    """

    UNINITIALIZED = auto()
    INITIALIZED = auto()
    RUNNABLE = auto()


class Td:
    """One TD as KVM sees it: pages given to the module, key id, parameters, and the two page tables."""

    def __init__(self) -> None:
        self.state = TdState.UNINITIALIZED
        self.hkid = 0  # 0: none held (KeyID 0 is TME's own, never a TD's)
        self.tdr = 0  # HPA; 0: there is none
        self.tdcs: list[int] = []  # HPAs of the TDCX pages
        self.attributes = 0
        self.xfam = 0
        self.tsc_offset = 0
        self.tsc_multiplier = 0
        self.ept_levels = 0  # 4 or 5; 0 until KVM_TDX_INIT_VM
        self.gfn_shared_bit = 0  # the S-bit as a GFN bit; 0 until KVM_TDX_INIT_VM, so every check on it is vacuous
        self.mirror: MirrorEpt | None = None
        self.shared: SharedEpt | None = None
        self.mmu_lock: Final = threading.RLock()
        self.wait_for_sept_zap = False  # vCPUs stay out of the guest while a zap is retried
        self.premapped: Final[set[int]] = set()  # 6.16: GFNs mapped by KVM whose PAGE.ADD failed
        self.init_cpuid: tuple[CpuidEntry, ...] = ()  # v17: the CPUID entries of KVM_TDX_INIT_VM
        self.released = False  # v17: KVM_TDX_RELEASE_VM was called

    @property
    def gpaw52(self) -> bool:
        """Whether guest-physical addresses are 52 bits wide."""
        return self.gfn_shared_bit == 1 << 51 - 12


class TdVcpu:
    """One vCPU of a TD. `regs` are the operands of the next TDH.VP.ENTER and the results of the last one."""

    __slots__ = (
        "associated_lp",
        "halt_interrupts_blocked",
        "initialized",
        "interrupt_since_halt",
        "last_exit",
        "map_gpa_end",
        "map_gpa_next",
        "pi_descriptor",
        "regs",
        "root_loaded",
        "tdcx",
        "tdvpr",
        "tlb_flush",
    )

    def __init__(self) -> None:
        self.tdvpr = 0  # HPA
        self.tdcx: list[int] = []
        self.initialized = False  # TDH.VP.INIT was done
        self.root_loaded = False  # the Shared EPTP has been written
        self.associated_lp = -1  # the LP that the module has associated the vCPU with
        self.tlb_flush = False  # KVM_REQ_TLB_FLUSH: INVEPT before the next entry
        self.pi_descriptor = 0  # HPA of the 64-byte posted-interrupt descriptor
        self.regs: Gprs = new_gprs()
        self.last_exit = 0  # basic exit reason of the last TD exit; a TDVMCALL for an instruction counts as it
        self.halt_interrupts_blocked = False  # v17: r12 of the last HLT
        self.interrupt_since_halt = False  # v17: an interrupt was delivered after the last HLT
        self.map_gpa_next = 0
        self.map_gpa_end = 0
