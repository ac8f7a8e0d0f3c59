"""Power control: what all drivers have in common, commands, ipmitool's command line, and what errors say."""

import os
import signal
import stat
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tdxhw.cli import main
from tdxhw.lab import bounded_command
from tdxhw.lab.bounded_command import run_bounded
from tdxhw.lab.credentials import Credentials
from tdxhw.lab.errors import PowerBusy, PowerFailed
from tdxhw.lab.hosts import Driver, Host, SshTarget
from tdxhw.lab.ipmitool import Ipmitool
from tdxhw.lab.power import open_power
from tdxhw.lab.power.ipmi import IpmiSwitch
from tdxhw.lab.power.switch import AwaitedPower, Button, Patience, State

SECRET = "hunter2-of-the-bmc"
NO_SESSION = "echo 'Error: Unable to establish IPMI v2 / RMCP+ session' >&2; exit 1"


class Clock:
    """Time that passes only when somebody sleeps."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds


class Machine:
    """A machine behind a BMC that is late, forgetful or busy."""

    name = "scripted"
    has_reset = True

    def __init__(
        self, clock: Clock, *, on: bool = False, late_s: float = 3.0, troubles: list[str] | None = None
    ) -> None:
        self.is_on = on
        self.pressed: list[str] = []
        self.resets = 0
        self.open = 0
        self.most_open = 0
        self._clock = clock
        self._late_s = late_s
        self._troubles = troubles or []
        self._pending: tuple[float, Button] | None = None

    @contextmanager
    def connect(self) -> Iterator["Machine"]:
        self._trouble("connect")
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        try:
            yield self
        finally:
            self.open -= 1

    def state(self) -> State:
        self._trouble("state")
        self._apply()
        return State.ON if self.is_on else State.OFF

    def press(self, button: Button) -> None:
        if self._trouble("press") == "forget":
            return
        self.pressed.append(button.value)
        self._pending = (self._clock() + self._late_s, button)

    def _apply(self) -> None:
        if self._pending is not None and self._clock() >= self._pending[0]:
            _, button = self._pending
            self._pending = None
            self.resets += button is Button.RESET and self.is_on
            self.is_on = button is not Button.OFF

    def _trouble(self, where: str) -> str:
        if self._troubles and self._troubles[0].startswith(where):
            trouble = self._troubles.pop(0).partition(" ")[2]
            if trouble == "busy":
                raise PowerBusy("is busy")
            if trouble == "refused":
                raise PowerFailed("refuses")
            return trouble
        return ""


def power(machine: Machine, clock: Clock, **patience: float) -> AwaitedPower:
    return AwaitedPower("spr-01", machine, Patience(**patience), clock=clock, sleep=clock.sleep)


SOME = ["connect busy", "state busy", "press busy", "press forget", "state no", "press no"]
# A button is pressed again after 30 s: four that are forgotten are the whole time limit.
TROUBLES = st.lists(st.sampled_from(SOME), max_size=5).filter(lambda some: some.count("press forget") <= 2)


@given(st.lists(st.sampled_from(["on", "off", "reset"]), max_size=4), st.booleans(), st.floats(0, 12), TROUBLES)
def test_whatever_a_bmc_is_late_with_or_forgets_a_call_returns_in_the_state_it_was_asked_for(
    calls: list[str], on: bool, late_s: float, troubles: list[str]
) -> None:
    clock = Clock()
    machine = Machine(clock, on=on, late_s=late_s, troubles=troubles)
    switch = power(machine, clock)
    for call in calls:
        was_on = switch.is_on()
        pressed = len(machine.pressed)
        getattr(switch, call)()
        assert switch.is_on() is (call != "off")
        if call != "reset" and was_on is (call == "on"):
            assert len(machine.pressed) == pressed, "nothing to do, so nothing is done"
    assert machine.open == 0
    assert machine.most_open <= 1


def test_a_reset_is_pressed_once_and_a_machine_that_is_off_is_switched_on() -> None:
    clock = Clock()
    machine = Machine(clock, on=True, late_s=0)
    power(machine, clock).reset()
    assert machine.pressed == ["reset"]

    machine = Machine(clock, on=False)
    power(machine, clock).reset()
    assert machine.pressed == ["on"]


def test_a_driver_without_reset_switches_off_and_on() -> None:
    clock = Clock()
    machine = Machine(clock, on=True)
    machine.has_reset = False
    power(machine, clock).reset()
    assert machine.pressed == ["off", "on"]


def test_a_button_that_changes_nothing_is_pressed_again_but_not_all_the_time() -> None:
    clock = Clock()
    machine = Machine(clock, late_s=1e9)
    with pytest.raises(PowerFailed, match=r"^spr-01: scripted: is not on after 100 s$"):
        power(machine, clock, change_s=100, again_s=30).on()
    assert machine.pressed == ["on"] * 4
    assert clock.now == pytest.approx(1100, abs=2)


def test_what_is_busy_for_too_long_fails_in_time_and_says_why() -> None:
    clock = Clock()
    machine = Machine(clock, troubles=["connect busy"] * 1000)
    with pytest.raises(PowerFailed, match=r"^spr-01: scripted: its state is unknown after 60 s: is busy$"):
        power(machine, clock).is_on()
    assert clock.now == pytest.approx(1060)


def test_a_busy_bmc_is_asked_less_and_less_often() -> None:
    clock = Clock()
    machine = Machine(clock, troubles=["connect busy"] * 1000)
    with pytest.raises(PowerFailed):
        power(machine, clock).is_on()
    assert 1000 - len(machine._troubles) < 10, "an account may be locked after a few wrong passwords"


def test_what_no_further_try_can_cure_is_not_tried_again() -> None:
    clock = Clock()
    machine = Machine(clock, troubles=["connect refused"])
    with pytest.raises(PowerFailed, match=r"^spr-01: scripted: refuses$"):
        power(machine, clock).on()
    assert clock.now == 1000


# ---- commands ----


def host(driver: str, **options: "str | int | tuple[str, ...]") -> Host:
    return Host("spr-01", SshTarget("spr-01"), "labs/spr-01.yaml:2", power=Driver(driver, options))


def script(folder: Path, name: str, text: str) -> str:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@pytest.fixture
def socket_strip(tmp_path: Path) -> Callable[..., Host]:
    """Return what makes a host on a switched socket, whose state is a file."""
    state = tmp_path / "state"
    state.write_text("off")

    def make(**replaced: str) -> Host:
        commands = {"on": f"echo on >{state}", "off": f"echo off >{state}", "status": f"echo Power is; cat {state}"}
        argvs = {name: (script(tmp_path, name, text),) for name, text in (commands | replaced).items()}
        return host("command", **argvs)

    return make


def test_commands_switch_and_reset_without_a_command_is_off_and_on(socket_strip: Callable[..., Host]) -> None:
    switch = open_power(socket_strip())
    assert switch is not None
    assert not switch.is_on()
    switch.on()
    assert switch.is_on()
    switch.reset()
    assert switch.is_on()
    switch.off()
    assert not switch.is_on()


def test_a_status_that_says_neither_is_an_error_that_quotes_it(socket_strip: Callable[..., Host]) -> None:
    switch = open_power(socket_strip(status="echo Power is fine"))
    assert switch is not None
    with pytest.raises(PowerFailed, match="status has to say 'on' or 'off' last, not 'Power is fine'"):
        switch.is_on()


def test_a_command_that_is_not_there_says_so(tmp_path: Path) -> None:
    switch = open_power(host("command", on=("x",), off=("x",), status=(str(tmp_path / "nothing"),)))
    assert switch is not None
    with pytest.raises(PowerFailed, match=r"^spr-01: command: status: cannot run '.*nothing': No such file"):
        switch.is_on()


def test_a_command_is_run_without_a_shell(tmp_path: Path) -> None:
    done = run_bounded([sys.executable, "-c", "import sys; print(sys.argv[1:])", "a b; touch x", "$HOME"], 20)
    assert done.stdout == "['a b; touch x', '$HOME']\n"


def test_a_time_limit_also_ends_what_the_command_started(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    done = run_bounded(["sh", "-c", f"sleep 600 & echo $! >{pid}; echo begun; wait"], 3)
    assert (done.exit_code, done.stdout) == (None, "begun\n")
    until = time.monotonic() + 10  # a killed process takes its time on a busy machine
    while is_alive(int(pid.read_text())):
        assert time.monotonic() < until, "it lives on"
        time.sleep(0.01)


def is_alive(pid: int) -> bool:
    """Return whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


# ---- ipmitool ----


@pytest.fixture
def ipmitool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Ipmitool]:
    """Return what makes an ipmitool that writes down how it was called and then does what it is told to."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    options: dict[str, str | int | tuple[str, ...]] = {
        "address": "bmc-1",
        "port": 6230,
        "cipher_suite": 17,
        "credentials_env": "BMC",
    }

    def make(text: str) -> Ipmitool:
        script(
            tmp_path,
            "ipmitool",
            f'echo "$@" >>{tmp_path}/argv; echo "$IPMITOOL_PASSWORD" >>{tmp_path}/password\n{text}',
        )
        return Ipmitool(options, Credentials("admin", SECRET, "BMC"))

    return make


def test_the_password_is_in_ipmitool_s_environment_and_not_on_its_command_line(
    ipmitool: Callable[[str], Ipmitool], tmp_path: Path
) -> None:
    switch = IpmiSwitch(ipmitool("echo Chassis Power is on"))
    assert switch.state() is State.ON
    argv = (tmp_path / "argv").read_text()
    assert argv == ("-I lanplus -H bmc-1 -U admin -E -L OPERATOR -N 2 -R 3 -p 6230 -C 17 chassis power status\n")
    assert (tmp_path / "password").read_text() == f"{SECRET}\n"


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        (f"{NO_SESSION}", PowerBusy, "are the credentials in BMC right"),
        ("echo 'Error: Node busy' >&2; exit 1", PowerBusy, "Node busy"),
        ("echo 'RAKP 2 HMAC is invalid' >&2; exit 1", PowerFailed, "does not accept the credentials in BMC"),
        (f"echo 'message : invalid authentication algorithm' >&2; {NO_SESSION}", PowerFailed, "try cipher_suite: 3"),
        ("echo Chassis Power is odd", PowerFailed, "does not say whether the power is on: 'Chassis Power is odd'"),
    ],
)
def test_what_ipmitool_says_is_worth_another_try_or_not(
    ipmitool: Callable[[str], Ipmitool], text: str, error: type[PowerFailed], message: str
) -> None:
    with pytest.raises(PowerFailed) as raised:
        IpmiSwitch(ipmitool(text)).state()
    assert type(raised.value) is error
    assert message in str(raised.value)
    assert SECRET not in str(raised.value)


def test_without_ipmitool_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    switch = open_power(host("ipmi", address="bmc-1", credentials_env="BMC"), {"BMC": f"admin:{SECRET}"})
    assert switch is not None
    with pytest.raises(PowerFailed, match="apt-get install ipmitool"):
        switch.is_on()


# ---- credentials ----


@pytest.mark.parametrize("value", [None, "", "admin", ":password", "a:b\0c", "admin:password\n"])
def test_credentials_that_are_missing_or_malformed_are_named_by_their_variable_only(value: str | None) -> None:
    environ = {} if value is None else {"BMC": value}
    with pytest.raises(PowerFailed, match=r"^spr-01: the environment variable BMC .*USER:PASSWORD$"):
        open_power(host("ipmi", address="bmc-1", credentials_env="BMC"), environ)


def test_a_password_may_have_colons_and_is_never_printed() -> None:
    credentials = Credentials.read("BMC", {"BMC": f"admin:{SECRET}:x"}, PowerFailed, "spr-01")
    assert credentials.password == f"{SECRET}:x"
    assert SECRET not in repr(credentials)
    assert "admin" not in str(credentials)


def test_a_host_without_power_has_none() -> None:
    assert open_power(Host("spr-01", SshTarget("spr-01"), "labs/spr-01.yaml:2")) is None


# ---- tdxhw lab power ----


@pytest.fixture
def labs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Describe a host on a switched socket; nobody answers its ssh."""
    folder = tmp_path / "labs"
    folder.mkdir()
    state = tmp_path / "state"
    state.write_text("on")
    options = ", ".join(
        f"{name}: [sh, -c, '{command}']"
        for name, command in {"on": f"echo on >{state}", "off": f"echo off >{state}", "status": f"cat {state}"}.items()
    )
    (folder / "a.yaml").write_text(
        f"hosts:\n- name: spr-01\n  ssh: ssh://127.0.0.1:9\n  power: {{driver: command, {options}}}\n"
        "- {name: spr-02, ssh: spr-02}\n"
    )
    monkeypatch.setenv("TDXHW_LABS", str(folder))
    return folder


def test_the_command_tells_and_switches(labs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lab", "power", "spr-01", "status"]) == 0
    assert capsys.readouterr().out == "spr-01: on (command)\n"

    assert main(["lab", "power", "spr-01", "off"]) == 0
    output = capsys.readouterr()
    assert output.out.startswith("spr-01: is off (command, ")
    assert "nobody could be asked who has it" in output.err, "it does not answer, which is why its power is cut"

    assert main(["lab", "power", "spr-01", "reset", "--anyway"]) == 0
    output = capsys.readouterr()
    assert output.out.startswith("spr-01: reset (command, ")
    assert output.err == ""
    assert (labs.parent / "state").read_text() == "on\n"


def test_a_host_without_power_is_exit_code_2(labs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lab", "power", "spr-02", "off"]) == 2
    assert capsys.readouterr().err == f"tdxhw: spr-02 has no power: in its lab file ({labs}/a.yaml:5)\n"


def test_output_is_bounded() -> None:
    done = run_bounded([sys.executable, "-c", "print('x' * 3_000_000 + 'end')"], 30)
    assert len(done.stdout) == bounded_command._MOST_OUTPUT
    assert done.stdout.endswith("end\n")


def test_a_command_has_ended_although_what_it_left_running_holds_its_output(tmp_path: Path) -> None:
    # An ssh with ControlPersist, a tool that starts a daemon: they keep standard error open.
    pid = tmp_path / "pid"
    started = time.monotonic()
    done = run_bounded(["sh", "-c", f"sleep 600 & echo $! >{pid}; echo switched; echo warning >&2; exit 4"], 20)
    try:
        assert (done.exit_code, done.stdout, done.stderr) == (4, "switched\n", "warning\n")
        assert time.monotonic() - started < 10
    finally:
        os.kill(int(pid.read_text()), signal.SIGKILL)


def test_a_command_that_never_stops_writing_is_ended_and_fills_nobody_s_memory() -> None:
    done = run_bounded(["sh", "-c", "yes; true"], 1)
    assert done.exit_code is None
    assert len(done.stdout) == 1 << 20
