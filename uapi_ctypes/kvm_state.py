"""Structures of a vCPU's state: registers, CPUID, MSRs, events. Source: x86 `include/uapi/asm/kvm.h`."""

import ctypes
from ctypes import c_uint8, c_uint16, c_uint32, c_uint64
from typing import Final

from uapi_ctypes.flexible import Flexible

KVM_CPUID_FLAG_SIGNIFCANT_INDEX: Final = 1
"""``kvm_cpuid_entry2.flags``, in the kernel's spelling: `index` matters. TDX_CAPABILITIES never sets it."""
KVM_SREGS2_FLAGS_PDPTRS_VALID: Final = 1
KVM_SYNC_X86_REGS: Final = 1
KVM_SYNC_X86_SREGS: Final = 2
KVM_SYNC_X86_EVENTS: Final = 4
KVM_GUESTDBG_ENABLE: Final = 1
KVM_GUESTDBG_SINGLESTEP: Final = 2
KVM_GUESTDBG_USE_SW_BP: Final = 1 << 16
KVM_GUESTDBG_USE_HW_BP: Final = 1 << 17
KVM_VCPUEVENT_VALID_NMI_PENDING: Final = 1
KVM_VCPUEVENT_VALID_SIPI_VECTOR: Final = 2
KVM_VCPUEVENT_VALID_SHADOW: Final = 4
KVM_VCPUEVENT_VALID_SMM: Final = 8
KVM_VCPUEVENT_VALID_PAYLOAD: Final = 16
KVM_VCPUEVENT_VALID_TRIPLE_FAULT: Final = 32


class KvmRegs(ctypes.Structure):
    """``struct kvm_regs``."""

    _fields_ = tuple(
        (name, c_uint64)
        for name in (
            "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp", "r8", "r9", "r10", "r11", "r12", "r13",
            "r14", "r15", "rip", "rflags",
        )
    )  # fmt: skip


class KvmSegment(ctypes.Structure):
    """``struct kvm_segment``."""

    _fields_ = (
        ("base", c_uint64),
        ("limit", c_uint32),  # [bytes], in bytes also when g is set
        ("selector", c_uint16),
        ("type", c_uint8),
        ("present", c_uint8),
        ("dpl", c_uint8),
        ("db", c_uint8),
        ("s", c_uint8),
        ("l", c_uint8),
        ("g", c_uint8),
        ("avl", c_uint8),
        ("unusable", c_uint8),
        ("padding", c_uint8),
    )


class KvmDtable(ctypes.Structure):
    """``struct kvm_dtable``."""

    _fields_ = (("base", c_uint64), ("limit", c_uint16), ("padding", c_uint16 * 3))


_SEGMENTS: Final = tuple((name, KvmSegment) for name in ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt"))
_TABLES: Final = (("gdt", KvmDtable), ("idt", KvmDtable))
_CONTROL: Final = tuple((name, c_uint64) for name in ("cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base"))


class KvmSregs(ctypes.Structure):
    """``struct kvm_sregs``."""

    _fields_ = (*_SEGMENTS, *_TABLES, *_CONTROL, ("interrupt_bitmap", c_uint64 * 4))


class KvmSregs2(ctypes.Structure):
    """``struct kvm_sregs2``."""

    _fields_ = (*_SEGMENTS, *_TABLES, *_CONTROL, ("flags", c_uint64), ("pdptrs", c_uint64 * 4))


class KvmFpu(ctypes.Structure):
    """``struct kvm_fpu``."""

    _fields_ = (
        ("fpr", (c_uint8 * 16) * 8),
        ("fcw", c_uint16),
        ("fsw", c_uint16),
        ("ftwx", c_uint8),
        ("pad1", c_uint8),
        ("last_opcode", c_uint16),
        ("last_ip", c_uint64),
        ("last_dp", c_uint64),
        ("xmm", (c_uint8 * 16) * 16),
        ("mxcsr", c_uint32),
        ("pad2", c_uint32),
    )


class KvmLapicState(ctypes.Structure):
    """``struct kvm_lapic_state``; registers at their xAPIC offsets."""

    _fields_ = (("regs", c_uint8 * 1024),)


class KvmXsave(ctypes.Structure):
    """``struct kvm_xsave``; KVM_GET_XSAVE2 may need more room, see KVM_CAP_XSAVE2."""

    _fields_ = (("region", c_uint32 * 1024),)


class KvmXcr(ctypes.Structure):
    """``struct kvm_xcr``."""

    _fields_ = (("xcr", c_uint32), ("reserved", c_uint32), ("value", c_uint64))


class KvmXcrs(ctypes.Structure):
    """``struct kvm_xcrs``."""

    _fields_ = (("nr_xcrs", c_uint32), ("flags", c_uint32), ("xcrs", KvmXcr * 16), ("padding", c_uint64 * 16))


class KvmDebugregs(ctypes.Structure):
    """``struct kvm_debugregs``."""

    _fields_ = (
        ("db", c_uint64 * 4),
        ("dr6", c_uint64),
        ("dr7", c_uint64),
        ("flags", c_uint64),
        ("reserved", c_uint64 * 9),
    )


class KvmMpState(ctypes.Structure):
    """``struct kvm_mp_state``."""

    _fields_ = (("mp_state", c_uint32),)  # KvmMpStateValue


class KvmVcpuEventsException(ctypes.Structure):
    """``kvm_vcpu_events.exception``."""

    _fields_ = (
        ("injected", c_uint8),
        ("nr", c_uint8),
        ("has_error_code", c_uint8),
        ("pending", c_uint8),
        ("error_code", c_uint32),
    )


class KvmVcpuEventsInterrupt(ctypes.Structure):
    """``kvm_vcpu_events.interrupt``."""

    _fields_ = (("injected", c_uint8), ("nr", c_uint8), ("soft", c_uint8), ("shadow", c_uint8))


class KvmVcpuEventsNmi(ctypes.Structure):
    """``kvm_vcpu_events.nmi``."""

    _fields_ = (("injected", c_uint8), ("pending", c_uint8), ("masked", c_uint8), ("pad", c_uint8))


class KvmVcpuEventsSmi(ctypes.Structure):
    """``kvm_vcpu_events.smi``."""

    _fields_ = (
        ("smm", c_uint8),
        ("pending", c_uint8),
        ("smm_inside_nmi", c_uint8),
        ("latched_init", c_uint8),
    )


class KvmVcpuEventsTripleFault(ctypes.Structure):
    """``kvm_vcpu_events.triple_fault``."""

    _fields_ = (("pending", c_uint8),)


class KvmVcpuEvents(ctypes.Structure):
    """``struct kvm_vcpu_events``."""

    _fields_ = (
        ("exception", KvmVcpuEventsException),
        ("interrupt", KvmVcpuEventsInterrupt),
        ("nmi", KvmVcpuEventsNmi),
        ("sipi_vector", c_uint32),
        ("flags", c_uint32),  # KVM_VCPUEVENT_VALID_*
        ("smi", KvmVcpuEventsSmi),
        ("triple_fault", KvmVcpuEventsTripleFault),
        ("reserved", c_uint8 * 26),
        ("exception_has_payload", c_uint8),
        ("exception_payload", c_uint64),
    )


class KvmInterrupt(ctypes.Structure):
    """``struct kvm_interrupt``."""

    _fields_ = (("irq", c_uint32),)


class KvmTranslation(ctypes.Structure):
    """``struct kvm_translation``."""

    _fields_ = (
        ("linear_address", c_uint64),
        ("physical_address", c_uint64),  # out: GPA [bytes]
        ("valid", c_uint8),
        ("writeable", c_uint8),
        ("usermode", c_uint8),
        ("pad", c_uint8 * 5),
    )


class KvmTprAccessCtl(ctypes.Structure):
    """``struct kvm_tpr_access_ctl``."""

    _fields_ = (("enabled", c_uint32), ("flags", c_uint32), ("reserved", c_uint32 * 8))


class KvmVapicAddr(ctypes.Structure):
    """``struct kvm_vapic_addr``."""

    _fields_ = (("vapic_addr", c_uint64),)


class KvmGuestDebug(ctypes.Structure):
    """``struct kvm_guest_debug``."""

    _fields_ = (("control", c_uint32), ("pad", c_uint32), ("debugreg", c_uint64 * 8))


class KvmX86Mce(ctypes.Structure):
    """``struct kvm_x86_mce``."""

    _fields_ = (
        ("status", c_uint64),
        ("addr", c_uint64),
        ("misc", c_uint64),
        ("mcg_status", c_uint64),
        ("bank", c_uint8),
        ("pad1", c_uint8 * 7),
        ("pad2", c_uint64 * 3),
    )


class KvmOneReg(ctypes.Structure):
    """``struct kvm_one_reg``."""

    _fields_ = (("id", c_uint64), ("addr", c_uint64))  # addr: HVA of the value


class KvmCpuidEntry(ctypes.Structure):
    """``struct kvm_cpuid_entry``."""

    _fields_ = (
        ("function", c_uint32),
        ("eax", c_uint32),
        ("ebx", c_uint32),
        ("ecx", c_uint32),
        ("edx", c_uint32),
        ("padding", c_uint32),
    )


class KvmCpuid(Flexible[KvmCpuidEntry]):
    """``struct kvm_cpuid``."""

    _entry_ = KvmCpuidEntry
    _count_ = "nent"
    _fields_ = (("nent", c_uint32), ("padding", c_uint32))


class KvmCpuidEntry2(ctypes.Structure):
    """``struct kvm_cpuid_entry2``."""

    _fields_ = (
        ("function", c_uint32),
        ("index", c_uint32),
        ("flags", c_uint32),  # KVM_CPUID_FLAG_SIGNIFCANT_INDEX
        ("eax", c_uint32),
        ("ebx", c_uint32),
        ("ecx", c_uint32),
        ("edx", c_uint32),
        ("padding", c_uint32 * 3),
    )


class KvmCpuid2(Flexible[KvmCpuidEntry2]):
    """``struct kvm_cpuid2``."""

    _entry_ = KvmCpuidEntry2
    _count_ = "nent"
    _fields_ = (("nent", c_uint32), ("padding", c_uint32))


class KvmMsrEntry(ctypes.Structure):
    """``struct kvm_msr_entry``."""

    _fields_ = (("index", c_uint32), ("reserved", c_uint32), ("data", c_uint64))


class KvmMsrs(Flexible[KvmMsrEntry]):
    """``struct kvm_msrs``."""

    _entry_ = KvmMsrEntry
    _count_ = "nmsrs"
    _fields_ = (("nmsrs", c_uint32), ("pad", c_uint32))


class KvmMsrList(Flexible[int]):
    """``struct kvm_msr_list``: entries are MSR indices."""

    _entry_ = c_uint32
    _count_ = "nmsrs"
    _fields_ = (("nmsrs", c_uint32),)


class KvmSignalMask(Flexible[int]):
    """``struct kvm_signal_mask``: entries are the bytes of a kernel sigset_t."""

    _entry_ = c_uint8
    _count_ = "len"
    _fields_ = (("len", c_uint32),)


class KvmNestedState(Flexible[int]):
    """``struct kvm_nested_state``: header, then the VMCS or VMCB area as bytes."""

    _entry_ = c_uint8
    _count_ = "size"
    _fields_ = (("flags", c_uint16), ("format", c_uint16), ("size", c_uint32), ("hdr", c_uint8 * 120))
