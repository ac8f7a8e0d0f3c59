"""A `GrubMachine` whose kernel QEMU loads itself: on its console within seconds, which is what BMCs are tested with."""

import json
import subprocess
from pathlib import Path
from typing import Final, Self

from tests.lab.grub_machine import GrubMachine
from tests.lab.vm_image import Image

_COMMAND_LINE: Final = "root=/dev/vda rw console=ttyS0 panic=5 net.ifnames=0 mitigations=off"
PANICS_AT_BOOT: Final = "init=/bin/false"


class KernelMachine(GrubMachine):
    """Has the buttons and the serial console of a `GrubMachine`."""

    @classmethod
    def make(cls, folder: Path, image: Image, more: str = "") -> Self:
        """Make a machine that is off, with a disk of its own on top of the image's, and `more` on its command line."""
        folder.mkdir(parents=True, exist_ok=True)
        cls.describe(folder)
        machine = cls(folder)
        words = ["-kernel", str(image.kernel), "-initrd", str(image.initrd), "-append", f"{_COMMAND_LINE} {more}"]
        (folder / "kernel.json").write_text(json.dumps(words))
        overlay = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(image.disk), "-F", "qcow2", str(machine.disk)]
        subprocess.run(overlay, check=True, timeout=60)
        return machine

    @property
    def argv(self) -> list[str]:
        """QEMU's command line, with the kernel."""
        return [*super().argv, *json.loads((self.folder / "kernel.json").read_text())]
