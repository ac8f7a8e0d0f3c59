"""TDVPS: the state of one virtual CPU. Fields are named as in the metadata tables, in lower case."""

from enum import IntEnum
from types import MappingProxyType
from typing import Final

from sim_backend.cpu.engine import Cpu
from sim_backend.tdx_module.tdr import Tdr
from sim_backend.tdx_module.ve_info import VeInfo
from uapi_ctypes.tdx_leaves import SeamcallLeaf

MIN_TDVPS_PAGES = 6
TDVPS_PAGES_PER_L2_VM = 3
MAX_TDVPS_PAGES = 15
VAPIC_PAGE = 2
"""The TDVPS page that is the virtual-APIC page."""
NO_LP = 0xFFFF_FFFF
"""ASSOC_LPID of a vCPU that is associated with no LP."""


class VcpuState(IntEnum):
    """TDVPS.VCPU_STATE."""

    UNINITIALIZED = 0
    READY = 2
    ACTIVE = 4
    DISABLED = 8
    IMPORT = 16


_V = VcpuState

# fmt: off
TRANSITIONS: Final = MappingProxyType({
    # from              event                             to
    (_V.UNINITIALIZED,  SeamcallLeaf.TDH_VP_INIT.name):  _V.READY,
    (_V.READY,          SeamcallLeaf.TDH_VP_ENTER.name): _V.ACTIVE,
    (_V.ACTIVE,         "TD exit"):                      _V.READY,
    (_V.ACTIVE,         "triple fault"):                 _V.DISABLED,
})
# fmt: on


class LastTdExit(IntEnum):
    """TDVPS.LAST_TD_EXIT."""

    ASYNC_FAULT = 0
    ASYNC_TRAP = 1
    TDVMCALL = 2


class Tdvps:
    """The fields of a TDVPS that the model keeps; `cpu` holds the guest's registers while it does not run."""

    __slots__ = (
        "assoc_lpid",
        "bus_lock_preempted",
        "cpu",
        "cpuid_control",
        "cpuid_supervisor_ve",
        "cpuid_user_ve",
        "curr_vm",
        "fields",
        "held",
        "hp_lock_busy",
        "hp_lock_busy_start",
        "hpa",
        "last_epf_gpa_list",
        "last_epf_gpa_list_idx",
        "last_exit_tsc",
        "last_td_exit",
        "num_tdvps_pages",
        "pamt_path",
        "pend_nmi",
        "possibly_epf_stepping",
        "rip_on_entry",
        "tdr",
        "tdvps_page_pa",
        "vcpu_epoch",
        "vcpu_index",
        "vcpu_state",
        "ve_info",
        "vmcs",
        "x2apic_id",
        "xfam",
    )

    def __init__(self, hpa: int, tdr: Tdr, pamt_path: tuple[int, int, int, int]) -> None:
        self.hpa = hpa
        self.tdr = tdr
        self.pamt_path = pamt_path  # `Pamt.path` of the TDVPR page and its TDR
        self.cpu: Cpu | None = None  # from TDH.VP.INIT on
        self.num_tdvps_pages = 1
        self.tdvps_page_pa = [hpa]
        self.vcpu_state: int = VcpuState.UNINITIALIZED
        self.vcpu_index = 0
        self.assoc_lpid = NO_LP
        self.vcpu_epoch = 0
        self.bus_lock_preempted = False  # a bus lock that another exit overtook, not reported to the host yet
        self.cpuid_supervisor_ve = 0
        self.cpuid_user_ve = 0
        self.last_exit_tsc = 0
        self.pend_nmi = 0
        self.xfam = 0
        self.x2apic_id = 0  # TDH.VP.INIT version 1 only
        self.last_epf_gpa_list_idx = 0
        self.possibly_epf_stepping = 0
        self.rip_on_entry = 0  # guest RIP at the last TDH.VP.ENTER, for the zero-step defence
        self.last_td_exit: int = LastTdExit.ASYNC_FAULT
        self.hp_lock_busy_start = 0
        self.hp_lock_busy = False
        self.curr_vm = 0
        self.cpuid_control = bytearray(128)
        self.last_epf_gpa_list = [0] * 32
        self.vmcs: dict[int, int] = {}  # TD VMCS encoding -> value, beyond what `cpu` holds
        self.ve_info = VeInfo()
        self.held: list[int] = []  # PAMT locks that VP.ENTER keeps while the guest runs
        self.fields: dict[int, int] = {}  # metadata field id -> value, for fields with no attribute


def needed_tdvps_pages(num_l2_vms: int) -> int:
    """Return how many pages the TDVPS of a TD with `num_l2_vms` L2 VMs must have before it can be used."""
    return MIN_TDVPS_PAGES + TDVPS_PAGES_PER_L2_VM * num_l2_vms
