"""KVM_TDX_CAPABILITIES of v17: the module's own words, nothing narrowed."""

import errno
import struct
from typing import TYPE_CHECKING, Final

from sim_backend.kvm.errors import Errno

if TYPE_CHECKING:
    from sim_backend.kvm.tdx.commands import TdxCmd
    from sim_backend.kvm.tdx.ops import TdxOps

_HEADER_BYTES: Final = 2056
_COUNT_OFFSET: Final = 2048
_CONFIGS_OFFSET: Final = 2052  # right behind the count, inside the header's padding
_WORDS: Final = struct.Struct("<4QI")
_CONFIG: Final = struct.Struct("<6I")
_SUPPORTED_GPAW: Final = 2  # an operator-precedence slip makes it 2 on every host


def tdx_get_capabilities(ops: "TdxOps", cmd: "TdxCmd") -> int:
    """Write v17's ``struct kvm_tdx_capabilities``. Raise ``Errno``: EINVAL (flags), EFAULT, E2BIG."""
    mm, info = ops.vm.mm, ops.host.sysinfo
    if cmd.flags:
        raise Errno(errno.EINVAL)
    header = mm.read(cmd.data, _HEADER_BYTES)
    (room,) = struct.unpack_from("<I", header, _COUNT_OFFSET)
    if room < len(info.cpuid_configs):
        raise Errno(errno.E2BIG)

    # ---- Every check passed: from here on only the copy can fail. ----

    out = bytearray(_HEADER_BYTES)
    _WORDS.pack_into(
        out,
        0,
        info.attributes_fixed0,
        info.attributes_fixed1,
        info.xfam_fixed0,
        info.xfam_fixed1,
        _SUPPORTED_GPAW,
    )
    struct.pack_into("<I", out, _COUNT_OFFSET, len(info.cpuid_configs))
    mm.write(cmd.data, out)
    configs = b"".join(_CONFIG.pack(c.leaf, c.subleaf, c.eax, c.ebx, c.ecx, c.edx) for c in info.cpuid_configs)
    mm.write(cmd.data + _CONFIGS_OFFSET, configs)
    return 0
