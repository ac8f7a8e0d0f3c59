"""A module on the golden platform, brought up or not, and the minimal host that drives it."""

from collections.abc import Iterator

import pytest

from sim_backend.cpu.static_cpu import StaticCpus
from sim_backend.hw.memory import PhysicalMemory
from sim_backend.hw.platform import load_platform
from sim_backend.seamcall_host import SeamcallHost
from sim_backend.tdx_module.module import TdxModule
from sim_backend.tdx_module.profile import load_profile


@pytest.fixture
def fresh_host() -> Iterator[SeamcallHost]:
    """Load a module and drive it: SYSINIT_PENDING."""
    platform = load_platform("golden")
    memory = PhysicalMemory(platform.ram_bytes)
    yield SeamcallHost(TdxModule(platform, memory, load_profile("1.5.01"), StaticCpus()))
    memory.close()


@pytest.fixture
def host(fresh_host: SeamcallHost) -> SeamcallHost:
    """Bring the module up, all TDMRs initialised."""
    fresh_host.bring_up()
    return fresh_host
