"""What stands against a bisection is said before anything is built, and nothing was touched then."""

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from tdxhw.bisect import plan as plans
from tdxhw.bisect.errors import BisectError
from tdxhw.bisect.plan import Plan
from tdxhw.cli import cli
from tdxhw.errors import HarnessError
from tdxhw.report import json_lines
from tests.unit.bisect.kernel_tree import KernelTree, make_tree
from tests.unit.report.samples import every_kind


@pytest.fixture
def tree(tmp_path: Path) -> KernelTree:
    return make_tree(tmp_path, ["good", "good", "bad", "bad"])


def make(tree: KernelTree, good: str = "HEAD~3", bad: str = "HEAD", build: str = "true", where: str = "") -> Plan:
    return plans.make(
        Path(where) if where else tree.tree, good, bad, build=build, kernel="x", validate=("true",),
        cwd=tree.around, keep=tree.around / "keep", give_up_after=3,
    )  # fmt: skip


def refusal(tree: KernelTree, **given: str) -> str:
    with pytest.raises(BisectError) as error:
        make(tree, **given)
    assert "\n" not in str(error.value)
    assert not (tree.tree / ".git" / "BISECT_LOG").exists() or "under way" in str(error.value)
    return str(error.value)


def test_a_plan_comes_back_from_its_file(tree: KernelTree) -> None:
    plan = make(tree)
    plan.save()
    assert Plan.load(plan.file) == plan
    assert (plan.good, plan.bad) == (tree.commits[0], tree.commits[-1])


def test_a_folder_below_the_tree_will_do(tree: KernelTree) -> None:
    (tree.tree / "arch").mkdir()
    assert make(tree, where=str(tree.tree / "arch")).tree == str(tree.tree)


def test_refuses_what_is_no_git_tree(tree: KernelTree) -> None:
    assert refusal(tree, where=str(tree.around)).endswith("not a git tree: --tree names the kernel's")
    assert refusal(tree, where=str(tree.around / "nowhere")).endswith("not a git tree: --tree names the kernel's")


def test_refuses_a_tree_where_somebody_bisects(tree: KernelTree) -> None:
    tree.git("bisect", "start")
    assert "a bisection is under way there" in refusal(tree)


def test_refuses_a_tree_with_changes_and_keeps_them(tree: KernelTree) -> None:
    (tree.tree / "state").write_text("mine")
    assert refusal(tree) == f"{tree.tree}: state changed: commit or stash that first"
    tree.git("add", ".")
    (tree.tree / "number").write_text("mine")
    assert refusal(tree) == f"{tree.tree}: number and 1 more changed: commit or stash that first"
    assert (tree.tree / "state").read_text() == "mine"


def test_what_git_does_not_know_is_no_change(tree: KernelTree) -> None:
    (tree.tree / "vmlinux").write_text("")
    assert make(tree).good == tree.commits[0]


@pytest.mark.parametrize("revision", ["v9.9", "--help", "HEAD:state", ""])
def test_refuses_a_revision_that_is_no_commit(tree: KernelTree, revision: str) -> None:
    assert refusal(tree, good=revision) == f"--good {revision}: no such commit in {tree.tree}"
    assert refusal(tree, bad=revision) == f"--bad {revision}: no such commit in {tree.tree}"


def test_refuses_two_names_of_one_commit(tree: KernelTree) -> None:
    assert refusal(tree, good="HEAD", bad="next") == "--good HEAD and --bad next are the same commit"


def test_refuses_a_fix(tree: KernelTree) -> None:
    assert "comes before --good HEAD: a fix, not a regression?" in refusal(tree, good="HEAD", bad="HEAD~2")


def test_refuses_two_histories(tree: KernelTree) -> None:
    tree.git("checkout", "--quiet", "--orphan", "other")
    tree.git("commit", "--quiet", "--message", "elsewhere")
    assert refusal(tree, good="next", bad="other") == "--good next and --bad other have no history in common"


def test_a_shallow_clone_is_told_apart_from_two_histories(tree: KernelTree) -> None:
    elsewhere = tree.around / "shallow"
    tree.git("clone", "--quiet", "--depth=1", f"file://{tree.tree}", str(elsewhere))
    shallow = replace(tree, around=elsewhere.parent)
    git = ["git", "-C", str(elsewhere), "fetch", "--quiet", "--depth=1", "origin", tree.commits[0]]
    subprocess.run(git, check=True, capture_output=True)
    told = refusal(shallow, where=str(elsewhere), good=tree.commits[0])
    assert told.endswith("no history in common: the clone is shallow: git fetch --unshallow")


@pytest.mark.parametrize(
    "build",
    [
        "no-such-command -j8",
        "no-such-command;true",
        "no-such-command>log",
        "ARCH=x86 no-such-command",
        "./no-such-command",
    ],
)
def test_refuses_a_build_command_that_is_not_there(tree: KernelTree, build: str) -> None:
    assert "no-such-command' in" in refusal(tree, build=build)


@pytest.mark.parametrize("build", ["", "A=1", "echo 'x", "if true; then", "make )"])
def test_refuses_what_is_no_command(tree: KernelTree, build: str) -> None:
    assert refusal(tree, build=build).startswith("--build: ")


@pytest.mark.parametrize("build", [
    "make -j2 bindeb-pkg", "cd . && true", "CC=gcc sh build.sh", "make;true", "(make)", "make>log", "{ make; }",
    "$HOME/bin/build", "~/bin/build", "make&&cp a b", '"$(command -v make)" -j2', "echo \"it's\"",
])  # fmt: skip
def test_a_build_command_may_be_any_of_the_shells(tree: KernelTree, build: str) -> None:
    assert make(tree, build=build).build == build


def test_refuses_to_write_over_the_logs_of_another_bisection(tree: KernelTree) -> None:
    make(tree).save()
    assert refusal(tree).endswith("not empty: --keep names a folder for this bisection's logs")


def test_refuses_a_place_for_logs_that_is_none(tree: KernelTree) -> None:
    (tree.around / "keep").write_text("")
    assert refusal(tree).endswith("keep: Not a directory")


def test_refuses_a_lab_and_a_baseline_that_validation_would_refuse_an_hour_later(
    tree: KernelTree, tmp_path: Path
) -> None:
    labs = tmp_path / "labs"
    labs.mkdir()
    (labs / "known_hosts").write_text("")
    (labs / "gone.yaml").write_text("host: {name: gone, ssh: 'ssh://root@127.0.0.1:1', promises: [kvm]}\n")
    baseline = tmp_path / "base.jsonl"
    command = ["bisect", "--good", "HEAD~3", "--bad", "HEAD", "--tree", str(tree.tree), "--labs", str(labs),
               "--build", "true", "--baseline", str(baseline), "--keep", str(tmp_path / "keep")]  # fmt: skip

    def error(lab: str, *more: str) -> str:
        result = CliRunner().invoke(cli, [*command, "--lab", lab, *more])
        assert isinstance(result.exception, HarnessError), result.output
        return str(result.exception)

    assert error("gone") == f"{baseline}: cannot read it: No such file or directory"
    baseline.write_text(json_lines.render(every_kind()))
    assert "spr-02" in error("spr-02")
    assert error("gone", "--", "nonsense").startswith("no suite 'nonsense'")
    assert "has no result from hardware of td_memory" in error("gone", "--", "td_memory")
    assert error("gone", "--", "--retries", "x").startswith("-- Invalid value for '--retries'")
    assert "MODULE.PARAMETER=VALUE" in error("gone", "--", "--parameters", "tdx")
    assert "--recover is none" in error("gone", "--", "--recover")
    assert "--kernel belongs before it" in error("gone", "--", "--kernel", "x")
    assert error("gone").startswith("gone: 127.0.0.1:1: ")
    (tree.tree / "state").write_text("changed")
    assert "commit or stash that first" in error("gone")
    assert not (tmp_path / "keep").exists()
    assert not (tree.tree / ".git" / "BISECT_LOG").exists()
