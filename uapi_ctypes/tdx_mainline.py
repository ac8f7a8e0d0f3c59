"""TDX user-space ABI of Linux 6.16, unchanged up to 7.3. Source: x86 `include/uapi/asm/kvm.h`."""

import ctypes
from ctypes import c_uint8, c_uint32, c_uint64
from enum import IntEnum
from typing import Final

from uapi_ctypes.flexible import Flexible
from uapi_ctypes.kvm_state import KvmCpuid2, KvmCpuidEntry2


class KvmTdxCmdId(IntEnum):
    """``kvm_tdx_cmd.id``."""

    KVM_TDX_CAPABILITIES = 0  # VM fd
    KVM_TDX_INIT_VM = 1  # VM fd
    KVM_TDX_INIT_VCPU = 2  # vCPU fd
    KVM_TDX_INIT_MEM_REGION = 3  # vCPU fd
    KVM_TDX_FINALIZE_VM = 4  # VM fd
    KVM_TDX_GET_CPUID = 5  # vCPU fd


KVM_TDX_MEASURE_MEMORY_REGION: Final = 1
"""``kvm_tdx_cmd.flags`` of KVM_TDX_INIT_MEM_REGION: extend MRTD with the contents."""


class TdAttribute(IntEnum):
    """Bit numbers of a TD's ATTRIBUTES. Mainline KVM accepts only SEPT_VE_DISABLE."""

    DEBUG = 0
    HGS_PLUS_PROF = 4
    PERF_PROF = 5
    PMT_PROF = 6
    ICSSD = 16
    LASS = 27
    SEPT_VE_DISABLE = 28
    MIGRATABLE = 29
    PKS = 30
    KL = 31
    TPA = 62
    PERFMON = 63

    @property
    def mask(self) -> int:
        """The bit itself."""
        return 1 << self


class KvmTdxCmd(ctypes.Structure):
    """``struct kvm_tdx_cmd``."""

    _fields_ = (
        ("id", c_uint32),  # KvmTdxCmdId
        ("flags", c_uint32),  # per sub-command; zero when unused
        ("data", c_uint64),  # HVA of the sub-command's struct, or an immediate
        ("hw_error", c_uint64),  # in: zero. out: RAX of the SEAMCALL that failed, else zero
    )


class KvmTdxCapabilities(Flexible[KvmCpuidEntry2]):
    """``struct kvm_tdx_capabilities``: entries hold the directly configurable CPUID bits as ones."""

    _entry_ = KvmCpuidEntry2
    _count_ = "cpuid.nent"
    _fields_ = (
        ("supported_attrs", c_uint64),
        ("supported_xfam", c_uint64),
        ("kernel_tdvmcallinfo_1_r11", c_uint64),  # sub-functions that the kernel serves
        ("user_tdvmcallinfo_1_r11", c_uint64),  # sub-functions that user space may serve
        ("kernel_tdvmcallinfo_1_r12", c_uint64),
        ("user_tdvmcallinfo_1_r12", c_uint64),
        ("reserved", c_uint64 * 250),
        ("cpuid", KvmCpuid2),
    )


class KvmTdxInitVm(Flexible[KvmCpuidEntry2]):
    """``struct kvm_tdx_init_vm``."""

    _entry_ = KvmCpuidEntry2
    _count_ = "cpuid.nent"
    _fields_ = (
        ("attributes", c_uint64),
        ("xfam", c_uint64),
        ("mrconfigid", c_uint8 * 48),
        ("mrowner", c_uint8 * 48),
        ("mrownerconfig", c_uint8 * 48),
        ("reserved", c_uint64 * 12),
        ("cpuid", KvmCpuid2),
    )


class KvmTdxInitMemRegion(ctypes.Structure):
    """``struct kvm_tdx_init_mem_region``. The kernel rewrites all three to show how far it got."""

    _fields_ = (
        ("source_addr", c_uint64),  # HVA [bytes, 4 KiB-aligned]
        ("gpa", c_uint64),  # GPA [bytes, 4 KiB-aligned], private
        ("nr_pages", c_uint64),  # [4 KiB pages], at least 1
    )
