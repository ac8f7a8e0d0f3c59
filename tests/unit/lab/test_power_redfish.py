"""Redfish through sushy, against a service that behaves as BMCs do on their bad days."""

import logging
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tdxhw.lab.credentials import Credentials
from tdxhw.lab.errors import PowerBusy, PowerFailed
from tdxhw.lab.power.redfish import RedfishSwitch
from tdxhw.lab.power.switch import AwaitedPower, Button, Patience, State
from tests.unit.lab.redfish_service import PASSWORD, USER, Service


@pytest.fixture
def service() -> Iterator[Service]:
    with Service() as service:
        yield service


def switch(service: Service, *, password: str = PASSWORD, **options: str) -> RedfishSwitch:
    return RedfishSwitch({"url": service.url, **options}, Credentials(USER, password, "BMC"))


def power(service: Service, **options: str) -> AwaitedPower:
    return AwaitedPower("spr-01", switch(service, **options), Patience(answer_s=5, change_s=5, poll_s=0.01))


def test_it_switches_on_off_and_resets_and_leaves_no_session_behind(service: Service) -> None:
    machine = power(service)
    assert not machine.is_on()
    machine.on()
    machine.reset()
    machine.off()
    assert service.seen == ["On", "ForceRestart", "ForceOff"]
    assert service.opened >= 4
    assert service.open_sessions == set()


def test_a_session_is_closed_after_an_error_too(service: Service) -> None:
    with (
        pytest.raises(PowerFailed, match="there is no system 'nine'; there are: 1"),
        switch(service, system="nine").connect(),
    ):
        pass
    assert service.opened == 1
    assert service.open_sessions == set()


def test_a_bmc_without_sessions_gets_basic_authentication() -> None:
    with Service(sessions=False) as service:
        assert not power(service).is_on()


@pytest.mark.parametrize("code", [429, 500, 502, 503, 504])
def test_a_busy_bmc_is_asked_again(service: Service, code: int) -> None:
    service.plan = [code, code, code, code]
    with pytest.raises(PowerBusy, match=f"HTTP {code}"), switch(service).connect() as buttons:
        buttons.state()
    assert not power(service).is_on()
    assert service.open_sessions == set()


def test_wrong_credentials_are_named_by_their_variable_and_not_tried_again(service: Service) -> None:
    started = time.monotonic()
    machine = AwaitedPower("spr-01", switch(service, password="wrong-but-secret"), Patience(answer_s=60))
    with pytest.raises(PowerFailed) as error:
        machine.is_on()
    assert str(error.value) == (
        f"spr-01: redfish {service.url}: the BMC does not accept the credentials in BMC (HTTP 401)"
    )
    assert time.monotonic() - started < 5


def test_no_secret_is_in_any_error_or_log(service: Service, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("", "sushy", "urllib3"):
        caplog.set_level(logging.DEBUG, logger=name or None)
    power(service).on()
    assert "HTTP request: POST" in caplog.text, "nothing was logged"
    service.plan = [503, 404]
    with pytest.raises(PowerFailed), switch(service).connect() as buttons:
        buttons.state()
    assert PASSWORD not in caplog.text


def test_of_several_systems_one_has_to_be_named() -> None:
    with Service(("left", "right"), power="On") as service:
        with pytest.raises(PowerFailed, match="has 2 systems: say which with system: …; there are: left, right"):
            power(service).is_on()
        assert power(service, system="right").is_on()
        assert power(service, system="/redfish/v1/Systems/right").is_on()


@pytest.mark.parametrize(
    ("told", "state"),
    [("On", State.ON), ("Off", State.OFF), ("PoweringOn", State.CHANGING), ("PoweringOff", State.CHANGING),
     ("Paused", State.ON)],
)  # fmt: skip
def test_a_machine_on_its_way_is_neither_on_nor_off(service: Service, told: str, state: State) -> None:
    service.power = told
    with switch(service).connect() as buttons:
        assert buttons.state() is state


def test_a_system_that_tells_no_state_is_an_error(service: Service) -> None:
    service.power = None
    machine = AwaitedPower("spr-01", switch(service), Patience(answer_s=0.2, poll_s=0.01))
    with pytest.raises(PowerFailed, match=r"its state is unknown after 0\.2 s: the system tells no PowerState"):
        machine.is_on()


def test_what_the_system_offers_is_what_is_used(service: Service) -> None:
    service.power = "On"
    service.reset_types = ["On", "PowerCycle"]
    power(service).reset()
    assert service.seen == ["PowerCycle"]
    with pytest.raises(PowerFailed, match="offers no way to off: On, PowerCycle"), switch(service).connect() as buttons:
        buttons.press(Button.OFF)


def test_a_system_that_does_not_say_what_it_offers_is_asked_for_the_next_best(service: Service) -> None:
    service.power = "On"
    service.says_what_it_offers = False
    service.reset_types = ["On", "ForceOff", "PowerCycle"]
    power(service).reset()
    assert service.seen == ["PowerCycle"]


def test_a_system_without_a_reset_is_switched_off_and_on(service: Service) -> None:
    service.power = "On"
    service.reset_types = ["On", "ForceOff"]
    for says in (True, False):
        service.says_what_it_offers = says
        power(service).reset()
    assert service.seen == ["ForceOff", "On"] * 2
    service.reset_types = []
    with pytest.raises(
        PowerFailed, match=r"^spr-01: redfish .*: the system offers no way to off: .* is refused: HTTP POST"
    ):
        power(service).reset()


@pytest.mark.parametrize("name", ["iLO.2.14.InvalidOperationForSystemState", "Base.1.8.ResourceInUse"])
def test_a_button_that_does_not_work_now_is_pressed_again(service: Service, name: str) -> None:
    with switch(service).connect() as buttons:
        service.plan = [(400, name)] * 3  # sushy tries some of them again by itself
        with pytest.raises(PowerBusy, match=name):
            buttons.press(Button.ON)
    service.plan = []
    power(service).on()


@pytest.mark.parametrize("told", ["Reset", "Unknown", None])
def test_a_state_that_no_standard_knows_passes(service: Service, told: str | None) -> None:
    service.power = told
    with switch(service).connect() as buttons, pytest.raises(PowerBusy, match=told or "tells no PowerState"):
        buttons.state()


def test_an_answer_that_is_not_json_is_an_error_in_one_line(service: Service) -> None:
    service.plan = ["<html>BMC login</html>"]
    with pytest.raises(PowerFailed) as error, switch(service).connect():
        pass
    assert "\n" not in str(error.value)


def test_nobody_there_is_worth_another_try() -> None:
    with Service() as service:
        gone = switch(service)
    with pytest.raises(PowerBusy, match="no answer"), gone.connect():
        pass


def test_a_ca_that_is_not_there_is_an_error_that_names_it(service: Service, tmp_path: Path) -> None:
    options = {"url": service.url.replace("http:", "https:"), "ca": str(tmp_path / "no-ca.pem")}
    with (
        pytest.raises(PowerFailed, match=r"no-ca\.pem"),
        RedfishSwitch(options, Credentials("a", "b", "BMC")).connect(),
    ):
        pass
