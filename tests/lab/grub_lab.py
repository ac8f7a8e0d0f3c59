"""A lab of one machine that boots through GRUB, from a snapshot that is made once."""

import fcntl
import hashlib
import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from tdxhw.lab import inventory
from tdxhw.lab.connection import Session
from tdxhw.lab.errors import LabUnreachable
from tests.lab import grub_image, grub_machine
from tests.lab.grub_machine import SNAPSHOT, GrubMachine
from tests.lab.vm_image import ROOT, Image

BOOT_LIMIT_S: Final = 300.0
"""For tests: a boot takes 25 s on an idle machine of ours, and 90 s on a busy one [s]."""


class GrubLab:
    """Lab files, keys and the machine, which is at the snapshot when this is made."""

    def __init__(self, folder: Path, image: Image, *, power: bool = True) -> None:
        self.image = image
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.machine = GrubMachine.describe(folder)
        self.labs = folder / "labs"
        self.labs.mkdir(exist_ok=True)
        self.ssh_config = folder / "ssh_config"
        self.ssh_config.write_text(f"Host *\n  IdentityFile {image.client_key}\n  IdentitiesOnly yes\n")
        (self.labs / "known_hosts").write_text(f"[127.0.0.1]:{self.machine.port} {image.host_key}\n")
        self.describe(power=power)

    def describe(self, *, power: bool = True, console: bool = True) -> None:
        """Write the lab file."""
        button = [sys.executable, "-m", "tests.lab.grub_machine", str(self.folder)]
        host: dict[str, object] = {
            "name": "vm", "ssh": f"ssh://root@127.0.0.1:{self.machine.port}", "promises": ["kvm"],
        }  # fmt: skip
        if power:
            # Its module is found from the root of the sources, wherever tdxhw runs.
            head = ["env", "-C", str(ROOT), *button]
            host["power"] = {"driver": "command"} | {name: [*head, name] for name in ("on", "off", "reset", "status")}
        if console:
            follow = ["tail", "-n", "0", "-F", str(self.machine.console)]
            host["console"] = {"driver": "command", "argv": follow}
        (self.labs / "vm.yaml").write_text(json.dumps({"host": host}))

    def connect(self) -> Session:
        return Session.open(inventory.load(self.labs).host("vm"), self.labs, ssh_config=self.ssh_config)

    def check(self, command: str) -> str:
        """Run a command on the machine."""
        with self.connect() as session:
            return session.check(command)

    @property
    def is_up(self) -> Callable[[], bool]:
        """Whether one can log in and the boot is over. QEMU accepts connections before there is a guest."""

        def ask() -> bool:
            try:
                self.check("systemctl is-system-running --wait >/dev/null || :")
            except LabUnreachable:
                return False
            return True

        return ask

    def to_snapshot(self) -> None:
        """Put the machine back to where it was when the snapshot was made, disk and all."""
        self.machine.kill()
        self.machine.console.unlink(missing_ok=True)
        shutil.copy(warm_disk(self.image), self.machine.disk)
        self.machine.start(snapshot=SNAPSHOT)
        self.machine.wait_until(self.is_up, limit_s=60)
        self.check(f"date -s @{time.time():.0f}")  # its clock still shows the time of the snapshot


def warm_disk(image: Image) -> Path:
    """Return the disk with the snapshot; boot it twice if it is not in the cache: the second time by its own menu."""
    recipe = b"".join(Path(str(module.__file__)).read_bytes() for module in (grub_image, grub_machine))
    disk = image.folder / f"warm-{hashlib.sha256(recipe).hexdigest()[:16]}.qcow2"
    with (image.folder / "warming.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # who comes second finds it done
        if not disk.exists():
            _warm(image, disk)
    return disk


def _warm(image: Image, disk: Path) -> None:
    folder = image.folder / "warming"
    shutil.rmtree(folder, ignore_errors=True)
    lab = GrubLab(folder, image)
    try:
        shutil.copy(image.disk, lab.machine.disk)
        lab.machine.start()
        lab.machine.wait_until(lab.is_up, limit_s=400)
        lab.check("update-grub && sync")
        boot_id = "cat /proc/sys/kernel/random/boot_id"
        before = lab.check(boot_id)
        lab.check("nohup sh -c 'sleep 1; reboot' >/dev/null 2>&1 &")
        time.sleep(5)
        lab.machine.wait_until(lambda: lab.is_up() and lab.check(boot_id) != before, limit_s=400)
        assert "root=UUID=" in lab.check("cat /proc/cmdline"), "it came up by its own menu"
        lab.machine.save()
        lab.machine.disk.rename(disk)
    finally:
        lab.machine.kill()
        shutil.rmtree(folder, ignore_errors=True)
