"""What is refused before a host is touched, and what the entry on trial is made of."""

import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tdxhw.validate.candidate import Candidate, Package
from tdxhw.validate.errors import Refused
from tdxhw.validate.target import check, guard_script, running_kernel
from tests.unit.validate.simulated_debian import MEMORY, OWN
from tests.unit.validate.simulated_lab import NEW, SimulatedLab, SimulatedLink

PACKAGED = Candidate(
    NEW, "", None, (Package("linux-image-new", "1", Path("x.deb")),), installed_bytes=50 << 20, image_bytes=10 << 20,
    upload_bytes=7 << 20,
)  # fmt: skip
WITH_MODULES = Candidate(NEW, "", Path("bzImage"), modules=Path("modules.tar"))
PLAIN = Candidate(NEW, "", Path("bzImage"), installed_bytes=10 << 20, image_bytes=10 << 20, upload_bytes=10 << 20)


@pytest.fixture
def survey() -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        lab = SimulatedLab(Path(folder) / "host")
        found: dict[str, Any] = json.loads(SimulatedLink(lab).python("survey.py", "whole"))
        return found


def grub(**changes: object) -> Callable[[dict[str, Any]], None]:
    return lambda survey: survey["grub"].update(changes)


def host(**changes: object) -> Callable[[dict[str, Any]], None]:
    return lambda survey: survey.update(changes)


def replaced(old: str, new: str) -> Callable[[dict[str, Any]], None]:
    def change(survey: dict[str, Any]) -> None:
        text = survey["grub"]["configuration"]
        assert old in text
        survey["grub"]["configuration"] = text.replace(old, new)

    return change


REFUSALS: list[tuple[Callable[[dict[str, Any]], None], Candidate, str]] = [
    (host(is_root=False), PACKAGED, "needs root"),
    (host(kexec_loaded=True), PACKAGED, "kexec --unload"),
    (host(systemd=False), PACKAGED, "does not run systemd"),
    (host(grub=None, systemd_boot=True), PACKAGED, "boots with systemd-boot"),
    (host(grub=None), PACKAGED, "no boot loader that is known here"),
    (grub(environment=None), PACKAGED, "install grub-common"),
    (grub(abstraction="lvm"), PACKAGED, "is on lvm, where GRUB cannot write"),
    (grub(filesystem="btrfs"), PACKAGED, "is on btrfs, where GRUB cannot write"),
    (replaced("save_env next_entry", ""), PACKAGED, "grub-reboot has no effect"),
    (replaced("custom.cfg", "else.cfg"), PACKAGED, "does not read custom.cfg"),
    (replaced("set default", "set timeout=-1\n   set default"), PACKAGED, "waits in its menu until somebody chooses"),
    (replaced("set default", 'set superusers="root"\nset default'), PACKAGED, "would ask for a password"),
    (host(firmware_s=412.3), PACKAGED, "its firmware alone took 412 s at its last boot: --boot-limit 840, for example"),
    (grub(environment="next_entry=memtest\n"), PACKAGED, "the next boot is taken: memtest"),
    (host(cmdline="BOOT_IMAGE=/boot/vmlinuz-5.0 ro"), PACKAGED, "runs vmlinuz-5.0, but would boot"),
    (host(machine="aarch64"), PACKAGED, "is aarch64, and the kernel is x86_64"),
    (host(release=NEW), PACKAGED, "another LOCALVERSION"),
    (host(module_folders=[NEW]), PLAIN, "installed already"),
    (host(boot_files=[f"vmlinuz-{NEW}"]), PLAIN, "installed already"),
    (replaced("set default", "blscfg\nset default"), PACKAGED, "reads entries of /boot/loader"),
    (host(secure_boot=True), PACKAGED, "Secure Boot is on"),
    (host(dpkg_architecture=None), PACKAGED, "give a bzImage and --modules"),
    (grub(reads_fragments=False), PACKAGED, "the default cannot be pinned"),
    (grub(has_update_grub=False), PACKAGED, "or no update-grub"),
    (host(root=None), PLAIN, "its root file system is on no plain partition"),
    (host(root=None), replace(PACKAGED, reads_initrd=False), "build it with CONFIG_BLK_DEV_INITRD"),
    (host(initramfs=None), WITH_MODULES, "neither update-initramfs nor dracut"),
    (host(initramfs=None), PACKAGED, "neither update-initramfs nor dracut"),
    (host(root_free=100 << 20), PACKAGED, "/usr/lib/modules has 100 MiB free; the kernel may need 537 MiB"),
    (host(boot_free=100 << 20, boot_is_root=False), PACKAGED, "/boot has 100 MiB free; the kernel may need 170 MiB"),
    (host(boot_free=9 << 20, boot_is_root=False), PLAIN, "/boot has 9 MiB free; the kernel may need 10 MiB"),
    (host(var_free=300 << 20, var_is_root=False), PACKAGED, "/var/lib has 300 MiB free; the kernel may need 327 MiB"),
    (host(var_free=5 << 20, var_is_root=False), PLAIN, "/var/lib has 5 MiB free; the kernel may need 10 MiB"),
]


@pytest.mark.parametrize(("spoil", "candidate", "told"), REFUSALS, ids=[told for _, _, told in REFUSALS])
def test_refuses(
    survey: dict[str, Any], spoil: Callable[[dict[str, Any]], None], candidate: Candidate, told: str
) -> None:
    spoil(survey)
    with pytest.raises(Refused) as error:
        check("vm", survey, candidate, 300)
    assert told in str(error.value)
    assert str(error.value).startswith("vm: ")


@pytest.mark.parametrize("candidate", [PACKAGED, PLAIN])
def test_a_host_that_is_fit_is_a_target(survey: dict[str, Any], candidate: Candidate) -> None:
    target = check("vm", survey, candidate, 300)
    assert target.base_entry == f"more>linux-{OWN}"
    assert target.needs_initrd


def test_a_small_boot_partition_will_do_for_a_kernel_that_gets_no_initial_ram_disk(survey: dict[str, Any]) -> None:
    survey |= {"boot_free": 20 << 20, "boot_is_root": False, "var_free": 20 << 20, "var_is_root": False}
    assert check("vm", survey, PLAIN, 300).needs_initrd, "the host's own kernel has one"


def test_a_limit_that_leaves_time_to_boot_will_do(survey: dict[str, Any]) -> None:
    survey["firmware_s"] = 412.3
    assert check("vm", survey, PLAIN, 840).needs_initrd
    survey["firmware_s"] = 45.0
    assert check("vm", survey, PLAIN, 110).needs_initrd
    del survey["firmware_s"]
    assert check("vm", survey, PLAIN, 20).needs_initrd, "it is not known"


def test_what_is_in_the_custom_menu_stays(survey: dict[str, Any]) -> None:
    survey["grub"]["custom"] = "menuentry 'mine' {\n}"
    menu = check("vm", survey, PLAIN, 300).custom_menu("vmlinuz-new", "", "panic=1")
    assert menu.startswith("menuentry 'mine' {\n}\nmenuentry 'Kernel on trial")


def test_a_watchdog_is_armed_where_there_is_one(survey: dict[str, Any]) -> None:
    assert check("vm", survey, PLAIN, 300).rescue_arguments(7) == "panic=7"
    survey["watchdogs"] = ["watchdog0"]
    assert check("vm", survey, PLAIN, 300).rescue_arguments(7) == "panic=7 systemd.watchdog_sec=60"


@pytest.mark.parametrize(
    ("cmdline", "kernel"),
    [
        ("BOOT_IMAGE=/boot/vmlinuz-6.1 ro", "vmlinuz-6.1"),
        ("BOOT_IMAGE=(hd0,gpt2)/vmlinuz-6.1 ro", "vmlinuz-6.1"),
        ("ro quiet", f"vmlinuz-{OWN}"),
    ],
)
def test_the_running_kernel_is_the_one_that_grub_loaded(cmdline: str, kernel: str) -> None:
    assert running_kernel({"cmdline": cmdline, "release": OWN}) == kernel


def test_the_guard_is_a_shell_script_that_waits_for_its_limit() -> None:
    import subprocess

    done = subprocess.run(["sh", "-n"], input=guard_script(90), text=True, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "-ge 90" in guard_script(90)
