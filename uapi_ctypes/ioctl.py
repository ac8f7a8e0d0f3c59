"""ioctl numbers: how they are made, and every request that KVM's x86 user space may issue.

The whole 32-bit number identifies a request: several share their low byte (KVM_SET_TSC_KHZ and
KVM_SET_DEBUGREGS, KVM_ENABLE_CAP and KVM_GET_TSC_KHZ, ...). Source: `include/uapi/asm-generic/ioctl.h`,
`include/uapi/linux/kvm.h`.
"""

from enum import IntEnum
from typing import Final

KVMIO: Final = 0xAE

IOC_NONE: Final = 0
IOC_WRITE: Final = 1
IOC_READ: Final = 2


def _ioc(direction: int, nr: int, size: int) -> int:
    return direction << 30 | size << 16 | KVMIO << 8 | nr


def io(nr: int) -> int:
    """Return the number of a request without a structure, as ``_IO(KVMIO, nr)``."""
    return _ioc(IOC_NONE, nr, 0)


def ior(nr: int, size: int) -> int:
    """Return the number of a request that reads `size` [bytes] from the kernel, as ``_IOR``."""
    return _ioc(IOC_READ, nr, size)


def iow(nr: int, size: int) -> int:
    """Return the number of a request that writes `size` [bytes] to the kernel, as ``_IOW``."""
    return _ioc(IOC_WRITE, nr, size)


def iowr(nr: int, size: int) -> int:
    """Return the number of a request that does both with `size` [bytes], as ``_IOWR``."""
    return _ioc(IOC_READ | IOC_WRITE, nr, size)


def size_of(request: int) -> int:
    """Return the size [bytes] of the structure that `request` carries; 0 for none."""
    return request >> 16 & 0x3FFF


def name_of(request: int) -> str:
    """Return the symbolic name of `request`, or its number in hex."""
    return _NAMES.get(request) or f"ioctl {request:#x}"


class KvmRequest(IntEnum):
    """Every request, by the kernel's name, ordered by number."""

    KVM_GET_API_VERSION = io(0x00)
    KVM_CREATE_VM = io(0x01)
    KVM_GET_MSR_INDEX_LIST = iowr(0x02, 4)
    KVM_CHECK_EXTENSION = io(0x03)
    KVM_GET_VCPU_MMAP_SIZE = io(0x04)
    KVM_GET_SUPPORTED_CPUID = iowr(0x05, 8)
    KVM_GET_EMULATED_CPUID = iowr(0x09, 8)
    KVM_GET_MSR_FEATURE_INDEX_LIST = iowr(0x0A, 4)
    KVM_CREATE_VCPU = io(0x41)
    KVM_GET_DIRTY_LOG = iow(0x42, 16)
    KVM_SET_NR_MMU_PAGES = io(0x44)
    KVM_GET_NR_MMU_PAGES = io(0x45)
    KVM_SET_USER_MEMORY_REGION = iow(0x46, 32)
    KVM_SET_TSS_ADDR = io(0x47)
    KVM_SET_IDENTITY_MAP_ADDR = iow(0x48, 8)
    KVM_SET_USER_MEMORY_REGION2 = iow(0x49, 160)
    KVM_CREATE_IRQCHIP = io(0x60)
    KVM_IRQ_LINE = iow(0x61, 8)
    KVM_GET_IRQCHIP = iowr(0x62, 520)
    KVM_SET_IRQCHIP = ior(0x63, 520)
    KVM_CREATE_PIT = io(0x64)
    KVM_GET_PIT = iowr(0x65, 72)
    KVM_SET_PIT = ior(0x66, 72)
    KVM_REGISTER_COALESCED_MMIO = iow(0x67, 16)
    KVM_IRQ_LINE_STATUS = iowr(0x67, 8)
    KVM_UNREGISTER_COALESCED_MMIO = iow(0x68, 16)
    KVM_SET_GSI_ROUTING = iow(0x6A, 8)
    KVM_REINJECT_CONTROL = io(0x71)
    KVM_IRQFD = iow(0x76, 32)
    KVM_CREATE_PIT2 = iow(0x77, 64)
    KVM_SET_BOOT_CPU_ID = io(0x78)
    KVM_IOEVENTFD = iow(0x79, 64)
    KVM_XEN_HVM_CONFIG = iow(0x7A, 56)
    KVM_SET_CLOCK = iow(0x7B, 48)
    KVM_GET_CLOCK = ior(0x7C, 48)
    KVM_RUN = io(0x80)
    KVM_GET_REGS = ior(0x81, 144)
    KVM_SET_REGS = iow(0x82, 144)
    KVM_GET_SREGS = ior(0x83, 312)
    KVM_SET_SREGS = iow(0x84, 312)
    KVM_TRANSLATE = iowr(0x85, 24)
    KVM_INTERRUPT = iow(0x86, 4)
    KVM_GET_MSRS = iowr(0x88, 8)
    KVM_SET_MSRS = iow(0x89, 8)
    KVM_SET_CPUID = iow(0x8A, 8)
    KVM_SET_SIGNAL_MASK = iow(0x8B, 4)
    KVM_GET_FPU = ior(0x8C, 416)
    KVM_SET_FPU = iow(0x8D, 416)
    KVM_GET_LAPIC = ior(0x8E, 1024)
    KVM_SET_LAPIC = iow(0x8F, 1024)
    KVM_SET_CPUID2 = iow(0x90, 8)
    KVM_GET_CPUID2 = iowr(0x91, 8)
    KVM_TPR_ACCESS_REPORTING = iowr(0x92, 40)
    KVM_SET_VAPIC_ADDR = iow(0x93, 8)
    KVM_GET_MP_STATE = ior(0x98, 4)
    KVM_SET_MP_STATE = iow(0x99, 4)
    KVM_NMI = io(0x9A)
    KVM_SET_GUEST_DEBUG = iow(0x9B, 72)
    KVM_X86_SETUP_MCE = iow(0x9C, 8)
    KVM_X86_GET_MCE_CAP_SUPPORTED = ior(0x9D, 8)
    KVM_X86_SET_MCE = iow(0x9E, 64)
    KVM_GET_VCPU_EVENTS = ior(0x9F, 64)
    KVM_GET_PIT2 = ior(0x9F, 112)
    KVM_SET_VCPU_EVENTS = iow(0xA0, 64)
    KVM_SET_PIT2 = iow(0xA0, 112)
    KVM_GET_DEBUGREGS = ior(0xA1, 128)
    KVM_SET_TSC_KHZ = io(0xA2)
    KVM_SET_DEBUGREGS = iow(0xA2, 128)
    KVM_GET_TSC_KHZ = io(0xA3)
    KVM_ENABLE_CAP = iow(0xA3, 104)
    KVM_GET_XSAVE = ior(0xA4, 4096)
    KVM_SIGNAL_MSI = iow(0xA5, 32)
    KVM_SET_XSAVE = iow(0xA5, 4096)
    KVM_GET_XCRS = ior(0xA6, 392)
    KVM_SET_XCRS = iow(0xA7, 392)
    KVM_GET_ONE_REG = iow(0xAB, 16)
    KVM_SET_ONE_REG = iow(0xAC, 16)
    KVM_KVMCLOCK_CTRL = io(0xAD)
    KVM_GET_REG_LIST = iowr(0xB0, 8)
    KVM_SET_PMU_EVENT_FILTER = iow(0xB2, 32)
    KVM_SMI = io(0xB7)
    KVM_MEMORY_ENCRYPT_OP = iowr(0xBA, 8)
    KVM_MEMORY_ENCRYPT_REG_REGION = ior(0xBB, 16)
    KVM_MEMORY_ENCRYPT_UNREG_REGION = ior(0xBC, 16)
    KVM_HYPERV_EVENTFD = iow(0xBD, 24)
    KVM_GET_NESTED_STATE = iowr(0xBE, 128)
    KVM_SET_NESTED_STATE = iow(0xBF, 128)
    KVM_CLEAR_DIRTY_LOG = iowr(0xC0, 24)
    KVM_GET_SUPPORTED_HV_CPUID = iowr(0xC1, 8)
    KVM_X86_SET_MSR_FILTER = iow(0xC6, 392)
    KVM_RESET_DIRTY_RINGS = io(0xC7)
    KVM_XEN_HVM_GET_ATTR = iowr(0xC8, 72)
    KVM_XEN_HVM_SET_ATTR = iow(0xC9, 72)
    KVM_XEN_VCPU_GET_ATTR = iowr(0xCA, 72)
    KVM_XEN_VCPU_SET_ATTR = iow(0xCB, 72)
    KVM_GET_SREGS2 = ior(0xCC, 320)
    KVM_SET_SREGS2 = iow(0xCD, 320)
    KVM_GET_STATS_FD = io(0xCE)
    KVM_GET_XSAVE2 = ior(0xCF, 4096)
    KVM_XEN_HVM_EVTCHN_SEND = iow(0xD0, 12)
    KVM_SET_MEMORY_ATTRIBUTES = iow(0xD2, 32)
    KVM_CREATE_GUEST_MEMFD = iowr(0xD4, 64)
    KVM_PRE_FAULT_MEMORY = iowr(0xD5, 64)
    KVM_CREATE_DEVICE = iowr(0xE0, 12)
    KVM_SET_DEVICE_ATTR = iow(0xE1, 24)
    KVM_GET_DEVICE_ATTR = iow(0xE2, 24)
    KVM_HAS_DEVICE_ATTR = iow(0xE3, 24)


KVM_SET_MEMORY_ATTRIBUTES_V16: Final = iow(0xD3, 32)
"""KVM_SET_MEMORY_ATTRIBUTES as numbered in v16 of the series; v17 and mainline use 0xD2."""

_NAMES: Final = {int(request): request.name for request in KvmRequest}
