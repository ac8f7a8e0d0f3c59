"""The menu entry of a kernel on trial, in a real GRUB: it boots that kernel, or else the host's own. It never waits."""

import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tdxhw.validate import grub_menu
from tests.lab import grub_image, virtual_machine
from tests.lab.missing import skip_or_fail
from tests.lab.virtual_machine import QEMU
from tests.lab.vm_image import Image, run

pytestmark = pytest.mark.timeout(600)
SERIAL = "serial --speed=115200\nterminal_input serial\nterminal_output serial\n"
PARTITION = "?offset=1048576"


class Disk:
    """A copy of the lab's disk that is changed while nothing runs on it."""

    def __init__(self, image: Image, folder: Path) -> None:
        self.path = folder / "disk.raw"
        self.serial = folder / "serial"
        run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", image.disk, self.path)
        listing = self._debugfs("ls -p /boot")
        (name,) = (line.split("/")[5] for line in listing.splitlines() if "/vmlinuz-" in line)
        self.release = name.removeprefix("vmlinuz-")

    def _debugfs(self, command: str) -> str:
        argv = [shutil.which("debugfs", path="/usr/sbin:/sbin:/usr/bin") or "debugfs", "-w", "-R", command]
        done = subprocess.run([*argv, f"{self.path}{PARTITION}"], capture_output=True, text=True, check=True)
        return done.stdout

    def write(self, name: str, data: bytes) -> None:
        source = self.path.with_name("content")
        source.write_bytes(data)
        self._debugfs(f"rm {name}")
        self._debugfs(f"write {source} {name}")

    def read(self, name: str) -> bytes:
        target = self.path.with_name("content")
        self._debugfs(f"dump {name} {target}")
        return target.read_bytes()

    def boot_until(self, is_seen: Callable[[str], bool], limit_s: float) -> str:
        """Boot it; return what its serial line said when that is seen."""
        argv = [
            QEMU, "-machine", "q35,sata=off", "-accel", "tcg", "-cpu", "max", "-m", "1024", "-nodefaults",
            "-no-user-config", "-display", "none", "-serial", f"file:{self.serial}",
            "-drive", f"file={self.path},if=virtio,format=raw,cache=unsafe",
        ]  # fmt: skip
        with subprocess.Popen(argv, stdin=subprocess.DEVNULL) as process:
            try:
                until = time.monotonic() + limit_s
                while not is_seen(said := self.serial.read_text(errors="replace") if self.serial.exists() else ""):
                    assert time.monotonic() < until, said[-2000:]
                    time.sleep(0.2)
                return said
            finally:
                process.kill()


@pytest.fixture(scope="module")
def image() -> Image:
    if reason := virtual_machine.why_impossible():
        skip_or_fail(reason)
    return grub_image.build()


@pytest.fixture
def disk(image: Image, tmp_path: Path) -> Iterator[Disk]:
    disk = Disk(image, tmp_path)
    yield disk
    disk.path.unlink()


def boot(disk: Disk, kernel: str, initrd: str) -> str:
    """Boot the entry for a kernel; return the command line that Linux says it was booted with."""
    own = f"linux /boot/vmlinuz-{disk.release} root=/dev/vda1 ro console=ttyS0\ninitrd /boot/initrd.img-{disk.release}"
    (base,) = grub_menu.parse(f"menuentry 'own' --id own {{\n{own}\n}}\n")
    entry = grub_menu.candidate_entry(base, kernel, initrd, "panic=1 tdxhw.validate=x")
    menu = f"{SERIAL}{entry}set default={grub_menu.CANDIDATE}\nset timeout=0\n"
    disk.write("/boot/grub/grub.cfg", menu.encode())
    said = disk.boot_until(lambda text: "Command line: " in text and "\n" in text.partition("Command line: ")[2], 300)
    return said.partition("Command line: ")[2].splitlines()[0].strip()


def test_the_kernel_on_trial_is_booted_with_what_it_is_to_be_tried_with(disk: Disk) -> None:
    disk.write("/boot/vmlinuz-new", disk.read(f"/boot/vmlinuz-{disk.release}"))
    command_line = boot(disk, "vmlinuz-new", f"initrd.img-{disk.release}")
    assert command_line == "BOOT_IMAGE=/boot/vmlinuz-new root=/dev/vda1 ro console=ttyS0 panic=1 tdxhw.validate=x"


@pytest.mark.parametrize(
    ("kernel", "initrd", "complaint"),
    [
        ("vmlinuz-broken", "", "invalid magic number"),
        ("vmlinuz-that-is-not-there", "", "not found"),
        ("vmlinuz-new", "initrd-that-is-not-there", ""),
    ],
)
def test_what_cannot_be_loaded_boots_the_host_s_own_kernel(
    disk: Disk, kernel: str, initrd: str, complaint: str
) -> None:
    disk.write("/boot/vmlinuz-broken", b"\xaa" * 100_000)
    disk.write("/boot/vmlinuz-new", disk.read(f"/boot/vmlinuz-{disk.release}"))
    command_line = boot(disk, kernel, initrd)
    assert command_line == f"BOOT_IMAGE=/boot/vmlinuz-{disk.release} root=/dev/vda1 ro console=ttyS0"
    assert complaint in disk.serial.read_text(errors="replace")
