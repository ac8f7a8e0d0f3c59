"""What metadata costs: nothing for free memory, at most 64 bytes for a mapped 4 KiB page."""

import os
import time
from collections.abc import Iterator

import pytest

from sim_backend.cpu.static_cpu import StaticCpus
from sim_backend.hw.memory import PhysicalMemory
from sim_backend.hw.platform import load_platform
from sim_backend.machine import tdmr_layout
from sim_backend.seamcall_host import SeamcallHost
from sim_backend.tdx_module.module import TdxModule
from sim_backend.tdx_module.profile import load_profile
from uapi_ctypes.tdx_leaves import SeamcallLeaf

GIB = 1 << 30


def used_bytes(memory: PhysicalMemory) -> int:
    return os.fstat(memory.fd).st_blocks * 512


@pytest.fixture
def big_host() -> Iterator[SeamcallHost]:
    """Bring up a module with one TDMR of 256 GiB, its PAMT in a reserved area at its end."""
    ram = 260 * GIB
    platform = load_platform("golden", ram_bytes=ram, cmrs=[(4 * GIB, 256 * GIB)])
    memory = PhysicalMemory(ram)
    host = SeamcallHost(TdxModule(platform, memory, load_profile("1.5.01"), StaticCpus()))
    leaf = SeamcallLeaf
    host.call(leaf.TDH_SYS_INIT)
    for lp in platform.lps:
        host.call(leaf.TDH_SYS_LP_INIT, lp=lp.index)
    memory.write(0x2000, tdmr_layout(4 * GIB, 256 * GIB, entry_bytes=16).info())
    memory.q[0x1000 >> 3] = 0x2000
    host.call(leaf.TDH_SYS_CONFIG, rcx=0x1000, rdx=1, r8=32)
    for each in host.first_lp_of_each_package():
        host.call(leaf.TDH_SYS_KEY_CONFIG, lp=each)
    yield host
    memory.close()


def test_a_tdmr_of_256_gib_costs_nothing_until_it_is_touched(big_host: SeamcallHost) -> None:
    began = time.process_time()
    big_host.module.tdmr_init_all(4 * GIB)
    assert time.process_time() - began < 0.5
    # The reserved area of 1 GiB for the PAMT itself is 16 bytes a page; nothing else is written.
    assert used_bytes(big_host.module.memory) < 8 << 20


def test_a_mapped_page_costs_at_most_64_bytes_of_bookkeeping(host: SeamcallHost) -> None:
    memory = host.module.memory
    td = host.create_td()
    pages = 8192
    for gpa in range(0, pages << 12, 1 << 21):
        host.add_tables(td, gpa)
    before = used_bytes(memory)
    for gpa in range(0, pages << 12, 4096):
        host.aug_page(td, gpa)
    # AUG does not touch the pages themselves: all that is new is metadata, and the tables were there already.
    metadata = used_bytes(memory) - before + (pages >> 9) * 4096
    assert metadata / pages <= 64
    assert len(host.module.tdrs) == 1
    assert len(host.module.tdvpses) == 0
