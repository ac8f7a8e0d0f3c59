"""A real virtual machine under software emulation: a Debian kernel with a /dev/kvm of its own (nested SVM)."""

import json
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Self

from tests.lab.vm_image import Image

QEMU: Final = "qemu-system-x86_64"
SNAPSHOT: Final = "warm"
_COMMAND_LINE: Final = "root=/dev/vda rw console=ttyS0 panic=5 net.ifnames=0 quiet mitigations=off"


def why_impossible() -> str:
    """Return what is missing for the machine, nothing if it can be made."""
    tools = (QEMU, "qemu-img", "mmdebstrap", "mke2fs")
    missing = [tool for tool in tools if shutil.which(tool, path="/usr/bin:/usr/sbin:/bin:/sbin") is None]
    return f"no {', '.join(missing)}: `make test-lab` installs them" if missing else ""


class VirtualMachine:
    """One QEMU process. Software emulation: it needs no /dev/kvm here, and has one inside."""

    def __init__(self, image: Image, folder: Path) -> None:
        self.image = image
        self.disk = folder / "disk.qcow2"
        self.console = folder / "console.log"
        self._monitor_path = folder / "qmp"
        self._process: subprocess.Popen[bytes] | None = None
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]

    def known_hosts_line(self) -> str:
        """Return the line that vouches for it."""
        return f"[127.0.0.1]:{self.port} {self.image.host_key}\n"

    def start(self, disk: Path, *, snapshot: str = "") -> None:
        """Start it on a copy of `disk`, from its beginning or from a snapshot in it."""
        if disk != self.disk:
            shutil.copy(disk, self.disk)
        self._monitor_path.unlink(missing_ok=True)
        # One CPU: with two, KVM's static keys crash the guest kernel every few tests ("Oops: int3" in __schedule),
        # because an emulated CPU still executes the breakpoint that another one has already patched away.
        argv = [
            QEMU, "-machine", "q35,sata=off", "-accel", "tcg", "-cpu", "max", "-m", "1024",
            "-nodefaults", "-no-user-config", "-display", "none", "-serial", f"file:{self.console}",
            "-qmp", f"unix:{self._monitor_path},server=on,wait=off",
            "-drive", f"file={self.disk},if=virtio,format=qcow2,cache=unsafe,discard=unmap",
            "-netdev", f"user,id=net,hostfwd=tcp:127.0.0.1:{self.port}-:22", "-device", "virtio-net-pci,netdev=net",
            "-device", "virtio-rng-pci",
            "-kernel", str(self.image.kernel), "-initrd", str(self.image.initrd), "-append", _COMMAND_LINE,
        ]  # fmt: skip
        argv += ["-loadvm", snapshot] if snapshot else []
        self._process = subprocess.Popen(argv, stdin=subprocess.DEVNULL)

    def wait_until(self, is_ready: Callable[[], bool], limit_s: float) -> float:
        """Wait for the guest; return how long it took [s]. What its console said belongs to the error."""
        started = time.monotonic()
        while not is_ready():
            assert self._process is not None
            assert self._process.poll() is None, f"QEMU ended with {self._process.returncode}"
            assert time.monotonic() - started < limit_s, self.console.read_text(errors="replace")[-3000:]
            time.sleep(0.2)
        return time.monotonic() - started

    def save(self) -> None:
        """Write a snapshot of memory, devices and disk into the disk's file, and end."""
        with self._monitor() as monitor:
            answer = monitor.call("human-monitor-command", {"command-line": f"savevm {SNAPSHOT}"})
            assert answer == "", answer  # what the human monitor says is an error
            monitor.call("quit")
        assert self._process is not None
        self._process.wait(timeout=60)

    def reset(self) -> None:
        """Press the reset button."""
        with self._monitor() as monitor:
            monitor.call("system_reset")

    def stop(self) -> None:
        """Pull the plug."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def _monitor(self) -> "Monitor":
        return Monitor(self._monitor_path)


class Monitor:
    """QEMU's monitor protocol, QMP."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(120)
        self._socket.connect(str(path))
        self._file = self._socket.makefile("rw")
        self._file.readline()  # the greeting
        self.call("qmp_capabilities")

    def call(self, command: str, arguments: dict[str, object] | None = None) -> Any:
        """Give a command; return its answer."""
        self._file.write(json.dumps({"execute": command, "arguments": arguments or {}}) + "\n")
        self._file.flush()
        while True:
            answer = json.loads(self._file.readline() or "{}")
            if "event" in answer:
                continue
            assert "return" in answer, f"{command}: {answer}"
            return answer["return"]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._socket.close()
