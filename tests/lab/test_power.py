"""Power control of a real virtual machine through two BMCs that other people wrote: IPMI and Redfish."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tdxhw.cli import main
from tdxhw.lab import inventory
from tdxhw.lab.errors import PowerFailed
from tdxhw.lab.power import Power, open_power
from tdxhw.lab.power.switch import AwaitedPower, Patience
from tests.lab import bmc_ipmi, bmc_redfish, virtual_machine, vm_image
from tests.lab.bmc_ipmi import IpmiBmc
from tests.lab.bmc_redfish import OTHER, SYSTEM, RedfishBmc
from tests.lab.kernel_machine import KernelMachine
from tests.lab.missing import skip_or_fail

pytestmark = pytest.mark.timeout(300)

USUAL = Patience()
BMCS = {"ipmi": IpmiBmc, "redfish": RedfishBmc}


class Memory:
    """A machine that is only remembered, where no test looks at what it does."""

    def __init__(self) -> None:
        self.on = False

    def start(self) -> None:
        self.on = True

    def kill(self) -> None:
        self.on = False

    def reset(self) -> None:
        self.on = True

    def is_running(self) -> bool:
        return self.on


@pytest.fixture(scope="module")
def image() -> vm_image.Image:
    if reason := virtual_machine.why_impossible() or bmc_ipmi.why_impossible() or bmc_redfish.why_impossible():
        skip_or_fail(f"no BMCs here: {reason}")
    return vm_image.build()


@pytest.fixture
def machine(image: vm_image.Image, tmp_path: Path) -> Iterator[KernelMachine]:
    machine = KernelMachine.make(tmp_path / "machine", image)
    yield machine
    machine.kill()


@pytest.fixture(params=BMCS)
def driver(request: pytest.FixtureRequest, image: vm_image.Image) -> str:
    return str(request.param)


@pytest.fixture
def bmc(driver: str, tmp_path: Path) -> Iterator[IpmiBmc | RedfishBmc]:
    folder = tmp_path / "bmc"
    folder.mkdir()
    with BMCS[driver](folder, Memory()) as bmc:
        yield bmc


def lab_file(folder: Path, driver: str, options: str) -> Path:
    labs = folder / "labs"
    labs.mkdir(exist_ok=True)
    (labs / "a.yaml").write_text(
        f"host: {{name: a, ssh: 'ssh://127.0.0.1:9', power: {{driver: {driver}, {options}}}}}\n"
    )
    return labs


def switch(labs: Path, credentials: str, patience: Patience = USUAL) -> Power:
    power = open_power(inventory.load(labs).host("a"), {"BMC": credentials})
    assert isinstance(power, AwaitedPower)
    power._patience = patience
    return power


def boots(machine: KernelMachine) -> int:
    """Return how many kernels have spoken on its console."""
    return machine.console.read_text(errors="replace").count("] Linux version ") if machine.console.exists() else 0


def test_a_real_machine_is_switched_on_reset_and_off(driver: str, machine: KernelMachine, tmp_path: Path) -> None:
    folder = tmp_path / "bmc"
    folder.mkdir()
    with BMCS[driver](folder, machine) as bmc:
        power = switch(lab_file(tmp_path, driver, bmc.lab_options("BMC")), bmc.credentials)
        assert not power.is_on()

        power.on()
        assert power.is_on()
        assert machine.is_running()
        machine.wait_until(lambda: boots(machine) == 1, limit_s=60)

        power.on()
        assert bmc.hook.pressed == ["on"], "it was on already"

        power.reset()
        machine.wait_until(lambda: boots(machine) == 2, limit_s=60)
        assert bmc.hook.pressed == ["on", "reset"]

        power.off()
        assert not machine.is_running()
        assert not power.is_on()
        power.off()
        assert bmc.hook.pressed == ["on", "reset", "off"]

        power.reset()
        assert machine.is_running(), "a machine that is off is switched on"


def test_the_command_line_does_it_too(
    driver: str, bmc: IpmiBmc | RedfishBmc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    labs = lab_file(tmp_path, driver, bmc.lab_options("BMC_OF_A"))
    monkeypatch.setenv("TDXHW_LABS", str(labs))
    assert main(["lab", "power", "a", "status"]) == 2
    assert "the environment variable BMC_OF_A is not set" in capsys.readouterr().err

    monkeypatch.setenv("BMC_OF_A", bmc.credentials)
    assert main(["lab", "power", "a", "on"]) == 0
    assert main(["lab", "power", "a", "status"]) == 0
    assert f"a: on ({driver} " in capsys.readouterr().out
    assert bmc.hook.pressed == ["on"]


def test_a_bmc_that_restarts_is_waited_for(driver: str, bmc: IpmiBmc | RedfishBmc, tmp_path: Path) -> None:
    power = switch(lab_file(tmp_path, driver, bmc.lab_options("BMC")), bmc.credentials)
    bmc.stop()
    restart = threading.Timer(3, bmc.start)
    restart.start()
    power.on()
    restart.join()
    assert power.is_on()


def test_a_bmc_that_is_gone_fails_in_time(driver: str, bmc: IpmiBmc | RedfishBmc, tmp_path: Path) -> None:
    labs = lab_file(tmp_path, driver, bmc.lab_options("BMC"))
    bmc.stop()
    started = time.monotonic()
    with pytest.raises(PowerFailed, match=rf"^a: {driver} .*: its state is unknown after 6 s: no "):
        switch(labs, bmc.credentials, Patience(answer_s=6)).is_on()
    assert time.monotonic() - started < 6 + 20


def test_a_wrong_password_is_an_error_without_it(driver: str, bmc: IpmiBmc | RedfishBmc, tmp_path: Path) -> None:
    labs = lab_file(tmp_path, driver, bmc.lab_options("BMC"))
    with pytest.raises(PowerFailed) as error:
        switch(labs, "admin:wrong-but-secret", Patience(answer_s=3)).is_on()
    assert "credentials in BMC" in str(error.value)
    assert "wrong-but-secret" not in str(error.value)
    assert bmc.hook.pressed == []


def test_the_password_is_on_no_command_line_and_in_no_file(
    driver: str, bmc: IpmiBmc | RedfishBmc, tmp_path: Path
) -> None:
    password = bmc.credentials.partition(":")[2]
    seen: set[bytes] = set()
    stop = threading.Event()

    def watch() -> None:
        while not stop.is_set():
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                try:
                    seen.add(path.read_bytes())
                except OSError:
                    continue

    watcher = threading.Thread(target=watch)
    watcher.start()
    power = switch(lab_file(tmp_path, driver, bmc.lab_options("BMC")), bmc.credentials)
    try:
        for _ in range(5):
            power.is_on()
    finally:
        stop.set()
        watcher.join()
    assert driver != "ipmi" or any(b"ipmitool" in command for command in seen), "the watcher saw nothing"
    assert not any(password.encode() in command for command in seen)
    assert password not in (tmp_path / "labs" / "a.yaml").read_text()


# ---- Redfish only ----


@pytest.fixture
def redfish(image: vm_image.Image, tmp_path: Path) -> Iterator[Callable[[int], RedfishBmc]]:
    opened: list[RedfishBmc] = []

    def make(systems: int) -> RedfishBmc:
        folder = tmp_path / "bmc"
        folder.mkdir()
        opened.append(RedfishBmc(folder, Memory(), systems=systems))
        return opened[-1].__enter__()

    yield make
    for bmc in opened:
        bmc.__exit__(None, None, None)


def test_a_certificate_that_nobody_vouches_for_is_refused(redfish: Callable[[int], RedfishBmc], tmp_path: Path) -> None:
    bmc = redfish(1)
    other = tmp_path / "other"
    other.mkdir()
    bmc_redfish.make_certificates(other)
    for ca in ("", f", ca: {other}/ca.pem"):
        labs = lab_file(tmp_path, "redfish", f"url: '{bmc.url}', credentials_env: BMC{ca}")
        with pytest.raises(PowerFailed, match=r"its certificate is not trusted \(.*\): name the CA .* with ca: FILE"):
            switch(labs, bmc.credentials).is_on()
    assert "/redfish/v1" not in bmc.log(), "a stranger was told something"

    labs = lab_file(tmp_path, "redfish", bmc.lab_options("BMC"))
    assert not switch(labs, bmc.credentials).is_on()
    assert "GET /redfish/v1/Systems" in bmc.log()


def test_a_certificate_for_another_name_is_refused(redfish: Callable[[int], RedfishBmc], tmp_path: Path) -> None:
    bmc = redfish(1)
    labs = lab_file(tmp_path, "redfish", bmc.lab_options("BMC").replace("127.0.0.1", "localhost"))
    with pytest.raises(PowerFailed, match=r"its certificate is not trusted \(.*localhost.*\): url: has to say a name"):
        switch(labs, bmc.credentials).is_on()


def test_of_two_systems_the_named_one_is_switched(redfish: Callable[[int], RedfishBmc], tmp_path: Path) -> None:
    bmc = redfish(2)
    labs = lab_file(tmp_path, "redfish", bmc.lab_options("BMC"))
    with pytest.raises(PowerFailed, match="has 2 systems: say which with system: …"):
        switch(labs, bmc.credentials).on()

    labs = lab_file(tmp_path, "redfish", f"{bmc.lab_options('BMC')}, system: {SYSTEM}")
    switch(labs, bmc.credentials).on()
    assert bmc.hook.pressed == ["on"]

    labs = lab_file(tmp_path, "redfish", f"{bmc.lab_options('BMC')}, system: {OTHER}")
    assert not switch(labs, bmc.credentials).is_on()


# ---- command: what a lab file of a virtual machine says ----


def test_a_command_drives_the_machine(machine: KernelMachine, tmp_path: Path) -> None:
    script = tmp_path / "button"
    root = Path(__file__).parents[2]
    python = f"cd {root} && exec {os.environ.get('VIRTUAL_ENV', root / '.venv')}/bin/python"
    script.write_text(f'#!/bin/sh\n{python} -m tests.lab.grub_machine {machine.folder} "$1"\n')
    script.chmod(0o755)
    machine.start()  # its command line has a kernel, which `grub_machine` does not know
    buttons = ", ".join(f"{name}: [{script}, '{name}']" for name in ("on", "off", "reset", "status"))
    power = switch(lab_file(tmp_path, "command", buttons), "")
    assert power.is_on()
    machine.wait_until(lambda: boots(machine) == 1, limit_s=60)
    power.reset()
    machine.wait_until(lambda: boots(machine) == 2, limit_s=60)
    power.off()
    assert not machine.is_running()
