"""The command line as a user sees it: exit codes, one-line errors, speed."""

import errno
import json
import os
import resource
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import click
import pytest

import tdxhw as package
from tdxhw.cli import SUBCOMMANDS, cli
from tests.unit.tdxhw.conftest import command
from uapi_ctypes.errors import KvmError

Cli = Callable[..., tuple[int, str, str]]
ROOT = Path(__file__).parents[3]


def test_help_names_every_subcommand(tdxhw: Cli) -> None:
    code, out, err = tdxhw("--help")

    assert code == 0
    assert not err
    assert [name for name in SUBCOMMANDS if f"  {name} " not in out] == []


@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_every_subcommand_can_be_imported_and_explains_itself(tdxhw: Cli, name: str) -> None:
    code, out, _ = tdxhw(name, "--help")

    assert code == 0
    assert f"tdxhw {name}" in out


@pytest.mark.parametrize("group", ["lab", "history"])
def test_no_line_of_a_list_of_subcommands_is_cut_short(tdxhw: Cli, group: str) -> None:
    _, out, _ = tdxhw(group, "--help")

    listed = out.partition("Commands:\n")[2].splitlines()
    assert listed
    assert [line for line in listed if line.endswith("...")] == []


def test_no_subcommand_shows_the_help_and_is_2(tdxhw: Cli) -> None:
    code, out, err = tdxhw()

    assert code == 2
    assert not out
    assert "Commands:" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        pytest.param(["frobnicate"], "no command 'frobnicate'; there are: abi, ", id="unknown command"),
        pytest.param(["replya"], "no command 'replya'; did you mean 'replay'?", id="misspelt command"),
        pytest.param(["--frob"], "No such option '--frob'", id="unknown option of tdxhw itself"),
        pytest.param(["run", "--frob"], "No such option", id="unknown option"),
        pytest.param(["run", "livecycle"], "no suite 'livecycle'", id="unknown suite"),
        pytest.param(["run", "kvm_devise"], "did you mean 'kvm_device'?", id="misspelt suite"),
        pytest.param(["run", "./nowhere.py"], "no file ./nowhere.py", id="a suite of one's own that is missing"),
        pytest.param(["run", "--on", "mars"], "there are: auto, lab:NAME, local, sim", id="unknown backend"),
        pytest.param(["run", "--on", "lab:x", "--profile", "v17"], "add --on sim", id="a profile on a lab host"),
        pytest.param(["run", "--on", "lab:x", "--done", "x"], "--done is for a run on one host", id="done in a lab"),
        pytest.param(["run", "--on", "lab:x", "--report-log", "/dev/null/x"], "cannot write /dev/null/x", id="lab log"),
        pytest.param(["diff", "--on", "sim:7.3", "--on", "sim:5.4"], "no profile '5.4'", id="no second side"),
        pytest.param(["run", "--on", "sim", "--profile", "5.4"], "no profile '5.4'", id="unknown profile"),
        pytest.param(["run", "--on", "local", "--profile", "v17"], "add --on sim", id="a profile on real hardware"),
        pytest.param(["run", "--time-limit", "0"], "--time-limit", id="no time at all"),
        pytest.param(["run", "--junit", "/dev/null/x.xml"], "cannot write /dev/null/x.xml", id="junit"),
        pytest.param(["decode"], "Missing argument 'STATUS...'", id="decode nothing"),
        pytest.param(["decode", "0xzz"], "'0xzz' is no 64-bit status", id="decode garbage"),
        pytest.param(["decode", "-1"], "No such option", id="decode a negative number"),
        pytest.param(["decode", hex(1 << 64)], "is no 64-bit status", id="decode too large"),
        pytest.param(["replay", "/nonexistent.jsonl"], "/nonexistent.jsonl: No such file", id="replay"),
        pytest.param(["measure", "/dev/zero"], "/dev/zero: larger than any firmware image", id="measure no end"),
        pytest.param(["measure", "/nonexistent.fd"], "/nonexistent.fd: No such file", id="measure"),
    ],
)
def test_a_user_s_mistake_is_one_line_and_2(tdxhw: Cli, arguments: list[str], said: str) -> None:
    code, out, err = tdxhw(*arguments)

    assert code == 2
    assert not out
    assert err.startswith("tdxhw: ")
    assert err.count("\n") == 1, err
    assert said in err


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--list"], ["decode", "0"], ["doctor"], ["lab", "--help"]])
def test_a_disk_that_is_full_is_one_line_and_2(arguments: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command(*arguments), stdout=full, stderr=subprocess.PIPE, text=True, check=False)

    assert (done.returncode, done.stderr) == (2, "tdxhw: the output: cannot write it: No space left on device\n")


@pytest.mark.parametrize("arguments", [["run", "--list"], ["decode", "0"], ["doctor"]])
def test_a_reader_that_is_gone_is_2_and_no_verdict(arguments: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(command(*arguments), stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    finally:
        os.close(writer)

    assert (done.returncode, done.stderr) == (2, "")


def test_a_mistake_of_ours_shows_where_and_is_2_because_1_is_a_verdict(
    tdxhw: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    @click.command()
    def broken() -> None:
        raise KvmError("KVM_RUN", errno.EIO)

    monkeypatch.setattr("tdxhw.commands.decode.decode", broken)

    code, _, err = tdxhw("decode")

    assert code == 2
    assert "Traceback" in err
    assert err.splitlines()[-1] == "tdxhw: internal error: KvmError: KVM_RUN: EIO: please report this"


def test_a_locale_without_arrows_loses_no_result(
    tdxhw_process: Callable[..., "subprocess.CompletedProcess[str]"],
) -> None:
    done = tdxhw_process("doctor", PYTHONIOENCODING="ascii")

    assert done.returncode in (0, 1, 2)
    assert "Traceback" not in done.stderr
    assert "this host: " in done.stdout


def test_the_version_is_the_one_of_the_package(tdxhw: Cli) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    assert package.__version__ == project["version"]
    assert tdxhw("--version")[1] == f"tdxhw, version {project['version']}\n"


def test_decode_names_the_operand(tdxhw: Cli) -> None:
    code, out, _ = tdxhw("decode", "0xc000010000000045")

    assert code == 0
    assert out.splitlines()[0] == "0xc000010000000045  OPERAND_INVALID(CPUID_CONFIG)"


def test_decode_takes_several_and_decimal(tdxhw: Cli) -> None:
    _, out, _ = tdxhw("decode", "0x8000020000000092", str(0xC000_0609_0000_0000))

    heads = [line for line in out.splitlines() if not line.startswith(" ")]
    assert heads == ["0x8000020000000092  OPERAND_BUSY(SEPT_TREE)", "0xc000060900000000  NO_VCPUS"]


def test_decode_prints_json(tdxhw: Cli) -> None:
    _, out, _ = tdxhw("decode", "--json", "0xc000010000000045")

    (reading,) = json.loads(out)
    assert (reading["value"], reading["text"]) == ("0xc000010000000045", "OPERAND_INVALID(CPUID_CONFIG)")


def test_decode_shows_an_unknown_status_in_hex(tdxhw: Cli) -> None:
    code, out, _ = tdxhw("decode", "0xdeadbeef00000000")

    assert code == 0
    assert "unknown" in out
    assert "0xdeadbeef00000000" in out


def test_decode_starts_fast() -> None:
    """It imports neither pytest nor rich nor the simulator. CPU time, best of three, against a bare interpreter's."""

    def start(*arguments: str) -> float:
        begun = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
        ended = resource.getrusage(resource.RUSAGE_CHILDREN)
        return ended.ru_utime + ended.ru_stime - begun.ru_utime - begun.ru_stime

    script = "import sys; from tdxhw.cli import main; sys.exit(main())"
    ours = min(start("-c", script, "decode", "0xc000010000000045") for _ in range(3))
    bare = min(start("-c", "pass") for _ in range(3))

    assert ours - bare < 0.2


def test_decode_imports_nothing_heavy() -> None:
    script = (
        "import sys; from tdxhw.cli import main; main(['decode', '1']);"
        "print([m for m in ('pytest', 'rich', 'unicorn', 'yaml', 'sim_backend') if m in sys.modules])"
    )

    out = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout

    assert out.splitlines()[-1] == "[]"


def test_subcommands_are_listed_in_the_order_of_the_table() -> None:
    assert list(cli.list_commands(None)) == list(SUBCOMMANDS)  # type: ignore[arg-type]
