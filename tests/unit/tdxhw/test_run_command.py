"""`tdxhw run` as a user sees it, in a process of its own, on the real /dev/kvm where there is one."""

import json
import os
import re
import signal
import subprocess
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unit.tdxhw.conftest import command

Process = Callable[..., "subprocess.CompletedProcess[str]"]
Tdxhw = Callable[..., tuple[int, str, str]]
needs_dev_kvm = pytest.mark.skipif(
    not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="this machine has no /dev/kvm that may be opened"
)
backends = pytest.mark.parametrize(
    "backend", [pytest.param("local", marks=needs_dev_kvm), pytest.param("sim", marks=pytest.mark.xdist_group("sim"))]
)
LOOPING = '''"""A suite of one's own."""
import pytest

pytestmark = pytest.mark.requires("kvm")


def test_quick(kvm):
    assert kvm.get_api_version() == 12


def test_endless(ordinary_vm, vmm):
    vm = ordinary_vm()
    vm.add_slot(0, 0x10000)
    vm.start_real_mode(vm.create_vcpu(), bytes.fromhex("ebfe"))
    vmm(vm).run(vm.vcpus[0], limit_s=60)
'''


@backends
def test_all_good_is_0_with_one_line_a_suite(tdxhw_process: Process, backend: str) -> None:
    done = tdxhw_process("run", "--on", backend, "kvm_device")

    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^kvm_device +\d+ +0 +0 +0 ", done.stdout, re.MULTILINE)
    assert f"tdxhw run on {backend} (asked for" in done.stdout


@backends
def test_output_in_a_pipe_has_no_escape_codes(tdxhw_process: Process, backend: str) -> None:
    done = tdxhw_process("run", "--on", backend, "kvm_device")

    assert "\x1b" not in done.stdout + done.stderr
    assert "\r" not in done.stdout


@backends
def test_json_is_one_document_and_nothing_else(tdxhw_process: Process, backend: str) -> None:
    done = tdxhw_process("run", "--on", backend, "--json", "kvm_device")

    document = json.loads(done.stdout)
    assert document["backend"] == backend
    assert document["exit_code"] == done.returncode == 0
    assert document["summary"]["passed"] == len(document["results"]) > 0
    assert all(result["provenance"]["kernel"] for result in document["results"])


@needs_dev_kvm
def test_a_failed_test_is_1_and_told_in_one_line_first(tdxhw_process: Process, tmp_path: Path) -> None:
    suite = tmp_path / "test_mine.py"
    suite.write_text("def test_wrong(kvm):\n    kvm.create_vm(31)\n")

    done = tdxhw_process("run", "--on", "local", str(suite))

    assert done.returncode == 1
    failure = done.stdout[done.stdout.index("FAILED mine::test_wrong[local]") :].splitlines()
    assert failure[1] == "  KVM_CREATE_VM: EINVAL"
    assert "kvm.create_vm(31)" in done.stdout


@needs_dev_kvm
def test_a_keyword_that_matches_nothing_is_2(tdxhw_process: Process) -> None:
    done = tdxhw_process("run", "--on", "local", "-k", "zzz", "kvm_device")

    assert done.returncode == 2
    assert done.stderr == "tdxhw: no test matches; see tdxhw run --list\n"


@needs_dev_kvm
def test_an_unkept_promise_is_2(tdxhw_process: Process) -> None:
    done = tdxhw_process("run", "--on", "local", "--promise", "hkids>=30000", "kvm_device")

    assert done.returncode == 2
    assert re.fullmatch(r"tdxhw: host local was promised to offer 'hkids>=30000', but .+\n", done.stderr)


@needs_dev_kvm
def test_it_works_from_any_directory_whatever_pytest_is_told_there(tdxhw_process: Process, tmp_path: Path) -> None:
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = --no-such-option\n")
    (tmp_path / "conftest.py").write_text("raise SystemExit('read by mistake')\n")

    done = tdxhw_process("run", "--on", "local", "kvm_device", cwd=tmp_path)

    assert done.returncode == 0, done.stdout + done.stderr


def test_the_list_names_every_suite_and_what_it_is_about(tdxhw_process: Process) -> None:
    done = tdxhw_process("run", "--list")

    lines = done.stdout.splitlines()
    assert done.returncode == 0
    assert "kvm_device           /dev/kvm itself: version, capabilities, error paths." in lines
    assert all(re.fullmatch(r"\w+ +\S.+", line) for line in lines)


@backends
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "cancelled by CI"])
def test_interrupted_is_130_with_results_so_far_and_no_process_left(
    tmp_path: Path, backend: str, number: signal.Signals
) -> None:
    suite, junit, log = tmp_path / "test_mine.py", tmp_path / "j.xml", tmp_path / "log.jsonl"
    suite.write_text(LOOPING)
    profile = ["--profile", "mainline"] if backend == "sim" else []
    arguments = ["run", "--on", backend, *profile, "--json", "--junit", str(junit), "--report-log", str(log)]
    with subprocess.Popen(
        command(*arguments, str(suite)), stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        wait_for(lambda: log.exists() and "test_endless" in log.read_text())
        time.sleep(0.3)  # in KVM_RUN by now
        begun = time.monotonic()
        process.send_signal(number)
        out, _ = process.communicate(timeout=20)
        took = time.monotonic() - begun

    document = json.loads(out)
    host = "mainline" if backend == "sim" else "local"
    assert process.returncode == 130
    assert took < 15
    assert document["interrupted"]
    assert [(r["test"], r["outcome"]) for r in document["results"]] == [("test_quick", "passed")]
    assert f"test_quick[{host}]" in [case.get("name") for case in ET.parse(junit).iter("testcase")]
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "cancelled by CI"])
def test_interrupted_while_hosts_start_is_130_and_the_files_are_empty_but_readable(
    tdxhw: Tdxhw, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    junit, log = tmp_path / "j.xml", tmp_path / "log.jsonl"
    junit.write_text("results of an earlier run")
    log.write_text("results of an earlier run")
    monkeypatch.setattr("tdxhw.runner.select", lambda *_: signal.raise_signal(number))

    code, out, _ = tdxhw("run", "--json", "--junit", str(junit), "--report-log", str(log), "kvm_device")

    document = json.loads(out)
    assert code == document["exit_code"] == 130
    assert document["interrupted"]
    assert list(ET.parse(junit).iter("testcase")) == []
    assert log.read_text() == ""


@needs_dev_kvm
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        pytest.param(["-k", "((", "kvm_device"], "-k: ((: at column 3", id="a keyword that is no expression"),
        pytest.param(["/proc/cpuinfo"], "/proc/cpuinfo is no suite; give a Python file", id="a file that is no suite"),
    ],
)
def test_what_pytest_cannot_use_is_one_line_and_2(tdxhw_process: Process, arguments: list[str], said: str) -> None:
    done = tdxhw_process("run", "--on", "local", *arguments)

    assert done.returncode == 2
    assert done.stderr.startswith(f"tdxhw: {said}")
    assert done.stderr.count("\n") == 1


def wait_for(condition: Callable[[], bool], limit_s: float = 30) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "gave up waiting"
        time.sleep(0.02)


@backends
def test_a_guest_that_never_ends_fails_at_the_time_limit(tdxhw_process: Process, tmp_path: Path, backend: str) -> None:
    suite = tmp_path / "test_mine.py"
    suite.write_text(LOOPING)
    profile = ["--profile", "mainline"] if backend == "sim" else []

    done = tdxhw_process("run", "--on", backend, *profile, "--time-limit", "1", str(suite))

    assert done.returncode == 1
    assert "the test was still running after its time limit of 1 s" in done.stdout
    assert re.search(r"^mine +1 +1 ", done.stdout, re.MULTILINE)
