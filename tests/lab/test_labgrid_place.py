"""A labgrid place as the lease of a host, with a real coordinator."""

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tdxhw.cli import main
from tdxhw.lab import inventory
from tdxhw.lab.errors import LabUnreachable, LeaseHeld, RemoteFailed
from tdxhw.lab.hosts import Driver, Host, SshTarget
from tdxhw.lab.labgrid_place import LabgridPlace
from tests.lab.missing import skip_or_fail
from tests.lab.namespace_hosts import NamespaceHost

BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def coordinator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if not (BIN / "labgrid-coordinator").exists():
        skip_or_fail("no labgrid: pip install 'tdxhw[labgrid]'")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    folder = tmp_path_factory.mktemp("coordinator")
    log = folder / "log"
    with log.open("wb") as file:
        command = [str(BIN / "labgrid-coordinator"), "-l", address]
        process = subprocess.Popen(command, cwd=folder, stdout=file, stderr=file)
    try:
        until = time.monotonic() + 20
        while client(address, "create").returncode != 0:
            assert time.monotonic() < until, log.read_text()
            assert process.poll() is None, log.read_text()
        yield address
    finally:
        process.terminate()
        process.wait(timeout=20)


def client(address: str, *command: str) -> "subprocess.CompletedProcess[str]":
    argv = [str(BIN / "labgrid-client"), "-x", address, "-p", "shelf-1", *command]
    return subprocess.run(argv, capture_output=True, text=True, timeout=30, check=False)


def at(address: str, place: str = "shelf-1") -> LabgridPlace:
    lease = Driver("labgrid", {"place": place, "coordinator": address})
    return LabgridPlace(Host("host-0", SshTarget("host-0"), "labs/a.yaml:1", lease=lease))


def test_the_place_is_ours_inside_and_free_after(coordinator: str) -> None:
    with at(coordinator) as place:
        holder = place.holder()
        assert "/" in holder
        with pytest.raises(LeaseHeld, match=r"host-0 is taken: labgrid: .*already acquired"):
            at(coordinator).take()
        assert place.holder() == holder, "who lost has not released it"
    assert at(coordinator).holder() == ""


def test_it_is_released_when_the_body_fails(coordinator: str) -> None:
    with pytest.raises(RuntimeError, match="body"), at(coordinator):
        raise RuntimeError("body")
    assert at(coordinator).holder() == ""


def test_another_persons_place_is_refused_with_their_name_and_left_alone(
    coordinator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as bob:
        bob.setenv("LG_USERNAME", "bob")
        bob.setenv("LG_HOSTNAME", "ws2")
        assert client(coordinator, "acquire").returncode == 0
    mine = at(coordinator)
    with pytest.raises(LeaseHeld, match="ws2/bob"):
        mine.take()
    mine.release()
    assert mine.holder() == "ws2/bob"
    assert client(coordinator, "release", "--kick").returncode == 0


def test_who_was_kicked_out_is_told_after_a_lost_connection(coordinator: str) -> None:
    place = at(coordinator)
    place.take()
    assert client(coordinator, "release", "--kick").returncode == 0
    with pytest.raises(LeaseHeld, match="was taken away by nobody"):
        place.move_to(None)  # type: ignore[arg-type]  # a place does not look at the connection


def test_of_many_that_race_exactly_one_wins(coordinator: str) -> None:
    won: list[LabgridPlace] = []
    lost: list[LeaseHeld] = []
    barrier = threading.Barrier(4)

    def race() -> None:
        place = at(coordinator)
        barrier.wait()
        try:
            place.take()
            won.append(place)
        except LeaseHeld as error:
            lost.append(error)

    threads = [threading.Thread(target=race) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(won), len(lost)) == (1, 3)
    won[0].release()


def test_a_place_or_a_coordinator_that_is_not_there_says_so(coordinator: str) -> None:
    with pytest.raises(RemoteFailed, match="place pattern shelf-9 matches nothing"):
        at(coordinator, "shelf-9").take()
    with pytest.raises(LabUnreachable, match=r"no labgrid coordinator at 127\.0\.0\.1:1$"):
        at("127.0.0.1:1").take()


def test_a_run_holds_the_place_and_no_lease_on_the_host(
    coordinator: str, labs: Path, ssh_config: Path, machines: list[NamespaceHost], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("TDXHW_LABS", str(labs))
    monkeypatch.setenv("TDXHW_SSH_CONFIG", str(ssh_config))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (labs / "netns.yaml").write_text(
        f"host:\n  name: host-0\n  ssh: root@{machines[0].address}\n"
        f"  lease: {{driver: labgrid, place: shelf-1, coordinator: '{coordinator}'}}\n"
    )
    assert inventory.load(labs).host("host-0").lease is not None
    suite = tmp_path / "test_looks.py"
    suite.write_text(
        "import os\n\ndef test_nobody_wrote_a_lease_here():\n    path = '/run/lock/tdxhw.lease'\n"
        "    assert not os.path.exists(path) or os.path.getsize(path) == 0\n"
    )
    assert main(["run", "--on", "lab:host-0", str(suite), "--json"]) == 0, capsys.readouterr()
    assert main(["lab", "status"]) == 0

    with at(coordinator):
        assert main(["lab", "status"]) == 1
        assert "taken by " in capsys.readouterr().out
        assert main(["run", "--on", "lab:host-0", str(suite), "--json"]) == 2
        assert "is taken: labgrid: " in capsys.readouterr().err
    assert at(coordinator).holder() == ""
