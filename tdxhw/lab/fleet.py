"""``tdxhw run --on lab:…``: the same run on several lab hosts at once, and one report over all of them.

``lab:NAME[,NAME…]`` and ``lab:all`` run everything on each host. ``lab:label=LABEL`` takes the hosts for equals and
deals the suites out to them, so that all end at about the same time.
"""

import json
import os
import secrets
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from tdxhw.lab import archive
from tdxhw.lab.host_run import HostRun, Wish
from tdxhw.lab.hosts import DEFAULT_FOLDER, Host
from tdxhw.lab.inventory import load
from tdxhw.lab.selection import check_selection
from tdxhw.report.errors import ReportError
from tdxhw.report.read import read_all
from tdxhw.report.results import Results, Status, merge

OUTCOMES: Final = {
    Status.PASS: "passed",
    Status.FAIL: "failed",
    Status.ERROR: "error",
    Status.MISS: "missed",
    Status.XFAIL: "xfailed",
    Status.SKIP: "skipped",
}
_UNKNOWN_S: Final = 1.0  # what a suite weighs that was never measured, if none was


@dataclass(frozen=True, slots=True)
class FleetRun:
    """A finished run over all hosts."""

    results: Results
    problems: tuple[str, ...]
    interrupted: bool
    log: str  # every line of every host's report log

    @property
    def exit_code(self) -> int:
        """The process's: 130 interrupted, 1 a test failed, 2 a host could not do its work, 0 all good."""
        if self.interrupted:
            return 130
        if any(result.status.is_bad for result in self.results.results):
            return 1
        return 2 if self.problems else 0

    def as_json(self) -> dict[str, Any]:
        """Return the document that ``tdxhw run --json`` prints."""
        return {
            "backend": "lab",
            "interrupted": self.interrupted,
            "exit_code": self.exit_code,
            "problems": list(self.problems),
            "summary": {outcome: self.results.count(status) for status, outcome in OUTCOMES.items()},
            "results": [
                {
                    "suite": result.suite,
                    "test": result.test,
                    "host": result.host,
                    "outcome": OUTCOMES[result.status],
                    "duration_s": result.duration_s,
                    "reason": result.message,
                    "details": result.details,
                    "provenance": dict(result.provenance),
                }
                for result in self.results.results
            ],
        }


def labs_folder() -> Path:
    """Return the folder of the lab files: ``TDXHW_LABS`` or ``labs``."""
    return Path(os.environ.get("TDXHW_LABS", DEFAULT_FOLDER))


def ssh_config() -> Path | None:
    """Return an ssh configuration to use instead of the user's: ``TDXHW_SSH_CONFIG``."""
    given = os.environ.get("TDXHW_SSH_CONFIG")
    return Path(given) if given else None


def _durations_file() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "tdxhw" / "durations.json"


def measured_durations() -> dict[str, float]:
    """Return how long each suite took in the last run on a lab [s]; empty if nobody measured."""
    try:
        durations = json.loads(_durations_file().read_text(encoding="utf-8"))
        return {str(suite): float(seconds) for suite, seconds in durations.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}  # a cache: whatever is wrong with it, the next run writes it anew


def _remember_durations(results: Results) -> None:
    spent: defaultdict[tuple[str, str], float] = defaultdict(float)
    for result in results.results:
        if result.status in (Status.PASS, Status.FAIL):
            spent[result.suite, result.host] += result.duration_s
    if not spent:
        return
    longest: dict[str, float] = {}
    for (suite, _), seconds in spent.items():
        longest[suite] = max(seconds, longest.get(suite, 0.0))
    path = _durations_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}")
        partial.write_text(json.dumps(measured_durations() | longest, indent=1), encoding="utf-8")
        partial.replace(path)
    except OSError:
        return  # the next run deals the suites out less evenly, no more


def deal(suites: Sequence[str], hosts: Sequence[str], durations: Mapping[str, float]) -> dict[str, tuple[str, ...]]:
    """Deal suites out to equal hosts: the longest first, each to the host with the least so far."""
    known = sorted(durations[suite] for suite in suites if suite in durations)
    middle = known[len(known) // 2] if known else _UNKNOWN_S
    load_s = dict.fromkeys(hosts, 0.0)
    dealt: dict[str, list[str]] = {host: [] for host in hosts}
    for suite in sorted(suites, key=lambda suite: (-durations.get(suite, middle), suite)):
        host = min(hosts, key=lambda name: (load_s[name], name))
        dealt[host].append(suite)
        load_s[host] += durations.get(suite, middle)
    return {host: tuple(sorted(mine)) for host, mine in dealt.items()}


def run_on_lab(
    expression: str,
    wish: Wish,
    *,
    on_line: Callable[[str], None] = lambda _line: None,
    labs: Path | None = None,
) -> FleetRun:
    """Run on every host that `expression` means, at the same time. Ctrl-C ends all of them and keeps their results."""
    check_selection(wish.suites, wish.keyword)
    labs = labs or labs_folder()
    hosts = load(labs).select(expression)
    wishes = _wishes(expression, hosts, wish)
    run_id = secrets.token_hex(6)
    with TemporaryDirectory(prefix="tdxhw-lab-") as folder:
        runs = [
            HostRun(
                host=host,
                wish=wishes[host.name],
                log=Path(folder) / f"{host.name}.jsonl",
                labs=labs,
                run_id=run_id,
                archive=archive.build(),
                ssh_config=ssh_config(),
                on_result=lambda name, nodeid, outcome: on_line(f"{outcome:<8} [{name}] {nodeid}"),
                on_note=on_line,
            )
            for host in hosts
            if host.name in wishes
        ]
        for host in hosts:
            if host.name not in wishes:
                on_line(f"{host.name}: not needed: there are fewer suites than hosts")
        interrupted = run_all(runs)
        logs = [run.log for run in runs if run.log.exists()]
        text = "".join(log.read_text(encoding="utf-8") for log in logs)
        results = _read(logs)
    _remember_durations(results)
    return FleetRun(results, tuple(run.problem for run in runs if run.problem), interrupted, text)


def _wishes(expression: str, hosts: Sequence[Host], wish: Wish) -> dict[str, Wish]:
    """Return what each host has to do; one that has nothing to do is not in it."""
    if not expression.startswith("label=") or len(hosts) == 1:
        return {host.name: wish for host in hosts}
    from tdxhw.runner import suite_files

    files = suite_files()
    suites = wish.suites or tuple(files)
    dealt = deal(suites, [host.name for host in hosts], measured_durations())
    if wish.suites:  # a wish without suites would be one for all of them
        return {name: wish.with_suites(mine) for name, mine in dealt.items() if mine}
    # Not named: a suite that nobody asked for by name may skip where the host cannot run it.
    everything = {suite: files[suite].name for suite in suites}
    return {
        name: wish.without_files(tuple(file for suite, file in everything.items() if suite not in mine))
        for name, mine in dealt.items()
    }


def run_all(runs: Sequence[HostRun]) -> bool:
    """Run them in a thread each; return whether somebody pressed Ctrl-C."""
    threads = [threading.Thread(target=run.run, name=run.host.name) for run in runs]
    for thread in threads:
        thread.start()
    interrupted = False
    while any(thread.is_alive() for thread in threads):
        try:
            for thread in threads:
                thread.join(timeout=0.2)
        except KeyboardInterrupt:
            interrupted = True
            for run in runs:
                run.stop.set()
    return interrupted


def _read(logs: Sequence[Path]) -> Results:
    parts = []
    for log in logs:
        try:
            parts.append(read_all([log]))
        except ReportError:  # empty: its problem says why
            continue
    merged = merge(parts)
    return Results(merged.results, tuple(log.stem for log in logs))
