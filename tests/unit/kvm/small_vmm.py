"""A VMM of a few lines for ordinary VMs: real-mode code at GPA 0x1000 in 64 KiB of memory."""

import ctypes
import errno
import mmap
import struct
import threading
import time
from collections.abc import Callable
from typing import Final, Self

from sim_backend.cpu.unicorn_engine import UnicornEngine
from sim_backend.hw.memory import PhysicalMemory
from sim_backend.kernel import SimKernel
from sim_backend.kvm.host import KvmHost
from sim_backend.kvm.host_pages import HostPages
from sim_backend.kvm.lp_pool import LpPool
from sim_backend.kvm.profile import load_profile
from sim_backend.kvm.vm_kinds import ordinary_vm_types
from uapi_ctypes.device import Kvm
from uapi_ctypes.errors import KvmError
from uapi_ctypes.kvm_state import KvmSegment
from uapi_ctypes.vcpu import Vcpu

CODE: Final = 0x1000
STACK: Final = 0x8000
MEMORY_BYTES: Final = 0x1_0000
RAM_BYTES: Final = 64 << 20


def ordinary_host(profile: str = "7.3", lps: int | None = None) -> KvmHost:
    """Return a host that has no TDX and next to no memory of its own."""
    data = load_profile(profile)
    memory = PhysicalMemory(RAM_BYTES)
    return KvmHost(
        profile=data,
        memory=memory,
        pages=HostPages(memory, [(1 << 20, RAM_BYTES)]),
        cpus=UnicornEngine(memory),
        seam=None,
        lps=LpPool(lps if lps is not None else data.n_cpus),
        vm_types=ordinary_vm_types(data),
    )


class UserMemory:
    """Anonymous memory of this process."""

    def __init__(self, length: int = MEMORY_BYTES) -> None:
        self.map = mmap.mmap(-1, length)
        anchor = ctypes.c_char.from_buffer(self.map)
        self.hva: Final = ctypes.addressof(anchor)
        self.length: Final = length
        del anchor

    def __setitem__(self, where: int, data: bytes) -> None:
        self.map[where : where + len(data)] = data

    def word(self, where: int) -> int:
        """Return the 32-bit word at `where`."""
        return int(struct.unpack_from("<I", self.map, where)[0])


class SmallVm:
    """One VM with one slot at GPA 0."""

    def __init__(
        self, kernel: SimKernel, code: bytes = b"\xf4", *, split: bool = False, n_vcpus: int = 1, vm_type: int = 0
    ) -> None:
        self.kernel = kernel
        self.kvm = Kvm(kernel)
        self.vm = self.kvm.create_vm(vm_type)
        self.memory = UserMemory()
        self.memory[CODE] = code
        if split:
            self.vm.enable_cap(121, 24)
        self.vm.set_user_memory_region(0, 0, MEMORY_BYTES, self.memory.hva)
        self.vcpus = [self.vm.create_vcpu(index) for index in range(n_vcpus)]
        for vcpu in self.vcpus:
            self.start(vcpu, CODE)
            if split:
                vcpu.set_lapic(vcpu.get_lapic())  # now messages can name the newest vCPU, too

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def vcpu(self) -> Vcpu:
        return self.vcpus[0]

    @staticmethod
    def start(vcpu: Vcpu, ip: int, *, rflags: int = 2) -> None:
        """Put the vCPU at CS 0, `ip`, with a stack."""
        sregs = vcpu.get_sregs()
        sregs.cs.base, sregs.cs.selector = 0, 0
        vcpu.set_sregs(sregs)
        regs = vcpu.get_regs()
        regs.rip, regs.rsp, regs.rflags = ip, STACK, rflags
        vcpu.set_regs(regs)

    def close(self) -> None:
        for vcpu in self.vcpus:
            vcpu.close()
        self.vm.close()
        self.kvm.close()


def flat_segment(selector: int, kind: int, *, long_mode: bool = False) -> KvmSegment:
    """Return a flat 4 GiB segment."""
    segment = KvmSegment(base=0, limit=0xFFFF_FFFF, selector=selector, type=kind, present=1, s=1, g=1)
    segment.db, segment.l = (0, 1) if long_mode else (1, 0)
    return segment


def errno_of(call: Callable[[], object]) -> str | None:
    """Return the name of the errno that `call` raises, or None."""
    try:
        call()
    except KvmError as error:
        return errno.errorcode[error.errno or 0]
    return None


def in_thread(call: Callable[[], object]) -> tuple[threading.Thread, list[object]]:
    """Start `call` in a thread; the list gets its result, or the errno name."""
    result: list[object] = []

    def body() -> None:
        try:
            result.append(call())
        except KvmError as error:
            result.append(errno.errorcode[error.errno or 0])

    thread = threading.Thread(target=body, daemon=True)
    thread.start()
    return thread, result


def wait_until(condition: Callable[[], bool], limit_s: float = 5.0) -> None:
    """Wait for `condition`; fail after `limit_s` [s]."""
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.001)
