"""A small VMM for the unit tests: builds a TD step by step and serves what its guest program asks for."""

import ctypes
import mmap
import threading
from collections.abc import Callable, Sequence
from typing import Any, Final, Self

from sim_backend.kvm.tdx.ops import TdxOps
from sim_backend.machine import Machine
from tests.unit.kvm.tdx.guest_code import IMAGE_BYTES, IMAGE_GPA, REPORT_GPA, S_BIT, Program, image
from uapi_ctypes.device import Kvm
from uapi_ctypes.dialect import MAINLINE, V17, Dialect
from uapi_ctypes.errors import KvmError
from uapi_ctypes.guest_memfd import GuestMemfd
from uapi_ctypes.kvm_run import KvmExit
from uapi_ctypes.kvm_state import KvmCpuid2, KvmCpuidEntry2
from uapi_ctypes.tdx_mainline import KvmTdxInitMemRegion, KvmTdxInitVm
from uapi_ctypes.tdx_v17 import KvmTdxInitVmV17
from uapi_ctypes.vcpu import Vcpu
from uapi_ctypes.vm import Vm

PRIVATE: Final = 8
GUEST_MEMFD: Final = 4
MEASURE: Final = 1
SPLIT_IRQCHIP, X2APIC_API, EXIT_HYPERCALL = 121, 129, 201
LOW_BYTES: Final = 0x20_0000
GPAW48: Final = 48 << 16
X2APIC: Final = 1 << 21


class UserMemory:
    """Anonymous memory of this process."""

    def __init__(self, length: int) -> None:
        self.map = mmap.mmap(-1, length)
        anchor = ctypes.c_char.from_buffer(self.map)
        self.hva: Final = ctypes.addressof(anchor)
        del anchor

    def write(self, data: bytes, offset: int = 0) -> None:
        self.map[offset : offset + len(data)] = data

    def protect(self, offset: int, length: int, *, writable: bool = False) -> None:
        """Take every access away, or give read and write back."""
        protection = mmap.PROT_READ | mmap.PROT_WRITE if writable else 0
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(self.hva + offset), length, protection) == 0

    def read(self, offset: int, length: int) -> bytes:
        return self.map[offset : offset + length]


def cpuid_entry(function: int, index: int = 0, flags: int = 0, **registers: int) -> KvmCpuidEntry2:
    entry = KvmCpuidEntry2(function, index, flags)
    for name, value in registers.items():
        setattr(entry, name, value)
    return entry


V17_CONFIGURED: Final = [
    cpuid_entry(1, ecx=X2APIC),
    cpuid_entry(0x8000_0000, eax=0x8000_0008),
    cpuid_entry(0x8000_0008, eax=48),
]
"""What KVM_TDX_INIT_VM and KVM_SET_CPUID2 have to agree on."""


class TestTd:
    """One TD. Each step is a method; `build` takes all of them for a program."""

    __test__ = False

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.v17 = machine.profile.dialect == "v17"
        self.dialect: Dialect = V17 if self.v17 else MAINLINE
        self.kvm = Kvm(machine.kernel())
        self.vm: Vm = self.kvm.create_vm(2 if self.v17 else 5, dialect=self.dialect)
        self.vcpus: list[Vcpu] = []
        self.gmem0: GuestMemfd
        self.gmem1: GuestMemfd
        self.image_source = UserMemory(IMAGE_BYTES)
        self.low = UserMemory(LOW_BYTES)
        self.reported: list[int] = []
        self._kept: list[object] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for vcpu in self.vcpus:
            vcpu.close()
        self.vm.close()
        self.kvm.close()

    # ---- steps ------------------------------------------------------------------------------------------

    def enable_caps(self) -> Self:
        self.vm.enable_cap(X2APIC_API, 3)
        self.vm.enable_cap(SPLIT_IRQCHIP, 24)
        if not self.v17:
            self.vm.enable_cap(EXIT_HYPERCALL, 1 << 12)
        return self

    def init_vm(self, attributes: int = 0, xfam: int = 3, entries: list[KvmCpuidEntry2] | None = None) -> Self:
        self.vm.tdx_init_vm(self.init_vm_argument(attributes, xfam, entries))
        return self

    def init_vm_argument(self, attributes: int = 0, xfam: int = 3, entries: list[KvmCpuidEntry2] | None = None) -> Any:
        if self.v17:
            given = entries if entries is not None else [cpuid_entry(0xD, 0, 1, eax=xfam), *V17_CONFIGURED]
            init17 = KvmTdxInitVmV17.of(given)
            init17.attributes = attributes
            return init17
        init = KvmTdxInitVm.of(entries if entries is not None else [cpuid_entry(0x8000_0008, eax=GPAW48)])
        init.attributes, init.xfam = attributes, xfam
        return init

    def add_memory(self) -> Self:
        """Slot 0: the image; slot 1: 2 MiB from GPA 0. Both private, both with user memory for sharing."""
        self.gmem0 = self._add_slot(0, IMAGE_GPA, self.image_source, IMAGE_BYTES)
        self.gmem1 = self._add_slot(1, 0, self.low, LOW_BYTES)
        return self

    def _add_slot(self, slot: int, gpa: int, memory: UserMemory, length: int) -> GuestMemfd:
        gmem = self.vm.create_guest_memfd(length)
        self.vm.set_user_memory_region2(slot, gpa, length, memory.hva, GUEST_MEMFD, guest_memfd=gmem.fd)
        self.vm.set_memory_attributes(gpa, length, PRIVATE)
        return gmem

    def create_vcpu(self, vcpu_id: int = 0, rcx: int = 0, *, init: bool = True) -> Vcpu:
        vcpu = self.vm.create_vcpu(vcpu_id)
        self.vcpus.append(vcpu)
        if init:
            self.set_cpuid(vcpu)
            vcpu.tdx_init_vcpu(rcx)
        return vcpu

    def set_cpuid(self, vcpu: Vcpu) -> None:
        if self.v17:
            vcpu.set_cpuid2(KvmCpuid2.of(V17_CONFIGURED))
            return
        entries = [
            cpuid_entry(0, eax=0x21, ebx=0x756E6547, ecx=0x6C65746E, edx=0x49656E69),
            cpuid_entry(1, eax=0x806F8, ecx=X2APIC),
            cpuid_entry(0x8000_0000, eax=0x8000_0008),
            cpuid_entry(0x8000_0008, eax=GPAW48 | 0x3034),
        ]
        vcpu.set_cpuid2(KvmCpuid2.of(entries))

    def add_image(self, program: Program, flags: int = MEASURE) -> Self:
        self.image_source.write(image(program))
        region = KvmTdxInitMemRegion(self.image_source.hva, IMAGE_GPA, IMAGE_BYTES // 4096)
        self.vcpus[0].tdx_init_mem_region(region, flags)
        assert region.nr_pages == 0
        return self

    def finalize(self) -> Self:
        self.vm.tdx_finalize_vm()
        return self

    def build(self, program: Program, *, attributes: int = 0, n_vcpus: int = 1, rcx: int = 0) -> Self:
        self.enable_caps().init_vm(attributes)
        self.add_memory()
        for vcpu_id in range(n_vcpus):
            self.create_vcpu(vcpu_id, rcx)
        return self.add_image(program).finalize()

    def read_only_copy(self, structure: ctypes.Structure) -> int:
        """Return the address of a copy that the kernel can read and not write."""
        contents = ctypes.string_at(ctypes.addressof(structure), ctypes.sizeof(structure))
        length = -(-len(contents) // 4096) * 4096
        page = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        page.write(contents)
        anchor = ctypes.c_char.from_buffer(page)
        address = ctypes.addressof(anchor)
        self._kept.append((page, anchor))
        libc = ctypes.CDLL(None)
        assert libc.mprotect(ctypes.c_void_p(address), length, mmap.PROT_READ) == 0
        return address

    @property
    def ops(self) -> TdxOps:
        """KVM's own side of the TD that was created last."""
        ops = self.machine.host.vms[-1].ops
        assert isinstance(ops, TdxOps)
        return ops

    # ---- running ----------------------------------------------------------------------------------------

    @property
    def vcpu(self) -> Vcpu:
        return self.vcpus[0]

    def end_runs(self, threads: Sequence[threading.Thread]) -> None:
        """Kick the vCPUs out of KVM_RUN and see to it that the threads that ran them, and others, end in 10 s each."""
        for vcpu in self.vcpus:
            vcpu.kvm_run.immediate_exit = 1
        self.machine.host.vms[-1].kick_all()
        for thread in threads:
            thread.join(10)
        assert not any(thread.is_alive() for thread in threads), "a thread is stuck"

    def run(self, vcpu: Vcpu | None = None) -> int:
        """Run to the next exit that is not a report; reported values are collected in `reported`."""
        vcpu = vcpu if vcpu is not None else self.vcpu
        while True:
            reason = vcpu.run()
            mmio = vcpu.kvm_run.mmio
            if reason != KvmExit.KVM_EXIT_MMIO or mmio.phys_addr != REPORT_GPA or not mmio.is_write:
                return reason
            self.reported.append(int.from_bytes(bytes(mmio.data), "little"))

    def run_to_end(self, vcpu: Vcpu | None = None) -> list[int]:
        """Run until the program says it is done; return what it reported."""
        vcpu = vcpu if vcpu is not None else self.vcpu
        reason = self.run(vcpu)
        assert reason == KvmExit.KVM_EXIT_IO, KvmExit.name_of(reason)
        assert vcpu.kvm_run.io.port == 0x30
        return self.reported


def shared(gpa: int) -> int:
    return gpa | S_BIT


def error_of(call: Callable[[], object]) -> int:
    """Return the errno of `call`, 0 for success."""
    try:
        call()
    except KvmError as error:
        return error.errno or 0
    return 0
