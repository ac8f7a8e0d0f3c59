"""The console of a real virtual machine: serial over LAN through ipmi_sim, a program, and the kernel log over ssh."""

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tdxhw.cli import main
from tdxhw.lab import inventory
from tdxhw.lab.console import Capture, open_console, read_log
from tdxhw.lab.console.findings import scan
from tdxhw.lab.power import open_power
from tests.lab import bmc_ipmi, virtual_machine, vm_image
from tests.lab.bmc_ipmi import IpmiBmc
from tests.lab.kernel_machine import PANICS_AT_BOOT, KernelMachine
from tests.lab.missing import skip_or_fail
from tests.lab.test_virtual_machine import answers, connect

pytestmark = pytest.mark.timeout(400)

# A console server: what a machine says on its serial port, as long as it is on.
SERVE = """
import os, socket, sys
with socket.socket(socket.AF_UNIX) as port:
    port.connect(sys.argv[1])
    while data := port.recv(65536):
        os.write(1, data)
"""


@pytest.fixture(scope="module")
def image() -> vm_image.Image:
    if reason := virtual_machine.why_impossible() or bmc_ipmi.why_impossible():
        skip_or_fail(f"no consoles here: {reason}")
    return vm_image.build()


@pytest.fixture
def machine(image: vm_image.Image, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[KernelMachine]:
    machine = KernelMachine.make(tmp_path / "machine", image, getattr(request, "param", ""))
    yield machine
    machine.kill()


@pytest.fixture
def bmc(machine: KernelMachine, tmp_path: Path) -> Iterator[IpmiBmc]:
    folder = tmp_path / "bmc"
    folder.mkdir()
    with IpmiBmc(folder, machine, machine.console_socket) as bmc:
        yield bmc


@pytest.fixture
def labs(bmc: IpmiBmc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "labs"
    folder.mkdir()
    (folder / "a.yaml").write_text(
        f"host: {{name: a, ssh: 'ssh://127.0.0.1:9', power: {{driver: ipmi, {bmc.lab_options('BMC')}}}, "
        "console: {driver: ipmi-sol}}\n"
    )
    monkeypatch.setenv("BMC", bmc.credentials)
    return folder


def console_of(labs: Path, path: Path) -> Capture:
    console = open_console(inventory.load(labs).host("a"), path)
    assert console is not None
    return console


def wait_for(what: str, condition: Callable[[], bool], console: Capture, limit_s: float = 180) -> None:
    until = time.monotonic() + limit_s
    while not condition():
        last = [line.text for line in console.lines[-5:]]
        assert time.monotonic() < until, f"no {what} in {limit_s} s; {console.problem}; {last}"
        time.sleep(0.1)


def boots(console: Capture) -> int:
    return sum("] Linux version " in line.text for line in console.lines)


@pytest.mark.parametrize("machine", [PANICS_AT_BOOT], indirect=True)
def test_serial_over_lan_keeps_a_boot_its_panic_and_the_boot_after_it(
    machine: KernelMachine, labs: Path, tmp_path: Path
) -> None:
    power = open_power(inventory.load(labs).host("a"))
    assert power is not None
    path = tmp_path / "console.log"
    began = time.time()
    with console_of(labs, path) as console:
        assert console.wait_open(20), console.problem
        power.on()
        wait_for("second boot", lambda: boots(console) == 2, console, 120)
        power.off()
    assert console.problem == ""
    assert console.gaps == 0

    first = next(line for line in console.lines if "] Linux version " in line.text)
    assert began < first.at < time.time()
    assert sorted(line.at for line in console.lines) == [line.at for line in console.lines]
    with path.open(encoding="utf-8") as file:
        kept = list(read_log(file))
    assert [line.text for line in kept] == [line.text for line in console.lines]

    (panic, *_) = (finding for finding in scan(kept) if finding.kind == "panic")
    assert panic.text.startswith("Kernel panic - not syncing: Attempted to kill init! exitcode=0x00000100")
    assert any("Rebooting in 5 seconds" in line for line in panic.lines)
    assert len(panic.lines) > 10


def test_a_bmc_that_goes_away_is_a_gap_that_is_told_and_ends(
    machine: KernelMachine, bmc: IpmiBmc, labs: Path, tmp_path: Path
) -> None:
    with console_of(labs, tmp_path / "console.log") as console:
        assert console.wait_open(20), console.problem
        machine.start()
        wait_for("boot", lambda: boots(console) == 1, console)
        bmc.stop()
        wait_for("gap", lambda: console.gaps == 1, console, 150)
        assert "is lost" in console.problem
        bmc.start()
        assert console.wait_open(60), console.problem
        machine.reset()
        wait_for("second boot", lambda: boots(console) == 2, console)
        assert console.problem == ""
    assert "is lost" in (tmp_path / "console.log").read_text()


def test_a_session_that_a_killed_tdxhw_has_left_behind_is_taken_over(
    machine: KernelMachine, bmc: IpmiBmc, labs: Path, tmp_path: Path
) -> None:
    machine.start()
    with console_of(labs, tmp_path / "first.log") as first:
        assert first.wait_open(20), first.problem
        with console_of(labs, tmp_path / "second.log") as second:
            assert second.wait_open(20), second.problem
            machine.reset()
            wait_for("boot", lambda: boots(second) == 1, second)


def test_the_command_line_shows_a_boot(
    machine: KernelMachine, labs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("TDXHW_LABS", str(labs))
    machine.start()
    assert main(["lab", "console", "a", "--seconds", "6", "--log", str(tmp_path / "console.log")]) == 0
    output = capsys.readouterr()
    assert "[    0.000000] Linux version " in output.out
    assert main(["lab", "findings", str(tmp_path / "console.log")]) == 0


def test_a_program_may_be_the_console(machine: KernelMachine, tmp_path: Path) -> None:
    labs = tmp_path / "labs"
    labs.mkdir()
    script = tmp_path / "serve.py"
    script.write_text(SERVE)
    argv = f"[{sys.executable}, {script}, {machine.console_socket}]"
    (labs / "a.yaml").write_text(f"host: {{name: a, ssh: a, console: {{driver: command, argv: {argv}}}}}\n")
    with console_of(labs, tmp_path / "console.log") as console:
        time.sleep(0.5)  # nothing is there yet
        machine.start()
        wait_for("boot", lambda: boots(console) >= 1, console)
        machine.kill()
        wait_for("end", lambda: console.problem != "", console)
        machine.start()
        # Its first lines may be missed: the program is tried again once a second.
        wait_for("second boot", lambda: any("multi-user.target" in line.text for line in console.lines), console)
    assert console.gaps >= 1


def test_the_kernel_log_over_ssh_goes_on_after_a_reboot_and_repeats_nothing(
    machine: KernelMachine, image: vm_image.Image, tmp_path: Path
) -> None:
    labs = tmp_path / "labs"
    labs.mkdir()
    (labs / "vm.yaml").write_text(f"host: {{name: vm, ssh: 'ssh://root@127.0.0.1:{machine.port}'}}\n")
    (labs / "known_hosts").write_text(f"[127.0.0.1]:{machine.port} {image.host_key}\n")
    config = labs / "ssh_config"
    config.write_text(f"Host *\n  IdentityFile {image.client_key}\n  IdentitiesOnly yes\n")
    machine.start()
    machine.wait_until(answers(labs, config), limit_s=300)
    console = open_console(inventory.load(labs).host("vm"), tmp_path / "console.log", labs=labs, ssh_config=config)
    assert console is not None

    def spoke(text: str) -> bool:
        return any(text in line.text for line in console.lines)

    with console:
        wait_for("old lines", lambda: boots(console) == 1, console)
        with connect(labs, config) as session:
            session.check("echo 'tdxhw was here' >/dev/kmsg")
            ahead_s = float(session.check("date +%s.%N")) - time.time()
        wait_for("new line", lambda: spoke("tdxhw was here"), console)
        at = next(line.at for line in console.lines if "tdxhw was here" in line.text)
        assert abs(at - time.time()) < 10, f"the clock of the host is {ahead_s:.0f} s ahead"
        assert next(line.at for line in console.lines if "] Linux version " in line.text) < at - 5

        with connect(labs, config) as session:
            session.check("systemctl --no-block reboot")
        wait_for("second boot", lambda: boots(console) == 2, console, 240)
        with connect(labs, config) as session:
            session.check("echo 'tdxhw was here again' >/dev/kmsg")
        wait_for("new line", lambda: spoke("tdxhw was here again"), console)
    assert console.problem == ""
    assert console.gaps >= 1
    assert sum("tdxhw was here" in line.text for line in console.lines) == 2
