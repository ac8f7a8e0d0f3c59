"""What a simulated BMC presses the buttons of, whatever kind of machine it is, and where its serial port comes out."""

import contextlib
import selectors
import socket
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Final, Protocol, Self

TWICE_S: Final = 2.0
"""ipmi_sim presses reset twice for one request: what comes within this time is the same press [s]."""


class Machine(Protocol):
    """A machine with a power button and a reset button; each may be pressed twice."""

    def start(self) -> None: ...
    def kill(self) -> None: ...
    def reset(self) -> None: ...
    def is_running(self) -> bool: ...


class Hook:
    """Presses buttons one at a time: BMCs send what they are told to from several threads at once."""

    def __init__(self, machine: Machine) -> None:
        self.pressed: list[str] = []
        self._machine = machine
        self._lock = threading.Lock()
        self._last_reset = 0.0

    def is_on(self) -> bool:
        with self._lock:
            return self._machine.is_running()

    def press(self, button: str) -> None:
        with self._lock:
            now = time.monotonic()
            if button == "reset":
                again = now - self._last_reset < TWICE_S
                self._last_reset = now
                if again:
                    return
            self.pressed.append(button)
            {"on": self._machine.start, "off": self._machine.kill, "reset": self._machine.reset}[button]()


class SerialRelay:
    """Serves a machine's serial port, a Unix socket that is there while the machine is on, at a TCP port for good."""

    def __init__(self, machine_side: Path) -> None:
        self._machine_side = machine_side
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._server.getsockname()[1]
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._relay, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(10)

    def _relay(self) -> None:
        selector = selectors.DefaultSelector()
        selector.register(self._server, selectors.EVENT_READ, "server")
        readers: list[socket.socket] = []
        machine: socket.socket | None = None
        while not self._stop.is_set():
            if machine is None:
                machine = self._connect()
                if machine is not None:
                    selector.register(machine, selectors.EVENT_READ, "machine")
            for key, _ in selector.select(0.1):
                end = key.fileobj
                assert isinstance(end, socket.socket)
                if key.data == "server":
                    reader, _ = end.accept()
                    reader.setblocking(False)
                    selector.register(reader, selectors.EVENT_READ, "reader")
                    readers.append(reader)
                    continue
                try:
                    data = end.recv(65536)
                except OSError:
                    data = b""
                if not data:
                    selector.unregister(end)
                    end.close()
                    if key.data == "machine":
                        machine = None
                    else:
                        readers.remove(end)
                elif key.data == "machine":
                    for reader in readers:
                        with contextlib.suppress(OSError):  # who does not read loses it, as on a real line
                            reader.sendall(data)
        for one in (self._server, *readers, *([machine] if machine else [])):
            one.close()
        selector.close()

    def _connect(self) -> socket.socket | None:
        machine = socket.socket(socket.AF_UNIX)
        try:
            machine.connect(str(self._machine_side))
        except OSError:
            machine.close()
            return None
        return machine


def free_port(kind: socket.SocketKind = socket.SOCK_STREAM) -> int:
    """Return a port of 127.0.0.1 that nobody uses."""
    with socket.socket(type=kind) as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
