"""Host keys: an unknown or changed one is refused, always. `tdxhw lab trust` records one after it was looked at."""

import base64
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Final

import paramiko
from paramiko.hostkeys import HostKeyEntry, InvalidHostKey

from tdxhw.lab.errors import HostKeyRefused

OURS: Final = "known_hosts"  # beside the lab files: public keys are no secret, and the whole team shares them
_SYSTEM: Final = (Path("~/.ssh/known_hosts"), Path("/etc/ssh/ssh_known_hosts"))


def fingerprint(key: paramiko.PKey) -> str:
    """Return ``ED25519 SHA256:...``, as ssh-keygen -l shows it."""
    digest = base64.b64encode(hashlib.sha256(key.asbytes()).digest()).decode().rstrip("=")
    return f"{key.get_name().removeprefix('ssh-').upper()} SHA256:{digest}"


def known_host_name(host: str, port: int) -> str:
    """Return the name under which known_hosts files list a host."""
    return host if port == 22 else f"[{host}]:{port}"


class RefuseUnknown(paramiko.MissingHostKeyPolicy):
    """Refuses a host that no known_hosts file lists, and tells its key."""

    def __init__(self, name: str) -> None:
        self._name = name

    def missing_host_key(self, client: paramiko.SSHClient, hostname: str, key: paramiko.PKey) -> None:  # noqa: ARG002
        """Raise ``HostKeyRefused``."""
        raise HostKeyRefused(
            f"{self._name}: nobody vouched for its host key {fingerprint(key)}; if it is right: "
            f"tdxhw lab trust {self._name}"
        )


def changed(name: str, error: paramiko.BadHostKeyException) -> HostKeyRefused:
    """Return the error for a host that shows another key than the known one."""
    return HostKeyRefused(
        f"{name}: its host key is {fingerprint(error.key)}, known is {fingerprint(error.expected_key)}: another "
        f"machine answers, or the host was installed anew; after making sure: tdxhw lab trust {name} --replace"
    )


def load_known(client: paramiko.SSHClient, labs: Path, configured: Iterable[str] = ()) -> None:
    """Load our known_hosts, those of ssh's configuration (``UserKnownHostsFile``), the user's and the system's."""
    paths = [labs / OURS, *(Path(path) for path in configured), *_SYSTEM]
    for path in dict.fromkeys(path.expanduser() for path in paths):
        try:
            if path.is_file():
                _load(client, path)
        except (OSError, paramiko.SSHException) as error:
            raise HostKeyRefused(f"{path}: cannot be read as known hosts: {error}") from error


def _load(client: paramiko.SSHClient, path: Path) -> None:
    """Load one file. As in ssh(1), a line that is broken counts for nothing; nor does one with a revoked key."""
    lines = [line.split() for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]
    revoked = {words[3] for words in lines if words[:1] == ["@revoked"] and len(words) > 3}
    with NamedTemporaryFile("w", encoding="utf-8") as good:  # paramiko reads files only, and of them none with an error
        good.writelines(" ".join(words[:3]) + "\n" for words in lines if _is_entry(words) and words[2] not in revoked)
        good.flush()
        client.load_system_host_keys(good.name)


def _is_entry(words: list[str]) -> bool:
    if len(words) < 3 or words[0].startswith(("#", "@")):
        return False
    try:
        return HostKeyEntry.from_line(" ".join(words[:3])) is not None
    except (InvalidHostKey, paramiko.SSHException, ValueError):
        return False


def record(labs: Path, known_name: str, key: paramiko.PKey, *, replace: bool) -> Path:
    """Add the key to our known_hosts file, whole or not at all; with `replace` in place of the host's others."""
    path = labs / OURS
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    if replace:
        lines = [line for line in lines if known_name not in line.split(" ")[0].split(",")]
    line = f"{known_name} {key.get_name()} {key.get_base64()}"
    if line not in lines:
        lines.append(line)
    partial = path.with_name(f"{OURS}.{os.getpid()}.part")
    partial.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    partial.replace(path)
    return path
