"""``tdxhw lab``, as a user sees it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tdxhw.cli import main

Output = pytest.CaptureFixture[str]


def run(*arguments: str) -> int:
    try:
        return main(["lab", *arguments])
    except SystemExit as error:
        return int(error.code or 0)


def test_a_host_is_written_checked_listed_and_shown(tmp_path: Path, capsys: Output) -> None:
    labs = str(tmp_path / "labs")
    assert run("init", "spr-01", "--ssh", "ssh://tdx@[fd00::1]:2222", "--labs", labs) == 0
    assert run("check", "--labs", labs) == 0
    assert "1 host, all files right" in capsys.readouterr().out

    assert run("list", "--labs", labs) == 0
    assert "spr-01  ssh://tdx@[fd00::1]:2222  kvm" in capsys.readouterr().out

    assert run("show", "spr-01", "--labs", labs) == 0
    assert "limits     run_timeout_s=3600, test_timeout_s=120" in capsys.readouterr().out

    assert run("list", "--json", "--labs", labs) == 0
    assert [host["name"] for host in json.loads(capsys.readouterr().out)] == ["spr-01"]
    assert run("show", "spr-01", "--json", "--labs", labs) == 0
    assert json.loads(capsys.readouterr().out)["promises"] == ["kvm"]


def test_the_commented_lines_of_a_new_file_are_right_too(tmp_path: Path) -> None:
    assert run("init", "spr-01", "--labs", str(tmp_path)) == 0
    path = tmp_path / "spr-01.yaml"
    path.write_text(path.read_text().replace("\n  # ", "\n  "))
    assert run("check", "--labs", str(tmp_path)) == 0


@pytest.mark.parametrize("name", ["123", "1e5", "no", "null", "0x10"])
def test_init_writes_a_name_that_yaml_would_take_for_something_else(tmp_path: Path, capsys: Output, name: str) -> None:
    assert run("init", name, "--labs", str(tmp_path)) == 0
    assert run("show", name, "--labs", str(tmp_path)) == 0
    assert f"name       {name}\n" in capsys.readouterr().out


def test_init_overwrites_nothing(tmp_path: Path, capsys: Output) -> None:
    run("init", "spr-01", "--labs", str(tmp_path))
    before = (tmp_path / "spr-01.yaml").read_text()

    assert run("init", "spr-01", "--labs", str(tmp_path)) == 2
    assert "already at" in capsys.readouterr().err
    assert (tmp_path / "spr-01.yaml").read_text() == before


@pytest.mark.parametrize("arguments", [("../evil",), ("all",), ("-x",), ("spr", "--ssh", "-oProxyCommand=x")])
def test_init_refuses_what_no_file_could_hold_and_leaves_no_file(
    tmp_path: Path, capsys: Output, arguments: tuple[str, ...]
) -> None:
    labs = tmp_path / "labs"
    assert run("init", "--labs", str(labs), *arguments) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("command", [("list",), ("show", "spr-01"), ("check",), ("init", "spr-02")])
def test_a_broken_file_is_exit_code_2_with_file_and_line(
    tmp_path: Path, capsys: Output, command: tuple[str, ...]
) -> None:
    (tmp_path / "spr-01.yaml").write_text("host:\n  name: spr-01\n  ssh: spr-01\n  adress: x\n")

    assert run(*command, "--labs", str(tmp_path)) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"tdxhw: {tmp_path}/spr-01.yaml:4: unknown key 'adress'")
    assert error.count("\n") == 1


def test_a_missing_folder_is_exit_code_2(tmp_path: Path, capsys: Output) -> None:
    assert run("list", "--labs", str(tmp_path / "nowhere")) == 2
    assert "no such folder" in capsys.readouterr().err


def test_ansible_finds_the_hosts_of_the_checkout_from_its_own_folder() -> None:
    folder = Path(__file__).parents[3] / "ansible"
    environment = {"PATH": f"/usr/bin:/bin:{Path(sys.executable).parent}"}

    done = subprocess.run(["inventory/labs"], cwd=folder, env=environment, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    assert "spr-01" in json.loads(done.stdout)["_meta"]["hostvars"]
