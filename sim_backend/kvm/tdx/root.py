"""Loading the page-table root of a TD's vCPU: the shared EPT goes into the module's Shared EPTP."""

import errno
from typing import TYPE_CHECKING, Final

from sim_backend.kvm.errors import Errno
from sim_backend.kvm.host_pages import OutOfMemory
from sim_backend.kvm.mmu.shared_ept import SUPPRESS_VE, SharedEpt
from sim_backend.kvm.tdx import vp_fields
from sim_backend.kvm.tdx.init_vcpu import write_field

if TYPE_CHECKING:
    from sim_backend.kvm.tdx.ops import TdxOps
    from sim_backend.kvm.vcpu import Vcpu

_ADDRESS_MASK: Final = (1 << 52) - (1 << 12)


def load_root(ops: "TdxOps", vcpu: "Vcpu") -> None:
    """Load the roots of `vcpu` if it has none (`kvm_mmu_reload()`, `tdx_load_mmu_pgd()`).

    Raise ``Errno(ENOMEM)``, or ``Errno(EIO)`` with the VM bugged: the depth of the vCPU's page tables, which
    its CPUID table decides on a host with 5-level EPT, is not the TD's, or the module refuses the root.
    """
    vendor, td = vcpu.vendor, ops.td
    if vendor.root_loaded:
        return
    if not td.ept_levels:  # v17 runs a vCPU before KVM_TDX_INIT_VM: its TDH.VP.WR names no TDVPR
        ops.vm.bug()
        raise Errno(errno.EIO)
    if not ops.host.is_v17 and ops.host.profile.five_level_ept and (vcpu.cpuid.max_gfn_bits > 48) != td.gpaw52:
        ops.vm.bug()
        raise Errno(errno.EIO)
    with td.mmu_lock:
        if td.shared is None:
            try:
                td.shared = SharedEpt(
                    ops.host.memory,
                    ops.host.pages,
                    td.ept_levels,
                    gfn_bits=td.gfn_shared_bit,
                    absent=SUPPRESS_VE,
                )
            except OutOfMemory:
                raise Errno(errno.ENOMEM) from None
        root = td.shared.root
    if not write_field(ops, vcpu, vp_fields.SHARED_EPTP, root, _ADDRESS_MASK):
        raise Errno(errno.EIO)
    vendor.root_loaded = True
