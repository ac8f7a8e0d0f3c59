"""Interrupts and NMIs of a TD's vCPU: posted, never injected, because KVM cannot write the vCPU's APIC page."""

from typing import TYPE_CHECKING, Final

from sim_backend.kvm.tdx import vp_fields
from sim_backend.kvm.tdx.init_vcpu import POSTED_INTERRUPT_VECTOR, write_field
from sim_backend.kvm.tdx.seamcalls import SUCCESS

if TYPE_CHECKING:
    from sim_backend.kvm.tdx.ops import TdxOps
    from sim_backend.kvm.vcpu import Vcpu

EXIT_REASON_HLT: Final = 12
_PIR_WORDS: Final = 4
_CONTROL_WORD: Final = 4  # u64 index of ON, SN, NV and NDST in the descriptor
PI_CONTROL_BYTES: Final = 8 * _CONTROL_WORD
PI_ON: Final = 1
_RVI_PENDING: Final = 1  # VCPU_STATE_DETAILS bit 0: a virtual interrupt is deliverable


def deliver_interrupt(ops: "TdxOps", vcpu: "Vcpu", vector: int) -> None:
    """Set `vector` in the posted-interrupt requests and notify the vCPU (any thread)."""
    vendor, memory = vcpu.vendor, ops.host.memory
    vendor.interrupt_since_halt = True
    base = vendor.pi_descriptor >> 3
    q = memory.q
    with memory.locked_instruction:
        q[base + (vector >> 6)] |= 1 << (vector & 63)
        if q[base + _CONTROL_WORD] & PI_ON:
            return
        q[base + _CONTROL_WORD] |= PI_ON
    if vcpu.in_guest:
        ops.host.seam.interrupt(vcpu.lp, POSTED_INTERRUPT_VECTOR)
    else:
        vcpu.kick()


def posted_interrupt_pending(ops: "TdxOps", vcpu: "Vcpu") -> bool:
    """Tell whether a posted interrupt waits for the processor to pick it up."""
    base = vcpu.vendor.pi_descriptor >> 3
    q = ops.host.memory.q
    return bool(q[base + _CONTROL_WORD] & PI_ON) or any(q[base : base + _PIR_WORDS])


def has_events(ops: "TdxOps", vcpu: "Vcpu") -> bool:
    """Tell whether a halted vCPU should wake (`tdx_protected_apic_has_interrupt()` and the NMI)."""
    if vcpu.nmi_queued or vcpu.nmi_pending or vcpu.pv_unhalted:
        return True
    vendor = vcpu.vendor
    if vendor.halt_interrupts_blocked and vendor.last_exit == EXIT_REASON_HLT and not ops.host.is_v17:
        return False
    if vcpu.pending_external_vector >= 0 and vcpu.apic is not None and vcpu.apic.accepts_extint():
        return True
    if posted_interrupt_pending(ops, vcpu):
        return True
    if ops.host.is_v17:
        woken, vendor.interrupt_since_halt = vendor.interrupt_since_halt, False
        return woken and not vendor.halt_interrupts_blocked
    if vendor.last_exit != EXIT_REASON_HLT or not vendor.initialized:
        return False
    with ops.on_lp(vendor.associated_lp) as lp:
        status, details = ops.host.seamcalls.vp_rd(lp, vendor.tdvpr, vp_fields.VCPU_STATE_DETAILS)
        vendor.associated_lp = lp
    return status == SUCCESS and bool(details & _RVI_PENDING)


def inject_nmi(ops: "TdxOps", vcpu: "Vcpu") -> None:
    """Ask the module to inject an NMI; more than one collapse into it."""
    vcpu.nmi_pending = 0
    write_field(ops, vcpu, vp_fields.PEND_NMI, 1, 1)
