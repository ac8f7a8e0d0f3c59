"""KVM_TDX_INIT_VM: take a key id, create the TD in the module and configure it."""

import errno
import struct
from typing import TYPE_CHECKING, Final

from sim_backend.kvm.cpuid import CpuidEntry, find_entry, unpack_entries
from sim_backend.kvm.errors import Errno
from sim_backend.kvm.tdx.sysinfo import NO_SUBLEAF, uses_tsx_or_waitpkg
from sim_backend.kvm.tdx.td import TdState
from sim_backend.kvm.tdx.td_control import MNG_RD_TSC_MULTIPLIER, MNG_RD_TSC_OFFSET, create_td
from sim_backend.kvm.tdx.td_params import TdParams

if TYPE_CHECKING:
    from sim_backend.kvm.tdx.commands import TdxCmd
    from sim_backend.kvm.tdx.ops import TdxOps

_HEADER: Final = struct.Struct("<QQ48s48s48s96sII")  # kvm_tdx_init_vm without its entries
_NENT: Final = struct.Struct("<I")
_NENT_OFFSET: Final = 256
_ENTRY_BYTES: Final = 40
_MAX_ENTRIES: Final = 256
_GPAW_48: Final = 48
_GPAW_52: Final = 52
_TSC_UNIT_KHZ: Final = 25_000


def tdx_td_init(ops: "TdxOps", cmd: "TdxCmd") -> int:
    """Create the TD of this VM as ``struct kvm_tdx_init_vm`` at `cmd.data` says.

    Raise ``Errno``; with EINVAL from TDH.MNG.INIT its `hw_error` is the module's status. After a failure
    everything is unwound. Source: `tdx_td_init()`, checks in its order.
    """
    vm, td, host = ops.vm, ops.td, ops.host
    mm = vm.mm
    # 1. The TD has not been initialised.
    if td.state is not TdState.UNINITIALIZED:
        raise Errno(errno.EINVAL)
    # 2. No flags are defined.
    if cmd.flags:
        raise Errno(errno.EINVAL)
    # 3, 4. The number of CPUID entries, readable and within the limit.
    (nent,) = _NENT.unpack(mm.read(cmd.data + _NENT_OFFSET, 4))
    if nent > _MAX_ENTRIES:
        raise Errno(errno.E2BIG)
    # 5. The whole structure.
    blob = mm.read(cmd.data, _HEADER.size + nent * _ENTRY_BYTES)
    attributes, xfam, mrconfigid, mrowner, mrownerconfig, reserved, nent_again, padding = _HEADER.unpack_from(blob)
    # 6. Reserved words.
    if any(reserved):
        raise Errno(errno.EINVAL)
    # 7. Padding, and a count that did not change between the two reads.
    if padding or nent_again != nent:
        raise Errno(errno.EINVAL)
    # 8. No vCPU exists.
    if vm.created_vcpus:
        raise Errno(errno.EBUSY)
    # 9, 10. Attributes and XFAM within what KVM supports; what the module insists on is added silently.
    info = host.sysinfo
    if attributes & ~host.supported_attributes:
        raise Errno(errno.EINVAL)
    if xfam & ~host.supported_xfam:
        raise Errno(errno.EINVAL)
    attributes |= info.attributes_fixed1
    xfam |= info.xfam_fixed1
    # 11. The width of guest-physical addresses.
    entries = unpack_entries(blob[_HEADER.size :])
    size = find_entry(entries, 0x8000_0008, 0)
    if size is None:
        raise Errno(errno.EINVAL)
    gpaw = size.eax >> 16 & 0xFF
    if gpaw not in (_GPAW_48, _GPAW_52) or (gpaw == _GPAW_52 and not host.profile.five_level_ept):
        raise Errno(errno.EINVAL)
    # 12. Every CPUID entry is one that the module lets us configure.
    values = _cpuid_values(ops, entries)

    # 13 to 17. A key id, and the TD itself.
    params = TdParams(
        attributes=attributes,
        xfam=xfam,
        max_vcpus=vm.max_vcpus,
        ept_levels=5 if gpaw == _GPAW_52 else 4,
        gpaw52=gpaw == _GPAW_52,
        no_rbp_mod=True,
        tsc_frequency=vm.default_tsc_khz // _TSC_UNIT_KHZ,
        mrconfigid=mrconfigid,
        mrowner=mrowner,
        mrownerconfig=mrownerconfig,
        cpuid_values=values,
    )
    create_td(ops, params)
    td.tsc_offset = _read_or_zero(ops, MNG_RD_TSC_OFFSET)
    td.tsc_multiplier = _read_or_zero(ops, MNG_RD_TSC_MULTIPLIER)
    td.state = TdState.INITIALIZED
    return 0


def _cpuid_values(ops: "TdxOps", entries: list[CpuidEntry]) -> tuple[tuple[int, int, int, int], ...]:
    """Return TD_PARAMS.CPUID_VALUES; EINVAL for an entry that configures nothing, or TSX or WAITPKG."""
    values = []
    matched = 0
    for config in ops.host.sysinfo.cpuid_configs:
        index = 0 if config.subleaf == NO_SUBLEAF else config.subleaf
        entry = find_entry(entries, config.leaf, index)
        if entry is None:
            values.append((0, 0, 0, 0))
            continue
        if uses_tsx_or_waitpkg(entry.function, entry.index, entry.ebx, entry.ecx):
            raise Errno(errno.EINVAL)
        matched += 1
        # The module wants the guest-physical size as zero: the GPAW flag says it.
        eax = entry.eax & ~(0xFF << 16) if config.leaf == 0x8000_0008 else entry.eax
        values.append((eax, entry.ebx, entry.ecx, entry.edx))
    if matched != len(entries):
        raise Errno(errno.EINVAL)
    return tuple(values)


def _read_or_zero(ops: "TdxOps", field: int) -> int:
    """Return a TD metadata field. A refusal is only logged by the kernel, and the value is 0."""
    with ops.on_lp() as lp:
        status, value = ops.host.seamcalls.mng_rd(lp, ops.td.tdr, field)
    return 0 if status else value
