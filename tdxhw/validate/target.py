"""Whether a host can be given a kernel for one boot, and be had back. All of it is checked before it is touched."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Final

from tdxhw.validate import grub_menu
from tdxhw.validate.candidate import Candidate
from tdxhw.validate.errors import Refused
from tdxhw.validate.machine import FOLDER

PLAIN_FILE_SYSTEMS: Final = ("ext2", "fat", "xfs", "jfs")
"""On these GRUB overwrites its environment in place, which is what makes a boot-once entry once."""

PIN: Final = "/etc/default/grub.d/zz-tdxhw-validate.cfg"
GUARD_UNIT: Final = "/etc/systemd/system/tdxhw-validate-guard.service"
GUARD_WANTED: Final = "/etc/systemd/system/sysinit.target.wants/tdxhw-validate-guard.service"
_INITRD_BYTES: Final = 160 << 20  # a generic initial RAM disk [bytes]
_UNPACKED_INITRD_BYTES: Final = 2 * _INITRD_BYTES  # while it is made
_WATCHDOG_S: Final = 60
_SHORTEST_BOOT_S: Final = 60.0  # what a boot takes besides the firmware, shutting down included


@dataclass(frozen=True, slots=True)
class Target:
    """A host that passed every check."""

    survey: Mapping[str, Any]
    base_entry: str  # as GRUB_DEFAULT takes it
    base: grub_menu.Entry

    @property
    def grub_folder(self) -> str:
        """Where GRUB keeps its files."""
        return str(self.survey["grub"]["folder"])

    @property
    def needs_initrd(self) -> bool:
        """Whether the host's own kernel boots with an initial RAM disk."""
        return bool(self.base.initrds)

    def custom_menu(self, kernel: str, initrd: str, append: str) -> str:
        """Return ``custom.cfg`` with the entry on trial after what is in it already."""
        before = str(self.survey["grub"].get("custom") or "")
        head = before + "\n" * (bool(before) and not before.endswith("\n"))
        return head + grub_menu.candidate_entry(self.base, kernel, initrd, append, str(self.survey.get("root", "")))

    def rescue_arguments(self, panic_s: int) -> str:
        """Return what on its command line brings a dead kernel's host back."""
        # With a watchdog device: systemd feeds it from its start on, so a kernel that hangs later is reset.
        watchdog = f" systemd.watchdog_sec={_WATCHDOG_S}" if self.survey.get("watchdogs") else ""
        return f"panic={panic_s}{watchdog}"


def guard_unit() -> str:
    """Return the systemd unit that reboots a candidate nobody reaches: one without network, for example."""
    return f"""\
[Unit]
Description=Reboot unless tdxhw confirms this boot
ConditionKernelCommandLine=tdxhw.validate
DefaultDependencies=no
RequiresMountsFor={FOLDER}
After=local-fs.target

[Service]
ExecStart=/bin/sh {FOLDER}/guard.sh
"""


def guard_script(limit_s: int) -> str:
    """Return what the unit runs. It leaves behind how far the kernel came, and its log."""
    log = f"{FOLDER}/guard.log"
    return f"""\
# Written by `tdxhw validate`: who confirms a boot makes /run/tdxhw-validate-confirmed.
echo "up $(uname -r) $(cat /proc/sys/kernel/random/boot_id)" >{log}
sync {log}
until [ -e /run/tdxhw-validate-confirmed ]; do
    if [ "$(cut -d. -f1 /proc/uptime)" -ge {limit_s} ]; then
        {{ echo unconfirmed; ip -brief address; echo; dmesg | tail -n 200; }} >>{log} 2>&1
        sync
        SYSTEMCTL_SKIP_AUTO_KEXEC=1 systemctl reboot --force
        sleep 30
        echo b >/proc/sysrq-trigger
    fi
    sleep 1
done
"""


def check(name: str, survey: Mapping[str, Any], candidate: Candidate, boot_limit_s: float) -> Target:
    """Return the target. ``Refused`` says in one line what is in the way, and what to do about it."""
    _check_host(name, survey)
    _check_limit(name, survey, boot_limit_s)
    base_entry, base = _check_boot_loader(name, survey)
    _check_candidate(name, survey, candidate, base)
    return Target(survey, base_entry, base)


def _check_host(name: str, survey: Mapping[str, Any]) -> None:
    if not survey.get("is_root"):
        raise Refused(f"{name}: installing a kernel needs root: `ssh: root@…` in its lab file")
    if survey.get("kexec_loaded"):
        raise Refused(f"{name}: has a kexec kernel loaded, so a reboot may not pass its boot loader: kexec --unload")
    if not survey.get("systemd"):
        raise Refused(f"{name}: does not run systemd; nothing would bring back a candidate that has no network")


def _check_limit(name: str, survey: Mapping[str, Any], boot_limit_s: float) -> None:
    """Refuse a limit within which no kernel can boot: each boot would be ended by power control, and none succeed."""
    firmware_s = survey.get("firmware_s")
    if firmware_s and firmware_s + _SHORTEST_BOOT_S > boot_limit_s:
        enough = math.ceil((1.5 * firmware_s + 3 * _SHORTEST_BOOT_S) / 60) * 60
        raise Refused(
            f"{name}: its firmware alone took {firmware_s:.0f} s at its last boot: --boot-limit {enough}, for example"
        )


def _check_boot_loader(name: str, survey: Mapping[str, Any]) -> tuple[str, grub_menu.Entry]:
    grub = survey.get("grub")
    if grub is None:
        other = "systemd-boot" if survey.get("systemd_boot") else "no boot loader that is known here"
        raise Refused(
            f"{name}: boots with {other}; a kernel for one boot needs GRUB 2 with /boot/grub/grub.cfg (Fedora's and "
            "openSUSE's /boot/grub2 is not supported)"
        )
    if grub.get("environment") is None or grub.get("filesystem") is None:
        raise Refused(f"{name}: grub-editenv or grub-probe is missing or fails: install grub-common")
    if grub["abstraction"] or grub["filesystem"] not in PLAIN_FILE_SYSTEMS:
        on = grub["abstraction"] or grub["filesystem"]
        raise Refused(
            f"{name}: {grub['folder']} is on {on}, where GRUB cannot write: an entry for one boot would boot for ever; "
            "it has to be on a plain partition"
        )
    configuration = str(grub["configuration"])
    if "blscfg" in configuration:
        raise Refused(f"{name}: its GRUB reads entries of /boot/loader (blscfg), which is not supported")
    if not grub_menu.one_shot_works(configuration):
        raise Refused(f"{name}: its grub.cfg does not read next_entry, so grub-reboot has no effect: run update-grub")
    if not grub_menu.reads_custom(configuration):
        raise Refused(f"{name}: its grub.cfg does not read custom.cfg: have /etc/grub.d/41_custom, run update-grub")
    if grub_menu.waits_for_ever(configuration):
        raise Refused(
            f"{name}: its GRUB waits in its menu until somebody chooses: set GRUB_TIMEOUT (and on Ubuntu "
            "GRUB_RECORDFAIL_TIMEOUT) to some seconds in /etc/default/grub, run update-grub"
        )
    if grub_menu.asks_for_a_password(configuration):
        raise Refused(f"{name}: its GRUB has superusers, and would ask for a password before it boots a new entry")
    environment = grub_menu.parse_environment(str(grub["environment"]))
    if environment.get("next_entry"):
        raise Refused(f"{name}: the next boot is taken: {environment['next_entry']}; grub-editenv - unset next_entry")
    default = grub_menu.default_entry(configuration, environment)
    running = running_kernel(survey)
    if default.kernel_name != running:
        raise Refused(
            f"{name}: runs {running}, but would boot {default.kernel_name or default.title!r} by default: reboot it, "
            "or make what it runs the default, so that there is a way back"
        )
    return grub_menu.path_to(configuration, running)


def running_kernel(survey: Mapping[str, Any]) -> str:
    """Return the file name of the kernel that runs: GRUB says it on the command line."""
    words = str(survey.get("cmdline", "")).split()
    image = next((word.partition("=")[2] for word in words if word.startswith("BOOT_IMAGE=")), "")
    return PurePosixPath(image.rpartition(")")[2]).name or f"vmlinuz-{survey['release']}"


def _check_candidate(name: str, survey: Mapping[str, Any], candidate: Candidate, base: grub_menu.Entry) -> None:
    release = candidate.release
    if survey.get("machine") != "x86_64":
        raise Refused(f"{name}: is {survey.get('machine')}, and the kernel is x86_64")
    if release == survey["release"]:
        raise Refused(
            f"{name}: runs a kernel called {release} itself; build with another LOCALVERSION, so that they can be told "
            "apart and installed side by side"
        )
    if f"vmlinuz-{release}" in survey["boot_files"] or release in survey["module_folders"]:
        raise Refused(f"{name}: has {release} installed already; remove it, or build with another LOCALVERSION")
    if survey.get("secure_boot") and not candidate.is_signed:
        raise Refused(f"{name}: Secure Boot is on, and the kernel is not signed: sign it, or switch that off")
    if candidate.packages:
        if survey.get("dpkg_architecture") != "amd64":
            raise Refused(f"{name}: is no Debian amd64 host: give a bzImage and --modules")
        if not survey["grub"].get("reads_fragments") or not survey["grub"].get("has_update_grub"):
            raise Refused(
                f"{name}: has no grub-mkconfig that reads /etc/default/grub.d, or no update-grub, so the default "
                "cannot be pinned"
            )
    if base.initrds and not candidate.gets_initrd and survey.get("root") is None:
        raise Refused(
            f"{name}: its root file system is on no plain partition, and the kernel has no initial RAM disk to find it "
            "with: give --modules, and build it with CONFIG_BLK_DEV_INITRD"
        )
    if base.initrds and candidate.gets_initrd and survey.get("initramfs") is None:
        raise Refused(f"{name}: boots with an initial RAM disk, and has neither update-initramfs nor dracut")
    _check_space(name, survey, candidate, base)


def _check_space(name: str, survey: Mapping[str, Any], candidate: Candidate, base: grub_menu.Entry) -> None:
    """Refuse a host on which it would not fit: a full disk is what packages' scripts are worst at."""
    gets_initrd = bool(base.initrds) and candidate.gets_initrd
    wanted = {
        "/usr/lib/modules": candidate.installed_bytes - candidate.image_bytes,
        "/boot": candidate.image_bytes + _INITRD_BYTES * gets_initrd,
        "/var/lib": candidate.upload_bytes + _UNPACKED_INITRD_BYTES * gets_initrd,
    }
    free = {"/usr/lib/modules": survey["root_free"], "/boot": survey["boot_free"], "/var/lib": survey["var_free"]}
    for folder, is_root in (("/boot", survey["boot_is_root"]), ("/var/lib", survey["var_is_root"])):
        if is_root:  # what is free there is the same space
            wanted["/usr/lib/modules"] += wanted.pop(folder)
    for folder, needed in wanted.items():
        if free[folder] < needed:
            raise Refused(f"{name}: {folder} has {free[folder] >> 20} MiB free; the kernel may need {needed >> 20} MiB")
