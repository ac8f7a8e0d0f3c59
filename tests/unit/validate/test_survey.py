"""What a host says of itself, asked on this machine: whatever is missing here is absent, not an error."""

import json
import platform
import subprocess
import sys
from pathlib import Path

from tdxhw.validate.remote import survey


def asked(how_much: str) -> dict[str, object]:
    script = Path(survey.__file__)
    done = subprocess.run([sys.executable, str(script), how_much], capture_output=True, text=True, check=True)
    found: dict[str, object] = json.loads(done.stdout)
    return found


def test_a_host_tells_which_boot_it_is_in() -> None:
    brief = asked("brief")
    assert brief["release"] == platform.release()
    assert brief["boot_id"] == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert brief["cmdline"] == Path("/proc/cmdline").read_text().strip()


def test_a_host_tells_everything_also_where_it_has_no_boot_loader_and_no_modules() -> None:
    whole = asked("whole")
    assert asked("brief").items() <= whole.items()
    assert {"boot_files", "module_folders", "kernel_links", "memory_kib", "tainted", "is_root"} <= whole.keys()


def test_a_folder_that_is_not_there_is_empty(tmp_path: Path) -> None:
    (tmp_path / "b").touch()
    (tmp_path / "a").mkdir()
    assert [path.name for path in survey.content(str(tmp_path))] == ["a", "b"]
    assert survey.content(str(tmp_path / "c")) == []
