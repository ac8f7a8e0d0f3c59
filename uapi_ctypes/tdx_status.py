"""Completion statuses of the TDX module (RAX after SEAMCALL and TDCALL), of KVM, and of the GHCI.

A status is RAX[63:32]; RAX[31:0] holds what it is about: an operand id, packed bytes, a VM-exit reason or an
EPT level. Source: TDX Module 1.5 ABI Reference, "Function Completion Status Codes"; module release 1.5.01.
"""

from contextlib import suppress
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, Self

from uapi_ctypes.vmx import ExitReason


class Status(IntEnum):
    """RAX[63:32] of TDX module 1.5.01. Bit 31 here is the spec's ERROR bit, bit 30 NON_RECOVERABLE."""

    SUCCESS = 0x0000_0000
    NON_RECOVERABLE_VCPU = 0x4000_0001
    NON_RECOVERABLE_TD = 0x6000_0002
    INTERRUPTED_RESUMABLE = 0x8000_0003
    INTERRUPTED_RESTARTABLE = 0x8000_0004
    NON_RECOVERABLE_TD_NON_ACCESSIBLE = 0x6000_0005
    INVALID_RESUMPTION = 0xC000_0006
    NON_RECOVERABLE_TD_WRONG_APIC_MODE = 0xE000_0007
    CROSS_TD_FAULT = 0x8000_0008
    CROSS_TD_TRAP = 0x9000_0009
    NON_RECOVERABLE_TD_CORRUPTED_MD = 0x6000_000A
    OPERAND_INVALID = 0xC000_0100
    OPERAND_ADDR_RANGE_ERROR = 0xC000_0101
    OPERAND_BUSY = 0x8000_0200
    PREVIOUS_TLB_EPOCH_BUSY = 0x8000_0201
    SYS_BUSY = 0x8000_0202
    RND_NO_ENTROPY = 0x8000_0203
    OPERAND_BUSY_HOST_PRIORITY = 0x8000_0204
    HOST_PRIORITY_BUSY_TIMEOUT = 0x9000_0205
    PAGE_METADATA_INCORRECT = 0xC000_0300
    PAGE_ALREADY_FREE = 0x0000_0301
    PAGE_NOT_OWNED_BY_TD = 0xC000_0302
    PAGE_NOT_FREE = 0xC000_0303
    TD_ASSOCIATED_PAGES_EXIST = 0xC000_0400
    SYS_INIT_NOT_PENDING = 0xC000_0500
    SYS_LP_INIT_NOT_DONE = 0xC000_0502
    SYS_LP_INIT_DONE = 0xC000_0503
    SYS_NOT_READY = 0xC000_0505
    SYS_SHUTDOWN = 0xC000_0506
    SYS_KEY_CONFIG_NOT_PENDING = 0xC000_0507
    SYS_STATE_INCORRECT = 0xC000_0508
    SYS_INVALID_HANDOFF = 0xC000_0509
    SYS_INCOMPATIBLE_SIGSTRUCT = 0xC000_050A
    SYS_LP_INIT_NOT_PENDING = 0xC000_050B
    SYS_CONFIG_NOT_PENDING = 0xC000_050C
    INCOMPATIBLE_SEAM_CAPABILITIES = 0xC000_050D
    TD_FATAL = 0xE000_0604
    TD_NON_DEBUG = 0xC000_0605
    TDCS_NOT_ALLOCATED = 0xC000_0606
    LIFECYCLE_STATE_INCORRECT = 0xC000_0607
    OP_STATE_INCORRECT = 0xC000_0608
    NO_VCPUS = 0xC000_0609
    TDCX_NUM_INCORRECT = 0xC000_0610
    VCPU_STATE_INCORRECT = 0xC000_0700
    VCPU_ASSOCIATED = 0x8000_0701
    VCPU_NOT_ASSOCIATED = 0x8000_0702
    NO_VALID_VE_INFO = 0xC000_0704
    MAX_VCPUS_EXCEEDED = 0xC000_0705
    TSC_ROLLBACK = 0xC000_0706
    TD_VMCS_FIELD_NOT_INITIALIZED = 0xC000_0730
    TD_VMCS_FIELD_ERROR = 0xC000_0731
    KEY_GENERATION_FAILED = 0x8000_0800
    TD_KEYS_NOT_CONFIGURED = 0x8000_0810
    KEY_STATE_INCORRECT = 0xC000_0811
    KEY_CONFIGURED = 0x0000_0815
    WBCACHE_NOT_COMPLETE = 0x8000_0817
    HKID_NOT_FREE = 0xC000_0820
    NO_HKID_READY_TO_WBCACHE = 0x0000_0821
    WBCACHE_RESUME_ERROR = 0xC000_0823
    FLUSHVP_NOT_DONE = 0x8000_0824
    NUM_ACTIVATED_HKIDS_NOT_SUPPORTED = 0xC000_0825
    INCORRECT_CPUID_VALUE = 0xC000_0900
    LIMIT_CPUID_MAXVAL_SET = 0xC000_0901
    INCONSISTENT_CPUID_FIELD = 0xC000_0902
    CPUID_MAX_SUBLEAVES_UNRECOGNIZED = 0xC000_0903
    CPUID_LEAF_1F_FORMAT_UNRECOGNIZED = 0xC000_0904
    INVALID_WBINVD_SCOPE = 0xC000_0905
    INVALID_PKG_ID = 0xC000_0906
    ENABLE_MONITOR_FSM_NOT_SET = 0xC000_0907
    CPUID_LEAF_NOT_SUPPORTED = 0xC000_0908
    SMRR_NOT_LOCKED = 0xC000_0910
    INVALID_SMRR_CONFIGURATION = 0xC000_0911
    SMRR_OVERLAPS_CMR = 0xC000_0912
    SMRR_LOCK_NOT_SUPPORTED = 0xC000_0913
    SMRR_NOT_SUPPORTED = 0xC000_0914
    INCONSISTENT_MSR = 0xC000_0920
    INCORRECT_MSR_VALUE = 0xC000_0921
    SEAMREPORT_NOT_AVAILABLE = 0xC000_0930
    SEAMDB_GETREF_NOT_AVAILABLE = 0xC000_0931
    SEAMDB_REPORT_NOT_AVAILABLE = 0xC000_0932
    SEAMVERIFYREPORT_NOT_AVAILABLE = 0xC000_0933
    INVALID_TDMR = 0xC000_0A00
    NON_ORDERED_TDMR = 0xC000_0A01
    TDMR_OUTSIDE_CMRS = 0xC000_0A02
    TDMR_ALREADY_INITIALIZED = 0x0000_0A03
    INVALID_PAMT = 0xC000_0A10
    PAMT_OUTSIDE_CMRS = 0xC000_0A11
    PAMT_OVERLAP = 0xC000_0A12
    INVALID_RESERVED_IN_TDMR = 0xC000_0A20
    NON_ORDERED_RESERVED_IN_TDMR = 0xC000_0A21
    CMR_LIST_INVALID = 0xC000_0A22
    EPT_WALK_FAILED = 0xC000_0B00
    EPT_ENTRY_FREE = 0xC000_0B01
    EPT_ENTRY_NOT_FREE = 0xC000_0B02
    EPT_ENTRY_NOT_PRESENT = 0xC000_0B03
    EPT_ENTRY_NOT_LEAF = 0xC000_0B04
    EPT_ENTRY_LEAF = 0xC000_0B05
    GPA_RANGE_NOT_BLOCKED = 0xC000_0B06
    GPA_RANGE_ALREADY_BLOCKED = 0x0000_0B07
    TLB_TRACKING_NOT_DONE = 0xC000_0B08
    EPT_INVALID_PROMOTE_CONDITIONS = 0xC000_0B09
    PAGE_ALREADY_ACCEPTED = 0x0000_0B0A
    PAGE_SIZE_MISMATCH = 0xC000_0B0B
    GPA_RANGE_BLOCKED = 0xC000_0B0C
    EPT_ENTRY_STATE_INCORRECT = 0xC000_0B0D
    EPT_PAGE_NOT_FREE = 0xC000_0B0E
    L2_SEPT_WALK_FAILED = 0xC000_0B0F
    L2_SEPT_ENTRY_NOT_FREE = 0xC000_0B10
    PAGE_ATTR_INVALID = 0xC000_0B11
    L2_SEPT_PAGE_NOT_PROVIDED = 0xC000_0B12
    METADATA_FIELD_ID_INCORRECT = 0xC000_0C00
    METADATA_FIELD_NOT_WRITABLE = 0xC000_0C01
    METADATA_FIELD_NOT_READABLE = 0xC000_0C02
    METADATA_FIELD_VALUE_NOT_VALID = 0xC000_0C03
    METADATA_LIST_OVERFLOW = 0xC000_0C04
    INVALID_METADATA_LIST_HEADER = 0xC000_0C05
    REQUIRED_METADATA_FIELD_MISSING = 0xC000_0C06
    METADATA_ELEMENT_SIZE_INCORRECT = 0xC000_0C07
    METADATA_LAST_ELEMENT_INCORRECT = 0xC000_0C08
    METADATA_FIELD_CURRENTLY_NOT_WRITABLE = 0xC000_0C09
    METADATA_WR_MASK_NOT_VALID = 0xC000_0C0A
    METADATA_FIRST_FIELD_ID_IN_CONTEXT = 0x0000_0C0B
    METADATA_FIELD_SKIP = 0x0000_0C0C
    SERVTD_ALREADY_BOUND_FOR_TYPE = 0xC000_0D00
    SERVTD_TYPE_MISMATCH = 0xC000_0D01
    SERVTD_ATTR_MISMATCH = 0xC000_0D02
    SERVTD_INFO_HASH_MISMATCH = 0xC000_0D03
    SERVTD_UUID_MISMATCH = 0xC000_0D04
    SERVTD_NOT_BOUND = 0xC000_0D05
    SERVTD_BOUND = 0xC000_0D06
    TARGET_UUID_MISMATCH = 0xC000_0D07
    TARGET_UUID_UPDATED = 0xC000_0D08
    INVALID_MBMD = 0xC000_0E00
    INCORRECT_MBMD_MAC = 0xC000_0E01
    NOT_WRITE_BLOCKED = 0xC000_0E02
    ALREADY_WRITE_BLOCKED = 0x0000_0E03
    NOT_EXPORTED = 0xC000_0E04
    MIGRATION_STREAM_STATE_INCORRECT = 0xC000_0E05
    MAX_MIGS_NUM_EXCEEDED = 0xC000_0E06
    EXPORTED_DIRTY_PAGES_REMAIN = 0xC000_0E07
    MIGRATION_DECRYPTION_KEY_NOT_SET = 0xC000_0E08
    TD_NOT_MIGRATABLE = 0xC000_0E09
    PREVIOUS_EXPORT_CLEANUP_INCOMPLETE = 0xC000_0E0A
    NUM_MIGS_HIGHER_THAN_CREATED = 0xC000_0E0B
    IMPORT_MISMATCH = 0xC000_0E0C
    MIGRATION_EPOCH_OVERFLOW = 0xC000_0E0D
    MAX_EXPORTS_EXCEEDED = 0xC000_0E0E
    INVALID_PAGE_MAC = 0xC000_0E0F
    MIGRATED_IN_CURRENT_EPOCH = 0xC000_0E10
    DISALLOWED_IMPORT_OVER_REMOVED = 0xC000_0E11
    SOME_VCPUS_NOT_MIGRATED = 0xC000_0E12
    ALL_VCPUS_IMPORTED = 0xC000_0E13
    MIN_MIGS_NOT_CREATED = 0xC000_0E14
    VCPU_ALREADY_EXPORTED = 0xC000_0E15
    INVALID_MIGRATION_DECRYPTION_KEY = 0xC000_0E16
    INVALID_CPUSVN = 0xC000_1000
    INVALID_REPORTMACSTRUCT = 0xC000_1001
    L2_EXIT_HOST_ROUTED_ASYNC = 0x0000_1100
    L2_EXIT_HOST_ROUTED_TDVMCALL = 0x0000_1101
    L2_EXIT_PENDING_INTERRUPT = 0x0000_1102
    PENDING_INTERRUPT = 0x0000_1120
    TD_EXIT_BEFORE_L2_ENTRY = 0x0000_1140
    TD_EXIT_ON_L2_VM_EXIT = 0x0000_1141
    TD_EXIT_ON_L2_TO_L1 = 0x0000_1142
    GLA_NOT_CANONICAL = 0xC000_1160

    @property
    def is_error(self) -> bool:
        """The spec's ERROR bit. Some non-zero codes are not errors."""
        return bool(self >> 31)

    @property
    def is_non_recoverable(self) -> bool:
        """The spec's NON_RECOVERABLE bit: do not simply try again."""
        return bool(self >> 30 & 1)

    @property
    def is_fatal(self) -> bool:
        """The spec's FATAL bit: the TD can only be torn down."""
        return bool(self >> 29 & 1)


class Operand(IntEnum):
    """RAX[31:0] when the status names an operand: which input, field or structure was at fault."""

    RAX = 0
    RCX = 1
    RDX = 2
    RBX = 3
    RBP = 5
    RSI = 6
    RDI = 7
    R8 = 8
    R9 = 9
    R10 = 10
    R11 = 11
    R12 = 12
    R13 = 13
    R14 = 14
    R15 = 15
    ATTRIBUTES = 64
    XFAM = 65
    EXEC_CONTROLS = 66
    EPTP_CONTROLS = 67
    MAX_VCPUS = 68
    CPUID_CONFIG = 69
    TSC_FREQUENCY = 70
    NUM_L2_VMS = 71
    IA32_ARCH_CAPABILITIES_CONFIG = 72
    PAGE = 95
    TDMR_INFO_PA = 96
    GPA_LIST_ENTRY = 97
    MIG_BUFF_LIST_ENTRY = 98
    NEW_PAGE_LIST_ENTRY = 99
    TDR = 128
    TDCX = 129
    TDVPR = 130
    REG_PAGE = 132
    TDCS = 144
    TDVPS = 145
    SEPT_TREE = 146
    SEPT_ENTRY = 147
    RTMR = 168
    TD_EPOCH = 169
    L2_VAPIC_GPA = 170
    MIGSC = 171
    OP_STATE = 172
    MIG = 173
    SERVTD_BINDINGS = 174
    METADATA_FIELD = 176
    SYS = 184
    TDMR = 185
    KOT = 186
    KET = 187
    WBCACHE = 188

    @classmethod
    def name_of(cls, detail: int) -> str:
        """Return the operand's name, or `detail` in hex when it is none we know."""
        try:
            return cls(detail).name
        except ValueError:
            return f"{detail:#x}"


class KvmTdxStatus(IntEnum):
    """RAX[63:32] values that only KVM knows (`arch/x86/include/asm/tdx.h`, `arch/x86/kvm/vmx/tdx_errno.h`).

    Module 1.5.01 answers 0x60000002 and 0xE0000007 in the first two cases. SW_ERROR is made by the kernel's
    own SEAMCALL wrapper when the instruction did not reach the module.
    """

    KVM_NON_RECOVERABLE_TD = 0x4000_0002
    KVM_TD_WRONG_APIC_MODE = 0x6000_0007
    KVM_SW_ERROR = 0x8000_FF00


SW_ERROR_REASONS: Final = {
    0xFFFF_0000: "VMfailInvalid: the P-SEAMLDR or the TDX module is not loaded",
    13: "#GP: SEAMCALL is not possible on this CPU in this mode",
    6: "#UD: the CPU is not in VMX operation",
}
"""RAX[31:0] below `KvmTdxStatus.KVM_SW_ERROR`."""


class TdvmcallStatus(IntEnum):
    """R10 after TDG.VP.VMCALL (GHCI 1.5, "TDG.VP.VMCALL Completion Status")."""

    SUCCESS = 0
    RETRY = 1
    INVALID_OPERAND = 0x8000_0000_0000_0000
    GPA_INUSE = 0x8000_0000_0000_0001  # mainline KVM never answers it
    ALIGN_ERROR = 0x8000_0000_0000_0002
    SUBFUNC_UNSUPPORTED = 0x8000_0000_0000_0003


TDVMCALL_TDREPORT_FAILED: Final = 0x8000_0000_0000_0001
"""R10 in GHCI 1.0, which v17 follows: the number that GHCI 1.5 calls `TdvmcallStatus.GPA_INUSE`."""

STATUS_MASK: Final = 0xFFFF_FFFF_0000_0000
"""What to compare statuses under."""

_S = Status
_EXIT_REASON: Final = frozenset({
    _S.SUCCESS, _S.NON_RECOVERABLE_VCPU, _S.NON_RECOVERABLE_TD, _S.NON_RECOVERABLE_TD_NON_ACCESSIBLE,
    _S.NON_RECOVERABLE_TD_WRONG_APIC_MODE, _S.NON_RECOVERABLE_TD_CORRUPTED_MD, _S.CROSS_TD_FAULT,
    _S.CROSS_TD_TRAP, _S.L2_EXIT_HOST_ROUTED_ASYNC, _S.L2_EXIT_HOST_ROUTED_TDVMCALL,
    _S.L2_EXIT_PENDING_INTERRUPT, _S.PENDING_INTERRUPT, _S.TD_EXIT_BEFORE_L2_ENTRY,
    _S.TD_EXIT_ON_L2_VM_EXIT, _S.TD_EXIT_ON_L2_TO_L1,
})  # fmt: skip
_TDMR: Final = frozenset({_S.INVALID_TDMR, _S.NON_ORDERED_TDMR, _S.TDMR_OUTSIDE_CMRS})
_RESERVED_AREA: Final = frozenset({_S.INVALID_RESERVED_IN_TDMR, _S.NON_ORDERED_RESERVED_IN_TDMR})
_PAMT: Final = frozenset({_S.INVALID_PAMT, _S.PAMT_OUTSIDE_CMRS, _S.PAMT_OVERLAP})
_CPUID: Final = frozenset({_S.INCORRECT_CPUID_VALUE, _S.INCONSISTENT_CPUID_FIELD, _S.CPUID_LEAF_NOT_SUPPORTED})
_MSR: Final = frozenset({_S.INCONSISTENT_MSR, _S.INCORRECT_MSR_VALUE})
_L2_SEPT: Final = frozenset({_S.L2_SEPT_WALK_FAILED, _S.L2_SEPT_ENTRY_NOT_FREE, _S.L2_SEPT_PAGE_NOT_PROVIDED})
_LEVEL: Final = frozenset({_S.PAGE_ALREADY_ACCEPTED, _S.PAGE_SIZE_MISMATCH})
_NAMES_RAX: Final = frozenset({_S.OPERAND_INVALID, _S.OPERAND_ADDR_RANGE_ERROR})  # where detail 0 means RAX
_PAMT_SIZES: Final = ("4K", "2M", "1G")


@dataclass(frozen=True, slots=True)
class Rax:
    """A whole completion status: code and detail."""

    status: Status
    detail: int = 0

    def __int__(self) -> int:
        """Return the 64-bit register value."""
        return self.status << 32 | self.detail

    def __str__(self) -> str:
        """``EPT_ENTRY_STATE_INCORRECT(RCX)``."""
        text = self.detail_text
        return f"{self.status.name}({text})" if text else self.status.name

    @property
    def detail_text(self) -> str:
        """RAX[31:0] in words, empty when it says nothing."""
        status, detail = self.status, self.detail
        if status in _LEVEL:
            return f"level {detail}"
        if status in _TDMR:
            return f"TDMR {detail & 0xFF}"
        if status in _RESERVED_AREA:
            return f"TDMR {detail & 0xFF}, reserved area {detail >> 8 & 0xFF}"
        if status in _PAMT:
            size = detail >> 8 & 0xFF
            text = f"TDMR {detail & 0xFF}, {_PAMT_SIZES[size] if size < 3 else f'size {size}'} PAMT"
            return f"{text}, TDMR {detail >> 16 & 0xFF}" if status is _S.PAMT_OVERLAP else text
        if status is _S.SMRR_OVERLAPS_CMR:
            return f"SMRR {detail & 0xFF}, CMR {detail >> 8 & 0xFF}"
        if status in _CPUID:
            return f"CPUID leaf {detail:#x}"
        if status in _MSR:
            return f"MSR {detail:#x}"
        if status in _L2_SEPT:
            return f"VM {detail >> 16}, level {detail & 0xFFFF}"
        if status is _S.NUM_ACTIVATED_HKIDS_NOT_SUPPORTED:
            return f"limit {detail}"
        if status in _EXIT_REASON:
            return f"exit reason {ExitReason.name_of(detail)}" if detail else ""
        if detail or status in _NAMES_RAX:
            return Operand.name_of(detail)
        return ""

    @classmethod
    def decode(cls, rax: int) -> Self:
        """Split the register value `rax`. Raise ``ValueError`` on a code that module 1.5.01 does not have."""
        return cls(Status(rax >> 32), rax & 0xFFFF_FFFF)


def describe(rax: int) -> str:
    """Return the status `rax` in words on one line; one that nobody here knows comes back in hex."""
    with suppress(ValueError):
        return str(Rax.decode(rax))
    if rax >> 32 & KvmTdxStatus.KVM_SW_ERROR == KvmTdxStatus.KVM_SW_ERROR:
        reason = rax & 0xFFFF_FFFF
        return f"KVM_SW_ERROR({SW_ERROR_REASONS.get(reason, f'{reason:#x}')})"
    try:
        known = KvmTdxStatus(rax >> 32)
    except ValueError:
        return f"{rax:#018x}"
    reason = rax & 0xFFFF_FFFF
    return f"{known.name}(exit reason {ExitReason.name_of(reason)})" if reason else known.name


def explain(value: int) -> list[str]:
    """Return everything that the 64-bit `value` can mean, one reading a line, the likeliest first.

    The last line gives the bits. Raise ``ValueError`` when `value` does not fit in 64 bits.
    """
    if not 0 <= value < 1 << 64:
        raise ValueError(f"{value:#x} is not a 64-bit status")
    lines = []
    text = describe(value)
    if text != f"{value:#018x}":
        source = "KVM" if text.startswith("KVM_") else "TDX module"
        lines.append(f"{source} (RAX of SEAMCALL or TDCALL): {text}")
    with suppress(ValueError):
        lines.append(f"TDVMCALL (R10): {TdvmcallStatus(value).name}")
    if value == TDVMCALL_TDREPORT_FAILED:
        lines.append("TDVMCALL (R10, GHCI 1.0 as in v17): TDREPORT_FAILED")
    if not lines:
        lines.append("unknown to TDX module 1.5.01, KVM and the GHCI")
    bits = ", ".join(
        name
        for bit, name in (
            (63, "ERROR"),
            (62, "NON_RECOVERABLE"),
            (61, "FATAL"),
            (60, "HOST_RECOVERABILITY_HINT"),
        )
        if value >> bit & 1
    )
    lines.append(
        f"{value:#018x}: {bits or 'no error bit'}; class {value >> 40 & 0xFF:#04x}, "
        f"code {value >> 32 & 0xFF:#04x}, detail {value & 0xFFFF_FFFF:#x}"
    )
    return lines
