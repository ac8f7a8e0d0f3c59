"""Reading results: what pytest really writes, what `tdxhw run --json` prints, and files that were cut off."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tdxhw.report import json_lines
from tdxhw.report.errors import ReportError
from tdxhw.report.read import read, read_all
from tdxhw.report.results import Result, Results, Status
from tests.unit.report.samples import SIM, every_kind, result

SUITE = '''
"""A suite with one test of each kind."""
import pytest

class ConnectionLost(Exception): pass

def pytest_generate_tests(metafunc):
    if "host" in metafunc.fixturenames:
        metafunc.parametrize("host", ["spr-01", "gnr-01"])

@pytest.fixture
def td(): yield; raise RuntimeError("one HKID is still held")

@pytest.fixture
def no_td(): raise OSError("no TD")

def test_pass(record_property): record_property("tdxhw.kernel", "6.19")
@pytest.mark.parametrize("n", [4])
def test_host(host, n): pass
def test_fail(): assert 1 == 2, "first line\\nsecond line"
def test_kvm_error(): raise OSError(5, "KVM_TDX_FINALIZE_VM: EIO")
def test_mistake(): nowhere
def test_lost(): raise ConnectionLost("spr-01: the connection ended")
def test_teardown(td): pass
def test_fail_and_teardown(td): assert not "td"
def test_setup(no_td): pass
@pytest.mark.skip(reason="needs tdx: no TDX VM type")
def test_skip(): pass
@pytest.mark.xfail(reason="known bug")
def test_xfail(): assert False
'''


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return what pytest-reportlog writes for one test of each kind, with our first line."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "test_lifecycle.py").write_text(SUITE)
    (folder / "test_unreadable.py").write_text("import nowhere\n")
    options = "-q -p no:cacheprovider --continue-on-collection-errors --report-log=log.jsonl -c/dev/null --rootdir=."
    command = [sys.executable, "-m", "pytest", *options.split()]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    lines = (folder / "log.jsonl").read_text().splitlines(keepends=True)
    start = json.loads(lines[0]) | {"hosts": {"spr-01": {"backend": "local", "dialect": "mainline"}, "gnr-01": {}}}
    path = folder / "ours.jsonl"
    path.write_text(json.dumps(start) + "\n" + "".join(lines[1:]))
    return path


def by_test(results: Results) -> dict[str, Result]:
    return {f"{result.test}@{result.host}": result for result in results.results}


def test_every_kind_of_outcome_becomes_its_status(log: Path) -> None:
    found = {name: result.status for name, result in by_test(read(log)).items()}

    assert found == {
        "test_pass@": Status.PASS,
        "test_host[4]@spr-01": Status.PASS,
        "test_host[4]@gnr-01": Status.PASS,
        "test_fail@": Status.FAIL,
        "test_kvm_error@": Status.FAIL,
        "test_mistake@": Status.ERROR,
        "test_lost@": Status.MISS,
        "test_teardown@": Status.ERROR,
        "test_fail_and_teardown@": Status.FAIL,
        "test_setup@": Status.ERROR,
        "test_skip@": Status.SKIP,
        "test_xfail@": Status.XFAIL,
        "(collection)@": Status.ERROR,
    }


def test_a_result_says_what_happened_in_one_line_and_at_length(log: Path) -> None:
    results = by_test(read(log))

    assert results["test_skip@"].message == "needs tdx: no TDX VM type"
    assert results["test_kvm_error@"].message == "OSError: [Errno 5] KVM_TDX_FINALIZE_VM: EIO"
    assert "first line" in results["test_fail@"].message
    assert "second line" not in results["test_fail@"].message
    assert "test_lifecycle.py:" in results["test_fail@"].details
    assert "one HKID is still held" in results["test_fail_and_teardown@"].details
    assert "No module named 'nowhere'" in results["(collection)@"].details
    assert results["test_pass@"].details == results["test_pass@"].message == ""


def test_provenance_comes_from_the_test_or_else_from_its_host(log: Path) -> None:
    results = by_test(read(log))

    assert results["test_pass@"].provenance == {"kernel": "6.19"}
    assert results["test_host[4]@spr-01"].provenance == {"backend": "local", "dialect": "mainline"}
    assert {result.suite for result in results.values()} == {"lifecycle", "unreadable"}
    assert all(result.started > 1.6e9 for result in results.values() if result.suite == "lifecycle")


def test_what_a_killed_run_leaves_is_counted_and_the_test_it_died_in_is_lost(log: Path, tmp_path: Path) -> None:
    whole = log.read_text()
    path = tmp_path / "cut.jsonl"
    path.write_text(whole[: whole.index('"when": "call"', whole.index("test_mistake")) + 200])

    results = read(path)
    found = by_test(results)
    assert found["test_fail@"].status is Status.FAIL
    assert found["test_mistake@"].status is Status.MISS
    assert "setup was its last sign of life" in found["test_mistake@"].message
    assert results.notes == (f"{path} ends in the middle of a line: the run was cut off",)


def test_a_log_without_its_end_is_noted(log: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.jsonl"
    path.write_text("".join(log.read_text().splitlines(keepends=True)[:-1]))
    assert read(path).notes == (f"{path} has no end: the run was cut off",)
    assert read(log).notes == ()


def test_provenance_is_text_whatever_wrote_the_file(tmp_path: Path) -> None:
    one = {"suite": "a", "test": "b", "host": "h", "outcome": "passed", "duration_s": 1, "reason": "", "details": "",
           "provenance": {"kernel": 6.18, "microcode": None}}  # fmt: skip
    document = tmp_path / "run.json"
    document.write_text(json.dumps({"started": 5, "results": [one]}))
    start = {"$report_type": "SessionStart", "hosts": {"h": one["provenance"]}}
    phase = {"$report_type": "TestReport", "nodeid": "a.py::b[h]", "when": "teardown", "outcome": "passed",
             "duration": 1, "longrepr": None, "user_properties": []}  # fmt: skip
    log = tmp_path / "log.jsonl"
    log.write_text(f"{json.dumps(start)}\n{json.dumps(phase)}\n")
    for path in (document, log):
        (result,) = read(path).results
        assert result.provenance == {"kernel": "6.18", "microcode": "None"}


@pytest.mark.parametrize("tail", [b"\x00" * 4096, b'{"$report_type": "Te\xff\xfe'], ids=["zeros", "no_text"])
def test_what_a_power_cut_leaves_behind_the_last_line_costs_no_result(log: Path, tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "cut.jsonl"
    path.write_bytes(b"".join(log.read_bytes().splitlines(keepends=True)[:-1]) + tail)
    assert len(read(path).results) == len(read(log).results)
    assert read(path).notes == (f"{path} ends in the middle of a line: the run was cut off",)


def report_log(path: Path, *records: dict[str, object]) -> Path:
    hosts = {"6.18": SIM | {"profile": "6.18"}, "7.3": SIM | {"profile": "7.3"}}
    records = ({"$report_type": "SessionStart", "start": 1.7e9, "hosts": hosts}, *records)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_a_test_that_took_the_machine_down_in_its_set_up_is_lost(tmp_path: Path) -> None:
    begun: dict[str, object] = {"$report_type": "TestStart", "nodeid": "test_mmu.py::test_x[7.3]", "start": 5.0}
    (lost,) = read(report_log(tmp_path / "log.jsonl", begun)).results
    assert (lost.name, lost.host, lost.status, lost.started) == ("mmu::test_x", "7.3", Status.MISS, 5.0)
    assert "start was its last sign of life" in lost.message

    report = {"$report_type": "TestReport", "outcome": "passed", "duration": 1.0, "start": 5.1, "longrepr": None}
    phases = [begun | report | {"when": when, "user_properties": []} for when in ("setup", "call", "teardown")]
    (ended,) = read(report_log(tmp_path / "log.jsonl", begun, *phases)).results
    assert (ended.status, ended.started, ended.duration_s) == (Status.PASS, 5.0, 3.0)


def test_a_suite_that_cannot_be_read_is_of_the_backend_it_was_to_run_on(tmp_path: Path) -> None:
    broken: dict[str, object] = {
        "$report_type": "CollectReport", "nodeid": "test_own.py", "outcome": "failed", "longrepr": "E  ImportError: x",
    }  # fmt: skip
    (result,) = read(report_log(tmp_path / "log.jsonl", broken)).results
    assert (result.status, result.host, result.is_simulated) == (Status.ERROR, "", True)
    assert result.started == 1.7e9  # so that the history knows it from that of another run
    assert result.provenance["tdxhw"] == SIM["tdxhw"]
    assert "profile" not in result.provenance  # it is not the same on all of its hosts


@pytest.mark.parametrize("line_separator", ["\u2028", "\x85"])
def test_a_line_ends_where_json_lines_end(tmp_path: Path, line_separator: str) -> None:
    one = result(message=f"a{line_separator}b")
    path = tmp_path / "a.jsonl"
    escaped = json.dumps(one.to_json(), ensure_ascii=False)  # as jq writes it
    path.write_text(escaped + "\n", encoding="utf-8")
    assert read(path).results == (one,)


def test_the_document_of_run_json_is_read(tmp_path: Path) -> None:
    one = {"suite": "lifecycle", "test": "test_x", "host": "mainline", "outcome": "error", "duration_s": 1.5,
           "reason": "why", "details": "trace", "provenance": {"backend": "sim"}}  # fmt: skip
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"started": 5.0, "interrupted": True, "results": [one]}, indent=1))

    results = read(path)
    assert results.results == (
        Result("lifecycle", "test_x", "mainline", Status.ERROR, 1.5, 5.0, "why", "trace", {"backend": "sim"}),
    )
    assert results.notes == (f"{path}: the run was interrupted",)


ONE_LINE = '{"suite": "a", "test": "b", "host": "", "status": "PASS", "provenance": {}, %s}\n'
BROKEN = {
    "empty": ("", "empty: the run wrote no result"),
    "not_json": ("hello\n", ":1: not JSON"),
    "broken_in_the_middle": ('{"$report_type": "SessionStart"}\n{broken\n{}\n', ":2: not JSON"),
    "not_a_result": ("{}\n", ":1: not a result"),
    "a_list": ("[]\n", ":1: not a result"),
    "unknown_status": ('{"suite": "a", "test": "b", "host": "", "status": "GOOD", "provenance": {}}\n', "not a result"),
    "wrong_type": ('{"suite": 1, "test": "b", "host": "", "status": "PASS", "provenance": {}}\n', "not a result"),
    "incomplete_report": ('{"$report_type": "TestReport", "nodeid": "x", "when": "teardown"}\n', ":1: not a result"),
    "no_time": (ONE_LINE % '"started": Infinity', "not a result: ValueError('inf is no time')"),
    "no_duration": (ONE_LINE % '"duration_s": NaN', "not a result: ValueError('nan is no time')"),
    "no_date": (ONE_LINE % '"started": 1e18', "is no time"),
    "before_time": (ONE_LINE % '"started": -1', "is no time"),
    "a_truth": (ONE_LINE % '"started": true', "True is not a number"),
    "too_many_digits": ('{"suite": ' + "9" * 5000 + "}\n", ":1: not a result: ValueError"),
    "too_deep": ("[" * 100_000 + "\n", ":1: not a result: RecursionError"),
    "a_document_without_an_end": ('{"results": ' + "[" * 100_000, ":1: not a result: RecursionError"),
    "no_name": ('{"$report_type": "CollectReport", "nodeid": null, "outcome": "failed"}\n', ":1: not a result"),
    "wrong_document": ('{"results": [{}]}', "not what `tdxhw run --json` prints"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_file_that_is_no_result_is_refused_in_one_line(tmp_path: Path, case: str) -> None:
    text, message = BROKEN[case]
    path = tmp_path / "broken.jsonl"
    path.write_text(text)

    with pytest.raises(ReportError) as error:
        read(path)
    assert str(error.value).startswith(str(path))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="cannot read it: No such file"):
        read(tmp_path / "nowhere.jsonl")


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
RESULTS = st.builds(
    Result, suite=TEXT, test=TEXT, host=TEXT, status=st.sampled_from(Status),
    duration_s=st.floats(0, 1e6), started=st.floats(0, 2e9), message=TEXT, details=TEXT,
    provenance=st.dictionaries(TEXT, TEXT, max_size=3),
)  # fmt: skip


@given(st.lists(RESULTS, min_size=1, max_size=4))
def test_json_lines_are_read_back_as_they_were(tmp_path_factory: pytest.TempPathFactory, results: list[Result]) -> None:
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    path.write_text(json_lines.render(Results(tuple(results))), encoding="utf-8")
    assert read(path).results == tuple(results)


def test_several_files_are_one_set_of_results(tmp_path: Path, log: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json_lines.render(every_kind()))
    merged = read_all([path, log])
    assert len(merged.results) == len(every_kind().results) + len(read(log).results)
    assert merged.sources == (str(path), str(log))
