"""Structures, flags and enumerations of the VM-level ABI. Source: `include/uapi/linux/kvm.h`, x86 `kvm.h`.

A vCPU's state is in `kvm_state`, the run page in `kvm_run`, TDX in `tdx_mainline` and `tdx_v17`.
"""

import ctypes
from ctypes import c_char, c_uint8, c_uint16, c_uint32, c_uint64
from enum import IntEnum, IntFlag
from typing import Final

from uapi_ctypes.caps import KvmCap as KvmCap
from uapi_ctypes.flexible import Flexible

KVM_API_VERSION: Final = 12
KVM_MAX_CPUID_ENTRIES: Final = 256
KVM_MSR_FILTER_MAX_RANGES: Final = 16
KVM_MSR_FILTER_MAX_BITMAP_SIZE: Final = 0x600
"""[bytes]."""


class KvmVmType(IntEnum):
    """Argument of KVM_CREATE_VM and bit of KVM_CAP_VM_TYPES, as mainline numbers them.

    In v17, 2 is TDX and 3 is SNP: read the bitmap through `dialect`, never try types.
    """

    KVM_X86_DEFAULT_VM = 0
    KVM_X86_SW_PROTECTED_VM = 1
    KVM_X86_SEV_VM = 2
    KVM_X86_SEV_ES_VM = 3
    KVM_X86_SNP_VM = 4
    KVM_X86_TDX_VM = 5


KVM_X86_TDX_VM_V17: Final = 2


class KvmMemFlag(IntFlag):
    """``kvm_userspace_memory_region*.flags``."""

    KVM_MEM_LOG_DIRTY_PAGES = 1
    KVM_MEM_READONLY = 2
    KVM_MEM_GUEST_MEMFD = 4


class GuestMemfdFlag(IntFlag):
    """``kvm_create_guest_memfd.flags``; what a kernel takes is in KVM_CAP_GUEST_MEMFD_FLAGS."""

    GUEST_MEMFD_FLAG_MMAP = 1
    GUEST_MEMFD_FLAG_INIT_SHARED = 2


KVM_GUEST_MEMFD_ALLOW_HUGEPAGE_V17: Final = 1
"""Bit 0 in the guest_memfd revision under v17; dropped before the merge."""
KVM_MEMORY_ATTRIBUTE_PRIVATE: Final = 1 << 3


class KvmMpStateValue(IntEnum):
    """``kvm_mp_state.mp_state``."""

    KVM_MP_STATE_RUNNABLE = 0
    KVM_MP_STATE_UNINITIALIZED = 1
    KVM_MP_STATE_INIT_RECEIVED = 2
    KVM_MP_STATE_HALTED = 3
    KVM_MP_STATE_SIPI_RECEIVED = 4
    KVM_MP_STATE_AP_RESET_HOLD = 9


class KvmX2apicApi(IntFlag):
    """``args[0]`` of KVM_CAP_X2APIC_API; the last two are newer than 6.16."""

    KVM_X2APIC_API_USE_32BIT_IDS = 1
    KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK = 2
    KVM_X2APIC_ENABLE_SUPPRESS_EOI_BROADCAST = 4
    KVM_X2APIC_DISABLE_SUPPRESS_EOI_BROADCAST = 8


class KvmMsrExitReason(IntFlag):
    """``args[0]`` of KVM_CAP_X86_USER_SPACE_MSR and ``kvm_run.msr.reason``."""

    KVM_MSR_EXIT_REASON_INVAL = 1
    KVM_MSR_EXIT_REASON_UNKNOWN = 2
    KVM_MSR_EXIT_REASON_FILTER = 4


KVM_HC_MAP_GPA_RANGE: Final = 12
"""``kvm_run.hypercall.nr`` of a MapGPA; its bit in KVM_CAP_EXIT_HYPERCALL is ``1 << 12``."""
KVM_MAP_GPA_RANGE_ENCRYPTED: Final = 1 << 4
"""Bit of ``kvm_run.hypercall.args[2]``: the guest asks for private memory."""
KVM_X86_QUIRK_IGNORE_GUEST_PAT: Final = 1 << 9
KVM_PMU_CAP_DISABLE: Final = 1
KVM_BUS_LOCK_DETECTION_OFF: Final = 1
KVM_BUS_LOCK_DETECTION_EXIT: Final = 2
KVM_X86_NOTIFY_VMEXIT_ENABLED: Final = 1
KVM_X86_NOTIFY_VMEXIT_USER: Final = 2
KVM_MSR_FILTER_DEFAULT_DENY: Final = 1
KVM_MSR_FILTER_READ: Final = 1
KVM_MSR_FILTER_WRITE: Final = 2
KVM_IRQFD_FLAG_DEASSIGN: Final = 1
KVM_IRQFD_FLAG_RESAMPLE: Final = 2
KVM_IOEVENTFD_FLAG_DATAMATCH: Final = 1
KVM_IOEVENTFD_FLAG_PIO: Final = 2
KVM_IOEVENTFD_FLAG_DEASSIGN: Final = 4
KVM_MSI_VALID_DEVID: Final = 1
KVM_PIT_SPEAKER_DUMMY: Final = 1
KVM_IRQ_ROUTING_IRQCHIP: Final = 1
KVM_IRQ_ROUTING_MSI: Final = 2
KVM_IRQ_ROUTING_HV_SINT: Final = 4
KVM_CLOCK_TSC_STABLE: Final = 2
KVM_CLOCK_REALTIME: Final = 4
KVM_CLOCK_HOST_TSC: Final = 8
KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE: Final = 1
KVM_DIRTY_LOG_INITIALLY_SET: Final = 2


class KvmIrqchipId(IntEnum):
    """``kvm_irqchip.chip_id``."""

    KVM_IRQCHIP_PIC_MASTER = 0
    KVM_IRQCHIP_PIC_SLAVE = 1
    KVM_IRQCHIP_IOAPIC = 2


class KvmUserspaceMemoryRegion(ctypes.Structure):
    """``struct kvm_userspace_memory_region``."""

    _fields_ = (
        ("slot", c_uint32),  # slot id in bits 15:0, address space in bits 31:16
        ("flags", c_uint32),  # KvmMemFlag
        ("guest_phys_addr", c_uint64),  # GPA [bytes, 4 KiB-aligned]
        ("memory_size", c_uint64),  # [bytes, 4 KiB-aligned], 0 deletes the slot
        ("userspace_addr", c_uint64),  # HVA [bytes, 4 KiB-aligned]
    )


class KvmUserspaceMemoryRegion2(ctypes.Structure):
    """``struct kvm_userspace_memory_region2``."""

    _fields_ = (
        ("slot", c_uint32),
        ("flags", c_uint32),  # KvmMemFlag
        ("guest_phys_addr", c_uint64),  # GPA [bytes, 4 KiB-aligned]
        ("memory_size", c_uint64),  # [bytes, 4 KiB-aligned], 0 deletes the slot
        ("userspace_addr", c_uint64),  # HVA of the shared half [bytes, 4 KiB-aligned]
        ("guest_memfd_offset", c_uint64),  # [bytes, 4 KiB-aligned]
        ("guest_memfd", c_uint32),  # file descriptor of the private half
        ("pad1", c_uint32),
        ("pad2", c_uint64 * 14),
    )


class KvmCreateGuestMemfd(ctypes.Structure):
    """``struct kvm_create_guest_memfd``."""

    _fields_ = (
        ("size", c_uint64),  # [bytes, 4 KiB-aligned], at least one page
        ("flags", c_uint64),  # GuestMemfdFlag
        ("reserved", c_uint64 * 6),
    )


class KvmMemoryAttributes(ctypes.Structure):
    """``struct kvm_memory_attributes``."""

    _fields_ = (
        ("address", c_uint64),  # GPA [bytes, 4 KiB-aligned]
        ("size", c_uint64),  # [bytes, 4 KiB-aligned], at least one page
        ("attributes", c_uint64),  # 0 or KVM_MEMORY_ATTRIBUTE_PRIVATE
        ("flags", c_uint64),  # must be 0
    )


class KvmPreFaultMemory(ctypes.Structure):
    """``struct kvm_pre_fault_memory``. `gpa` and `size` come back as what is still to do."""

    _fields_ = (
        ("gpa", c_uint64),  # in/out [bytes, 4 KiB-aligned]
        ("size", c_uint64),  # in/out [bytes, 4 KiB-aligned], at least one page
        ("flags", c_uint64),  # must be 0
        ("padding", c_uint64 * 5),
    )


class KvmEnableCap(ctypes.Structure):
    """``struct kvm_enable_cap``."""

    _fields_ = (
        ("cap", c_uint32),  # KvmCap
        ("flags", c_uint32),  # must be 0
        ("args", c_uint64 * 4),
        ("pad", c_uint8 * 64),
    )


class KvmIrqLevel(ctypes.Structure):
    """``struct kvm_irq_level``."""

    _fields_ = (
        ("irq", c_uint32),  # GSI in; with KVM_IRQ_LINE_STATUS the status comes back here
        ("level", c_uint32),
    )


class KvmMsi(ctypes.Structure):
    """``struct kvm_msi``."""

    _fields_ = (
        ("address_lo", c_uint32),
        ("address_hi", c_uint32),
        ("data", c_uint32),
        ("flags", c_uint32),
        ("devid", c_uint32),
        ("pad", c_uint8 * 12),
    )


class KvmIrqchip(ctypes.Structure):
    """``struct kvm_irqchip``; the chip's registers as bytes."""

    _fields_ = (
        ("chip_id", c_uint32),  # KvmIrqchipId
        ("pad", c_uint32),
        ("chip", c_uint8 * 512),
    )


class KvmIrqfd(ctypes.Structure):
    """``struct kvm_irqfd``."""

    _fields_ = (
        ("fd", c_uint32),
        ("gsi", c_uint32),
        ("flags", c_uint32),
        ("resamplefd", c_uint32),
        ("pad", c_uint8 * 16),
    )


class KvmIoeventfd(ctypes.Structure):
    """``struct kvm_ioeventfd``."""

    _fields_ = (
        ("datamatch", c_uint64),
        ("addr", c_uint64),  # GPA, or port with KVM_IOEVENTFD_FLAG_PIO [bytes]
        ("len", c_uint32),  # 0, 1, 2, 4 or 8 [bytes]
        ("fd", c_uint32),
        ("flags", c_uint32),
        ("pad", c_uint8 * 36),
    )


class KvmIrqRoutingEntry(ctypes.Structure):
    """``struct kvm_irq_routing_entry``; `u` is the irqchip, MSI or SynIC route as words."""

    _fields_ = (
        ("gsi", c_uint32),
        ("type", c_uint32),  # KVM_IRQ_ROUTING_*
        ("flags", c_uint32),
        ("pad", c_uint32),
        ("u", c_uint32 * 8),  # IRQCHIP: irqchip, pin. MSI: address_lo, address_hi, data, devid
    )


class KvmIrqRouting(Flexible[KvmIrqRoutingEntry]):
    """``struct kvm_irq_routing``."""

    _entry_ = KvmIrqRoutingEntry
    _count_ = "nr"
    _fields_ = (("nr", c_uint32), ("flags", c_uint32))


class KvmPitConfig(ctypes.Structure):
    """``struct kvm_pit_config``."""

    _fields_ = (("flags", c_uint32), ("pad", c_uint32 * 15))


class KvmPitChannelState(ctypes.Structure):
    """``struct kvm_pit_channel_state``."""

    _fields_ = (
        ("count", c_uint32),
        ("latched_count", c_uint16),
        ("count_latched", c_uint8),
        ("status_latched", c_uint8),
        ("status", c_uint8),
        ("read_state", c_uint8),
        ("write_state", c_uint8),
        ("write_latch", c_uint8),
        ("rw_mode", c_uint8),
        ("mode", c_uint8),
        ("bcd", c_uint8),
        ("gate", c_uint8),
        ("count_load_time", c_uint64),  # [ns]
    )


class KvmPitState2(ctypes.Structure):
    """``struct kvm_pit_state2``."""

    _fields_ = (("channels", KvmPitChannelState * 3), ("flags", c_uint32), ("reserved", c_uint32 * 9))


class KvmReinjectControl(ctypes.Structure):
    """``struct kvm_reinject_control``."""

    _fields_ = (("pit_reinject", c_uint8), ("reserved", c_uint8 * 31))


class KvmDirtyLog(ctypes.Structure):
    """``struct kvm_dirty_log``."""

    _fields_ = (("slot", c_uint32), ("padding1", c_uint32), ("dirty_bitmap", c_uint64))  # HVA of the bitmap


class KvmClearDirtyLog(ctypes.Structure):
    """``struct kvm_clear_dirty_log``."""

    _fields_ = (
        ("slot", c_uint32),
        ("num_pages", c_uint32),  # [4 KiB pages]
        ("first_page", c_uint64),  # [4 KiB pages]
        ("dirty_bitmap", c_uint64),  # HVA of the bitmap
    )


class KvmClockData(ctypes.Structure):
    """``struct kvm_clock_data``."""

    _fields_ = (
        ("clock", c_uint64),  # [ns]
        ("flags", c_uint32),  # KVM_CLOCK_*
        ("pad0", c_uint32),
        ("realtime", c_uint64),  # [ns]
        ("host_tsc", c_uint64),
        ("pad", c_uint32 * 4),
    )


class KvmCreateDevice(ctypes.Structure):
    """``struct kvm_create_device``."""

    _fields_ = (("type", c_uint32), ("fd", c_uint32), ("flags", c_uint32))  # fd: out


class KvmDeviceAttr(ctypes.Structure):
    """``struct kvm_device_attr``."""

    _fields_ = (("flags", c_uint32), ("group", c_uint32), ("attr", c_uint64), ("addr", c_uint64))


class KvmCoalescedMmioZone(ctypes.Structure):
    """``struct kvm_coalesced_mmio_zone``."""

    _fields_ = (("addr", c_uint64), ("size", c_uint32), ("pio", c_uint32))


class KvmMsrFilterRange(ctypes.Structure):
    """``struct kvm_msr_filter_range``."""

    _fields_ = (
        ("flags", c_uint32),  # KVM_MSR_FILTER_READ, KVM_MSR_FILTER_WRITE
        ("nmsrs", c_uint32),
        ("base", c_uint32),
        ("bitmap", c_uint64),  # HVA; a set bit allows
    )


class KvmMsrFilter(ctypes.Structure):
    """``struct kvm_msr_filter``."""

    _fields_ = (("flags", c_uint32), ("ranges", KvmMsrFilterRange * KVM_MSR_FILTER_MAX_RANGES))


class KvmPmuEventFilter(Flexible[int]):
    """``struct kvm_pmu_event_filter``; entries are raw events."""

    _entry_ = c_uint64
    _count_ = "nevents"
    _fields_ = (
        ("action", c_uint32),  # 0 allow, 1 deny
        ("nevents", c_uint32),
        ("fixed_counter_bitmap", c_uint32),
        ("flags", c_uint32),
        ("pad", c_uint32 * 4),
    )


class KvmEncRegion(ctypes.Structure):
    """``struct kvm_enc_region``."""

    _fields_ = (("addr", c_uint64), ("size", c_uint64))


class KvmSevCmd(ctypes.Structure):
    """``struct kvm_sev_cmd``: what KVM_MEMORY_ENCRYPT_OP takes on SEV. Needed to tell the two apart."""

    _fields_ = (
        ("id", c_uint32),
        ("pad0", c_uint32),
        ("data", c_uint64),
        ("error", c_uint32),
        ("sev_fd", c_uint32),
    )


class KvmStatsHeader(ctypes.Structure):
    """``struct kvm_stats_header``: the first bytes of what KVM_GET_STATS_FD returns."""

    _fields_ = (
        ("flags", c_uint32),
        ("name_size", c_uint32),  # [bytes]
        ("num_desc", c_uint32),
        ("id_offset", c_uint32),  # [bytes]
        ("desc_offset", c_uint32),  # [bytes]
        ("data_offset", c_uint32),  # [bytes]
    )


class KvmStatsDesc(ctypes.Structure):
    """``struct kvm_stats_desc``; `name` has `KvmStatsHeader.name_size` bytes and follows it."""

    _fields_ = (
        ("flags", c_uint32),
        ("exponent", ctypes.c_int16),
        ("size", c_uint16),  # [8-byte values]
        ("offset", c_uint32),  # [bytes] from data_offset
        ("bucket_size", c_uint32),
        ("name", c_char * 0),
    )
