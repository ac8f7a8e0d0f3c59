"""The inventory: ``labs/*.yaml`` say which hosts exist. No code in it, and no secrets.

One file holds one ``host:`` or a list of ``hosts:``. ssh takes keys, jump hosts and known hosts from its own
configuration; a BMC's user and password come from the environment variable that the file names.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from ipaddress import IPv6Address
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from tdxhw.capabilities import parse_capability
from tdxhw.errors import HarnessError
from tdxhw.lab.errors import InventoryError
from tdxhw.lab.hosts import DEFAULT_FOLDER, Driver, Expectation, Host, Limits, SshTarget
from tdxhw.lab.located_yaml import Located

_NAME: Final = re.compile(r"[a-z0-9](?:[a-z0-9.-]*[a-z0-9])?")
_LABEL: Final = re.compile(r"[a-z0-9](?:[a-z0-9._-]*[a-z0-9])?")
_ENVIRONMENT_VARIABLE: Final = re.compile(r"[A-Z_][A-Z0-9_]*")
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_SSH_PART: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_VERSION: Final = re.compile(r"\d+(?:\.\d+)+")
_LOOPBACK: Final = frozenset({"127.0.0.1", "::1", "localhost"})
_HAS_SECRET: Final = "carries a password; ssh keys and agents are taken from ssh's own configuration"  # noqa: S105
_RESERVED_NAMES: Final = frozenset({"all", "auto", "local", "sim"})
_SECRET_KEYS: Final = frozenset({"password", "passwd", "passphrase", "secret", "token", "private_key", "key", "pin"})


CapabilityCheck = Callable[[str], object]


# ---- schema ----


def _url(value: Located) -> str:
    text = value.text()
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:  # its message may quote a password
        value.fail(f"{value.what} has to be an http(s) URL, https://HOST or https://HOST:PORT")
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0 or parts.query or parts.fragment:
        value.fail(f"{value.what} has to be an http(s) URL, https://HOST or https://HOST:PORT")
    if parts.password is not None or parts.username is not None:
        value.fail(f"{value.what} carries credentials: name an environment variable with credentials_env instead")
    return text


def _bmc_url(value: Located) -> str:
    text = _url(value)
    parts = urlsplit(text)
    if parts.scheme == "http" and parts.hostname not in _LOOPBACK:
        value.fail(f"{value.what}: http would send the password in the clear: use https (or a tunnel to 127.0.0.1)")
    return text


def _file(value: Located) -> str:
    """Read a path; a relative one begins at the lab file."""
    try:
        return str(value.path.parent / Path(value.text()).expanduser())
    except RuntimeError:
        value.fail(f"{value.what}: there is no user {value.text().partition('/')[0]}")


def _fingerprint(value: Located) -> str:
    """Read a certificate's SHA-256, as openssl, browsers and BMCs show it."""
    digits = value.text().replace(":", "").replace(" ", "").lower()
    if not _SHA256.fullmatch(digits):
        value.fail(f"{value.what} has to be the certificate's SHA-256, 64 hexadecimal digits: 'AB:CD:…'")
    return digits


def _one_of(*known: str) -> "_Reader":
    def read(value: Located) -> str:
        text = value.text()
        if text not in known:
            value.fail(f"{value.what} has to be one of: {', '.join(known)}; not {text!r}")
        return text

    return read


def _cipher_suite(value: Located) -> int:
    number = value.integer(0, 255)
    if number not in (3, 17):
        value.fail(f"{value.what} {number} protects too little: 17 (AES and SHA-256), or 3 (AES and SHA-1)")
    return number


def _environment_variable(value: Located) -> str:
    text = value.text()
    if not _ENVIRONMENT_VARIABLE.fullmatch(text):
        value.fail(f"{value.what} has to be the NAME of an environment variable that holds USER:PASSWORD")
    return text


def _argv(value: Located) -> tuple[str, ...]:
    argv = tuple(item.text() for item in value.items())
    if not argv:
        value.fail(f"{value.what} is an empty command")
    return argv


def _address(value: Located) -> str:
    text = value.text()
    if not _SSH_PART.fullmatch(text) and not _is_ipv6(text):
        value.fail(f"{value.what}: {text!r} is no host name and no address")
    return text


def _is_ipv6(text: str) -> bool:
    try:
        IPv6Address(text)
    except ValueError:
        return False
    return True


def _port(value: Located) -> int:
    return value.integer(1, 65535)


def _place(value: Located) -> str:
    text = value.text()
    if not _SSH_PART.fullmatch(text):  # labgrid would take '*' for a pattern over all places
        value.fail(f"{value.what}: {text!r} is no name of a labgrid place")
    return text


def _host_and_port(value: Located) -> str:
    text = value.text()
    host, colon, port = text.rpartition(":")
    if not _SSH_PART.fullmatch(host if colon else text) or (colon and not port.isdecimal()):
        value.fail(f"{value.what} has to be HOST or HOST:PORT, not {text!r}")
    return text


# Per driver: the reader of every option it may have, and the options it must have.
_Reader = Callable[[Located], "str | int | tuple[str, ...]"]
_Schema = Mapping[str, tuple[Mapping[str, _Reader], tuple[str, ...]]]

_IPMI: Final[Mapping[str, _Reader]] = {
    "address": _address,
    "port": _port,
    "credentials_env": _environment_variable,
    "cipher_suite": _cipher_suite,
    "privilege": _one_of("operator", "administrator"),
}
POWER_DRIVERS: Final[_Schema] = {
    "redfish": (
        {
            "url": _bmc_url,
            "system": Located.text,
            "ca": _file,
            "fingerprint": _fingerprint,
            "credentials_env": _environment_variable,
        },
        ("url", "credentials_env"),
    ),
    "ipmi": (_IPMI, ("address", "credentials_env")),
    "command": ({"on": _argv, "off": _argv, "reset": _argv, "status": _argv}, ("on", "off", "status")),
}
CONSOLE_DRIVERS: Final[_Schema] = {
    "ipmi-sol": (_IPMI, ()),  # what is missing is taken from power: {driver: ipmi}
    "command": ({"argv": _argv}, ("argv",)),
}

LEASE_DRIVERS: Final[_Schema] = {
    "labgrid": ({"place": _place, "coordinator": _host_and_port}, ("place",)),
}


def parse_ssh_target(text: str) -> SshTarget:
    """Read ``[user@]host`` or ``ssh://[user@]host[:port]``. ``ValueError`` says what is wrong."""
    port: int | None = None
    if text.startswith("ssh://"):
        parts = urlsplit(text)
        if parts.password is not None:
            raise ValueError(_HAS_SECRET)
        if parts.path.strip("/") or parts.query or parts.fragment:
            raise ValueError("has something after the host")
        user, host, port = parts.username, parts.hostname or "", parts.port
        if port == 0:
            raise ValueError("no host has a port 0")
    else:
        before, at, host = text.rpartition("@")
        user = before if at else None
        if ":" in before:
            raise ValueError(_HAS_SECRET)
        if ":" in host and not _is_ipv6(host):
            raise ValueError("has a port: write it as ssh://user@host:port, as for ssh(1)")
    # A part that began with a dash would be an option to ssh(1) and to ansible.
    if not _SSH_PART.fullmatch(host) and not _is_ipv6(host):
        raise ValueError(f"{host!r} is no host name")
    if user is not None and not _SSH_PART.fullmatch(user):
        raise ValueError(f"{user!r} is no user name")
    return SshTarget(host, user, port)


def _ssh_target(value: Located) -> SshTarget:
    text = value.text()
    try:
        return parse_ssh_target(text)
    except ValueError as error:
        value.fail(f"{value.what}: {_without_password(text)!r}: {error}")


def _without_password(text: str) -> str:
    before, at, host = text.rpartition("@")
    scheme, slashes, rest = before.rpartition("://")
    user, colon, _ = rest.partition(":")
    return f"{scheme}{slashes}{user}{colon and ':…'}{at}{host}"


def _refuse_secrets(value: Located) -> None:
    for key in value.key_nodes():
        if key.name().lower() in _SECRET_KEYS:
            key.fail(f"{key.name()!r}: no secrets in a lab file; name an environment variable with credentials_env")


def _driver(value: Located, drivers: _Schema) -> Driver:
    _refuse_secrets(value)
    options = frozenset(option for known, _ in drivers.values() for option in known)
    name_value = value.mapping(["driver", *sorted(options)], ["driver"])["driver"]
    name = name_value.text()
    if name not in drivers:
        name_value.fail(f"{value.what} driver {name!r} is unknown; there are: {', '.join(drivers)}")
    readers, required = drivers[name]
    values = value.mapping(["driver", *readers], required)
    return Driver(name, {option: readers[option](values[option]) for option in values if option != "driver"})


def _limits(value: Located) -> Limits:
    bounds = {
        "memory_gib": (1, 1 << 16),
        "run_timeout_s": (1, 7 * 86400),
        "test_timeout_s": (1, 86400),
        "tds": (1, 2047),  # HKIDs are below 2048, and one of them is the module's own
    }
    return Limits(**{key: limit.integer(*bounds[key]) for key, limit in value.mapping(bounds).items()})


def _expectation(value: Located) -> Expectation:
    values = value.mapping(["kernel", "module"])
    module = values["module"].text() if "module" in values else None
    if module is not None and not _VERSION.fullmatch(module):
        values["module"].fail(f"{values['module'].what} has to be a version such as '1.5.16', not {module!r}")
    return Expectation(kernel=values["kernel"].text() if "kernel" in values else None, module=module)


def _promises(value: Located, check_capability: CapabilityCheck) -> tuple[str, ...]:
    promises = value.texts()
    for item, promise in zip(value.items(), promises, strict=True):
        try:
            check_capability(promise)
        except HarnessError as error:
            item.fail(str(error))
    return promises


def _labels(value: Located) -> tuple[str, ...]:
    labels = value.texts()
    for item in value.items():
        if not _LABEL.fullmatch(item.text()):
            item.fail(f"label {item.text()!r}: lower-case letters, digits, '.', '_' and '-' only")
    return labels


def check_name(name: str) -> None:
    """Raise ``InventoryError`` if no host may be called `name`."""
    if not _NAME.fullmatch(name):
        raise InventoryError(f"host name {name!r}: lower-case letters, digits, '.' and '-' only")
    if name in _RESERVED_NAMES:
        raise InventoryError(f"host name {name!r} means something else to `tdxhw run --on`")


_HOST_KEYS: Final = ("name", "ssh", "promises", "labels", "limits", "expects", "power", "console", "lease")


def _host(value: Located, check_capability: CapabilityCheck) -> Host:
    _refuse_secrets(value)
    values = value.mapping(_HOST_KEYS, ["name", "ssh"])
    name = values["name"].text()
    try:
        check_name(name)
    except InventoryError as error:
        values["name"].fail(str(error))
    host = Host(
        name=name,
        ssh=_ssh_target(values["ssh"]),
        place=values["name"].place,
        promises=_promises(values["promises"], check_capability) if "promises" in values else (),
        labels=_labels(values["labels"]) if "labels" in values else (),
        limits=_limits(values["limits"]) if "limits" in values else Limits(),
        expects=_expectation(values["expects"]) if "expects" in values else Expectation(),
        power=_driver(values["power"], POWER_DRIVERS) if "power" in values else None,
        console=_driver(values["console"], CONSOLE_DRIVERS) if "console" in values else None,
        lease=_driver(values["lease"], LEASE_DRIVERS) if "lease" in values else None,
    )
    if host.console is not None and host.console.driver == "ipmi-sol":
        options = sol_options(host)
        if "address" not in options:
            values["console"].fail("console ipmi-sol needs an address, or power: {driver: ipmi, ...} to take it from")
        if "credentials_env" not in options:
            values["console"].fail("console ipmi-sol needs credentials_env, or a power driver to take it from")
    return host


def sol_options(host: Host) -> Mapping[str, str | int | tuple[str, ...]]:
    """Return the options of console ipmi-sol. What it does not say itself is as for power: it is one BMC."""
    assert host.console is not None
    power = host.power.options if host.power is not None else {}
    shared = power.keys() if host.power is not None and host.power.driver == "ipmi" else {"credentials_env"}
    return {key: value for key, value in power.items() if key in shared} | dict(host.console.options)


# ---- the folder ----


@dataclass(frozen=True, slots=True)
class Inventory:
    """Every host of a folder of lab files, by name, in the order of their names."""

    folder: Path
    hosts: Mapping[str, Host]

    def host(self, name: str) -> Host:
        """Return the host called `name`, or raise ``InventoryError`` that says which ones there are."""
        try:
            return self.hosts[name]
        except KeyError:
            there = ", ".join(self.hosts) or "none"
            raise InventoryError(f"no host {name!r} in {self.folder}; there are: {there}") from None

    def select(self, expression: str) -> tuple[Host, ...]:
        """Return the hosts meant by ``NAME[,NAME…]``, ``all`` or ``label=LABEL``; none is an error."""
        if expression == "all":
            chosen = tuple(self.hosts.values())
        elif expression.startswith("label="):
            label = expression.removeprefix("label=")
            chosen = tuple(host for host in self.hosts.values() if label in host.labels)
        else:
            chosen = tuple(self.host(name) for name in dict.fromkeys(expression.split(",")))
        if not chosen:
            raise InventoryError(f"no host in {self.folder} matches {expression!r}; `tdxhw lab list` shows them")
        return chosen


def load_file(path: Path, check_capability: CapabilityCheck = parse_capability) -> list[Host]:
    """Return the hosts of one lab file. Raise ``InventoryError`` with file and line at the first thing wrong.

    `check_capability` raises ``HarnessError`` on a name that ``promises`` may not use.
    """
    top = Located.read(path)
    values = top.mapping(["host", "hosts"])
    if len(values) != 1:
        top.fail("a lab file has either one 'host:' or a list of 'hosts:'")
    nodes = [values["host"]] if "host" in values else values["hosts"].items()
    return [_host(node, check_capability) for node in nodes]


def load(folder: Path = DEFAULT_FOLDER, check_capability: CapabilityCheck = parse_capability) -> Inventory:
    """Return every host in `folder`. A wrong file, or two hosts of one name, is an ``InventoryError``."""
    if not folder.is_dir():
        raise InventoryError(
            f"{folder}: no such folder; --labs DIR or TDXHW_LABS names another, `tdxhw lab init NAME` starts one"
        )
    hosts: dict[str, Host] = {}
    for path in sorted([*folder.glob("*.yaml"), *folder.glob("*.yml")]):
        for host in load_file(path, check_capability):
            if host.name in hosts:
                raise InventoryError(f"{host.place}: host {host.name!r} is already at {hosts[host.name].place}")
            hosts[host.name] = host
    return Inventory(folder, dict(sorted(hosts.items())))
