"""Power control over Redfish, through sushy. The BMC's certificate is always checked."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Final

from tdxhw.lab.credentials import Credentials
from tdxhw.lab.errors import PowerBusy, PowerFailed
from tdxhw.lab.power.switch import Button, NoSuchButton, State

try:
    import requests
    import sushy
    from sushy import auth, exceptions

    from tdxhw.lab.power import certificate
except ImportError as missing:
    raise PowerFailed("Redfish is spoken with sushy: pip install 'tdxhw[validate]'") from missing

_CONNECT_S: Final = 10.0
_ANSWER_S: Final = 30.0
_BUSY: Final = frozenset({409, 423, 429, 500, 502, 503, 504})
# What services answer with 400 although it passes: the registry's names (Base, iLO, iDRAC).
_NOT_NOW: Final = ("ResourceInUse", "ServiceTemporarilyUnavailable", "InvalidOperationForSystemState", "SYS518")
_STATES: Final = {
    sushy.PowerState.ON: State.ON,
    sushy.PowerState.OFF: State.OFF,
    sushy.PowerState.POWERING_ON: State.CHANGING,
    sushy.PowerState.POWERING_OFF: State.CHANGING,
}
# By preference; the first that the system offers.
_RESET_TYPES: Final = {
    Button.ON: (sushy.ResetType.ON, sushy.ResetType.FORCE_ON),
    Button.OFF: (sushy.ResetType.FORCE_OFF,),
    Button.RESET: (sushy.ResetType.FORCE_RESTART, sushy.ResetType.POWER_CYCLE),
}

# What matters of its warnings is in our errors.
logging.getLogger("sushy").setLevel(logging.CRITICAL)


class RedfishSwitch:
    """One system behind one Redfish service."""

    has_reset = True

    def __init__(self, options: Mapping[str, str | int | tuple[str, ...]], credentials: Credentials) -> None:
        self._url = str(options["url"])
        self.name = f"redfish {self._url}"
        self._system = str(options.get("system", ""))
        self._ca = str(options.get("ca", ""))
        self._fingerprint = str(options.get("fingerprint", ""))
        self._credentials = credentials

    @contextmanager
    def connect(self) -> Iterator["_Buttons"]:
        """Open a session (basic authentication where the BMC has none), find the system, close the session."""
        login = auth.SessionOrBasicAuth(self._credentials.user, self._credentials.password)
        wire = certificate.Wire(
            self._url, ca=self._ca, fingerprint=self._fingerprint, answer_s=_ANSWER_S, connect_s=_CONNECT_S
        )
        try:
            with self._in_our_words():
                service = sushy.Sushy(self._url, auth=login, connector=wire)
                system = self._find(service.get_system_collection())
            yield _Buttons(system, self)
        finally:
            with suppress(exceptions.SushyError, OSError):
                login.close()
            wire.close()

    def _find(self, systems: Any) -> Any:
        paths: list[str] = list(systems.members_identities)
        by_name = {path.rstrip("/").rpartition("/")[2]: path for path in paths} | {path: path for path in paths}
        if self._system:
            if self._system not in by_name:
                there = ", ".join(path.rstrip("/").rpartition("/")[2] for path in paths) or "none"
                raise PowerFailed(f"there is no system {self._system!r}; there are: {there}")
            return systems.get_member(by_name[self._system])
        if len(paths) != 1:
            there = ", ".join(path.rstrip("/").rpartition("/")[2] for path in paths) or "none"
            raise PowerFailed(f"has {len(paths)} systems: say which with system: …; there are: {there}")
        return systems.get_member(paths[0])

    @contextmanager
    def _in_our_words(self) -> Iterator[None]:
        """Tell what another try may cure from what it will not. No password is in any of sushy's messages."""
        try:
            yield
        except exceptions.ConnectionError as error:
            cause = error.__context__
            if isinstance(cause, requests.exceptions.SSLError):
                raise PowerFailed(certificate.refusal(str(cause), self._url, _CONNECT_S)) from error
            if isinstance(cause, OSError) and "certificate bundle" in str(cause):
                raise PowerFailed(f"cannot read ca: {self._ca}") from error
            raise PowerBusy("no answer: is the BMC up and the url right?") from error
        except exceptions.AccessError as error:
            variable = self._credentials.variable
            raise PowerFailed(f"the BMC does not accept the credentials in {variable} (HTTP {_code(error)})") from error
        except exceptions.HTTPError as error:
            passes = _code(error) in _BUSY or any(name in str(error) for name in _NOT_NOW)
            kind = PowerBusy if passes else PowerFailed
            raise kind(f"HTTP {_code(error)}: {_line(error)}") from error
        except exceptions.SushyError as error:
            raise PowerFailed(_line(error)) from error
        except requests.exceptions.RequestException as error:
            raise PowerBusy(f"the answer broke off: {_line(error)}") from error
        except OSError as error:  # what requests says of a bundle that is not there
            raise PowerFailed(_line(error)) from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise PowerFailed(f"does not answer as Redfish does: {_line(error)}") from error


class _Buttons:
    def __init__(self, system: Any, switch: RedfishSwitch) -> None:
        self._system = system
        self._switch = switch

    def state(self) -> State:
        """Ask for the state."""
        with self._switch._in_our_words():  # noqa: SLF001 (one class in two parts)
            self._system.refresh(force=True)
            power_state = self._system.power_state
            told = (self._system.json or {}).get("PowerState")
        if power_state is None:  # "Reset", "Unknown", null: while the machine or the BMC starts
            raise PowerBusy(f"the system's PowerState is {told!r}" if told else "the system tells no PowerState")
        return _STATES.get(power_state, State.ON)  # Paused: it has power

    def press(self, button: Button) -> None:
        """Ask for the first fitting reset that the system offers; one that does not say what it offers refuses some."""
        refused = ""
        with self._switch._in_our_words():  # noqa: SLF001
            offered = self._system.get_allowed_reset_system_values()
            for reset_type in _RESET_TYPES[button]:
                if reset_type not in offered:
                    continue
                try:
                    self._system.reset_system(reset_type)
                except exceptions.BadRequestError as error:
                    if any(name in str(error) for name in _NOT_NOW):
                        raise
                    refused = f"; {reset_type.value} is refused: {_line(error)}"
                else:
                    return
        there = ", ".join(sorted(one.value for one in offered))
        raise NoSuchButton(f"the system offers no way to {button.value}: {there}{refused}")


def _code(error: exceptions.HTTPError) -> int:
    return int(error.status_code)


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
