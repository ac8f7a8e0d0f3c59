"""Reading and writing the metadata of a vCPU: TDVPS fields and the TD VMCS.

Spec: TDX Module ABI Reference, "VCPU-Scope Metadata".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from sim_backend.cpu.engine import Cpu
from sim_backend.tdx_module import metadata, td_vmcs
from sim_backend.tdx_module.errors import LeafError, SimBug
from sim_backend.tdx_module.metadata import Access, Context, MetadataField
from sim_backend.tdx_module.metadata_td import host_access
from sim_backend.tdx_module.not_modelled import NotModelled
from sim_backend.tdx_module.td_params import ATTR_DEBUG, XFAM_PT
from sim_backend.tdx_module.tdvps import VAPIC_PAGE
from sim_backend.tdx_module.virtual_vmx_msrs import base_l2_cr4_write_mask
from uapi_ctypes.tdx_status import Status

if TYPE_CHECKING:
    from sim_backend.tdx_module.module import TdxModule
    from sim_backend.tdx_module.tdvps import Tdvps

__all__ = ["find", "host_access", "next_element", "read_element", "write_element"]

_VMCS, _VAPIC, _VE_INFO, _GPR, _GUEST_STATE, _EXT_STATE, _MSR_STATE, _MANAGEMENT, _CPUID_CONTROL, _EPF_LOG = (
    0, 1, 2, 16, 17, 18, 19, 32, 33, 34,
)  # fmt: skip
_VAPIC_PPR_OFFSET: Final = 0xA0
_ALL_ONES: Final = (1 << 64) - 1
_NULL_PA_BIT: Final = 1 << 63

_POSTED_INTERRUPTS: Final = frozenset(
    {td_vmcs.PIN_CONTROLS, td_vmcs.POSTED_INTERRUPT_VECTOR, td_vmcs.POSTED_INTERRUPT_DESCRIPTOR}
)

# VMCS fields that hold addresses: writing replaces the whole initial "no address" value.
_SHARED_HPA_SIZES: Final = {
    td_vmcs.PML_ADDRESS: 4096,
    td_vmcs.POSTED_INTERRUPT_DESCRIPTOR: 64,
    td_vmcs.SHARED_EPTP: 4096,
}
_PRIVATE_GPA: Final = frozenset({0x280A, 0x280C, 0x280E, 0x2810, 0x6802})
_ADDRESSES: Final = frozenset({0x2004, 0x2006, 0x2008, 0x200A, 0x200C, 0x2012, 0x2014, 0x2038, 0x203A, 0x2800})

_DEBUGCTL_EN_UNCORE_PMI: Final = 1 << 13
_XSAVE_HEADER: Final = range(64, 72)  # in XBUFF elements


def find(tdvps: Tdvps, field_id: int) -> MetadataField:
    """Return the field of the element `field_id` (its CONTEXT_CODE is already VP's), or raise."""
    if field_id & metadata.SINGLE_ELEMENT_RESERVED:
        raise LeafError(Status.METADATA_FIELD_ID_INCORRECT)
    field = metadata.find(Context.VP, field_id, tdvps.tdr.tdcs.num_l2_vms)
    if field is None or (field.class_code == _VMCS and field_id & 1):  # no "high" access type
        raise LeafError(Status.METADATA_FIELD_ID_INCORRECT)
    return field


def read_element(module: TdxModule, tdvps: Tdvps, field_id: int, access: Access) -> int:
    """Return the bits of the element that `access` may read; raise METADATA_FIELD_*."""
    field = find(tdvps, field_id)
    mask = field.rd[access]
    if not mask:
        raise LeafError(Status.METADATA_FIELD_NOT_READABLE)
    return _value(module, tdvps, field, field_id) & mask


def next_element(tdvps: Tdvps, field_id: int, access: Access) -> int:
    """Return the id after `field_id` that `access` may read."""
    return metadata.next_element(Context.VP, field_id, access, num_l2_vms=tdvps.tdr.tdcs.num_l2_vms)


def write_element(module: TdxModule, tdvps: Tdvps, field_id: int, access: Access, value: int, mask: int) -> int:
    """Write the bits `mask` of the element and return its old value; raise METADATA_FIELD_* or OPERAND_*."""
    field = find(tdvps, field_id)
    writable = field.wr[access]
    written = writable & mask
    if not written:
        raise LeafError(Status.METADATA_FIELD_NOT_WRITABLE)
    old = _value(module, tdvps, field, field_id)

    # A whole write starts from zero, a partial one from what is there; "no address" has no bits worth keeping.
    base = 0 if written == field.size_mask else old
    code = field_id & 0xFF_FFFF
    is_address = field.class_code == _VMCS and (code in _SHARED_HPA_SIZES or code in _PRIVATE_GPA or code in _ADDRESSES)
    if is_address and base & _NULL_PA_BIT:
        base &= writable
    if (base ^ value) & mask & ~writable:
        raise LeafError(Status.METADATA_FIELD_VALUE_NOT_VALID)
    new = base & ~written | value & written

    if field.class_code == _VMCS:
        _write_vmcs(module, tdvps, code, new, writable)
    else:
        _write_tdvps(module, tdvps, field, code, new, access)
    return old & field.rd[access]


def _cpu(tdvps: Tdvps) -> Cpu:
    if tdvps.cpu is None:
        raise SimBug("a vCPU's metadata before TDH.VP.INIT")
    return tdvps.cpu


def _value(module: TdxModule, tdvps: Tdvps, field: MetadataField, field_id: int) -> int:
    code = field_id & 0xFF_FFFF
    class_code = field.class_code
    if class_code == _VMCS:
        return td_vmcs.read(tdvps, code) & field.size_mask
    reader = _READERS.get(class_code)
    if reader is None:
        raise NotModelled(f"vCPU metadata field {field.name}")
    return reader(module, tdvps, field, code - field.code) & field.size_mask


def _read_vapic(module: TdxModule, tdvps: Tdvps, field: MetadataField, offset: int) -> int:  # noqa: ARG001
    return module.q[(tdvps.tdvps_page_pa[VAPIC_PAGE] >> 3) + offset]


def _read_ve_info(module: TdxModule, tdvps: Tdvps, field: MetadataField, offset: int) -> int:  # noqa: ARG001
    return int(getattr(tdvps.ve_info, field.attribute))


def _read_gpr(module: TdxModule, tdvps: Tdvps, field: MetadataField, offset: int) -> int:  # noqa: ARG001
    return _cpu(tdvps).gprs[field.code]


def _read_guest_state(module: TdxModule, tdvps: Tdvps, field: MetadataField, offset: int) -> int:  # noqa: ARG001
    name = field.name
    if name == "VCPU_STATE_DETAILS":
        rvi = td_vmcs.read(tdvps, td_vmcs.GUEST_INTERRUPT_STATUS) & 0xF0
        ppr = module.memory.read(tdvps.tdvps_page_pa[VAPIC_PAGE] + _VAPIC_PPR_OFFSET, 1)[0] & 0xF0
        return int(rvi > ppr)
    state = _cpu(tdvps).get_state()
    if name == "XCR0":
        return state.xcr0
    if name == "CR2":
        return state.cr2
    return state.dr[4 if name == "DR6" else field.code]


def _read_ext_state(module: TdxModule, tdvps: Tdvps, field: MetadataField, offset: int) -> int:  # noqa: ARG001
    fxsave = _cpu(tdvps).get_state().fxsave
    if fxsave and 8 * offset < len(fxsave):
        return int.from_bytes(fxsave[8 * offset : 8 * offset + 8], "little")
    return tdvps.fields.get(field.field_id + offset, 0)


def _msr_of(code: int) -> int:
    return code if code < 0x2000 else 0xC000_0000 | (code - 0x2000)


def _read_msr_state(module: TdxModule, tdvps: Tdvps, field: MetadataField, offset: int) -> int:  # noqa: ARG001
    value = _cpu(tdvps).get_state().msrs.get(_msr_of(field.code + offset), 0)
    if field.name == "IA32_SPEC_CTRL" and not tdvps.tdr.tdcs.cpuid_flags.ddpd:
        value &= ~td_vmcs.SPEC_CTRL_DDPD_U
    return value


def _read_management(module: TdxModule, tdvps: Tdvps, field: MetadataField, offset: int) -> int:
    if field.name == "TDVPS_PAGE_PA":
        hkid = tdvps.tdr.hkid << module.hkid_start_bit
        return tdvps.tdvps_page_pa[offset] | hkid if offset < len(tdvps.tdvps_page_pa) else 0
    value = getattr(tdvps, field.attribute, None)
    return tdvps.fields.get(field.field_id + offset, 0) if value is None else int(value)


def _read_cpuid_control(module: TdxModule, tdvps: Tdvps, field: MetadataField, offset: int) -> int:  # noqa: ARG001
    return tdvps.cpuid_control[offset]


def _read_epf_log(module: TdxModule, tdvps: Tdvps, field: MetadataField, offset: int) -> int:  # noqa: ARG001
    return tdvps.last_epf_gpa_list[offset]


_READERS: Final[dict[int, Callable[[TdxModule, Tdvps, MetadataField, int], int]]] = {
    _VAPIC: _read_vapic,
    _VE_INFO: _read_ve_info,
    _GPR: _read_gpr,
    _GUEST_STATE: _read_guest_state,
    _EXT_STATE: _read_ext_state,
    _MSR_STATE: _read_msr_state,
    _MANAGEMENT: _read_management,
    _CPUID_CONTROL: _read_cpuid_control,
    _EPF_LOG: _read_epf_log,
}


def _write_vmcs(module: TdxModule, tdvps: Tdvps, code: int, value: int, writable: int) -> None:
    """Check what a TD VMCS field may hold, and store it."""
    size = _SHARED_HPA_SIZES.get(code)
    if size is not None:
        try:
            module.check_shared_hpa(value, size, 0)
        except LeafError:
            raise LeafError(Status.METADATA_FIELD_VALUE_NOT_VALID) from None
    elif code in _PRIVATE_GPA and value >> tdvps.tdr.tdcs.shared_bit:
        raise LeafError(Status.METADATA_FIELD_VALUE_NOT_VALID)
    check = _VMCS_CHECKS.get(code)
    td_vmcs.write(tdvps, code, value if check is None else check(module, tdvps, value, writable))
    if code in _POSTED_INTERRUPTS:
        _configure_posted_interrupts(module, tdvps)


def _configure_posted_interrupts(module: TdxModule, tdvps: Tdvps) -> None:
    """Tell the virtual APIC what the TD VMCS says about posted interrupts."""
    apic = td_vmcs.virtual_apic(tdvps)
    vmcs = tdvps.vmcs
    if vmcs[td_vmcs.PIN_CONTROLS] & td_vmcs.PIN_PROCESS_POSTED_INTERRUPTS:
        descriptor = vmcs[td_vmcs.POSTED_INTERRUPT_DESCRIPTOR] & ~module.hkid_mask
        apic.process_posted_interrupts(vmcs[td_vmcs.POSTED_INTERRUPT_VECTOR], descriptor)
    else:
        apic.ignore_posted_interrupts()


def _check_posted_interrupt_vector(module: TdxModule, tdvps: Tdvps, value: int, writable: int) -> int:  # noqa: ARG001
    if value > 255:
        raise LeafError(Status.METADATA_FIELD_VALUE_NOT_VALID)
    _shadow(tdvps, "SHADOW_POSTED_INT_NOTIFICATION_VECTOR", value)
    return value


def _check_pin_controls(module: TdxModule, tdvps: Tdvps, value: int, writable: int) -> int:  # noqa: ARG001
    if value & td_vmcs.PIN_PROCESS_POSTED_INTERRUPTS:
        if tdvps.vmcs[td_vmcs.POSTED_INTERRUPT_VECTOR] == td_vmcs.POSTED_INTERRUPT_VECTOR_INIT:
            raise LeafError(Status.TD_VMCS_FIELD_NOT_INITIALIZED, td_vmcs.POSTED_INTERRUPT_VECTOR)
        if tdvps.vmcs[td_vmcs.POSTED_INTERRUPT_DESCRIPTOR] == td_vmcs.NULL_PA:
            raise LeafError(Status.TD_VMCS_FIELD_NOT_INITIALIZED, td_vmcs.POSTED_INTERRUPT_DESCRIPTOR)
    _shadow(tdvps, "SHADOW_PINBASED_EXEC_CTLS", value)
    return value


def _check_posted_interrupt_descriptor(module: TdxModule, tdvps: Tdvps, value: int, writable: int) -> int:  # noqa: ARG001
    _shadow(tdvps, "SHADOW_PID_HPA", value)
    return value


def _check_shared_eptp(module: TdxModule, tdvps: Tdvps, value: int, writable: int) -> int:  # noqa: ARG001
    _shadow(tdvps, "SHADOW_SHARED_EPTP", value)
    return value


def _check_proc_controls2(module: TdxModule, tdvps: Tdvps, value: int, writable: int) -> int:
    ctls2 = module.platform.rdmsr(0, 0x48B)
    if writable & 0xFFFF_FFFF & (~value & ctls2 | value & ~(ctls2 >> 32)):
        raise LeafError(Status.METADATA_FIELD_VALUE_NOT_VALID)
    if value & td_vmcs.PROC2_EN_PML:
        debug = tdvps.tdr.tdcs.attributes & ATTR_DEBUG
        if not debug or tdvps.vmcs[td_vmcs.PML_ADDRESS] & _NULL_PA_BIT:
            raise LeafError(Status.METADATA_FIELD_VALUE_NOT_VALID)
    return value


def _check_debugctl(module: TdxModule, tdvps: Tdvps, value: int, writable: int) -> int:  # noqa: ARG001
    if value & 0xC0 == 0x40 and not tdvps.tdr.tdcs.attributes & ATTR_DEBUG:
        raise LeafError(Status.METADATA_FIELD_VALUE_NOT_VALID)
    return value & ~_DEBUGCTL_EN_UNCORE_PMI


def _check_cr0(module: TdxModule, tdvps: Tdvps, value: int, writable: int) -> int:  # noqa: ARG001
    return _as_guest_writes(tdvps, value, td_vmcs.GUEST_CR0, td_vmcs.CR0_GUEST_HOST_MASK, td_vmcs.CR0_READ_SHADOW)


def _check_cr4(module: TdxModule, tdvps: Tdvps, value: int, writable: int) -> int:  # noqa: ARG001
    return _as_guest_writes(tdvps, value, td_vmcs.GUEST_CR4, td_vmcs.CR4_GUEST_HOST_MASK, td_vmcs.CR4_READ_SHADOW)


def _as_guest_writes(tdvps: Tdvps, value: int, register: int, mask_field: int, shadow_field: int) -> int:
    """Return the real value of a control register that is written as if by the guest."""
    mask, shadow = td_vmcs.read(tdvps, mask_field), td_vmcs.read(tdvps, shadow_field)
    if (value ^ shadow) & mask:
        raise LeafError(Status.METADATA_FIELD_VALUE_NOT_VALID)
    return td_vmcs.read(tdvps, register) & mask | value & ~mask


_VMCS_CHECKS: Final[dict[int, Callable[[TdxModule, Tdvps, int, int], int]]] = {
    td_vmcs.POSTED_INTERRUPT_VECTOR: _check_posted_interrupt_vector,
    td_vmcs.PIN_CONTROLS: _check_pin_controls,
    td_vmcs.POSTED_INTERRUPT_DESCRIPTOR: _check_posted_interrupt_descriptor,
    td_vmcs.SHARED_EPTP: _check_shared_eptp,
    td_vmcs.PROC_CONTROLS2: _check_proc_controls2,
    td_vmcs.IA32_DEBUGCTL: _check_debugctl,
    td_vmcs.GUEST_CR0: _check_cr0,
    td_vmcs.GUEST_CR4: _check_cr4,
}
_FIELD_IDS: Final = {field.name: field.field_id for field in metadata.FIELDS if field.table == "VP"}


def _shadow(tdvps: Tdvps, name: str, value: int) -> None:
    tdvps.fields[_FIELD_IDS[name]] = value


def set_field(tdvps: Tdvps, name: str, value: int, element: int = 0) -> None:
    """Store element `element` of a TDVPS field that nothing models but metadata shows."""
    tdvps.fields[_FIELD_IDS[name] + element] = value


def _write_tdvps(module: TdxModule, tdvps: Tdvps, field: MetadataField, code: int, value: int, access: Access) -> None:
    offset = code - field.code
    class_code = field.class_code
    if class_code == _GPR:
        _cpu(tdvps).gprs[field.code] = value
    elif class_code == _GUEST_STATE:
        state = _cpu(tdvps).get_state()
        if field.name == "CR2":
            state.cr2 = value
        else:
            state.dr[4 if field.name == "DR6" else field.code] = value
        _cpu(tdvps).set_state(state)
    elif class_code == _EXT_STATE:
        _write_ext_state(tdvps, field, offset, value)
    elif class_code == _MSR_STATE:
        state = _cpu(tdvps).get_state()
        if field.name == "IA32_SPEC_CTRL":
            value = real_spec_ctrl(module, tdvps, value)
        state.msrs[_msr_of(code)] = value
        _cpu(tdvps).set_state(state)
    elif class_code == _CPUID_CONTROL:
        tdvps.cpuid_control[offset] = value
    elif class_code == _MANAGEMENT:
        _write_management(tdvps, field, offset, value)
    else:
        raise NotModelled(f"writing vCPU metadata field {field.name} as {access.name}")


def real_spec_ctrl(module: TdxModule, tdvps: Tdvps, seen: int) -> int:
    """Return IA32_SPEC_CTRL of a guest that reads `seen`: DDPD_U is on behind the back of a TD unaware of it."""
    if module.capabilities is None or not module.capabilities.ddpd:
        return seen & ~td_vmcs.SPEC_CTRL_DDPD_U
    return seen if tdvps.tdr.tdcs.cpuid_flags.ddpd else seen | td_vmcs.SPEC_CTRL_DDPD_U


def _write_ext_state(tdvps: Tdvps, field: MetadataField, offset: int, value: int) -> None:
    tdcs = tdvps.tdr.tdcs
    # The XSAVE header, and IA32_RTIT_CTL at the start of the PT component, are not the debugger's.
    if offset in _XSAVE_HEADER or (tdcs.xfam & XFAM_PT and offset == tdcs.xbuff_offsets[8] // 8):
        raise LeafError(Status.METADATA_FIELD_NOT_WRITABLE)
    cpu = _cpu(tdvps)
    state = cpu.get_state()
    if state.fxsave and 8 * offset < len(state.fxsave):
        image = bytearray(state.fxsave)
        image[8 * offset : 8 * offset + 8] = value.to_bytes(8, "little")
        state.fxsave = bytes(image)
        cpu.set_state(state)
    else:
        tdvps.fields[field.field_id + offset] = value


def _write_management(tdvps: Tdvps, field: MetadataField, offset: int, value: int) -> None:
    if field.name == "XFAM":  # 1.5.01 has no per-vCPU XFAM yet
        raise LeafError(Status.METADATA_FIELD_NOT_WRITABLE)
    vm_id = offset
    if field.name in ("L2_CTLS", "TSC_DEADLINE") and 0 < vm_id <= tdvps.tdr.tdcs.num_l2_vms:
        raise NotModelled(f"{field.name} of an L2 VM")
    if getattr(tdvps, field.attribute, None) is None:
        tdvps.fields[field.field_id + offset] = value
    else:
        setattr(tdvps, field.attribute, value)


_IA32_SPEC_CTRL: Final = 0x48
_IA32_LBR_DEPTH: Final = 0x14CF
_IA32_FMASK: Final = 0xC000_0084
_IA32_FMASK_INIT: Final = 0x2_0200
_XFAM_LBR: Final = 1 << 15


def initialize(module: TdxModule, tdvps: Tdvps) -> None:
    """Give the fields that only metadata shows the values that TDH.VP.INIT gives them."""
    vmcs = tdvps.vmcs
    tdcs = tdvps.tdr.tdcs
    for name in ("SHADOW_PID_HPA", "SHADOW_SHARED_EPTP", "L2_ENTER_GUEST_STATE_GPA", "L2_ENTER_GUEST_STATE_HPA",
                 "L2_VAPIC_GPA", "L2_VAPIC_HPA", "TSC_DEADLINE"):  # fmt: skip
        set_field(tdvps, name, _ALL_ONES)
    set_field(tdvps, "SHADOW_POSTED_INT_NOTIFICATION_VECTOR", td_vmcs.POSTED_INTERRUPT_VECTOR_INIT)
    capabilities = module.capabilities
    if capabilities is None:
        raise SimBug("a vCPU before TDH.SYS.INIT")
    set_field(tdvps, "SHADOW_PINBASED_EXEC_CTLS", capabilities.l1_controls.pin)
    set_field(tdvps, "SHADOW_PROCBASED_EXEC_CTLS2", capabilities.l1_controls.proc2)
    set_field(tdvps, "SHADOW_CR0_GUEST_HOST_MASK", vmcs[td_vmcs.CR0_GUEST_HOST_MASK])
    set_field(tdvps, "SHADOW_CR0_READ_SHADOW", vmcs[td_vmcs.CR0_READ_SHADOW])
    set_field(tdvps, "SHADOW_CR4_GUEST_HOST_MASK", vmcs[td_vmcs.CR4_GUEST_HOST_MASK])
    set_field(tdvps, "SHADOW_CR4_READ_SHADOW", vmcs[td_vmcs.CR4_READ_SHADOW])
    cr0_fixed = capabilities.cr0_fixed0 | ~capabilities.cr0_fixed1 & _ALL_ONES
    pe_pg = 1 | 1 << 31
    set_field(tdvps, "BASE_L2_CR0_GUEST_HOST_MASK", cr0_fixed & ~pe_pg | td_vmcs.CR0_MODULE_BITS)
    set_field(tdvps, "BASE_L2_CR0_READ_SHADOW", capabilities.cr0_fixed0 & ~pe_pg | 1 << 5)
    writable = base_l2_cr4_write_mask(capabilities, tdcs.attributes, tdcs.xfam)
    set_field(tdvps, "BASE_L2_CR4_GUEST_HOST_MASK", ~writable & _ALL_ONES)
    set_field(tdvps, "BASE_L2_CR4_READ_SHADOW", capabilities.cr4_fixed0 | 1 << 6 | 1 << 13)
    set_field(tdvps, "XBUFF", 1 << 63, 65)  # XCOMP_BV: the compacted format
    set_field(tdvps, "LAST_SEAMDB_INDEX", tdvps.tdr.seamdb_index)
    cpu = _cpu(tdvps)
    state = cpu.get_state()
    state.msrs[_IA32_FMASK] = _IA32_FMASK_INIT
    state.msrs[_IA32_SPEC_CTRL] = real_spec_ctrl(module, tdvps, 0)
    if tdcs.xfam & _XFAM_LBR:
        state.msrs[_IA32_LBR_DEPTH] = capabilities.max_lbr_depth
    cpu.set_state(state)
