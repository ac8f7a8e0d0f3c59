"""A real Redfish emulator, that of sushy-tools, over TLS, that drives a machine.

Its fake driver applies a change 1 to 11 s later, when somebody asks for the state, and tells us of it over HTTP.
"""

import contextlib
import http.server
import json
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from tests.lab.bmc_hook import Hook, Machine, free_port

USER: Final = "admin"
PASSWORD: Final = "s3cret-of-redfish"
SYSTEM: Final = "27946b59-9e44-4fa7-8e91-f3527a1ef094"
OTHER: Final = "27946b59-9e44-4fa7-8e91-f3527a1ef095"


def why_impossible() -> str:
    """Return what is missing, nothing if it can be made."""
    missing = [tool for tool in ("openssl",) if shutil.which(tool) is None]
    if not _emulator().exists():
        missing.append("sushy-tools")
    return f"no {', '.join(missing)}: `make setup` and `make test-lab` install them" if missing else ""


def _emulator() -> Path:
    return Path(sys.executable).with_name("sushy-emulator")


def make_certificates(folder: Path) -> None:
    """Make a CA of our own (``ca.pem``), and a certificate for 127.0.0.1 that it has signed (``bmc.pem, .key``)."""

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True, timeout=60)

    (folder / "san").write_text("subjectAltName=IP:127.0.0.1\nbasicConstraints=CA:FALSE\n")
    new = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    openssl("req", "-x509", *new, "-keyout", "ca.key", "-out", "ca.pem", "-days", "2", "-subj", "/CN=tdxhw test CA")
    openssl("req", *new, "-keyout", "bmc.key", "-out", "bmc.csr", "-subj", "/CN=127.0.0.1")
    openssl("x509", "-req", "-in", "bmc.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2",
            "-out", "bmc.pem", "-extfile", "san")  # fmt: skip


class _Notification(http.server.BaseHTTPRequestHandler):
    def do_PUT(self) -> None:
        system = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        assert isinstance(server, _Server)
        server.bmc.notified(system)
        self.send_response(204)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 (http.server's name)
        """Stay silent."""


class _Server(http.server.ThreadingHTTPServer):
    bmc: "RedfishBmc"


class RedfishBmc:
    """A BMC at `url`. `systems` is 1 or 2: of two, only the first is wired to the machine."""

    def __init__(self, folder: Path, machine: Machine, *, systems: int = 1) -> None:
        self.folder = folder
        self.hook = Hook(machine)
        self.port = free_port()
        self.url = f"https://127.0.0.1:{self.port}"
        self._systems = systems
        self._restarts = False
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def credentials(self) -> str:
        return f"{USER}:{PASSWORD}"

    @property
    def ca(self) -> Path:
        return self.folder / "ca.pem"

    def lab_options(self, variable: str) -> str:
        """Return the options of its driver in a lab file."""
        return f"url: '{self.url}', ca: {self.ca}, credentials_env: {variable}"

    def __enter__(self) -> Self:
        make_certificates(self.folder)
        self._server = _Server(("127.0.0.1", 0), _Notification)
        self._server.bmc = self
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        import bcrypt  # the emulator wants its password file so

        (self.folder / "users").write_text(f"{USER}:{bcrypt.hashpw(PASSWORD.encode(), bcrypt.gensalt(4)).decode()}\n")
        (self.folder / "state").mkdir(exist_ok=True)
        state = "On" if self.hook.is_on() else "Off"
        systems = [
            {"uuid": uuid, "name": name, "power_state": state, "external_notifier": uuid == SYSTEM, "nics": []}
            for uuid, name in ((SYSTEM, "machine"), (OTHER, "other"))[: self._systems]
        ]
        values = {
            "SUSHY_EMULATOR_FAKE_DRIVER": True,
            "SUSHY_EMULATOR_FAKE_SYSTEMS": systems,
            "SUSHY_EMULATOR_STATE_DIR": str(self.folder / "state"),
            "SUSHY_EMULATOR_AUTH_FILE": str(self.folder / "users"),
            "SUSHY_EMULATOR_LISTEN_IP": "127.0.0.1",
            "SUSHY_EMULATOR_LISTEN_PORT": self.port,
            "SUSHY_EMULATOR_SSL_CERT": str(self.folder / "bmc.pem"),
            "SUSHY_EMULATOR_SSL_KEY": str(self.folder / "bmc.key"),
            "EXTERNAL_NOTIFICATION_URL": f"http://127.0.0.1:{self._server.server_address[1]}",
        }
        (self.folder / "emulator.conf").write_text("".join(f"{key} = {value!r}\n" for key, value in values.items()))
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        self._server.shutdown()
        self._server.server_close()

    def start(self) -> None:
        """Start the emulator; the machine stays as it is."""
        with (self.folder / "emulator.log").open("ab") as log:
            self._process = subprocess.Popen(
                [_emulator(), "--config", self.folder / "emulator.conf"], stdin=subprocess.DEVNULL, stdout=log,
                stderr=subprocess.STDOUT,
            )  # fmt: skip
        until = time.monotonic() + 30
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return
            assert self._process.poll() is None, (self.folder / "emulator.log").read_text()[-2000:]
            assert time.monotonic() < until, "the emulator does not answer"
            time.sleep(0.1)

    def stop(self) -> None:
        """End the emulator, as if the BMC had lost its own power."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def notified(self, system: dict[str, Any]) -> None:
        """Do to the machine what was done to the emulated system."""
        pending = system.get("pending_power")
        if pending:
            self._restarts = "Restart" in pending["power_state"]
            return
        if self._restarts:
            self._restarts = False
            self.hook.press("reset")
        else:
            self.hook.press("on" if system["power_state"] == "On" else "off")

    def log(self) -> str:
        """Return what the emulator has said: every request is in it."""
        return (self.folder / "emulator.log").read_text(errors="replace")
