"""Bring a kernel onto a host without making it what the host boots. Each change can be taken back."""

import shlex
from pathlib import Path
from typing import Final

from tdxhw.validate import grub_menu
from tdxhw.validate.candidate import Candidate
from tdxhw.validate.course import Course
from tdxhw.validate.errors import ChangeFailed
from tdxhw.validate.machine import FOLDER, Machine
from tdxhw.validate.states import Event
from tdxhw.validate.target import GUARD_UNIT, GUARD_WANTED, PIN, Target, guard_script, guard_unit, running_kernel

_PATHS: Final = (
    "/lib/modules/{0}", "/boot/vmlinuz-{0}", "/boot/initrd.img-{0}", "/boot/initramfs-{0}.img", "/boot/config-{0}",
    "/boot/System.map-{0}", "/var/lib/initramfs-tools/{0}",
)  # fmt: skip

_LINKS: Final = tuple(
    f"{folder}/{name}{old}" for folder in ("", "/boot") for name in ("vmlinuz", "initrd.img") for old in ("", ".old")
)
"""Debian's and Ubuntu's packages have these lead to the newest kernel, and on removal guess where they led before."""


def prepare(machine: Machine, course: Course, target: Target, candidate: Candidate, guard_s: int) -> tuple[str, str]:
    """Pin the host's own kernel, install the candidate; return the file names of its image and initial RAM disk.

    ``ChangeFailed`` says which step failed. What was done until then is for the way back to undo.
    """
    _pin(machine, target, candidate)
    course.move(Event.PINNED, f"{target.base.kernel_name} stays what it boots")
    machine.change("create", paths=[path.format(candidate.release) for path in _PATHS])
    if candidate.packages:
        machine.change("keep-links", paths=_LINKS)
        _install_packages(machine, course, candidate)
    else:
        _install_image(machine, course, target, candidate)
    kernel, initrd = _installed(machine, target, candidate)
    _guard(machine, guard_s)
    course.move(Event.INSTALL, f"installed {candidate.release}" + f" with {initrd}" * bool(initrd))
    return kernel, initrd


def _pin(machine: Machine, target: Target, candidate: Candidate) -> None:
    """Name the default, before a package's hooks make the newest kernel it."""
    if not candidate.packages:
        return  # then nothing runs update-grub
    # First in, last undone: the menu is made anew when everything else is back.
    machine.change("command", argv=[], undo=["update-grub"])
    if not target.survey["grub"].get("has_fragments"):
        folder = str(Path(PIN).parent)
        machine.change("create", paths=[folder], folders=[folder])
    text = f"# tdxhw validate: {candidate.release} is on trial.\nGRUB_DEFAULT={shlex.quote(target.base_entry)}\n"
    machine.change("write", path=PIN, text=text)


def _install_packages(machine: Machine, course: Course, candidate: Candidate) -> None:
    files = []
    for package in candidate.packages:
        course.note(f"sending {package.path.name} ({package.path.stat().st_size >> 10} KiB)")
        # Whatever it is called here, apt takes a file for a package by its name.
        files.append(machine.upload(package.path.read_bytes(), f"{package.name}.deb"))
    course.note(f"installing {' '.join(package.name for package in candidate.packages)}")
    names = [package.name for package in candidate.packages]
    machine.change("packages", files=files, packages=names, limit_s=3600)


def _install_image(machine: Machine, course: Course, target: Target, candidate: Candidate) -> None:
    assert candidate.image is not None
    release = candidate.release
    course.note(f"sending {candidate.image.name} ({candidate.image_bytes >> 10} KiB)")
    image = machine.upload(candidate.image.read_bytes(), "image")
    machine.change("move", source=image, path=f"/boot/vmlinuz-{release}")
    if candidate.modules is not None:
        course.note(f"sending {candidate.modules.name}")
        modules = machine.upload(candidate.modules.read_bytes(), "modules.tar")
        machine.change("unpack", source=modules, below=candidate.modules_below, path=f"/lib/modules/{release}")
        machine.change("command", argv=["depmod", release])
    if target.needs_initrd and candidate.gets_initrd:
        course.note("making its initial RAM disk")
        machine.change("command", argv=_initramfs(str(target.survey["initramfs"]), release))


def _initramfs(tool: str, release: str) -> list[str]:
    if tool == "dracut":
        return ["dracut", "--force", f"/boot/initramfs-{release}.img", release]
    return ["update-initramfs", "-c", "-k", release]


def _installed(machine: Machine, target: Target, candidate: Candidate) -> tuple[str, str]:
    """See that the files are there and that the host would still boot its own kernel."""
    survey = machine.survey()
    grub = survey["grub"]
    environment = grub_menu.parse_environment(str(grub["environment"]))
    default = grub_menu.default_entry(str(grub["configuration"]), environment)
    if default.kernel_name != running_kernel(target.survey):
        raise ChangeFailed(
            f"{machine.name}: after the installation it would boot {default.kernel_name!r} by default, "
            f"although {PIN} pins {target.base_entry!r}: what overrides it in /etc/default/grub.d?"
        )
    kernel = f"vmlinuz-{candidate.release}"
    if kernel not in survey["boot_files"]:
        raise ChangeFailed(f"{machine.name}: after the installation there is no /boot/{kernel}")
    if not candidate.gets_initrd:
        return kernel, ""
    initrds = (f"initrd.img-{candidate.release}", f"initramfs-{candidate.release}.img")
    initrd = next((name for name in initrds if name in survey["boot_files"]), "")
    if target.needs_initrd and not initrd:
        raise ChangeFailed(
            f"{machine.name}: nothing made an initial RAM disk for {candidate.release}, and its own kernel boots "
            "with one: does /etc/kernel/postinst.d have initramfs-tools or dracut?"
        )
    return kernel, initrd


def _guard(machine: Machine, limit_s: int) -> None:
    """Have the candidate reboot by itself if nobody reaches it."""
    machine.change("write", path=f"{FOLDER}/guard.sh", text=guard_script(limit_s))
    folder = str(Path(GUARD_WANTED).parent)
    if not machine.is_folder(folder):
        machine.change("create", paths=[folder], folders=[folder])
    machine.change("write", path=GUARD_UNIT, text=guard_unit())
    machine.change("link", path=GUARD_WANTED, target=GUARD_UNIT)
