"""Ordinary virtual machines: state that user space may see, run on a CPU as VMX or SVM would."""

from sim_backend.kvm.default_vm.ops import DefaultVmOps, SwProtectedVmOps

__all__ = ["DefaultVmOps", "SwProtectedVmOps"]
