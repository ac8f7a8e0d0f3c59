"""Leave out tests that have run already: a run that lost its connection goes on where it was."""

from pathlib import Path

import pytest

from tdxhw.errors import HarnessError


class LeaveOutDone:
    """A pytest plugin that deselects what a file lists, one node id or one suite's file name a line."""

    def __init__(self, path: Path) -> None:
        try:
            self._done = frozenset(path.read_text(encoding="utf-8").splitlines())
        except (OSError, UnicodeDecodeError) as error:
            raise HarnessError(f"{path}: cannot read the list of tests that are done: {error}") from error
        self._left_out = 0

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Take the tests out."""
        done = [item for item in items if self._is_done(item.nodeid)]
        if done:
            items[:] = [item for item in items if not self._is_done(item.nodeid)]
            config.hook.pytest_deselected(items=done)
            self._left_out = len(done)

    def _is_done(self, nodeid: str) -> bool:
        return nodeid in self._done or nodeid.partition("::")[0] in self._done

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        """Having nothing left to do is success."""
        if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and self._left_out:
            session.exitstatus = pytest.ExitCode.OK
