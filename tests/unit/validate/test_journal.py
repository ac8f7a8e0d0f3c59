"""The journal on the host: whatever is changed, and wherever the power is cut, undoing leads to what was."""

import io
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tdxhw.validate.remote.journal import CHANGES, ChangeError, Host, Journal, operate
from tests.unit.validate.simulated_debian import MEMORY, PowerCut, SimulatedDebian

NEW = "7.2.13-new"
FOLDER = "var/lib/tdxhw/validate"
PIN = "/etc/default/grub.d/zz.cfg"
CLAIMED = [f"/lib/modules/{NEW}", f"/boot/vmlinuz-{NEW}", f"/boot/initrd.img-{NEW}", f"/var/lib/initramfs-tools/{NEW}"]

PACKAGE: list[dict[str, Any]] = [
    {"change": "command", "argv": [], "undo": ["update-grub"]},
    {"change": "create", "paths": ["/etc/default/grub.d"], "folders": ["/etc/default/grub.d"]},
    {"change": "write", "path": PIN, "text": "GRUB_DEFAULT='more>linux-6.12.9-own'\n"},
    {"change": "create", "paths": CLAIMED},
    {"change": "keep-links", "paths": ["/vmlinuz", "/vmlinuz.old", "/boot/vmlinuz"]},
    {"change": "packages", "files": ["/tmp/linux-image-new.deb"], "packages": ["linux-image-new"]},
    {"change": "write", "path": "/boot/grub/custom.cfg", "text": "menuentry"},
    {"change": "boot-once", "environment": "/boot/grub/grubenv", "entry": "new"},
    {"change": "write", "path": "/boot/grub/custom.cfg", "text": "another menuentry"},
    {"change": "boot-once", "environment": "/boot/grub/grubenv", "entry": "new"},
]
IMAGE: list[dict[str, Any]] = [
    {"change": "create", "paths": CLAIMED},
    {"change": "move", "source": "/var/lib/tdxhw/image", "path": f"/boot/vmlinuz-{NEW}"},
    {"change": "create", "paths": [f"/lib/modules/{NEW}/x"], "folders": []},
    {"change": "link", "path": "/etc/systemd/system/guard.service", "target": "/nowhere"},
    {"change": "command", "argv": ["update-initramfs", "-c", "-k", NEW]},
    {"change": "write", "path": "/etc/default/grub", "text": "GRUB_DEFAULT=saved\n", "mode": 0o600},
]


def make(root: Path) -> tuple[SimulatedDebian, Journal]:
    host = SimulatedDebian.install(root)
    host.archive = {"linux-image-new": {"release": NEW}}
    host.file("var/lib/tdxhw/image").write_text("kernel")
    return host, Journal(host, root / FOLDER)


@pytest.fixture
def in_memory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        yield Path(folder)


@pytest.fixture
def host_and_journal(in_memory: Path) -> tuple[SimulatedDebian, Journal]:
    return make(in_memory / "host")


def perform(journal: Journal, changes: list[dict[str, Any]]) -> None:
    journal.begin({"what": "a test"})
    for change in changes:
        journal.do(change)


@pytest.mark.parametrize("changes", [PACKAGE, IMAGE], ids=["package", "image"])
def test_every_change_is_made_and_all_are_undone(
    host_and_journal: tuple[SimulatedDebian, Journal], changes: list[dict[str, Any]]
) -> None:
    host, journal = host_and_journal
    before = host.snapshot()
    perform(journal, changes)
    assert host.snapshot() != before
    assert host.file(f"boot/vmlinuz-{NEW}").exists()
    assert host.file(f"boot/initrd.img-{NEW}").exists()

    assert journal.undo() == {"ok": True, "failed": []}
    assert host.snapshot() == before
    journal.end()
    assert not journal.folder.exists()


@given(
    changes=st.sampled_from([PACKAGE, IMAGE]),
    cuts=st.lists(st.integers(0, 60), min_size=1, max_size=4),
    torn=st.sampled_from([b"", b'{"change": "wri', b"\0\0\0\0"]),
)
@settings(max_examples=150, deadline=None)
def test_wherever_the_power_is_cut_undoing_leads_to_what_was(
    changes: list[dict[str, Any]], cuts: list[int], torn: bytes
) -> None:
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        host, journal = make(Path(folder) / "host")
        before = host.snapshot()
        work: list[Callable[[], object]] = [lambda: perform(journal, changes), *[journal.undo] * len(cuts)]
        for cut, what in zip(cuts, work, strict=False):
            host.cut_after = cut
            try:
                what()
            except PowerCut:
                if journal.path.exists() and torn:
                    with journal.path.open("ab") as file:
                        file.write(torn)
        host.cut_after = None

        assert journal.undo()["failed"] == []
        after = host.snapshot()
        after.pop("boot/grub/grub.cfg.new", None)  # GRUB's own, of a run that was cut off; the next one replaces it
        assert after == before
        if journal.lines():
            journal.end()


def test_a_power_cut_in_any_single_place_of_an_installation_is_undone(in_memory: Path) -> None:
    host, journal = make(in_memory / "counting")
    before_that = host.effects
    perform(journal, PACKAGE)
    total = host.effects - before_that
    assert total > 30
    states = set()
    for cut in range(total):
        host, journal = make(in_memory / str(cut))
        before = host.snapshot()
        host.cut_after = cut
        with pytest.raises(PowerCut):
            perform(journal, PACKAGE)
        states.add(frozenset(host.snapshot().items()))
        host.cut_after = None
        assert journal.undo()["failed"] == []
        assert host.snapshot().items() >= before.items()
        assert host.packages().keys() == {"linux-image-own"}
        assert host.environment() == {}
    assert len(states) > 8, "the cuts were in different places"


def test_what_cannot_be_undone_is_told_and_holds_up_nothing_else(
    host_and_journal: tuple[SimulatedDebian, Journal],
) -> None:
    host, journal = host_and_journal
    perform(journal, PACKAGE)
    host.broken = {"dpkg"}
    answer = journal.undo()
    assert not answer["ok"]
    assert ["packages" in line for line in answer["failed"]] == [True]
    assert host.environment() == {}
    assert not host.file(PIN[1:]).exists()
    with pytest.raises(ChangeError, match="1 changes are not undone"):
        journal.end()

    host.broken = set()
    assert journal.undo()["ok"], "and once more works"
    journal.end()
    assert host.packages().keys() == {"linux-image-own"}


def test_a_disk_that_is_full_holds_up_no_undo_and_what_was_sent_makes_room(
    host_and_journal: tuple[SimulatedDebian, Journal], monkeypatch: pytest.MonkeyPatch
) -> None:
    host, journal = host_and_journal
    before = host.snapshot()
    perform(journal, PACKAGE)
    (journal.folder / "files").mkdir()
    (journal.folder / "files/linux-image-new.deb").write_text("a gigabyte")
    append = Journal.append

    def full(self: Journal, line: dict[str, Any]) -> None:
        assert not (self.folder / "files").exists(), "its space was not given back"
        if host.packages().keys() != {"linux-image-own"}:
            raise OSError(28, "No space left on device", str(self.path))
        append(self, line)

    monkeypatch.setattr(Journal, "append", full)
    answer = journal.undo()
    assert host.snapshot() == before, "everything was undone, though not all of it could be noted"
    assert answer["failed"]
    assert all("No space left on device" in line for line in answer["failed"])
    assert journal.undo() == {"ok": True, "failed": []}, "and once more is noted"
    journal.end()


def test_a_second_validation_does_not_begin_over_the_first(host_and_journal: tuple[SimulatedDebian, Journal]) -> None:
    _, journal = host_and_journal
    journal.begin({})
    assert operate(journal, "begin", {}) == {"ok": False, "error": "an earlier validation was not rolled back"}


def test_nothing_is_changed_before_a_journal_is_there(host_and_journal: tuple[SimulatedDebian, Journal]) -> None:
    host, journal = host_and_journal
    before = host.snapshot()
    for change in PACKAGE:
        assert not operate(journal, "do", change)["ok"]
    assert host.snapshot() == before


@pytest.mark.parametrize(
    ("plan", "reason"),
    [
        (["Remv linux-image-own [1]"], "would remove linux-image-own"),
        (["Inst linux-base [4.12] (4.17 Debian [all])"], "would replace linux-base 4.12 by 4.17"),
        (["Inst linux-binary-new (1 Debian [amd64])"], "needs linux-binary-new, too"),
    ],
)
def test_packages_that_could_not_be_taken_back_are_refused(
    host_and_journal: tuple[SimulatedDebian, Journal], plan: list[str], reason: str
) -> None:
    host, journal = host_and_journal
    host.archive["linux-image-new"]["plan"] = plan
    before = host.snapshot()
    journal.begin({})
    answer = operate(journal, "do", PACKAGE[5])
    assert reason in answer["error"]
    assert host.snapshot() == before
    assert len(journal.lines()) == 1, "there is nothing to undo"


def test_a_package_that_was_removed_and_not_purged_is_refused(
    host_and_journal: tuple[SimulatedDebian, Journal],
) -> None:
    """Purging it is how the installation is undone, and would take its old configuration as well."""
    host, journal = host_and_journal
    host.set_status("linux-image-new", "config-files", NEW)
    before = host.snapshot()
    journal.begin({})
    told = "linux-image-new is there as config-files, which could not be had back: dpkg --purge linux-image-new"
    assert operate(journal, "do", PACKAGE[5]) == {"ok": False, "error": told}
    assert journal.undo()["ok"]
    assert host.snapshot() == before


def test_a_path_that_is_taken_is_not_claimed(host_and_journal: tuple[SimulatedDebian, Journal]) -> None:
    host, journal = host_and_journal
    host.file(f"boot/vmlinuz-{NEW}").write_text("somebody's own")
    journal.begin({})
    assert "is there already" in operate(journal, "do", {"change": "create", "paths": CLAIMED})["error"]
    journal.undo()
    assert host.file(f"boot/vmlinuz-{NEW}").read_text() == "somebody's own"


def test_what_a_program_that_was_cut_off_left_beside_a_claimed_path_goes_and_nothing_else(
    host_and_journal: tuple[SimulatedDebian, Journal],
) -> None:
    host, journal = host_and_journal
    boot = host.file("boot")
    others = [f"initrd.img-{NEW}.bak", f"vmlinuz-{NEW}.13", f"vmlinuz-{NEW}-rt", f"vmlinuz-{NEW}.13.dpkg-new"]
    for name in others:
        (boot / name).write_text("of another kernel, or there before")
    before = host.snapshot()
    perform(journal, [{"change": "create", "paths": CLAIMED}])
    for name in (f"initrd.img-{NEW}.new", f"vmlinuz-{NEW}.dpkg-new", f"vmlinuz-{NEW}.dpkg-tmp"):
        (boot / name).write_text("half of i")
    (boot / f"initrd.img-{NEW}.bak").write_text("of another kernel, or there before")
    journal.undo()
    journal.end()
    assert host.snapshot() == before


def test_somebody_else_s_boot_once_entry_is_not_overwritten(host_and_journal: tuple[SimulatedDebian, Journal]) -> None:
    host, journal = host_and_journal
    host.save_environment({"next_entry": "memtest", "saved_entry": "x"})
    journal.begin({})
    change = {"change": "boot-once", "environment": "/boot/grub/grubenv", "entry": "new"}
    assert "somebody already chose" in operate(journal, "do", change)["error"]
    assert host.environment() == {"next_entry": "memtest", "saved_entry": "x"}


def test_the_default_that_was_saved_is_saved_again(host_and_journal: tuple[SimulatedDebian, Journal]) -> None:
    host, journal = host_and_journal
    host.save_environment({"saved_entry": "x", "other": "1"})
    perform(journal, [{"change": "boot-once", "environment": "/boot/grub/grubenv", "entry": "new"}])
    host.save_environment({"saved_entry": "new", "other": "1"})  # GRUB_SAVEDEFAULT=true
    journal.undo()
    assert host.environment() == {"saved_entry": "x", "other": "1"}


def test_modules_are_unpacked_below_their_folder_and_nowhere_else(
    host_and_journal: tuple[SimulatedDebian, Journal],
) -> None:
    host, journal = host_and_journal
    before = host.snapshot()
    with tarfile.open(host.file("var/lib/tdxhw/modules.tar"), "w:gz") as tar:
        for name in ("kernel/kvm.ko", "modules.order", "../../../etc/passwd", "../other/kvm.ko"):
            member = tarfile.TarInfo(f"./lib/modules/{NEW}/{name}")
            member.size = 3
            tar.addfile(member, io.BytesIO(b"abc"))
        for name, target in (("build", "/usr/src/linux"), ("kernel/alias.ko", "kvm.ko")):
            link = tarfile.TarInfo(f"./lib/modules/{NEW}/{name}")
            link.type, link.linkname = tarfile.SYMTYPE, target
            tar.addfile(link)
    changes: list[dict[str, Any]] = [
        {"change": "create", "paths": CLAIMED},
        {"change": "unpack", "source": "/var/lib/tdxhw/modules.tar", "below": f"lib/modules/{NEW}",
         "path": f"/lib/modules/{NEW}"},
    ]  # fmt: skip
    perform(journal, changes)
    made = sorted(name for name in host.snapshot().keys() - before.keys() if host.snapshot()[name] != "folder")
    top = f"lib/modules/{NEW}"
    assert made == [f"{top}/kernel/alias.ko", f"{top}/kernel/kvm.ko", f"{top}/modules.order"]
    journal.undo()
    assert host.snapshot() == before


def test_every_change_is_tested_here() -> None:
    tested = {change["change"] for change in PACKAGE + IMAGE}
    assert tested | {"unpack"} == set(CHANGES)


def test_what_a_program_leaves_that_is_cut_off_goes_with_the_journal(
    host_and_journal: tuple[SimulatedDebian, Journal],
) -> None:
    host, journal = host_and_journal
    before = host.snapshot()
    journal.begin({"what": "a test"})
    journal.do({"change": "create", "paths": CLAIMED})
    host.cut_after = 2  # in mkinitramfs
    with pytest.raises(PowerCut):
        journal.do({"change": "command", "argv": ["update-initramfs", "-c", "-k", NEW]})
    assert list(host.root.rglob("mkinitramfs_*/init")), "it was in the middle of it"
    host.cut_after, host.scratch = None, None  # another process
    assert journal.undo()["ok"]
    assert not list(host.root.rglob("mkinitramfs_*")), "its space may be needed for the way back"
    journal.end()
    assert host.snapshot() == before


def test_programs_are_told_where_to_put_their_temporary_files(tmp_path: Path) -> None:
    """With the real host: what a program is given, and that there is such a folder in which programs can be run."""
    journal = Journal(Host(), tmp_path / "validate")
    journal.begin({})
    script = 'printf "#!/bin/sh\\necho it runs\\n" >"$TMPDIR/x"; chmod +x "$TMPDIR/x"; echo "$TMPDIR"; "$TMPDIR/x"'
    answer = journal.do({"change": "command", "argv": ["sh", "-c", script], "undo": ["sh", "-c", script]})
    assert answer["output"].splitlines() == [str(tmp_path / "validate/tmp"), "it runs"]
    assert Journal(Host(), tmp_path / "validate").undo() == {"ok": True, "failed": []}
    journal.end()
    assert list(tmp_path.iterdir()) == []


def test_who_works_on_the_packages_right_after_a_boot_is_waited_for(
    host_and_journal: tuple[SimulatedDebian, Journal],
) -> None:
    host, journal = host_and_journal
    before = host.snapshot()
    host.locked_s = 60.0
    perform(journal, PACKAGE)
    assert host.file(f"boot/vmlinuz-{NEW}").exists()
    host.locked_s = 60.0
    assert journal.undo() == {"ok": True, "failed": []}
    assert host.snapshot() == before


def test_who_never_ends_its_work_on_the_packages_is_named(host_and_journal: tuple[SimulatedDebian, Journal]) -> None:
    host, journal = host_and_journal
    journal.begin({"what": "a test"})
    host.locked_s = 1e9
    answer = operate(journal, "do", PACKAGE[5])
    assert not answer["ok"]
    assert "held by process 7 (unattended-upgr)" in answer["error"]
    assert 1e9 - host.locked_s <= 700
