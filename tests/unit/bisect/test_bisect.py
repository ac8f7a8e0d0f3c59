"""Bisections of a real git repository: the right commit is found, and the tree is as it was, whatever happens."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tdxhw.bisect.plan import Plan
from tdxhw.bisect.session import Found, bisect
from tdxhw.bisect.step import run_step, steps
from tests.unit.bisect.kernel_tree import BUILD, KernelTree, make_tree


def states_around(culprit: int, count: int = 12, **others: str) -> list[str]:
    states = ["good" if number < culprit else "bad" for number in range(count)]
    for name, state in others.items():
        states[int(name.removeprefix("n"))] = state
    return states


def bisected(tree: KernelTree, plan: Plan) -> Found:
    """Bisect, and see to it that nothing is left of it in the tree."""
    (tree.tree / "notes.txt").write_text("mine")
    found = bisect(plan)
    assert tree.git("symbolic-ref", "HEAD") == "refs/heads/next"
    assert tree.git("rev-parse", "HEAD") == tree.commits[-1]
    assert tree.git("status", "--porcelain") == "?? notes.txt"
    assert not (tree.tree / ".git" / "BISECT_LOG").exists()
    assert found.not_reset == ""
    return found


@pytest.mark.parametrize("culprit", [1, 5, 11])
def test_the_first_bad_commit_is_found(tmp_path: Path, culprit: int) -> None:
    tree = make_tree(tmp_path, states_around(culprit))
    found = bisected(tree, tree.plan())
    assert found.commits == ((tree.commits[culprit], f"kvm/tdx: change {culprit}"),)
    assert (found.interrupted, found.problem) == (False, "")
    assert 2 <= len(found.steps) <= 4
    assert {step.outcome for step in found.steps} <= {"good", "bad"}
    assert all(step.line for step in found.steps)


def test_a_bad_commit_right_after_the_good_one_is_the_one(tmp_path: Path) -> None:
    tree = make_tree(tmp_path, ["good", "bad"])
    found = bisected(tree, tree.plan())
    assert found.commits == ((tree.commits[1], "kvm/tdx: change 1"),)
    assert (found.steps, found.problem) == ((), ""), "there is nothing to find out"


def branched_off(tree: KernelTree, state: str) -> KernelTree:
    """Have the good end on a branch of its own, from the second commit on."""
    tree.git("checkout", "--quiet", "-b", "side", tree.commits[1])
    (tree.tree / "state").write_text(state)
    (tree.tree / "number").write_text("side")
    tree.git("commit", "--quiet", "--all", "--message", "on the side")
    good = tree.git("rev-parse", "HEAD")
    tree.git("checkout", "--quiet", "next")
    return replace(tree, commits=(good, *tree.commits[1:]))


def test_a_good_end_on_another_branch_will_do(tmp_path: Path) -> None:
    tree = branched_off(make_tree(tmp_path, states_around(4, 7)), "good")
    assert bisected(tree, tree.plan()).commits == ((tree.commits[4], "kvm/tdx: change 4"),)


def test_a_good_end_that_is_only_good_because_of_a_fix_of_its_own_is_told(tmp_path: Path) -> None:
    tree = branched_off(make_tree(tmp_path, ["good", "bad", "bad", "bad"]), "good")
    found = bisected(tree, tree.plan())
    assert found.commits == ()
    assert found.problem.startswith(f"{tree.commits[1]}, where --good and --bad branched off, is bad, too")


def test_a_culprit_behind_a_merge_is_found(tmp_path: Path) -> None:
    tree = branched_off(make_tree(tmp_path, states_around(9, 4)), "bad")
    tree.git("merge", "--quiet", "--strategy-option=theirs", "--message", "merge", "side")
    merged = tree.git("rev-parse", "HEAD")
    start = tree.git("rev-parse", "next~4")
    whole = replace(tree, commits=(start, merged))
    assert bisected(whole, whole.plan()).commits == ((tree.commits[0], "on the side"),)


def test_a_commit_that_does_not_build_is_skipped(tmp_path: Path) -> None:
    tree = make_tree(tmp_path, states_around(3, n5="broken", n6="broken"))
    found = bisected(tree, tree.plan())
    assert found.commits == ((tree.commits[3], "kvm/tdx: change 3"),)
    assert "build failed" in {step.outcome for step in found.steps}


def test_commits_without_a_verdict_around_the_culprit_leave_several(tmp_path: Path) -> None:
    tree = make_tree(tmp_path, states_around(6, n5="lost", n6="broken"))
    found = bisected(tree, tree.plan())
    assert {commit for commit, _ in found.commits} == {tree.commits[number] for number in (5, 6, 7)}


def test_builds_that_all_fail_leave_every_commit(tmp_path: Path) -> None:
    tree = make_tree(tmp_path, ["good", *["broken"] * 5, "bad"])
    found = bisected(tree, tree.plan(give_up_after=9))
    assert {commit for commit, _ in found.commits} == set(tree.commits[1:])
    assert [step.outcome for step in found.steps] == ["build failed"] * 5


def test_a_build_command_that_never_succeeds_is_not_tried_a_hundred_times(tmp_path: Path) -> None:
    tree = make_tree(tmp_path, ["good", *["good"] * 20, "bad"])
    found = bisected(tree, tree.plan("echo no rule to make target; exit 2"))
    assert [step.outcome for step in found.steps] == ["build failed"] * 3
    assert found.commits == ()
    assert found.problem == "the build failed 3 times and never succeeded; the last: no rule to make target"


def test_a_lab_that_is_down_does_not_build_a_hundred_kernels(tmp_path: Path) -> None:
    tree = make_tree(tmp_path, ["good", *["lost"] * 20, "bad"])
    found = bisected(tree, tree.plan(give_up_after=2))
    assert [step.outcome for step in found.steps] == ["inconclusive"] * 2
    assert found.commits == ()
    told = "no verdict 2 times in a row; the last: INCONCLUSIVE: infrastructure: spr-01: no power"
    assert found.problem == told


def test_a_validation_that_ends_in_a_way_of_its_own_stops_the_bisection(tmp_path: Path) -> None:
    tree = make_tree(tmp_path, ["good", *["odd"] * 5, "bad"])
    found = bisected(tree, tree.plan())
    assert (found.commits, len(found.steps)) == ((), 1)
    assert found.problem == "the validation ended with 2: tdxhw: usage"


@pytest.mark.parametrize(
    ("build", "kernel", "problem"),
    [
        ("true", "../out/*.deb", "the build succeeded and made no file that --kernel ../out/*.deb means"),
        ("touch a.deb b.deb", "*.deb", "made several files, a.deb, b.deb, that --kernel *.deb means"),
    ],
)
def test_a_build_without_a_kernel_stops_the_bisection(tmp_path: Path, build: str, kernel: str, problem: str) -> None:
    tree = make_tree(tmp_path, states_around(3))
    (tree.tree / ".git" / "info" / "exclude").write_text("*.deb\n")
    found = bisected(tree, tree.plan(build, kernel))
    assert (found.commits, len(found.steps)) == ((), 1)
    assert problem in found.problem


def test_a_build_that_leaves_something_in_the_background_is_over_when_it_ends(tmp_path: Path) -> None:
    """A compiler's server keeps the output open for as long as it lives."""
    tree = make_tree(tmp_path, states_around(2, 4))
    begun = time.monotonic()
    found = bisected(tree, tree.plan(f"{{ sleep 25 & }}; {BUILD}; echo built; printf 'no end of line'"))
    assert time.monotonic() - begun < 20
    assert found.commits[0][0] == tree.commits[2]
    (log, *_) = sorted((tmp_path / "keep").glob("*.build.log"))
    assert log.read_text() == "built\nno end of line"


def test_a_package_of_an_earlier_build_is_never_taken_for_this_ones(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "linux-image-old.deb").write_text("bad")
    (tmp_path / "out" / "linux-image-old-dbg_1.deb").write_text("bad")
    tree = make_tree(tmp_path, states_around(9))
    found = bisected(tree, tree.plan())
    assert found.commits[0][0] == tree.commits[9]


def test_an_image_that_make_finds_up_to_date_is_taken_as_it_is(tmp_path: Path) -> None:
    tree = make_tree(tmp_path, states_around(4))
    (tree.tree / ".git" / "info" / "exclude").write_text("bzImage\n")
    found = bisected(tree, tree.plan("cmp -s state bzImage || cp state bzImage", "bzImage"))
    assert found.commits[0][0] == tree.commits[4]


def test_a_validation_that_crashes_blames_no_commit(tmp_path: Path) -> None:
    tree = make_tree(tmp_path, ["good", *["a state that the validator has never heard of"] * 5, "bad"])
    found = bisected(tree, tree.plan())
    assert (found.commits, len(found.steps)) == ((), 1)
    assert found.problem.startswith("the validation ended with 1 and left no verdict: KeyError: ")


def test_what_git_cannot_go_on_from_is_told(tmp_path: Path) -> None:
    tree = make_tree(tmp_path, states_around(5))
    found = bisect(tree.plan(f"echo changed >number; {BUILD}"))
    assert found.commits == ()
    lost = "Your local changes to the following files would be overwritten by checkout: number"
    assert found.problem == f"git bisect run: {lost}"
    assert found.not_reset == lost
    assert (tree.tree / "number").read_text() == "changed\n"


def test_everything_is_kept(tmp_path: Path) -> None:
    tree = make_tree(tmp_path, states_around(5, n6="broken"))
    found = bisected(tree, tree.plan())
    keep = tmp_path / "keep"
    for number, step in enumerate(found.steps, 1):
        name = f"{number:03}-{step.commit[:12]}"
        assert (keep / f"{name}.build.log").exists()
        assert (keep / f"{name}.validate.log").exists() == (step.outcome != "build failed")
    assert [json.loads(line)["commit"] for line in (keep / "steps.jsonl").read_text().splitlines()] == [
        step.commit for step in found.steps
    ]

    tree.git("bisect", "replay", str(found.log))
    assert f"first bad commit: [{tree.commits[5]}]" in tree.git("bisect", "log")
    tree.git("bisect", "reset")


@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(1, 9), st.sets(st.integers(1, 8), max_size=3), st.sampled_from(["broken", "lost"]))
def test_what_is_found_always_holds_the_culprit(
    tmp_path_factory: pytest.TempPathFactory, culprit: int, without_verdict: set[int], how: str
) -> None:
    states = states_around(culprit, 10)
    for number in without_verdict:
        states[number] = how
    tree = make_tree(tmp_path_factory.mktemp("around"), states)
    found = bisected(tree, tree.plan(give_up_after=20))
    candidates = {commit for commit, _ in found.commits}
    assert tree.commits[culprit] in candidates
    if culprit not in without_verdict and culprit - 1 not in without_verdict:
        assert candidates == {tree.commits[culprit]}


# ---- interrupted ----


PROGRAM = """
import json, pathlib, sys
from tdxhw.bisect.plan import Plan
from tdxhw.bisect.session import bisect
from tdxhw.validate.cli import echo
found = bisect(Plan.load(pathlib.Path(sys.argv[1])), echo)
echo(json.dumps([found.interrupted, found.not_reset, [step.outcome for step in found.steps]]))
"""
Start = Callable[[KernelTree, Plan], "subprocess.Popen[str]"]


@pytest.fixture
def started() -> Iterator[Start]:
    """Return what starts a bisection in a process; see to it that none is left."""
    children: list[subprocess.Popen[str]] = []

    def start(tree: KernelTree, plan: Plan) -> "subprocess.Popen[str]":
        plan.save()
        command = [sys.executable, "-c", PROGRAM, str(plan.file)]
        children.append(subprocess.Popen(command, cwd=tree.around, stdout=subprocess.PIPE, text=True))
        return children[-1]

    yield start
    for child in children:
        child.kill()
        child.wait()
        if child.stdout is not None:
            child.stdout.close()


def wait_for(path: Path) -> None:
    until = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < until, f"{path} does not come"
        time.sleep(0.02)


@pytest.mark.usefixtures("hangups_are_heard")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_validation_rolls_back_before_the_tree_is_reset(
    started: Start, tmp_path: Path, number: signal.Signals
) -> None:
    tree = make_tree(tmp_path, ["good", *["hangs"] * 6, "bad"])
    child = started(tree, tree.plan())
    wait_for(tmp_path / "hanging")
    child.send_signal(number)
    output, _ = child.communicate(timeout=60)

    assert (tmp_path / "rolled-back").read_text() == str(int(signal.SIGINT))
    assert json.loads(output.splitlines()[-1]) == [True, "", ["interrupted"]]
    assert tree.git("symbolic-ref", "HEAD") == "refs/heads/next"
    assert not (tree.tree / ".git" / "BISECT_LOG").exists()
    assert "git bisect start" in (tmp_path / "keep" / "git-bisect.log").read_text()


def test_an_interrupted_build_ends_with_everything_that_it_started(started: Start, tmp_path: Path) -> None:
    tree = make_tree(tmp_path, states_around(5))
    marker = tmp_path / "building"
    build = f"sleep 61 & echo > {marker}; wait"  # a shell's `&` ignores Ctrl-C
    child = started(tree, tree.plan(build))
    wait_for(marker)
    begun = time.monotonic()
    child.send_signal(signal.SIGINT)
    output, _ = child.communicate(timeout=60)

    assert json.loads(output.splitlines()[-1]) == [True, "", ["interrupted"]]
    assert time.monotonic() - begun < 30
    assert tree.git("symbolic-ref", "HEAD") == "refs/heads/next"


def test_steps_without_anybody_who_watches_over_them_end(started: Start, tmp_path: Path) -> None:
    tree = make_tree(tmp_path, ["good", *["hangs"] * 6, "bad"])
    plan = tree.plan()
    child = started(tree, plan)
    wait_for(tmp_path / "hanging")
    child.kill()
    child.communicate()
    os.kill(int((tmp_path / "keep" / "pid").read_text()), signal.SIGINT)
    wait_for(tmp_path / "rolled-back")
    wait_for(tmp_path / "keep" / "steps.jsonl")
    assert [step.outcome for step in steps(tmp_path / "keep")] == ["interrupted"]
    assert steps(tmp_path / "keep")[0].commit in tree.commits


def test_a_step_whose_tdxhw_is_gone_builds_nothing(tmp_path: Path) -> None:
    tree = make_tree(tmp_path, states_around(5))
    gone = subprocess.Popen(["true"])
    gone.wait()
    step = run_step(replace(tree.plan("touch built"), owner=gone.pid))
    assert (step.outcome, step.line) == ("stopped", "the tdxhw that watched over the bisection is gone")
    assert not (tree.tree / "built").exists()


def test_a_reader_that_goes_away_leaves_no_step_running_in_a_tree_that_is_put_back(
    started: Start, tmp_path: Path
) -> None:
    tree = make_tree(tmp_path, states_around(3, 6))
    child = started(tree, tree.plan())
    assert child.stdout is not None
    child.stdout.close()
    assert child.wait(timeout=60) == 0
    assert len(list(tmp_path.glob("keep/*/outcome.json"))) == len(steps(tmp_path / "keep")) >= 2
    assert f"first bad commit: [{tree.commits[3]}]" in (tmp_path / "keep/git-bisect.log").read_text()
    assert tree.git("rev-parse", "HEAD") == tree.commits[-1]
