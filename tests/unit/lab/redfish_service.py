"""A Redfish service that does what a test tells it to: sessions, late and odd answers, systems."""

import base64
import http.server
import json
import ssl
import threading
from pathlib import Path
from types import TracebackType
from typing import Any, Self

USER, PASSWORD = "admin", "hunter2-of-redfish"
ROOT = "/redfish/v1/"


class Service(http.server.ThreadingHTTPServer):
    """One system on http://127.0.0.1. `plan` is a list of what to answer instead: a code, or a body that is no JSON."""

    daemon_threads = True

    def __init__(self, systems: tuple[str, ...] = ("1",), *, sessions: bool = True, power: str | None = "Off") -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.systems = systems
        self.has_sessions = sessions
        self.power = power
        self.reset_types = ["On", "ForceOff", "ForceRestart"]
        self.says_what_it_offers = True
        self.plan: list[int | str | tuple[int, str]] = []
        self.seen: list[str] = []
        self.open_sessions: set[str] = set()
        self.opened = 0
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def show(self, certificate: Path) -> None:
        """Speak TLS from now on, with the certificate and key in a file."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        self.socket = context.wrap_socket(self.socket, server_side=True)
        self.url = self.url.replace("http:", "https:")

    def handle_error(self, request: object, client_address: object) -> None:
        """Stay silent about a client that does not like the certificate."""

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None = None, error: BaseException | None = None,
        trace: TracebackType | None = None,
    ) -> None:  # fmt: skip
        self.shutdown()
        self.server_close()

    def document(self, path: str) -> dict[str, Any] | None:
        """Return what a GET answers."""
        system = f"{ROOT}Systems/"
        if path == ROOT:
            root: dict[str, Any] = {"@odata.id": ROOT, "Id": "r", "Systems": {"@odata.id": f"{ROOT}Systems"}}
            if self.has_sessions:
                root["SessionService"] = {"@odata.id": f"{ROOT}SessionService"}
                root["Links"] = {"Sessions": {"@odata.id": f"{ROOT}SessionService/Sessions"}}
            return root
        if path == f"{ROOT}Systems":
            members = [{"@odata.id": system + name} for name in self.systems]
            return {"Name": "s", "Members": members, "Members@odata.count": len(members)}
        if path.removeprefix(system) in self.systems:
            document: dict[str, Any] = {"Id": path.removeprefix(system), "Name": "x", "PowerState": self.power}
            reset: dict[str, Any] = {"target": f"{path}/Actions/Reset"}
            if self.says_what_it_offers:
                reset["ResetType@Redfish.AllowableValues"] = self.reset_types
            return document | {"Actions": {"#ComputerSystem.Reset": reset}}
        return None


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Service

    def do_GET(self) -> None:
        service = self.server
        path = self.path if self.path == ROOT else self.path.rstrip("/")
        if self._planned() or (path != ROOT and not self._allowed()):
            return
        document = service.document(path)
        self._answer(404 if document is None else 200, document or {})

    def do_POST(self) -> None:
        service = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path.endswith("/Sessions"):
            if not service.has_sessions or body != {"UserName": USER, "Password": PASSWORD}:
                self._answer(401, {})
                return
            service.opened += 1
            token = f"token-{service.opened}"
            service.open_sessions.add(token)
            where = f"{ROOT}SessionService/Sessions/{token}"
            self._answer(201, {"@odata.id": where, "Id": token}, {"X-Auth-Token": token, "Location": where})
            return
        if self._planned() or not self._allowed():
            return
        if body["ResetType"] not in service.reset_types:
            message = {"code": "Base.1.0.ActionParameterNotSupported", "message": f"{body['ResetType']}: not here"}
            self._answer(400, {"error": message})
            return
        service.seen.append(body["ResetType"])
        service.power = "Off" if body["ResetType"] == "ForceOff" else "On"
        self._answer(204, None)

    def do_DELETE(self) -> None:
        self.server.open_sessions.discard(self.path.rpartition("/")[2])
        self._answer(204, None)

    def _planned(self) -> bool:
        if self.path == ROOT or not self.server.plan:
            return False
        planned = self.server.plan.pop(0)
        if isinstance(planned, tuple):
            self._answer(planned[0], {"error": {"code": planned[1], "message": "planned"}})
        elif isinstance(planned, int):
            self._answer(planned, {"error": {"message": f"planned {planned}"}})
        else:
            self._answer(200, planned)
        return True

    def _allowed(self) -> bool:
        basic = "Basic " + base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
        if self.headers.get("X-Auth-Token") in self.server.open_sessions or self.headers.get("Authorization") == basic:
            return True
        self._answer(401, {})
        return False

    def _answer(self, code: int, document: dict[str, Any] | str | None, headers: dict[str, str] | None = None) -> None:
        body = b"" if document is None else (document if isinstance(document, str) else json.dumps(document)).encode()
        self.send_response(code)
        for key, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 (http.server's name)
        """Stay silent."""
