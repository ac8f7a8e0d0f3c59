"""``tdxhw history``: what it prints, what it refuses, and what the HTML page gets from it."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from tdxhw.cli import cli
from tdxhw.errors import HarnessError
from tdxhw.history import queries
from tdxhw.history.database import Database
from tdxhw.history.since import Since
from tdxhw.report import json_lines
from tdxhw.report.results import Result as ResultOfATest
from tdxhw.report.results import Results
from tests.unit.history.test_queries import days
from tests.unit.report.samples import every_kind


@pytest.fixture
def db(tmp_path: Path) -> str:
    return str(tmp_path / "history.sqlite")


@pytest.fixture
def filled(tmp_path: Path, db: str) -> str:
    files = []
    for number, results in enumerate(days()):
        files.append(tmp_path / f"day-{number}.jsonl")
        files[-1].write_text(json_lines.render(results))
    assert ask("add", *map(str, files), "--db", db).exit_code == 0
    return db


def ask(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["history", *arguments], catch_exceptions=False)


def refused(*arguments: str) -> str:
    result = CliRunner().invoke(cli, ["history", *arguments])
    assert isinstance(result.exception, HarnessError), result.output
    return str(result.exception)


def test_adding_says_what_came_of_it(tmp_path: Path, db: str) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text(json_lines.render(every_kind()))
    assert ask("add", str(path), "--db", db).output == f"{path}: run 1, 8 results added\n"
    assert ask("add", str(path), "--db", db).output == f"{path}: run 1, 0 results added, 8 known already\n"


def test_a_file_that_is_no_results_adds_nothing_of_the_others(tmp_path: Path, db: str) -> None:
    good, bad = tmp_path / "good.jsonl", tmp_path / "bad.jsonl"
    good.write_text(json_lines.render(every_kind()))
    bad.write_text("{}\n")
    assert refused("add", str(good), str(bad), "--db", db).startswith(f"{bad}:1: not a result")
    assert not Path(db).exists()


def test_runs(filled: str) -> None:
    lines = ask("runs", "--db", filled).output.splitlines()
    assert lines[0].split() == ["run", "begun", "(UTC)", "kernel", "host", "TDX", "module", "results", "verdict"]
    assert lines[2].split()[:4] == ["2", "2025-10-10", "08:53", "6.18.0-rc1"]
    assert "2 FAIL, 3 PASS" in lines[2]


def test_runs_of_a_kernel_and_since(filled: str) -> None:
    assert len(ask("runs", "--db", filled, "--kernel", "6.18*").output.splitlines()) == 3
    assert ask("runs", "--db", filled, "--since", "7d").output == "no run\n"
    assert len(ask("runs", "--db", filled, "--since", "2025-10-11").output.splitlines()) == 2


def test_a_test(filled: str) -> None:
    output = ask("test", "test_b", "--db", filled).output
    failed = next(line for line in output.splitlines() if "FAIL" in line)
    assert failed.split()[3:] == ["lifecycle::test_b[1]", "6.18.0-rc1", "spr-01", "1.5.24", "FAIL", "0.250", "s", "EIO"]


@pytest.mark.parametrize(("what", "name"), [("kernel", "6.18.0-rc1"), ("host", "spr-01"), ("module", "1.5.24")])
def test_a_kernel_a_host_and_a_module(filled: str, what: str, name: str) -> None:
    output = ask(what, name, "--db", filled).output
    assert "2 FAIL, 2 PASS" in output
    assert "1 of 2" in output, "test_c, flaky"
    document = json.loads(ask(what, name, "--db", filled, "--json").output)
    assert {line["test"] for line in document["failing"]} == {"lifecycle::test_b[1]", "lifecycle::test_c"}
    assert all(name in (line["kernel"], line["host"], line["module"]) for line in document["environments"])


def test_flaky(filled: str) -> None:
    (line,) = json.loads(ask("flaky", "--db", filled, "--json").output)
    assert (line["test"], line["passed"], line["failed"]) == ("lifecycle::test_c", 1, 1)
    assert "lifecycle::test_c" in ask("flaky", "--db", filled).output
    assert ask("flaky", "--db", filled, "--host", "gnr-01").output == "none\n"


@pytest.mark.parametrize("command", ["runs", "flaky"])
def test_json_is_json_and_nothing_else(filled: str, command: str) -> None:
    assert isinstance(json.loads(ask(command, "--db", filled, "--json").output), list)


def test_an_export_is_what_compare_and_add_read(filled: str, tmp_path: Path) -> None:
    exported = tmp_path / "all.jsonl"
    assert ask("export", str(exported), "--db", filled).exit_code == 0
    again = ask("add", str(exported), "--db", filled).output
    assert again.endswith("0 results added, 15 known already\n")
    assert ask("export", "--db", filled).output == exported.read_text()

    for kernel in ("6.17.0", "6.18.0-rc1"):
        ask("export", str(tmp_path / kernel), "--db", filled, "--kernel", kernel)
    compared = CliRunner().invoke(cli, ["compare", str(tmp_path / "6.17.0"), str(tmp_path / "6.18.0-rc1")])
    assert compared.exit_code == 1
    assert "regression" in compared.output


def test_an_export_that_fails_leaves_the_file_that_was_there(filled: str, tmp_path: Path) -> None:
    exported = tmp_path / "all.jsonl"
    exported.write_text("mine")
    assert "no kernel 'x'" in refused("export", str(exported), "--db", filled, "--kernel", "x")
    assert exported.read_text() == "mine"


def test_an_export_that_ends_in_the_middle_leaves_the_file_that_was_there(
    filled: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half an export is a baseline without half of the tests."""

    def breaks(database: Database, wanted: queries.Wanted) -> Iterator[ResultOfATest]:
        yield from list(whole(database, wanted))[:3]
        raise KeyboardInterrupt

    whole = queries.export
    monkeypatch.setattr(queries, "export", breaks)
    exported = tmp_path / "all.jsonl"
    for before in (None, "mine"):
        if before:
            exported.write_text(before)
        assert CliRunner().invoke(cli, ["history", "export", str(exported), "--db", filled]).exit_code != 0
        assert (exported.read_text() if exported.exists() else None) == before
        assert not [path.name for path in tmp_path.iterdir() if path.name.endswith(".part")]


def test_more_than_there_can_be_is_no_limit(filled: str) -> None:
    result = CliRunner().invoke(cli, ["history", "runs", "--db", filled, "--limit", "9" * 20])
    assert result.exit_code == 2
    assert "not in the range" in result.output


def test_names_without_an_answer_are_refused_with_a_guess(filled: str) -> None:
    assert "did you mean" in refused("host", "spr-02", "--db", filled)
    assert refused("runs", "--db", filled + "x").endswith("no history yet: tdxhw history add RESULTS")


@pytest.mark.parametrize("since", ["yesterday", "7", "2025-13-01", "", "7m"])
def test_what_is_no_point_in_time_is_refused(db: str, since: str) -> None:
    result = CliRunner().invoke(cli, ["history", "runs", "--db", db, "--since", since])
    assert result.exit_code == 2
    assert "is no date: 2026-11-01" in result.output


def test_points_in_time() -> None:
    since = Since()
    assert since.convert("2026-11-01", None, None) == 1793491200.0
    assert since.convert("2026-11-01T01:00+01:00", None, None) == 1793491200.0
    assert abs(since.convert("2h", None, None) - (time.time() - 7200)) < 60


def test_the_history_is_named_by_a_variable_and_else_the_users_own(filled: str, tmp_path: Path) -> None:
    runner = CliRunner()
    asked = runner.invoke(cli, ["history", "runs"], env={"TDXHW_HISTORY": filled})
    assert len(asked.output.splitlines()) == 4
    path = tmp_path / "day-0.jsonl"
    added = runner.invoke(
        cli, ["history", "add", str(path)], env={"XDG_STATE_HOME": str(tmp_path), "TDXHW_HISTORY": ""}
    )
    assert added.exit_code == 0
    assert (tmp_path / "tdxhw" / "history.sqlite").exists()


def test_the_page_has_trends_of_its_tests_on_its_hosts(filled: str, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    command = ["report", str(tmp_path / "day-2.jsonl"), "--html", str(page), "--history", filled]
    assert CliRunner().invoke(cli, command, catch_exceptions=False).exit_code == 0
    text = page.read_text()
    assert "6.18.0-rc1: 3 of 5 passed (60.0 %)" in text
    assert text.count("<figure>") == 2
    assert "the history has nothing of" not in text.lower()


def test_simulator_and_hardware_have_trends_of_their_own(tmp_path: Path, db: str) -> None:
    run, page = tmp_path / "run.jsonl", tmp_path / "page.html"
    run.write_text(json_lines.render(every_kind()))
    assert ask("add", str(run), "--db", db).exit_code == 0
    CliRunner().invoke(cli, ["report", str(run), "--html", str(page), "--history", db], catch_exceptions=False)
    assert "Over kernels, on hardware (gnr-01, spr-01)" in page.read_text()
    assert "Over kernels, on the simulator</summary>" in page.read_text()


def test_a_page_of_a_kernel_that_was_not_added_says_so(filled: str, tmp_path: Path) -> None:
    run, page = tmp_path / "run.jsonl", tmp_path / "page.html"
    run.write_text(json_lines.render(Results(every_kind().results[1:2])))
    CliRunner().invoke(cli, ["report", str(run), "--html", str(page), "--history", filled], catch_exceptions=False)
    assert "The history has nothing of 6.19.0-3-generic" in page.read_text()


def test_trends_without_a_page_are_a_mistake(filled: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["report", str(tmp_path / "day-0.jsonl"), "--history", filled])
    assert "--html says where that goes" in str(result.exception)


WITHOUT = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == {package!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocker())
from tdxhw.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("package", "where", "remedy"),
    [("sqlalchemy", "h.sqlite", "'tdxhw[validate]'"), ("psycopg", "postgresql://h/d", "'tdxhw[postgresql]'")],
)
def test_what_is_not_installed_is_told(package: str, where: str, remedy: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", WITHOUT.format(package=package), "history", "runs", "--db", where]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("tdxhw: ")
    assert done.stderr.endswith(f"pip install {remedy}\n")
    assert done.stderr.count("\n") == 1
