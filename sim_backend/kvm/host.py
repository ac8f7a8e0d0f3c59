"""What the KVM model needs from the machine it runs on, handed in by `sim_backend.machine`."""

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sim_backend.cpu.engine import CpuFactory
from sim_backend.hw.memory import PhysicalMemory
from sim_backend.kvm.host_pages import HostPages
from sim_backend.kvm.lp_pool import LpPool
from sim_backend.kvm.ops import VmOpsFactory
from sim_backend.kvm.profile import HostProfile
from sim_backend.kvm.seam import Seam

if TYPE_CHECKING:
    from sim_backend.kvm.vm import Vm


@dataclass(slots=True)
class KvmHost:
    """One booted host."""

    profile: HostProfile
    memory: PhysicalMemory
    pages: HostPages
    cpus: CpuFactory
    seam: Seam | None  # None: no SEAM on this machine, TDX is off
    lps: LpPool
    vm_types: Mapping[int, VmOpsFactory]  # KVM_CREATE_VM type -> the operations of such a VM
    vms: "list[Vm]" = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
