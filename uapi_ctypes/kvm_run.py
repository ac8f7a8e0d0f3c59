"""``struct kvm_run``, the page shared with KVM_RUN: why the vCPU came back, and what the answer is.

KVM does not clear the union between exits: only the members of the current `exit_reason` mean anything.
Source: `include/uapi/linux/kvm.h`; the v17 form of KVM_EXIT_TDX from the patches of November 2023.
"""

import ctypes
from ctypes import c_char, c_uint8, c_uint16, c_uint32, c_uint64
from enum import IntEnum, IntFlag
from typing import Final

from uapi_ctypes.kvm_state import KvmRegs, KvmSregs, KvmVcpuEvents


class KvmExit(IntEnum):
    """``kvm_run.exit_reason``."""

    KVM_EXIT_UNKNOWN = 0
    KVM_EXIT_EXCEPTION = 1
    KVM_EXIT_IO = 2
    KVM_EXIT_HYPERCALL = 3
    KVM_EXIT_DEBUG = 4
    KVM_EXIT_HLT = 5
    KVM_EXIT_MMIO = 6
    KVM_EXIT_IRQ_WINDOW_OPEN = 7
    KVM_EXIT_SHUTDOWN = 8
    KVM_EXIT_FAIL_ENTRY = 9
    KVM_EXIT_INTR = 10
    KVM_EXIT_SET_TPR = 11
    KVM_EXIT_TPR_ACCESS = 12
    KVM_EXIT_NMI = 16
    KVM_EXIT_INTERNAL_ERROR = 17
    KVM_EXIT_SYSTEM_EVENT = 24
    KVM_EXIT_IOAPIC_EOI = 26
    KVM_EXIT_HYPERV = 27
    KVM_EXIT_X86_RDMSR = 29
    KVM_EXIT_X86_WRMSR = 30
    KVM_EXIT_DIRTY_RING_FULL = 31
    KVM_EXIT_AP_RESET_HOLD = 32
    KVM_EXIT_X86_BUS_LOCK = 33
    KVM_EXIT_XEN = 34
    KVM_EXIT_NOTIFY = 37
    KVM_EXIT_MEMORY_FAULT = 39
    KVM_EXIT_TDX = 40
    KVM_EXIT_SNP_REQ_CERTS = 43

    @classmethod
    def name_of(cls, reason: int) -> str:
        """Return the kernel's name of exit `reason`, or the bare number of one we do not know."""
        try:
            return cls(reason).name
        except ValueError:
            return f"exit reason {reason}"


class KvmRunFlag(IntFlag):
    """``kvm_run.flags``."""

    KVM_RUN_X86_SMM = 1
    KVM_RUN_X86_BUS_LOCK = 2
    KVM_RUN_X86_GUEST_MODE = 4


class KvmSystemEvent(IntEnum):
    """``kvm_run.system_event.type``."""

    KVM_SYSTEM_EVENT_SHUTDOWN = 1
    KVM_SYSTEM_EVENT_RESET = 2
    KVM_SYSTEM_EVENT_CRASH = 3
    KVM_SYSTEM_EVENT_WAKEUP = 4
    KVM_SYSTEM_EVENT_SUSPEND = 5
    KVM_SYSTEM_EVENT_SEV_TERM = 6
    KVM_SYSTEM_EVENT_TDX_FATAL = 7


class KvmInternalError(IntEnum):
    """``kvm_run.internal.suberror``."""

    KVM_INTERNAL_ERROR_EMULATION = 1
    KVM_INTERNAL_ERROR_SIMUL_EX = 2
    KVM_INTERNAL_ERROR_DELIVERY_EV = 3
    KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON = 4


class TdxExitNr(IntEnum):
    """``kvm_run.tdx.nr``, mainline: the TDVMCALL leaf that reached user space."""

    TDVMCALL_GET_TD_VM_CALL_INFO = 0x10000
    TDVMCALL_GET_QUOTE = 0x10002
    TDVMCALL_SETUP_EVENT_NOTIFY_INTERRUPT = 0x10004


KVM_EXIT_IO_IN: Final = 0
KVM_EXIT_IO_OUT: Final = 1
KVM_EXIT_TDX_VMCALL_V17: Final = 1
"""``kvm_run.tdx_v17.type``."""
KVM_MEMORY_EXIT_FLAG_PRIVATE: Final = 1 << 3
KVM_EXIT_HYPERCALL_LONG_MODE: Final = 1
KVM_NOTIFY_CONTEXT_INVALID: Final = 1
KVM_PIO_PAGE_OFFSET: Final = 1
"""Where the data of KVM_EXIT_IO begins [4 KiB pages]."""
KVM_COALESCED_MMIO_PAGE_OFFSET: Final = 2
"""Where the coalesced MMIO ring begins [4 KiB pages]."""


class KvmExitHw(ctypes.Structure):
    """KVM_EXIT_UNKNOWN."""

    _fields_ = (("hardware_exit_reason", c_uint64),)


class KvmExitFailEntry(ctypes.Structure):
    """KVM_EXIT_FAIL_ENTRY."""

    _fields_ = (("hardware_entry_failure_reason", c_uint64), ("cpu", c_uint32))


class KvmExitException(ctypes.Structure):
    """KVM_EXIT_EXCEPTION."""

    _fields_ = (("exception", c_uint32), ("error_code", c_uint32))


class KvmExitIo(ctypes.Structure):
    """KVM_EXIT_IO."""

    _fields_ = (
        ("direction", c_uint8),  # KVM_EXIT_IO_IN, KVM_EXIT_IO_OUT
        ("size", c_uint8),  # 1, 2 or 4 [bytes]
        ("port", c_uint16),
        ("count", c_uint32),  # [items of `size`]
        ("data_offset", c_uint64),  # [bytes] from the start of kvm_run
    )


class KvmExitDebug(ctypes.Structure):
    """KVM_EXIT_DEBUG (``struct kvm_debug_exit_arch``)."""

    _fields_ = (
        ("exception", c_uint32),
        ("pad", c_uint32),
        ("pc", c_uint64),
        ("dr6", c_uint64),
        ("dr7", c_uint64),
    )


class KvmExitMmio(ctypes.Structure):
    """KVM_EXIT_MMIO."""

    _fields_ = (
        ("phys_addr", c_uint64),  # GPA [bytes]
        ("data", c_uint8 * 8),
        ("len", c_uint32),  # [bytes]
        ("is_write", c_uint8),
    )


class KvmExitHypercall(ctypes.Structure):
    """KVM_EXIT_HYPERCALL."""

    _fields_ = (
        ("nr", c_uint64),
        ("args", c_uint64 * 6),
        ("ret", c_uint64),  # in: what the guest gets
        ("flags", c_uint64),
    )


class KvmExitTprAccess(ctypes.Structure):
    """KVM_EXIT_TPR_ACCESS."""

    _fields_ = (("rip", c_uint64), ("is_write", c_uint32), ("pad", c_uint32))


class KvmExitInternal(ctypes.Structure):
    """KVM_EXIT_INTERNAL_ERROR."""

    _fields_ = (("suberror", c_uint32), ("ndata", c_uint32), ("data", c_uint64 * 16))


class KvmExitEmulationFailure(ctypes.Structure):
    """KVM_EXIT_INTERNAL_ERROR with suberror EMULATION."""

    _fields_ = (
        ("suberror", c_uint32),
        ("ndata", c_uint32),
        ("flags", c_uint64),
        ("insn_size", c_uint8),
        ("insn_bytes", c_uint8 * 15),
    )


class KvmExitSystemEvent(ctypes.Structure):
    """KVM_EXIT_SYSTEM_EVENT.

    With TDX_FATAL (ndata 16) `data` is: VP.ENTER status, rcx, rdx, rbx, 0, 0, rsi, rdi, r8 ... r15. The error
    code is r12, ``data[12]``; the GPA of the message r13, ``data[13]``.
    """

    _fields_ = (("type", c_uint32), ("ndata", c_uint32), ("data", c_uint64 * 16))


class KvmExitEoi(ctypes.Structure):
    """KVM_EXIT_IOAPIC_EOI."""

    _fields_ = (("vector", c_uint8),)


class _HypervSynic(ctypes.Structure):
    _fields_ = (
        ("msr", c_uint32),
        ("pad2", c_uint32),
        ("control", c_uint64),
        ("evt_page", c_uint64),
        ("msg_page", c_uint64),
    )


class _HypervHcall(ctypes.Structure):
    _fields_ = (("input", c_uint64), ("result", c_uint64), ("params", c_uint64 * 2))


class _HypervSyndbg(ctypes.Structure):
    _fields_ = (
        ("msr", c_uint32),
        ("pad2", c_uint32),
        ("control", c_uint64),
        ("status", c_uint64),
        ("send_page", c_uint64),
        ("recv_page", c_uint64),
        ("pending_page", c_uint64),
    )


class _HypervUnion(ctypes.Union):
    _fields_ = (("synic", _HypervSynic), ("hcall", _HypervHcall), ("syndbg", _HypervSyndbg))


class KvmExitHyperv(ctypes.Structure):
    """KVM_EXIT_HYPERV (``struct kvm_hyperv_exit``)."""

    _fields_ = (("type", c_uint32), ("pad1", c_uint32), ("u", _HypervUnion))


class KvmExitMsr(ctypes.Structure):
    """KVM_EXIT_X86_RDMSR and KVM_EXIT_X86_WRMSR."""

    _fields_ = (
        ("error", c_uint8),  # in: non-zero makes the access fail in the guest
        ("pad", c_uint8 * 7),
        ("reason", c_uint32),  # KvmMsrExitReason
        ("index", c_uint32),
        ("data", c_uint64),  # in for RDMSR, out for WRMSR
    )


class KvmExitNotify(ctypes.Structure):
    """KVM_EXIT_NOTIFY."""

    _fields_ = (("flags", c_uint32),)


class KvmExitMemoryFault(ctypes.Structure):
    """KVM_EXIT_MEMORY_FAULT; KVM_RUN fails with EFAULT beside it."""

    _fields_ = (
        ("flags", c_uint64),  # KVM_MEMORY_EXIT_FLAG_PRIVATE
        ("gpa", c_uint64),  # [bytes]
        ("size", c_uint64),  # [bytes]
    )


class _TdxUnknown(ctypes.Structure):
    _fields_ = (("ret", c_uint64), ("data", c_uint64 * 5))


class _TdxGetQuote(ctypes.Structure):
    _fields_ = (("ret", c_uint64), ("gpa", c_uint64), ("size", c_uint64))


class _TdxGetTdVmCallInfo(ctypes.Structure):
    _fields_ = (
        ("ret", c_uint64),
        ("leaf", c_uint64),
        ("r11", c_uint64),
        ("r12", c_uint64),
        ("r13", c_uint64),
        ("r14", c_uint64),
    )


class _TdxSetupEventNotify(ctypes.Structure):
    _fields_ = (("ret", c_uint64), ("vector", c_uint64))


class _TdxUnion(ctypes.Union):
    _fields_ = (
        ("unknown", _TdxUnknown),
        ("get_quote", _TdxGetQuote),
        ("get_tdvmcall_info", _TdxGetTdVmCallInfo),
        ("setup_event_notify", _TdxSetupEventNotify),
    )


class KvmExitTdx(ctypes.Structure):
    """KVM_EXIT_TDX, mainline: a TDVMCALL to serve. Every member begins with `ret`, a TdvmcallStatus."""

    _anonymous_ = ("u",)
    _fields_ = (("flags", c_uint64), ("nr", c_uint64), ("u", _TdxUnion))


class _InRcx(ctypes.Union):
    _fields_ = (("in_rcx", c_uint64), ("reg_mask", c_uint64))


class _InR10(ctypes.Union):
    _fields_ = (("in_r10", c_uint64), ("type", c_uint64))


class _InR11(ctypes.Union):
    _fields_ = (("in_r11", c_uint64), ("subfunction", c_uint64))


class _OutR10(ctypes.Union):
    _fields_ = (("out_r10", c_uint64), ("status_code", c_uint64))


_VMCALL_REST: Final = ("r12", "r13", "r14", "r15", "rbx", "rdi", "rsi", "r8", "r9", "rdx")


class KvmTdxVmcallV17(ctypes.Structure):
    """v17's ``struct kvm_tdx_vmcall``: the guest's registers, and those that it gets back."""

    _anonymous_ = ("_rcx", "_r10", "_r11", "_out_r10")
    _fields_ = (
        ("_rcx", _InRcx),
        ("_r10", _InR10),
        ("_r11", _InR11),
        *((f"in_{name}", c_uint64) for name in _VMCALL_REST),
        ("_out_r10", _OutR10),
        ("out_r11", c_uint64),
        *((f"out_{name}", c_uint64) for name in _VMCALL_REST),
    )


class TdxVmcallRegMaskV17(IntFlag):
    """Bits of `KvmTdxVmcallV17.reg_mask` as v17's header names them.

    RBX and RDX are the other way round than in the architecture, where bit 2 is RDX and bit 3 is RBX.
    """

    TDX_VMCALL_REG_MASK_RBX = 1 << 2
    TDX_VMCALL_REG_MASK_RDX = 1 << 3
    TDX_VMCALL_REG_MASK_RSI = 1 << 6
    TDX_VMCALL_REG_MASK_RDI = 1 << 7
    TDX_VMCALL_REG_MASK_R8 = 1 << 8
    TDX_VMCALL_REG_MASK_R9 = 1 << 9
    TDX_VMCALL_REG_MASK_R10 = 1 << 10
    TDX_VMCALL_REG_MASK_R11 = 1 << 11
    TDX_VMCALL_REG_MASK_R12 = 1 << 12
    TDX_VMCALL_REG_MASK_R13 = 1 << 13
    TDX_VMCALL_REG_MASK_R14 = 1 << 14
    TDX_VMCALL_REG_MASK_R15 = 1 << 15


class KvmExitTdxV17(ctypes.Structure):
    """KVM_EXIT_TDX, v17 (``struct kvm_tdx_exit``): the raw TDVMCALL."""

    _fields_ = (("type", c_uint32), ("pad", c_uint32), ("vmcall", KvmTdxVmcallV17))


class KvmRunUnion(ctypes.Union):
    """The anonymous union of ``struct kvm_run``."""

    _fields_ = (
        ("hw", KvmExitHw),
        ("fail_entry", KvmExitFailEntry),
        ("ex", KvmExitException),
        ("io", KvmExitIo),
        ("debug", KvmExitDebug),
        ("mmio", KvmExitMmio),
        ("hypercall", KvmExitHypercall),
        ("tpr_access", KvmExitTprAccess),
        ("internal", KvmExitInternal),
        ("emulation_failure", KvmExitEmulationFailure),
        ("system_event", KvmExitSystemEvent),
        ("eoi", KvmExitEoi),
        ("hyperv", KvmExitHyperv),
        ("msr", KvmExitMsr),
        ("notify", KvmExitNotify),
        ("memory_fault", KvmExitMemoryFault),
        ("tdx", KvmExitTdx),
        ("tdx_v17", KvmExitTdxV17),
        ("padding", c_char * 256),
    )


class KvmSyncRegs(ctypes.Structure):
    """``struct kvm_sync_regs``; what KVM_CAP_SYNC_REGS keeps here."""

    _fields_ = (("regs", KvmRegs), ("sregs", KvmSregs), ("events", KvmVcpuEvents))


class KvmRunSyncUnion(ctypes.Union):
    """``kvm_run.s``."""

    _fields_ = (("regs", KvmSyncRegs), ("padding", c_char * 2048))


class KvmRun(ctypes.Structure):
    """``struct kvm_run``: 2352 bytes at the start of the vCPU's mapping."""

    _anonymous_ = ("u",)
    _fields_ = (
        ("request_interrupt_window", c_uint8),  # in
        ("immediate_exit", c_uint8),  # in: KVM_RUN returns EINTR before it enters the guest
        ("padding1", c_uint8 * 6),
        ("exit_reason", c_uint32),  # KvmExit
        ("ready_for_interrupt_injection", c_uint8),
        ("if_flag", c_uint8),
        ("flags", c_uint16),  # KvmRunFlag
        ("cr8", c_uint64),
        ("apic_base", c_uint64),
        ("u", KvmRunUnion),
        ("kvm_valid_regs", c_uint64),
        ("kvm_dirty_regs", c_uint64),
        ("s", KvmRunSyncUnion),
    )
