"""`tdxhw diff` as a user calls it."""

import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unit.tdxhw.conftest import tdxhw_process as tdxhw_process

Process = Callable[..., "subprocess.CompletedProcess[str]"]
needs_dev_kvm = pytest.mark.skipif(
    not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="this machine has no /dev/kvm that may be opened"
)
UNLIKE = '''"""A suite whose sides differ: each run asks something else."""
import os
import pathlib

import pytest

pytestmark = pytest.mark.requires("kvm")


def test_asks(kvm):
    seen = pathlib.Path(__file__).with_name("seen")
    kvm.check_extension(3 if seen.exists() else 2)
    seen.touch()


def test_agrees(kvm):
    assert kvm.get_api_version() == 12
'''


def summary(done: "subprocess.CompletedProcess[str]") -> tuple[int, int]:
    """Return how many calls were compared and how many differ, from the last line."""
    found = re.fullmatch(r"(\d+) calls compared, (\d+) differences", done.stdout.splitlines()[-1])
    assert found, done.stdout + done.stderr
    return int(found[1]), int(found[2])


@needs_dev_kvm
def test_the_simulator_agrees_with_the_kernel_of_this_machine(tdxhw_process: Process) -> None:
    ordinary = ("vm", "memory", "vcpu", "cpuid_msrs", "irqchip")
    suites = ("kvm_device", *(f"ordinary_{name}" for name in ordinary))
    done = tdxhw_process("diff", "--on", "sim", "--on", "local", *suites)

    compared, differences = summary(done)
    assert (differences, done.returncode) == (0, 0), done.stdout
    assert compared > 3000


def test_a_recording_is_compared_with_later(tdxhw_process: Process, tmp_path: Path) -> None:
    path = str(tmp_path / "calls.jsonl.gz")
    made = tdxhw_process("diff", "--on", "sim:pvm", "--record", path, "kvm_device")
    assert made.returncode == 0, made.stderr
    assert re.fullmatch(r"\d+ calls of \d+ tests recorded in .*\n", made.stdout)

    done = tdxhw_process("diff", "--on", "sim", "--on", path)

    assert done.returncode == 0, done.stdout + done.stderr
    assert summary(done)[0] == int(made.stdout.split()[0])
    assert re.search(r"^B  .*calls\.jsonl\.gz \(recorded 20", done.stdout, re.MULTILINE)
    assert re.search(r"^ +kernel simulated 6\.18", done.stdout, re.MULTILINE)


def test_a_difference_is_1_and_shown_side_by_side(tdxhw_process: Process, tmp_path: Path) -> None:
    suite = tmp_path / "test_unlike.py"
    suite.write_text(UNLIKE, encoding="utf-8")

    done = tdxhw_process("diff", "--on", "sim:pvm", "--on", "sim", str(suite))

    assert done.returncode == 1, done.stdout + done.stderr
    assert summary(done)[1] == 1
    assert "unlike::test_asks, call 1" in done.stdout
    assert re.search(r"^ +arg +2 +3$", done.stdout, re.MULTILINE)


def test_json_is_one_document_and_nothing_else(tdxhw_process: Process) -> None:
    done = tdxhw_process("diff", "--on", "sim:pvm", "--on", "sim", "--json", "kvm_device", "-k", "api_version")

    document = json.loads(done.stdout)
    assert (done.returncode, document["differences"]) == (0, 0)
    assert document["compared"] > 0
    assert [entry["provenance"]["profile"] for entry in document["sides"]] == ["pvm", "pvm"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--on", "sim"), "give --on twice"),
        (("--on", "sim", "--on", "local", "--on", "sim"), "give --on twice"),
        (("--on", "nowhere", "--on", "sim:pvm", "kvm_device"), "nowhere: no such file, and neither local, sim nor"),
        (("--on", "sim:no-such", "--on", "sim:pvm", "kvm_device"), "no profile 'no-such'"),
        (("--on", "sim:pvm", "--record", "/no/such/dir/x", "kvm_device", "-k", "api_version"), "cannot write /no/such"),
        (("--on", "sim:pvm", "--on", "sim", "no_such_suite"), "no suite 'no_such_suite'"),
        (("--on", "sim:pvm", "--on", "sim", "kvm_device", "-k", "no_such_test"), "no test matches"),
    ],
)
def test_what_cannot_be_done_is_2_in_one_line(tdxhw_process: Process, arguments: tuple[str, ...], message: str) -> None:
    done = tdxhw_process("diff", *arguments)

    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last.startswith("tdxhw: ")
    assert message in last
    assert "Traceback" not in done.stderr


def test_a_malformed_recording_is_2_with_its_line(tdxhw_process: Process, tmp_path: Path) -> None:
    path = tmp_path / "broken.jsonl"
    path.write_text("nonsense\n", encoding="utf-8")

    done = tdxhw_process("diff", "--on", "sim:pvm", "--on", str(path), "kvm_device")

    assert done.returncode == 2
    assert f"{path}:1: not a JSON object" in done.stderr
