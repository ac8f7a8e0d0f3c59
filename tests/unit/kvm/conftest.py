"""A simulated host for ordinary VMs, and the check that every test gives everything back."""

from collections.abc import Iterator
from functools import lru_cache

import pytest

from sim_backend.kernel import SimKernel
from sim_backend.kvm.host import KvmHost
from tests.unit.kvm.small_vmm import ordinary_host


@lru_cache
def booted(profile: str) -> KvmHost:
    """Return the host of that profile; all tests share it."""
    return ordinary_host(profile)


@pytest.fixture
def kernel(request: pytest.FixtureRequest) -> Iterator[SimKernel]:
    """Return the system calls of a 7.3 host, or of the profile that ``indirect`` parametrization names."""
    host = booted(getattr(request, "param", "7.3"))
    simulated = SimKernel(host)
    yield simulated
    assert not simulated.fds.files, "file descriptors are left open"
    assert not host.vms, "VMs are left"
    assert not host.pages.in_use, "host pages are left"
