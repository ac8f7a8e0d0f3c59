"""How tdxhw gets to a host, with the host's shell commands run here."""

import io
import os
import subprocess
import tarfile
from pathlib import Path

import pytest

from tdxhw.lab.archive import Archive
from tdxhw.lab.connection import Completed
from tdxhw.lab.deploy import deploy


class Here:
    """Runs what is meant for the host."""

    def run(self, command: str, *, stdin: bytes = b"", **_: object) -> Completed:
        done = subprocess.run(["sh", "-c", command], input=stdin, capture_output=True, check=False)
        return Completed(done.returncode, done.stdout.decode(), done.stderr.decode())

    def check(self, command: str, *, stdin: bytes = b"", **_: object) -> str:
        done = self.run(command, stdin=stdin)
        assert done.exit_code == 0, done.stderr
        return done.stdout


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Archive:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz") as tar:
        main = tarfile.TarInfo("__main__.py")
        main.size = 8
        tar.addfile(main, io.BytesIO(b"print(1)"))
    return Archive(data.getvalue(), "abc", ())


def test_it_is_on_the_disk_before_it_is_in_its_place(
    archive: Archive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A kernel on trial that panics within half a minute leaves what was only in the page cache as empty files.
    sync = tmp_path / "bin/sync"
    sync.parent.mkdir()
    sync.write_text(f'#!/bin/sh\nls -A "$2" >{tmp_path}/synced; ls {tmp_path}/cache/tdxhw/app >>{tmp_path}/synced\n')
    sync.chmod(0o755)
    monkeypatch.setenv("PATH", f"{sync.parent}:{os.environ['PATH']}")
    deployed = deploy(Here(), archive)  # type: ignore[arg-type]
    *files, folder = (tmp_path / "synced").read_text().split()
    assert files == [".complete", "__main__.py"]
    assert folder.startswith("abc."), "not yet its name"
    assert sorted(path.name for path in Path(deployed.folder).iterdir()) == files


def test_it_is_sent_once(archive: Archive) -> None:
    first, again = deploy(Here(), archive), deploy(Here(), archive)  # type: ignore[arg-type]
    assert (first.was_sent, again.was_sent) == (True, False)
    assert first.command == again.command
