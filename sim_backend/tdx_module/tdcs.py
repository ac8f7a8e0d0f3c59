"""TDCS: the control structure of a TD. Fields are named as in the metadata tables, in lower case."""

import hashlib
from typing import Protocol

from sim_backend.tdx_module.cpuid_virtualization import CpuidFlags
from sim_backend.tdx_module.locks import HostPriorityLock, SharexLock
from sim_backend.tdx_module.mrtd import Measurement
from sim_backend.tdx_module.msr_virtualization import NOTHING_NATIVE
from sim_backend.tdx_module.op_states import OpState

ROOT_SEPT_PAGE = 3
MSR_BITMAP_PAGE = 2
ZERO_PAGE = 4
MIGSC_LINKS_PAGE = 5
MIN_TDCS_PAGES = 6
NEVER_WALKED = -1
MAX_TDCS_PAGES = 9
MRTD_OFFSET = 0x240
RTMR_OFFSET = 0x300
"""Where the measurements are in the first TDCS page, for who looks at memory [bytes]."""


class ServiceTdBinding(Protocol):
    """A service-TD binding slot, as TDH.MR.FINALIZE sees it."""

    @property
    def is_bound(self) -> bool:
        """False in the state NOT_BOUND."""
        ...

    def hash_input(self) -> bytes:
        """Return SERVTD_INFO_HASH (48 bytes), SERVTD_TYPE (u16) and SERVTD_ATTR (u64)."""
        ...

    def encode(self) -> bytes:
        """Return the slot as the metadata shows it [128 bytes]."""
        ...


class Tdcs:
    """The fields of a TDCS. Arrays are lists of 64-bit values.

    TDCS pages that guests or hardware look into are real memory: MSR bitmaps, Secure EPT root, zero page and
    migration links are at TDR.TDCX_PA[2..5]. The rest lives here.
    """

    __slots__ = (
        "attributes",
        "bw_epoch",
        "config_flags",
        "cpuid_flags",
        "cpuid_valid",
        "cpuid_values",
        "dirty_count",
        "epoch_lock",
        "eptp",
        "export_count",
        "fields",
        "gpaw",
        "hp_lock_timeout",
        "import_count",
        "l2_sept_root",
        "max_vcpus",
        "measurement",
        "mig_count",
        "mig_dec_key",
        "mig_dec_key_set",
        "mig_dec_working_key",
        "mig_enc_key",
        "mig_enc_working_key",
        "mig_epoch",
        "mig_version",
        "mig_working_version",
        "mrconfigid",
        "mrowner",
        "mrownerconfig",
        "mrtd",
        "msr_bitmap",
        "notify_enables",
        "num_assoc_vcpus",
        "num_cpuid_values",
        "num_l2_vms",
        "num_migrated_vcpus",
        "num_migs",
        "num_vcpus",
        "op_state",
        "op_state_lock",
        "pre_import_uuid",
        "pwl",
        "refcount",
        "rtmr",
        "rtmr_lock",
        "sept_lock",
        "sept_root",
        "servtd_bindings",
        "servtd_bindings_lock",
        "servtd_hash",
        "servtd_num",
        "shared_bit",
        "td_ctls",
        "td_epoch",
        "tee_info_hash",
        "total_mb_count",
        "tsc_frequency",
        "tsc_multiplier",
        "tsc_offset",
        "virtual_ia32_arch_capabilities",
        "virtual_tsc",
        "virtual_vmx_msrs",
        "vm_ctls",
        "walked_range",
        "walked_table",
        "xbuff_offsets",
        "xbuff_size",
        "xfam",
    )

    def __init__(self) -> None:
        # Management
        self.num_vcpus = 0
        self.num_assoc_vcpus = 0
        self.op_state: int = OpState.UNINITIALIZED
        self.num_l2_vms = 0
        # Execution controls
        self.attributes = 0
        self.xfam = 0
        self.max_vcpus = 0
        self.gpaw = False
        self.eptp = 0
        self.tsc_offset = 0
        self.tsc_multiplier = 0
        self.tsc_frequency = 0  # [25 MHz]
        self.virtual_tsc = 0
        self.num_cpuid_values = 0
        self.xbuff_size = 0
        self.notify_enables = 0
        self.hp_lock_timeout = 0  # [TSC ticks]; metadata reads and writes [us]
        self.vm_ctls = [0, 0, 0, 0]
        self.config_flags = 0
        self.td_ctls = 0
        self.cpuid_valid = [0] * 80
        self.xbuff_offsets = [0] * 19
        # TLB epoch tracking
        self.td_epoch = 0
        self.refcount = [0, 0]
        # Measurement
        self.mrtd = bytes(48)
        self.mrconfigid = bytes(48)
        self.mrowner = bytes(48)
        self.mrownerconfig = bytes(48)
        self.rtmr = [bytes(48) for _ in range(4)]
        self.measurement = Measurement()  # MRTD in the making
        self.tee_info_hash: bytes | None = None  # cached by TDG.MR.REPORT until an RTMR changes
        # CPUID and MSRs: values as pairs (EAX | EBX << 32, ECX | EDX << 32)
        self.cpuid_values: list[tuple[int, int]] = [(0, 0)] * 80
        self.virtual_ia32_arch_capabilities = 0
        self.cpuid_flags = CpuidFlags()
        self.msr_bitmap = NOTHING_NATIVE
        self.virtual_vmx_msrs: dict[int, int] = {}
        # Migration
        self.mig_dec_key_set = False
        self.export_count = 0
        self.import_count = 0
        self.mig_epoch = 0
        self.bw_epoch = 0
        self.total_mb_count = 0
        self.mig_dec_key = [0, 0, 0, 0]
        self.mig_dec_working_key = [0, 0, 0, 0]
        self.mig_enc_key = [0, 0, 0, 0]
        self.mig_enc_working_key = [0, 0, 0, 0]
        self.mig_version = 0
        self.mig_working_version = 0
        self.dirty_count = 0
        self.mig_count = 0
        self.num_migs = 0
        self.num_migrated_vcpus = 0
        self.pre_import_uuid = [0, 0, 0, 0]
        # Service TD
        self.servtd_hash = bytes(48)
        self.servtd_num = 0
        self.servtd_bindings: list[ServiceTdBinding] = []
        # Derived by TDH.MNG.INIT, for the walk
        self.pwl = 0  # level of the Secure EPT root: 3 or 4
        self.shared_bit = 0  # number of the GPA's SHARED bit: 47 or 51
        self.sept_root = 0  # HPA
        self.l2_sept_root = [0, 0, 0]  # HPAs
        self.walked_range = NEVER_WALKED  # GPA >> 21 of the last walk to a 4 KiB entry
        self.walked_table = 0  # word index of the table where it ended
        # Locks
        self.op_state_lock = HostPriorityLock()
        self.rtmr_lock = HostPriorityLock()
        self.servtd_bindings_lock = HostPriorityLock()
        self.sept_lock = SharexLock()
        self.epoch_lock = SharexLock()
        self.fields: dict[int, int] = {}  # metadata field id -> value, for fields with no attribute

    @property
    def is_debug(self) -> bool:
        """ATTRIBUTES.DEBUG."""
        return bool(self.attributes & 1)

    def service_td_hash(self) -> bytes:
        """Return SERVTD_HASH as TDH.MR.FINALIZE computes it: zeros when no service TD is bound."""
        bound = sorted(slot.hash_input() for slot in self.servtd_bindings if slot.is_bound)
        return hashlib.sha384(b"".join(bound)).digest() if bound else bytes(48)
