"""Change a lab host so that every change can be taken back, also after a power cut and by somebody else.

Usage: ``journal.py FOLDER show|begin|do|undo|end`` with a JSON object on standard input, one JSON object out.

Before anything is changed, how to take it back is on the disk (a line of FOLDER/journal.jsonl, fsync). Undoing goes
through the lines backwards and marks each one that is done, so it may be cut off and started again. Each undo works
whether its change was made, half made, or never begun.

================ ================================================== ==========================================
Change           Does                                               Undone by
================ ================================================== ==========================================
``write``        writes a file, whole or not at all                 what was there before, or removing it
``create``       writes nothing: claims a path that must not exist  removing whatever is there by then
``link``         makes a symbolic link                              removing it
``keep-links``   changes nothing: others are about to change links  each link, or none, as it was
``move``         moves an uploaded file to a path that is claimed   (the claim)
``unpack``       unpacks a tar archive below a claimed path         (the claim)
``command``      runs a program                                     running another
``packages``     installs Debian packages from files, no download   purging those that were not there
``boot-once``    names GRUB's entry for the next boot only          GRUB's environment as it was
================ ================================================== ==========================================
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

GRUB_ENVIRONMENT = ("next_entry", "saved_entry", "prev_saved_entry")
SAYS_WHY = re.compile(r"^(E|dpkg: error|grub-[a-z]+: error|depmod: ERROR)|Depends:|No space left")
LOCKED = re.compile(r"lock was locked by|is locked by another|Could not get lock|Unable to (acquire|lock)")
LOCK_S = 600.0  # how long somebody else's work on the packages is waited for
BESIDE = (".new", ".tmp", ".bak", ".old", ".dpkg-new", ".dpkg-tmp", ".dpkg-bak", ".dpkg-old")
"""Under which names programs write a file, or keep the one that was there: update-initramfs, dpkg."""
TAIL = 1000  # what is quoted of a program's output [characters]


class ChangeError(Exception):
    """A change cannot be made, or not be taken back; one line."""


class Host:
    """The machine this runs on. Tests put a simulated one in its place."""

    scratch: Path | None = None
    """Where programs put their temporary files: what one leaves that is cut off would lie in /var/tmp for a month."""

    def path(self, name: str) -> Path:
        """Return where an absolute path of the host is."""
        return Path(name)

    def command(self, argv: list[str], limit_s: float = 600.0) -> str:
        """Run a program and return its output. ``ChangeError`` quotes the end of what a failing one said."""
        environment = dict(
            os.environ, DEBIAN_FRONTEND="noninteractive", NEEDRESTART_SUSPEND="1", LC_ALL="C", PATH=search_path()
        )
        if self.scratch is not None:
            environment["TMPDIR"] = str(self.scratch)
        try:
            done = subprocess.run(
                argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment,
                timeout=limit_s, check=False,
            )  # fmt: skip
        except FileNotFoundError:
            raise ChangeError(argv[0] + ": no such program") from None
        except subprocess.TimeoutExpired:
            raise ChangeError(f"{' '.join(argv)[:200]}: still running after {limit_s:g} s") from None
        output = done.stdout.decode("utf-8", "replace")
        if done.returncode != 0:
            told = [line for line in output.splitlines() if SAYS_WHY.search(line)]
            said = "; ".join(told) or output[-TAIL:].strip()
            raise ChangeError(f"{' '.join(argv)[:200]}: exit code {done.returncode}: {said}")
        return output

    def sync(self) -> None:
        """Have everything that was written on the disk."""
        os.sync()

    def wait(self, seconds: float) -> None:
        """Let time pass [s]."""
        time.sleep(seconds)


def search_path() -> str:
    """Return a PATH with the administrator's programs, which ssh leaves out for some users."""
    return os.environ.get("PATH", "/usr/bin:/bin") + ":/usr/local/sbin:/usr/sbin:/sbin"


class Journal:
    """The list of changes, on the disk before each of them."""

    def __init__(self, host: Host, folder: Path) -> None:
        self.host = host
        self.folder = folder
        self.path = folder / "journal.jsonl"
        self.scratch = folder / "tmp"  # on the file system of dpkg's scripts: programs can be run there

    def lines(self) -> list[dict[str, Any]]:
        """Return what is in it. A last line that a power cut tore was never acted upon."""
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return []
        whole = data[: data.rfind(b"\n") + 1].splitlines()
        return [json.loads(line) for line in whole if line.strip(b"\0 ")]

    def append(self, line: dict[str, Any]) -> None:
        """Add a line; when this returns it is on the disk."""
        with self.path.open("r+b" if self.path.exists() else "w+b") as file:
            data = file.read()
            file.seek(data.rfind(b"\n") + 1)  # over a torn line
            file.truncate()
            file.write(json.dumps(line).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        sync_folder(self.folder)

    def begin(self, head: dict[str, Any]) -> None:
        """Start it. ``ChangeError`` if one is open already."""
        if self.lines():
            raise ChangeError("an earlier validation was not rolled back")
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        sync_folder(self.folder.parent)
        self.append({"begin": head, "at": time.time()})

    def do(self, change: dict[str, Any]) -> dict[str, Any]:
        """Make one change."""
        if not self.lines():
            raise ChangeError("nothing was begun")
        self.scratch.mkdir(exist_ok=True)
        self.host.scratch = self.scratch
        kind = str(change["change"])
        prepare, make = CHANGES[kind]
        undo = prepare(self.host, change)  # every check is in here
        self.append({"change": kind, "undo": undo, "at": time.time()})

        # ---- Every check passed, and the way back is on the disk. ----

        answer = make(self.host, change)
        self.host.sync()
        return answer

    def undo(self) -> dict[str, Any]:
        """Take back what was not taken back yet, last first. What fails is told and holds up no other."""
        lines = self.lines()
        done = {line["undone"] for line in lines if "undone" in line}
        failed = []
        if lines:
            # Nobody needs these any more, and on a full disk the way back needs their space.
            for folder in (self.scratch, self.folder / "files"):
                shutil.rmtree(str(folder), ignore_errors=True)
            with contextlib.suppress(OSError):
                self.scratch.mkdir(exist_ok=True)
                self.host.scratch = self.scratch
        for number in reversed(range(len(lines))):
            steps = lines[number].get("undo")
            if steps is None or number in done:
                continue
            try:
                for step in steps:
                    UNDO[step["undo"]](self.host, step)
                self.append({"undone": number, "at": time.time()})
            except (ChangeError, OSError) as error:
                failed.append(f"{lines[number]['change']}: {error}")
        self.host.sync()
        return {"ok": not failed, "failed": failed}

    def end(self) -> dict[str, Any]:
        """Remove it. ``ChangeError`` while something in it is not undone."""
        lines = self.lines()
        done = {line["undone"] for line in lines if "undone" in line}
        left = [n for n, line in enumerate(lines) if "undo" in line and n not in done]
        if left:
            raise ChangeError(f"{len(left)} changes are not undone")
        shutil.rmtree(self.folder, ignore_errors=True)
        self.host.sync()
        return {"ok": True}


def sync_folder(folder: Path) -> None:
    """Have a folder's entries on the disk."""
    fd = os.open(str(folder), os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_file(path: Path, data: bytes, mode: int) -> None:
    """Write a file, whole or not at all."""
    partial = path.with_name("." + path.name + ".tdxhw")
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.chmod(mode)
    partial.replace(path)
    sync_folder(path.parent)


def remove(path: Path) -> None:
    """Remove whatever is there, if anything is."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(str(path))
    elif path.is_symlink() or path.exists():
        path.unlink()


# ---- changes: what to check and how to undo, then the change itself ----


def prepare_write(host: Host, change: dict[str, Any]) -> list[dict[str, Any]]:
    """Keep what is there."""
    path = host.path(change["path"])
    if not path.parent.is_dir():
        raise ChangeError(f"{path.parent}: no such folder")
    partial = {"undo": "remove", "path": str(Path(change["path"]).with_name("." + path.name + ".tdxhw"))}
    if not path.exists():
        return [{"undo": "remove", "path": change["path"]}, partial]
    before = {"undo": "write", "path": change["path"], "mode": path.stat().st_mode & 0o7777}
    return [dict(before, data=base64.b64encode(path.read_bytes()).decode()), partial]


def make_write(host: Host, change: dict[str, Any]) -> dict[str, Any]:
    """Write the file."""
    write_file(host.path(change["path"]), change["text"].encode(), change.get("mode", 0o644))
    return {"ok": True}


def prepare_create(host: Host, change: dict[str, Any]) -> list[dict[str, Any]]:
    """See that nothing is there."""
    for path in change["paths"]:
        there = host.path(path)
        if there.exists() or there.is_symlink():
            raise ChangeError(f"{path} is there already")
    return [{"undo": "remove-all", "path": path, "beside": beside(host.path(path))} for path in change["paths"]]


def beside(path: Path) -> list[str]:
    """Return those files beside it that a program writes before it gives them their name, or keeps the old one in."""
    return [suffix for suffix in BESIDE if path.with_name(path.name + suffix).exists()]


def make_create(host: Host, change: dict[str, Any]) -> dict[str, Any]:
    """Make those that are to be folders."""
    for path in change.get("folders", []):
        host.path(path).mkdir()
    return {"ok": True}


def prepare_link(host: Host, change: dict[str, Any]) -> list[dict[str, Any]]:
    """See that nothing is there."""
    return prepare_create(host, {"paths": [change["path"]]})


def make_link(host: Host, change: dict[str, Any]) -> dict[str, Any]:
    """Make the link."""
    os.symlink(change["target"], str(host.path(change["path"])))  # noqa: PTH211 (Python 3.7 has no other)
    return {"ok": True}


def prepare_keep_links(host: Host, change: dict[str, Any]) -> list[dict[str, Any]]:
    """Note where each link leads. What is there and is no link is nobody's to change."""
    paths = {name: host.path(name) for name in change["paths"]}
    links = {name: os.readlink(str(path)) if path.is_symlink() else "" for name, path in paths.items()}  # noqa: PTH115
    mine = [name for name, path in paths.items() if path.is_symlink() or not path.exists()]
    return [{"undo": "link", "path": name, "target": links[name]} for name in mine]


def make_nothing(host: Host, change: dict[str, Any]) -> dict[str, Any]:  # noqa: ARG001
    """Change nothing."""
    return {"ok": True}


def prepare_nothing(host: Host, change: dict[str, Any]) -> list[dict[str, Any]]:  # noqa: ARG001
    """Leave the way back to the claim of the path."""
    return []


def make_move(host: Host, change: dict[str, Any]) -> dict[str, Any]:
    """Copy the file to its place: the upload may be on another file system."""
    shutil.copyfile(str(host.path(change["source"])), str(host.path(change["path"])))
    return {"ok": True}


def make_unpack(host: Host, change: dict[str, Any]) -> dict[str, Any]:
    """Unpack the members below `below` of the archive, which then are the content of the folder `path`."""
    prefix = change["below"].strip("/") + "/"
    target = host.path(change["path"])
    with tarfile.open(str(host.path(change["source"]))) as tar:
        for member in tar:
            name = os.path.normpath(member.name).lstrip("/")
            if not name.startswith(prefix) or not (member.isfile() or member.isdir() or member.issym()):
                continue
            if ".." in Path(name).parts or (member.issym() and name[len(prefix) :] in ("build", "source")):
                continue
            member.name, member.uid, member.gid = name[len(prefix) :], 0, 0
            tar.extract(member, str(target), set_attrs=False)
    return {"ok": True}


def prepare_command(host: Host, change: dict[str, Any]) -> list[dict[str, Any]]:  # noqa: ARG001
    """Take the command that undoes it from the request; there may be none."""
    return [{"undo": "command", "argv": change["undo"]}] if change.get("undo") else []


def make_command(host: Host, change: dict[str, Any]) -> dict[str, Any]:
    """Run it, if there is something to run."""
    return {"ok": True, "output": host.command(change["argv"], change.get("limit_s", 600.0)) if change["argv"] else ""}


def prepare_packages(host: Host, change: dict[str, Any]) -> list[dict[str, Any]]:
    """Ask apt what it would do. Whatever could not be taken back is refused."""
    plan = host.command(["apt-get", "--simulate", *APT, "install", *change["files"]])
    new = []
    for line in plan.splitlines():
        words = line.split()
        if words[:1] == ["Remv"]:
            raise ChangeError(f"installing it would remove {words[1]} from the host")
        if words[:1] == ["Inst"]:
            if words[2].startswith("["):
                raise ChangeError(
                    f"installing it would replace {words[1]} {words[2].strip('[]')} by {words[3].strip('(')}, "
                    "which cannot be taken back: do that on the host first"
                )
            new.append(words[1])
    missing = sorted(set(new) - set(change["packages"]))
    if missing:
        raise ChangeError(f"it needs {', '.join(missing)}, too: give those packages as well, or install them first")
    if not new:
        raise ChangeError("its packages are installed already")
    states = package_states(host)
    for name in new:
        if states.get(name, "not-installed") != "not-installed":
            raise ChangeError(f"{name} is there as {states[name]}, which could not be had back: dpkg --purge {name}")
    return [{"undo": "purge", "packages": new}]


def package_states(host: Host) -> dict[str, str]:
    """Return what dpkg knows of each package: installed, config-files (removed, not purged), half-installed."""
    known = host.command(["dpkg-query", "-W", "-f", "${Package} ${db:Status-Status}\n"]).split("\n")
    return dict(line.split(" ", 1) for line in known if " " in line)


def alone(host: Host, argv: list[str]) -> str:
    """Run apt-get or dpkg when nobody else does: the timers of apt begin their work right after a boot."""
    waited_s = 0.0
    while True:
        try:
            return host.command(argv, 1800.0)
        except ChangeError as error:
            if not LOCKED.search(str(error)) or waited_s >= LOCK_S:
                raise
        host.wait(5.0)
        waited_s += 5.0


def make_packages(host: Host, change: dict[str, Any]) -> dict[str, Any]:
    """Install them."""
    output = alone(host, ["apt-get", *APT, "install", *change["files"]])
    return {"ok": True, "output": output[-TAIL:]}


APT = ["--quiet=2", "--yes", "--no-install-recommends", "-o", "Dpkg::Options::=--force-confold"]


def grub_environment(host: Host, path: str) -> dict[str, str]:
    """Return GRUB's environment."""
    lines = host.command(["grub-editenv", path, "list"]).splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line)


def prepare_boot_once(host: Host, change: dict[str, Any]) -> list[dict[str, Any]]:
    """Keep what is in the environment. A one-shot entry of somebody else is not overwritten."""
    now = grub_environment(host, change["environment"])
    if now.get("next_entry") not in (None, "", change["entry"]):
        raise ChangeError(f"somebody already chose the entry of the next boot: {now['next_entry']}")
    kept = {name: now.get(name, "") for name in GRUB_ENVIRONMENT if name != "next_entry"}
    return [{"undo": "environment", "path": change["environment"], "values": dict(kept, next_entry="")}]


def make_boot_once(host: Host, change: dict[str, Any]) -> dict[str, Any]:
    """Choose the entry of the next boot."""
    host.command(["grub-editenv", change["environment"], "set", "next_entry=" + change["entry"]])
    return {"ok": grub_environment(host, change["environment"]).get("next_entry") == change["entry"]}


CHANGES = {
    "write": (prepare_write, make_write),
    "create": (prepare_create, make_create),
    "link": (prepare_link, make_link),
    "keep-links": (prepare_keep_links, make_nothing),
    "move": (prepare_nothing, make_move),
    "unpack": (prepare_nothing, make_unpack),
    "command": (prepare_command, make_command),
    "packages": (prepare_packages, make_packages),
    "boot-once": (prepare_boot_once, make_boot_once),
}


# ---- undoing: each may run on what was never done, half done, or undone before ----


def undo_write(host: Host, step: dict[str, Any]) -> None:
    """Write what was there."""
    write_file(host.path(step["path"]), base64.b64decode(step["data"]), step["mode"])


def undo_remove(host: Host, step: dict[str, Any]) -> None:
    """Remove what was not there."""
    remove(host.path(step["path"]))


def undo_remove_all(host: Host, step: dict[str, Any]) -> None:
    """Remove what was not there, with what the program that wrote it has left beside it if it was cut off."""
    path = host.path(step["path"])
    remove(path)
    for suffix in BESIDE:
        if suffix not in step["beside"]:
            remove(path.with_name(path.name + suffix))


def undo_link(host: Host, step: dict[str, Any]) -> None:
    """Have the link lead where it led, or not be there."""
    path = host.path(step["path"])
    if not step["target"]:
        if path.is_symlink():
            path.unlink()
    elif not path.is_symlink() or os.readlink(str(path)) != step["target"]:  # noqa: PTH115
        partial = path.with_name("." + path.name + ".tdxhw")
        remove(partial)
        os.symlink(step["target"], str(partial))  # noqa: PTH211 (Python 3.7 has no other)
        partial.replace(path)


def undo_command(host: Host, step: dict[str, Any]) -> None:
    """Run it."""
    host.command(step["argv"])


def undo_packages(host: Host, step: dict[str, Any]) -> None:
    """Purge the packages, also half unpacked ones; then have dpkg finish what a power cut interrupted."""
    states = package_states(host)
    there = [name for name in step["packages"] if states.get(name.split(":")[0], "not-installed") != "not-installed"]
    if there:
        alone(host, ["dpkg", "--purge", "--force-remove-reinstreq", *there])
    alone(host, ["dpkg", "--configure", "-a"])


def undo_environment(host: Host, step: dict[str, Any]) -> None:
    """Set what was set, and unset the rest."""
    for name, value in sorted(step["values"].items()):
        host.command(["grub-editenv", step["path"], *(["set", name + "=" + value] if value else ["unset", name])])


UNDO = {
    "write": undo_write,
    "remove": undo_remove,
    "remove-all": undo_remove_all,
    "link": undo_link,
    "command": undo_command,
    "purge": undo_packages,
    "environment": undo_environment,
}


def operate(journal: Journal, operation: str, wish: dict[str, Any]) -> dict[str, Any]:
    """Do one operation. A ``ChangeError`` becomes an answer that is not ok."""
    try:
        if operation == "show":
            return {"ok": True, "lines": journal.lines()}
        if operation == "begin":
            journal.begin(wish)
            return {"ok": True}
        if operation == "do":
            return journal.do(wish)
        if operation == "undo":
            return journal.undo()
        if operation == "end":
            return journal.end()
    except ChangeError as error:
        return {"ok": False, "error": " ".join(str(error).split())}
    except OSError as error:
        return {"ok": False, "error": f"{error.filename}: {error.strerror}"}
    raise ValueError(operation)


def main(arguments: list[str]) -> int:
    """Read the command line and the wish. One at a time: the lock is held for the whole operation."""
    folder, operation = Path(arguments[0]), arguments[1]
    if operation == "show":  # changes nothing, so it needs neither the lock nor root
        json.dump(operate(Journal(Host(), folder), operation, {}), sys.stdout)
        return 0
    wish = json.load(sys.stdin) if operation in ("begin", "do") else {}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / "journal.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        json.dump(operate(Journal(Host(), folder), operation, wish), sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
