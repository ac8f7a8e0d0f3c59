"""The workflows and action.yml as files: valid, pinned, and safe against what others can write."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.github.workflow_steps import ACTION, WORKFLOWS, all_steps, documents, run_steps

CHECK = str(Path(sys.executable).parent / "check-jsonschema")
STEPS = [
    (f"{file}/{job}", step)
    for file, document in documents().items()
    for job, steps in all_steps(document).items()
    for step in steps
]


@pytest.mark.parametrize(
    ("schema", "files"),
    [
        ("vendor.github-workflows", WORKFLOWS),
        ("custom.github-workflows-require-timeout", WORKFLOWS),
        ("vendor.github-actions", [ACTION]),
    ],
    ids=["workflow", "workflow-has-timeouts", "action"],
)
def test_follows_the_schema(schema: str, files: list[Path]) -> None:
    done = subprocess.run(
        [CHECK, "--builtin-schema", schema, *map(str, files)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_schema_check_can_fail(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.yml"
    wrong.write_text("on: push\njobs: {a: {runs-on: x, steps: [{run: true, uses: y}]}}\n")
    done = subprocess.run([CHECK, "--builtin-schema", "vendor.github-workflows", str(wrong)], capture_output=True)
    assert done.returncode == 1


@pytest.mark.parametrize(("place", "step"), [(place, step) for place, step in STEPS if "uses" in step])
def test_others_actions_are_pinned_to_a_commit(place: str, step: dict[str, object]) -> None:
    assert re.fullmatch(r"\./|[\w.-]+/[\w./-]+@[0-9a-f]{40}", str(step["uses"])), place


def test_each_pin_says_its_version_and_one_action_has_one_pin() -> None:
    pins: dict[str, set[str]] = {}
    for path in (*WORKFLOWS, ACTION):
        for line in re.findall(r"uses: (\S+@.*)", path.read_text(encoding="utf-8")):
            assert re.search(r" # v\d+\.\d+\.\d+$", line), line
            pins.setdefault(line.split("@")[0], set()).add(line)
    assert {action: len(lines) for action, lines in pins.items()} == dict.fromkeys(pins, 1)


@pytest.mark.parametrize("place", run_steps())
def test_no_expression_is_pasted_into_a_script(place: str) -> None:
    """It would be code: a title of a pull request could run commands. Values come through ``env:``."""
    assert "${{" not in run_steps()[place].run


@pytest.mark.parametrize("file", [path.name for path in WORKFLOWS])
def test_a_workflow_may_only_read(file: str) -> None:
    document = documents()[file]
    assert document["permissions"] == {"contents": "read"}
    assert "pull_request_target" not in document["on"], "it would run others' code with our rights"
    assert all("permissions" not in job for job in document["jobs"].values())


def test_hardware_is_used_by_one_run_at_a_time_and_only_when_somebody_says_so() -> None:
    document = documents()["hardware.yml"]
    assert set(document["on"]) == {"workflow_dispatch", "pull_request"}
    assert document["on"]["pull_request"] == {"types": ["labeled"]}
    assert document["jobs"]["hosts"]["if"].endswith("github.event.label.name == 'hardware'")
    job = document["jobs"]["suites"]
    assert job["concurrency"] == {"group": "tdx-host-${{ matrix.host }}", "cancel-in-progress": "false"}
    assert job["needs"] == "hosts"


def test_every_input_and_step_that_is_named_exists() -> None:
    """GitHub takes an unknown name for an empty text, and says nothing."""
    action = documents()["action.yml"]
    for file, document in documents().items():
        if file == "action.yml":
            inputs = set(action["inputs"])
        else:
            inputs = set((document["on"].get("workflow_dispatch") or {}).get("inputs", {}))
        text = str(document)
        assert set(re.findall(r"\binputs\.([\w-]+)", text)) <= inputs, file
        ids = {step["id"] for steps in all_steps(document).values() for step in steps if "id" in step}
        assert set(re.findall(r"\bsteps\.([\w-]+)\.", text)) <= ids, file
    for place, step in STEPS:
        if step.get("uses") == "./":
            assert set(step["with"]) <= set(action["inputs"]), place


def test_jobs_that_use_this_repository_s_action_check_it_out_before() -> None:
    for file, document in documents().items():
        for job, steps in all_steps(document).items():
            uses = [str(step.get("uses", "")).split("@")[0] for step in steps]
            if "./" in uses:
                assert "actions/checkout" in uses[: uses.index("./")], f"{file}/{job}"
