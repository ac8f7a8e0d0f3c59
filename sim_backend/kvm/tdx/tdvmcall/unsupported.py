"""TDVMCALLs that nobody serves."""

from typing import TYPE_CHECKING

from sim_backend.hw.gprs import R10
from sim_backend.kvm.tdx.tdvmcall.status import SUBFUNC_UNSUPPORTED

if TYPE_CHECKING:
    from sim_backend.kvm.tdx.ops import TdxOps
    from sim_backend.kvm.vcpu import Vcpu


def tdvmcall_unsupported(ops: "TdxOps", vcpu: "Vcpu", regs: list[int]) -> bool:
    """Answer a leaf that is not known."""
    del ops, vcpu
    regs[R10] = SUBFUNC_UNSUPPORTED
    return True
