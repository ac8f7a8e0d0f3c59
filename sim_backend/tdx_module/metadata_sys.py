"""Reading the metadata of the TDX module itself: TDH.SYS.RD/RDALL and TDG.SYS.RD/RDALL.

Spec: TDX Module ABI Reference, "Global-Scope Metadata".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from sim_backend.tdx_module import metadata
from sim_backend.tdx_module.cpu_capabilities import XFAM_FIXED1, CpuCapabilities
from sim_backend.tdx_module.cpuid_virtualization import CPUID_CONFIG, CpuidValues, allowed_fms
from sim_backend.tdx_module.errors import LeafError, SimBug
from sim_backend.tdx_module.metadata import Access, Context, MetadataField
from sim_backend.tdx_module.td_params import ARCH_CAP_CONFIG_MASK
from uapi_ctypes.tdx_status import Status

if TYPE_CHECKING:
    from sim_backend.tdx_module.module import TdxModule

VENDOR_INTEL: Final = 0x8086
MAX_CMRS: Final = 32
MAX_TDMRS: Final = 64
MAX_RESERVED_PER_TDMR: Final = 16
PAMT_ENTRY_BYTES: Final = 16
_PAGE: Final = 4096
_NUM_HANDOFF_PAGES: Final = 63
SERVTD_ATTR_FIXED0: Final = 0x7FF_0000_0001
_ALL_ONES: Final = (1 << 64) - 1

_CONSTANTS: Final = {
    "VENDOR_ID": VENDOR_INTEL,
    "NO_DOWNGRADE": 0,
    "NUM_HANDOFF_PAGES": _NUM_HANDOFF_PAGES,
    "HANDOFF_DATA_VALID": 0,
    "HANDOFF_DATA_HV": 0,
    "HANDOFF_DATA_SIZE": 0,
    "SYS_ATTRIBUTES": 0,
    "NUM_TDX_FEATURES": 1,
    "NUM_CMRS": MAX_CMRS,
    "MAX_TDMRS": MAX_TDMRS,
    "MAX_RESERVED_PER_TDMR": MAX_RESERVED_PER_TDMR,
    "PAMT_4K_ENTRY_SIZE": PAMT_ENTRY_BYTES,
    "PAMT_2M_ENTRY_SIZE": PAMT_ENTRY_BYTES,
    "PAMT_1G_ENTRY_SIZE": PAMT_ENTRY_BYTES,
    "TDR_BASE_SIZE": _PAGE,
    "TDCS_BASE_SIZE": 6 * _PAGE,
    "TDCS_SIZE_PER_L2_VM": _PAGE,
    "TDVPS_BASE_SIZE": 6 * _PAGE,
    "TDVPS_SIZE_PER_L2_VM": 3 * _PAGE,
    "XFAM_FIXED1": XFAM_FIXED1,
    "NUM_CPUID_CONFIG": len(CPUID_CONFIG),
    "IA32_ARCH_CAPABILITIES_CONFIG_MASK": ARCH_CAP_CONFIG_MASK,
    "NUM_DISALLOWED_FMS": 0,
    "DISALLOWED_FMS": 0,
    "MIG_ATTRIBUTES": 0,
    "MIN_EXPORT_VERSION": 0,
    "MAX_EXPORT_VERSION": 0,
    "MIN_IMPORT_VERSION": 0,
    "MAX_IMPORT_VERSION": 0,
    "MAX_MIGS": 512,
    "NUM_IMMUTABLE_STATE_PAGES": 3,
    "NUM_TD_STATE_PAGES": 2,
    "NUM_VP_STATE_PAGES": 5,
    "MAX_SERV_TDS": 1,
    "SERVTD_ATTR_FIXED0": SERVTD_ATTR_FIXED0,
    "SERVTD_ATTR_FIXED1": 0,
    "GUEST_L2_GPA_ATTR_MASK": 0x807F,
    "VM_CTLS_FIXED0": 1,
    "VM_CTLS_FIXED1": 0,
    "VPCU_L2_CTLS_FIXED0": 3,
    "VCPU_L2_CTLS_FIXED1": 0,
    "VPCU_L2_DEBUG_CTLS_FIXED0": 7,
    "VCPU_L2_DEBUG_CTLS_FIXED1": 0,
}

SEAMOPS_SEAMVERIFYREPORT: Final = 1 << 6  # in SEAMOPS.CAPABILITIES: the CPU verifies reports
_FEATURE_LOCAL_ATTESTATION: Final = 1 << 8

_FROM_PROFILE: Final = {
    "BUILD_DATE": "build_date",
    "BUILD_NUM": "build_num",
    "MINOR_VERSION": "minor_version",
    "MAJOR_VERSION": "major_version",
    "UPDATE_VERSION": "update_version",
    "INTERNAL_VERSION": "internal_version",
    "MODULE_HV": "module_hv",
    "MIN_UPDATE_HV": "min_update_hv",
    "ATTRIBUTES_FIXED0": "attributes_fixed0",
    "ATTRIBUTES_FIXED1": "attributes_fixed1",
    "CONFIG_FLAGS_FIXED0": "config_flags_fixed0",
    "CONFIG_FLAGS_FIXED1": "config_flags_fixed1",
}


def capabilities_of(module: TdxModule) -> CpuCapabilities:
    """Return what TDH.SYS.INIT sampled."""
    if module.capabilities is None:
        raise SimBug("the module's capabilities before TDH.SYS.INIT")
    return module.capabilities


def _pkg_fms(module: TdxModule, field_number: int, element: int) -> int:  # noqa: ARG001
    return module.platform.cpuid_regs(1)[0] if field_number < module.platform.packages else 0


def _cmr(module: TdxModule, field_number: int, part: int) -> int:
    cmrs = module.platform.cmrs
    return cmrs[field_number][part] if field_number < len(cmrs) else 0


def _cpuid_config_value(module: TdxModule, field_number: int, element: int) -> int:  # noqa: ARG001
    if field_number >= len(CPUID_CONFIG):
        return 0
    return pack_registers(CPUID_CONFIG[field_number].config_direct)[element]


def _allowed_fms(module: TdxModule, field_number: int, element: int) -> int:  # noqa: ARG001
    allowed = allowed_fms(capabilities_of(module).cpuid.fms)
    return allowed[field_number] if field_number < len(allowed) else 0


def _cpuid_config_leaf(module: TdxModule, field_number: int, element: int) -> int:  # noqa: ARG001
    return CPUID_CONFIG[field_number].leaf_subleaf if field_number < len(CPUID_CONFIG) else _ALL_ONES


def _tdx_features0(module: TdxModule, field_number: int, element: int) -> int:  # noqa: ARG001
    verifies = module.platform.seamops_capabilities & SEAMOPS_SEAMVERIFYREPORT
    return module.profile.tdx_features0 & ~(0 if verifies else _FEATURE_LOCAL_ATTESTATION)


_COMPUTED: Final[dict[str, Callable[[TdxModule, int, int], int]]] = {
    "NUM_PKGS": lambda module, _field, _element: module.platform.packages,
    "PKG_FMS": _pkg_fms,
    "CMR_BASE": lambda module, field_number, _element: _cmr(module, field_number, 0),
    "CMR_SIZE": lambda module, field_number, _element: _cmr(module, field_number, 1),
    "TDX_FEATURES0": _tdx_features0,
    "XFAM_FIXED0": lambda module, _field, _element: capabilities_of(module).xfam_fixed0,
    "CPUID_CONFIG_LEAVES": _cpuid_config_leaf,
    "CPUID_CONFIG_VALUES": _cpuid_config_value,
    "NUM_ALLOWED_FMS": lambda module, _field, _element: len(allowed_fms(capabilities_of(module).cpuid.fms)),
    "ALLOWED_FMS": _allowed_fms,
}


def pack_registers(values: CpuidValues) -> tuple[int, int]:
    """Return EAX | EBX << 32 and ECX | EDX << 32."""
    return values[0] | values[1] << 32, values[2] | values[3] << 32


def value(module: TdxModule, field: MetadataField, offset: int) -> int:
    """Return element `offset` of `field`, all bits."""
    if field.name in _CONSTANTS:
        return _CONSTANTS[field.name]
    if field.name in _FROM_PROFILE:
        number: int = getattr(module.profile, _FROM_PROFILE[field.name])
        return number
    field_number, element = divmod(offset, field.num_elem)
    return _COMPUTED[field.name](module, field_number, element)


def read_element(module: TdxModule, field_id: int, access: Access) -> int:
    """Return the bits of the element `field_id` that `access` may read; raise METADATA_FIELD_*."""
    if field_id & metadata.SINGLE_ELEMENT_RESERVED:
        raise LeafError(Status.METADATA_FIELD_ID_INCORRECT)
    field = metadata.find(Context.SYS, field_id, 0)
    if field is None:
        raise LeafError(Status.METADATA_FIELD_ID_INCORRECT)
    mask = field.rd[access]
    if not mask:
        raise LeafError(Status.METADATA_FIELD_NOT_READABLE)
    return value(module, field, (field_id & 0xFF_FFFF) - field.code) & mask
