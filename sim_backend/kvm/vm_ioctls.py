"""The ioctls of a VM fd (`kvm_vm_ioctl`, `kvm_arch_vm_ioctl`)."""

import errno
import os
import struct
from typing import TYPE_CHECKING, Final

from sim_backend.kvm.caps import vm_extension
from sim_backend.kvm.device import create_device
from sim_backend.kvm.dispatch import CallTable, IoctlHandler
from sim_backend.kvm.enable_cap import VmEnableCap
from sim_backend.kvm.errors import Errno, as_int
from sim_backend.kvm.files import Files
from sim_backend.kvm.irq_ioctls import IrqIoctls
from sim_backend.kvm.kvm_clock import KvmClockIoctls
from sim_backend.kvm.lapic import LocalApic
from sim_backend.kvm.memory_ioctls import MemoryIoctls
from sim_backend.kvm.msr_filter import read_filter
from sim_backend.kvm.signals import SIGNALS
from sim_backend.kvm.stats import publish_stats
from sim_backend.kvm.vcpu import MpState, Vcpu
from sim_backend.kvm.vcpu_ioctls import publish_vcpu
from uapi_ctypes.caps import KvmCap
from uapi_ctypes.ioctl import KvmRequest

if TYPE_CHECKING:
    from sim_backend.kvm.vm import Vm

_MAX_TSS_ADDRESS: Final = 0xFFFF_D000
_U32: Final = 0xFFFF_FFFF


class VmIoctls:
    """One VM fd."""

    def __init__(self, vm: "Vm", files: Files) -> None:
        self._vm: Final = vm
        self._files: Final = files

    def table(self) -> CallTable:
        """Return the handlers by request number."""
        vm, files = self._vm, self._files
        profile = vm.host.profile
        memory = MemoryIoctls(vm, files)
        irq = IrqIoctls(vm, files)
        clock = KvmClockIoctls(vm)
        handlers: dict[int, IoctlHandler] = {
            KvmRequest.KVM_CHECK_EXTENSION: vm_extension(vm),
            KvmRequest.KVM_CREATE_VCPU: self.create_vcpu,
            KvmRequest.KVM_ENABLE_CAP: VmEnableCap(vm).enable_cap,
            KvmRequest.KVM_SET_USER_MEMORY_REGION: memory.set_user_memory_region,
            KvmRequest.KVM_SET_USER_MEMORY_REGION2: memory.set_user_memory_region2,
            KvmRequest.KVM_CREATE_GUEST_MEMFD: memory.create_guest_memfd,
            KvmRequest.KVM_GET_DIRTY_LOG: memory.get_dirty_log,
            KvmRequest.KVM_CLEAR_DIRTY_LOG: memory.clear_dirty_log,
            KvmRequest.KVM_RESET_DIRTY_RINGS: memory.reset_dirty_rings,
            KvmRequest.KVM_SET_NR_MMU_PAGES: self.set_nr_mmu_pages,
            KvmRequest.KVM_SET_TSS_ADDR: self.set_tss_addr,
            KvmRequest.KVM_SET_IDENTITY_MAP_ADDR: self.set_identity_map_addr,
            KvmRequest.KVM_SET_BOOT_CPU_ID: self.set_boot_cpu_id,
            KvmRequest.KVM_CREATE_IRQCHIP: irq.create_irqchip,
            KvmRequest.KVM_GET_IRQCHIP: irq.get_irqchip,
            KvmRequest.KVM_SET_IRQCHIP: irq.set_irqchip,
            KvmRequest.KVM_CREATE_PIT: irq.create_pit,
            KvmRequest.KVM_CREATE_PIT2: irq.create_pit2,
            KvmRequest.KVM_GET_PIT2: irq.get_pit2,
            KvmRequest.KVM_SET_PIT2: irq.set_pit2,
            KvmRequest.KVM_REINJECT_CONTROL: irq.reinject_control,
            KvmRequest.KVM_IRQ_LINE: irq.irq_line,
            KvmRequest.KVM_IRQ_LINE_STATUS: irq.irq_line_status,
            KvmRequest.KVM_SET_GSI_ROUTING: irq.set_gsi_routing,
            KvmRequest.KVM_SIGNAL_MSI: irq.signal_msi,
            KvmRequest.KVM_IRQFD: irq.irqfd,
            KvmRequest.KVM_IOEVENTFD: irq.ioeventfd,
            KvmRequest.KVM_REGISTER_COALESCED_MMIO: irq.register_coalesced_mmio,
            KvmRequest.KVM_UNREGISTER_COALESCED_MMIO: irq.unregister_coalesced_mmio,
            KvmRequest.KVM_GET_CLOCK: clock.get_clock,
            KvmRequest.KVM_SET_CLOCK: clock.set_clock,
            KvmRequest.KVM_X86_SET_MSR_FILTER: self.set_msr_filter,
            KvmRequest.KVM_SET_PMU_EVENT_FILTER: self.set_pmu_event_filter,
            KvmRequest.KVM_GET_STATS_FD: lambda _arg: publish_stats(vm, files),
            KvmRequest.KVM_CREATE_DEVICE: lambda argp: create_device(vm, files, argp),
            KvmRequest.KVM_MEMORY_ENCRYPT_OP: self.memory_encrypt_op,
            KvmRequest.KVM_MEMORY_ENCRYPT_REG_REGION: self.memory_encrypt_region,
            KvmRequest.KVM_MEMORY_ENCRYPT_UNREG_REGION: self.memory_encrypt_region,
        }
        if profile.behaves("memory_attributes"):
            handlers[KvmRequest.KVM_SET_MEMORY_ATTRIBUTES] = memory.set_memory_attributes
        if any(profile.capabilities.get(cap) for cap in (KvmCap.KVM_CAP_VM_TSC_CONTROL, KvmCap.KVM_CAP_GET_TSC_KHZ)):
            handlers[KvmRequest.KVM_SET_TSC_KHZ] = self.set_tsc_khz
            handlers[KvmRequest.KVM_GET_TSC_KHZ] = self.get_tsc_khz
        table = CallTable({int(request): handler for request, handler in handlers.items()}, errno.ENOTTY)
        vm.call_tables.append(table)
        return table

    # ---- vCPUs ------------------------------------------------------------------------------------------

    def create_vcpu(self, vcpu_id: int) -> int:
        """KVM_CREATE_VCPU: checks in the kernel's order, which differs in where a duplicate id is noticed."""
        vm = self._vm
        profile = vm.host.profile
        if vcpu_id >= profile.max_vcpu_ids:
            raise Errno(errno.EINVAL)
        duplicate_last = profile.behaves("create_vcpu_eexist_last")
        with vm.lock:
            if vm.created_vcpus >= vm.max_vcpus:
                raise Errno(errno.EINVAL)
            if not duplicate_last and vcpu_id in vm.vcpus_by_id:
                raise Errno(errno.EEXIST)
            if not vm.max_vcpu_ids:
                vm.max_vcpu_ids = profile.max_vcpu_ids
            if vcpu_id >= vm.max_vcpu_ids:
                raise Errno(errno.EINVAL)
            vm.ops.vcpu_precreate(vcpu_id)
            vm.created_vcpus += 1
            if not duplicate_last:
                return self._add_vcpu(self._make_vcpu(vcpu_id))
        # Kernels that look for a duplicate last make the vCPU with the lock given up: others see it as begun.
        vcpu = self._make_vcpu(vcpu_id)
        with vm.lock:
            return self._add_vcpu(vcpu)

    def _make_vcpu(self, vcpu_id: int) -> Vcpu:
        vm = self._vm
        vcpu = Vcpu(vm, vcpu_id, len(vm.vcpus))
        if vm.irqchip is not None:
            vcpu.apic = LocalApic(vcpu)
            vcpu.mp_state = MpState.RUNNABLE if vcpu.is_bsp else MpState.UNINITIALIZED
        try:
            vm.ops.vcpu_create(vcpu)
        except BaseException:
            self._discard(vcpu)
            raise
        return vcpu

    def _add_vcpu(self, vcpu: Vcpu) -> int:
        """Make `vcpu` one of the VM's and return its fd (`lock` held)."""
        vm = self._vm
        if vcpu.id in vm.vcpus_by_id:
            self._discard(vcpu)
            raise Errno(errno.EEXIST)
        try:
            fd = publish_vcpu(vcpu, self._files)
        except BaseException:
            self._discard(vcpu)
            raise
        vcpu.index = len(vm.vcpus)
        vm.vcpus.append(vcpu)
        vm.vcpus_by_id[vcpu.id] = vcpu
        return fd

    def _discard(self, vcpu: Vcpu) -> None:
        """Take a vCPU back that did not become one of the VM's."""
        vm = self._vm
        vm.created_vcpus -= 1
        vm.ops.vcpu_free(vcpu)
        vcpu.free()
        os.close(vcpu.run.fd)

    def set_boot_cpu_id(self, vcpu_id: int) -> int:
        """KVM_SET_BOOT_CPU_ID."""
        vm = self._vm
        with vm.lock:
            if vm.created_vcpus:
                raise Errno(errno.EBUSY)
            limit = vm.max_vcpu_ids or vm.host.profile.max_vcpu_ids
            if vcpu_id > _U32 or vcpu_id >= limit:
                raise Errno(errno.EINVAL)
            vm.boot_vcpu_id = vcpu_id
        return 0

    # ---- x86 odds and ends ------------------------------------------------------------------------------

    def set_tss_addr(self, address: int) -> int:
        """KVM_SET_TSS_ADDR: three pages for real mode on hosts that need them."""
        if address > _MAX_TSS_ADDRESS:
            raise Errno(errno.EINVAL)
        return 0

    def set_identity_map_addr(self, argp: int) -> int:
        """KVM_SET_IDENTITY_MAP_ADDR."""
        vm = self._vm
        with vm.lock:
            if vm.created_vcpus:
                raise Errno(errno.EINVAL)
            vm.mm.read(argp, 8)
        return 0

    def set_nr_mmu_pages(self, pages: int) -> int:
        """KVM_SET_NR_MMU_PAGES: at least 64."""
        if pages & _U32 < 64:
            raise Errno(errno.EINVAL)
        self._vm.has_mmu_pages = True
        return 0

    def set_tsc_khz(self, khz: int) -> int:
        """KVM_SET_TSC_KHZ on the VM: the default of vCPUs to come [kHz]; 0 is the host's frequency."""
        vm, profile = self._vm, self._vm.host.profile
        khz &= _U32
        if profile.capabilities.get(KvmCap.KVM_CAP_TSC_CONTROL) and khz >= profile.max_tsc_khz:
            raise Errno(errno.EINVAL)
        with vm.lock:
            if vm.created_vcpus:
                raise Errno(errno.EINVAL)
            vm.default_tsc_khz = khz or profile.tsc_khz
        return 0

    def get_tsc_khz(self, _arg: int) -> int:
        """KVM_GET_TSC_KHZ on the VM [kHz]."""
        return as_int(self._vm.default_tsc_khz)

    def set_msr_filter(self, argp: int) -> int:
        """KVM_X86_SET_MSR_FILTER."""
        vm = self._vm
        vm.msr_filter = read_filter(vm.mm, argp)
        return 0

    def set_pmu_event_filter(self, argp: int) -> int:
        """KVM_SET_PMU_EVENT_FILTER: checked; guests here have no PMU to filter."""
        action, nevents, _fixed, flags = struct.unpack_from("<4I", self._vm.mm.read(argp, 32))
        if action > 1 or flags & ~1:
            raise Errno(errno.EINVAL)
        if nevents > 300:
            raise Errno(errno.E2BIG)
        self._vm.mm.read(argp + 32, nevents * 8)
        return 0

    def memory_encrypt_op(self, argp: int) -> int:
        """KVM_MEMORY_ENCRYPT_OP on the VM fd."""
        mark = SIGNALS.mark()
        for vcpu in self._vm.vcpus:
            if not vcpu.thread:
                vcpu.signal_mark = mark
        return self._vm.ops.mem_enc_ioctl(argp)

    def memory_encrypt_region(self, argp: int) -> int:
        """KVM_MEMORY_ENCRYPT_REG_REGION and UNREG_REGION: SEV only."""
        self._vm.mm.read(argp, 16)
        raise Errno(errno.ENOTTY)


def publish_vm(vm: "Vm", files: Files) -> int:
    """Make the fd of a new VM, which holds its first reference."""
    table = VmIoctls(vm, files).table()

    def release() -> None:
        if table in vm.call_tables:
            vm.call_tables.remove(table)
        vm.shut_irqfds_down()
        vm.put()

    return files.add_file(os.memfd_create("kvm-vm", os.MFD_CLOEXEC), "kvm-vm", table, vm, release)
