"""KVM_TDX_INIT_VCPU: create the vCPU in the module."""

import errno
from typing import TYPE_CHECKING, Final

from sim_backend.kvm.errors import Errno
from sim_backend.kvm.host_pages import OutOfMemory
from sim_backend.kvm.lapic import APIC_BASE_ENABLE, APIC_BASE_X2APIC
from sim_backend.kvm.msrs import MsrRefused, bsp_flag, set_apic_base
from sim_backend.kvm.tdx import vp_fields
from sim_backend.kvm.tdx.seamcalls import SUCCESS
from sim_backend.kvm.vcpu import MpState

if TYPE_CHECKING:
    from sim_backend.kvm.tdx.commands import TdxCmd
    from sim_backend.kvm.tdx.ops import TdxOps
    from sim_backend.kvm.vcpu import Vcpu

APIC_BASE: Final = 0xFEE0_0000
POSTED_INTERRUPT_VECTOR: Final = 0xF2
_PIN_BASED_POSTED_INTERRUPT: Final = 1 << 7
_SECONDARY_BUS_LOCK: Final = 1 << 30
_SECONDARY_NOTIFY: Final = 1 << 31


def tdx_vcpu_init(ops: "TdxOps", vcpu: "Vcpu", cmd: "TdxCmd") -> int:
    """Create and initialise the vCPU; `cmd.data` becomes its RCX and R8.

    Raise ``Errno``: EINVAL (flags, done already, CPUID without X2APIC), ENOMEM, or EIO with the VM bugged.
    Source: `tdx_vcpu_init()`.
    """
    vendor = vcpu.vendor
    if cmd.flags:
        raise Errno(errno.EINVAL)
    if vendor.initialized:
        raise Errno(errno.EINVAL)
    set_x2apic_base(vcpu)
    create_vcpu(ops, vcpu, cmd.data)
    configure_posted_interrupts(ops, vcpu)
    if ops.host.profile.behaves("tdx_notify_and_bus_lock_exits"):
        _configure_notify_and_bus_lock(ops, vcpu)
    vendor.initialized = True
    vcpu.mp_state = MpState.RUNNABLE
    return 0


def set_x2apic_base(vcpu: "Vcpu") -> None:
    """Put the local APIC into x2APIC mode, or raise ``Errno(EINVAL)`` when the vCPU's CPUID does not allow it."""
    base = APIC_BASE | APIC_BASE_X2APIC | APIC_BASE_ENABLE | bsp_flag(vcpu)
    try:
        set_apic_base(vcpu, base, host_initiated=True)
    except MsrRefused:
        raise Errno(errno.EINVAL) from None


def create_vcpu(ops: "TdxOps", vcpu: "Vcpu", initial_rcx: int) -> None:
    """Issue VP.CREATE, VP.ADDCX for every page and VP.INIT. Raise ``Errno(ENOMEM)``, or EIO with the VM bugged."""
    td, host, vendor = ops.td, ops.host, vcpu.vendor
    calls = host.seamcalls
    try:
        pages = host.pages.alloc_many(host.sysinfo.tdvps_pages)
    except OutOfMemory:
        raise Errno(errno.ENOMEM) from None
    with ops.on_lp() as lp:
        if calls.vp_create(lp, td.tdr, pages[0]) != SUCCESS:
            for page in pages:
                host.pages.free(page)
            ops.vm.bug()
            raise Errno(errno.EIO)
        vendor.tdvpr = pages[0]
        for number, page in enumerate(pages[1:], 1):
            if calls.vp_addcx(lp, vendor.tdvpr, page) != SUCCESS:
                for unused in pages[number:]:
                    host.pages.free(unused)
                ops.vm.bug()
                raise Errno(errno.EIO)
            vendor.tdcx.append(page)
        if host.is_v17:
            status = calls.vp_init(lp, vendor.tdvpr, initial_rcx)
        else:
            status = calls.vp_init_v1(lp, vendor.tdvpr, initial_rcx, vcpu.id)
        if status != SUCCESS:
            ops.vm.bug()
            raise Errno(errno.EIO)
        vendor.associated_lp = lp


def configure_posted_interrupts(ops: "TdxOps", vcpu: "Vcpu") -> None:
    """Tell the module where the posted-interrupt descriptor is. A refusal bugs the VM but is not returned."""
    vendor = vcpu.vendor
    vendor.initialized = True  # so that VP.WR below goes to a vCPU that can be flushed
    write_field(ops, vcpu, vp_fields.POSTED_INTERRUPT_VECTOR, POSTED_INTERRUPT_VECTOR, 0xFFFF)
    write_field(ops, vcpu, vp_fields.POSTED_INTERRUPT_DESCRIPTOR, vendor.pi_descriptor, (1 << 64) - 1)
    bit = _PIN_BASED_POSTED_INTERRUPT
    write_field(ops, vcpu, vp_fields.PIN_BASED_CONTROLS, bit, bit)


def _configure_notify_and_bus_lock(ops: "TdxOps", vcpu: "Vcpu") -> None:
    vm = ops.vm
    if vm.notify_vmexit & 1:
        write_field(ops, vcpu, vp_fields.INSTRUCTION_TIMEOUT, vm.notify_vmexit >> 32, 0xFFFF_FFFF)
        write_field(ops, vcpu, vp_fields.SECONDARY_CONTROLS, _SECONDARY_NOTIFY, _SECONDARY_NOTIFY)
    if vm.bus_lock_exit:
        write_field(ops, vcpu, vp_fields.SECONDARY_CONTROLS, _SECONDARY_BUS_LOCK, _SECONDARY_BUS_LOCK)


def write_field(ops: "TdxOps", vcpu: "Vcpu", field: int, value: int, mask: int) -> bool:
    """TDH.VP.WR; a refusal bugs the VM. Tell whether it worked."""
    vendor = vcpu.vendor
    with ops.on_lp(vendor.associated_lp) as lp:
        status = ops.host.seamcalls.vp_wr(lp, vendor.tdvpr, field, value, mask)
    if status != SUCCESS:
        ops.vm.bug()
        return False
    vendor.associated_lp = lp
    return True
