"""What a run looks like in a pipe."""

import io

import pytest

from tdxhw.console import ConsoleDisplay
from tdxhw.results import Result, RunRecord


def shown(*results: Result, interrupted: bool = False) -> str:
    stream = io.StringIO()
    display = ConsoleDisplay(stream)
    record = RunRecord("sim", "asked for", {"v17": {"kernel": "6.7", "additions": "x" * 100}}, planned=len(results))
    display.started(record)
    display.collected(record)
    for result in results:
        display.running(result.suite, result.test)
        record.results.append(result)
        display.finished_test(result)
    record.interrupted = interrupted
    display.finished(record)
    return stream.getvalue()


PASSED = Result("alpha", "test_a[1]", "v17", "passed", 0.001)
FAILED = Result("beta", "test_b", "v17", "failed", 0.002, "KVM_RUN: EIO", "the [red]traceback[/]\n")
SKIPPED = Result("beta", "test_c", "v17", "skipped", 0.0, "needs tdx: no")


def test_every_result_has_a_line_below_its_suite() -> None:
    lines = shown(PASSED, FAILED, SKIPPED).splitlines()

    assert lines[lines.index("alpha") + 1] == "  passed  [v17]      test_a[1] (1 ms)"
    assert lines[lines.index("beta") + 1] == "  failed  [v17]      test_b (2 ms): KVM_RUN: EIO"
    assert lines[lines.index("beta") + 2] == "  skipped [v17]      test_c (0 ms): needs tdx: no"


def test_a_failure_shows_its_one_line_before_its_traceback() -> None:
    text = shown(PASSED, FAILED)

    assert "FAILED beta::test_b[v17]\n  KVM_RUN: EIO\nthe [red]traceback[/]\n" in text


def test_the_table_counts_by_suite_and_in_total() -> None:
    rows = [line.split() for line in shown(PASSED, FAILED, SKIPPED).splitlines()[-3:]]

    assert [row[:5] for row in rows] == [
        ["alpha", "1", "0", "0", "0"],
        ["beta", "0", "1", "0", "1"],
        ["total", "1", "1", "0", "1"],
    ]


def test_a_long_fact_gets_a_line_of_its_own() -> None:
    lines = shown(PASSED).splitlines()

    assert lines[:3] == ["tdxhw run on sim (asked for)", "  [v17] kernel 6.7", f"    additions {'x' * 100}"]


def test_nothing_in_a_pipe_is_an_escape_code() -> None:
    assert "\x1b" not in shown(PASSED, FAILED, SKIPPED, interrupted=True)


class Terminal(io.StringIO):
    """Takes itself for a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("no_color", "colours"), [("", True), ("1", False)])
def test_no_color_means_no_colours_on_a_terminal_too(
    monkeypatch: pytest.MonkeyPatch, no_color: str, colours: bool
) -> None:
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setenv("TERM", "xterm-256color")
    stream = Terminal()
    ConsoleDisplay(stream).finished_test(PASSED)

    assert ("\x1b[32m" in stream.getvalue()) is colours


def test_an_interrupted_run_says_how_far_it_got() -> None:
    assert "interrupted after 1 of 1 tests" in shown(PASSED, interrupted=True)
