"""A virtual CPU: the state that every kind of VM has (``struct kvm_vcpu``)."""

import contextlib
import copy
import errno
import struct
import threading
from collections.abc import Callable, Iterator
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Final

from sim_backend.kvm.cpuid import VcpuCpuid, with_runtime_bits
from sim_backend.kvm.errors import Errno
from sim_backend.kvm.kvm_run_page import IMMEDIATE_EXIT, REQUEST_INTERRUPT_WINDOW, KvmRunPage
from sim_backend.kvm.lapic import TASKPRI
from sim_backend.kvm.msrs import (
    MSR_KVM_SYSTEM_TIME_NEW,
    MsrRefused,
    set_apic_base,
)
from sim_backend.kvm.registers import REGS, pack_sregs_head, set_sregs_head
from sim_backend.kvm.signals import SIGNALS, RunMask
from sim_backend.kvm.stats import VCPU_STATS, StatsFile
from sim_backend.kvm.vcpu_reset import reset_vcpu, start_at_sipi_vector

if TYPE_CHECKING:
    from sim_backend.cpu.engine import Cpu, CpuState
    from sim_backend.kvm.lapic import LocalApic
    from sim_backend.kvm.vm import Vm


class MpState(IntEnum):
    """``KVM_MP_STATE_*``."""

    RUNNABLE = 0
    UNINITIALIZED = 1
    INIT_RECEIVED = 2
    HALTED = 3
    SIPI_RECEIVED = 4
    AP_RESET_HOLD = 9


_KVM_ORDER: Final = (0, 3, 1, 2, 6, 7, 4, 5, 8, 9, 10, 11, 12, 13, 14, 15)  # kvm_regs against Gprs
_RFLAGS_IF: Final = 1 << 9
KVM_X86_QUIRK_STUFF_FEATURE_MSRS: Final = 1 << 8
_GUESTDBG_USE_HW_BP: Final = 1 << 17
_RFLAGS_FIXED: Final = 1 << 1


class QueuedException:
    """The exception that waits for the next entry, or that was last (``struct kvm_queued_exception``)."""

    __slots__ = ("error_code", "has_error_code", "has_payload", "injected", "payload", "pending", "vector")

    def __init__(self) -> None:
        self.vector = 0
        self.has_error_code = False
        self.error_code = 0
        self.pending = False
        self.injected = False
        self.has_payload = False
        self.payload = 0


class Vcpu:
    """One vCPU. Its thread is whoever holds `mutex`; `kick` and the pending flags are for everybody else."""

    def __init__(self, vm: "Vm", vcpu_id: int, index: int) -> None:
        self.vm: Final = vm
        self.id: Final = vcpu_id
        self.index = index
        self.mutex: Final = threading.Lock()
        self.run: Final = KvmRunPage(vm.dirty_ring_bytes)
        self.vendor: Any = None  # the operations' own state
        self.cpu: Cpu | None = None  # hardware context of a vCPU whose state is not protected
        self.apic: LocalApic | None = None
        self.apic_base = 0xFEE0_0900 if vcpu_id == vm.boot_vcpu_id else 0xFEE0_0800
        self.cpuid: VcpuCpuid = VcpuCpuid(())
        self.mp_state: int = MpState.RUNNABLE
        self.lp = -1  # logical processor that it last ran on
        self.has_run = False  # the guest was entered at least once: CPUID is frozen
        self.complete_userspace_io: Callable[[], bool] | None = None  # at the next KVM_RUN; False: exit again

        # Who is running it, and how to get it out of the guest.
        self.in_guest = False
        self.entries = 0  # how often the guest was entered, so that a re-entry is not taken for a stay
        self.thread = 0  # ident of the thread inside KVM_RUN, else 0
        self.kicked = False  # leave the guest, or do not enter it, and look around first
        self.signal_mark = 0  # position of `SIGNALS` when the current call began
        self.wakeup: Final = threading.Condition(threading.Lock())

        # Events.
        self.nmi_queued = 0  # sent, and not looked at yet (any thread, under `wakeup`)
        self.nmi_pending = 0
        self.nmi_injected = False
        self.nmi_masked = False
        self.smi_pending = False
        self.triple_fault_pending = False
        self.exception: Final = QueuedException()
        self.interrupt = -1  # vector queued by KVM_INTERRUPT or taken from a controller
        self.interrupt_nr = 0  # the one before, which KVM_GET_VCPU_EVENTS still shows
        self.interrupt_soft = False
        self.interrupt_shadow = 0
        self.shadow_over = False  # the instruction in the shadow was executed by us
        self.pending_external_vector = -1  # KVM_INTERRUPT with a split irqchip
        self.pv_unhalted = False  # KVM_HC_KICK_CPU named this vCPU
        self.in_smm = False
        self.sipi_vector = 0
        self.cr8 = 0
        self.ioapic_eoi_vector = -1  # a level-triggered vector that user space's IOAPIC must hear of
        # time.monotonic_ns() at which the APIC timer or the PIT wants attention, 0: never
        self.timer_due_ns: int = vm.pit.due_ns if vm.pit is not None else 0

        # Statistics, by their names in KVM_GET_STATS_FD.
        self.counters = dict.fromkeys((name for name, _ in VCPU_STATS), 0)
        self.stats_files: list[StatsFile] = []

        # Registers that KVM keeps in software.
        profile = vm.host.profile
        self.tsc_khz = vm.default_tsc_khz  # [kHz]
        self.tsc_offset = 0
        self.tsc_catchup = False
        self.msrs: dict[int, int] = {}  # values that differ from reset
        self.mcg_cap = profile.default_mcg_cap
        self.saved_state: CpuState | None = None
        self.set_pdptrs: list[int] | None = None  # by KVM_SET_SREGS2; the CPU's own come from memory
        self.registers_set = False  # while an instruction waits for user space (emulate_regs_need_sync_from_vcpu)
        self.set_rflags = -1  # as KVM_SET_REGS gave it: reserved bits stay until the guest runs
        self.set_rflags_seen = -1  # what the CPU made of it
        self.xstate_bv = 0
        self.xsave_extended = b""
        self.guest_debug = 0
        self.single_step = False
        self.resume_rip = -1  # where a breakpoint was just reported
        self.guest_debug_registers: list[int] = [0] * 8
        self.svm_gif = True  # SVM's global interrupt flag
        self.feature_msrs_stuffed = not vm.disabled_quirks & KVM_X86_QUIRK_STUFF_FEATURE_MSRS
        self.guest_breakpoints = False  # user space switched some on in the guest's own DR7
        self.tpr_access_reporting = False
        self.signal_mask: int | None = None
        self.run_mask: RunMask | None = None  # while KVM_RUN has that mask
        self.hyperv_enforce_cpuid = False
        self.enforce_pv_features = False

    @property
    def is_bsp(self) -> bool:
        """Tell whether this is the boot processor."""
        return self.id == self.vm.boot_vcpu_id

    # ---- running --------------------------------------------------------------------------------------------

    def kick(self) -> None:
        """Make the vCPU leave the guest, or wake from a halt, and look around (any thread)."""
        self.kicked = True
        if self.in_guest:
            self.vm.ops.vcpu_kick(self)
        if self.thread:
            with self.wakeup:
                self.wakeup.notify_all()

    def signal_pending(self) -> bool:
        """Tell whether the current call was told to end early: a signal came, or immediate_exit was set."""
        return SIGNALS.since(self.signal_mark) or bool(self.thread and self.run.u8[IMMEDIATE_EXIT])

    @contextlib.contextmanager
    def on_processor(self) -> Iterator[int]:
        """Load the vCPU on the calling thread's logical processor (vcpu_load, vcpu_put); `mutex` held."""
        vm = self.vm
        lps = vm.host.lps
        lp = lps.get(self.lp)
        try:
            vm.ops.vcpu_load(self, lp)
            self.lp = lp
            try:
                yield lp
            finally:
                vm.ops.vcpu_put(self)
        finally:
            lps.put()

    def has_work(self) -> bool:
        """Tell whether a halted vCPU should go on (kvm_arch_vcpu_runnable)."""
        return self.vm.dead or self.triple_fault_pending or self.vm.ops.vcpu_has_events(self)

    def unhalt(self) -> None:
        """Act on what ended the wait (the end of `vcpu_block`): INIT_RECEIVED is left by a SIPI only."""
        self.accept_apic_events()
        if self.mp_state in (MpState.HALTED, MpState.AP_RESET_HOLD):
            self.set_mp_state(MpState.RUNNABLE)

    def set_mp_state(self, state: int) -> None:
        """Change the activity state; a vCPU that runs has used its KVM_HC_KICK_CPU up (`kvm_set_mp_state()`)."""
        self.mp_state = state
        if state == MpState.RUNNABLE:
            self.pv_unhalted = False

    def unhalt_by_message(self) -> None:
        """Wake from HLT whatever is pending: KVM_HC_KICK_CPU, or a message of the reserved delivery mode 3."""
        self.pv_unhalted = True
        self.kick()

    def accepts_init_and_sipi(self) -> bool:
        """Tell whether INIT and SIPI act now (kvm_apic_init_sipi_allowed): never on a protected guest."""
        return not (self.vm.ops.has_protected_state or self.in_smm) and self.svm_gif

    def accept_apic_events(self) -> None:
        """Act on a pending INIT or SIPI (kvm_apic_accept_events)."""
        apic = self.apic
        if apic is None or not (apic.init_pending or apic.sipi_pending):
            return
        if not self.accepts_init_and_sipi():
            apic.sipi_pending = False  # an INIT waits, a SIPI is lost
            return
        if apic.init_pending:
            apic.init_pending = False
            reset_vcpu(self, init_event=True)
            self.set_mp_state(MpState.RUNNABLE if self.is_bsp else MpState.INIT_RECEIVED)
        if apic.sipi_pending:
            apic.sipi_pending = False
            if self.mp_state == MpState.INIT_RECEIVED:
                start_at_sipi_vector(self, apic.sipi_vector)
                self.set_mp_state(MpState.RUNNABLE)

    def free(self) -> None:
        """Release what the vCPU itself holds (at VM destruction)."""
        if self.cpu is not None:
            self.cpu.close()
            self.cpu = None
        self.run.release()

    # ---- events ---------------------------------------------------------------------------------------------

    def queue_nmi(self) -> None:
        """Send an NMI (any thread); the vCPU looks at its next entry, and a halted one wakes up to look."""
        with self.wakeup:
            self.nmi_queued += 1
        self.kick()

    def process_nmi(self) -> None:
        """Make what was sent pending (vCPU's mutex held): one beside one in progress, two otherwise."""
        with self.wakeup:
            queued, self.nmi_queued = self.nmi_queued, 0
        limit = 1 if self.nmi_masked or self.nmi_injected else 2
        self.nmi_pending = min(self.nmi_pending + queued, limit)

    def queue_smi(self) -> bool:
        """Make an SMI pending (any thread); False where there is no system management mode (kvm_inject_smi)."""
        if not self.vm.host.profile.behaves("smm") or self.vm.ops.has_protected_state:
            return False
        self.smi_pending = True
        self.kick()
        return True

    def queue_exception(self, vector: int, error_code: int | None = None) -> None:
        """Make an exception pending for the next entry."""
        exception = self.exception
        exception.vector, exception.pending, exception.injected = vector, True, False
        exception.has_error_code, exception.error_code = error_code is not None, error_code or 0
        exception.has_payload = False

    def exception_queued(self) -> bool:
        """Tell whether an exception waits to be delivered."""
        return self.exception.pending or self.exception.injected

    def timer_armed(self, expires_ns: int) -> None:
        """Note a timer's new expiry, 0 for none: the run loop and a halted vCPU look at the earliest."""
        with self.wakeup:  # the PIT's thread is another vCPU's
            if expires_ns and (not self.timer_due_ns or expires_ns < self.timer_due_ns):
                self.timer_due_ns = expires_ns

    def interrupt_flag(self) -> bool:
        """Return RFLAGS.IF of an unprotected vCPU."""
        return self.cpu is not None and bool(self.cpu.rflags & _RFLAGS_IF)

    def ready_for_interrupt(self) -> bool:
        """Tell user space whether KVM_INTERRUPT would be taken now (kvm_vcpu_ready_for_interrupt_injection)."""
        cpu, irqchip = self.cpu, self.vm.irqchip
        if irqchip is not None and not irqchip.split:
            return True
        if cpu is None or self.exception_queued() or self.nmi_injected or not self.accepts_user_interrupt():
            return False
        return self.interrupts_allowed(cpu)

    def accepts_user_interrupt(self) -> bool:
        """Tell whether there is a place for KVM_INTERRUPT's vector (`kvm_cpu_accept_dm_intr()`)."""
        if self.apic is None:
            return self.interrupt < 0
        return self.pending_external_vector < 0 and self.apic.accepts_extint()

    def wants_interrupt_window(self) -> bool:
        """Tell whether user space waits for a moment at which it can inject (`dm_request_for_irq_injection()`)."""
        irqchip = self.vm.irqchip
        return (
            bool(self.run.u8[REQUEST_INTERRUPT_WINDOW])
            and (irqchip is None or irqchip.split)
            and self.accepts_user_interrupt()
        )

    def has_external_interrupt(self) -> bool:
        """Tell whether the 8259 pair, or user space's, has an interrupt that LINT0 lets through."""
        apic, irqchip = self.apic, self.vm.irqchip
        if apic is None or irqchip is None or not apic.accepts_extint():
            return False
        return irqchip.pic.has_interrupt() if irqchip.pic is not None else self.pending_external_vector >= 0

    def has_interrupt(self) -> bool:
        """Tell whether a controller in the kernel has something to deliver (`kvm_cpu_has_interrupt()`)."""
        apic = self.apic
        if apic is None:
            return self.interrupt >= 0
        return self.has_external_interrupt() or apic.highest_pending() >= 0

    def uses_hardware_breakpoints(self) -> bool:
        """Tell whether user space set breakpoints in the debug registers."""
        return bool(self.guest_debug & _GUESTDBG_USE_HW_BP)

    def needs_stepping(self) -> bool:
        """Tell whether the next entry may execute one instruction only."""
        return (
            self.single_step
            or self.nmi_masked
            or self.interrupt_shadow != 0
            or bool(self.guest_debug & _GUESTDBG_USE_HW_BP)
        )

    def interrupts_allowed(self, cpu: "Cpu") -> bool:
        """Tell whether IF is set and no STI or MOV SS shadow is left."""
        if self.interrupt_shadow:
            return False
        if self.shadow_over:
            return bool(cpu.rflags & _RFLAGS_IF)
        return cpu.can_take_interrupt()

    def inject_mce(self, data: bytes) -> int:
        """KVM_X86_SET_MCE, after its checks: fill the bank and raise #MC for an uncorrected error."""
        status, addr, misc, mcg_status, bank = struct.unpack_from("<QQQQB", data)
        uncorrected = status >> 61 & 1
        if uncorrected and not self._mce_bank_enabled(bank):
            return 0
        msrs, base = self.msrs, 0x400 + 4 * bank
        if uncorrected:
            if msrs.get(0x17A, 0) >> 2 & 1:
                self.triple_fault_pending = True
                return 0
            msrs[base + 1], msrs[base + 2], msrs[base + 3] = status, addr, misc
            msrs[0x17A] = mcg_status
            self.queue_exception(18)
        elif not msrs.get(base + 1, 0) >> 63 & 1 or not msrs.get(base + 1, 0) >> 61 & 1:
            msrs[base + 1], msrs[base + 2], msrs[base + 3] = status, addr, misc
        return 0

    def _mce_bank_enabled(self, bank: int) -> bool:
        all_ones = (1 << 64) - 1
        if self.mcg_cap >> 8 & 1 and self.msrs.get(0x17B) != all_ones:
            return False
        return self.msrs.get(0x400 + 4 * bank) == all_ones

    # ---- registers of an unprotected vCPU -------------------------------------------------------------------

    def pack_regs(self) -> bytes:
        """Return ``struct kvm_regs``."""
        cpu = self.cpu
        if cpu is None:
            return bytes(REGS.size)
        gprs, rflags = cpu.gprs, cpu.rflags
        if self.set_rflags >= 0 and rflags == self.set_rflags_seen:
            rflags = self.set_rflags
        return REGS.pack(*(gprs[index] for index in _KVM_ORDER), cpu.rip, rflags)

    def unpack_regs(self, data: bytes) -> None:
        """Take ``struct kvm_regs``; a pending exception is forgotten."""
        cpu = self.cpu
        if cpu is None:
            raise Errno(errno.EINVAL)
        values = REGS.unpack(data)
        for position, index in enumerate(_KVM_ORDER):
            cpu.gprs[index] = values[position]
        cpu.rip = values[16]
        self.set_rflags = values[17] & self.vm.host.profile.rflags_kept | _RFLAGS_FIXED
        cpu.rflags = self.set_rflags
        self.set_rflags_seen = cpu.rflags
        self.registers_set = True
        self.exception.pending = False

    def pack_sregs(self) -> bytes:
        """Return ``struct kvm_sregs``."""
        cpu = self.cpu
        if cpu is None:
            raise Errno(errno.EINVAL)
        bitmap = [0, 0, 0, 0]
        if self.interrupt >= 0 and not self.interrupt_soft:
            bitmap[self.interrupt >> 6] = 1 << (self.interrupt & 63)
        return pack_sregs_head(self, self.read_state()) + struct.pack("<4Q", *bitmap)

    def unpack_sregs(self, data: bytes) -> None:
        """Take ``struct kvm_sregs``; raise EINVAL as KVM_SET_SREGS does."""
        state = set_sregs_head(self, data)
        self.write_state(state)
        bitmap = struct.unpack_from("<4Q", data, 280)
        pending = next((64 * word + (bits & -bits).bit_length() - 1 for word, bits in enumerate(bitmap) if bits), -1)
        if pending >= 0:
            self.interrupt, self.interrupt_soft = pending, False

    def read_state(self) -> "CpuState":
        """Return the CPU's state, as user space last set it while the guest has not run since."""
        if self.saved_state is not None:
            return copy.deepcopy(self.saved_state)
        if self.cpu is None:
            raise Errno(errno.EINVAL)
        return self.cpu.get_state()

    def write_state(self, state: "CpuState") -> None:
        """Install `state`; what the CPU does not keep of it is shown again until the guest runs."""
        if self.cpu is None:
            raise Errno(errno.EINVAL)
        self.cpu.set_state(state)
        self.saved_state, self.set_pdptrs = state, None

    def get_cr8(self) -> int:
        """Return CR8: the TPR's upper half where the local APIC is in the kernel."""
        apic = self.apic
        return apic.regs[TASKPRI] >> 4 if apic is not None else self.cr8

    def set_cr8(self, value: int) -> bool:
        """Set CR8; False, and no change, for reserved bits (kvm_set_cr8)."""
        if value & ~0xF:
            return False
        if self.apic is not None:
            self.apic.regs[TASKPRI] = value << 4
        else:
            self.cr8 = value
        return True

    def set_apic_base_from_sregs(self, value: int) -> None:
        """Take IA32_APIC_BASE from user space; EINVAL where KVM refuses it."""
        if value == self.apic_base:
            return
        try:
            set_apic_base(self, value, host_initiated=True)
        except MsrRefused:
            raise Errno(errno.EINVAL) from None

    def kvmclock_active(self) -> bool:
        """Tell whether the guest has switched kvmclock on."""
        return bool(self.msrs.get(MSR_KVM_SYSTEM_TIME_NEW, 0) & 1)

    def refresh_runtime_cpuid(self) -> None:
        """Bring the bits of CPUID that mirror control registers up to date (kvm_update_cpuid_runtime)."""
        if self.cpuid.entries:
            entries = with_runtime_bits(self)
            if entries != self.cpuid.entries:
                self.cpuid = VcpuCpuid(entries)

    def set_tsc_offset(self, offset: int) -> None:
        """Take the offset of KVM_VCPU_TSC_OFFSET."""
        self.tsc_offset = offset
