"""Register ioctls of a vCPU whose state is not protected (`arch/x86/kvm/regs.c`, formerly in x86.c)."""

import errno
import struct
from typing import TYPE_CHECKING, Final

from sim_backend.cpu.engine import Cpu, CpuState, Segment
from sim_backend.kvm.cpuid import cr4_reserved_bits
from sim_backend.kvm.errors import Errno
from sim_backend.kvm.guest_paging import read_pdptrs, translate
from sim_backend.kvm.xsave import XsaveArea

if TYPE_CHECKING:
    from sim_backend.kvm.profile import HostProfile
    from sim_backend.kvm.vcpu import Vcpu

REGS: Final = struct.Struct("<18Q")  # struct kvm_regs
_SEGMENT: Final = struct.Struct("<QIH9Bx")  # struct kvm_segment: base limit selector type … unusable padding
_DTABLE: Final = struct.Struct("<QH6x")
_CONTROL: Final = struct.Struct("<7Q")  # cr0 cr2 cr3 cr4 cr8 efer apic_base
_BITMAP: Final = struct.Struct("<4Q")
SREGS_BYTES: Final = 312
SREGS2_BYTES: Final = 320
_DEBUGREGS: Final = struct.Struct("<7Q72x")  # db[4] dr6 dr7 flags
_GUEST_DEBUG: Final = struct.Struct("<II8Q")
_TRANSLATION: Final = struct.Struct("<QQBBB5x")

# kvm_regs order against the architectural order of `Gprs`.
_KVM_ORDER: Final = (0, 3, 1, 2, 6, 7, 4, 5, 8, 9, 10, 11, 12, 13, 14, 15)
_SEGMENTS: Final = ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldtr")  # order in struct kvm_sregs

DR7_BREAKPOINTS: Final = 0x20FF  # L0 to G3, and GD, which traps the next access to a debug register
CR0_PE: Final = 1
CR0_NE: Final = 1 << 5
CR0_WP: Final = 1 << 16
CR0_NW: Final = 1 << 29
CR0_CD: Final = 1 << 30
CR0_PG: Final = 1 << 31
CR0_ET: Final = 1 << 4
_CR0_RESERVED: Final = ~(0x8005_003F | CR0_NW | CR0_CD)
CR4_PAE: Final = 1 << 5
EFER_LME: Final = 1 << 8
EFER_LMA: Final = 1 << 10
_SREGS2_PDPTRS_VALID: Final = 1
GUESTDBG_ENABLE: Final = 1
GUESTDBG_SINGLESTEP: Final = 2
GUESTDBG_INJECT_DB: Final = 1 << 18
GUESTDBG_INJECT_BP: Final = 1 << 19
RFLAGS_TF: Final = 1 << 8
_AR_PRESENT: Final = 1 << 7
_AR_DB: Final = 1 << 14
_AR_G: Final = 1 << 15
_AR_UNUSABLE: Final = 1 << 16
_TYPE_ACCESSED: Final = 1
_TYPE_BUSY: Final = 2
_DATA_SEGMENTS: Final = frozenset({"ds", "es", "fs", "gs"})
_U64: Final = (1 << 64) - 1


def shown_segment(profile: "HostProfile", name: str, segment: Segment) -> Segment:
    """Return a segment register, in VMX form, as the vendor module gives it to user space.

    Source: ``vmx_get_segment()``, ``svm_get_segment()``; kvm_pvm keeps what it was given.
    """
    ar = segment.ar
    if profile.behaves("interprets_guest_code"):
        return segment
    unusable = bool(ar & _AR_UNUSABLE)
    if unusable:
        ar &= ~_AR_PRESENT
    if profile.behaves("segments_of_vmcb"):
        ar = ar & ~_AR_G | (_AR_G if segment.limit > 0xF_FFFF else 0)
        if name == "tr":
            ar |= _TYPE_BUSY
        elif name in _DATA_SEGMENTS and not unusable:
            ar |= _TYPE_ACCESSED
        elif name == "ss" and unusable:
            ar &= ~_AR_DB
    return Segment(segment.selector, segment.base, segment.limit, ar)


def pack_segment(segment: Segment) -> bytes:
    """Return ``struct kvm_segment`` for a segment register in VMX form."""
    ar = segment.ar
    unusable = ar >> 16 & 1
    return _SEGMENT.pack(
        segment.base & _U64,
        segment.limit & 0xFFFF_FFFF,
        segment.selector,
        ar & 0xF,
        ar >> 7 & 1,
        ar >> 5 & 3,
        ar >> 14 & 1,
        ar >> 4 & 1,
        ar >> 13 & 1,
        ar >> 15 & 1,
        ar >> 12 & 1,
        unusable,
    )


def unpack_segment(data: bytes, offset: int, *, absent_is_unusable: bool = True) -> Segment:
    """Return a segment register in VMX form from ``struct kvm_segment``."""
    fields = _SEGMENT.unpack_from(data, offset)
    base, limit, selector, kind, present, dpl, db, s, long_mode, granularity, avl, unusable = fields
    ar = (
        kind & 0xF
        | (s & 1) << 4
        | (dpl & 3) << 5
        | (present & 1) << 7
        | (avl & 1) << 12
        | (long_mode & 1) << 13
        | (db & 1) << 14
        | (granularity & 1) << 15
    )
    if unusable or (absent_is_unusable and not present):
        ar |= _AR_UNUSABLE
    return Segment(selector=selector, base=base, limit=limit, ar=ar)


class RegisterIoctls:
    """The register ioctls of one vCPU (vcpu->mutex held)."""

    def __init__(self, vcpu: "Vcpu") -> None:
        self._vcpu: Final = vcpu
        self._mm: Final = vcpu.vm.mm
        self._xsave: Final = XsaveArea(vcpu)

    def _cpu(self) -> Cpu:
        """Return the vCPU's context; EINVAL where its state is protected."""
        cpu = self._vcpu.cpu
        if cpu is None:
            raise Errno(errno.EINVAL)
        return cpu

    def _state(self) -> CpuState:
        self._cpu()
        return self._vcpu.read_state()

    # ---- KVM_GET_REGS, KVM_SET_REGS ---------------------------------------------------------------------

    def get_regs(self, argp: int) -> int:
        """KVM_GET_REGS."""
        self._cpu()
        self._mm.write(argp, self._vcpu.pack_regs())
        return 0

    def set_regs(self, argp: int) -> int:
        """KVM_SET_REGS."""
        data = self._mm.read(argp, REGS.size)
        self._cpu()
        self._vcpu.unpack_regs(data)
        return 0

    # ---- KVM_GET_SREGS(2), KVM_SET_SREGS(2) -------------------------------------------------------------

    def get_sregs(self, argp: int) -> int:
        """KVM_GET_SREGS."""
        self._cpu()
        self._mm.write(argp, self._vcpu.pack_sregs())
        return 0

    def set_sregs(self, argp: int) -> int:
        """KVM_SET_SREGS."""
        data = self._mm.read(argp, SREGS_BYTES)
        self._cpu()
        self._vcpu.unpack_sregs(data)
        return 0

    def get_sregs2(self, argp: int) -> int:
        """KVM_GET_SREGS2."""
        state = self._vcpu.read_state()
        vcpu = self._vcpu
        pdptrs, flags = [0, 0, 0, 0], 0
        if is_pae_paging(state):
            flags = _SREGS2_PDPTRS_VALID
            pdptrs = vcpu.set_pdptrs if vcpu.set_pdptrs is not None else read_pdptrs(vcpu, state.cr3)
        head = pack_sregs_head(vcpu, state)
        self._mm.write(argp, head + struct.pack("<5Q", flags, *pdptrs))
        return 0

    def set_sregs2(self, argp: int) -> int:
        """KVM_SET_SREGS2."""
        self._cpu()
        data = self._mm.read(argp, SREGS2_BYTES)
        flags, *pdptrs = struct.unpack_from("<5Q", data, 280)
        valid = flags & _SREGS2_PDPTRS_VALID
        if flags & ~_SREGS2_PDPTRS_VALID:
            raise Errno(errno.EINVAL)
        cr0, _cr2, _cr3, cr4, _cr8, efer, _apic_base = _CONTROL.unpack_from(data, 224)
        if valid and not (cr0 & CR0_PG and cr4 & CR4_PAE and not efer & EFER_LMA):
            raise Errno(errno.EINVAL)
        state = set_sregs_head(self._vcpu, data)
        self._vcpu.write_state(state)
        self._vcpu.set_pdptrs = pdptrs if valid else None
        return 0

    # ---- FPU, XSAVE, XCRs -------------------------------------------------------------------------------

    def get_fpu(self, argp: int) -> int:
        """KVM_GET_FPU."""
        self._cpu()
        self._mm.write(argp, self._xsave.fpu())
        return 0

    def set_fpu(self, argp: int) -> int:
        """KVM_SET_FPU."""
        data = self._mm.read(argp, 416)
        self._cpu()
        self._xsave.set_fpu(data)
        return 0

    def get_xsave(self, argp: int) -> int:
        """KVM_GET_XSAVE and KVM_GET_XSAVE2."""
        self._cpu()
        self._mm.write(argp, self._xsave.area())
        return 0

    def set_xsave(self, argp: int) -> int:
        """KVM_SET_XSAVE."""
        data = self._mm.read(argp, 4096)
        self._cpu()
        self._xsave.set_area(data)
        return 0

    def get_xcrs(self, argp: int) -> int:
        """KVM_GET_XCRS."""
        state = self._state()
        self._mm.write(argp, struct.pack("<IIIIQ", 1, 0, 0, 0, state.xcr0) + bytes(392 - 24))
        return 0

    def set_xcrs(self, argp: int) -> int:
        """KVM_SET_XCRS: only XCR0 means anything."""
        data = self._mm.read(argp, 392)
        self._cpu()
        nr_xcrs, flags = struct.unpack_from("<II", data)
        if nr_xcrs > 16 or flags:
            raise Errno(errno.EINVAL)
        for index in range(nr_xcrs):
            xcr, _reserved, value = struct.unpack_from("<IIQ", data, 8 + 16 * index)
            if xcr == 0:
                if not self._xsave.xcr0_is_valid(value):
                    raise Errno(errno.EINVAL)
                state = self._vcpu.read_state()
                state.xcr0 = value
                self._vcpu.write_state(state)
                break
        return 0

    # ---- debugging --------------------------------------------------------------------------------------

    def get_debugregs(self, argp: int) -> int:
        """KVM_GET_DEBUGREGS."""
        dr = self._state().dr
        self._mm.write(argp, _DEBUGREGS.pack(*dr[:4], dr[4], dr[5], 0))
        return 0

    def set_debugregs(self, argp: int) -> int:
        """KVM_SET_DEBUGREGS."""
        data = self._mm.read(argp, 128)
        self._cpu()
        *db, dr6, dr7, flags = _DEBUGREGS.unpack(data)
        if flags or dr6 >> 32 or dr7 >> 32:
            raise Errno(errno.EINVAL)
        state = self._vcpu.read_state()
        state.dr[:] = [*db, dr6, dr7]
        self._vcpu.write_state(state)
        self._vcpu.guest_breakpoints = bool(dr7 & DR7_BREAKPOINTS)
        return 0

    def set_guest_debug(self, argp: int) -> int:
        """KVM_SET_GUEST_DEBUG."""
        data = self._mm.read(argp, 72)
        self._cpu()
        control, _pad, *debugreg = _GUEST_DEBUG.unpack(data)
        vcpu = self._vcpu
        if control & (GUESTDBG_INJECT_DB | GUESTDBG_INJECT_BP):
            if vcpu.exception_queued():
                raise Errno(errno.EBUSY)
            vcpu.queue_exception(1 if control & GUESTDBG_INJECT_DB else 3)
        if not control & GUESTDBG_ENABLE:
            control = 0
        vcpu.guest_debug = control
        vcpu.guest_debug_registers = list(debugreg)
        vcpu.single_step = bool(control & GUESTDBG_SINGLESTEP)
        vcpu.vm.ops.vcpu_update_exception_bitmap(vcpu)
        return 0

    def translate(self, argp: int) -> int:
        """KVM_TRANSLATE: walk the guest's page tables; a protected guest's look off."""
        linear, *_ = _TRANSLATION.unpack(self._mm.read(argp, 24))
        physical = translate(self._vcpu, linear)
        valid = physical is not None and physical != _U64
        answer = _TRANSLATION.pack(linear, physical if physical is not None else _U64, valid, 1, 0)
        self._mm.write(argp, answer)
        return 0


def is_pae_paging(state: CpuState) -> bool:
    """Tell whether the PDPTRs are in use: PAE paging outside long mode."""
    return bool(state.cr0 & CR0_PG and state.cr4 & CR4_PAE and not state.efer & EFER_LMA)


def pack_sregs_head(vcpu: "Vcpu", state: CpuState) -> bytes:
    """Return the 280 bytes that ``struct kvm_sregs`` and ``kvm_sregs2`` begin with."""
    profile = vcpu.vm.host.profile
    parts = [pack_segment(shown_segment(profile, name, getattr(state, name))) for name in _SEGMENTS]
    parts.append(_DTABLE.pack(state.gdtr_base, state.gdtr_limit))
    parts.append(_DTABLE.pack(state.idtr_base, state.idtr_limit))
    parts.append(_CONTROL.pack(state.cr0, state.cr2, state.cr3, state.cr4, vcpu.get_cr8(), state.efer, vcpu.apic_base))
    return b"".join(parts)


def set_sregs_head(vcpu: "Vcpu", data: bytes) -> CpuState:
    """Check and take those 280 bytes; return the state to install. Raise EINVAL as __set_sregs_common() does."""
    state = vcpu.read_state()
    interpreted = vcpu.vm.host.profile.behaves("interprets_guest_code")
    segments = {
        name: unpack_segment(data, index * 24, absent_is_unusable=not interpreted)
        for index, name in enumerate(_SEGMENTS)
    }
    gdt_base, gdt_limit = _DTABLE.unpack_from(data, 192)
    idt_base, idt_limit = _DTABLE.unpack_from(data, 208)
    cr0, cr2, cr3, cr4, cr8, efer, apic_base = _CONTROL.unpack_from(data, 224)
    if not sregs_are_valid(vcpu, cr0, cr3, cr4, efer, segments["cs"]):
        raise Errno(errno.EINVAL)
    vcpu.set_apic_base_from_sregs(apic_base)
    state.gdtr_base, state.gdtr_limit = gdt_base, gdt_limit
    state.idtr_base, state.idtr_limit = idt_base, idt_limit
    state.cr2, state.cr3 = cr2, cr3
    if interpreted and not efer & EFER_LMA:
        cr0 &= ~CR0_PG  # kvm_pvm has no paging outside long mode
    state.cr0, state.cr4, state.efer = cr0, cr4, efer
    vcpu.set_cr8(cr8)
    for name, segment in segments.items():
        setattr(state, name, segment)
    return state


def sregs_are_valid(vcpu: "Vcpu", cr0: int, cr3: int, cr4: int, efer: int, cs: Segment) -> bool:
    """Check control registers as kvm_is_valid_sregs() does."""
    if efer & EFER_LME and cr0 & CR0_PG:
        if not cr4 & CR4_PAE or not efer & EFER_LMA:
            return False
        if cr3 & ~((1 << vcpu.cpuid.maxphyaddr) - 1) & ~(1 << 63):
            return False
    elif efer & EFER_LMA or cs.ar >> 13 & 1:
        return False
    if cr4 & cr4_reserved_bits(vcpu.cpuid) & ~vcpu.vm.host.profile.cr4_always:
        return False
    if cr0 >> 32 or (cr0 & CR0_NW and not cr0 & CR0_CD) or (cr0 & CR0_PG and not cr0 & CR0_PE):
        return False
    profile = vcpu.vm.host.profile
    return not profile.behaves("sregs_checks_efer") or (
        profile.efer_is_valid(efer) and not efer & vcpu.cpuid.efer_unsupported()
    )
