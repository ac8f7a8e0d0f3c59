"""The VM operations of a TD: KVM's generic code on one side, the TDX module behind SEAMCALL on the other."""

import errno
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Final

from sim_backend.kvm.errors import Errno
from sim_backend.kvm.host_pages import OutOfMemory
from sim_backend.kvm.mmu.zap import zap_slot
from sim_backend.kvm.ops import VmOpsFactory
from sim_backend.kvm.tdx import commands, msrs
from sim_backend.kvm.tdx.interrupts import deliver_interrupt, has_events, inject_nmi
from sim_backend.kvm.tdx.page_fault import pre_fault
from sim_backend.kvm.tdx.private_memory import remove_page
from sim_backend.kvm.tdx.run import enter_and_exit
from sim_backend.kvm.tdx.td import Td, TdState, TdVcpu
from sim_backend.kvm.tdx.td_control import flush_vcpu, reclaim_td, reclaim_vcpu, release_hkid
from sim_backend.kvm.tdx.tdvmcall import INSTRUCTION_LEAVES, MAINLINE_LEAVES
from sim_backend.kvm.tdx.tdvmcall.unsupported import tdvmcall_unsupported
from sim_backend.kvm.tdx.tdx_host import TdxHost
from sim_backend.kvm.tdx.v17 import vm_events as v17_events
from sim_backend.kvm.tdx.v17.commands import tdx_vm_ioctl as v17_vm_ioctl
from sim_backend.kvm.tdx.v17.init_vcpu import tdx_vcpu_ioctl as v17_vcpu_ioctl
from sim_backend.kvm.tdx.v17.init_vm import check_cpuid as v17_check_cpuid
from sim_backend.kvm.tdx.v17.raw_exit import tdvmcall_to_user_space
from sim_backend.kvm.vcpu import MpState

if TYPE_CHECKING:
    from sim_backend.kvm.cpuid import CpuidEntry
    from sim_backend.kvm.memslots import Memslot
    from sim_backend.kvm.vcpu import Vcpu
    from sim_backend.kvm.vm import Vm


KVM_CAP_MAX_VCPUS: Final = 66
_INIT_RECEIVED: Final = int(MpState.INIT_RECEIVED)
_RUNNABLE: Final = TdState.RUNNABLE


def tdx_ops_factory(host: TdxHost) -> VmOpsFactory:
    """Return what makes the operations of a TD on `host`, for KVM_CREATE_VM."""
    return lambda vm: TdxOps(vm, host)


class TdxOps:
    """Operations of one TD (`vt_x86_ops` with `is_td()` true)."""

    has_private_mem = True
    has_protected_state = True
    has_protected_eoi = True
    has_smm = False
    protects_tsc = True
    gmem_is_private = True

    def __init__(self, vm: "Vm", host: TdxHost) -> None:
        self.vm = vm
        self.host: Final = host
        self.td: Final = Td()
        self.seamcall: Final = host.seam.seamcall
        self.tdvmcalls: Final = INSTRUCTION_LEAVES if host.is_v17 else MAINLINE_LEAVES
        self.other_tdvmcall: Final = tdvmcall_to_user_space if host.is_v17 else tdvmcall_unsupported

    # ---- where the calling thread is ------------------------------------------------------------------------

    @contextmanager
    def on_lp(self, preferred: int = -1) -> Iterator[int]:
        """Put the calling thread on a logical processor, so that it can execute SEAMCALLs."""
        lps = self.host.lps
        lp = lps.get(preferred)
        try:
            yield lp
        finally:
            lps.put()

    @contextmanager
    def loaded(self, vcpu: "Vcpu") -> Iterator[None]:
        """Load `vcpu` on the calling thread's processor (`vcpu_load()`, `vcpu_put()`)."""
        with self.on_lp(vcpu.lp) as lp:
            self.vcpu_load(vcpu, lp)
            vcpu.lp = lp
            try:
                yield
            finally:
                self.vcpu_put(vcpu)

    def bug_unless_v17(self) -> None:
        """KVM_BUG_ON() where mainline has it and v17 only unwinds."""
        if not self.host.is_v17:
            self.vm.bug()

    # ---- the VM -------------------------------------------------------------------------------------------

    def vm_init(self) -> None:
        """Allow no more vCPUs than there are CPUs; a TD takes nothing from the host before KVM_TDX_INIT_VM."""
        self.host.tds.append(self)
        if not self.host.is_v17:
            self.vm.max_vcpus = min(self.vm.max_vcpus, self.host.profile.n_cpus)

    def vm_pre_destroy(self) -> None:
        """Release the key id, so that every page of the TD can be reclaimed."""
        release_hkid(self)

    def vm_destroy(self) -> None:
        """Reclaim what is left: Secure-EPT pages, TDCS, TDR; free the shared EPT."""
        td = self.td
        if td.shared is not None:
            td.shared.free()
            td.shared = None
        reclaim_td(self)
        self.host.tds.remove(self)

    def check_extension(self, capability: int) -> int | None:
        """Answer KVM_CAP_MAX_VCPUS, which is the VM's own; the profile knows the rest."""
        return self.vm.max_vcpus if capability == KVM_CAP_MAX_VCPUS else None

    def enable_cap(self, capability: int, args: Sequence[int]) -> int | None:
        """Handle KVM_CAP_MAX_VCPUS in v17; mainline TDs have no capability of their own."""
        return v17_events.enable_cap(self, capability, args) if self.host.is_v17 else None

    def mem_enc_ioctl(self, argp: int) -> int:
        """KVM_MEMORY_ENCRYPT_OP on the VM fd."""
        return v17_vm_ioctl(self, argp) if self.host.is_v17 else commands.tdx_vm_ioctl(self, argp)

    # ---- a vCPU -------------------------------------------------------------------------------------------

    def vcpu_precreate(self, vcpu_id: int) -> None:
        """Refuse a vCPU before KVM_TDX_INIT_VM or after KVM_TDX_FINALIZE_VM, and without a split irqchip."""
        del vcpu_id
        if self.host.is_v17:
            if self.vm.irqchip is None:
                raise Errno(errno.EINVAL)
            return
        if self.td.state is not TdState.INITIALIZED:
            raise Errno(errno.EIO)
        if self.vm.irqchip is None or not self.vm.irqchip.split:
            raise Errno(errno.EINVAL)

    def vcpu_create(self, vcpu: "Vcpu") -> None:
        """Give the vCPU its state and its posted-interrupt descriptor."""
        vendor = TdVcpu()
        try:
            vendor.pi_descriptor = self.host.pages.alloc_zeroed()
        except OutOfMemory:
            raise Errno(errno.ENOMEM) from None
        vcpu.vendor = vendor
        vcpu.tsc_offset = self.td.tsc_offset

    def vcpu_free(self, vcpu: "Vcpu") -> None:
        """Reclaim the vCPU's pages, after the key id is gone."""
        vendor = vcpu.vendor
        if vendor is None:
            return
        reclaim_vcpu(self, vcpu)
        if vendor.pi_descriptor:
            self.host.pages.free(vendor.pi_descriptor)
            vendor.pi_descriptor = 0

    def vcpu_load(self, vcpu: "Vcpu", lp: int) -> None:
        """Take the vCPU off the processor that it was on, if it is another one."""
        vendor = vcpu.vendor
        if vendor.associated_lp not in (lp, -1) and self.td.hkid:
            flush_vcpu(self, vcpu)

    def vcpu_put(self, vcpu: "Vcpu") -> None:
        """Nothing: the vCPU stays associated with its processor."""

    def vcpu_check_cpuid(self, vcpu: "Vcpu", entries: "Sequence[CpuidEntry]") -> None:
        """Accept any table; v17 wants the configurable leaves to be those of KVM_TDX_INIT_VM."""
        del vcpu
        if self.host.is_v17:
            v17_check_cpuid(self, entries)

    def vcpu_after_set_cpuid(self, vcpu: "Vcpu") -> None:
        """Nothing: the module decides what the guest's CPUID instruction sees."""

    def vcpu_update_exception_bitmap(self, vcpu: "Vcpu") -> None:
        """Nothing: the module decides which exceptions leave the TD."""

    def vcpu_pre_run(self, vcpu: "Vcpu") -> None:
        """Refuse a vCPU that waits for a SIPI that will never come, an uninitialised one, an unfinished TD."""
        if self.host.is_v17:
            return
        if vcpu.mp_state == _INIT_RECEIVED or not vcpu.vendor.initialized or self.td.state is not _RUNNABLE:
            raise Errno(errno.EINVAL)

    vcpu_run = enter_and_exit  # as it is: the hottest call there is

    def vcpu_mem_enc_ioctl(self, vcpu: "Vcpu", argp: int) -> int:
        """KVM_MEMORY_ENCRYPT_OP on the vCPU fd, what the unlocked handler left."""
        if self.host.is_v17:
            return v17_vcpu_ioctl(self, vcpu, argp)
        return commands.tdx_vcpu_ioctl(self, vcpu, argp)

    def vcpu_mem_enc_unlocked_ioctl(self, vcpu: "Vcpu", argp: int) -> int | None:
        """KVM_MEMORY_ENCRYPT_OP on the vCPU fd, the commands that lock the whole VM."""
        if self.host.is_v17:
            return None
        return commands.tdx_vcpu_unlocked_ioctl(self, vcpu, argp)

    def vcpu_kick(self, vcpu: "Vcpu") -> None:
        """Send an IPI to the processor that the vCPU runs on."""
        self.host.seam.kick(vcpu.lp)

    # ---- events -------------------------------------------------------------------------------------------

    def deliver_interrupt(self, vcpu: "Vcpu", vector: int) -> None:
        """Post `vector` to the vCPU."""
        deliver_interrupt(self, vcpu, vector)

    def vcpu_has_events(self, vcpu: "Vcpu") -> bool:
        """Tell whether a halted vCPU should wake."""
        return has_events(self, vcpu)

    def inject_nmi(self, vcpu: "Vcpu") -> None:
        """Hand one pending NMI to the module."""
        inject_nmi(self, vcpu)

    # ---- MSRs ---------------------------------------------------------------------------------------------

    def get_msr(self, vcpu: "Vcpu", index: int, host_initiated: bool) -> int:
        """Return an MSR of the set that KVM emulates for TDs."""
        return msrs.get_msr(self, vcpu, index, host_initiated=host_initiated)

    def set_msr(self, vcpu: "Vcpu", index: int, value: int, host_initiated: bool) -> None:
        """Set an MSR of the set that KVM emulates for TDs."""
        msrs.set_msr(self, vcpu, index, value, host_initiated=host_initiated)

    # ---- memory -------------------------------------------------------------------------------------------

    def check_memslot(self, gfn: int, npages: int) -> None:
        """Refuse a slot whose last page carries the S-bit; one that lies above it is merely out of reach."""
        if gfn + npages - 1 & self.td.gfn_shared_bit:
            raise Errno(errno.EINVAL)

    def memslot_removed(self, slot: "Memslot") -> None:
        """Drop the mappings of the slot's own pages."""
        zap_slot(self, slot)

    def memslot_changed(self, slot: "Memslot") -> None:
        """Write-protect the shared mappings of a slot that logs dirty pages."""
        td = self.td
        if td.shared is None or slot.dirty_bitmap is None:
            return
        with td.mmu_lock:
            if td.shared.write_protect(slot.base_gfn, slot.base_gfn + slot.npages):
                self._flush_shared()

    def zap_gfn_range(self, start: int, end: int, *, private: bool, shared: bool) -> None:
        """Drop private pages through the module, shared ones in KVM's own tables.

        The shared table is looked at in either case: a guest_memfd that can be mapped backs shared pages too.
        """
        del shared
        td, mirror = self.td, self.td.mirror if private else None
        with ExitStack() as held:
            # The processor first: vCPUs that fault are on theirs when they wait for the lock.
            lp = held.enter_context(self.on_lp()) if mirror is not None else -1
            held.enter_context(td.mmu_lock)
            if td.shared is not None and td.shared.unmap(start, end):
                self._flush_shared()
            if mirror is not None:
                for gfn in [gfn for gfn in td.premapped if start <= gfn < end]:
                    # 6.16 finds out that the module never got the page by its refusal to block it.
                    self.host.seamcalls.mem_range_block(lp, td.tdr, gfn << 12)
                    td.premapped.discard(gfn)
                for gfn in mirror.mapped_gfns(start, end):
                    remove_page(self, lp, gfn)

    def _flush_shared(self) -> None:
        """Make every vCPU forget its translations of the shared tables before it enters the TD again."""
        for vcpu in self.vm.vcpus:
            vcpu.vendor.tlb_flush = True
        self.vm.kick_all()

    def pre_fault_page(self, vcpu: "Vcpu", gpa: int) -> None:
        """Map one page ahead of time, private or shared as its attribute says."""
        pre_fault(self, vcpu, gpa >> 12)

    def pre_fault_allowed(self) -> bool:
        """Only a finalised TD may be pre-faulted."""
        return self.td.state is TdState.RUNNABLE

    def shared_instruction_fetch(self, vcpu: "Vcpu", qualification: int) -> bool:
        """Answer an instruction fetch from shared memory, which no TD may do."""
        if self.host.is_v17:
            return v17_events.shared_instruction_fetch(vcpu, qualification)
        self.vm.bug()
        raise Errno(errno.EIO)

    def ept_misconfiguration(self, vcpu: "Vcpu") -> bool:
        """Answer an EPT misconfiguration, which KVM cannot have caused."""
        if self.host.is_v17:
            return v17_events.ept_misconfiguration(vcpu)
        self.vm.bug()
        raise Errno(errno.EIO)
