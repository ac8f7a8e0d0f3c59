"""Every format of a report: readable by somebody else's reader, and nothing in a test's output breaks it."""

import io
import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree as ET

import kcidb_io
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from tap.parser import Parser

from tdxhw.report import github, html, json_lines, junit, kcidb, tap
from tdxhw.report.cli import report
from tdxhw.report.errors import ReportError
from tdxhw.report.results import Results, Status
from tests.unit.report.samples import SPR, every_kind, result
from tests.unit.report.test_read import RESULTS

KTAP_RESULT = re.compile(r"(ok|not ok) ([0-9]+)( [^#\n]*)?( # (SKIP|TODO|XFAIL|TIMEOUT|ERROR)( .*)?)?")
MANY = st.lists(RESULTS, max_size=4).map(lambda results: Results(tuple(results)))


def ktap_tests(text: str) -> list[tuple[str, str]]:
    """Check KTAP by the words of its specification; return ``(ok or not ok, directive)`` of every leaf."""
    leaves: list[tuple[str, str]] = []

    def document(lines: list[str], indent: str) -> None:
        assert lines.pop(0) == f"{indent}KTAP version 1"
        while lines and lines[0].startswith(f"{indent}# "):
            lines.pop(0)
        plan = re.fullmatch(rf"{indent}1\.\.([0-9]+)", lines.pop(0))
        assert plan
        for number in range(1, int(plan[1]) + 1):
            nested = lines[0] == f"{indent}  KTAP version 1"
            if nested:
                document(lines, indent + "  ")
            while lines[0].startswith((f"{indent}# ", f"{indent}#")) and not nested:
                lines.pop(0)
            line = lines.pop(0)
            assert line.startswith(indent)
            match = KTAP_RESULT.fullmatch(line.removeprefix(indent))
            assert match, line
            assert int(match[2]) == number
            if not nested:
                leaves.append((match[1], match[5] or ""))

    lines = text.removesuffix("\n").split("\n")
    document(lines, "")
    assert lines == []
    return leaves


def test_ktap_of_every_kind() -> None:
    assert sorted(ktap_tests(tap.render_ktap(every_kind()))) == sorted(
        [("ok", ""), ("ok", ""), ("not ok", ""), ("not ok", ""), ("not ok", "ERROR"), ("not ok", "ERROR"),
         ("ok", "SKIP"), ("ok", "XFAIL")]
    )  # fmt: skip


@given(MANY)
def test_ktap_stays_ktap_whatever_tests_print(results: Results) -> None:
    leaves = ktap_tests(tap.render_ktap(results))
    bad = sum(result.status in (Status.FAIL, Status.ERROR, Status.MISS) for result in results.results)
    assert [word for word, _ in leaves].count("not ok") == bad
    assert len(leaves) == len(results.results)


@given(MANY)
def test_tap_13_is_understood_by_another_parser(results: Results) -> None:
    lines = list(Parser().parse_text(tap.render_tap13(results)))
    tests = [line for line in lines if line.category == "test"]

    assert [line.category for line in lines if line.category == "unknown"] == []
    assert len(tests) == len(results.results)
    skipped = sum(result.status is Status.SKIP for result in results.results)
    expected = sum(result.status is Status.XFAIL for result in results.results)
    bad = sum(result.status in (Status.FAIL, Status.ERROR, Status.MISS) for result in results.results)
    assert sum(bool(test.skip) for test in tests) == skipped
    assert sum(bool(test.todo) for test in tests) == expected
    assert sum(not test.ok and not test.todo for test in tests) == bad


def test_tap_13_carries_message_and_details_as_yaml() -> None:
    blocks = [
        line.yaml_block for line in Parser().parse_text(tap.render_tap13(every_kind())) if line.category == "test"
    ]
    nasty = next(block for block in blocks if block and "<script>" in block["message"])
    assert nasty["severity"] == "fail"
    assert nasty["details"].endswith("```\n```")


@given(MANY)
def test_junit_is_xml_whatever_tests_print(results: Results) -> None:
    top = ET.fromstring(junit.render(results))
    counted = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
    for suite in top.iter("testsuite"):
        for name in counted:
            counted[name] += int(suite.get(name, "0"))
    statuses = [result.status for result in results.results]
    assert counted == {
        "tests": len(statuses),
        "failures": statuses.count(Status.FAIL),
        "errors": statuses.count(Status.ERROR) + statuses.count(Status.MISS),
        "skipped": statuses.count(Status.SKIP) + statuses.count(Status.XFAIL),
    }
    assert len(list(top.iter("testcase"))) == len(statuses)


def test_junit_keeps_simulator_and_hardware_apart_and_tells_where_each_ran() -> None:
    top = ET.fromstring(junit.render(every_kind()))
    classes = {case.get("classname") for case in top.iter("testcase")}
    assert classes == {"tdxhw.sim.lifecycle", "tdxhw.hw.lifecycle", "tdxhw.hw.mmu"}

    gnr = next(suite for suite in top.iter("testsuite") if suite.get("hostname") == "gnr-01")
    assert {prop.get("name"): prop.get("value") for prop in gnr.iter("property")}["tdx_module"] == "2.0.08"
    assert [error.get("type") for error in gnr.iter("error")] == ["infrastructure"]


@given(MANY)
def test_kcidb_is_valid_whatever_tests_print(results: Results) -> None:
    made = kcidb.document(results)  # checks itself, too
    kcidb_io.schema.V5_3.validate_exactly(made)
    tests = made.get("tests", [])
    assert len({test["id"] for test in tests}) == len(results.results), "every id is unique"
    builds = {build["id"] for build in made.get("builds", [])}
    checkouts = {checkout["id"] for checkout in made.get("checkouts", [])}
    assert {test["build_id"] for test in tests} == builds
    assert {build["checkout_id"] for build in made.get("builds", [])} == checkouts


def test_kcidb_tells_lost_hosts_and_missing_capabilities_from_failures() -> None:
    tests = kcidb.document(every_kind())["tests"]
    assert [test["status"] for test in tests] == ["PASS", "PASS", "FAIL", "FAIL", "ERROR", "MISS", "SKIP", "DONE"]
    assert tests[0]["path"] == "tdxhw.sim.lifecycle.test_td_is_created"
    assert tests[1]["path"] == "tdxhw.hw.lifecycle.test_td_is_created"
    assert tests[1]["environment"]["misc"]["microcode"] == "0x2b000639"


def test_kcidb_log_keeps_its_end() -> None:
    long = Results((result(status=Status.FAIL, details="x" * 20000 + "AssertionError: here"),))
    excerpt = kcidb.document(long)["tests"][0]["log_excerpt"]
    assert len(excerpt) == 16384
    assert excerpt.endswith("AssertionError: here")


def test_kcidb_results_can_belong_to_a_build_of_somebody_else() -> None:
    made = kcidb.document(every_kind(), kcidb.Submission("my_ci", build_id="maestro:1234"))
    assert {test["build_id"] for test in made["tests"]} == {"maestro:1234"}
    assert "builds" not in made
    assert made["tests"][0]["id"].startswith("my_ci:")


def test_kcidb_tells_two_builds_of_one_release_apart() -> None:
    first, second = (SPR | {"build_id": digit * 40} for digit in "ab")
    unknown = SPR | {"build_id": "unknown"}
    results = Results(tuple(result(provenance=one) for one in (first, second, first, SPR, unknown)))
    made = kcidb.document(results)
    assert [len(made[part]) for part in ("checkouts", "builds", "tests")] == [1, 3, 5]
    assert [build.get("misc", {}).get("build_id") for build in made["builds"]] == ["a" * 40, "b" * 40, None]
    of = [test["build_id"] for test in made["tests"]]
    assert of[0] == of[2]
    assert len(set(of)) == 3
    assert len({test["id"] for test in made["tests"]}) == 5


@pytest.mark.parametrize(
    "submission",
    [kcidb.Submission(origin="My CI"), kcidb.Submission(git_commit="v7.3"), kcidb.Submission(build_id="1234")],
)
def test_kcidb_refuses_what_its_schema_refuses(submission: kcidb.Submission) -> None:
    with pytest.raises(ReportError, match="KCIDB") as error:
        kcidb.document(every_kind(), submission)
    assert "\n" not in str(error.value)


class Page(HTMLParser):
    """Collects the elements, attributes and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.starts: list[tuple[str, dict[str, str | None]]] = []
        self.text = io.StringIO()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.starts.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.write(data)


def test_the_page_puts_failures_first_and_shows_them_open() -> None:
    page = Page(html.render(every_kind()))
    rows = [attributes["data-status"] for tag, attributes in page.starts if tag == "tr" and "data-status" in attributes]
    assert rows == ["FAIL", "FAIL", "ERROR", "MISS", "PASS", "PASS", "XFAIL", "SKIP"]
    assert [("open" in a) for tag, a in page.starts if tag == "details"] == [True] * 3 + [False] * 5


def test_the_page_loads_nothing_and_runs_nothing_of_a_test() -> None:
    text = html.render(every_kind())
    page = Page(text)
    assert [a for _, a in page.starts if "src" in a or "href" in a] == []
    assert "@import" not in text
    assert "url(" not in text
    assert [tag for tag, _ in page.starts].count("script") == 1
    assert "<script>alert(1)</script>" in page.text.getvalue(), "shown as text"
    assert not re.search("[\x00-\x08\x0b-\x1f]", text)


def test_the_page_says_when_everything_was_simulated() -> None:
    simulated = Results(every_kind().results[:1])
    assert "says nothing about any hardware" in html.render(simulated)
    assert "says nothing about any hardware" not in html.render(every_kind())
    assert "0 results" in html.render(Results(()))


def test_the_step_summary_shows_totals_places_and_failures() -> None:
    text = github.summary(every_kind())
    assert text.startswith("## tdxhw: ❌ 3 of 8 failed\n")
    assert "| mainline | simulated | 7.3.0 | mainline-host | 1 |" in text
    assert text.count("<details>") == text.count("</details>") == 3
    assert "````text\n" in text, "the fence is longer than any in the output"


def test_the_step_summary_stays_below_githubs_limit() -> None:
    huge = Results(tuple(result(test=f"test_{n}", status=Status.FAIL, details="é" * 100_000) for n in range(40)))
    text = github.summary(huge)
    assert len(text.encode()) < 1 << 20
    assert re.search(r"… and \d+ more\.", text)


def test_annotations_point_at_the_line_and_cannot_be_forged() -> None:
    forged = result(test="test_a,b:c", status=Status.FAIL, message="100%\n::error::forged", details="")
    lines = github.annotations(Results((*every_kind().results, forged))).splitlines()
    assert lines[0].startswith("::error file=tdxhw/suites/lifecycle.py,line=42,title=lifecycle%3A%3Atest_finalize")
    assert [line for line in lines if "forged" in line] == [
        "::error title=lifecycle%3A%3Atest_a%2Cb%3Ac[spr-01]::100%25%0A::error::forged"
    ]
    assert lines[-1].startswith("::warning title=gnr-01::1 tests were lost")


def test_only_ten_annotations_are_written_and_the_rest_is_counted() -> None:
    failures = Results(tuple(result(test=f"test_{n}", status=Status.FAIL) for n in range(13)))
    lines = github.annotations(failures).splitlines()
    assert len(lines) == 11
    assert "3 more failures" in lines[-1]


def test_the_command_writes_every_format_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "run.jsonl"
    source.write_text(json_lines.render(every_kind()))
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    names = ("junit", "ktap", "tap", "jsonl", "html", "markdown", "kcidb")
    options = [text for name in names for text in (f"--{name}", str(tmp_path / "out" / name))]
    done = CliRunner().invoke(report, [str(source), *options, "--github"])

    assert done.exit_code == 0, done.output
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(names), "no partial file is left"
    assert (tmp_path / "out" / "jsonl").read_text() == source.read_text()
    assert json.loads((tmp_path / "out" / "kcidb").read_text())["version"] == {"major": 5, "minor": 3}
    assert (tmp_path / "summary.md").read_text().startswith("## tdxhw: ❌")
    assert done.output.count("::error ") == 3


def test_the_command_without_options_counts(tmp_path: Path) -> None:
    source = tmp_path / "run.jsonl"
    source.write_text(json_lines.render(every_kind()))
    done = CliRunner().invoke(report, [str(source)])
    assert done.output == "8 results: 2 FAIL, 1 ERROR, 1 MISS, 2 PASS, 1 XFAIL, 1 SKIP\n"
    assert CliRunner().invoke(report, [str(source), "--ktap", "-"]).output.startswith("KTAP version 1\n")


def test_a_pipe_is_written_to_and_not_replaced_by_a_file(tmp_path: Path) -> None:
    source, pipe = tmp_path / "run.jsonl", tmp_path / "pipe"
    source.write_text(json_lines.render(every_kind()))
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        done = CliRunner().invoke(report, [str(source), "--ktap", str(pipe)])
        assert done.exit_code == 0, done.output
        assert pipe.is_fifo()
        assert os.read(reader, 1 << 16).startswith(b"KTAP version 1\n")
    finally:
        os.close(reader)


def test_what_a_link_leads_to_is_written_and_the_link_stays(tmp_path: Path) -> None:
    source, link = tmp_path / "run.jsonl", tmp_path / "latest.ktap"
    source.write_text(json_lines.render(every_kind()))
    link.symlink_to(tmp_path / "today.ktap")
    assert CliRunner().invoke(report, [str(source), "--ktap", str(link)]).exit_code == 0
    assert link.is_symlink()
    assert (tmp_path / "today.ktap").read_text().startswith("KTAP version 1\n")


def test_the_command_refuses_what_it_cannot_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "run.jsonl"
    source.write_text(json_lines.render(every_kind()))
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)

    assert isinstance(CliRunner().invoke(report, [str(source), "--github"]).exception, ReportError)
    blocked = CliRunner().invoke(report, [str(source), "--html", str(source / "page.html")])
    assert isinstance(blocked.exception, ReportError)
