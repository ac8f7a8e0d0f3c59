"""See that a selection of tests means something, before a host is asked: there it would be noticed minutes later."""

import io
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from tempfile import TemporaryDirectory
from typing import Final

import pytest

from tdxhw.errors import HarnessError
from tdxhw.runner import resolve

_QUIET: Final = (
    "--collect-only", "--disable-plugin-autoload", "-p", "no:terminal", "-p", "no:cacheprovider", "-c", "/dev/null",
)  # fmt: skip


def check_selection(suites: Sequence[str], keyword: str) -> None:
    """Raise ``HarnessError`` for a suite that there is not, or a ``-k`` expression that pytest does not understand."""
    resolve(suites)
    if not keyword:
        return
    # pytest itself is asked, with nothing to collect: it has no other public way to read an expression.
    said = io.StringIO()
    with TemporaryDirectory(prefix="tdxhw-") as empty, redirect_stderr(said), redirect_stdout(io.StringIO()):
        status = pytest.main([*_QUIET, f"--rootdir={empty}", "-k", keyword, empty])
    if status == pytest.ExitCode.USAGE_ERROR:
        line = next((one for one in said.getvalue().splitlines() if "-k" in one), "not understood")
        raise HarnessError(f"-k {keyword!r}: pytest says: {line.removeprefix('ERROR: ')}")
