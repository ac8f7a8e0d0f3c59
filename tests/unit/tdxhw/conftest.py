"""Run the command line as a user does, in this process and in one of its own."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tdxhw.cli import main


@pytest.fixture
def tdxhw(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Call `tdxhw` with arguments; return exit code, stdout and stderr."""

    def call(*arguments: str) -> tuple[int, str, str]:
        code = main(arguments)
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def tdxhw_process() -> Callable[..., "subprocess.CompletedProcess[str]"]:
    """Call `tdxhw` in a process of its own."""

    def call(*arguments: str, cwd: Path | None = None, **environment: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            command(*arguments), capture_output=True, text=True, check=False, timeout=100, cwd=cwd,
            env=os.environ | environment,
        )  # fmt: skip

    return call


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-c", "import sys; from tdxhw.cli import main; sys.exit(main())", *arguments]
