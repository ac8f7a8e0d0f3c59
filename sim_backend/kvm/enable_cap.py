"""KVM_ENABLE_CAP on the VM fd (`kvm_vm_ioctl_enable_cap`): one method a capability."""

import errno
import struct
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from sim_backend.kvm.errors import Errno
from sim_backend.kvm.irqchip import Irqchip
from uapi_ctypes.caps import KvmCap

if TYPE_CHECKING:
    from sim_backend.kvm.vm import Vm

_ENABLE_CAP: Final = struct.Struct("<II4Q64x")
_U32: Final = 0xFFFF_FFFF

KVM_HC_MAP_GPA_RANGE: Final = 12
X2APIC_USE_32BIT_IDS: Final = 1
X2APIC_DISABLE_BROADCAST_QUIRK: Final = 2
X2APIC_ENABLE_SUPPRESS_EOI_BROADCAST: Final = 4
X2APIC_DISABLE_SUPPRESS_EOI_BROADCAST: Final = 8
BUS_LOCK_DETECTION_OFF: Final = 1
BUS_LOCK_DETECTION_EXIT: Final = 2
NOTIFY_VMEXIT_ENABLED: Final = 1
NOTIFY_VMEXIT_USER: Final = 2
PMU_CAP_DISABLE: Final = 1
MSR_EXIT_REASON_VALID: Final = 7
DIRTY_LOG_MANUAL_PROTECT_ENABLE: Final = 1
DIRTY_LOG_INITIALLY_SET: Final = 2
MAX_RESERVED_IOAPIC_PINS: Final = 4096  # KVM_MAX_IRQ_ROUTES
_DIRTY_GFN_BYTES: Final = 16
_DIRTY_RING_MAX_ENTRIES: Final = 65536


class VmEnableCap:
    """The capabilities that can be switched on for one VM."""

    def __init__(self, vm: "Vm") -> None:
        self._vm: Final = vm
        # Handled before the flags are looked at (kvm_vm_ioctl_enable_cap_generic).
        self._generic: Final[dict[int, Callable[[int, Sequence[int]], None]]] = {
            KvmCap.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2: self._manual_dirty_log_protect2,
            KvmCap.KVM_CAP_HALT_POLL: self._halt_poll,
            KvmCap.KVM_CAP_DIRTY_LOG_RING: self._dirty_log_ring,
            KvmCap.KVM_CAP_DIRTY_LOG_RING_ACQ_REL: self._dirty_log_ring,
        }
        self._arch: Final[dict[int, Callable[[Sequence[int]], None]]] = {
            KvmCap.KVM_CAP_DISABLE_QUIRKS: self._disable_quirks,
            KvmCap.KVM_CAP_DISABLE_QUIRKS2: self._disable_quirks2,
            KvmCap.KVM_CAP_SPLIT_IRQCHIP: self._split_irqchip,
            KvmCap.KVM_CAP_X2APIC_API: self._x2apic_api,
            KvmCap.KVM_CAP_X86_DISABLE_EXITS: self._x86_disable_exits,
            KvmCap.KVM_CAP_MSR_PLATFORM_INFO: self._msr_platform_info,
            KvmCap.KVM_CAP_EXCEPTION_PAYLOAD: self._exception_payload,
            KvmCap.KVM_CAP_X86_TRIPLE_FAULT_EVENT: self._triple_fault_event,
            KvmCap.KVM_CAP_X86_USER_SPACE_MSR: self._user_space_msr,
            KvmCap.KVM_CAP_X86_BUS_LOCK_EXIT: self._bus_lock_exit,
            KvmCap.KVM_CAP_EXIT_HYPERCALL: self._exit_hypercall,
            KvmCap.KVM_CAP_EXIT_ON_EMULATION_FAILURE: self._exit_on_emulation_failure,
            KvmCap.KVM_CAP_PMU_CAPABILITY: self._pmu_capability,
            KvmCap.KVM_CAP_MAX_VCPU_ID: self._max_vcpu_id,
            KvmCap.KVM_CAP_X86_NOTIFY_VMEXIT: self._notify_vmexit,
            KvmCap.KVM_CAP_VM_DISABLE_NX_HUGE_PAGES: self._disable_nx_huge_pages,
            KvmCap.KVM_CAP_X86_APIC_BUS_CYCLES_NS: self._apic_bus_cycles_ns,
        }

    def enable_cap(self, argp: int) -> int:
        """KVM_ENABLE_CAP: EFAULT, then what the capability says; flags and unknown capabilities are EINVAL."""
        vm = self._vm
        capability, flags, *args = _ENABLE_CAP.unpack(vm.mm.read(argp, 104))
        generic = self._generic.get(capability)
        if generic is not None:
            generic(flags, args)
            return 0
        if flags:
            raise Errno(errno.EINVAL)
        own = vm.ops.enable_cap(capability, args)
        if own is not None:
            return own
        handler = self._arch.get(capability)
        if handler is None:
            raise Errno(errno.EINVAL)
        handler(args)
        return 0

    def _offered(self, capability: KvmCap) -> int:
        return self._vm.host.profile.capabilities.get(capability, 0)

    # ---- generic ----------------------------------------------------------------------------------------

    def _manual_dirty_log_protect2(self, flags: int, args: Sequence[int]) -> None:
        allowed = DIRTY_LOG_MANUAL_PROTECT_ENABLE
        if args[0] & DIRTY_LOG_MANUAL_PROTECT_ENABLE:
            allowed |= DIRTY_LOG_INITIALLY_SET
        if flags or args[0] & ~allowed:
            raise Errno(errno.EINVAL)
        self._vm.manual_dirty_log_protect = args[0]

    def _halt_poll(self, flags: int, args: Sequence[int]) -> None:
        if flags or args[0] > _U32:
            raise Errno(errno.EINVAL)

    def _dirty_log_ring(self, _flags: int, args: Sequence[int]) -> None:
        if not self._offered(KvmCap.KVM_CAP_DIRTY_LOG_RING):
            raise Errno(errno.EINVAL)
        vm, size = self._vm, args[0] & _U32
        if not size or size & (size - 1) or size < 4096:
            raise Errno(errno.EINVAL)
        if size > _DIRTY_RING_MAX_ENTRIES * _DIRTY_GFN_BYTES:
            raise Errno(errno.E2BIG)
        with vm.lock:
            if vm.dirty_ring_bytes or vm.created_vcpus:
                raise Errno(errno.EINVAL)
            vm.dirty_ring_bytes = size

    # ---- x86 --------------------------------------------------------------------------------------------

    def _disable_quirks2(self, args: Sequence[int]) -> None:
        if args[0] & ~self._offered(KvmCap.KVM_CAP_DISABLE_QUIRKS2):
            raise Errno(errno.EINVAL)
        self._disable_quirks(args)

    def _disable_quirks(self, args: Sequence[int]) -> None:
        self._vm.disabled_quirks |= args[0] & self._offered(KvmCap.KVM_CAP_DISABLE_QUIRKS2)

    def _split_irqchip(self, args: Sequence[int]) -> None:
        vm = self._vm
        if args[0] > MAX_RESERVED_IOAPIC_PINS:
            raise Errno(errno.EINVAL)
        with vm.lock:
            if vm.irqchip is not None or vm.created_vcpus:
                raise Errno(errno.EEXIST)
            vm.irqchip = vm.io_bus.irqchip = Irqchip(vm, split=True, reserved_pins=args[0])

    def _x2apic_api(self, args: Sequence[int]) -> None:
        vm, flags = self._vm, args[0]
        known = X2APIC_USE_32BIT_IDS | X2APIC_DISABLE_BROADCAST_QUIRK
        if vm.host.profile.behaves("x2apic_suppress_eoi_flags"):
            known |= X2APIC_ENABLE_SUPPRESS_EOI_BROADCAST | X2APIC_DISABLE_SUPPRESS_EOI_BROADCAST
        if flags & ~known:
            raise Errno(errno.EINVAL)
        enable = flags & X2APIC_ENABLE_SUPPRESS_EOI_BROADCAST
        if enable and flags & X2APIC_DISABLE_SUPPRESS_EOI_BROADCAST:
            raise Errno(errno.EINVAL)
        if enable and not vm.has_split_irqchip():
            raise Errno(errno.EINVAL)
        if flags & X2APIC_USE_32BIT_IDS:
            vm.x2apic_32bit_ids = True
        if flags & X2APIC_DISABLE_BROADCAST_QUIRK:
            vm.x2apic_broadcast_quirk_disabled = True
        if enable:
            vm.suppress_eoi_broadcast = True
        elif flags & X2APIC_DISABLE_SUPPRESS_EOI_BROADCAST:
            vm.suppress_eoi_broadcast = False

    def _x86_disable_exits(self, args: Sequence[int]) -> None:
        vm = self._vm
        if args[0] & ~self._offered(KvmCap.KVM_CAP_X86_DISABLE_EXITS):
            raise Errno(errno.EINVAL)
        with vm.lock:
            if vm.created_vcpus:
                raise Errno(errno.EINVAL)
            vm.disabled_exits |= args[0]

    def _msr_platform_info(self, args: Sequence[int]) -> None:
        self._vm.guest_can_read_platform_info = bool(args[0])

    def _exception_payload(self, args: Sequence[int]) -> None:
        self._vm.exception_payload = bool(args[0])

    def _triple_fault_event(self, args: Sequence[int]) -> None:
        self._vm.triple_fault_event = bool(args[0])

    def _user_space_msr(self, args: Sequence[int]) -> None:
        if args[0] & ~MSR_EXIT_REASON_VALID:
            raise Errno(errno.EINVAL)
        self._vm.user_space_msr_mask = args[0]

    def _bus_lock_exit(self, args: Sequence[int]) -> None:
        if args[0] & ~(BUS_LOCK_DETECTION_OFF | BUS_LOCK_DETECTION_EXIT):
            raise Errno(errno.EINVAL)
        if args[0] == BUS_LOCK_DETECTION_OFF | BUS_LOCK_DETECTION_EXIT:
            raise Errno(errno.EINVAL)
        if args[0] & BUS_LOCK_DETECTION_EXIT and self._offered(KvmCap.KVM_CAP_X86_BUS_LOCK_EXIT):
            self._vm.bus_lock_exit = True

    def _exit_hypercall(self, args: Sequence[int]) -> None:
        if args[0] & ~self._offered(KvmCap.KVM_CAP_EXIT_HYPERCALL):
            raise Errno(errno.EINVAL)
        self._vm.exit_hypercall_mask = args[0]

    def _exit_on_emulation_failure(self, args: Sequence[int]) -> None:
        if args[0] & ~1:
            raise Errno(errno.EINVAL)
        self._vm.exit_on_emulation_failure = bool(args[0])

    def _pmu_capability(self, args: Sequence[int]) -> None:
        vm = self._vm
        if not self._offered(KvmCap.KVM_CAP_PMU_CAPABILITY) or args[0] & ~PMU_CAP_DISABLE:
            raise Errno(errno.EINVAL)
        if not args[0] and vm.host.profile.behaves("pmu_capability_zero_is_einval"):
            raise Errno(errno.EINVAL)
        with vm.lock:
            if vm.created_vcpus:
                raise Errno(errno.EINVAL)

    def _max_vcpu_id(self, args: Sequence[int]) -> None:
        vm, limit = self._vm, args[0]
        if limit > vm.host.profile.max_vcpu_ids:
            raise Errno(errno.EINVAL)
        with vm.lock:
            if vm.boot_vcpu_id > limit:
                raise Errno(errno.EINVAL)
            if vm.max_vcpu_ids == limit:
                return
            if vm.max_vcpu_ids:
                raise Errno(errno.EINVAL)
            vm.max_vcpu_ids = limit

    def _notify_vmexit(self, args: Sequence[int]) -> None:
        vm, flags = self._vm, args[0] & _U32
        if flags & ~(NOTIFY_VMEXIT_ENABLED | NOTIFY_VMEXIT_USER):
            raise Errno(errno.EINVAL)
        if not self._offered(KvmCap.KVM_CAP_X86_NOTIFY_VMEXIT) or not flags & NOTIFY_VMEXIT_ENABLED:
            raise Errno(errno.EINVAL)
        with vm.lock:
            if vm.created_vcpus:
                raise Errno(errno.EINVAL)
            vm.notify_vmexit = args[0]

    def _disable_nx_huge_pages(self, args: Sequence[int]) -> None:
        vm = self._vm
        if args[0] or not self._offered(KvmCap.KVM_CAP_VM_DISABLE_NX_HUGE_PAGES):
            raise Errno(errno.EINVAL)
        with vm.lock:
            if vm.created_vcpus:
                raise Errno(errno.EINVAL)

    def _apic_bus_cycles_ns(self, args: Sequence[int]) -> None:
        vm, cycle_ns = self._vm, args[0]
        if not self._offered(KvmCap.KVM_CAP_X86_APIC_BUS_CYCLES_NS):
            raise Errno(errno.EINVAL)
        # The longest timer period, 2^32 counts at divide-by-128, must fit in 63 bits of nanoseconds.
        if not cycle_ns or cycle_ns > _U32 or (_U32 * 128 * cycle_ns) >> 63:
            raise Errno(errno.EINVAL)
        with vm.lock:
            if vm.irqchip is None:
                raise Errno(errno.ENXIO)
            if vm.created_vcpus:
                raise Errno(errno.EINVAL)
            vm.apic_bus_cycle_ns = cycle_ns
