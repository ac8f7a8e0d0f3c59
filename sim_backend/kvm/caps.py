"""KVM_CHECK_EXTENSION: a table of the profile, and the few answers that depend on what a VM has become."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from uapi_ctypes.caps import KvmCap

if TYPE_CHECKING:
    from sim_backend.kvm.profile import HostProfile
    from sim_backend.kvm.vm import Vm


def system_extension(profile: "HostProfile") -> Callable[[int], int]:
    """Return the handler of KVM_CHECK_EXTENSION on /dev/kvm."""
    get = profile.capabilities.get

    def check_extension(capability: int) -> int:
        return get(capability, 0)

    return check_extension


def vm_extension(vm: "Vm") -> Callable[[int], int]:
    """Return the handler of KVM_CHECK_EXTENSION on the fd of `vm`."""
    profile = vm.host.profile
    answers = {**profile.capabilities, **profile.vm_capabilities.get(vm.type, {})}
    get = answers.get
    own = vm.ops.check_extension
    suppress_eoi_known = profile.behaves("x2apic_suppress_eoi_flags")

    def check_extension(capability: int) -> int:
        answer = own(capability)
        if answer is not None:
            return answer
        if capability == KvmCap.KVM_CAP_X2APIC_API and suppress_eoi_known and vm.has_split_irqchip():
            return get(capability, 0) | 4  # suppression of EOI broadcasts needs a user-space IOAPIC
        if capability == KvmCap.KVM_CAP_X86_APIC_BUS_CYCLES_NS:
            return vm.apic_bus_cycle_ns if get(capability, 0) else 0
        return get(capability, 0)

    return check_extension
