"""One side of a comparison: a machine on which the suites run while its calls are recorded, or a recording."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pytest

from tdxhw import runner
from tdxhw.backends.select import select
from tdxhw.console import SilentDisplay
from tdxhw.diff import recording as recording_file
from tdxhw.diff.describe_host import describe_host
from tdxhw.diff.recording import Recording, TestCalls
from tdxhw.diff.recording_kernel import Call, RecordingKernel
from tdxhw.errors import HarnessError
from tdxhw.host import Backend, Host, Provenance
from tdxhw.recorder import split_host, test_of
from tdxhw.session_state import DEFAULT_TIME_LIMIT_S, suite_of
from uapi_ctypes.errors import KvmError
from uapi_ctypes.kernel import Kernel

SIM: Final = "sim"
_DEFAULT_PROFILE: Final = "mainline"
"""When there is no other side to be like."""


@dataclass(frozen=True, slots=True)
class Wish:
    """What to run on each side that is a machine."""

    suites: tuple[str, ...] = ()
    keyword: str = ""
    time_limit_s: float = DEFAULT_TIME_LIMIT_S
    tell: Callable[[str], None] = field(default=lambda _line: None)
    """Takes a line on what happens now."""


def record_both(first: str, second: str, wish: Wish) -> tuple[Recording, Recording]:
    """Obtain both recordings. A plain ``sim`` takes its equipment from the other side, so it comes second.

    Raise `HarnessError` when a side cannot be had, before the other one has run for minutes.
    """
    for on in (first, second):
        _check(on)
    if first == SIM and second != SIM:
        other = obtain(second, wish)
        return obtain(first, _same_suites(wish, other), like=other), other
    one = obtain(first, wish)
    return one, obtain(second, _same_suites(wish, one), like=one)


def obtain(on: str, wish: Wish, *, like: Recording | None = None) -> Recording:
    """Return the recording of the side that the user calls `on`: ``local``, ``sim``, ``sim:PROFILE`` or a file.

    A plain ``sim`` is made like the host of `like`. Raise `HarnessError` when the side cannot be had.
    """
    if on == SIM and like is not None:
        wish.tell(f"running on {on}, with the equipment of {like.label}")
        from tdxhw.backends.sim import open_sim_like

        made = record(open_sim_like(like.host, reason=f"like {like.label}"), on, wish)
        made.like_other_side = True
        return made
    if _is_machine(on):
        wish.tell(f"running on {on}")
        return record(_open(on), on, wish)
    return _of_suites(_read(on), wish.suites)


def _is_machine(on: str) -> bool:
    return on in ("local", SIM) or on.startswith("sim:")


def _open(on: str) -> Backend:
    if on == "local":
        return select("local")
    return select(SIM, (on.partition(":")[2] or _DEFAULT_PROFILE,))


def _check(on: str) -> None:
    """Raise `HarnessError` if there is no such side."""
    if _is_machine(on):
        _open(on).close()
    else:
        _read(on)


def _read(on: str) -> Recording:
    if not Path(on).exists():
        raise HarnessError(f"--on {on}: no such file, and neither local, sim nor sim:PROFILE")
    return recording_file.read(Path(on))


def record(backend: Backend, label: str, wish: Wish) -> Recording:
    """Run the suites of `wish` on the machine of `backend` and close it. Raise `HarnessError`."""
    (host,) = backend.hosts
    try:
        made = Recording(label, host.provenance(), _description(host), wish.suites or sorted(runner.suite_files()))
        recorded = _RecordedHost(host)
        watch = _Watch(recorded)
        options = runner.RunOptions(keyword=wish.keyword, time_limit_s=wish.time_limit_s)
        run = runner.run_on(
            Backend(backend.name, backend.reason, (recorded,)), runner.resolve(wish.suites), options, SilentDisplay(),
            [watch],
        )  # fmt: skip
        if run.interrupted:
            raise KeyboardInterrupt
        for result in run.results:
            name = f"{result.suite}::{result.test}"
            made.tests[name] = TestCalls(name, result.outcome, result.reason, watch.calls.get(name, []))
        return made
    finally:
        backend.close()


def _description(host: Host) -> dict[str, Any]:
    try:
        return describe_host(host)
    except KvmError as error:
        raise HarnessError(f"{host.id} does not say what it offers: {error}") from None


def _same_suites(wish: Wish, other: Recording) -> Wish:
    """Without suites named, run those that the other side, which may be a file, has run."""
    return wish if wish.suites else Wish(tuple(other.suites), wish.keyword, wish.time_limit_s, wish.tell)


def _of_suites(recording: Recording, suites: Sequence[str]) -> Recording:
    """Keep the tests of `suites`; of all without any. Raise `HarnessError` when none is left."""
    if suites:
        wanted = {suite_of(name) for name in suites}
        recording.tests = {name: test for name, test in recording.tests.items() if suite_of(name) in wanted}
        if not recording.tests:
            raise HarnessError(f"{recording.label} has no test of {', '.join(suites)}")
        recording.suites = list(suites)
    return recording


class _RecordedHost:
    """A host whose kernel records."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self.id = host.id
        self.simulated = host.simulated
        self.calls: list[Call] = []
        self.kernel: Kernel = self._wrapped()

    def _wrapped(self) -> RecordingKernel:
        self.recorder = RecordingKernel(
            self._host.kernel, lambda call: self.calls.append(call), v17=self.provenance().get("dialect") == "v17"
        )
        return self.recorder

    def provenance(self) -> Provenance:
        return self._host.provenance()

    def leftovers(self) -> Sequence[str]:
        return self._host.leftovers()

    def start_anew(self) -> None:
        self._host.start_anew()
        self.kernel = self._wrapped()

    def debug_registers(self, vcpu_fd: int) -> Mapping[str, int] | None:
        return self._host.debug_registers(vcpu_fd)

    def close(self) -> None:
        self._host.close()


class _Watch:
    """A pytest plugin that cuts the stream of calls into tests.

    Only what a test and its fixtures do is recorded. Probes for capabilities come before: when they happen depends on
    which test asks first.
    """

    def __init__(self, host: _RecordedHost) -> None:
        self._host = host
        self.calls: dict[str, list[Call]] = {}

    def pytest_fixture_setup(self, fixturedef: pytest.FixtureDef[Any]) -> None:
        """Start recording where the test gets its kernel."""
        if fixturedef.argname == "kernel":
            self._host.calls = []
            self._host.recorder.begin()

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        """Keep what the test did, its tear-down included."""
        self._host.recorder.end()
        test, _ = split_host(test_of(nodeid))
        self.calls[f"{suite_of(nodeid)}::{test}"] = self._host.calls
        self._host.calls = []
