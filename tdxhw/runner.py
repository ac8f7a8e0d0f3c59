"""Run suites: pytest in this process, with our own display and exit codes."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

from tdxhw.backends.select import select
from tdxhw.errors import HarnessError, UnknownName
from tdxhw.host import Backend
from tdxhw.interruption import Interruption
from tdxhw.lab.done import LeaveOutDone
from tdxhw.recorder import Display, Recorder
from tdxhw.report_log import ReportLog
from tdxhw.results import RunRecord
from tdxhw.session_state import BACKEND, DEFAULT_TIME_LIMIT_S, EXPLICIT_SUITES, INTERRUPTION

SUITES: Final = Path(__file__).with_name("suites")

_EMPTY_JUNIT: Final = '<?xml version="1.0" encoding="utf-8"?>\n<testsuites name="tdxhw" />\n'

EXIT_OK: Final = 0
EXIT_TESTS_FAILED: Final = 1
EXIT_CANNOT_RUN: Final = 2
EXIT_INTERRUPTED: Final = 130


@dataclass(frozen=True, slots=True)
class RunOptions:
    """What `tdxhw run` was asked for."""

    suites: tuple[str, ...] = ()
    on: str = "auto"
    profiles: tuple[str, ...] = ()
    promises: tuple[str, ...] = ()
    keyword: str = ""
    time_limit_s: float = DEFAULT_TIME_LIMIT_S
    junit: Path | None = None
    report_log: Path | None = None
    done: Path | None = None
    """Lists tests to leave out, one node id a line: a lab run that lost its connection goes on (`tdxhw.lab.done`)."""


def suite_files() -> dict[str, Path]:
    """Return the suites that tdxhw carries, by name."""
    return {path.stem.removeprefix("test_"): path for path in sorted(SUITES.glob("test_*.py"))}


def resolve(names: Sequence[str]) -> list[Path]:
    """Turn suite names into files: all suites without a name; a path to a file or directory of the user's own.

    Raise `UnknownName` on a name that is neither.
    """
    known = suite_files()
    if not names:
        return list(known.values())
    return [known[name] if name in known else _own_suite(name, known) for name in names]


def _own_suite(name: str, known: dict[str, Path]) -> Path:
    path = Path(name)
    if not ("/" in name or name.endswith(".py")):
        raise UnknownName("suite", name, known)
    if not path.exists():
        raise HarnessError(f"no file {name}; give the name of a suite (tdxhw run --list) or a path to your own")
    if path.is_file() and path.suffix != ".py":
        raise HarnessError(f"{name} is no suite; give a Python file with tests, or a directory of them")
    return path


class _Prepared:
    """Hands pytest what the runner has opened already, before any other plugin is configured."""

    def __init__(self, backend: Backend, interruption: Interruption, *, explicit: bool) -> None:
        self._backend = backend
        self._interruption = interruption
        self._explicit = explicit

    @pytest.hookimpl(tryfirst=True)
    def pytest_configure(self, config: pytest.Config) -> None:
        """Put the hosts where the plugin looks for them."""
        config.stash[BACKEND] = self._backend
        config.stash[INTERRUPTION] = self._interruption
        config.stash[EXPLICIT_SUITES] = self._explicit


def run(options: RunOptions, display: Display) -> RunRecord:
    """Run the suites and return the record; its `exit_code` is what the process should end with.

    Raise `HarnessError` when the run cannot be done at all.
    """
    files = resolve(options.suites)
    for path in (options.junit, options.report_log):
        check_writable(path)
    with Interruption():
        try:
            backend = select(options.on, options.profiles, options.promises)
        except KeyboardInterrupt:
            return _interrupted(RunRecord(options.on, "interrupted before a host was up", {}), options)
        try:
            return run_on(backend, files, options, display)
        finally:
            backend.close()


def run_on(
    backend: Backend, files: Sequence[Path], options: RunOptions, display: Display, watchers: Sequence[object] = ()
) -> RunRecord:
    """Run `files` on machines that are open already; `watchers` are further pytest plugins.

    Raise `HarnessError` when the session itself fails.
    """
    record = RunRecord(backend.name, backend.reason, {host.id: host.provenance() for host in backend.hosts})
    recorder, interruption = Recorder(record, display), Interruption()
    prepared = _Prepared(backend, interruption, explicit=bool(options.suites))
    plugins: list[object] = [prepared, interruption, recorder, *watchers]
    if options.done is not None:
        plugins.append(LeaveOutDone(options.done))
    if options.report_log is not None:
        plugins.append(ReportLog(options.report_log, record))
    try:
        with interruption:
            status = int(pytest.main(_pytest_arguments(options, files), plugins))
    except (KeyboardInterrupt, Exception):
        # Ctrl-C outside pytest's session, or what a test that it cut off left open.
        if not interruption.requested:
            raise
        status = int(pytest.ExitCode.INTERRUPTED)
    finally:
        record.interrupted = record.interrupted or interruption.requested
        display.finished(record)
    if record.interrupted:
        return _interrupted(record, options)
    record.exit_code = _exit_code(status, recorder)
    return record


def _interrupted(record: RunRecord, options: RunOptions) -> RunRecord:
    """Mark `record`. Without any result the files are written here: readable, and not those of an earlier run."""
    record.interrupted, record.exit_code = True, EXIT_INTERRUPTED
    if not record.results:
        if options.junit is not None:
            options.junit.write_text(_EMPTY_JUNIT, encoding="utf-8")
        if options.report_log is not None:
            options.report_log.write_text("", encoding="utf-8")
    return record


def check_writable(path: Path | None) -> None:
    """Raise `HarnessError` if results could not be written there: before a run that may take an hour, not after."""
    if path is None:
        return
    try:
        with path.open("a", encoding="utf-8"):
            pass
    except OSError as error:
        raise HarnessError(f"cannot write {path}: {error.strerror}") from None


def _pytest_arguments(options: RunOptions, files: Sequence[Path]) -> list[str]:
    """Return arguments that make pytest independent of the directory and configuration it is started in."""
    arguments = [
        "--disable-plugin-autoload", "-p", "tdxhw.pytest_plugin", "-p", "no:terminal", "-p", "no:cacheprovider",
        "-c", "/dev/null", f"--rootdir={_root(files)}", "--import-mode=importlib", "--strict-markers", "-W", "error",
        f"--time-limit={options.time_limit_s}",
    ]  # fmt: skip
    if options.keyword:
        arguments += ["-k", options.keyword]
    if options.junit is not None:
        arguments += [f"--junitxml={options.junit}", "-o", "junit_suite_name=tdxhw"]
    return [*arguments, *(str(path) for path in files)]


def _root(files: Sequence[Path]) -> str:
    """Return the directory that node ids are relative to: outside it they would lose the name of their file."""
    return os.path.commonpath([path if path.is_dir() else path.parent for path in (p.resolve() for p in files)])


def _exit_code(status: int, recorder: Recorder) -> int:
    """Map pytest's exit status to ours. Raise `HarnessError` when the session itself failed."""
    if recorder.problem:
        raise HarnessError(recorder.problem)
    if status == pytest.ExitCode.OK:
        return EXIT_OK
    if status == pytest.ExitCode.TESTS_FAILED:
        return EXIT_TESTS_FAILED
    if status == pytest.ExitCode.NO_TESTS_COLLECTED:
        raise HarnessError("no test matches; see tdxhw run --list")
    raise HarnessError(f"pytest ended with status {status}")
