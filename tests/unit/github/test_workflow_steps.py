"""Every ``run:`` step, executed by bash as GitHub does, with the files and variables that GitHub gives it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from tdxhw.report.read import read
from tests.unit.github.workflow_steps import ROOT, Runner, run_steps

STEPS = run_steps()
EXECUTED_HERE = {
    "action.yml/action/Install tdxhw beside the caller's Python",
    "action.yml/action/Run",
    "action.yml/action/Report",
    "ci.yml/gate/The gate",
    "ci.yml/kvm/Is there a /dev/kvm?",
    "ci.yml/kvm/Compare with the simulator",
    "ci.yml/lab/What a bare Debian lacks",
    "ci.yml/lab/Sshds, Ansible, kernels and virtual machines",
    "hardware.yml/hosts/Which hosts?",
}
RUN = STEPS["action.yml/action/Run"]
REPORT = STEPS["action.yml/action/Report"]
UNREACHABLE = "host: {name: spr-01, ssh: 'ssh://root@127.0.0.1:1', promises: [tdx]}\n"


def test_every_step_is_executed_below() -> None:
    assert set(STEPS) == EXECUTED_HERE


@pytest.fixture
def runner(tmp_path: Path) -> Runner:
    return Runner(tmp_path)


def inputs(runner: Runner, **given: str) -> dict[str, str]:
    defaults = {"on": "sim", "suites": "", "profiles": "", "labs": "labs", "fallback": "false", "artifact": "tdxhw"}
    return {f"inputs.{key}": value for key, value in (defaults | given).items()} | {"runner.temp": str(runner.temp)}


# ---- the action ----


def test_the_action_runs_the_simulator_and_reports(runner: Runner) -> None:
    done = runner.execute(RUN, inputs(runner, suites="kvm_device", profiles="mainline"))
    assert done.returncode == 0, done.stderr
    assert runner.outputs["ran-on"] == "sim"
    assert runner.outputs["fell-back"] == "false", "the simulator was asked for"
    assert "::warning" not in done.stdout

    results = Path(runner.outputs["results"])
    reported = runner.execute(REPORT, {"steps.run.outputs.results": str(results)})
    assert reported.returncode == 0, reported.stderr
    run = read(results / "results.jsonl").results
    assert {result.provenance["profile"] for result in run} == {"mainline"}
    assert len(list(ET.parse(results / "junit.xml").getroot().iter("testcase"))) == len(run) > 5
    assert "<table" in (results / "report.html").read_text(encoding="utf-8")
    assert runner.summary.startswith("## tdxhw: ✅")
    assert "| simulated |" in runner.summary


def test_a_failed_test_fails_the_step_and_is_annotated(runner: Runner) -> None:
    suite = runner.workspace / "test_mine.py"
    suite.write_text("def test_truth() -> None:\n    assert 1 + 1 == 3\n")
    done = runner.execute(RUN, inputs(runner, suites=f"{suite}"))
    assert done.returncode == 1

    reported = runner.execute(REPORT, {"steps.run.outputs.results": runner.outputs["results"]})
    assert reported.returncode == 0, "the step before failed; this one did its work"
    assert "::error file=" in reported.stdout
    assert "❌" in runner.summary


def test_a_suite_that_does_not_exist_fails_the_step_with_2(runner: Runner) -> None:
    done = runner.execute(RUN, inputs(runner, suites="lifecicle"))
    assert done.returncode == 2
    assert "no suite 'lifecicle'" in done.stderr
    assert runner.execute(REPORT, {"steps.run.outputs.results": runner.outputs["results"]}).returncode == 0


def test_a_lab_host_that_does_not_answer_is_simulated_and_marked_so(runner: Runner) -> None:
    (runner.workspace / "labs").mkdir()
    (runner.workspace / "labs" / "a.yaml").write_text(UNREACHABLE)
    done = runner.execute(RUN, inputs(runner, on="lab:spr-01", suites="kvm_device", fallback="true"))
    assert done.returncode == 0, done.stderr
    assert (runner.outputs["ran-on"], runner.outputs["fell-back"]) == ("sim", "true")
    assert "::warning title=Simulated, not hardware::Asked for lab:spr-01: " in done.stdout
    assert "Connection refused" in done.stdout
    assert "ran on the **simulator**" in runner.summary


def test_without_fallback_a_lab_host_that_does_not_answer_fails(runner: Runner) -> None:
    (runner.workspace / "labs").mkdir()
    (runner.workspace / "labs" / "a.yaml").write_text(UNREACHABLE)
    done = runner.execute(RUN, inputs(runner, on="lab:spr-01", suites="kvm_device"))
    assert done.returncode == 2
    assert "Connection refused" in done.stderr
    assert runner.outputs["fell-back"] == "false"


@pytest.mark.parametrize(
    ("on", "lab_file", "message"),
    [("lab:spr-02", UNREACHABLE, "no host 'spr-02'"), ("lab:spr-01", "host: {name: spr-01}\n", "a.yaml:1")],
    ids=["unknown-host", "broken-file"],
)
def test_a_mistake_in_the_lab_files_is_never_covered_up(runner: Runner, on: str, lab_file: str, message: str) -> None:
    (runner.workspace / "labs").mkdir()
    (runner.workspace / "labs" / "a.yaml").write_text(lab_file)
    done = runner.execute(RUN, inputs(runner, on=on, suites="kvm_device", fallback="true"))
    assert done.returncode == 2
    assert message in done.stderr
    assert "ran-on" not in runner.outputs


def test_a_machine_without_tdx_is_simulated_and_marked_so(runner: Runner) -> None:
    done = runner.execute(RUN, inputs(runner, on="local", suites="kvm_device", fallback="true"))
    assert done.returncode == 0, done.stderr
    has_tdx = runner.outputs["ran-on"] != "sim"
    assert runner.outputs["fell-back"] == ("false" if has_tdx else "true")
    assert ("::warning" in done.stdout) is not has_tdx


def test_the_action_installs_into_a_place_of_its_own(runner: Runner) -> None:
    """Everything that it needs is here already, so the install itself is real but asks nobody for anything."""
    runner.check_out()
    venv = runner.temp / "tdxhw"
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    site = next((venv / "lib").iterdir()) / "site-packages"
    packages = next(path for path in map(Path, sys.path) if path.name == "site-packages")
    (site / "here.pth").write_text(f"{packages}\n", encoding="utf-8")

    done = runner.execute(
        STEPS["action.yml/action/Install tdxhw beside the caller's Python"],
        {"github.action_path": str(runner.workspace)},
        PYTHONPATH=str(packages),  # the build backend is there, too
        PIP_NO_INDEX="1",
        PIP_NO_BUILD_ISOLATION="0",  # this is how pip spells "none"
    )
    assert done.returncode == 0, done.stderr
    assert runner.added_path == str(venv / "bin")
    command = [f"{runner.added_path}/tdxhw", "run", "--list"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True, cwd=runner.temp).stdout
    assert "kvm_device" in listed
    where = "import tdxhw; print(tdxhw.__file__)"
    python = [f"{runner.added_path}/python", "-c", where]
    imported = subprocess.run(python, capture_output=True, text=True, check=True, cwd=runner.temp).stdout
    assert imported.startswith(str(site)), "the installed one, not the one that runs this test"


# ---- the workflows ----


def fake_make(runner: Runner) -> Path:
    """Let `make` note its targets: the real ones run this very test."""
    log = runner.temp / "made"
    runner.tool("make", f'echo "$@" >>{log}')
    return log


def test_the_gate_is_make_test(runner: Runner) -> None:
    runner.check_out()
    made = fake_make(runner)
    assert runner.execute(STEPS["ci.yml/gate/The gate"]).returncode == 0
    assert made.read_text() == "test\n"


def test_the_lab_job_is_make_test_lab(runner: Runner) -> None:
    made = fake_make(runner)
    assert runner.execute(STEPS["ci.yml/lab/Sshds, Ansible, kernels and virtual machines"]).returncode == 0
    assert made.read_text() == "test-lab\n"


def test_the_lab_job_installs_what_the_checkout_and_make_need(runner: Runner) -> None:
    asked = runner.temp / "asked"
    runner.tool("apt-get", f'echo "$@" >>{asked}')
    assert runner.execute(STEPS["ci.yml/lab/What a bare Debian lacks"]).returncode == 0
    update, install = asked.read_text().splitlines()
    assert update.startswith("update")
    assert {"git", "make", "python3", "python3-venv"} <= set(install.split())


@pytest.mark.parametrize("target", ["setup", "test", "test-lab"])
def test_the_targets_that_the_workflows_make_exist(target: str) -> None:
    make = shutil.which("make")
    assert make is not None
    done = subprocess.run([make, "-n", "-C", str(ROOT), target], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_runner_says_whether_it_has_kvm(runner: Runner) -> None:
    opened = runner.temp / "opened"
    runner.tool("sudo", f'echo "$@" >>{opened}')  # the machine's own /dev/kvm stays as it is
    done = runner.execute(STEPS["ci.yml/kvm/Is there a /dev/kvm?"])
    assert done.returncode == 0
    if Path("/dev/kvm").is_char_device():
        assert runner.outputs == {"present": "true"}
        assert opened.read_text() == "chmod a+rw /dev/kvm\n"
    else:
        assert runner.outputs == {"present": "false"}
        assert "::notice title=No /dev/kvm::" in done.stdout


def test_the_differential_tests_are_where_the_workflow_looks(runner: Runner) -> None:
    runner.check_out()
    (runner.workspace / "tests").symlink_to(ROOT / "tests")
    made = fake_make(runner)
    done = runner.execute(STEPS["ci.yml/kvm/Compare with the simulator"], PYTEST_ADDOPTS="--collect-only -q")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "test_real_kvm.py" in done.stdout
    assert made.read_text() == "setup\n"


def test_the_hosts_of_the_lab_become_the_matrix(runner: Runner) -> None:
    fake_make(runner)
    runner.check_out()
    labs = runner.workspace / "labs"
    (labs / "more.yaml").write_text("hosts: [{name: a, ssh: a, labels: [x]}, {name: b, ssh: b, labels: [x]}]\n")
    step = STEPS["hardware.yml/hosts/Which hosts?"]
    for expression, names in {"label=x": ["a", "b"], "b": ["b"]}.items():
        done = runner.execute(step, {"inputs.hosts || 'all'": expression})
        assert done.returncode == 0, done.stderr
        assert json.loads(runner.outputs["hosts"]) == names

    assert runner.execute(step, {"inputs.hosts || 'all'": "c; rm -rf ."}).returncode == 2
