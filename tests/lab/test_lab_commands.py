"""``tdxhw lab trust`` and ``tdxhw doctor --on lab:…`` with real sshds."""

import io
import json
import subprocess
from pathlib import Path

import pytest

from tdxhw.cli import main
from tdxhw.lab.connection import Session
from tdxhw.lab.errors import HostKeyRefused
from tdxhw.lab.hosts import Host
from tdxhw.lab.lease import Lease
from tests.lab.namespace_hosts import NamespaceHost

Output = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def environment(labs: Path, ssh_config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TDXHW_LABS", str(labs))
    monkeypatch.setenv("TDXHW_SSH_CONFIG", str(ssh_config))


def shown_by_ssh_keygen(machine: NamespaceHost) -> str:
    command = ["ssh-keygen", "-lf", str(machine.folder / "host_key.pub")]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[1]


def test_trust_shows_the_fingerprint_and_records_the_key(
    labs: Path, hosts: list[Host], ssh_config: Path, machines: list[NamespaceHost], capsys: Output
) -> None:
    (labs / "known_hosts").unlink()
    right = shown_by_ssh_keygen(machines[0])

    assert main(["lab", "trust", "host-0", "--fingerprint", "SHA256:wrong"]) == 2
    assert not (labs / "known_hosts").exists()
    with pytest.raises(HostKeyRefused):
        Session.open(hosts[0], labs, ssh_config=ssh_config)

    assert main(["lab", "trust", "host-0", "--fingerprint", right]) == 0
    assert f"{machines[0].address} shows ED25519 {right}" in capsys.readouterr().out
    Session.open(hosts[0], labs, ssh_config=ssh_config).close()
    assert (labs / "known_hosts").read_text() == machines[0].known_hosts_line()


def test_trust_records_nothing_unless_somebody_says_yes(
    labs: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    (labs / "known_hosts").unlink()
    for answer in ("", "n\n"):
        monkeypatch.setattr("sys.stdin", io.StringIO(answer))
        assert main(["lab", "trust", "host-0"]) == 2
        assert "nothing was recorded" in capsys.readouterr().err
    assert not (labs / "known_hosts").exists()


def test_trust_replaces_a_changed_key_only_when_told_to(
    labs: Path, machines: list[NamespaceHost], capsys: Output
) -> None:
    known = labs / "known_hosts"
    others = machines[1].known_hosts_line()
    known.write_text(f"{machines[0].address} {others.split(' ', 1)[1]}{others}")
    right = shown_by_ssh_keygen(machines[0])

    assert main(["lab", "trust", "host-0", "--fingerprint", right]) == 2
    assert "its key has changed" in capsys.readouterr().err
    assert main(["lab", "trust", "host-0", "--fingerprint", right, "--replace"]) == 0
    assert sorted(known.read_text().splitlines(keepends=True)) == sorted([machines[0].known_hosts_line(), others])


def test_the_doctor_asks_every_host_of_the_lab(capsys: Output) -> None:
    here = main(["doctor", "--json"])
    local = json.loads(capsys.readouterr().out)
    code = main(["doctor", "--on", "lab:all", "--json"])
    documents = json.loads(capsys.readouterr().out)

    assert [document["host"] for document in documents] == ["host-0", "host-1", "host-2"]
    assert code == here, "the hosts have this machine's kernel"
    for document in documents:
        assert document["verdict"] == local["verdict"]
        assert [check["name"] for check in document["checks"]] == [check["name"] for check in local["checks"]]


def test_the_doctor_cannot_tell_of_a_host_that_does_not_answer(
    labs: Path, machines: list[NamespaceHost], capsys: Output
) -> None:
    (labs / "netns.yaml").write_text("host: {name: gone, ssh: root@127.0.0.1}\n")
    (labs / "known_hosts").write_text("")
    assert main(["doctor", "--on", "lab:gone"]) == 2
    assert capsys.readouterr().out.startswith("gone: could not tell: gone: 127.0.0.1:22: ")


def test_the_doctor_holds_a_host_to_its_lab_file(labs: Path, machines: list[NamespaceHost], capsys: Output) -> None:
    (labs / "netns.yaml").write_text(
        f"host: {{name: host-0, ssh: root@{machines[0].address}, expects: {{kernel: '1.0-*'}}}}\n"
    )
    assert main(["doctor", "--on", "lab:host-0", "--json"]) == 1
    checks = {check["name"]: check for check in json.loads(capsys.readouterr().out)["checks"]}
    assert "the lab file expects 1.0-*" in checks["booted-kernel"]["detail"]


def test_status_says_who_is_free_who_is_taken_and_who_does_not_answer(
    labs: Path, hosts: list[Host], ssh_config: Path, capsys: Output
) -> None:
    assert main(["lab", "status"]) == 0
    assert capsys.readouterr().out.count("free") == 3

    (labs / "gone.yaml").write_text("host: {name: gone, ssh: 'ssh://root@127.0.0.1:1'}\n")
    with Session.open(hosts[1], labs, ssh_config=ssh_config) as session, Lease(session, "somebody's work"):
        assert main(["lab", "status", "--json"]) == 1
    answers = {answer["host"]: answer for answer in json.loads(capsys.readouterr().out)}
    assert [name for name, answer in answers.items() if answer["free"]] == ["host-0", "host-2"]
    assert 'for "somebody\'s work"' in answers["host-1"]["holder"]
    assert "Connection refused" in answers["gone"]["problem"]

    assert main(["lab", "status", "host-0,host-2"]) == 0, "only those that were asked for"
    assert main(["lab", "status", "host-9"]) == 2
