"""Which keys of known_hosts files count, whatever else is in such a file."""

from pathlib import Path

import paramiko
import pytest

from tdxhw.lab.host_keys import load_known, record

KEY = paramiko.ECDSAKey.generate()
OTHER = paramiko.ECDSAKey.generate()


def line(name: str, key: paramiko.PKey = KEY) -> bytes:
    return f"{name} {key.get_name()} {key.get_base64()} a comment\n".encode()


@pytest.fixture(autouse=True)
def _no_files_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def known(tmp_path: Path, data: bytes, host: str = "spr-01") -> list[str]:
    """Return the keys that are known of a host."""
    (tmp_path / "known_hosts").write_bytes(data)
    client = paramiko.SSHClient()
    load_known(client, tmp_path)
    found = client._system_host_keys.lookup(host)  # type: ignore[attr-defined]
    return [] if found is None else [key.get_base64() for key in found.values()]


@pytest.mark.parametrize(
    "broken",
    [b"spr-01 ssh-ed25519 AAAAC3\n", b"h\xc3( ssh-ed25519 AAAA\n", b"spr-01 ssh-rsa AAAAB3NzaC1yc2E=\n", b"garbage\n",
     b"@cert-authority *.lab ssh-rsa AAAAB3NzaC1yc2E=\n", b"\n# a comment\n", b"spr-01 ssh-new-kind AAAA\n"],
)  # fmt: skip
def test_a_line_that_says_nothing_to_us_does_not_hide_the_others(tmp_path: Path, broken: bytes) -> None:
    assert known(tmp_path, broken + line("spr-01") + broken) == [KEY.get_base64()]


def test_a_revoked_key_is_not_known(tmp_path: Path) -> None:
    assert known(tmp_path, b"@revoked * " + line("").strip() + b"\n" + line("spr-01")) == []
    assert known(tmp_path, b"@revoked * " + line("", OTHER).strip() + b"\n" + line("spr-01")) == [KEY.get_base64()]


def test_hashed_names_and_several_names_are_known(tmp_path: Path) -> None:
    hashed = paramiko.HostKeys.hash_host("spr-01")
    assert known(tmp_path, line(hashed)) == [KEY.get_base64()]
    assert known(tmp_path, line("other,spr-01")) == [KEY.get_base64()]


def test_what_is_recorded_is_known(tmp_path: Path) -> None:
    (tmp_path / "known_hosts").write_bytes(b"garbage\n" + line("spr-01", OTHER))
    record(tmp_path, "spr-01", KEY, replace=True)
    assert known(tmp_path, (tmp_path / "known_hosts").read_bytes()) == [KEY.get_base64()]
