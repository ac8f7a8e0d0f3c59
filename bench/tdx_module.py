"""The TDX module model alone: SEAMCALL rate on recorded vectors, cost of a mapped page, a big host at rest."""

import hashlib
import time
from collections.abc import Iterator
from pathlib import Path

from bench.measure import BATCHES, Figure, duration, seconds_per_call
from sim_backend.cpu.static_cpu import StaticCpus
from sim_backend.hw.gprs import R8, R9, RAX, RCX, RDX, new_gprs
from sim_backend.hw.memory import PhysicalMemory
from sim_backend.hw.platform import load_platform
from sim_backend.machine import boot
from sim_backend.replay import Replayer
from sim_backend.seamcall_host import SeamcallHost
from sim_backend.tdx_module.module import TdxModule
from sim_backend.tdx_module.profile import load_profile
from sim_backend.vector_file import read_records
from uapi_ctypes.tdx_leaves import SeamcallLeaf

GIB = 1 << 30
PAGE = 4096
VECTORS = Path(__file__).parent.parent / "tests" / "golden" / "tdx_module"


def replay_rate() -> Iterator[Figure]:
    """SEAMCALLs of a fuzz file, applied and compared, records already parsed."""
    records = list(read_records(VECTORS / "fuzz_1.jsonl.gz"))
    seamcalls = len([record for record in records if record["op"] == "seamcall"])

    def replay() -> float:
        replayer = Replayer()
        start = time.perf_counter()
        for record in records:
            assert replayer.apply(record) is None
        elapsed = time.perf_counter() - start
        replayer.close()
        return elapsed / seamcalls

    def nothing() -> None:
        return

    empty = min(seconds_per_call(nothing, 200_000) for _ in range(BATCHES))
    best = min(replay() for _ in range(BATCHES))
    yield Figure(
        "replayed SEAMCALL (fuzz_1)",
        f"{duration(best)} = {1 / best:,.0f}/s, {best / empty:.0f} empty calls",
        "30,000/s",
        1 / best / 30_000,
        1.0,
        ">=",
    )


def measured_page_build() -> Iterator[Figure]:
    """TDH.MEM.PAGE.ADD and 16 TDH.MR.EXTEND a page, as the simulated host batches them, against SHA-384 alone."""
    pages, first_gpa, source = 1024, 0x4000_0000, 4 << 20
    block = bytes(16 * 384 + 128)  # a page is one PAGE.ADD block and 16 x (MR.EXTEND block + 256 bytes)

    def hash_only() -> float:
        start = time.perf_counter()
        digest = hashlib.sha384()
        for _ in range(pages):
            digest.update(block)
        return (time.perf_counter() - start) / pages

    def build() -> float:
        platform = load_platform("golden")
        memory = PhysicalMemory(platform.ram_bytes)
        try:
            module = TdxModule(platform, memory, load_profile("1.5.01"), StaticCpus())
            host = SeamcallHost(module)
            host.bring_up()
            td = host.create_td()
            for index in range(-(-pages // 512)):
                host.add_tables(td, first_gpa + index * (2 << 20))
            targets = [host.page() for _ in range(pages)]
            for target in targets:
                memory.zero_page(target)  # used before: the first touch is the real kernel's cost
            regs = new_gprs()
            start = time.perf_counter()
            for index, target in enumerate(targets):
                regs[RAX], regs[RCX], regs[RDX] = SeamcallLeaf.TDH_MEM_PAGE_ADD, first_gpa + index * PAGE, td.tdr
                regs[R8], regs[R9] = target, source
                module.mem_page_add_extend(0, regs)
                assert regs[RAX] == 0
            return (time.perf_counter() - start) / pages
        finally:
            memory.close()

    bound = min(hash_only() for _ in range(BATCHES))
    ours = min(build() for _ in range(BATCHES))
    yield Figure(
        "measured page build, module alone",
        f"{1 / ours:,.0f} pages/s",
        f"{1 / bound:,.0f} pages/s SHA-384",
        bound / ours,
        0.5,
        ">=",
    )


def big_host() -> Iterator[Figure]:
    """Boot a host of 512 GiB: time to come up, memory at rest."""

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE

    boot("mainline").shutdown()
    before, start = resident(), time.perf_counter()
    machine = boot("mainline", ram_bytes=512 * GIB)
    elapsed, grown = time.perf_counter() - start, resident() - before
    machine.shutdown()
    yield Figure("512 GiB host, boot", duration(elapsed), "0.5 s bound", elapsed / 0.5, 1.0, "<=")
    yield Figure("512 GiB host, at rest", f"{grown / 2**20:.1f} MiB", "300 MiB bound", grown / (300 << 20), 1.0, "<=")
