"""A virtual machine that boots from its own disk through GRUB: what `tdxhw validate` is tested on.

Everything about it is in its folder, so that any process can press its buttons: a simulated BMC, a power command of a
lab file, a test. ``python -m tests.lab.grub_machine FOLDER on|off|reset|status``.
"""

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from tests.lab.virtual_machine import QEMU, Monitor

SNAPSHOT: Final = "warm"


class GrubMachine:
    """One machine with a power button, a reset button, a serial console and a disk that keeps what is written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.disk = folder / "disk.qcow2"
        self.console = folder / "console.log"
        """Everything its serial port ever said; also there to read live at `console_socket`."""
        self.console_socket = folder / "console"
        self._monitor_path = folder / "qmp"
        self._pid_path = folder / "qemu.pid"
        self._description = folder / "machine.json"

    @classmethod
    def describe(cls, folder: Path) -> "GrubMachine":
        """Choose its ports and write down what it is made of. Its disk has to be put at `disk`."""
        machine = cls(folder)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        machine._description.write_text(json.dumps({"port": port}))
        return machine

    @property
    def port(self) -> int:
        """Its sshd's port on 127.0.0.1."""
        return int(json.loads(self._description.read_text())["port"])

    @property
    def argv(self) -> list[str]:
        """QEMU's command line. Software emulation, one CPU: see `VirtualMachine`."""
        return [
            QEMU, "-machine", "q35,sata=off", "-accel", "tcg", "-cpu", "max", "-m", "1024",
            "-nodefaults", "-no-user-config", "-display", "none",
            "-chardev", (f"socket,id=tty,path={self.console_socket},server=on,wait=off,logfile={self.console},"
            "logappend=on"), "-serial", "chardev:tty",
            "-qmp", f"unix:{self._monitor_path},server=on,wait=off", "-pidfile", str(self._pid_path),
            "-drive", f"file={self.disk},if=virtio,format=qcow2,cache=unsafe,discard=unmap",
            "-netdev", f"user,id=net,restrict=on,hostfwd=tcp:127.0.0.1:{self.port}-:22",
            "-device", "virtio-net-pci,netdev=net", "-device", "virtio-rng-pci",
            "-device", "i6300esb", "-action", "watchdog=reset",
        ]  # fmt: skip

    # ---- its buttons: each may be pressed twice, by several at once ----

    def start(self, *, snapshot: str = "") -> None:
        """Switch it on, if it is off; from its disk, or from a snapshot in it."""
        with self._locked():
            if self._pid():
                return
            for path in (self._monitor_path, self.console_socket, self._pid_path):
                path.unlink(missing_ok=True)
            # It leaves us and our children: it outlives whoever pressed the button.
            argv = [*self.argv, "-daemonize", *(["-loadvm", snapshot] if snapshot else [])]
            done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=False)
            assert done.returncode == 0, f"QEMU ended with {done.returncode}: {done.stderr.decode()[-1000:]}"
            assert self._pid(), "QEMU does not get ready"

    def kill(self) -> None:
        """Cut its power. What its kernel had not written to the disk is lost."""
        with self._locked():
            pid = self._pid()
            if not pid:
                return
            os.kill(pid, signal.SIGKILL)
            until = time.monotonic() + 30
            while self._pid():
                assert time.monotonic() < until, f"QEMU {pid} does not end"
                time.sleep(0.02)

    def reset(self) -> None:
        """Press the reset button; a machine that is off is switched on."""
        if self.is_running():
            with Monitor(self._monitor_path) as monitor:
                monitor.call("system_reset")
        else:
            self.start()

    def is_running(self) -> bool:
        """Whether it has power."""
        return bool(self._pid())

    # ---- for tests ----

    def save(self) -> None:
        """Write a snapshot of memory, devices and disk into the disk's file, and switch off."""
        with Monitor(self._monitor_path) as monitor:
            answer = monitor.call("human-monitor-command", {"command-line": f"savevm {SNAPSHOT}"})
            assert answer == "", answer  # what the human monitor says is an error
        self.kill()

    def wait_until(self, is_ready: Callable[[], bool], limit_s: float) -> float:
        """Wait for the guest; return how long it took [s]. What its console said belongs to the error."""
        started = time.monotonic()
        while not is_ready():
            assert time.monotonic() - started < limit_s, self.console.read_text(errors="replace")[-3000:]
            time.sleep(0.3)
        return time.monotonic() - started

    def _pid(self) -> int:
        """Return QEMU's process, 0 if there is none. A process id that is somebody else's by now is none."""
        try:
            pid = int(self._pid_path.read_text())
            running = Path(f"/proc/{pid}/cmdline").read_bytes()
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (OSError, ValueError):
            return 0
        return pid if str(self._pid_path).encode() in running and state != "Z" else 0

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with (self.folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def main(arguments: list[str]) -> int:
    """Press a button. ``status`` prints ``on`` or ``off``."""
    folder, button = arguments
    machine = GrubMachine(Path(folder))
    match button:
        case "on":
            machine.start()
        case "off":
            machine.kill()
        case "reset":
            machine.reset()
        case "status":
            print("on" if machine.is_running() else "off")  # noqa: T201
        case _:
            print(f"no button {button!r}: on, off, reset, status", file=sys.stderr)  # noqa: T201
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
