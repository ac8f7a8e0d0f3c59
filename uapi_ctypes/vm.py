"""`Vm`: a virtual machine, from KVM_CREATE_VM."""

import ctypes
from collections.abc import Iterable
from typing import Any

from uapi_ctypes.device_attr import AttributeHandle, Device
from uapi_ctypes.dialect import Command, Dialect, NoSuchCommandError
from uapi_ctypes.flexible import Flexible
from uapi_ctypes.guest_memfd import GuestMemfd
from uapi_ctypes.handle import Handle
from uapi_ctypes.ioctl import KvmRequest
from uapi_ctypes.kernel import IoctlArg, Kernel
from uapi_ctypes.kvm import (
    KvmClearDirtyLog,
    KvmClockData,
    KvmCoalescedMmioZone,
    KvmCreateDevice,
    KvmCreateGuestMemfd,
    KvmDirtyLog,
    KvmEnableCap,
    KvmEncRegion,
    KvmIoeventfd,
    KvmIrqchip,
    KvmIrqfd,
    KvmIrqLevel,
    KvmIrqRouting,
    KvmIrqRoutingEntry,
    KvmMemoryAttributes,
    KvmMsi,
    KvmMsrFilter,
    KvmPitConfig,
    KvmPitState2,
    KvmPmuEventFilter,
    KvmReinjectControl,
    KvmUserspaceMemoryRegion,
    KvmUserspaceMemoryRegion2,
)
from uapi_ctypes.tdx_command import memory_encrypt_op, tdx_command
from uapi_ctypes.vcpu import Vcpu


class Vm(AttributeHandle):
    """A VM. One method per ioctl; every one raises `KvmError` on failure.

    `close` closes everything that was made from it, newest first: vCPUs, guest_memfds, devices, statistics.
    """

    def __init__(self, kernel: Kernel, fd: int, *, vcpu_mmap_size: int, dialect: Dialect) -> None:
        super().__init__(kernel, fd)
        self.vcpu_mmap_size = vcpu_mmap_size
        self.dialect = dialect
        self._made: list[Handle] = []

    def close(self) -> None:
        """Close what was made from this VM, newest first, then the VM. Idempotent."""
        while self._made:
            self._made.pop().close()
        super().close()

    def close_fd(self) -> None:
        """Close the VM's own file descriptor only: the VM lives on until its vCPUs are closed too."""
        super().close()

    # -- capabilities --------------------------------------------------------------------------------------

    def check_extension(self, cap: int) -> int:
        """KVM_CHECK_EXTENSION for this VM: 0 when `cap`, a `KvmCap`, is absent."""
        return self.ioctl(KvmRequest.KVM_CHECK_EXTENSION, cap)

    def enable_cap(self, cap: int, *args: int, flags: int = 0) -> int:
        """KVM_ENABLE_CAP with up to four `args`."""
        enable = KvmEnableCap(cap, flags)
        enable.args[: len(args)] = args
        return self.ioctl(KvmRequest.KVM_ENABLE_CAP, enable)

    # -- memory --------------------------------------------------------------------------------------------

    def set_user_memory_region(self, slot: int, gpa: int, size: int, hva: int, flags: int = 0) -> None:
        """KVM_SET_USER_MEMORY_REGION; `size` [bytes] 0 deletes the slot."""
        region = KvmUserspaceMemoryRegion(slot, flags, gpa, size, hva)
        self.ioctl(KvmRequest.KVM_SET_USER_MEMORY_REGION, region)

    def set_user_memory_region2(
        self,
        slot: int,
        gpa: int,
        size: int,
        hva: int,
        flags: int = 0,
        *,
        guest_memfd: int = 0,
        guest_memfd_offset: int = 0,
    ) -> None:
        """KVM_SET_USER_MEMORY_REGION2; with KVM_MEM_GUEST_MEMFD, `guest_memfd` is the private half's fd."""
        region = KvmUserspaceMemoryRegion2(slot, flags, gpa, size, hva, guest_memfd_offset, guest_memfd)
        self.ioctl(KvmRequest.KVM_SET_USER_MEMORY_REGION2, region)

    def create_guest_memfd(self, size: int, flags: int = 0) -> GuestMemfd:
        """KVM_CREATE_GUEST_MEMFD of `size` [bytes, 4 KiB-aligned]."""
        fd = self.ioctl(KvmRequest.KVM_CREATE_GUEST_MEMFD, KvmCreateGuestMemfd(size, flags))
        made = GuestMemfd(self.kernel, fd, size)
        self._made.append(made)
        return made

    def set_memory_attributes(self, gpa: int, size: int, attributes: int, flags: int = 0) -> None:
        """KVM_SET_MEMORY_ATTRIBUTES: KVM_MEMORY_ATTRIBUTE_PRIVATE or 0 for `size` [bytes] at `gpa`."""
        self.ioctl(
            KvmRequest.KVM_SET_MEMORY_ATTRIBUTES,
            KvmMemoryAttributes(gpa, size, attributes, flags),
        )

    def get_dirty_log(self, slot: int, bitmap: int) -> None:
        """KVM_GET_DIRTY_LOG into `bitmap`, an HVA: one bit a page, rounded up to 64."""
        self.ioctl(KvmRequest.KVM_GET_DIRTY_LOG, KvmDirtyLog(slot=slot, dirty_bitmap=bitmap))

    def clear_dirty_log(self, slot: int, first_page: int, num_pages: int, bitmap: int) -> None:
        """KVM_CLEAR_DIRTY_LOG for the pages whose bit is set in `bitmap`, an HVA."""
        self.ioctl(KvmRequest.KVM_CLEAR_DIRTY_LOG, KvmClearDirtyLog(slot, num_pages, first_page, bitmap))

    def reset_dirty_rings(self) -> int:
        """KVM_RESET_DIRTY_RINGS: return how many pages were reset."""
        return self.ioctl(KvmRequest.KVM_RESET_DIRTY_RINGS)

    def set_nr_mmu_pages(self, pages: int) -> None:
        """KVM_SET_NR_MMU_PAGES [4 KiB pages]."""
        self.ioctl(KvmRequest.KVM_SET_NR_MMU_PAGES, pages)

    def get_nr_mmu_pages(self) -> int:
        """KVM_GET_NR_MMU_PAGES [4 KiB pages]."""
        return self.ioctl(KvmRequest.KVM_GET_NR_MMU_PAGES)

    def set_tss_addr(self, gpa: int) -> None:
        """KVM_SET_TSS_ADDR: three pages at `gpa` for real mode on VMX."""
        self.ioctl(KvmRequest.KVM_SET_TSS_ADDR, gpa)

    def set_identity_map_addr(self, gpa: int) -> None:
        """KVM_SET_IDENTITY_MAP_ADDR: one page at `gpa` for real mode on VMX."""
        self.ioctl(KvmRequest.KVM_SET_IDENTITY_MAP_ADDR, (ctypes.c_uint64 * 1)(gpa))

    def register_coalesced_mmio(self, gpa: int, size: int, pio: int = 0) -> None:
        """KVM_REGISTER_COALESCED_MMIO."""
        self.ioctl(KvmRequest.KVM_REGISTER_COALESCED_MMIO, KvmCoalescedMmioZone(gpa, size, pio))

    def unregister_coalesced_mmio(self, gpa: int, size: int, pio: int = 0) -> None:
        """KVM_UNREGISTER_COALESCED_MMIO."""
        self.ioctl(KvmRequest.KVM_UNREGISTER_COALESCED_MMIO, KvmCoalescedMmioZone(gpa, size, pio))

    # -- vCPUs and devices ---------------------------------------------------------------------------------

    def create_vcpu(self, vcpu_id: int) -> Vcpu:
        """KVM_CREATE_VCPU, and map its run area."""
        fd = self.ioctl(KvmRequest.KVM_CREATE_VCPU, vcpu_id)
        made = Vcpu(self, fd, vcpu_id)
        self._made.append(made)
        return made

    def set_boot_cpu_id(self, vcpu_id: int) -> None:
        """KVM_SET_BOOT_CPU_ID."""
        self.ioctl(KvmRequest.KVM_SET_BOOT_CPU_ID, vcpu_id)

    def create_device(self, device_type: int, flags: int = 0) -> Device:
        """KVM_CREATE_DEVICE."""
        create = KvmCreateDevice(type=device_type, flags=flags)
        self.ioctl(KvmRequest.KVM_CREATE_DEVICE, create)
        made = Device(self.kernel, create.fd)
        self._made.append(made)
        return made

    def get_stats_fd(self) -> Handle:
        """KVM_GET_STATS_FD: a read-only file of statistics."""
        made = Handle(self.kernel, self.ioctl(KvmRequest.KVM_GET_STATS_FD))
        self._made.append(made)
        return made

    # -- interrupts ----------------------------------------------------------------------------------------

    def create_irqchip(self) -> None:
        """KVM_CREATE_IRQCHIP: PIC, IOAPIC and local APICs in the kernel."""
        self.ioctl(KvmRequest.KVM_CREATE_IRQCHIP)

    def get_irqchip(self, chip_id: int) -> KvmIrqchip:
        """KVM_GET_IRQCHIP."""
        chip = KvmIrqchip(chip_id)
        self.ioctl(KvmRequest.KVM_GET_IRQCHIP, chip)
        return chip

    def set_irqchip(self, chip: KvmIrqchip) -> None:
        """KVM_SET_IRQCHIP."""
        self.ioctl(KvmRequest.KVM_SET_IRQCHIP, chip)

    def create_pit2(self, flags: int = 0) -> None:
        """KVM_CREATE_PIT2."""
        self.ioctl(KvmRequest.KVM_CREATE_PIT2, KvmPitConfig(flags))

    def get_pit2(self) -> KvmPitState2:
        """KVM_GET_PIT2."""
        state = KvmPitState2()
        self.ioctl(KvmRequest.KVM_GET_PIT2, state)
        return state

    def set_pit2(self, state: KvmPitState2) -> None:
        """KVM_SET_PIT2."""
        self.ioctl(KvmRequest.KVM_SET_PIT2, state)

    def reinject_control(self, pit_reinject: int) -> None:
        """KVM_REINJECT_CONTROL."""
        self.ioctl(KvmRequest.KVM_REINJECT_CONTROL, KvmReinjectControl(pit_reinject))

    def set_gsi_routing(self, entries: Iterable[KvmIrqRoutingEntry]) -> None:
        """KVM_SET_GSI_ROUTING: replace the whole table."""
        self.ioctl(KvmRequest.KVM_SET_GSI_ROUTING, KvmIrqRouting.of(entries))

    def irq_line(self, irq: int, level: int) -> None:
        """KVM_IRQ_LINE."""
        self.ioctl(KvmRequest.KVM_IRQ_LINE, KvmIrqLevel(irq, level))

    def irq_line_status(self, irq: int, level: int) -> int:
        """KVM_IRQ_LINE_STATUS: return the delivery status, negative when the interrupt was masked."""
        line = KvmIrqLevel(irq, level)
        self.ioctl(KvmRequest.KVM_IRQ_LINE_STATUS, line)
        return int(ctypes.c_int32(line.irq).value)

    def signal_msi(self, address: int, data: int, flags: int = 0, devid: int = 0) -> int:
        """KVM_SIGNAL_MSI: return 1 when delivered, 0 when the guest blocked it."""
        msi = KvmMsi(address & 0xFFFF_FFFF, address >> 32, data, flags, devid)
        return self.ioctl(KvmRequest.KVM_SIGNAL_MSI, msi)

    def irqfd(self, fd: int, gsi: int, flags: int = 0, resamplefd: int = 0) -> None:
        """KVM_IRQFD: bind the eventfd `fd` to `gsi`."""
        self.ioctl(KvmRequest.KVM_IRQFD, KvmIrqfd(fd, gsi, flags, resamplefd))

    def ioeventfd(self, fd: int, addr: int, length: int, flags: int = 0, datamatch: int = 0) -> None:
        """KVM_IOEVENTFD: signal the eventfd `fd` when the guest writes `length` [bytes] at `addr`."""
        self.ioctl(KvmRequest.KVM_IOEVENTFD, KvmIoeventfd(datamatch, addr, length, fd, flags))

    # -- clocks, MSRs, PMU ---------------------------------------------------------------------------------

    def get_clock(self) -> KvmClockData:
        """KVM_GET_CLOCK."""
        clock = KvmClockData()
        self.ioctl(KvmRequest.KVM_GET_CLOCK, clock)
        return clock

    def set_clock(self, clock: KvmClockData) -> None:
        """KVM_SET_CLOCK."""
        self.ioctl(KvmRequest.KVM_SET_CLOCK, clock)

    def set_tsc_khz(self, khz: int) -> None:
        """KVM_SET_TSC_KHZ: the default of vCPUs created from now on."""
        self.ioctl(KvmRequest.KVM_SET_TSC_KHZ, khz)

    def get_tsc_khz(self) -> int:
        """KVM_GET_TSC_KHZ."""
        return self.ioctl(KvmRequest.KVM_GET_TSC_KHZ)

    def x86_set_msr_filter(self, msr_filter: KvmMsrFilter) -> None:
        """KVM_X86_SET_MSR_FILTER."""
        self.ioctl(KvmRequest.KVM_X86_SET_MSR_FILTER, msr_filter)

    def set_pmu_event_filter(self, event_filter: KvmPmuEventFilter) -> None:
        """KVM_SET_PMU_EVENT_FILTER."""
        self.ioctl(KvmRequest.KVM_SET_PMU_EVENT_FILTER, event_filter)

    # -- TDX -----------------------------------------------------------------------------------------------

    def memory_encrypt_op(self, cmd: IoctlArg) -> int:
        """KVM_MEMORY_ENCRYPT_OP on the VM, raw."""
        return memory_encrypt_op(self, self.dialect, cmd)

    def memory_encrypt_reg_region(self, hva: int, size: int) -> None:
        """KVM_MEMORY_ENCRYPT_REG_REGION; not for TDX."""
        self.ioctl(KvmRequest.KVM_MEMORY_ENCRYPT_REG_REGION, KvmEncRegion(hva, size))

    def memory_encrypt_unreg_region(self, hva: int, size: int) -> None:
        """KVM_MEMORY_ENCRYPT_UNREG_REGION; not for TDX."""
        self.ioctl(KvmRequest.KVM_MEMORY_ENCRYPT_UNREG_REGION, KvmEncRegion(hva, size))

    def tdx_command(self, command: Command, data: int | ctypes.Structure = 0, flags: int = 0) -> None:
        """Issue any sub-command on the VM's file descriptor, also one that belongs elsewhere."""
        tdx_command(self, self.dialect, command, data, flags)

    def tdx_capabilities(self, nent: int) -> Flexible[Any]:
        """KVM_TDX_CAPABILITIES with room for `nent` CPUID entries; E2BIG does not say how many are needed."""
        capabilities = self.dialect.capabilities.allocate(nent)
        tdx_command(self, self.dialect, self.dialect.capabilities_command, capabilities)
        return capabilities

    def tdx_init_vm(self, init_vm: ctypes.Structure, flags: int = 0) -> None:
        """KVM_TDX_INIT_VM with the dialect's structure (`Dialect.init_vm`)."""
        tdx_command(self, self.dialect, self.dialect.init_vm_command, init_vm, flags)

    def tdx_finalize_vm(self) -> None:
        """KVM_TDX_FINALIZE_VM: the measurement is complete and the TD may run."""
        tdx_command(self, self.dialect, self.dialect.finalize_vm)

    def tdx_release_vm(self) -> None:
        """KVM_TDX_RELEASE_VM: v17 only; raise `NoSuchCommandError` elsewhere."""
        command = self.dialect.release_vm
        if command is None:
            raise NoSuchCommandError(f"{self.dialect} has no KVM_TDX_RELEASE_VM: close the file descriptors")
        tdx_command(self, self.dialect, command)
