"""KVM_TDX_CAPABILITIES: what a TD on this host may be configured with."""

import errno
import struct
from typing import TYPE_CHECKING, Final

from sim_backend.kvm.cpuid import CpuidEntry
from sim_backend.kvm.errors import Errno
from sim_backend.kvm.tdx.sysinfo import NO_SUBLEAF

if TYPE_CHECKING:
    from sim_backend.kvm.tdx.commands import TdxCmd
    from sim_backend.kvm.tdx.ops import TdxOps

_NENT: Final = struct.Struct("<I")
_HEADER: Final = struct.Struct("<6Q")
_CPUID_OFFSET: Final = 2048  # kvm_tdx_capabilities.cpuid
_TDVMCALLINFO_SETUP_EVENT_NOTIFY_INTERRUPT: Final = 1 << 1
_GUEST_PHYS_BITS: Final = 0xFF << 16  # CPUID.80000008:EAX[23:16], which picks the GPAW of a TD


def tdx_get_capabilities(ops: "TdxOps", cmd: "TdxCmd") -> int:
    """Write ``struct kvm_tdx_capabilities`` to `cmd.data`.

    Raise ``Errno`` with EINVAL (flags), EFAULT, E2BIG (room for too few CPUID entries; the count is not
    updated) or EIO. Source: `tdx_get_capabilities()`.
    """
    mm, host = ops.vm.mm, ops.host
    if cmd.flags:
        raise Errno(errno.EINVAL)
    (room,) = _NENT.unpack(mm.read(cmd.data + _CPUID_OFFSET, 4))
    configs = host.sysinfo.cpuid_configs
    if room < len(configs):
        raise Errno(errno.E2BIG)
    attributes, xfam = host.supported_attributes, host.supported_xfam
    if not attributes or not xfam:
        raise Errno(errno.EIO)

    # ---- Every check passed: from here on only the copy can fail. ----

    out = bytearray(_CPUID_OFFSET)
    _HEADER.pack_into(out, 0, attributes, xfam, 0, _TDVMCALLINFO_SETUP_EVENT_NOTIFY_INTERRUPT, 0, 0)
    out += struct.pack("<II", len(configs), 0)
    for config in configs:
        shown = config.without_host_state_features()
        index = 0 if shown.subleaf == NO_SUBLEAF else shown.subleaf
        eax = shown.eax | _GUEST_PHYS_BITS if shown.leaf == 0x8000_0008 else shown.eax
        # SIGNIFICANT_INDEX is never set: no mainline release does.
        out += CpuidEntry(shown.leaf, index, 0, eax, shown.ebx, shown.ecx, shown.edx).pack()
    mm.write(cmd.data, out)
    return 0
