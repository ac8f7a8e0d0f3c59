"""Capturing a console: lines, times, the file, the limit, broken lines, programs that come and go."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tdxhw.cli import main
from tdxhw.lab.console import Capture, ConsoleFailed, ConsoleLine, capture, open_console, read_log
from tdxhw.lab.console.capture import Sink
from tdxhw.lab.console.lines import clean, noted, said
from tdxhw.lab.console.program import ProgramSource
from tdxhw.lab.hosts import Driver, Host, SshTarget
from tests.unit.lab.test_power import SECRET, is_alive, script


class Scripted:
    """A source that does one thing per connection."""

    name = "scripted"

    def __init__(self, *connections: Callable[[Sink], str]) -> None:
        self.connections = list(connections)
        self.done = threading.Event()

    def read(self, sink: Sink, stop: threading.Event) -> str:
        if self.connections:
            return self.connections.pop(0)(sink)
        sink.opened()
        self.done.set()
        stop.wait()
        return "stopped"


def sends(*pieces: bytes, then: str = "cut") -> Callable[[Sink], str]:
    def connection(sink: Sink) -> str:
        sink.opened()
        for piece in pieces:
            sink.data(piece)
        return then

    return connection


def refuses(reason: str) -> Callable[[Sink], str]:
    def connection(sink: Sink) -> str:
        raise ConsoleFailed(reason)

    return connection


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "_WAITS_S", (0.01, 0.02))


def captured(source: Scripted, path: Path, *, limit_bytes: int = capture.LIMIT_BYTES) -> Capture:
    with Capture("spr-01", source, path, limit_bytes=limit_bytes) as console:
        source.done.wait(10)
    return console


def texts(console: Capture) -> list[str]:
    return [line.text for line in console.lines]


def notes(path: Path) -> list[str]:
    lines = path.read_text().splitlines()
    return [line[25:] for line in lines if line[25] == "#"]


# ---- lines ----


def test_lines_have_the_time_of_their_first_byte(tmp_path: Path) -> None:
    times = iter([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    source = Scripted()
    console = Capture("spr-01", source, tmp_path / "log", clock=lambda: next(times))
    for piece in (b"one", b" line\r\ntwo", b"\n"):
        console.data(piece)
    assert console._head == [ConsoleLine(1.0, "one line"), ConsoleLine(2.0, "two")]


@given(st.lists(st.binary(max_size=80), max_size=8))
def test_how_bytes_are_cut_on_the_way_does_not_matter(pieces: list[bytes]) -> None:
    whole, cut = (Capture("a", Scripted(), Path(os.devnull)) for _ in range(2))
    whole.data(b"".join(pieces))
    for piece in pieces:
        cut.data(piece)
    for console in (whole, cut):
        console._end_of_line()
    assert texts(whole) == texts(cut)


@given(st.binary(max_size=400))
def test_a_cleaned_line_has_no_control_characters_and_survives_the_file(data: bytes) -> None:
    text = clean(data)
    assert text.isprintable() or all(char.isprintable() or not char.isascii() for char in text)
    assert not any(ord(char) < 32 or 127 <= ord(char) < 160 for char in text)
    assert "\n" not in text
    line = ConsoleLine(1795439968.5, text)
    encoded = said(line).encode("utf-8", "backslashreplace").decode()
    assert list(read_log(encoded.split("\n"))) == [line]


def test_terminal_sequences_go_and_text_stays() -> None:
    assert clean(b"\x1b[0;32m  OK  \x1b[0m Started\x1b]0;title\x07 x\t.\r") == "  OK   Started x ."


def test_what_we_remark_is_no_line_of_the_console() -> None:
    assert list(read_log([noted(1.0, "x"), said(ConsoleLine(1.0, "y")), "2026-11-23T13:08", "torn | z"])) == [
        ConsoleLine(1.0, "y")
    ]


def test_an_endless_line_is_cut_and_the_time_stays_linear(tmp_path: Path) -> None:
    started = time.monotonic()
    console = captured(Scripted(sends(*[b"x" * 65536] * 64)), tmp_path / "log")
    assert time.monotonic() - started < 10
    assert {len(text) for text in texts(console)} == {16384}
    assert sum(len(text) for text in texts(console)) == 64 * 65536


# ---- the capture ----


def test_a_broken_line_is_noted_and_the_capture_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "console.log"
    source = Scripted(sends(b"before\nhalf a li", then="BMC went away"), sends(b"after\n"))
    console = captured(source, path)
    assert texts(console) == ["before", "half a li", "after"]
    assert (console.gaps, console.problem) == (2, "")
    assert [line.text for line in read_log(path.read_text().splitlines())] == texts(console)
    assert notes(path) == [
        "# spr-01: console (scripted): begins",
        "# connected",
        "# spr-01: console (scripted) is lost: BMC went away; trying again",
        "# connected",
        "# spr-01: console (scripted) is lost: cut; trying again",
        "# connected",
        "# ends",
    ]


def test_what_no_further_try_can_cure_ends_it_and_says_why(tmp_path: Path) -> None:
    with Capture("spr-01", Scripted(refuses("wrong password")), tmp_path / "log") as console:
        until = time.monotonic() + 10
        while not console.has_ended and time.monotonic() < until:
            time.sleep(0.01)
    assert console.has_ended
    assert console.problem == "spr-01: console (scripted): wrong password"
    assert notes(tmp_path / "log")[-1] == "# ends: spr-01: console (scripted): wrong password"


def test_a_console_that_was_never_reached_says_so(tmp_path: Path) -> None:
    never = [lambda _sink: "no answer"] * 1000
    with Capture("spr-01", Scripted(*never), tmp_path / "log") as console:
        assert not console.wait_open(0.2)
    assert console.problem == "spr-01: console (scripted) cannot be reached: no answer"
    assert console.gaps == 0
    assert len(notes(tmp_path / "log")) == 3, "said once, however often it is tried"


def test_a_program_that_ends_at_once_is_tried_less_and_less_often_and_noted_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capture, "_WAITS_S", (0.0, 0.01, 0.02, 0.03, 30.0))
    refused = [sends(then="permission denied")] * 9
    source = Scripted(*refused)
    with Capture("spr-01", source, tmp_path / "log") as console:
        until = time.monotonic() + 10
        while len(source.connections) > 4:
            assert time.monotonic() < until
            time.sleep(0.01)
        time.sleep(0.2)
        assert len(source.connections) == 4, "the fifth wait is a long one"
        assert console.gaps == 1
    assert [note.partition("(scripted)")[2] for note in notes(tmp_path / "log") if "(scripted)" in note] == [
        ": begins", " is lost: permission denied; trying again", " is lost: permission denied",
    ]  # fmt: skip


def test_once_it_speaks_it_is_connected_again(tmp_path: Path) -> None:
    refused = sends(then="refused")
    source = Scripted(refused, refused, sends(b"hello\n"))
    console = captured(source, tmp_path / "log")
    assert texts(console) == ["hello"]
    connected = [note for note in notes(tmp_path / "log") if note.endswith("connected")]
    assert len(connected) == 3, "as it was first, with its first word, and after that"


def test_a_source_that_breaks_in_an_unforeseen_way_does_not_disturb(tmp_path: Path) -> None:
    def breaks(_sink: Sink) -> str:
        raise ZeroDivisionError("unforeseen")

    console = captured(Scripted(breaks, sends(b"x\n")), tmp_path / "log")
    assert texts(console) == ["x"]
    assert any("ZeroDivisionError: unforeseen" in note for note in notes(tmp_path / "log"))


def test_a_full_disk_does_not_disturb_and_is_told(tmp_path: Path) -> None:
    console = captured(Scripted(sends(b"x\ny\n")), Path("/dev/full"))
    assert texts(console) == ["x", "y"]
    assert console.problem == "spr-01: console (scripted): cannot write /dev/full: No space left on device"


def test_a_file_that_cannot_be_written_is_an_error_at_the_beginning(tmp_path: Path) -> None:
    with pytest.raises(ConsoleFailed, match="cannot write"), Capture("a", Scripted(), tmp_path):
        pass


def test_of_what_is_too_much_the_beginning_and_the_end_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "log"
    source = Scripted(sends(b"".join(b"line %05d\n" % number for number in range(1000))))
    console = captured(source, path, limit_bytes=1100)
    kept = texts(console)
    assert kept[0] == "line 00000"
    assert kept[-1] == "line 00999"
    assert 90 <= len(kept) <= 101
    assert [line.text for line in read_log(path.read_text().splitlines())] == kept
    assert any("lines are not kept: the size limit" in note for note in notes(path))


# ---- programs ----


def program(*argv: str, **options: bytes) -> ProgramSource:
    return ProgramSource("a program", argv, **options)  # type: ignore[arg-type]


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Callable[[ProgramSource], Capture]]:
    opened: list[Capture] = []

    def run(source: ProgramSource) -> Capture:
        console = Capture("spr-01", source, tmp_path / "console.log")
        console.__enter__()
        opened.append(console)
        return console

    yield run
    for console in opened:
        console.__exit__(None, None, None)


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_program_s_output_is_the_console_and_it_ends_with_the_capture(
    running: Callable[[ProgramSource], Capture], tmp_path: Path
) -> None:
    code = "import os, time; print('hello', os.getpid(), flush=True); time.sleep(600)"
    console = running(program(sys.executable, "-c", code))
    wait_for(lambda: bool(console.lines))
    pid = int(console.lines[0].text.split()[1])
    assert Path(f"/proc/{pid}").exists()
    console.__exit__(None, None, None)
    assert not Path(f"/proc/{pid}").exists()


def test_a_program_that_ends_is_started_again(running: Callable[[ProgramSource], Capture], tmp_path: Path) -> None:
    console = running(program("sh", "-c", "echo once; echo the reason >&2; exit 3"))
    wait_for(lambda: len(console.lines) >= 3)
    assert console.gaps >= 2
    assert any("the reason" in note for note in notes(tmp_path / "console.log"))


def test_a_program_that_ends_has_ended_although_what_it_left_running_holds_the_line(
    running: Callable[[ProgramSource], Capture], tmp_path: Path
) -> None:
    script_path = tmp_path / "detaches"
    script_path.write_text("#!/bin/sh\necho hello\nsleep 600 &\n")
    script_path.chmod(0o755)
    console = running(ProgramSource("p", [str(script_path)]))
    wait_for(lambda: texts(console).count("hello") == 2)


def test_it_is_connected_when_the_program_says_so_although_that_would_be_buffered(
    running: Callable[[ProgramSource], Capture],
) -> None:
    code = "import sys, time; print('[SOL ready]'); sys.stdin.read()"  # print() to a pipe would stay in its buffer
    console = running(program(sys.executable, "-c", code, ready=b"[SOL ready]"))
    assert console.wait_open(10)
    assert list(console.lines) == []


def test_a_killed_tdxhw_leaves_no_program_behind(tmp_path: Path) -> None:
    log = tmp_path / "log"
    code = (
        "import sys, time; from pathlib import Path; from tdxhw.lab.console import Capture; "
        "from tdxhw.lab.console.program import ProgramSource\n"
        "source = ProgramSource('x', ['sh', '-c', 'echo $$; exec cat'])\n"
        "with Capture('a', source, Path(sys.argv[1])): time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(log)]) as victim:
        wait_for(lambda: log.exists() and bool(list(read_log(log.read_text().splitlines()))))
        pid = int(next(read_log(log.read_text().splitlines())).text)
        assert Path(f"/proc/{pid}").exists()
        victim.kill()
    wait_for(lambda: not is_alive(pid))


def test_a_program_that_is_not_there_ends_the_capture(running: Callable[[ProgramSource], Capture]) -> None:
    console = running(program("/nowhere/at/all"))
    wait_for(lambda: console.has_ended)
    assert console.problem == "spr-01: console (a program): there is no program '/nowhere/at/all'"


# ---- which console ----


def host(driver: str | None = None, **options: "str | int | tuple[str, ...]") -> Host:
    console = Driver(driver, options) if driver else None
    return Host("spr-01", SshTarget("spr-01"), "labs/spr-01.yaml:2", console=console)


def test_a_host_without_a_console_has_its_kernel_log_where_ssh_may_be_used(tmp_path: Path) -> None:
    assert open_console(host(), tmp_path / "log") is None
    console = open_console(host(), tmp_path / "log", labs=tmp_path)
    assert console is not None
    assert "kernel log over ssh" in console._name


def test_without_credentials_it_does_not_begin(tmp_path: Path) -> None:
    sol = host("ipmi-sol", address="bmc-1", credentials_env="BMC")
    with pytest.raises(ConsoleFailed, match="spr-01: the environment variable BMC is not set"):
        open_console(sol, tmp_path / "log", environ={})


IPMITOOL = """\
case "$*" in
*deactivate) echo deactivated >>{log}; exit 1;;
*activate*)
    echo "$*" >>{log}
    echo "[SOL Session operational.  Use ~? for help]"
    echo "[    0.1] Linux"
    cat >/dev/null;;
esac
"""


def test_serial_over_lan_ends_a_stale_session_first_and_keeps_the_password_to_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    script(tmp_path, "ipmitool", IPMITOOL.format(log=tmp_path / "calls"))
    sol = host("ipmi-sol", address="bmc-1", credentials_env="BMC")
    console = open_console(sol, tmp_path / "log", environ={"BMC": f"admin:{SECRET}"})
    assert console is not None
    with console:
        assert console.wait_open(10)
        wait_for(lambda: bool(console.lines))
    assert texts(console) == ["[    0.1] Linux"]
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls[0] == "deactivated"
    assert calls[1].endswith(" sol activate")
    assert SECRET not in (tmp_path / "calls").read_text() + (tmp_path / "log").read_text()


# ---- tdxhw lab console and findings ----


def test_the_command_shows_lines_and_findings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TDXHW_LABS", str(tmp_path))
    say = script(tmp_path, "say", "echo '[    1.000000] Kernel panic - not syncing: sysrq'; exec sleep 600")
    (tmp_path / "a.yaml").write_text(f"host: {{name: a, ssh: a, console: {{driver: command, argv: [{say}]}}}}\n")
    assert main(["lab", "console", "a", "--seconds", "1", "--log", str(tmp_path / "kept.log")]) == 0
    output = capsys.readouterr()
    assert output.out.endswith(" [    1.000000] Kernel panic - not syncing: sysrq\n")
    assert "panic: Kernel panic - not syncing: sysrq" in output.err

    assert main(["lab", "findings", str(tmp_path / "kept.log")]) == 1
    assert "1 panic\n" in capsys.readouterr().out


def test_findings_also_reads_a_log_that_somebody_else_has_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "serial.txt"
    path.write_bytes(b"\xff\xfe[    1.000000] kvm_intel: SEAMCALL TDH_VP_CREATE failed: 0xc000010000000001\r\n")
    assert main(["lab", "findings", str(path)]) == 1
    assert "failed: 0xc000010000000001 = OPERAND_INVALID(RCX)" in capsys.readouterr().out
    path.write_text("all is well\n")
    assert main(["lab", "findings", "--json", str(path)]) == 0
    assert capsys.readouterr().out == "[]\n"


def test_a_console_that_cannot_be_opened_is_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TDXHW_LABS", str(tmp_path))
    (tmp_path / "a.yaml").write_text("host: {name: a, ssh: a, console: {driver: command, argv: [/nowhere]}}\n")
    assert main(["lab", "console", "a", "--seconds", "20"]) == 2
    assert capsys.readouterr().err.endswith("tdxhw: a: console (command /nowhere): there is no program '/nowhere'\n")
