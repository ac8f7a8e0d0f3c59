"""`tdxhw replay`: agreement, the first divergence of each file, and files that cannot be read."""

import gzip
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

Cli = Callable[..., tuple[int, str, str]]
RESET = {"op": "reset", "lps": 2, "pkgs": 1, "cmrs": [["0x100000", "0xbff00000"]]}
SYS_INIT = 0x21


def seamcall(rax: int, expected: int, note: str = "") -> dict[str, Any]:
    record = {"op": "seamcall", "lp": 0, "in": {"rax": hex(rax)}, "res": "ret", "rax": hex(expected), "out": {}}
    return record | ({"note": note} if note else {})


GOOD = [RESET, seamcall(SYS_INIT, 0)]
BAD = [RESET, seamcall(SYS_INIT, 0xC0000508_00000000, "should have been refused"), seamcall(0xFFF, 1)]


def write(path: Path, records: Iterable[object]) -> str:
    text = "".join(json.dumps(record) + "\n" for record in records)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return str(path)


@pytest.mark.parametrize("name", ["empty.jsonl", "empty.jsonl.gz"])
def test_a_recording_of_nothing_does_not_agree(tdxhw: Cli, tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, [])

    code, _, err = tdxhw("replay", path)

    assert (code, err) == (2, f"tdxhw: {path}: no records in it: empty, or its recorder ended before the first\n")


@pytest.mark.parametrize("name", ["good.jsonl", "good.jsonl.gz"])
def test_agreement_is_0_and_the_last_line_counts(tdxhw: Cli, tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, GOOD)

    code, out, err = tdxhw("replay", path)

    assert (code, err) == (0, "")
    assert out.splitlines() == [f"{path}: 2 of 2 records agree", "2 of 2 records agree"]


def test_a_divergence_is_1_and_shows_record_expected_got_and_note(tdxhw: Cli, tmp_path: Path) -> None:
    good, bad = write(tmp_path / "good.jsonl", GOOD), write(tmp_path / "bad.jsonl", BAD)

    code, out, _ = tdxhw("replay", good, bad)

    lines = out.splitlines()
    assert code == 1
    assert lines[-1] == "3 of 5 records agree"
    assert "  first divergence in line 2: should have been refused" in lines
    record = next(line for line in lines if line.startswith("    record"))
    assert json.loads(record.removeprefix("    record").strip()) == BAD[1]
    assert any(line.startswith("    expected ") and "0xc000050800000000" in line for line in lines)
    assert any(line.startswith("    got ") and "rax=0x0" in line for line in lines)


def test_json_holds_the_first_divergence_of_each_file(tdxhw: Cli, tmp_path: Path) -> None:
    good, bad = write(tmp_path / "good.jsonl", GOOD), write(tmp_path / "bad.jsonl", BAD)

    code, out, _ = tdxhw("replay", "--json", good, bad)

    document = json.loads(out)
    assert code == 1
    assert (document["records"], document["agreed"]) == (5, 3)
    assert document["files"][0]["first_divergence"] is None
    assert document["files"][1]["first_divergence"]["line"] == 2


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        pytest.param('{"op": "reset"\n', 1, "not a JSON object", id="no JSON"),
        pytest.param("[1]\n", 1, 'not an object with an "op"', id="no object"),
        pytest.param(json.dumps(RESET) + '\n{"op": "dance"}\n', 2, "malformed 'dance' record", id="unknown op"),
        pytest.param(json.dumps(RESET) + '\n{"op": "seamcall"}\n', 2, "malformed 'seamcall'", id="key missing"),
        pytest.param(json.dumps(seamcall(1, 0)) + "\n", 1, "malformed 'seamcall'", id="no reset"),
    ],
)
def test_a_malformed_file_is_2_and_names_the_line(tdxhw: Cli, tmp_path: Path, text: str, line: int, said: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(text)

    code, _, err = tdxhw("replay", str(path))

    assert code == 2
    assert err.startswith(f"tdxhw: {path}:{line}: ")
    assert said in err
    assert err.count("\n") == 1


def test_a_truncated_compressed_file_is_2(tdxhw: Cli, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl.gz"
    whole = gzip.compress("".join(json.dumps(record) + "\n" for record in GOOD).encode())
    path.write_bytes(whole[:-12])

    code, _, err = tdxhw("replay", str(path))

    assert code == 2
    assert "truncated" in err


def test_a_compressed_file_that_is_none_is_2(tdxhw: Cli, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl.gz"
    path.write_text("plain text")

    code, _, err = tdxhw("replay", str(path))

    assert code == 2
    assert err.startswith(f"tdxhw: {path}:1: ")


@pytest.mark.parametrize(("version", "agreed"), [(12, 2), (11, 1)])
def test_a_recording_of_ioctls_is_played_on_the_kvm_model(
    tdxhw: Cli, tmp_path: Path, version: int, agreed: int
) -> None:
    kvm = {"scenario": "system/a", "errno": None}
    opened = {"i": 0, "fd": "host", "req": "open", "arg": {"path": "/dev/kvm", "flags": "O_RDWR"}, "ret": "kvm0"}
    asked = {"i": 1, "fd": "kvm", "obj": "kvm0", "req": "KVM_GET_API_VERSION", "nr": "0xae00", "arg": {"int": 0}}
    path = write(tmp_path / "x.jsonl", [kvm | opened, kvm | asked | {"ret": version}])

    code, out, _ = tdxhw("replay", path)

    assert out.splitlines()[-1] == f"{agreed} of 2 records agree"
    assert code == (0 if agreed == 2 else 1)
