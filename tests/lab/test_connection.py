"""Connections to real sshds: host keys, time limits, and telling a lost connection from a failed command."""

import subprocess
import threading
import time
from pathlib import Path

import pytest

from tdxhw.lab import connection as connection_module
from tdxhw.lab.connection import TIME_LIMIT, Session
from tdxhw.lab.errors import ConnectionLost, HostKeyRefused, LabUnreachable, RemoteFailed
from tdxhw.lab.hosts import Host
from tdxhw.lab.inventory import parse_ssh_target
from tests.lab.namespace_hosts import NamespaceHost


@pytest.fixture
def session(hosts: list[Host], labs: Path, ssh_config: Path) -> Session:
    return Session.open(hosts[0], labs, ssh_config=ssh_config)


def test_a_command_runs_on_the_host_and_says_how_it_ended(session: Session) -> None:
    with session:
        assert session.check("hostname") == "host-0\n"
        done = session.run("cat; echo out; echo err >&2; exit 7", stdin=b"in\n")
    assert (done.exit_code, done.stdout, done.stderr) == (7, "in\nout\n", "err\n")


def test_a_failed_command_is_quoted(session: Session) -> None:
    with session, pytest.raises(RemoteFailed, match=r"host-0: .*exit code 2: ls: cannot access '/nowhere'"):
        session.check("ls /nowhere")


def test_a_command_ends_at_its_limit_on_the_host_itself(session: Session, machines: list[NamespaceHost]) -> None:
    with session:
        with pytest.raises(RemoteFailed, match=r"still running after 0\.3 s"):
            session.run("sleep 1234", timeout_s=0.3)
        assert machines[0].processes("sleep 1234") == []


def test_an_unknown_host_key_is_refused_with_its_fingerprint(
    hosts: list[Host], tmp_path: Path, ssh_config: Path
) -> None:
    with pytest.raises(HostKeyRefused, match=r"ED25519 SHA256:\S{43}; if it is right: tdxhw lab trust host-0"):
        Session.open(hosts[0], tmp_path, ssh_config=ssh_config)


def test_a_changed_host_key_is_refused_with_both_fingerprints(
    hosts: list[Host], labs: Path, ssh_config: Path, machines: list[NamespaceHost]
) -> None:
    known = labs / "known_hosts"
    theirs = machines[1].known_hosts_line().split(" ", 1)[1]
    known.write_text(f"{machines[0].address} {theirs}")

    with pytest.raises(HostKeyRefused, match=r"SHA256:\S+, known is ED25519 SHA256:\S+: another machine"):
        Session.open(hosts[0], labs, ssh_config=ssh_config)


def test_an_agent_s_key_lets_us_in(
    hosts: list[Host], labs: Path, machines: list[NamespaceHost], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "no_key"
    config.write_text("Host *\n  User root\n")
    agent = tmp_path / "agent"
    process = subprocess.Popen(["ssh-agent", "-D", "-a", str(agent)], stdout=subprocess.DEVNULL)
    try:
        wait_until(agent.exists)
        monkeypatch.setenv("SSH_AUTH_SOCK", str(agent))
        subprocess.run(["ssh-add", "-q", str(machines[0].client_key)], check=True)
        with Session.open(hosts[0], labs, ssh_config=config) as session:
            assert session.check("hostname") == "host-0\n"
    finally:
        process.terminate()
        process.wait(timeout=10)


def test_no_key_of_ours_is_accepted(hosts: list[Host], labs: Path, tmp_path: Path) -> None:
    config = tmp_path / "no_key"
    config.write_text("Host *\n  User root\n")
    with pytest.raises(LabUnreachable, match="accepts none of our keys for user root"):
        Session.open(hosts[0], labs, ssh_config=config)


@pytest.mark.parametrize(
    ("target", "reason"),
    [("root@nowhere.invalid", "name is not known"), ("ssh://root@127.0.0.1:1", "Connection refused")],
)
def test_a_host_that_is_not_there_says_why(labs: Path, ssh_config: Path, target: str, reason: str) -> None:
    host = Host("gone", parse_ssh_target(target), "labs/gone.yaml:1")
    with pytest.raises(LabUnreachable, match=f"gone: .*{reason}"):
        Session.open(host, labs, ssh_config=ssh_config)


def test_a_jump_host_is_used_and_its_key_checked(
    labs: Path, hosts: list[Host], ssh_config: Path, machines: list[NamespaceHost]
) -> None:
    ssh_config.write_text(
        ssh_config.read_text() + f"Host {machines[1].address}\n  ProxyJump root@{machines[0].address}\n"
    )
    # The jump host has no route to the other: reaching for it is all that is asked here, and its key comes first.
    known = labs / "known_hosts"
    known.write_text(machines[1].known_hosts_line())
    with pytest.raises(HostKeyRefused, match=machines[0].address):
        Session.open(hosts[1], labs, ssh_config=ssh_config)


def test_a_host_behind_a_jump_host_is_reached(
    labs: Path, ssh_config: Path, machines: list[NamespaceHost], tmp_path: Path
) -> None:
    # 127.0.0.1 as the jump host sees it: its own sshd, which nobody else can mean by that address.
    ssh_config.write_text(ssh_config.read_text() + f"Host 127.0.0.1\n  ProxyJump root@{machines[2].address}\n")
    kind_and_key = machines[2].known_hosts_line().split(" ", 1)[1]
    (labs / "known_hosts").write_text(machines[2].known_hosts_line() + f"127.0.0.1 {kind_and_key}")
    host = Host("inner", parse_ssh_target("root@127.0.0.1"), "labs/inner.yaml:1")

    with Session.open(host, labs, ssh_config=ssh_config) as session:
        assert session.check("hostname") == "host-2\n"


def test_a_supervised_command_streams_its_file_its_console_and_its_exit_code(session: Session) -> None:
    lines: list[str] = []
    console: list[str] = []
    script = "echo hello; for i in 1 2 3; do echo line $i >>/root/log; sleep 0.1; done; printf half >>/root/log; exit 3"
    with session:
        code = session.supervise(
            ["sh", "-c", script], limit_s=20, follow="/root/log", on_line=lines.append, on_console=console.append
        )
        assert (code, lines, console) == (3, ["line 1", "line 2", "line 3"], ["hello"])
        lines.clear()
        session.supervise(["true"], limit_s=20, follow="/root/log", offset=14, on_line=lines.append)
        assert lines == ["line 3"], "what came before the offset is not told again"


def test_a_supervised_command_may_finish_its_results_when_its_time_is_up(
    session: Session, machines: list[NamespaceHost]
) -> None:
    lines: list[str] = []
    script = "trap 'echo partial >>/root/partial; exit 0' TERM; sleep 4321 & wait"
    with session:
        code = session.supervise(["sh", "-c", script], limit_s=0.5, follow="/root/partial", on_line=lines.append)
    assert (code, lines) == (TIME_LIMIT, ["partial"])
    assert machines[0].processes("sleep 4321") == [], "its children are gone, too"


def test_closing_the_connection_ends_the_command_and_its_children(
    session: Session, machines: list[NamespaceHost]
) -> None:
    outcome: list[BaseException] = []

    def run() -> None:
        try:
            session.supervise(["sh", "-c", "sleep 5432 & sleep 5432"], limit_s=600)
        except ConnectionLost as error:
            outcome.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    wait_until(lambda: len(machines[0].processes("sleep 5432")) >= 2)
    session.close()
    thread.join(timeout=10)

    assert [type(error) for error in outcome] == [ConnectionLost]
    wait_until(lambda: machines[0].processes("sleep 5432") == [])


def test_a_pulled_cable_is_noticed_by_both_sides(
    hosts: list[Host], labs: Path, ssh_config: Path, machines: list[NamespaceHost], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection_module, "SILENCE_S", 2.0)
    monkeypatch.setattr(connection_module, "_HEARTBEAT_S", 0.3)
    session = Session.open(hosts[0], labs, ssh_config=ssh_config)
    started = time.monotonic()
    timer = threading.Timer(0.5, machines[0].cut)
    timer.start()
    try:
        with session, pytest.raises(ConnectionLost, match="host-0: the connection is lost"):
            session.supervise(["sleep", "6543"], limit_s=60)
        wait_until(lambda: machines[0].processes("sleep 6543") == [], limit_s=10)
    finally:
        timer.join()
        machines[0].mend()
    assert time.monotonic() - started < 15, "not by the time limit of 60 s"


def test_a_host_that_dies_is_a_lost_connection_and_not_a_failed_command(
    session: Session, machines: list[NamespaceHost]
) -> None:
    timer = threading.Timer(0.5, machines[0].die)
    timer.start()
    try:
        with pytest.raises(ConnectionLost):
            session.supervise(["sleep", "7654"], limit_s=60)
    finally:
        timer.join()
        machines[0].start()


def test_an_upload_is_whole_or_not_there(session: Session) -> None:
    data = bytes(range(256)) * 4096
    with session:
        session.upload(data, "/root/cache/file")
        assert session.check("sha256sum </root/cache/file; ls /root/cache").split()[-1] == "file"
        session.check("head -c 62M /dev/zero >/root/filler")  # the host's /root has 64 MiB
        with pytest.raises(RemoteFailed, match="No space left on device"):
            session.upload(bytes(4 << 20), "/root/cache/too-big")
        assert session.check("ls /root/cache") == "file\n"
        session.check("rm -r /root/cache /root/filler")


def wait_until(condition: object, limit_s: float = 8) -> None:
    assert callable(condition)
    until = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < until, "still not so"
        time.sleep(0.05)
