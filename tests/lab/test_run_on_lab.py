"""``tdxhw run --on lab:…`` on real hosts: deploy, stream, merge, and what happens when hosts go away."""

import json
import threading
import time
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from tdxhw.cli import main
from tdxhw.lab import connection as connection_module
from tdxhw.lab import fleet, host_run
from tdxhw.lab.archive import build
from tdxhw.lab.connection import Session
from tdxhw.lab.deploy import deploy
from tdxhw.lab.host_run import HostRun, Wish
from tdxhw.lab.hosts import Host
from tdxhw.lab.lease import Lease, holder_of
from tdxhw.report.read import read
from tdxhw.report.results import Status
from tests.lab.namespace_hosts import NamespaceHost

SLOW = '''
"""Three tests that take their time, and note each of their runs."""
import time
import pytest

@pytest.mark.parametrize("n", range(6))
def test_slow(n):
    with open("/root/ran", "a") as file:
        file.write(f"{n}\\n")
    time.sleep(0.4)
'''

FILLS = '''
"""A test that fills the disk under the one after it."""

def test_before():
    pass

def test_fills():
    with open("/root/filler", "wb", buffering=0) as file:
        try:
            while file.write(bytes(65536)):
                pass
        except OSError:
            pass

def test_after():
    pass
'''


@pytest.fixture(autouse=True)
def environment(labs: Path, ssh_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TDXHW_LABS", str(labs))
    monkeypatch.setenv("TDXHW_SSH_CONFIG", str(ssh_config))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def slow_suite(tmp_path: Path) -> str:
    path = tmp_path / "test_slow.py"
    path.write_text(SLOW)
    return str(path)


def one_run(host: Host, labs: Path, ssh_config: Path, tmp_path: Path, suite: str, notes: list[str]) -> HostRun:
    return HostRun(
        host, Wish(suites=(suite,)), tmp_path / "log.jsonl", labs, "test", build(), ssh_config, on_note=notes.append
    )


def test_tdxhw_is_sent_once_and_runs_without_anything_installed_there(
    hosts: list[Host], labs: Path, ssh_config: Path
) -> None:
    with Session.open(hosts[2], labs, ssh_config=ssh_config) as session:
        session.check("rm -rf /root/.cache/tdxhw")
        first = deploy(session, build())
        again = deploy(session, build())
        version = session.check(" ".join([*first.command, "--version"]))
        assert session.run(f"{first.python} -I -c 'import click'").exit_code == 1, "the host has nothing of ours"
        assert session.check("ls /root/.cache/tdxhw/app").split() == [build().digest]
    assert (first.was_sent, again.was_sent) == (True, False)
    assert version.startswith("tdxhw, version ")


def test_the_archive_has_no_simulator_and_is_the_same_every_time() -> None:
    again = build.__wrapped__()
    assert again.data == build().data
    assert any(line.startswith("pytest ") for line in build().distributions)
    assert b"sim_backend/" not in __import__("gzip").decompress(build().data)


def test_three_hosts_run_at_once_and_report_as_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    junit, log = tmp_path / "junit.xml", tmp_path / "log.jsonl"
    code = main(["run", "--on", "lab:all", "kvm_device", "--junit", str(junit), "--report-log", str(log)])
    output = capsys.readouterr()

    assert code == 0, output
    results = read(log)
    assert {result.host for result in results.results} == {"host-0", "host-1", "host-2"}
    assert {result.status for result in results.results} == {Status.PASS}
    by_host = [{r.name for r in results.results if r.host == host} for host in ("host-0", "host-1", "host-2")]
    assert by_host[0] == by_host[1] == by_host[2] != set()
    assert all(result.provenance["backend"] == "local" for result in results.results)
    suites = list(ET.parse(junit).getroot().iter("testsuite"))
    assert {suite.get("hostname") for suite in suites} == {"host-0", "host-1", "host-2"}
    assert "passed   [host-1] test_kvm_device.py::" in output.out


def test_json_is_one_document_that_compare_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--on", "lab:host-0", "kvm_device", "--json"]) == 0
    path = tmp_path / "run.json"
    path.write_text(capsys.readouterr().out)
    assert len(read(path).results) == sum(json.loads(path.read_text())["summary"].values()) > 5


def test_a_suite_of_ones_own_is_sent_with_its_conftest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # The hosts of this test see this machine's files; that nothing else is used is what the paths show.
    (tmp_path / "conftest.py").write_text("import pytest\n\n@pytest.fixture\ndef four():\n    return 4\n")
    mine = tmp_path / "test_mine.py"
    mine.write_text("def test_it_is_elsewhere(four):\n    assert four == 4\n    assert '/root/.cache/' in __file__\n")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "test_mine.py").write_text("def test_of_the_same_name():\n    assert '/root/.cache/' in __file__\n")

    assert main(["run", "--on", "lab:host-0", str(mine), str(folder), "kvm_device", "--json"]) == 0
    tests = {result["test"]: result["suite"] for result in json.loads(capsys.readouterr().out)["results"]}
    assert tests["test_it_is_elsewhere"] == tests["test_of_the_same_name"] == "mine"
    assert tests["test_api_version_is_12"] == "kvm_device"
    assert main(["run", "--on", "lab:host-0", str(tmp_path / "gone.py"), "--json"]) == 2
    assert "no file " in capsys.readouterr().err


def test_equal_hosts_share_the_suites(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["run", "--on", "lab:label=netns", "--json"])
    results = json.loads(capsys.readouterr().out)["results"]
    # What this machine's KVM passes is not the question here.
    assert code == int(any(result["outcome"] in ("failed", "error") for result in results))
    ran_on: dict[str, set[str]] = {}
    for result in results:
        ran_on.setdefault(result["suite"], set()).add(result["host"])
    assert all(len(hosts) == 1 for hosts in ran_on.values()), "no suite runs twice"
    assert {host for hosts in ran_on.values() for host in hosts} == {"host-0", "host-1", "host-2"}
    assert fleet.measured_durations().keys() >= {"kvm_device"}


def test_a_host_that_is_taken_is_reported_and_the_others_run(
    hosts: list[Host], labs: Path, ssh_config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Session.open(hosts[1], labs, ssh_config=ssh_config) as session, Lease(session, "somebody's work"):
        code = main(["run", "--on", "lab:host-0,host-1", "kvm_device", "--json"])
    output = capsys.readouterr()
    document = json.loads(output.out)

    assert code == 2
    assert output.err.startswith("tdxhw: host-1 is taken by ")
    assert {result["outcome"] for result in document["results"] if result["host"] == "host-0"} == {"passed"}
    assert [r["outcome"] for r in document["results"] if r["host"] == "host-1"] == ["missed"], "infrastructure"


def test_an_unknown_suite_and_an_unknown_host_are_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--on", "lab:host-9"]) == 2
    assert "no host 'host-9'" in capsys.readouterr().err
    assert main(["run", "--on", "lab:host-0", "lifecicle"]) == 2
    assert "tdxhw: no suite 'lifecicle'" in capsys.readouterr().err


def test_a_broken_promise_is_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--on", "lab:host-0", "kvm_device", "--promise", "tdx"]) == 2
    assert "tdx" in capsys.readouterr().err


def test_a_lost_connection_loses_no_result_and_runs_no_test_twice(
    hosts: list[Host], labs: Path, ssh_config: Path, machines: list[NamespaceHost], tmp_path: Path, slow_suite: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(connection_module, "SILENCE_S", 2.0)
    monkeypatch.setattr(connection_module, "_HEARTBEAT_S", 0.3)
    monkeypatch.setattr(host_run, "_RECONNECT_EVERY_S", 0.3)
    notes: list[str] = []
    run = one_run(hosts[2], labs, ssh_config, tmp_path, slow_suite, notes)
    with Session.open(hosts[2], labs, ssh_config=ssh_config) as session:
        session.check("rm -f /root/ran")
    thread = threading.Thread(target=run.run)
    thread.start()
    wait_until(lambda: run.log.exists() and run.log.read_text().count('"teardown"') >= 2)
    machines[2].cut()
    time.sleep(2.5)
    machines[2].mend()
    thread.join(timeout=60)

    results = read(tmp_path / "log.jsonl")
    assert run.problem == ""
    assert any("trying to reconnect" in note for note in notes)
    assert sorted(result.test for result in results.results) == [f"test_slow[{n}]" for n in range(6)]
    assert {result.status for result in results.results} == {Status.PASS}
    with Session.open(hosts[2], labs, ssh_config=ssh_config) as session:
        ran = session.check("cat /root/ran").split()
        assert holder_of(session) is None, "no lease is left"
    # The test that the cable was pulled out under begins again; no finished one does.
    assert len(ran) - len(set(ran)) <= 1


def test_a_host_that_dies_and_does_not_come_back_is_a_miss(
    hosts: list[Host], labs: Path, ssh_config: Path, machines: list[NamespaceHost], tmp_path: Path, slow_suite: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(host_run, "RECONNECT_S", 0.5)
    monkeypatch.setattr(host_run, "_RECONNECT_EVERY_S", 0.2)
    run = one_run(hosts[1], labs, ssh_config, tmp_path, slow_suite, [])
    thread = threading.Thread(target=run.run)
    thread.start()
    try:
        wait_until(lambda: run.log.exists() and run.log.read_text().count('"teardown"') >= 2)
        machines[1].die()
        thread.join(timeout=60)
    finally:
        machines[1].start()

    results = read(tmp_path / "log.jsonl")
    assert "did not come back" in run.problem
    statuses = {result.test: result.status for result in results.results}
    assert statuses["test_slow[0]"] is Status.PASS
    assert statuses["(host)"] is Status.MISS
    assert Status.FAIL not in statuses.values()


def test_a_test_during_which_the_host_reboots_has_failed_and_is_not_tried_again(
    hosts: list[Host], labs: Path, ssh_config: Path, machines: list[NamespaceHost], tmp_path: Path, slow_suite: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(host_run, "_RECONNECT_EVERY_S", 0.2)
    notes: list[str] = []
    run = one_run(hosts[1], labs, ssh_config, tmp_path, slow_suite, notes)
    thread = threading.Thread(target=run.run)
    thread.start()
    wait_until(lambda: run.log.exists() and running(run.log) == "test_slow[2]")
    machines[1].reboot()
    thread.join(timeout=60)

    log = read(tmp_path / "log.jsonl")
    assert run.problem == ""
    assert any("rebooted during test_slow.py::test_slow[2]" in note for note in notes)
    results = {result.test: result for result in log.results}
    assert {test for test, result in results.items() if result.status is Status.PASS} == {
        f"test_slow[{n}]" for n in (0, 1, 3, 4, 5)
    }
    assert results["test_slow[2]"].status is Status.FAIL, "a kernel that goes down is no success"
    assert results["test_slow[2]"].message == "the host rebooted during this test"
    assert results["test_slow[2]"].provenance["host"] == "host-1"
    with Session.open(hosts[1], labs, ssh_config=ssh_config) as session:
        assert "2" not in session.check("cat /root/ran").split(), "the disk is new: it was not tried again"
        assert holder_of(session) is None


def test_a_disk_that_a_test_fills_costs_no_result_that_came_before(
    hosts: list[Host], labs: Path, tmp_path: Path, ssh_config: Path
) -> None:
    suite = tmp_path / "test_fills.py"
    suite.write_text(FILLS)
    run = one_run(hosts[0], labs, ssh_config, tmp_path, str(suite), [])
    try:
        run.run()
        results = {result.test: result.status for result in read(tmp_path / "log.jsonl").results}
    finally:
        with Session.open(hosts[0], labs, ssh_config=ssh_config) as session:
            session.check("rm -f /root/filler")
            assert holder_of(session) is None
    assert results["test_before"] is Status.PASS
    assert results["(host)"] is Status.MISS
    assert results.get("test_after", Status.MISS) is Status.MISS, "it may have begun, but nobody could note its end"
    assert "No space left on device" in run.problem
    assert run.problem.startswith("host-0: ")
    assert "\n" not in run.problem


def running(log: Path) -> str:
    """Return the test whose set-up came last and whose tear-down did not."""
    reports = [json.loads(line) for line in log.read_text().splitlines() if '"TestReport"' in line]
    is_over = not reports or reports[-1]["when"] == "teardown"
    return "" if is_over else str(reports[-1]["nodeid"]).partition("::")[2]


def test_ctrl_c_ends_the_run_on_the_host_keeps_its_results_and_gives_the_host_back(
    hosts: list[Host], labs: Path, ssh_config: Path, machines: list[NamespaceHost], tmp_path: Path, slow_suite: str
) -> None:
    run = one_run(hosts[0], labs, ssh_config, tmp_path, slow_suite, [])
    thread = threading.Thread(target=run.run)
    thread.start()
    wait_until(lambda: run.log.exists() and run.log.read_text().count('"teardown"') >= 2)
    run.stop.set()
    thread.join(timeout=30)

    assert run.problem == "host-0: interrupted"
    assert machines[0].processes("--report-log") == []
    assert sum(result.status is Status.PASS for result in read(tmp_path / "log.jsonl").results) >= 2
    with Session.open(hosts[0], labs, ssh_config=ssh_config) as session:
        assert holder_of(session) is None


def test_a_full_disk_is_told_in_one_line(
    hosts: list[Host], labs: Path, ssh_config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Session.open(hosts[0], labs, ssh_config=ssh_config) as session:
        session.check("rm -rf /root/.cache; head -c 63M /dev/zero >/root/filler")
        try:
            assert main(["run", "--on", "lab:host-0", "kvm_device", "--json"]) == 2
        finally:
            session.check("rm /root/filler")
    error = capsys.readouterr().err
    assert error.startswith("tdxhw: host-0: ")
    assert "No space left on device" in error
    assert error.count("\n") == 1


def test_a_run_that_takes_too_long_is_ended_on_the_host(
    hosts: list[Host], labs: Path, capsys: pytest.CaptureFixture[str], machines: list[NamespaceHost], slow_suite: str
) -> None:
    (labs / "netns.yaml").write_text(
        f"host: {{name: host-0, ssh: root@{machines[0].address}, limits: {{run_timeout_s: 1}}}}\n"
    )
    assert main(["run", "--on", "lab:host-0", slow_suite, "--json"]) == 2
    output = capsys.readouterr()
    assert output.err == "tdxhw: host-0: the run took longer than 1 s and was ended\n"
    assert json.loads(output.out)["summary"]["passed"] < 6
    assert machines[0].processes("--report-log") == []


def wait_until(condition: object, limit_s: float = 30) -> None:
    assert callable(condition)
    until = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < until, "still not so"
        time.sleep(0.05)
