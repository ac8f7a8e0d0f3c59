"""The fixtures that suites are written with."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from tdxhw.guest.payload import Payload, PayloadError, load
from tdxhw.host import Host
from tdxhw.ordinary_vm import OrdinaryVm
from tdxhw.session_state import BACKEND, INTERRUPTION, capabilities_of
from tdxhw.td import TdConfig, TrustDomain
from tdxhw.vmm import Guest, Vmm
from uapi_ctypes.device import Kvm
from uapi_ctypes.dialect import Dialect
from uapi_ctypes.kernel import Kernel


@pytest.fixture
def host(request: pytest.FixtureRequest) -> Iterator[Host]:
    """Yield the machine the test runs on. A simulated one must be as clean afterwards as it was before.

    A test that Ctrl-C cut off could not tidy up.
    """
    machine: Host = request.param
    yield machine
    interruption = request.config.stash.get(INTERRUPTION, None)
    if interruption is not None and interruption.requested:
        return
    if left := machine.leftovers():
        machine.start_anew()
        pytest.fail("left over on the simulated host: " + ", ".join(left), pytrace=False)


@pytest.fixture
def kernel(host: Host) -> Kernel:
    """Return the kernel, real or simulated: a test cannot tell which."""
    return host.kernel


@pytest.fixture
def dialect(request: pytest.FixtureRequest, host: Host) -> Dialect:
    """Return the kernel's TDX dialect. Only for tests that require ``tdx``."""
    found = capabilities_of(request.config, host).dialect
    assert found is not None, "a test that uses `dialect` must be marked requires('tdx')"
    return found


@pytest.fixture
def kvm(kernel: Kernel) -> Iterator[Kvm]:
    """Open /dev/kvm."""
    with Kvm(kernel) as device:
        yield device


@pytest.fixture
def trust_domain(kernel: Kernel, dialect: Dialect) -> Iterator[Callable[..., TrustDomain]]:
    """Make TDs, nothing of them done yet: ``trust_domain()``, ``trust_domain(gpaw=52)`` (see `TdConfig`)."""
    with ExitStack() as held:

        def make(**config: object) -> TrustDomain:
            return held.enter_context(TrustDomain(kernel, dialect, TdConfig(**config)))  # type: ignore[arg-type]

        yield make


@pytest.fixture
def launch(trust_domain: Callable[..., TrustDomain], payload: Callable[[str], Payload]) -> Callable[..., TrustDomain]:
    """Make TDs that are ready to run a payload: ``launch("td_ioexit")``, ``launch("two_vcpus", vcpus=2)``."""

    def make(name: str, vcpus: int = 1, **config: object) -> TrustDomain:
        return trust_domain(**config).launch(payload(name), vcpus)

    return make


@pytest.fixture
def ordinary_vm(kernel: Kernel) -> Iterator[Callable[..., OrdinaryVm]]:
    """Make VMs of the default type, or of the type given."""
    with ExitStack() as held:

        def make(**config: int) -> OrdinaryVm:
            return held.enter_context(OrdinaryVm(kernel, **config))

        yield make


@pytest.fixture
def payload() -> Callable[[str], Payload]:
    """Load guest payloads by name. A damaged one ends the session: no test could be believed."""

    def load_or_exit(name: str) -> Payload:
        try:
            return load(name)
        except PayloadError as error:
            pytest.exit(str(error), returncode=2)

    return load_or_exit


@pytest.fixture
def vmm() -> Callable[[Guest], Vmm]:
    """Make the VMM of a guest: ``vmm(td).run(vcpu)``."""
    return Vmm


@pytest.fixture(scope="session", autouse=True)
def record_provenance(request: pytest.FixtureRequest, record_testsuite_property: Callable[[str, object], None]) -> None:
    """Write into the JUnit file where the results come from, once for the session."""
    backend = request.config.stash[BACKEND]
    record_testsuite_property("tdxhw.backend", f"{backend.name} ({backend.reason})")
    for machine in backend.hosts:
        for key, value in machine.provenance().items():
            record_testsuite_property(f"tdxhw.{machine.id}.{key}", value)
