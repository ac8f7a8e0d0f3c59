"""Write results as they come, one JSON object a line, in the format of pytest-reportlog.

A run that is killed leaves every finished line behind. The first line carries the provenance of each host.
"""

import json
import os
import time
from pathlib import Path

import pytest

from tdxhw import __version__
from tdxhw.lab import kernel_marks
from tdxhw.results import RunRecord


class ReportLog:
    """A pytest plugin that appends each report to a file."""

    def __init__(self, path: Path, record: RunRecord) -> None:
        self._file = path.open("w", encoding="utf-8", buffering=1)
        self._record = record
        self._begin = kernel_marks.mark if kernel_marks.are_asked_for() else lambda _nodeid: time.time()

    def _write(self, line: dict[str, object]) -> None:
        self._file.write(json.dumps(line, default=str) + "\n")

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        """Write what the results will be results of."""
        self._config = session.config
        self._write(
            {
                "$report_type": "SessionStart",
                "pytest_version": pytest.__version__,
                "tdxhw": __version__,
                "start": self._record.started,
                "backend": self._record.backend,
                "hosts": {name: dict(provenance) for name, provenance in self._record.hosts.items()},
            }
        )

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Write that a test begins. It may take the machine down, its set-up too: then this says which one it was."""
        if self._record.backend != "sim":
            self._write({"$report_type": "TestStart", "nodeid": nodeid, "start": self._begin(nodeid)})
            os.fsync(self._file.fileno())

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Write one phase of one test."""
        self._write(self._config.hook.pytest_report_to_serializable(config=self._config, report=report))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Write a suite that could not be read."""
        if report.failed:
            self._write(self._config.hook.pytest_report_to_serializable(config=self._config, report=report))

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        """Write how it ended."""
        self._write({"$report_type": "SessionFinish", "exitstatus": int(exitstatus)})

    def pytest_unconfigure(self) -> None:
        """Close the file."""
        self._file.close()
