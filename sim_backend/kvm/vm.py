"""A virtual machine: its state, its locks and its life (``struct kvm``, `virt/kvm/kvm_main.c`)."""

import errno
import threading
import time
from typing import TYPE_CHECKING, Final

from sim_backend.kvm.address_space import AddressSpace
from sim_backend.kvm.attributes import MemoryAttributes
from sim_backend.kvm.dispatch import CallTable
from sim_backend.kvm.errors import Errno
from sim_backend.kvm.io_bus import IoBus
from sim_backend.kvm.memslots import Memslot, Memslots
from sim_backend.kvm.ops import VmOps

if TYPE_CHECKING:
    from sim_backend.kvm.eventfds import Irqfds
    from sim_backend.kvm.guest_memfd import GuestMemfd
    from sim_backend.kvm.host import KvmHost
    from sim_backend.kvm.irqchip import Irqchip
    from sim_backend.kvm.msr_filter import MsrFilter
    from sim_backend.kvm.pit import Pit
    from sim_backend.kvm.stats import StatsFile
    from sim_backend.kvm.vcpu import Vcpu

KVM_X86_DEFAULT_VM: Final = 0
KVM_X86_SW_PROTECTED_VM: Final = 1
_PHYS_BITS_OF_SHADOW_PAGING: Final = 52


class Vm:
    """One VM. Lives until its fd and every vCPU, guest_memfd, statistics and device fd is closed (`get`, `put`).

    Lock order: `lock` (kvm->lock), then vCPU mutexes, then `slots_lock`, then the vendor's own MMU lock.
    """

    def __init__(self, host: "KvmHost", vm_type: int, mm: AddressSpace) -> None:
        self.host: Final = host
        self.type: Final = vm_type
        self.mm: Final = mm
        self.lock: Final = threading.Lock()
        self.slots_lock: Final = threading.RLock()
        self.dead = False  # every further ioctl is EIO
        self.bugged = False  # KVM_BUG_ON() fired; implies dead
        self.users = 1
        self._destroyed = False
        self._users_lock: Final = threading.Lock()
        self.call_tables: Final[list[CallTable]] = []  # of every open file of this VM; emptied when it dies
        self.vcpus: list[Vcpu] = []  # in order of creation: the index of a vCPU
        self.vcpus_by_id: dict[int, Vcpu] = {}
        self.created_vcpus = 0  # vCPU creations begun; vcpus only holds those that are complete
        self.memslots: list[Memslots] = [Memslots(), Memslots()]  # by address space: 0 normal, 1 SMM
        self.attributes: Final = MemoryAttributes()
        self.gmems: list[GuestMemfd] = []

        profile = host.profile
        self.max_vcpus = profile.max_vcpus
        self.max_vcpu_ids = 0  # KVM_CAP_MAX_VCPU_ID; 0: the host's limit
        self.boot_vcpu_id = 0
        self.default_tsc_khz = profile.tsc_khz  # [kHz]
        self.irqchip: Irqchip | None = None
        self.x2apic_32bit_ids = False
        self.x2apic_broadcast_quirk_disabled = False
        self.suppress_eoi_broadcast: bool | None = None  # as KVM_CAP_X2APIC_API said, None: the historical mixture
        self.apic_bus_cycle_ns = 1  # [ns]
        self.exit_hypercall_mask = 0  # KVM_CAP_EXIT_HYPERCALL: bit = hypercall number
        self.user_space_msr_mask = 0  # KVM_CAP_X86_USER_SPACE_MSR reasons
        self.msr_filter: MsrFilter | None = None
        self.notify_vmexit = 0  # KVM_CAP_X86_NOTIFY_VMEXIT: flags in bits 31:0, window in 63:32
        self.bus_lock_exit = False
        self.disabled_quirks = 0
        self.disabled_exits = 0
        self.guest_can_read_platform_info = True
        self.exception_payload = False
        self.triple_fault_event = False
        self.exit_on_emulation_failure = False
        self.manual_dirty_log_protect = 0
        self.dirty_ring_bytes = 0
        self.clock_offset_ns = -time.monotonic_ns()  # of kvmclock against the host's
        self.msrs: dict[int, int] = {}  # those that all vCPUs share
        self.has_mmu_pages = False  # n_max_mmu_pages is not 0: a slot came or went, or KVM_SET_NR_MMU_PAGES
        self.counters = {"remote_tlb_flush": 0}
        self.stats_files: list[StatsFile] = []
        self.io_bus: Final = IoBus()
        self.irqfds: Irqfds | None = None
        self.pit: Pit | None = None
        self.has_vfio_device = False
        self.ops: Final[VmOps] = host.vm_types[vm_type](self)
        if not self.ops.has_smm or not profile.behaves("smm"):
            self.memslots.pop()

    def get(self) -> None:
        """Take a reference, for a new fd that pins the VM."""
        with self._users_lock:
            self.users += 1

    def put(self) -> None:
        """Give a reference back; the last one destroys the VM (kvm_destroy_vm)."""
        with self._users_lock:
            self.users -= 1
        if not self.users:
            self.destroy_when_idle()

    def destroy_when_idle(self) -> None:
        """Destroy the VM, which nobody uses, unless a thread is inside an ioctl of a vCPU: that calls here at its end.

        Such a thread goes on undisturbed; only its descriptor is closed.
        """
        with self._users_lock:
            if self._destroyed or any(vcpu.mutex.locked() for vcpu in self.vcpus):
                return
            self._destroyed = True
        self._destroy()

    def die(self) -> None:
        """Mark the VM dead (``kvm_vm_dead``): every ioctl is EIO from now on, running vCPUs come out with EIO."""
        self.dead = True
        for table in self.call_tables:
            table.kill()
        for vcpu in self.vcpus:
            vcpu.kick()

    def bug(self) -> None:
        """Mark the VM bugged (``KVM_BUG_ON``): something happened that the kernel holds to be impossible."""
        self.bugged = True
        self.die()

    def has_split_irqchip(self) -> bool:
        """Tell whether local APICs are in the kernel and the IOAPIC is user space's."""
        return self.irqchip is not None and self.irqchip.split

    def check_gfn_limit(self, base_gfn: int, npages: int) -> None:
        """Refuse a slot whose last page no page table could reach (kvm_arch_prepare_memory_region)."""
        profile = self.host.profile
        bits = _PHYS_BITS_OF_SHADOW_PAGING if profile.behaves("shadow_paging") else profile.host_phys_bits
        if base_gfn + npages - 1 > (1 << bits - 12) - 1:
            raise Errno(errno.EINVAL)

    def find_memslot(self, gfn: int) -> Memslot | None:
        """Return the slot of the normal address space that holds `gfn`, or None."""
        return self.memslots[0].find(gfn)

    def kick_all(self) -> None:
        """Make every vCPU leave the guest, and wait until it has (a request that waits for acknowledgement).

        One that has entered again meanwhile has left. The caller may hold any lock: a vCPU leaves guest mode before
        it takes one.
        """
        self.counters["remote_tlb_flush"] += 1
        for stats in self.stats_files:
            stats.store(self.counters)
        me = threading.get_ident()
        inside = []
        for vcpu in self.vcpus:
            entries = vcpu.entries
            if vcpu.in_guest and vcpu.thread != me:
                vcpu.kick()
                inside.append((vcpu, entries))
        for vcpu, entries in inside:
            while vcpu.in_guest and vcpu.entries == entries:
                time.sleep(0.00002)
                vcpu.kick()

    def lock_all_vcpus(self) -> None:
        """Take every vCPU's mutex (`lock` held): waits until no vCPU is inside an ioctl."""
        for vcpu in self.vcpus:
            vcpu.mutex.acquire()

    def unlock_all_vcpus(self) -> None:
        """Undo `lock_all_vcpus`."""
        for vcpu in self.vcpus:
            vcpu.mutex.release()

    def shut_irqfds_down(self) -> None:
        """Shut the irqfds down, which do not outlive the VM fd."""
        if self.irqfds is not None:
            self.irqfds.close()
            self.irqfds = None

    def _destroy(self) -> None:
        ops = self.ops
        ops.vm_pre_destroy()
        if self.irqchip is not None:
            self.irqchip.destroy()
        self.io_bus.close()
        for vcpu in self.vcpus:
            ops.vcpu_free(vcpu)
            vcpu.free()
        self.vcpus.clear()
        self.vcpus_by_id.clear()
        with self.slots_lock:
            for slots in self.memslots:
                for slot in list(slots):
                    if slot.window is not None:
                        self.host.memory.remove_window(slot.window)
                        slot.window = None
        ops.vm_destroy()
        with self.host.lock:
            self.host.vms.remove(self)
