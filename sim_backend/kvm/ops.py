"""What one kind of VM does differently: the model's ``kvm_x86_ops``.

One object per VM (`factory(vm)`), so the vendor's own state of a VM lives in it; the vendor's own state of a
vCPU is whatever it keeps in `Vcpu.vendor`. The generic code does every check that all kinds share, in the
kernel's order, and then asks here. A hook refuses by raising `Errno`.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol, TypeAlias

if TYPE_CHECKING:
    from sim_backend.kvm.cpuid import CpuidEntry
    from sim_backend.kvm.memslots import Memslot
    from sim_backend.kvm.vcpu import Vcpu
    from sim_backend.kvm.vm import Vm


class VmOps(Protocol):
    """Vendor operations of one VM. Locks named are those that the caller holds."""

    vm: "Vm"
    has_private_mem: bool  # guest_memfd pages are private; SET_MEMORY_ATTRIBUTES exists (kvm_arch_has_private_mem)
    has_protected_state: bool  # no register access; no SYNC_REGS; no READONLY memslots; PRE_FAULT only when allowed
    has_protected_eoi: bool  # EOIs are not intercepted: no full irqchip, no resampling, no level routes
    has_smm: bool
    protects_tsc: bool  # KVM_SET_TSC_KHZ on a vCPU is EINVAL
    gmem_is_private: bool  # guest_memfd pages come from HostPages and can never be touched through mmap

    # ---- the VM -----------------------------------------------------------------------------------------

    def vm_init(self) -> None:
        """Set up at KVM_CREATE_VM (`Vm` is complete but unpublished)."""

    def vm_pre_destroy(self) -> None:
        """Begin teardown: all fds are gone, vCPUs and memory still exist (TDX: release the HKID)."""

    def vm_destroy(self) -> None:
        """Finish teardown: vCPUs, memslots and the MMU roots are gone (TDX: reclaim TDCS and TDR)."""

    def check_extension(self, capability: int) -> int | None:
        """Return this kind of VM's own answer on the VM fd, or None for the generic one."""

    def enable_cap(self, capability: int, args: Sequence[int]) -> int | None:
        """Handle a capability of this kind's own on the VM fd, or None for the generic handling."""

    def mem_enc_ioctl(self, argp: int) -> int:
        """KVM_MEMORY_ENCRYPT_OP on the VM fd. No lock held. Raise ``Errno(ENOTTY)`` where it does not exist."""

    # ---- a vCPU -----------------------------------------------------------------------------------------

    def vcpu_precreate(self, vcpu_id: int) -> None:
        """Check before a vCPU is allocated (kvm->lock held)."""

    def vcpu_create(self, vcpu: "Vcpu") -> None:
        """Set `vcpu.vendor` up; refuse with Errno (kvm->lock held). `vcpu.apic` exists already."""

    def vcpu_free(self, vcpu: "Vcpu") -> None:
        """Give back what `vcpu_create` and later commands took (at VM destruction or failed creation)."""

    def vcpu_load(self, vcpu: "Vcpu", lp: int) -> None:
        """Put the vCPU on logical processor `lp` (vcpu->mutex held); `vcpu.lp` still says where it last was."""

    def vcpu_put(self, vcpu: "Vcpu") -> None:
        """Take the vCPU off its logical processor."""

    def vcpu_check_cpuid(self, vcpu: "Vcpu", entries: "Sequence[CpuidEntry]") -> None:
        """Refuse a KVM_SET_CPUID2 table, after every generic check."""

    def vcpu_after_set_cpuid(self, vcpu: "Vcpu") -> None:
        """Act on a new CPUID table."""

    def vcpu_pre_run(self, vcpu: "Vcpu") -> None:
        """KVM_RUN row 7: refuse to run this vCPU now (EINVAL)."""

    def vcpu_run(self, vcpu: "Vcpu") -> bool:
        """Enter the guest once and handle its exit. True: go on; False: `vcpu.run` tells user space why not.

        A request that came before the entry (`vcpu.requests` non-zero, `vcpu.kicked`) must end the guest at
        once: the engine's and the seam's kicks are sticky, so entering anyway is correct.
        """

    def vcpu_mem_enc_ioctl(self, vcpu: "Vcpu", argp: int) -> int:
        """KVM_MEMORY_ENCRYPT_OP on the vCPU fd, vcpu->mutex held and vCPU loaded."""

    def vcpu_mem_enc_unlocked_ioctl(self, vcpu: "Vcpu", argp: int) -> int | None:
        """Handle the same before any lock is taken, or return None to go on to `vcpu_mem_enc_ioctl`."""

    def vcpu_kick(self, vcpu: "Vcpu") -> None:
        """Make a guest that runs now, or is about to, exit soon (any thread; sticky)."""

    def vcpu_update_exception_bitmap(self, vcpu: "Vcpu") -> None:
        """User space began or ceased to debug the guest (KVM_SET_GUEST_DEBUG; unprotected vCPUs only)."""

    # ---- events -----------------------------------------------------------------------------------------

    def deliver_interrupt(self, vcpu: "Vcpu", vector: int) -> None:
        """Make the vCPU take a fixed interrupt that its local APIC accepted (any thread)."""

    def vcpu_has_events(self, vcpu: "Vcpu") -> bool:
        """Tell whether a halted vCPU should wake (kvm_arch_vcpu_runnable without the generic requests)."""

    def inject_nmi(self, vcpu: "Vcpu") -> None:
        """Act on a pending NMI (vCPU's thread, inside KVM_RUN)."""

    # ---- MSRs -------------------------------------------------------------------------------------------

    def get_msr(self, vcpu: "Vcpu", index: int, host_initiated: bool) -> int:
        """Return an MSR; raise `MsrUnknown` or `MsrRefused` (sim_backend.kvm.msrs)."""

    def set_msr(self, vcpu: "Vcpu", index: int, value: int, host_initiated: bool) -> None:
        """Set an MSR; raise `MsrUnknown` or `MsrRefused`."""

    # ---- memory (slots_lock held unless said otherwise) ---------------------------------------------------

    def check_memslot(self, gfn: int, npages: int) -> None:
        """Refuse a slot whose last page is above the physical limit or carries the shared bit."""

    def memslot_removed(self, slot: "Memslot") -> None:
        """`slot` is deleted or moved away: drop every mapping of its own leaf pages."""

    def memslot_changed(self, slot: "Memslot") -> None:
        """Write-protect or re-permit the mappings of `slot`, whose flags or dirty log changed."""

    def zap_gfn_range(self, start: int, end: int, *, private: bool, shared: bool) -> None:
        """Drop mappings of GFNs [start, end) of the named kinds (attribute change, hole in guest_memfd)."""

    def pre_fault_page(self, vcpu: "Vcpu", gpa: int) -> None:
        """Map the 4 KiB page at `gpa` ahead of time (vcpu->mutex held): KVM_PRE_FAULT_MEMORY, checks of the page on."""

    def pre_fault_allowed(self) -> bool:
        """Tell whether KVM_PRE_FAULT_MEMORY may be used yet."""


VmOpsFactory: TypeAlias = Callable[["Vm"], VmOps]
