"""``tdxhw bisect`` for real: kernels that boot on a machine under emulation, and the commit that broke them."""

import shutil
from pathlib import Path
from typing import Final

import pytest

from tdxhw.cli import main
from tests.lab.grub_lab import BOOT_LIMIT_S, GrubLab
from tests.lab.test_validate import disk_image, kernel, lab, state  # noqa: F401
from tests.unit.bisect.kernel_tree import make_tree

pytestmark = pytest.mark.timeout(1800)  # two boots for each validation, under software emulation

SUITE: Final = '''
"""Fails under one of our kernels."""
import platform

def test_kernel_is_none_of_the_worse():
    assert "worse" not in platform.release()
'''
STATES: Final = ("good", "good", "worse", "worse", "worse")


def test_the_commit_that_broke_the_kernel_is_found_on_a_real_machine(
    lab: GrubLab,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tree = make_tree(tmp_path, STATES)
    for name in ("good", "worse"):
        shutil.copy(kernel(name).deb, tmp_path / f"{name}.deb")
    suite, baseline = tmp_path / "test_release.py", tmp_path / "base.jsonl"
    suite.write_text(SUITE)
    assert main(["run", "--on", "lab:vm", str(suite), "--report-log", str(baseline)]) == 0
    before = state(lab)

    code = main([
        "bisect", "--good", tree.commits[0], "--bad", "next", "--tree", str(tree.tree), "--lab", "vm",
        "--baseline", str(baseline), "--build", "cp ../$(cat state).deb ../linux-image-$(git rev-parse HEAD).deb",
        "--keep", str(tmp_path / "keep"), "--", "--retries", "1",
        "--boot-limit", str(BOOT_LIMIT_S), "--history", str(tmp_path / "h.sqlite"), str(suite),
    ])  # fmt: skip
    output = capsys.readouterr().out

    assert code == 0, output
    assert f"first bad commit: {tree.commits[2]} kvm/tdx: change 2" in output
    assert "release::test_kernel_is_none_of_the_worse" in output
    assert tree.git("symbolic-ref", "HEAD") == "refs/heads/next"
    lab.machine.wait_until(lab.is_up, limit_s=BOOT_LIMIT_S)
    assert state(lab) == before

    assert main(["history", "runs", "--db", str(tmp_path / "h.sqlite")]) == 0
    runs = capsys.readouterr().out
    assert "GOOD" in runs
    assert "REGRESSED" in runs
