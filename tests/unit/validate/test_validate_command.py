"""`tdxhw validate` as a command: mistakes are inconclusive, and one line says what to do."""

import json
from collections.abc import Callable
from datetime import datetime, tzinfo
from pathlib import Path
from typing import Self

import pytest

from tdxhw.cli import main
from tdxhw.report.results import Result, Results, Status
from tdxhw.validate import cli as command
from tdxhw.validate.outcome import Outcome, Tried
from tests.unit.abi.samples import BUILD_ID, RELEASE, bzimage, vmlinux

LAB = "host:\n  name: vm\n  ssh: root@127.0.0.1\n"


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "labs").mkdir()
    (tmp_path / "labs/vm.yaml").write_text(LAB)
    (tmp_path / "bzImage").write_bytes(bzimage(vmlinux()))
    result = Result("suite", "a", "vm", Status.PASS, provenance={"backend": "local"})
    (tmp_path / "base.jsonl").write_text(json.dumps(result.to_json()) + "\n")
    for name, status, backend in (("failed", Status.FAIL, "local"), ("simulated", Status.PASS, "sim")):
        other = Result("suite", "a", "vm", status, provenance={"backend": backend})
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(other.to_json()) + "\n")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    return tmp_path


def arguments(folder: Path, **changes: str | None) -> list[str]:
    given: dict[str, str | None] = {
        "--lab": "vm", "--labs": str(folder / "labs"), "--kernel": str(folder / "bzImage"), "--modules": "none",
        "--baseline": str(folder / "base.jsonl"), "--out": str(folder / "out"),
    }  # fmt: skip
    given |= {("-k" if name == "k" else f"--{name.replace('_', '-')}"): value for name, value in changes.items()}
    return ["validate", *[word for name, value in given.items() if value is not None for word in (name, value)]]


MISTAKES: list[tuple[dict[str, str | None], str]] = [
    ({"lab": None}, "Missing option '--lab'"),
    ({"lab": "nobody"}, "no host 'nobody'"),
    ({"kernel": None}, "--kernel and --baseline say what to validate"),
    ({"baseline": None}, "--kernel and --baseline say what to validate"),
    ({"baseline": "/nowhere/base.jsonl"}, "cannot read it"),
    ({"modules": ""}, "--modules TAR has to bring its modules"),
    ({"parameters": "tdx"}, "MODULE.PARAMETER=VALUE"),
    ({"command_line": "x; rm -rf /"}, "--command-line: letters, digits"),
    ({"command_line": "quiet\n}"}, "--command-line: letters, digits"),
    ({"boot_limit": "1"}, "--boot-limit"),
    ({"retries": "x"}, "--retries"),
    ({"out": "full"}, "is not empty"),
    ({"baseline": "simulated.jsonl"}, "has no result from hardware (the simulator says nothing about a kernel build)"),
    ({"baseline": "failed.jsonl"}, "has no test that passed on hardware"),
    ({"suites": "nonsense"}, "'nonsense'"),
    ({"suites": "nowhere.py"}, "no file nowhere.py"),
    ({"suites": "kvm_device"}, "has no result from hardware of kvm_device"),
    ({"promise": "nonsense"}, "'nonsense'"),
    ({"k": "a and"}, "-k 'a and': pytest says: Wrong expression passed to '-k'"),
]


@pytest.mark.parametrize(("changes", "told"), MISTAKES, ids=[told for _, told in MISTAKES])
def test_a_mistake_is_inconclusive_and_one_line(
    files: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, str | None], told: str
) -> None:
    for name in changes.keys() & {"out", "baseline"}:
        changes = changes | {name: str(files / (changes[name] or "")) if changes[name] else None}
    suites = [word] if (word := changes.pop("suites", None)) else []
    assert main([*arguments(files, **changes), *suites]) == 125
    output = capsys.readouterr()
    assert told in output.err
    assert output.err.count("\n") == 1, output.err
    assert output.out == ""
    assert not (files / "out").exists(), "nothing was begun"


def test_a_host_that_does_not_answer_is_inconclusive_and_says_so_in_the_last_line(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (files / "labs/vm.yaml").write_text(LAB.replace("root@127.0.0.1", "ssh://root@127.0.0.1:1"))
    assert main(arguments(files)) == 125
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last.startswith(f"INCONCLUSIVE linux {RELEASE} on vm: infrastructure")
    assert "127.0.0.1:1" in last
    document = json.loads((files / "out/outcome.json").read_text())
    assert (document["verdict"], document["exit_code"]) == ("INCONCLUSIVE", 125)


def test_json_is_one_document_on_stdout(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (files / "labs/vm.yaml").write_text(LAB.replace("root@127.0.0.1", "ssh://root@127.0.0.1:1"))
    assert main([*arguments(files), "--json"]) == 125
    document = json.loads(capsys.readouterr().out)
    assert document == json.loads((files / "out/outcome.json").read_text())
    assert document["line"].startswith("INCONCLUSIVE")
    assert (document["kernel"], document["build_id"]) == (RELEASE, BUILD_ID.hex())


def test_two_validations_that_begin_in_the_same_second_have_a_folder_each(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(files)
    (files / "labs/vm.yaml").write_text(LAB.replace("root@127.0.0.1", "ssh://root@127.0.0.1:1"))

    class Stopped(datetime):
        """A clock that stands still."""

        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Self:
            return cls(2026, 11, 23, 20, 0, 0, tzinfo=tz)

    monkeypatch.setattr(command, "datetime", Stopped)
    for _ in range(3):
        assert main(arguments(files, out=None)) == 125
    name = "validate-vm-20261123-200000"
    assert sorted(path.name for path in files.glob("validate-*")) == [name, f"{name}-2", f"{name}-3"]
    assert len(list(files.glob("validate-*/outcome.json"))) == 3


# ---- what the last line is made of ----


def outcome(make: Callable[[Outcome], None]) -> Outcome:
    base = Results(tuple(Result("s", t, "vm", Status.PASS, provenance={"backend": "local"}) for t in ("a", "b")))
    made = Outcome("vm", "7.2", base)
    make(made)
    return made


def tried(parameters: dict[str, str], **tests: list[Status]) -> Tried:
    results = [
        Result("s", test, "vm", status, provenance={"backend": "local"})
        for test, statuses in tests.items()
        for status in statuses
    ]
    return Tried(parameters, [Results(tuple(results))])


PASS, FAIL = [Status.PASS], [Status.FAIL, Status.FAIL]


def test_the_worst_boot_of_several_is_the_verdict_and_is_named() -> None:
    made = outcome(
        lambda one: one.tried.extend([tried({"k.x": "Y"}, a=PASS, b=PASS), tried({"k.x": "N"}, a=PASS, b=FAIL)])
    )
    assert made.exit_code == 1
    assert made.line == "REGRESSED linux 7.2 on vm with k.x=N: 1 test fails that passed: s::b"


def test_what_went_wrong_with_the_host_counts_for_every_boot_and_undoes_no_regression() -> None:
    made = outcome(lambda one: one.tried.append(tried({}, a=PASS, b=PASS)))
    assert made.exit_code == 0
    made.problems.append("vm: cannot be rolled back")
    assert made.exit_code == 125
    made.tried.append(tried({}, a=FAIL, b=PASS))
    assert made.exit_code == 1


def test_interrupted_is_130_and_never_good() -> None:
    made = outcome(lambda one: one.tried.append(tried({}, a=PASS, b=PASS)))
    made.interrupted = True
    assert made.exit_code == 130
    assert made.line.startswith("INCONCLUSIVE linux 7.2 on vm: infrastructure: interrupted")
