"""Guest instructions under the CPU engine against the same instructions run by this machine's CPU."""

import ctypes
import mmap
import time
from collections.abc import Iterator

from bench.measure import Figure, duration
from tdxhw.backends.sim import SimHost
from tdxhw.guest.payload import load
from tdxhw.td import TrustDomain
from uapi_ctypes.dialect import MAINLINE
from uapi_ctypes.kvm_run import KvmExit

ROUNDS = 50_000_000
# The loop of payloads/integer_loop.S as a function of RDI rounds that returns its EBX.
_LOOP = bytes.fromhex(
    "53"  # push %rbx
    "bb01000000"  # mov $1, %ebx
    "69db0d661900"  # imul $1664525, %ebx, %ebx
    "81c35ff36e3c"  # add $1013904223, %ebx
    "89d8"  # mov %ebx, %eax
    "c1e810"  # shr $16, %eax
    "31c3"  # xor %eax, %ebx
    "48ffcf"  # dec %rdi
    "75e8"  # jnz -24
    "89d8"  # mov %ebx, %eax
    "5b"  # pop %rbx
    "c3"  # ret
)


def integer_loop(sim: SimHost) -> Iterator[Figure]:
    """Run a linear congruential generator; both must reach the same value."""
    code = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    code.write(_LOOP)
    anchor = ctypes.c_char.from_buffer(code)
    native = ctypes.CFUNCTYPE(ctypes.c_uint32, ctypes.c_uint64)(ctypes.addressof(anchor))

    start = time.perf_counter()
    expected = native(ROUNDS)
    bound = time.perf_counter() - start

    payload = load("integer_loop").with_parameters(ROUNDS.to_bytes(8, "little"))
    with TrustDomain(sim.kernel, MAINLINE) as td:
        td.launch(payload)
        vcpu = td.vcpus[0]
        start = time.perf_counter()
        assert vcpu.run() == KvmExit.KVM_EXIT_IO
        ours = time.perf_counter() - start
        assert int.from_bytes(vcpu.io_data(), "little") == expected, "the engine computed something else"
    yield Figure(
        f"integer loop, {ROUNDS // 10**6} million rounds",
        duration(ours),
        f"{duration(bound)} native",
        bound / ours,
        0.4,
        ">=",
    )
