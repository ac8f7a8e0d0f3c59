"""The pytest plugin: hosts, markers and what makes a run trustworthy.

`tdxhw run` loads it; so does ``pytest -p tdxhw.pytest_plugin --on sim my_tests/``. Fixtures are in `tdxhw.fixtures`.

- ``@pytest.mark.requires("tdx", "two-vcpus")`` names capabilities, never a backend. Absent and unpromised: the test
  is skipped with the reason. Absent though promised: the session ends with exit code 2. Unknown: an error.
- ``@pytest.mark.dialects("v17")`` restricts a test to one dialect of the ABI.
- Every test runs once on each host of the run: ``test_x[mainline]``, ``test_x[v17]``.
- After each test on a simulated host nothing may be left over: no page, HKID, file or TD.
"""

import signal
import threading
from collections.abc import Generator
from types import FrameType

import pytest

from tdxhw.backends.select import select
from tdxhw.capabilities import parse_capability
from tdxhw.errors import GuestTimeout, HarnessError
from tdxhw.host import Host
from tdxhw.session_state import (
    BACKEND,
    DEFAULT_TIME_LIMIT_S,
    EXPLICIT_SUITES,
    capabilities_of,
    suite_of,
)
from tdxhw.time_limit import install_kick_handler

pytest_plugins = ["tdxhw.fixtures"]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Offer the same choices as `tdxhw run`."""
    group = parser.getgroup("tdxhw", "real and simulated TDX hosts")
    group.addoption("--on", default="auto", metavar="BACKEND", help="auto, sim or local")
    group.addoption("--profile", action="append", default=[], metavar="NAME", help="simulated host; may be repeated")
    group.addoption("--promise", action="append", default=[], metavar="CAPABILITY", help="fail the run without it")
    group.addoption("--time-limit", type=float, default=DEFAULT_TIME_LIMIT_S, metavar="S", help="for each test [s]")


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    """Open the hosts, unless `tdxhw run` has done so already."""
    config.addinivalue_line("markers", "requires(*capabilities): what the host must offer, else the test is skipped")
    config.addinivalue_line("markers", "dialects(*names): restrict a test to the mainline or the v17 ABI")
    config.addinivalue_line("markers", "time_limit(seconds): a limit for this test instead of --time-limit")
    if BACKEND not in config.stash:
        option = config.option
        try:
            config.stash[BACKEND] = select(option.on, option.profile, option.promise)
        except HarnessError as error:
            raise pytest.UsageError(str(error)) from None
        config.add_cleanup(config.stash[BACKEND].close)
    install_kick_handler()


@pytest.hookimpl(tryfirst=True)
def pytest_collection(session: pytest.Session) -> None:
    """Check every promise before the first test: a run on a host that lost its TDX must not look green."""
    backend = session.config.stash[BACKEND]
    for host in backend.hosts:
        probed = capabilities_of(session.config, host)
        for promise in sorted(backend.promises):
            try:
                missing = probed.missing(promise)
            except HarnessError as error:
                pytest.exit(str(error), returncode=2)
            if missing:
                pytest.exit(f"host {host.id} was promised to offer {promise!r}, but {missing}", returncode=2)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run each test once on every host whose dialect it speaks."""
    if "host" not in metafunc.fixturenames:
        return
    hosts = metafunc.config.stash[BACKEND].hosts
    wanted = {name for mark in metafunc.definition.iter_markers("dialects") for name in mark.args}
    fitting = [host for host in hosts if not wanted or capabilities_of(metafunc.config, host).dialect_name in wanted]
    # Without a fitting host the test stays visible: it is skipped with the reason when its turn comes.
    chosen = fitting or hosts[:1]
    metafunc.parametrize("host", chosen, ids=[host.id for host in chosen], indirect=True)


def host_of(item: pytest.Item) -> Host | None:
    """Return the host that `item` runs on, or None for a test that needs none."""
    callspec = getattr(item, "callspec", None)
    return callspec.params.get("host") if callspec else None


def why_skipped(item: pytest.Item) -> tuple[str, str] | None:
    """Return the capability that `item` lacks on its host and the reason, or None when it can run."""
    host = host_of(item)
    if host is None:
        return None
    probed = capabilities_of(item.config, host)
    for mark in item.iter_markers("requires"):
        for name in mark.args:
            if missing := probed.missing(name):
                return name, missing
    wanted = {name for mark in item.iter_markers("dialects") for name in mark.args}
    if wanted and probed.dialect_name not in wanted:
        return f"dialect {'/'.join(sorted(wanted))}", f"this kernel speaks {probed.dialect_name or 'no TDX dialect'}"
    return None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Refuse unknown capability names, and suites that were asked for by name but cannot run at all."""
    for item in items:
        for mark in item.iter_markers("requires"):
            for name in mark.args:
                try:
                    parse_capability(name)
                except HarnessError as error:
                    pytest.exit(f"{item.nodeid}: {error}", returncode=2)
    if not config.stash.get(EXPLICIT_SUITES, False):
        return
    by_suite: dict[str, list[pytest.Item]] = {}
    for item in items:
        by_suite.setdefault(suite_of(item.nodeid), []).append(item)
    for suite, members in by_suite.items():
        reasons = [why_skipped(item) for item in members]
        if reasons and all(reasons) and reasons[0] is not None:
            lacking, why = reasons[0]
            pytest.exit(f"suite {suite!r} needs {lacking!r}, but {why}; run it with --on sim", returncode=2)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test whose requirements the host does not meet."""
    if reason := why_skipped(item):
        pytest.skip(f"needs {reason[0]}: {reason[1]}")
    if host := host_of(item):
        item.user_properties.extend((f"tdxhw.{key}", value) for key, value in host.provenance().items())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """End a test that takes longer than its limit: `GuestTimeout`, never a hang."""
    mark = item.get_closest_marker("time_limit")
    limit_s = float(mark.args[0]) if mark else float(item.config.getoption("--time-limit"))
    with _alarm(limit_s):
        return (yield)


class _alarm:  # noqa: N801 (reads as a statement)
    """Raise `GuestTimeout` in the main thread once `limit_s` [s] have passed."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._in_main = threading.current_thread() is threading.main_thread()

    def _ring(self, _signum: int, _frame: FrameType | None) -> None:
        raise GuestTimeout(f"the test was still running after its time limit of {self._limit_s:g} s")

    def __enter__(self) -> None:
        if self._in_main:
            self._handler = signal.signal(signal.SIGALRM, self._ring)
            # Repeated: code that swallows the exception once must not hang for ever.
            self._timer = signal.setitimer(signal.ITIMER_REAL, self._limit_s, 1.0)

    def __exit__(self, *_: object) -> None:
        if self._in_main:
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            signal.signal(signal.SIGALRM, self._handler)
            if self._timer[0]:  # somebody else's, a pytest-timeout around us
                signal.setitimer(signal.ITIMER_REAL, *self._timer)


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Say on what machines the results were obtained."""
    backend = config.stash[BACKEND]
    lines = [f"tdxhw: on {backend.name} ({backend.reason})"]
    for host in backend.hosts:
        facts = ", ".join(f"{key} {value}" for key, value in host.provenance().items())
        lines += [f"tdxhw: {host.id}: {facts}"]
    return lines
