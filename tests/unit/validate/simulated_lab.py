"""A lab of one simulated host: it boots through GRUB's environment and menu, and can go wrong at any moment.

Time passes only when somebody waits. What the validation does over SSH arrives here; the journal that it talks to is
the real one, on a `SimulatedDebian`.
"""

import hashlib
import json
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from tdxhw.lab.connection import Completed
from tdxhw.lab.console import Capture
from tdxhw.lab.console.lines import ConsoleLine
from tdxhw.lab.errors import ConnectionLost, LabUnreachable, LeaseLost, PowerFailed, RemoteFailed
from tdxhw.lab.host_run import Rescue
from tdxhw.lab.kernel_command_line import halves
from tdxhw.report.results import Result, Results, Status
from tdxhw.validate import grub_menu
from tdxhw.validate.candidate import Candidate, Package
from tdxhw.validate.machine import FOLDER, Clock
from tdxhw.validate.remote.journal import Journal, operate
from tdxhw.validate.validation import Plan
from tests.unit.validate.simulated_debian import OWN, PowerCut, SimulatedDebian

NEW: Final = "7.2.13-new"
NEW_ID: Final = "cafe" * 10
OWN_ID: Final = "0123" * 10
PACKAGE: Final = "linux-image-new"
PARAMETERS: Final = ("kvm_intel.tdx", "kvm_intel.ept")
"""Switches that modules of the kernel on trial have."""
_BOOT_S: Final = 30.0
_GUARD_S: Final = 50.0


class Kernel(Enum):
    """What the kernel on trial is like."""

    GOOD = "good"
    PANICS = "panics at boot and reboots"
    HANGS = "hangs at boot"
    NO_NETWORK = "comes up without network"
    BROKEN = "cannot be loaded by GRUB"
    OTHER_BUILD = "is another build of that release"


class Fault(Enum):
    """What happens to the host or to us at some moment."""

    GLITCH = "the connection breaks"
    CUT = "the power is cut, and comes back by itself"
    CUT_OFF = "the power is cut, and stays off"
    INTERRUPT = "somebody presses Ctrl-C"


class SimulatedClock(Clock):
    """Time that passes when somebody sleeps."""

    def __init__(self) -> None:
        self.time = 0.0

    def now(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        self.time += seconds


class SimulatedLab:
    """The surroundings of a validation."""

    def __init__(self, root: Path, *, kernel: Kernel = Kernel.GOOD, has_power: bool = True) -> None:
        self.clock: Clock = SimulatedClock()
        self.debian = SimulatedDebian.install(root)
        self.debian.archive = {PACKAGE: {"release": NEW}}
        self.kernel = kernel
        self.has_power = has_power
        self.has_console = False
        self._capture = Captured(self)
        self.console_lag_s = 0.0
        """How much later it comes what it says [s]."""
        self.is_held = False
        self.is_lost = False
        """Whether somebody else has it, who broke our lease."""
        self.asked = 0
        """How often it was asked who has it."""
        self.fault: Fault | None = None
        self.fault_at = -1
        """The number of the operation over SSH, from 0, in which it happens."""
        self.inside = 0
        """With a power cut in an operation that changes something: after how many of its effects."""
        self.operations = 0
        self.tests: dict[str, list[Status]] = {}
        """What tests give under the kernel on trial, try by try; the last one again and again."""
        self.stuck: dict[str, str] = {}
        """Parameters that have a value whatever was asked for."""
        self.hkids_used: int | None = None
        self.has_secure_boot = False
        self.grub_says = "invalid magic number"
        self.boots = 0
        self.presses: list[str] = []
        self.switch_is_broken = False
        self.is_on = True
        self.release, self.cmdline = OWN, f"BOOT_IMAGE=/boot/vmlinuz-{OWN} root=/dev/sda1 ro"
        self.build_id = OWN_ID
        self._up_at: float | None = 0.0
        self._reboots_at: float | None = None

    # ---- the machine ----

    def boot(self) -> None:
        """Start from the firmware."""
        self.boots += 1
        now = self.clock.now()
        self._reboots_at = None
        configuration = self.debian.file("boot/grub/grub.cfg").read_text()
        environment = self.debian.environment()
        chosen = environment.pop("next_entry", "")
        self.debian.save_environment(environment)
        entries: tuple[grub_menu.Entry, ...] = ()
        custom = self.debian.file("boot/grub/custom.cfg")
        if custom.exists():
            entries = grub_menu.parse(custom.read_text())
        entry = next((one for one in entries if one.id == chosen), None)
        entry = entry or grub_menu.default_entry(configuration, environment)
        self.release = entry.kernel_name.removeprefix("vmlinuz-")
        self.cmdline = f"BOOT_IMAGE={entry.kernel} {entry.arguments}"
        self.build_id = OWN_ID if self.release == OWN else NEW_ID
        self._up_at = now + _BOOT_S
        if self.release == OWN:
            return
        self.say(f"  Booting `Kernel on trial: vmlinuz-{NEW}'")
        match self.kernel:
            case Kernel.PANICS:
                self.say("[    1.0] Kernel panic - not syncing: Attempted to kill init!")
                self._up_at, self._reboots_at = None, now + 15
            case Kernel.HANGS:
                self._up_at = None
            case Kernel.NO_NETWORK:
                self._up_at, self._reboots_at = None, now + _GUARD_S
                log = self.debian.file(f"{FOLDER[1:]}/guard.log")
                log.write_text(f"up {NEW} boot-{self.boots}\nunconfirmed\nlo UNKNOWN 127.0.0.1/8\n\n[1.0] Linux\n")
            case Kernel.BROKEN:  # the entry then loads the host's own
                self.say(f"error: {self.grub_says}.", f"[    0.000000] Linux version {OWN}")
                self.release, self.build_id = OWN, OWN_ID
                self.cmdline = f"BOOT_IMAGE=/boot/vmlinuz-{OWN} root=/dev/sda1 ro"
            case Kernel.OTHER_BUILD:
                self.build_id = "dead" * 10

    def module_parameter(self, name: str) -> str:
        """Return what /sys/module shows, nothing if there is no such parameter."""
        if name not in PARAMETERS or name in self.stuck:
            return self.stuck.get(name, "")
        words = (word.partition("=") for word in halves(self.cmdline)[0])
        return next((value + "\n" for key, _, value in words if key == name), "Y\n")

    def lose_power(self, *, comes_back: bool) -> None:
        """Pull the plug."""
        self.is_on = False
        self._up_at = None
        self._reboots_at = self.clock.now() + 20 if comes_back else None

    def hang(self) -> None:
        """Answer no more."""
        self._up_at = None

    @property
    def is_up(self) -> bool:
        """Whether it can be reached now."""
        while self._reboots_at is not None and self.clock.now() >= self._reboots_at:
            self.is_on = True
            self.boot()
        return self.is_on and self._up_at is not None and self.clock.now() >= self._up_at

    # ---- the surroundings ----

    def connect(self) -> "SimulatedLink":
        if not self.is_up:
            raise LabUnreachable("vm: no answer")
        return SimulatedLink(self)

    def power(self) -> "Switch | None":
        return Switch(self) if self.has_power else None

    def console(self) -> Capture | None:
        return self._capture if self.has_console else None  # type: ignore[return-value]

    def say(self, *lines: str) -> None:
        """Have it on the console."""
        self._capture.spoken += [ConsoleLine(self.clock.now() + self.console_lag_s, line) for line in lines]

    def hold(self, link: object, reason: str) -> "Hold":
        return Hold(self)

    def run_suites(
        self,
        base: Results,
        name: str,
        collected: list[Results],
        up_again: Callable[[], None],
        rescue: Callable[[float], Rescue],
    ) -> list[str]:
        if self.is_lost:
            return ["vm: the suites did not run: it is somebody else's"]
        self.happens()
        results = []
        for test, statuses in (self.tests or {"a": [Status.PASS]}).items():
            provenance = {"kernel": self.release, "backend": "local"}
            results += [Result("suite", test, "vm", status, provenance=provenance) for status in statuses]
        collected.append(Results(tuple(results)))
        return []

    # ---- its power switch ----

    def on(self) -> None:
        self.presses.append("on")
        if not self.is_on:
            self.is_on = True
            self.boot()

    def off(self) -> None:
        self.presses.append("off")
        self.lose_power(comes_back=False)

    def reset(self) -> None:
        self.presses.append("reset")
        self.is_on = True
        self.boot()

    # ---- faults ----

    def happens(self) -> bool:
        """Count an operation; do what happens in it. Tell whether the power is to be cut inside of it."""
        number, self.operations = self.operations, self.operations + 1
        if number != self.fault_at:
            return False
        match self.fault:
            case Fault.GLITCH:
                raise ConnectionLost("vm: the connection is lost")
            case Fault.INTERRUPT:
                raise KeyboardInterrupt
            case Fault.CUT | Fault.CUT_OFF:
                return True
        return False

    def cut(self) -> ConnectionLost:
        """Lose power as the fault has it."""
        self.debian.cut_after = None
        self.lose_power(comes_back=self.fault is Fault.CUT)
        return ConnectionLost("vm: the connection is lost")


class Captured:
    """A console that is captured."""

    problem = ""

    def __init__(self, lab: SimulatedLab) -> None:
        self._lab = lab
        self.spoken: list[ConsoleLine] = []

    @property
    def lines(self) -> list[ConsoleLine]:
        return [line for line in self.spoken if line.at <= self._lab.clock.now()]

    def wait_open(self, limit_s: float) -> bool:
        return True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


class Switch:
    """The lab's power switch, as `tdxhw.lab.power.Power` has it."""

    name = "simulated"

    def __init__(self, lab: SimulatedLab) -> None:
        self._lab = lab
        self.on, self.off, self.reset = lab.on, lab.off, lab.reset

    def is_on(self) -> bool:
        if self._lab.switch_is_broken:
            raise PowerFailed("vm: its BMC does not answer")
        return self._lab.is_on


class Hold:
    """A lease."""

    note = ""

    def __init__(self, lab: SimulatedLab) -> None:
        self._lab = lab

    def move_to(self, session: Any) -> None:
        self._lab.asked += 1
        self.check(session)
        assert self._lab.is_held

    def check(self, session: Any) -> None:
        if self._lab.is_lost:
            raise LeaseLost("vm is taken by bob@ws pid 7")

    def __enter__(self) -> Self:
        assert not self._lab.is_held
        self._lab.is_held = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lab.is_held = False


class SimulatedLink:
    """A connection: it breaks when the host goes down."""

    def __init__(self, lab: SimulatedLab) -> None:
        self._lab = lab
        self._boot = lab.boots
        self._is_open = True

    def _begin(self) -> bool:
        if not self._is_open or not self._lab.is_up or self._lab.boots != self._boot:
            raise ConnectionLost("vm: the connection is lost")
        return self._lab.happens()

    def run(self, command: str, *, stdin: bytes = b"", timeout_s: float = 60) -> Completed:
        if self._begin():
            raise self._lab.cut()
        files = self._lab.debian.file
        match command.split():
            case ["nohup", *_]:
                self._lab.boot()
            case ["cat", path, *_] if path.startswith(FOLDER):
                text = files(path[1:])
                return Completed(0, text.read_text() if text.exists() else "", "")
            case ["rm", "-f", path]:
                files(path[1:]).unlink(missing_ok=True)
            case ["cat", path, *_] if path.startswith("/sys/module/"):
                name = path.removeprefix("/sys/module/").replace("/parameters/", ".")
                return Completed(0, self._lab.module_parameter(name), "")
            case ["cat", "/sys/fs/cgroup/misc.current", *_] if self._lab.hkids_used is not None:
                return Completed(0, f"sev 0\ntdx {self._lab.hkids_used}\n", "")
            case ["test", "-d", path] if path.startswith("/sys/module/"):
                module = path.removeprefix("/sys/module/")
                return Completed(0 if any(name.startswith(f"{module}.") for name in PARAMETERS) else 1, "", "")
            case ["test", "-d", path]:
                return Completed(0 if files(path[1:]).is_dir() else 1, "", "")
            case ["echo", *_] if command.startswith("echo '<4>tdxhw: ") and command.endswith("' >/dev/kmsg"):
                told = command.split("'")[1].removeprefix("<4>")
                self._lab.say(f"[  900.000000] {told}")
            case ["date", _]:
                return Completed(0, "0.0\n", "")
            case ["touch" | "cat" | "dmesg", *_]:
                pass
            case _:
                raise AssertionError(f"the simulated host has no {command!r}")
        return Completed(0, "", "")

    def python(self, script: str, *arguments: str, stdin: bytes = b"", timeout_s: float = 60, package: str = "") -> str:
        cut = self._begin()
        if script == "survey.py":
            if cut:
                raise self._lab.cut()
            return json.dumps(self._survey())
        debian = self._lab.debian
        journal = Journal(debian, debian.root / FOLDER[1:])
        if cut:
            debian.cut_after = self._lab.inside
        try:
            answer = operate(journal, arguments[1], json.loads(stdin or b"{}"))
        except PowerCut:
            raise self._lab.cut() from None
        if cut:
            raise self._lab.cut()
        return json.dumps(answer)

    def upload(self, data: bytes, path: str) -> None:
        if self._begin():
            raise self._lab.cut()
        target = self._lab.debian.file(path[1:])
        if not target.parent.parent.is_dir():
            raise RemoteFailed(f"vm: writing {path}: no such folder")
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(data)

    def close(self) -> None:
        self._is_open = False

    def _survey(self) -> dict[str, Any]:
        lab, file = self._lab, self._lab.debian.file
        configuration = file("boot/grub/grub.cfg").read_text()
        custom = file("boot/grub/custom.cfg")
        environment = lab.debian.environment()
        return {
            "release": lab.release, "build_id": lab.build_id, "boot_id": f"boot-{lab.boots}", "cmdline": lab.cmdline,
            "machine": "x86_64", "is_root": True, "systemd": True, "kexec_loaded": False, "watchdogs": [],
            "boot_free": 1 << 40, "root_free": 1 << 40, "boot_is_root": True,
            "var_free": 1 << 40, "var_is_root": True, "root": "root=PARTUUID=12-01",
            "boot_files": sorted(path.name for path in file("boot").iterdir() if path.is_file()),
            "module_folders": sorted(path.name for path in file("lib/modules").iterdir()),
            "initramfs": "update-initramfs", "dpkg_architecture": "amd64",
            "packages": "\n".join(f"{name} {one['version']} {one['status']}"
                                  for name, one in lab.debian.packages().items()),
            "parameters": {"kvm.tdp_mmu": "Y"}, "tainted": 0, "modules": ["kvm"], "memory_kib": 1000000,
            "tdx_log": [], "secure_boot": lab.has_secure_boot,
            "grub": {
                "folder": "/boot/grub", "configuration": configuration,
                "custom": custom.read_text() if custom.exists() else None,
                "environment": "".join(f"{name}={value}\n" for name, value in environment.items()),
                "abstraction": "", "filesystem": "ext2", "reads_fragments": True,
                "has_fragments": file("etc/default/grub.d").is_dir(), "has_update_grub": True,
            },
            "grub_digest": hashlib.sha256(configuration.encode()).hexdigest(), "systemd_boot": False,
        }  # fmt: skip


def plan_for(folder: Path, **changes: Any) -> Plan:
    """Return a plan to validate the package with a baseline in which the test passes."""
    package = folder / f"{PACKAGE}.deb"
    package.write_bytes(b"a package")
    out = folder / "out"
    out.mkdir(exist_ok=True)
    base = Results((Result("suite", "a", "vm", Status.PASS, provenance={"kernel": OWN, "backend": "local"}),))
    candidate = Candidate(NEW, NEW_ID, None, (Package(PACKAGE, "1", package),), installed_bytes=1, image_bytes=1)
    settings: dict[str, Any] = {"matrix": [{}], "boot_limit_s": 100.0} | changes
    return Plan("vm", candidate, base, out=out, token="token", **settings)
