"""The operations of an ordinary VM, and of KVM_X86_SW_PROTECTED_VM (`vmx_x86_ops`, `svm_x86_ops`)."""

import errno
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from sim_backend.kvm.default_vm.entry import enter_and_exit
from sim_backend.kvm.default_vm.guest_events import UD
from sim_backend.kvm.default_vm.mmu import DirectMmu, MmioFault
from sim_backend.kvm.default_vm.msrs import get_msr, set_msr
from sim_backend.kvm.errors import Errno, NotModelled
from sim_backend.kvm.guest_paging import read_pdptrs
from sim_backend.kvm.memslots import KVM_MEM_LOG_DIRTY_PAGES
from sim_backend.kvm.registers import CR0_PG
from sim_backend.kvm.vcpu import MpState
from sim_backend.kvm.vcpu_reset import reset_vcpu
from uapi_ctypes.caps import KvmCap

if TYPE_CHECKING:
    from sim_backend.kvm.cpuid import CpuidEntry
    from sim_backend.kvm.memslots import Memslot
    from sim_backend.kvm.vcpu import Vcpu
    from sim_backend.kvm.vm import Vm


GUESTDBG_USE_SW_BP: Final = 1 << 16


class DefaultVcpu:
    """What the operations keep of one vCPU."""

    __slots__ = ("generation", "hit_mmio_mark", "step")

    def __init__(self) -> None:
        self.generation = 0  # of the MMU when this CPU last forgot translations
        self.hit_mmio_mark = False  # by the last fault: its frame was marked as MMIO before
        self.step = False  # the next entry executes one instruction only


class AlwaysExits:
    """An MSR bitmap of all ones: KVM sees every access, and keeps what is the CPU's in the CPU's state."""

    def exits(self, msr: int, write: bool) -> bool:
        """Tell that the access leaves the guest."""
        del msr, write
        return True


class DefaultVmOps:
    """Operations of one VM of type KVM_X86_DEFAULT_VM."""

    has_private_mem = False
    has_protected_state = False
    has_protected_eoi = False
    has_smm = True
    protects_tsc = False
    gmem_is_private = False

    def __init__(self, vm: "Vm") -> None:
        self.vm = vm
        self.mmu: Final = DirectMmu(vm)
        self._msr_policy: Final = AlwaysExits()
        self._needs_mmu_pages: Final = vm.host.profile.behaves("shadow_paging")

    # ---- the VM -----------------------------------------------------------------------------------------

    def vm_init(self) -> None:
        """Nothing more."""

    def vm_pre_destroy(self) -> None:
        """Nothing: no key, no module."""

    def vm_destroy(self) -> None:
        """Nothing: the tables go with the object."""

    def check_extension(self, capability: int) -> int | None:
        """Leave everything to the profile."""
        del capability
        return None

    def enable_cap(self, capability: int, args: Sequence[int]) -> int | None:
        """Handle nothing of its own."""
        del capability, args
        return None

    def mem_enc_ioctl(self, argp: int) -> int:
        """Refuse KVM_MEMORY_ENCRYPT_OP: nothing here is encrypted."""
        del argp
        raise Errno(errno.ENOTTY)

    # ---- a vCPU -----------------------------------------------------------------------------------------

    def vcpu_precreate(self, vcpu_id: int) -> None:
        """Accept any."""

    def vcpu_create(self, vcpu: "Vcpu") -> None:
        """Give the vCPU a CPU context in the reset state."""
        cpu = self.vm.host.cpus.new_cpu()
        cpu.second_level = self.mmu
        cpu.msr_policy = self._msr_policy
        vcpu.cpu = cpu
        self.vcpu_update_exception_bitmap(vcpu)
        vcpu.vendor = DefaultVcpu()
        reset_vcpu(vcpu, init_event=False)

    def vcpu_free(self, vcpu: "Vcpu") -> None:
        """Nothing: the vCPU closes its context itself."""

    def vcpu_load(self, vcpu: "Vcpu", lp: int) -> None:
        """Nothing to move."""

    def vcpu_put(self, vcpu: "Vcpu") -> None:
        """Nothing to save."""

    def vcpu_check_cpuid(self, vcpu: "Vcpu", entries: "Sequence[CpuidEntry]") -> None:
        """Accept any table that the generic checks accept."""

    def vcpu_after_set_cpuid(self, vcpu: "Vcpu") -> None:
        """Nothing is cached."""

    def vcpu_pre_run(self, vcpu: "Vcpu") -> None:
        """Refuse what the model cannot run: dirty rings, breakpoints in the guest's own DR7, a cleared GIF."""
        if vcpu.guest_breakpoints and not vcpu.uses_hardware_breakpoints():
            raise NotModelled("breakpoints in the guest's debug registers (KVM_SET_DEBUGREGS, DR7)")
        if not vcpu.svm_gif:
            raise NotModelled("SVM's global interrupt flag, cleared by KVM_SET_NESTED_STATE")
        if vcpu.set_pdptrs is not None:
            if vcpu.set_pdptrs != read_pdptrs(vcpu, vcpu.read_state().cr3):
                raise NotModelled("PDPTRs set by KVM_SET_SREGS2 that differ from those in memory")
            vcpu.set_pdptrs = None
        vm = self.vm
        if vm.dirty_ring_bytes and any(slot.flags & KVM_MEM_LOG_DIRTY_PAGES for slot in vm.memslots[0].by_id.values()):
            raise NotModelled("dirty rings: a guest with KVM_CAP_DIRTY_LOG_RING writes to a slot that logs")

    def vcpu_run(self, vcpu: "Vcpu") -> bool:
        """Enter the guest once and handle its exit."""
        apic = vcpu.apic
        if apic is not None and (apic.init_pending or apic.sipi_pending):
            vcpu.accept_apic_events()
            if vcpu.mp_state == MpState.INIT_RECEIVED:
                return True
        if vcpu.smi_pending or vcpu.in_smm:
            raise NotModelled("system management mode: entering it, and running in it")
        if self._needs_mmu_pages and not self.vm.has_mmu_pages and not vcpu.read_state().cr0 & CR0_PG:
            raise Errno(errno.ENOSPC)  # no page table may be allocated before the first memslot
        return enter_and_exit(self, vcpu)

    def vcpu_mem_enc_ioctl(self, vcpu: "Vcpu", argp: int) -> int:
        """Refuse KVM_MEMORY_ENCRYPT_OP: a host with TDX has the hook and looks at the VM, others lack it."""
        del vcpu, argp
        has_hook = self.vm.host.profile.tdx_module != "none"
        raise Errno(errno.EINVAL if has_hook else errno.ENOTTY)

    def vcpu_mem_enc_unlocked_ioctl(self, vcpu: "Vcpu", argp: int) -> int | None:
        """Leave everything to the locked handler."""
        del vcpu, argp
        return None

    def vcpu_kick(self, vcpu: "Vcpu") -> None:
        """End the current run of the CPU."""
        if vcpu.cpu is not None:
            vcpu.cpu.kick()

    def vcpu_update_exception_bitmap(self, vcpu: "Vcpu") -> None:
        """Choose the guest exceptions that exit: #UD always, #BP for software breakpoints."""
        bitmap = 1 << UD
        if vcpu.guest_debug & GUESTDBG_USE_SW_BP:
            bitmap |= 1 << 3
        if vcpu.cpu is not None:
            vcpu.cpu.exception_bitmap = bitmap

    # ---- events -----------------------------------------------------------------------------------------

    def deliver_interrupt(self, vcpu: "Vcpu", vector: int) -> None:
        """Set the bit in IRR and make the vCPU look."""
        if vcpu.apic is not None:
            vcpu.apic.set_irr(vector)
        vcpu.kick()

    def vcpu_has_events(self, vcpu: "Vcpu") -> bool:
        """Tell whether a halted vCPU should wake."""
        if vcpu.nmi_queued or (vcpu.nmi_pending and not vcpu.nmi_masked and not vcpu.interrupt_shadow):
            return True
        if vcpu.exception.pending or vcpu.smi_pending or vcpu.pv_unhalted:
            return True
        apic, cpu = vcpu.apic, vcpu.cpu
        if apic is not None and (apic.init_pending or apic.sipi_pending) and vcpu.accepts_init_and_sipi():
            return True
        return cpu is not None and vcpu.interrupts_allowed(cpu) and vcpu.has_interrupt()

    def inject_nmi(self, vcpu: "Vcpu") -> None:
        """Nothing here: the entry injects it."""

    # ---- MSRs -------------------------------------------------------------------------------------------

    def get_msr(self, vcpu: "Vcpu", index: int, host_initiated: bool) -> int:
        """Return an MSR."""
        return get_msr(vcpu, index, host_initiated=host_initiated)

    def set_msr(self, vcpu: "Vcpu", index: int, value: int, host_initiated: bool) -> None:
        """Set an MSR."""
        set_msr(vcpu, index, value, host_initiated=host_initiated)

    # ---- memory -----------------------------------------------------------------------------------------

    def check_memslot(self, gfn: int, npages: int) -> None:
        """Accept whatever the generic limit accepts."""

    def memslot_removed(self, slot: "Memslot") -> None:
        """Drop the mappings of the slot."""
        self.mmu.unmap(slot.base_gfn, slot.base_gfn + slot.npages)

    def memslot_changed(self, slot: "Memslot") -> None:
        """Write-protect a slot that begins to log, or whose log was read."""
        if slot.flags & KVM_MEM_LOG_DIRTY_PAGES:
            self.mmu.write_protect(slot.base_gfn, slot.base_gfn + slot.npages)

    def zap_gfn_range(self, start: int, end: int, *, private: bool, shared: bool) -> None:
        """Drop mappings; a frame has one mapping here, of whichever kind."""
        if private or shared:
            self.mmu.unmap(start, end)

    def pre_fault_page(self, vcpu: "Vcpu", gpa: int) -> None:
        """Map one page ahead of time; ENOENT where there is no memory."""
        try:
            self.mmu.fault(vcpu, gpa, write=False, prefault=True)
        except MmioFault:
            raise Errno(errno.ENOENT) from None

    def pre_fault_allowed(self) -> bool:
        """Allow it where the host has two-dimensional paging."""
        return bool(self.vm.host.profile.capabilities.get(KvmCap.KVM_CAP_PRE_FAULT_MEMORY))


class SwProtectedVmOps(DefaultVmOps):
    """Operations of a VM of type KVM_X86_SW_PROTECTED_VM: private memory without a protected CPU state."""

    has_private_mem = True
    has_smm = False
