"""Event ioctls of a vCPU: LAPIC, KVM_INTERRUPT, NMI, SMI, VCPU_EVENTS, MP_STATE."""

import errno
import struct
from typing import TYPE_CHECKING, Final

from sim_backend.kvm.errors import Errno
from sim_backend.kvm.vcpu import MpState

if TYPE_CHECKING:
    from sim_backend.kvm.vcpu import Vcpu

EVENTS: Final = struct.Struct("<4BI 4B 4B II 4B B26x BQ")
"""struct kvm_vcpu_events: exception, interrupt, nmi, sipi_vector, flags, smi, triple fault, payload."""
VALID_NMI_PENDING: Final = 1
VALID_SIPI_VECTOR: Final = 2
VALID_SHADOW: Final = 4
VALID_SMM: Final = 8
VALID_PAYLOAD: Final = 16
VALID_TRIPLE_FAULT: Final = 32
_ALL_FLAGS: Final = 63
_CONTRIBUTORY_LIMIT: Final = 31
_VECTORS: Final = 256
_MP_STATES: Final = frozenset(int(state) for state in MpState)


class VcpuEventIoctls:
    """The event ioctls of one vCPU (vcpu->mutex held)."""

    def __init__(self, vcpu: "Vcpu") -> None:
        self._vcpu: Final = vcpu
        self._vm: Final = vcpu.vm
        self._mm: Final = vcpu.vm.mm

    def get_lapic(self, argp: int) -> int:
        """KVM_GET_LAPIC: EINVAL without one, and where the page is protected."""
        apic = self._vcpu.apic
        if apic is None or self._vm.ops.has_protected_state:
            raise Errno(errno.EINVAL)
        self._mm.write(argp, apic.page())
        return 0

    def set_lapic(self, argp: int) -> int:
        """KVM_SET_LAPIC."""
        apic = self._vcpu.apic
        if apic is None:
            raise Errno(errno.EINVAL)
        page = self._mm.read(argp, 1024)
        if self._vm.ops.has_protected_state or not apic.set_page(page):
            raise Errno(errno.EINVAL)
        return 0

    def interrupt(self, argp: int) -> int:
        """KVM_INTERRUPT: an external vector from user space's controller."""
        (vector,) = struct.unpack("<I", self._mm.read(argp, 4))
        vcpu, irqchip = self._vcpu, self._vm.irqchip
        if vector >= _VECTORS:
            raise Errno(errno.EINVAL)
        if irqchip is None:
            vcpu.interrupt, vcpu.interrupt_soft = vector, False
            return 0
        if not irqchip.split:
            raise Errno(errno.ENXIO)
        if vcpu.pending_external_vector >= 0:
            raise Errno(errno.EEXIST)
        vcpu.pending_external_vector = vector
        return 0

    def nmi(self, _arg: int) -> int:
        """KVM_NMI."""
        self._vcpu.queue_nmi()
        return 0

    def smi(self, _arg: int) -> int:
        """KVM_SMI: ENOTTY where there is no SMM."""
        if not self._vcpu.queue_smi():
            raise Errno(errno.ENOTTY)
        return 0

    def get_vcpu_events(self, argp: int) -> int:
        """KVM_GET_VCPU_EVENTS."""
        self._mm.write(argp, pack_events(self._vcpu))
        return 0

    def set_vcpu_events(self, argp: int) -> int:
        """KVM_SET_VCPU_EVENTS."""
        unpack_events(self._vcpu, self._mm.read(argp, 64))
        return 0

    def get_mp_state(self, argp: int) -> int:
        """KVM_GET_MP_STATE."""
        vcpu = self._vcpu
        vcpu.accept_apic_events()
        kicked = vcpu.pv_unhalted and vcpu.mp_state in (MpState.HALTED, MpState.AP_RESET_HOLD)
        self._mm.write(argp, struct.pack("<I", MpState.RUNNABLE if kicked else vcpu.mp_state))
        return 0

    def set_mp_state(self, argp: int) -> int:
        """KVM_SET_MP_STATE."""
        (state,) = struct.unpack("<I", self._mm.read(argp, 4))
        vcpu = self._vcpu
        if state not in _MP_STATES:
            raise Errno(errno.EINVAL)
        if vcpu.apic is None and state != MpState.RUNNABLE:
            raise Errno(errno.EINVAL)
        if (vcpu.smi_pending or vcpu.in_smm) and state in (MpState.INIT_RECEIVED, MpState.SIPI_RECEIVED):
            raise Errno(errno.EINVAL)
        if state == MpState.SIPI_RECEIVED:
            vcpu.set_mp_state(MpState.INIT_RECEIVED)
            if vcpu.apic is not None:
                vcpu.apic.sipi_pending = True
        else:
            vcpu.set_mp_state(state)
        return 0

    def set_vapic_addr(self, argp: int) -> int:
        """KVM_SET_VAPIC_ADDR: without effect on a local APIC that needs no TPR page."""
        if self._vcpu.apic is None:
            raise Errno(errno.EINVAL)
        (address,) = struct.unpack("<Q", self._mm.read(argp, 8))
        if address and self._vm.find_memslot(address >> 12) is None:
            raise Errno(errno.EINVAL)
        return 0

    def tpr_access_reporting(self, argp: int) -> int:
        """KVM_TPR_ACCESS_REPORTING."""
        data = bytearray(self._mm.read(argp, 40))
        enabled, flags = struct.unpack_from("<II", data)
        if flags:
            raise Errno(errno.EINVAL)
        self._vcpu.tpr_access_reporting = bool(enabled)
        self._mm.write(argp, data)
        return 0

    def set_signal_mask(self, argp: int) -> int:
        """KVM_SET_SIGNAL_MASK: the signals that KVM_RUN blocks, in place of the thread's."""
        if not argp:
            self._vcpu.signal_mask = None
            return 0
        (length,) = struct.unpack("<I", self._mm.read(argp, 4))
        if length != 8:
            raise Errno(errno.EINVAL)
        (self._vcpu.signal_mask,) = struct.unpack("<Q", self._mm.read(argp + 4, 8))
        return 0


def pack_events(vcpu: "Vcpu") -> bytes:
    """Return ``struct kvm_vcpu_events`` (kvm_vcpu_ioctl_x86_get_vcpu_events)."""
    vm = vcpu.vm
    vcpu.process_nmi()
    exception = vcpu.exception
    soft = exception.vector in (3, 4)
    pending = exception.pending and not soft
    # Without payloads, what is pending counts as injected too.
    injected = not soft and (exception.injected or (pending and not vm.exception_payload))
    flags = VALID_NMI_PENDING | VALID_SHADOW | VALID_SMM
    if vm.exception_payload:
        flags |= VALID_PAYLOAD
    if vm.triple_fault_event:
        flags |= VALID_TRIPLE_FAULT
    hard_interrupt = vcpu.interrupt >= 0 and not vcpu.interrupt_soft
    return EVENTS.pack(
        int(injected),
        exception.vector,
        int(exception.has_error_code),
        int(pending),
        exception.error_code,
        int(hard_interrupt),
        vcpu.interrupt if vcpu.interrupt >= 0 else vcpu.interrupt_nr,
        0,
        vcpu.interrupt_shadow,
        int(vcpu.nmi_injected),
        vcpu.nmi_pending,
        int(vcpu.nmi_masked),
        0,
        0,
        flags,
        int(vcpu.in_smm),
        int(vcpu.smi_pending),
        0,
        int(vcpu.apic is not None and vcpu.apic.init_pending),
        int(vm.triple_fault_event and vcpu.triple_fault_pending),
        int(exception.has_payload),
        exception.payload,
    )


def unpack_events(vcpu: "Vcpu", data: bytes) -> None:
    """Take ``struct kvm_vcpu_events``; EINVAL as kvm_vcpu_ioctl_x86_set_vcpu_events()."""
    vm = vcpu.vm
    (
        exc_injected,
        exc_nr,
        exc_has_error,
        exc_pending,
        exc_error,
        int_injected,
        int_nr,
        int_soft,
        int_shadow,
        nmi_injected,
        nmi_pending,
        nmi_masked,
        _pad,
        sipi_vector,
        flags,
        smm,
        smi_pending,
        _inside_nmi,
        latched_init,
        triple_fault,
        has_payload,
        payload,
    ) = EVENTS.unpack(data)
    if flags & ~_ALL_FLAGS:
        raise Errno(errno.EINVAL)
    if flags & VALID_PAYLOAD:
        if not vm.exception_payload:
            raise Errno(errno.EINVAL)
        if exc_pending:
            exc_injected = 0
        else:
            has_payload = 0
    else:
        exc_pending = has_payload = 0
    if (exc_injected or exc_pending) and (exc_nr > _CONTRIBUTORY_LIMIT or exc_nr == 2):
        raise Errno(errno.EINVAL)
    if flags & VALID_SMM and (smm or smi_pending) and not vm.host.profile.behaves("smm"):
        raise Errno(errno.EINVAL)
    if flags & VALID_SMM and (smm or smi_pending) and vcpu.mp_state == MpState.INIT_RECEIVED:
        raise Errno(errno.EINVAL)
    if flags & VALID_TRIPLE_FAULT and not vm.triple_fault_event:
        raise Errno(errno.EINVAL)

    # ---- Every check passed: from here on the call cannot fail. ----

    vcpu.process_nmi()
    exception = vcpu.exception
    exception.vector, exception.pending, exception.injected = exc_nr, bool(exc_pending), bool(exc_injected)
    exception.has_error_code, exception.error_code = bool(exc_has_error), exc_error
    exception.has_payload, exception.payload = bool(has_payload), payload
    vcpu.interrupt, vcpu.interrupt_nr = int_nr if int_injected else -1, int_nr
    vcpu.interrupt_soft = bool(int_soft)
    if flags & VALID_SHADOW:
        one = vm.host.profile.behaves("one_interrupt_shadow")
        vcpu.interrupt_shadow = (3 if int_shadow else 0) if one else int_shadow
        vcpu.shadow_over = not int_shadow
    vcpu.nmi_injected = bool(nmi_injected)
    if flags & VALID_NMI_PENDING:
        vcpu.nmi_pending, vcpu.nmi_queued = 0, nmi_pending
    vcpu.nmi_masked = bool(nmi_masked)
    if flags & VALID_SIPI_VECTOR and vcpu.apic is not None:
        vcpu.apic.sipi_vector = sipi_vector & 0xFF
    if flags & VALID_SMM:
        vcpu.in_smm = bool(smm)
        vcpu.smi_pending = bool(smi_pending)
        if vcpu.apic is not None:
            vcpu.apic.init_pending = bool(latched_init)
    if flags & VALID_TRIPLE_FAULT:
        vcpu.triple_fault_pending = bool(triple_fault)
