"""Say what a lab host is and how it boots, without changing anything.

Usage: ``survey.py brief|whole``: one JSON object out. ``brief`` is what tells one boot from another; ``whole`` adds
what a validation could change, so that before and after can be compared. What cannot be read is absent.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

GRUB = "/boot/grub"
BUILD_ID = 3  # NT_GNU_BUILD_ID
STAMP = re.compile(r"^\[ *[0-9.]+\] ")


def text(path: str) -> str | None:
    """Return a file's text, None if it cannot be read."""
    try:
        return Path(path).read_bytes().decode("utf-8", "replace").rstrip("\n\0")
    except OSError:
        return None


def said(*argv: str) -> str | None:
    """Return what a program prints, None if there is no such program or it fails."""
    path = os.environ.get("PATH", "/usr/bin:/bin") + ":/usr/sbin:/sbin"
    program = shutil.which(argv[0], path=path)
    if program is None:
        return None
    try:
        done = subprocess.run(
            [program, *argv[1:]], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            timeout=30, check=False, env=dict(os.environ, LC_ALL="C", PATH=path),
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode("utf-8", "replace").rstrip("\n") if done.returncode == 0 else None


def content(folder: str) -> list[Path]:
    """Return what is in a folder; nothing if there is none (a kernel may have no modules)."""
    try:
        return sorted(Path(folder).iterdir())
    except OSError:
        return []


def build_id() -> str | None:
    """Return the running kernel's GNU build id, in hexadecimal."""
    try:
        notes = Path("/sys/kernel/notes").read_bytes()
    except OSError:
        return None
    at = 0
    while at + 12 <= len(notes):
        name_size, size, kind = struct.unpack_from("<III", notes, at)
        start = at + 12 + (name_size + 3 & ~3)
        if kind == BUILD_ID and notes[at + 12 : at + 12 + name_size] == b"GNU\0":
            return notes[start : start + size].hex()
        at = start + (size + 3 & ~3)
    return None


def brief() -> dict[str, Any]:
    """Return what tells one boot from another."""
    return {
        "release": platform.release(),
        "build_id": build_id(),
        "boot_id": text("/proc/sys/kernel/random/boot_id"),
        "cmdline": text("/proc/cmdline"),
    }


def parameters() -> dict[str, str]:
    """Return the parameters of the modules that matter here."""
    found = {}
    for module in ("kvm", "kvm_intel", "kvm_amd", "tdx"):
        for path in sorted(Path("/sys/module", module, "parameters").glob("*")):
            value = text(str(path))
            if value is not None:
                found[f"{module}.{path.name}"] = value
    return found


def misc_cgroup(name: str) -> int | None:
    """Return how many HKIDs the misc cgroup knows or has given out, None where it does not count them."""
    for line in (text(f"/sys/fs/cgroup/misc.{name}") or "").splitlines():
        words = line.split()
        if words[:1] == ["tdx"] and words[-1].isdecimal():
            return int(words[-1])
    return None


def kernel_links() -> list[str]:
    """Return where the links to the default kernel lead, which a package's scripts change."""
    found = [path for path in [*content("/"), *content("/boot")] if path.is_symlink()]
    kernels = [path for path in found if path.name.startswith(("vmlinuz", "initrd.img"))]
    return sorted(f"{path} -> {os.readlink(str(path))}" for path in kernels)  # noqa: PTH115 (Python 3.7 has no other)


def memory_kib() -> int | None:
    """Return MemTotal [KiB]: what the TDX module's metadata takes is missing from it."""
    found = re.search(r"^MemTotal: +(\d+) kB", text("/proc/meminfo") or "", re.MULTILINE)
    return int(found[1]) if found else None


def secure_boot() -> bool:
    """Whether the firmware starts only what is signed."""
    for path in Path("/sys/firmware/efi/efivars").glob("SecureBoot-*"):
        try:
            return path.read_bytes()[-1:] == b"\1"  # after four bytes of attributes
        except OSError:
            continue
    return False


def firmware_s() -> float | None:
    """Return how long the firmware took at the last boot [s]: Documentation/ABI/testing/sysfs-firmware-acpi."""
    found = text("/sys/firmware/acpi/fpdt/boot/bootloader_launch_ns") or ""
    return int(found) / 1e9 if found.isdecimal() and int(found) else None


def root() -> str | None:
    """Return what a kernel without an initial RAM disk finds the root file system by; None if it could not."""
    source = said("findmnt", "--noheadings", "--output", "SOURCE", "--nofsroot", "/") or ""
    partition = said("lsblk", "--noheadings", "--nodeps", "--output", "PARTUUID", source) if source else None
    return f"root=PARTUUID={partition.strip()}" if partition and partition.strip() else None


def grub() -> dict[str, Any] | None:
    """Return GRUB's configuration, None without one."""
    configuration = text(f"{GRUB}/grub.cfg")
    if configuration is None:
        return None
    mkconfig = shutil.which("grub-mkconfig", path="/usr/sbin:/sbin:/usr/bin:/bin")
    return {
        "folder": GRUB,
        "configuration": configuration,
        "custom": text(f"{GRUB}/custom.cfg"),
        "environment": said("grub-editenv", f"{GRUB}/grubenv", "list"),
        # GRUB writes a plain file of a plain file system only: not through LVM, RAID, encryption, btrfs or ZFS.
        "abstraction": said("grub-probe", "--target=abstraction", GRUB),
        "filesystem": said("grub-probe", "--target=fs", GRUB),
        "reads_fragments": mkconfig is not None and "default/grub.d" in (text(mkconfig) or ""),
        "has_fragments": Path("/etc/default/grub.d").is_dir(),
        "has_update_grub": shutil.which("update-grub", path="/usr/sbin:/sbin:/usr/bin:/bin") is not None,
    }


def whole() -> dict[str, Any]:
    """Return everything that a validation looks at or could change."""
    modules = [line.split()[0] for line in (text("/proc/modules") or "").splitlines()]
    dmesg = (said("dmesg") or "").splitlines()
    boot = grub()
    state = dict(
        brief(),
        machine=platform.machine(),
        is_root=os.geteuid() == 0,
        systemd=Path("/run/systemd/system").is_dir(),
        root=root(),
        firmware_s=firmware_s(),
        secure_boot=secure_boot(),
        kexec_loaded=text("/sys/kernel/kexec_loaded") == "1",
        watchdogs=sorted(path.name for path in Path("/dev").glob("watchdog[0-9]*")),
        boot_free=shutil.disk_usage("/boot").free,
        root_free=shutil.disk_usage("/usr/lib").free,
        var_free=shutil.disk_usage("/var/lib").free,
        var_is_root=Path("/var/lib").stat().st_dev == Path("/usr/lib").stat().st_dev,
        boot_is_root=Path("/boot").stat().st_dev == Path("/usr/lib").stat().st_dev,
        boot_files=[path.name for path in content("/boot") if path.is_file()],
        kernel_links=kernel_links(),
        module_folders=[path.name for path in content("/lib/modules") if path.is_dir()],
        initramfs=next((tool for tool in ("update-initramfs", "dracut") if said(tool, "--help") is not None), None),
        dpkg_architecture=said("dpkg", "--print-architecture"),
        packages=said("dpkg-query", "-W", "-f", "${Package} ${Version} ${db:Status-Status}\\n"),
        parameters=parameters(),
        tainted=int(text("/proc/sys/kernel/tainted") or 0),
        modules=sorted(modules),
        hkids=misc_cgroup("capacity"),
        hkids_used=misc_cgroup("current"),
        memory_kib=memory_kib(),
        tdx_log=[STAMP.sub("", line) for line in dmesg if "virt/tdx:" in line],
        grub=boot,
        grub_digest=hashlib.sha256(boot["configuration"].encode()).hexdigest() if boot else None,
        systemd_boot=said("bootctl", "is-installed") == "yes",
    )
    return {name: value for name, value in state.items() if value is not None}


def main(arguments: list[str]) -> int:
    """Read the command line."""
    json.dump(whole() if arguments == ["whole"] else brief(), sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
