"""The simulated /dev/kvm against the real one: system calls, exits, life cycles."""

import hashlib
import os
import time
from collections.abc import Callable, Iterator

from bench.measure import BATCHES, Figure, compare, duration, seconds_per_call
from tdxhw.backends.sim import SimHost
from tdxhw.guest.layout import IMAGE_BYTES
from tdxhw.guest.payload import load
from tdxhw.ordinary_vm import OrdinaryVm
from tdxhw.td import TrustDomain
from uapi_ctypes.caps import KvmCap
from uapi_ctypes.device import Kvm
from uapi_ctypes.dialect import MAINLINE
from uapi_ctypes.kernel import Kernel
from uapi_ctypes.kvm import KVM_MEMORY_ATTRIBUTE_PRIVATE, KvmPreFaultMemory
from uapi_ctypes.kvm_run import KvmExit
from uapi_ctypes.linux import LinuxKernel
from uapi_ctypes.mapping import anonymous
from uapi_ctypes.tdx_mainline import KVM_TDX_MEASURE_MEMORY_REGION, KvmTdxInitMemRegion

PAGE = 4096
_OUT_FOREVER = bytes.fromhex("e6 10 eb fc")  # out %al, $0x10; jmp .-2


def real_kvm() -> LinuxKernel | None:
    """Return the real kernel where this process may use its /dev/kvm."""
    return LinuxKernel() if os.access("/dev/kvm", os.R_OK | os.W_OK) else None


def check_extension(sim: SimHost, real: Kernel) -> Iterator[Figure]:
    """KVM_CHECK_EXTENSION through the binding."""
    with Kvm(sim.kernel) as ours, Kvm(real) as peer:
        a, b = compare(
            lambda: ours.check_extension(KvmCap.KVM_CAP_VM_TYPES),
            lambda: peer.check_extension(KvmCap.KVM_CAP_VM_TYPES),
            50_000,
        )
    yield Figure("KVM_CHECK_EXTENSION", duration(a), f"{duration(b)} real /dev/kvm", a / b, 3.0, "<=")


def tdvmcall_round_trip(sim: SimHost, real: Kernel) -> Iterator[Figure]:
    """From user space into the TD, one TDVMCALL port write, and back; against a real VM's port write."""
    rounds, batches = 400, 70
    with TrustDomain(sim.kernel, MAINLINE) as td, OrdinaryVm(real) as vm:
        td.launch(load("tdvmcall_ping_pong").with_parameters((1 << 40).to_bytes(8, "little")))
        vcpu = td.vcpus[0]
        vm.add_slot(0, 1 << 16)
        peer = vm.create_vcpu()
        vm.start_real_mode(peer, _OUT_FOREVER)
        assert vcpu.run() == KvmExit.KVM_EXIT_IO == peer.run()
        a, b = compare(vcpu.run, peer.run, rounds, batches=batches)
    for target in (3.0, 1.5):
        yield Figure(
            "TDVMCALL round trip to user code", duration(a), f"{duration(b)} real port-I/O exit", a / b, target, "<="
        )


def td_lifecycle(sim: SimHost) -> Iterator[Figure]:
    """Create a TD, 16 measured pages, one TDVMCALL, destroy."""
    payload = load("td_lifecycle")
    assert IMAGE_BYTES == 16 * PAGE

    def life() -> None:
        with TrustDomain(sim.kernel, MAINLINE) as td:
            td.build()
            td.add_slot(payload.gpa, len(payload.image))
            td.add_memory(payload.gpa, payload.image)
            td.finalize()
            assert td.vcpus[0].run() == KvmExit.KVM_EXIT_IO

    life()
    best = min(seconds_per_call(life, 5) for _ in range(BATCHES))
    yield Figure("TD lifecycle, 16 measured pages", duration(best), "20 ms bound", best / 0.020, 1.0, "<=")


def measured_page_build(sim: SimHost) -> Iterator[Figure]:
    """KVM_TDX_INIT_MEM_REGION with MEASURE against hashing what it has to hash."""
    pages = 2048
    block = bytes(16 * 384 + 128)  # a page is one PAGE.ADD block and 16 x (block + 256 bytes)

    def hash_only() -> float:
        start = time.perf_counter()
        digest = hashlib.sha384()
        for _ in range(pages):
            digest.update(block)
        return pages / (time.perf_counter() - start)

    def build() -> float:
        with TrustDomain(sim.kernel, MAINLINE) as td, anonymous(pages * PAGE) as source:
            td.build()
            td.add_slot(0, pages * PAGE)
            region = KvmTdxInitMemRegion(source.address, 0, pages)
            start = time.perf_counter()
            td.vcpus[0].tdx_init_mem_region(region, KVM_TDX_MEASURE_MEMORY_REGION)
            return pages / (time.perf_counter() - start)

    build()
    bound = ours = 0.0
    for _ in range(BATCHES):
        bound, ours = max(bound, hash_only()), max(ours, build())
    yield Figure(
        "measured page build, through KVM",
        f"{ours:,.0f} pages/s",
        f"{bound:,.0f} pages/s SHA-384",
        ours / bound,
        0.25,
        ">=",
    )


def accept_fault(sim: SimHost) -> Iterator[Figure]:
    """Touch private pages for the first time: EPT violation, KVM's fault, PAGE.AUG, #VE, accept."""
    payload = load("accept_many")
    pages = 512

    def touch() -> float:
        with TrustDomain(sim.kernel, MAINLINE) as td:
            td.build()
            td.add_slot(payload.gpa, len(payload.image))
            td.add_memory(payload.gpa, payload.with_parameters(pages.to_bytes(8, "little")).image)
            td.add_slot(0, pages * PAGE)
            td.finalize()
            assert td.vcpus[0].run() == KvmExit.KVM_EXIT_IO
            start = time.perf_counter()
            assert td.vcpus[0].run() == KvmExit.KVM_EXIT_IO
            return (time.perf_counter() - start) / pages

    best = min(touch() for _ in range(BATCHES))
    yield Figure("private fault with accept", duration(best), "40 us bound", best / 40e-6, 1.0, "<=")


def conversion(sim: SimHost) -> Iterator[Figure]:
    """2 MiB of populated private memory to shared and back."""
    size = 2 << 20
    payload = load("td_lifecycle")

    def convert() -> float:
        with TrustDomain(sim.kernel, MAINLINE) as td:
            td.launch(payload)
            td.add_slot(0x4000_0000, size)
            td.vcpus[0].pre_fault_memory(KvmPreFaultMemory(gpa=0x4000_0000, size=size))
            start = time.perf_counter()
            td.vm.set_memory_attributes(0x4000_0000, size, 0)
            td.vm.set_memory_attributes(0x4000_0000, size, KVM_MEMORY_ATTRIBUTE_PRIVATE)
            td.vcpus[0].pre_fault_memory(KvmPreFaultMemory(gpa=0x4000_0000, size=size))
            return time.perf_counter() - start

    best = min(convert() for _ in range(3))
    yield Figure("2 MiB to shared and back, refilled", duration(best), "60 ms bound", best / 0.060, 1.0, "<=")


def pre_fault(sim: SimHost) -> Iterator[Figure]:
    """KVM_PRE_FAULT_MEMORY of 1 GiB (measured over 128 MiB)."""
    size = 128 << 20
    with TrustDomain(sim.kernel, MAINLINE) as td:
        td.launch(load("td_lifecycle"))
        td.add_slot(0x4000_0000, size)
        start = time.perf_counter()
        td.vcpus[0].pre_fault_memory(KvmPreFaultMemory(gpa=0x4000_0000, size=size))
        elapsed = (time.perf_counter() - start) * ((1 << 30) / size)
    yield Figure("PRE_FAULT of 1 GiB", duration(elapsed), "10 s bound", elapsed / 10, 1.0, "<=")


WITH_REAL: tuple[Callable[[SimHost, Kernel], Iterator[Figure]], ...] = (check_extension, tdvmcall_round_trip)
SIM_ONLY: tuple[Callable[[SimHost], Iterator[Figure]], ...] = (
    td_lifecycle,
    measured_page_build,
    accept_fault,
    conversion,
    pre_fault,
)
