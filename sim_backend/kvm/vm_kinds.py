"""The kinds of VM that need nothing but KVM itself; TDX comes from `sim_backend.kvm.tdx`."""

from sim_backend.kvm.default_vm.ops import DefaultVmOps, SwProtectedVmOps
from sim_backend.kvm.ops import VmOpsFactory
from sim_backend.kvm.profile import HostProfile


def ordinary_vm_types(profile: HostProfile) -> dict[int, VmOpsFactory]:
    """Return the factories of a profile's ``default`` and ``sw_protected`` VM types by KVM_CREATE_VM type."""
    kinds: dict[str, VmOpsFactory] = {"default": DefaultVmOps, "sw_protected": SwProtectedVmOps}
    return {number: kinds[kind] for number, kind in profile.vm_types.items() if kind in kinds}
