"""The Ansible roles on a real sshd host: check mode and the second run change nothing; the lint is clean."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tdxhw.lab.connection import Session
from tdxhw.lab.hosts import Host
from tests.lab.namespace_hosts import NamespaceHost

ANSIBLE = Path(__file__).parents[2] / "ansible"
BIN = Path(sys.executable).parent

# The host has no boot loader; everything else is the roles' own.
VARIABLES = {
    "tdx_boot_update_grub": ["sh", "-c", "echo updated >>/root/grub-was-updated"],
    "tdx_kvm_group": "tdxhw-kvm",
    "tdx_kvm_users": ["nobody"],
    "tdx_runner_folder": "/root/opt/tdxhw",
    "tdx_runner_link": "/root/tdxhw",
}


@pytest.fixture
def environment(labs: Path, machines: list[NamespaceHost], tmp_path: Path) -> dict[str, str]:
    return os.environ | {
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "TDXHW_LABS": str(labs),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "ANSIBLE_PRIVATE_KEY_FILE": str(machines[0].client_key),
        "ANSIBLE_HOME": str(tmp_path / "ansible"),
        # Else a connection that an earlier test left open for 60 s would be used again.
        "ANSIBLE_SSH_CONTROL_PATH_DIR": str(tmp_path / "cp"),
        "ANSIBLE_LOCALHOST_WARNING": "False",
        "ANSIBLE_INVENTORY_UNPARSED_WARNING": "False",
        "NO_COLOR": "1",
    }


def play(environment: dict[str, str], playbook: str, *options: str, code: int = 0) -> dict[str, int]:
    """Run a playbook on host-2; return its recap."""
    command = [str(BIN / "ansible-playbook"), f"playbooks/{playbook}.yml", "--limit", "host-2"]
    command += ["--extra-vars", json.dumps(VARIABLES), *options]
    done = subprocess.run(
        command, cwd=ANSIBLE, env=environment, capture_output=True, text=True, timeout=110, check=False
    )
    assert done.returncode == code, done.stdout[-3000:] + done.stderr[-2000:]
    recap = re.search(r"^host-2\s+: (.*)$", done.stdout, re.MULTILINE)
    assert recap, done.stdout
    return {key: int(value) for key, value in re.findall(r"(\w+)=(\d+)", recap[1])}


@pytest.fixture
def session(hosts: list[Host], labs: Path, ssh_config: Path) -> Session:
    return Session.open(hosts[2], labs, ssh_config=ssh_config)


@pytest.mark.slow
def test_preparing_twice_changes_once(environment: dict[str, str], session: Session) -> None:
    with session:
        foreseen = play(environment, "prepare", "--check", "--diff")
        assert session.run("ls /etc/modprobe.d/tdxhw.conf /root/grub-was-updated").stdout == "", "check mode only looks"

        first = play(environment, "prepare")
        assert first["changed"] >= 6
        # Two handlers run commands, and the user's group is not there yet: these cannot be foreseen.
        assert foreseen["changed"] == first["changed"] - 3
        assert play(environment, "prepare")["changed"] == 0

        assert session.check("cat /root/grub-was-updated") == "updated\n", "once, because it changed once"
        grub = ". /etc/default/grub.d/50-tdxhw.cfg; echo $GRUB_CMDLINE_LINUX"
        assert session.check(f"GRUB_CMDLINE_LINUX=quiet; {grub}") == "quiet nohibernate kvm_intel.tdx=1\n"
        assert "tdx=1" in session.check("cat /etc/modprobe.d/tdxhw.conf")
        assert session.check("getent group tdxhw-kvm").strip().endswith(":nobody")
        assert 'GROUP="tdxhw-kvm", MODE="0660"' in session.check("cat /etc/udev/rules.d/99-tdxhw-kvm.rules")


@pytest.mark.slow
def test_the_runner_is_installed_once_and_runs(environment: dict[str, str], session: Session) -> None:
    with session:
        assert play(environment, "runner")["changed"] == 3
        assert play(environment, "runner")["changed"] == 0
        assert session.check("/root/tdxhw --version").startswith("tdxhw, version ")


@pytest.mark.slow
def test_the_check_says_what_the_doctor_says(environment: dict[str, str]) -> None:
    tdxhw = [str(BIN / "tdxhw"), "doctor", "--on", "lab:host-2"]
    key = environment["ANSIBLE_PRIVATE_KEY_FILE"]
    config = Path(environment["XDG_CACHE_HOME"]).parent / "ssh_config_for_doctor"
    config.write_text(f"Host *\n  IdentityFile {key}\n")
    asked = environment | {"TDXHW_SSH_CONFIG": str(config)}
    code = subprocess.run(tdxhw, env=asked, capture_output=True, timeout=60, check=False).returncode

    recap = play(environment, "check", code=2 if code == 1 else 0)
    assert recap["changed"] == 0
    assert recap["failed"] == (1 if code == 1 else 0)


def test_the_inventory_checks_host_keys_and_groups_by_label(environment: dict[str, str], labs: Path) -> None:
    command = [str(BIN / "ansible-inventory"), "--list"]
    done = subprocess.run(command, cwd=ANSIBLE, env=environment, capture_output=True, text=True, timeout=60, check=True)
    listed: dict[str, Any] = json.loads(done.stdout)

    assert sorted(listed["label_netns"]["hosts"]) == ["host-0", "host-1", "host-2"]
    arguments = listed["_meta"]["hostvars"]["host-0"]["ansible_ssh_common_args"]
    assert "StrictHostKeyChecking=yes" in arguments
    assert str(labs / "known_hosts") in arguments


def test_a_host_whose_key_nobody_vouched_for_is_not_touched(environment: dict[str, str], labs: Path) -> None:
    (labs / "known_hosts").write_text("")
    recap = play(environment, "prepare", code=4)
    assert (recap["ok"], recap["changed"], recap["unreachable"]) == (0, 0, 1)


@pytest.mark.slow
def test_the_roles_pass_the_production_profile_of_ansible_lint(environment: dict[str, str]) -> None:
    command = [str(BIN / "ansible-lint"), "--offline", "--profile", "production", "--strict", "-q", "."]
    done = subprocess.run(
        command, cwd=ANSIBLE, env=environment, capture_output=True, text=True, timeout=110, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
