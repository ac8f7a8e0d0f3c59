"""What works where tdxhw was sent to a host, or installed without its lab packages, and what says what to install."""

import subprocess
import sys
from pathlib import Path

import pytest

BLOCK = """
import sys
BLOCKED = sys.argv.pop(1).split(",")
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocker())
from tdxhw.cli import main
sys.exit(main(sys.argv[1:]))
"""


LAB = "yaml,fabric,paramiko,jinja2,kcidb_io,unicorn,sushy"


def tdxhw(*arguments: str, without: str = LAB) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", BLOCK, without, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_the_doctor_needs_nothing_but_the_core() -> None:
    done = tdxhw("doctor")
    assert done.returncode in (0, 1, 2)
    assert "this host: " in done.stdout, done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("lab", "list"),
        ("lab", "status"),
        ("run", "--on", "lab:spr-01"),
        ("doctor", "--on", "lab:spr-01"),
        ("lab", "trust", "a"),
    ],
)
def test_lab_commands_say_what_to_install(arguments: tuple[str, ...]) -> None:
    done = tdxhw(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("tdxhw: ")
    assert done.stderr.endswith("pip install 'tdxhw[lab]'\n")
    assert done.stderr.count("\n") == 1


def test_redfish_says_what_to_install_and_nothing_else_needs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BMC", "admin:secret")
    commands = "{driver: command, on: [a], off: [a], status: [echo, 'on']}"
    redfish = "{driver: redfish, url: 'https://bmc-1', credentials_env: BMC}"
    (tmp_path / "a.yaml").write_text(
        f"hosts:\n- {{name: a, ssh: a, power: {redfish}}}\n- {{name: b, ssh: b, power: {commands}}}\n"
    )
    done = tdxhw("lab", "power", "b", "status", "--labs", str(tmp_path), without="sushy")
    assert (done.returncode, done.stdout) == (0, "b: on (command)\n"), done.stderr

    done = tdxhw("lab", "power", "a", "status", "--labs", str(tmp_path), without="sushy")
    assert done.returncode == 2
    assert done.stderr == "tdxhw: Redfish is spoken with sushy: pip install 'tdxhw[validate]'\n"
