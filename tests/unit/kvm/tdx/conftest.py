"""Simulated hosts for the tests of KVM's TDX side, booted once, and the check that every test cleans up."""

from collections.abc import Iterator
from functools import lru_cache
from typing import cast

import pytest

from sim_backend.kvm.ops import VmOpsFactory
from sim_backend.kvm.tdx.ops import tdx_ops_factory
from sim_backend.kvm.tdx.tdx_host import TdxHost
from sim_backend.machine import Machine, boot
from tests.unit.kvm.tdx.scripted_seam import ScriptedSeam
from tests.unit.kvm.tdx.vmm import TestTd

OF_ITS_OWN = " of its own"
"""After a profile's name: a host for one test, which may leave it in any state."""


@lru_cache
def booted(profile: str) -> Machine:
    """Return the host of that profile; it serves all tests, which have to leave it as they found it."""
    return boot(profile, oracle=True)


@pytest.fixture
def machine(request: pytest.FixtureRequest) -> Iterator[Machine]:
    """Return a 7.3 host, or that of the profile that ``indirect`` parametrization names."""
    profile = getattr(request, "param", "7.3")
    if profile.endswith(OF_ITS_OWN):
        own = boot(profile.removesuffix(OF_ITS_OWN), oracle=True)
        yield own
        own.shutdown()
        return
    host = booted(profile)
    yield host
    leftovers = host.leftovers()
    if leftovers:
        booted.cache_clear()  # or every later test would fail as well
    assert leftovers == []


@pytest.fixture
def td(request: pytest.FixtureRequest, machine: Machine) -> Iterator[TestTd]:
    """Return a fresh TD; behind the scripted seam when the test asks for that too."""
    if "seam" in request.fixturenames:
        request.getfixturevalue("seam")
    with TestTd(machine) as made:
        yield made


@pytest.fixture
def seam(machine: Machine) -> Iterator[ScriptedSeam]:
    """Put a scripted seam between the machine's KVM and its TDX module, for VMs created in this test."""
    assert machine.tdx is not None
    assert machine.seam is not None
    scripted = ScriptedSeam(machine.seam)
    host = TdxHost(machine.profile, scripted, machine.memory, machine.pages, machine.lps, machine.tdx.key_ids)
    scripted.calls.clear()
    types = cast("dict[int, VmOpsFactory]", machine.host.vm_types)
    original = dict(types)
    for number, kind in machine.profile.vm_types.items():
        if kind == "tdx":
            types[number] = tdx_ops_factory(host)
    yield scripted
    types.update(original)
