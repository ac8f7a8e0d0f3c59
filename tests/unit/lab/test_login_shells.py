"""Commands reach a host whatever its login shell is and prints, and how they ended is told as it was."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tdxhw.lab.connection import Session
from tdxhw.lab.errors import ConnectionLost, RemoteFailed
from tdxhw.lab.lease import Lease, holder_of
from tdxhw.lab.shell_command import after_mark, for_any_shell
from tests.unit.lab.shell_server import session_with

GREETING = "unset BASH_ENV; echo Welcome to the lab; printf 'no end of line'; echo 'greetings, too' >&2\n"


@pytest.fixture
def greeting(tmp_path: Path) -> Iterator[Session]:
    """Connect to a host whose start-up file prints, as a .bashrc does that does not ask whether anybody is there."""
    (tmp_path / "rc").write_text(GREETING)
    with session_with(["bash"], tmp_path, {"BASH_ENV": str(tmp_path / "rc")}) as session:
        yield session


def test_what_a_start_up_file_prints_is_not_the_command_s(greeting: Session) -> None:
    done = greeting.run("cat; echo out; echo err >&2; exit 7", stdin=b"in\n")
    assert (done.exit_code, done.stdout, done.stderr) == (7, "in\nout\n", "err\n")
    with pytest.raises(RemoteFailed, match=r"^vm: false: exit code 1: no message$"):
        greeting.check("false")


def test_a_lease_is_taken_from_a_host_that_greets(greeting: Session, tmp_path: Path) -> None:
    with Lease(greeting, "test", folder=str(tmp_path)):
        assert getattr(holder_of(greeting, folder=str(tmp_path)), "reason", "") == "test"


def test_results_of_a_host_that_greets_begin_with_the_first(greeting: Session, tmp_path: Path) -> None:
    lines: list[str] = []
    console: list[str] = []
    log = tmp_path / "log"
    code = greeting.supervise(
        ["sh", "-c", f"echo '{{}}' >{log}; echo hello; exit 3"], limit_s=20, follow=str(log), on_line=lines.append,
        on_console=console.append,
    )  # fmt: skip
    assert (code, lines, console) == (3, ["{}"], ["hello"])


@pytest.mark.parametrize("number", ["KILL", "SEGV"])
def test_a_command_that_a_signal_ended_is_neither_slow_nor_a_lost_connection(greeting: Session, number: str) -> None:
    for command in (f"kill -{number} $$", f"sh -c 'kill -{number} $$' || exit $?"):
        with pytest.raises(RemoteFailed, match=f"^vm: SIG{number} ended there: "):
            greeting.run(command)


def test_what_a_shutdown_ends_is_a_lost_connection(greeting: Session) -> None:
    with pytest.raises(ConnectionLost, match="SIGTERM ended the command: is the host going down"):
        greeting.run("kill -TERM $$")


def test_a_command_that_has_to_be_killed_at_its_limit_was_still_running(greeting: Session) -> None:
    with pytest.raises(RemoteFailed, match=r"^vm: still running after 0\.2 s: sleep"):
        greeting.run("sleep 20", timeout_s=0.2)


def test_an_account_that_runs_no_commands_is_named_as_that(tmp_path: Path) -> None:
    shell = tmp_path / "nologin"
    shell.write_text("#!/bin/sh\necho 'This account is currently not available.'\nexit 1\n")
    shell.chmod(0o755)
    expected = r"vm: its login shell runs no commands for us \(This account is currently not available\.\); `ssh "
    with session_with([str(shell)], tmp_path) as session:
        with pytest.raises(RemoteFailed, match=expected):
            session.run("true")
        with pytest.raises(RemoteFailed, match=expected):
            session.supervise(["true"], limit_s=5)


@given(st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), max_size=4000))
@settings(max_examples=30, deadline=None)
def test_a_command_is_in_characters_that_no_shell_takes_for_its_own(text: str) -> None:
    command = for_any_shell(f"printf %s {json.dumps(text)}")
    # csh: no line ends, no `!`, no word of 1,024 characters; fish: no backslash.
    assert re.fullmatch(r"exec sh -c '[^'\n!\\]+' sh(?: [A-Za-z0-9+/=]{1,500})+", command)


@pytest.mark.parametrize("shell", [one for one in ("bash", "dash", "zsh", "fish", "tcsh", "csh") if shutil.which(one)])
def test_every_login_shell_there_is_passes_a_script_on(shell: str, tmp_path: Path) -> None:
    script = r"""cat; printf '%s\n' 'a\\b!c' "d'e" "$((1 + 1))" 'two
lines'; exit 3"""
    environ = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    done = subprocess.run(
        [shell, "-c", for_any_shell(script)], input=b"in\n", capture_output=True, env=environ, check=False
    )
    assert done.returncode == 3
    assert after_mark(done.stdout) == b"in\na\\\\b!c\nd'e\n2\ntwo\nlines\n"
    assert after_mark(done.stderr) == b""
