"""A real IPMI BMC simulator, ipmi_sim of OpenIPMI, that drives a machine: power, reset, serial over LAN."""

import shutil
import socket
import socketserver
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from tests.lab.bmc_hook import Hook, Machine, SerialRelay, free_port

USER: Final = "admin"
PASSWORD: Final = "s3cret-of-ipmi"

_CONFIGURATION: Final = """\
name "tdxhw"
set_working_mc 0x20
startlan 1
  addr 127.0.0.1 {port}
  priv_limit admin
  guid a123456789abcdefa123456789abcdef
endlan
chassis_control "{script} 0x20"
{sol}
user 2 true "{user}" "{password}" admin 10
"""
_COMMANDS: Final = """\
mc_setbmc 0x20
mc_add 0x20 0 no-device-sdrs 0x23 9 8 0x9f 0x1291 0xf02
sel_enable 0x20 1000 0x0a
mc_enable 0x20
"""
# ipmi_sim starts it for every question: "0x20 get power", "0x20 set power 1", "0x20 set reset 1".
_SCRIPT: Final = """\
#!{python} -S
import socket, sys
with socket.socket(socket.AF_UNIX) as hook:
    hook.connect({path!r})
    hook.sendall((" ".join(sys.argv[2:]) + "\\n").encode())
    sys.stdout.write(hook.makefile().read())
"""


def why_impossible() -> str:
    """Return what is missing, nothing if it can be made."""
    missing = [tool for tool in ("ipmi_sim", "ipmitool") if shutil.which(tool) is None]
    return f"no {', '.join(missing)}: `make test-lab` installs them" if missing else ""


class _Question(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        server = self.server
        assert isinstance(server, _Server)
        verb, *words = self.rfile.readline().decode().split()
        if verb == "get":
            for word in words:
                value = {"power": str(int(server.hook.is_on())), "boot": "default"}.get(word, "0")
                self.wfile.write(f"{word}:{value}\n".encode())
            return
        for what, value in zip(words[::2], words[1::2], strict=True):
            if what == "reset" and value == "1":
                server.hook.press("reset")
            elif what == "power":
                server.hook.press("on" if value == "1" else "off")


class _Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True

    def __init__(self, path: Path, hook: Hook) -> None:
        super().__init__(str(path), _Question)
        self.hook = hook


class IpmiBmc:
    """A BMC on 127.0.0.1, UDP `port`. With `serial`, a machine's serial port, it has serial over LAN."""

    def __init__(self, folder: Path, machine: Machine, serial: Path | None = None) -> None:
        self.folder = folder
        self.port = free_port(socket.SOCK_DGRAM)
        self.hook = Hook(machine)
        self._relay = SerialRelay(serial) if serial is not None else None
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def credentials(self) -> str:
        return f"{USER}:{PASSWORD}"

    def lab_options(self, variable: str) -> str:
        """Return the options of its drivers in a lab file. Asked which cipher suites it has, it does not answer."""
        return f"address: 127.0.0.1, port: {self.port}, credentials_env: {variable}, cipher_suite: 3"

    def __enter__(self) -> Self:
        hook_path, script = self.folder / "hook", self.folder / "chassis"
        script.write_text(_SCRIPT.format(python=sys.executable, path=str(hook_path)))
        script.chmod(0o755)
        self._server = _Server(hook_path, self.hook)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        sol = ""
        if self._relay is not None:
            self._relay.__enter__()
            sol = f'sol "tcp:127.0.0.1:{self._relay.port}" 115200'
        (self.folder / "lan.conf").write_text(
            _CONFIGURATION.format(port=self.port, script=script, sol=sol, user=USER, password=PASSWORD)
        )
        (self.folder / "commands").write_text(_COMMANDS)
        (self.folder / "state").mkdir(exist_ok=True)
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        self._server.shutdown()
        self._server.server_close()
        if self._relay is not None:
            self._relay.__exit__(kind, error, trace)

    def start(self) -> None:
        """Start the simulator; the machine stays as it is."""
        argv = ["ipmi_sim", "-n", "-c", "lan.conf", "-f", "commands", "-s", "state"]
        with (self.folder / "ipmi_sim.log").open("ab") as log:
            self._process = subprocess.Popen(
                argv, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )
        until = time.monotonic() + 10
        while not self._answers():
            assert self._process.poll() is None, (self.folder / "ipmi_sim.log").read_text()
            assert time.monotonic() < until, "ipmi_sim does not answer"
            time.sleep(0.1)

    def stop(self) -> None:
        """End the simulator, as if the BMC had lost its own power."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _answers(self) -> bool:
        ping = bytes.fromhex("0600ff06000011be80000000")  # RMCP presence ping
        with socket.socket(type=socket.SOCK_DGRAM) as client:
            client.settimeout(0.3)
            client.sendto(ping, ("127.0.0.1", self.port))
            try:
                return bool(client.recv(100))
            except OSError:
                return False
