"""Three lab hosts with real sshds. Where they cannot be made the tests skip, unless TDXHW_LAB_TESTS=required."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tdxhw.lab import inventory
from tdxhw.lab.hosts import Host
from tests.lab.missing import skip_or_fail
from tests.lab.namespace_hosts import NamespaceHost, why_impossible

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark everything in this folder: `make test` leaves it to `make test-lab`."""
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.lab)


@pytest.fixture(scope="session")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[NamespaceHost]]:
    """Start the hosts, once for all tests."""
    reason = why_impossible()
    if reason:
        skip_or_fail(f"no lab hosts here: {reason}")
    key = tmp_path_factory.mktemp("client") / "id_ed25519"
    command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    folder = tmp_path_factory.mktemp("hosts")
    hosts = [NamespaceHost(folder, number, key) for number in range(3)]
    try:
        for host in hosts:
            host.start()
        yield hosts
    finally:
        for host in hosts:
            host.remove()


@pytest.fixture
def ssh_config(machines: list[NamespaceHost], tmp_path: Path) -> Path:
    """Write an ssh configuration with our key and nothing of the user's."""
    path = tmp_path / "ssh_config"
    key = machines[0].client_key
    path.write_text(f"Host *\n  IdentityFile {key}\n  User root\n")
    return path


@pytest.fixture
def labs(machines: list[NamespaceHost], tmp_path: Path) -> Path:
    """Write lab files and known hosts for the machines."""
    folder = tmp_path / "labs"
    folder.mkdir()
    hosts = "".join(
        f"- {{name: {m.name}, ssh: root@{m.address}, promises: [kvm], labels: [netns]}}\n" for m in machines
    )
    (folder / "netns.yaml").write_text("hosts:\n" + hosts)
    (folder / "known_hosts").write_text("".join(machine.known_hosts_line() for machine in machines))
    return folder


@pytest.fixture
def hosts(labs: Path) -> list[Host]:
    return list(inventory.load(labs).hosts.values())
