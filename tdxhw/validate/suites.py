"""Run suites on a host that is already ours, under the kernel on trial, and again what could be a flake."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tdxhw.lab.archive import Archive
from tdxhw.lab.connection import Session
from tdxhw.lab.fleet import run_all
from tdxhw.lab.host_run import HostRun, Rescue, Wish
from tdxhw.lab.hosts import Host
from tdxhw.lab.labgrid_place import LabgridPlace
from tdxhw.lab.lease import Lease
from tdxhw.report.errors import ReportError
from tdxhw.report.read import read
from tdxhw.report.results import Results, Status, merge
from tdxhw.validate import retry


@dataclass(slots=True)
class Suites:
    """Runs suites on one host, all under one lease."""

    host: Host
    labs: Path
    ssh_config: Path | None
    archive: Archive
    wish: Wish
    out: Path
    token: str
    retries: int
    lease: Lease | LabgridPlace
    say: Callable[[str], None]
    after_reboot: Callable[[Session], Session]
    """Called when a test took the host down: has the kernel on trial up again before the rest runs."""
    rescue: Callable[[float], Rescue]
    problems: list[str] = field(default_factory=list)  # of the last `run`
    _runs: int = 0

    def run(self, base: Results, name: str, collected: list[Results]) -> None:
        """Run everything, then again what fails and did not in `base`. Each run's results are added to `collected`.

        ``KeyboardInterrupt`` after what was going on has ended on the host; what it found is in `collected`.
        """
        self.problems = []
        self._once(self.wish, name, collected)
        for attempt in range(1, self.retries + 1):
            new = merge(collected)
            tries = 1 + self.retries
            names = (*retry.suspects(base, new, tries=tries), *retry.lost(base, new, tries=tries))
            if not names or self.problems:
                return
            self.say(f"{self.host.name}: once more ({attempt} of {self.retries}): {', '.join(names)}")
            suites, keyword = retry.selection(names)
            wish = Wish(self._given(suites), self.wish.promises, keyword, self.wish.time_limit_s)
            self._once(wish, f"{name}-again-{attempt}", collected)

    def _given(self, suites: tuple[str, ...]) -> tuple[str, ...]:
        """Return the suites as the user named them: those of his own by their paths, or by that of their folder."""
        paths = {name: given for given in self.wish.suites for name in _names(Path(given))}
        return tuple(dict.fromkeys(paths.get(suite, suite) for suite in suites))

    def _once(self, wish: Wish, name: str, collected: list[Results]) -> None:
        self._runs += 1
        run = HostRun(
            host=self.host,
            wish=wish,
            log=self.out / f"{name}.jsonl",
            labs=self.labs,
            run_id=f"{self.token}-{self._runs}",
            archive=self.archive,
            ssh_config=self.ssh_config,
            on_result=lambda host, nodeid, outcome: self.say(f"{outcome:<8} [{host}] {nodeid}"),
            on_note=self.say,
            stop=threading.Event(),
            held=self.lease,
            marks=True,
            after_reboot=self.after_reboot,
            rescue=self.rescue,
        )
        interrupted = run_all([run])
        try:
            results = read(run.log)
        except ReportError as error:
            self.problems.append(run.problem or str(error))
        else:
            # What the host lost is told as a problem; there it has no name of a test.
            kept = tuple(one for one in results.results if not (one.status is Status.MISS and one.test == "(host)"))
            collected.append(Results(kept, results.sources, results.notes))
            if run.problem:
                self.problems.append(run.problem)
        if interrupted:
            raise KeyboardInterrupt


def of_suites(base: Results, files: Sequence[Path]) -> Results:
    """Return what a baseline says about the suites in `files`: those that are not asked for are no loss."""
    names = {name for file in files for name in _names(file)}
    kept = tuple(one for one in base.results if one.suite in names)
    left_out = len(base.results) - len(kept)
    note = f"{left_out} results of the baseline are of suites that were not asked for"
    return Results(kept, base.sources, base.notes + (note,) * bool(left_out))


def _names(path: Path) -> list[str]:
    """Return the names of the suites in a file or folder, as results have them."""
    files = [*path.rglob("*.py")] if path.is_dir() else [path]
    return [file.stem.removeprefix("test_") for file in files]


def host_clock_ahead_s(said: str) -> float:
    """Return how far the host's clock is ahead [s], from what ``date +%s.%N`` has just said there."""
    try:
        return float(said) - time.time()
    except ValueError:
        return 0.0
