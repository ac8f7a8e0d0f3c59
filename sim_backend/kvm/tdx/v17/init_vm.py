"""KVM_TDX_INIT_VM of v17: XFAM and GPAW are read off the CPUID table, and the module is the only judge."""

import errno
import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from sim_backend.kvm.cpuid import CpuidEntry, find_entry, unpack_entries
from sim_backend.kvm.errors import Errno
from sim_backend.kvm.tdx.sysinfo import NO_SUBLEAF, CpuidConfig
from sim_backend.kvm.tdx.td import TdState
from sim_backend.kvm.tdx.td_control import MNG_RD_TSC_OFFSET, create_td
from sim_backend.kvm.tdx.td_params import TdParams

if TYPE_CHECKING:
    from sim_backend.kvm.tdx.commands import TdxCmd
    from sim_backend.kvm.tdx.ops import TdxOps

_HEADER: Final = struct.Struct("<Q48s48s48s8032sII")  # kvm_tdx_init_vm without its entries
_ENTRY_BYTES: Final = 40
_MAX_ENTRIES: Final = 256
_TSC_UNIT_KHZ: Final = 25_000
XFAM_PT: Final = 1 << 8
XFAM_CET: Final = 3 << 11
XFAM_LBR: Final = 1 << 15


def tdx_td_init(ops: "TdxOps", cmd: "TdxCmd") -> int:
    """Create the TD. Raise ``Errno`` in v17's order of checks; nothing here bugs the VM."""
    vm, td, host = ops.vm, ops.td, ops.host
    mm = vm.mm
    if td.hkid:
        raise Errno(errno.EINVAL)
    if cmd.flags:
        raise Errno(errno.EINVAL)
    header = mm.read(cmd.data, _HEADER.size)
    attributes, mrconfigid, mrowner, mrownerconfig, reserved, nent, padding = _HEADER.unpack(header)
    if nent > _MAX_ENTRIES:
        raise Errno(errno.E2BIG)
    entries = unpack_entries(mm.read(cmd.data + _HEADER.size, nent * _ENTRY_BYTES))
    if any(reserved):
        raise Errno(errno.EINVAL)
    if padding:
        raise Errno(errno.EINVAL)
    if vm.created_vcpus:
        raise Errno(errno.EBUSY)
    size = find_entry(entries, 0x8000_0008, 0)
    gpaw52 = size is not None and size.eax & 0xFF > 48
    if gpaw52 and not host.profile.five_level_ept:
        raise Errno(errno.EINVAL)
    xfam = _xfam(ops, entries)
    if xfam & XFAM_LBR:
        raise Errno(errno.EOPNOTSUPP)
    params = TdParams(
        attributes=attributes,
        xfam=xfam,
        max_vcpus=vm.max_vcpus,
        ept_levels=5 if gpaw52 else 4,
        gpaw52=gpaw52,
        no_rbp_mod=False,
        tsc_frequency=vm.default_tsc_khz // _TSC_UNIT_KHZ,
        mrconfigid=mrconfigid,
        mrowner=mrowner,
        mrownerconfig=mrownerconfig,
        cpuid_values=tuple(configured(config, entries) or (0, 0, 0, 0) for config in host.sysinfo.cpuid_configs),
    )
    _forget_released_td(ops)
    result = create_td(ops, params)
    if result:
        return result
    with ops.on_lp() as lp:
        status, offset = host.seamcalls.mng_rd(lp, td.tdr, MNG_RD_TSC_OFFSET)
    td.tsc_offset = 0 if status else offset
    td.init_cpuid = tuple(entries)
    td.state = TdState.INITIALIZED
    return 0


def _forget_released_td(ops: "TdxOps") -> None:
    """Overwrite what KVM knows of the TD that KVM_TDX_RELEASE_VM left: nobody will ever reclaim its pages."""
    td = ops.td
    if td.tdr:
        for page in (td.tdr, *td.tdcs):
            ops.host.pages.leak(page)
        td.tdr, td.tdcs = 0, []


def _xfam(ops: "TdxOps", entries: Sequence[CpuidEntry]) -> int:
    """Return XFAM: the state components of CPUID leaf 0xD that KVM supports; excess bits are dropped silently."""
    host = ops.host
    user, supervisor = find_entry(entries, 0xD, 0), find_entry(entries, 0xD, 1)
    xcr0 = user.eax | user.edx << 32 if user is not None else 0
    xss = supervisor.ecx | supervisor.edx << 32 if supervisor is not None else 0
    return xcr0 & host.supported_xcr0 | xss & (host.supported_xss | XFAM_PT | XFAM_CET)


def configured(config: CpuidConfig, entries: Sequence[CpuidEntry]) -> tuple[int, int, int, int] | None:
    """Return the configurable bits of `config` in the first matching entry, or None when there is none."""
    entry = find_entry(entries, config.leaf, 0 if config.subleaf == NO_SUBLEAF else config.subleaf)
    if entry is None:
        return None
    return (
        entry.eax & config.eax,
        entry.ebx & config.ebx,
        entry.ecx & config.ecx,
        entry.edx & config.edx,
    )


def check_cpuid(ops: "TdxOps", entries: Sequence[CpuidEntry]) -> None:
    """Refuse a KVM_SET_CPUID2 table whose configurable part is not that of KVM_TDX_INIT_VM (EINVAL)."""
    for config in ops.host.sysinfo.cpuid_configs:
        if configured(config, entries) != configured(config, ops.td.init_cpuid):
            raise Errno(errno.EINVAL)
