"""TDX user-space ABI of *KVM TDX basic feature support, v17* (November 2023); v16 and v18 share it."""

import ctypes
from ctypes import c_uint8, c_uint32, c_uint64
from enum import IntEnum
from typing import Final

from uapi_ctypes.flexible import Flexible
from uapi_ctypes.kvm_state import KvmCpuid2, KvmCpuidEntry2
from uapi_ctypes.tdx_mainline import KvmTdxInitMemRegion as KvmTdxInitMemRegion


class KvmTdxCmdIdV17(IntEnum):
    """``kvm_tdx_cmd.id``."""

    KVM_TDX_CAPABILITIES = 0  # VM fd
    KVM_TDX_INIT_VM = 1  # VM fd
    KVM_TDX_INIT_VCPU = 2  # vCPU fd
    KVM_TDX_INIT_MEM_REGION = 3  # VM fd
    KVM_TDX_FINALIZE_VM = 4  # VM fd
    KVM_TDX_RELEASE_VM = 5  # VM fd


NO_SUB_LEAF: Final = 0xFFFF_FFFF
"""``kvm_tdx_cpuid_config.sub_leaf`` of a leaf without sub-leaves."""


class _ErrorUnion(ctypes.Union):
    _fields_ = (("error", c_uint64), ("hw_error", c_uint64))


class KvmTdxCmdV17(ctypes.Structure):
    """``struct kvm_tdx_cmd``; `error` can also be read by mainline's name, `hw_error`."""

    _anonymous_ = ("_error",)
    _fields_ = (
        ("id", c_uint32),  # KvmTdxCmdIdV17
        ("flags", c_uint32),  # per sub-command; zero when unused
        ("data", c_uint64),  # HVA of the sub-command's struct, or an immediate
        ("_error", _ErrorUnion),  # in: zero. out: RAX of the SEAMCALL that failed, else zero
    )


class KvmTdxCpuidConfig(ctypes.Structure):
    """``struct kvm_tdx_cpuid_config``: the module's CPUID_CONFIG, unfiltered."""

    _fields_ = (
        ("leaf", c_uint32),
        ("sub_leaf", c_uint32),  # NO_SUB_LEAF where there is none
        ("eax", c_uint32),
        ("ebx", c_uint32),
        ("ecx", c_uint32),
        ("edx", c_uint32),
    )


class KvmTdxCapabilitiesV17(Flexible[KvmTdxCpuidConfig]):
    """``struct kvm_tdx_capabilities``; the entries begin inside the padded header, at 2052.

    A bit may be one only where it is in fixed0, and must be one where it is in fixed1. `supported_gpaw` is 2
    on every kernel of that vintage whatever the hardware, by a slip of operator precedence.
    """

    _entry_ = KvmTdxCpuidConfig
    _count_ = "nr_cpuid_configs"
    _entries_offset_ = 2052
    _fields_ = (
        ("attrs_fixed0", c_uint64),
        ("attrs_fixed1", c_uint64),
        ("xfam_fixed0", c_uint64),
        ("xfam_fixed1", c_uint64),
        ("supported_gpaw", c_uint32),
        ("padding", c_uint32),
        ("reserved", c_uint64 * 251),
        ("nr_cpuid_configs", c_uint32),
    )


class KvmTdxInitVmV17(Flexible[KvmCpuidEntry2]):
    """``struct kvm_tdx_init_vm``: XFAM comes from CPUID 0xD, GPAW from CPUID 0x80000008."""

    _entry_ = KvmCpuidEntry2
    _count_ = "cpuid.nent"
    _fields_ = (
        ("attributes", c_uint64),
        ("mrconfigid", c_uint8 * 48),
        ("mrowner", c_uint8 * 48),
        ("mrownerconfig", c_uint8 * 48),
        ("reserved", c_uint64 * 1004),
        ("cpuid", KvmCpuid2),
    )
