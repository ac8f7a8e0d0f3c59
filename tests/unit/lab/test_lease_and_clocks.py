"""A lease lasts as long as it was taken for, whatever somebody does to the host's clock, and survives a power cut."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tdxhw.lab.remote import lease as script

TTL_S = 300.0
NOW = 1_795_000_000.0


class Machine:
    """A host with a clock that can be set, and one that runs from its boot on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.clock = NOW
        self.uptime = 1000.0
        self.boot = "boot-1"

    def passes(self, seconds: float) -> None:
        self.clock += seconds
        self.uptime += seconds

    def reboots(self) -> None:
        (self.folder / script.NAME).unlink(missing_ok=True)
        self.boot, self.uptime = self.boot + "'", 5.0

    def ask(self, operation: str, **wish: Any) -> dict[str, Any]:
        fd = script.open_locked(str(self.folder))
        try:
            return script.operate(fd, str(self.folder / "kept/lease"), operation, wish)
        finally:
            os.close(fd)

    def take(self, token: str = "a", **more: Any) -> bool:
        wish = {"token": token, "owner": token, "reason": "test", "ttl_s": TTL_S}
        return bool(self.ask("take", **wish, **more)["ok"])


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine(tmp_path)
    clocks = SimpleNamespace(
        time=lambda: machine.clock, clock_gettime=lambda _: machine.uptime, CLOCK_BOOTTIME=time.CLOCK_BOOTTIME
    )
    monkeypatch.setattr(script, "time", clocks)
    monkeypatch.setattr(script, "boot_id", lambda: machine.boot)
    return machine


@pytest.mark.parametrize("step_s", [-30 * 365 * 86400.0, -86400.0, 86400.0, 30 * 365 * 86400.0])
def test_setting_the_clock_neither_ends_a_lease_nor_makes_it_endless(machine: Machine, step_s: float) -> None:
    machine.take()
    machine.passes(100)
    machine.clock += step_s
    answer = machine.ask("show")
    assert answer["live"]
    assert answer["holder"]["expires"] - answer["now"] == pytest.approx(TTL_S - 100)
    assert not machine.take("b")
    machine.passes(TTL_S - 99)
    assert not machine.ask("show")["live"]
    assert machine.take("b")


@pytest.mark.parametrize("step_s", [-20 * 365 * 86400.0, -3600.0, 0.0])
def test_after_a_reboot_with_a_clock_that_is_behind_it_ends_in_the_time_it_was_taken_for(
    machine: Machine, step_s: float
) -> None:
    machine.take(persistent=True)
    machine.reboots()
    machine.clock += step_s
    assert not machine.take("b")
    machine.clock += 40 * 365 * 86400  # set right by NTP
    machine.passes(100)
    assert not machine.take("b"), "not by setting the clock"
    machine.passes(TTL_S - 99)
    assert machine.take("b")


def test_a_renewed_lease_lasts_its_whole_time_from_then_on(machine: Machine) -> None:
    machine.take()
    machine.passes(TTL_S - 1)
    assert machine.ask("renew", token="a", ttl_s=TTL_S)["ok"]
    machine.passes(TTL_S - 1)
    assert not machine.take("b")


def test_a_lease_of_an_older_tdxhw_still_counts(machine: Machine) -> None:
    old = f'{{"token": "x", "owner": "old", "reason": "r", "taken": {NOW}, "expires": {NOW + 60}}}'
    (machine.folder / script.NAME).write_text(old)
    assert not machine.take("b")
    machine.passes(50)
    (machine.folder / script.NAME).write_text(old.replace(str(NOW + 60), str(NOW + 110)))  # it renews that alone
    machine.passes(50)
    assert not machine.take("b")
    machine.passes(11)
    assert machine.take("b")


def test_a_persistent_lease_is_on_the_disk_with_its_name_before_it_counts(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened: list[str] = []

    def told(name: str, do: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            what = arguments[0] if isinstance(arguments[0], str) else Path(f"/proc/self/fd/{arguments[0]}").readlink()
            happened.append(f"{name} {Path(what).relative_to(machine.folder)}")
            return do(*arguments)

        return call

    for name in ("fsync", "rename", "unlink"):
        monkeypatch.setattr(os, name, told(name, getattr(os, name)))
    machine.take(persistent=True)
    assert happened == [
        "fsync .", "fsync kept/lease.new", "rename kept/lease.new", "fsync kept", f"fsync {script.NAME}",
    ]  # fmt: skip
    happened.clear()
    machine.ask("release", token="a")
    assert happened == ["unlink kept/lease", "fsync kept", f"fsync {script.NAME}"]
