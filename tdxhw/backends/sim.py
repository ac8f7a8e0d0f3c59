"""Simulated hosts. The only file of the harness that knows that a simulator exists (import-linter keeps it so)."""

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tdxhw import __version__
from tdxhw.errors import BackendUnavailable, ReplayInputError, UnknownName
from tdxhw.host import Backend, Provenance
from uapi_ctypes.kernel import Kernel

if TYPE_CHECKING:
    from sim_backend.machine import Machine

DEFAULT_PROFILES: Final = ("mainline", "v17")
"""Both dialects: the newest mainline kernel on a hybrid module, and v17 on module 1.5.01."""
_PAGE_SIZE: Final = 4096
_MEASURE_SOURCE: Final = 4 << 20
"""HPA of the page that TDH.MEM.PAGE.ADD copies from: in the first gigabyte, which is the host's own."""


def open_sim(profiles: Sequence[str], *, reason: str, promises: Sequence[str] = ()) -> Backend:
    """Boot a simulated host for each of `profiles`, or for each dialect without any.

    Raise `BackendUnavailable` when the simulator cannot run here, `UnknownName` on a profile that does not exist.
    """
    known = profile_names()
    for name in profiles:
        if name not in known:
            raise UnknownName("profile", name, known)
    hosts: list[SimHost] = []
    try:
        hosts.extend(SimHost(name) for name in dict.fromkeys(profiles or DEFAULT_PROFILES))
    except BaseException:
        for host in hosts:
            host.close()
        raise
    return Backend("sim", reason, tuple(hosts), frozenset(promises))


def open_sim_like(description: Mapping[str, Any], *, reason: str) -> Backend:
    """Boot a simulated host with the equipment of the one that described itself so (`tdxhw.diff.describe_host`).

    Raise `BackendUnavailable` when the simulator cannot run here or cannot be such a host.
    """
    return Backend("sim", reason, (SimHost("like", description),))


def _not_installed(error: ModuleNotFoundError) -> Exception:
    """Return what to raise when an import failed: there is no simulator here, it lacks a package, or it is our bug."""
    if error.name == "sim_backend":  # `tdxhw.lab.archive` leaves it out
        return BackendUnavailable("what is sent to lab hosts carries no simulator: use a tdxhw that was installed")
    if error.name is None or error.name.partition(".")[0] in ("sim_backend", "uapi_ctypes"):
        return error
    return BackendUnavailable(f"the simulator needs {error.name.partition('.')[0]}: pip install 'tdxhw[sim]'")


def profile_names() -> tuple[str, ...]:
    """Return the simulated hosts that can be booted. Raise `BackendUnavailable` without the simulator's packages."""
    try:
        from sim_backend.kvm.profile import profile_names as names
    except ModuleNotFoundError as error:
        raise _not_installed(error) from None
    return names()


def boot(profile: str, **overrides: Any) -> "Machine":
    """Boot one simulated machine. Raise `BackendUnavailable` when its CPU engine cannot run here."""
    try:
        from sim_backend.cpu.errors import EngineError
        from sim_backend.machine import BootError
        from sim_backend.machine import boot as boot_machine
    except ModuleNotFoundError as error:
        raise _not_installed(error) from None
    try:
        return boot_machine(profile, **overrides)
    except (EngineError, BootError) as error:
        raise BackendUnavailable(f"the simulated host {profile!r} cannot start: {error}") from None


def boot_like(description: Mapping[str, Any]) -> "Machine":
    """Boot a machine with the equipment that `description` tells of. Raise `BackendUnavailable`."""
    try:
        from sim_backend.cpu.errors import EngineError
        from sim_backend.kvm.recorded_host import profile_of_host
        from sim_backend.machine import BootError, Machine
    except ModuleNotFoundError as error:
        raise _not_installed(error) from None
    try:
        return Machine(profile_of_host(description))
    except (EngineError, BootError) as error:
        raise BackendUnavailable(f"no simulated host like {description.get('kernel')} can start: {error}") from None
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise BackendUnavailable(f"the description of the host is malformed: {error!r}") from None


class SimHost:
    """A simulated machine: of a profile, or with `description` like another host."""

    simulated = True

    def __init__(self, profile: str, description: Mapping[str, Any] | None = None) -> None:
        self.id = profile
        self._description = description
        self._machine = self._boot()
        self.kernel: Kernel = self._machine.kernel()
        self._provenance = _as_text(self._machine.provenance()) | {"tdxhw": __version__}

    def _boot(self) -> "Machine":
        return boot(self.id) if self._description is None else boot_like(self._description)

    def provenance(self) -> Provenance:
        """Return where results of this machine come from."""
        return self._provenance

    def leftovers(self) -> Sequence[str]:
        """Name what kernel and TDX module still hold."""
        return self._machine.leftovers()

    def start_anew(self) -> None:
        """Reboot, so that one test's leftovers are not the next one's failure."""
        self._machine.shutdown()
        self._machine = self._boot()
        self.kernel = self._machine.kernel()

    def debug_registers(self, vcpu_fd: int) -> Mapping[str, int] | None:
        """Return a vCPU's registers: a simulator may look where hardware does not."""
        reader = getattr(self.kernel, "debug_registers", None)
        return None if reader is None else reader(vcpu_fd)

    def close(self) -> None:
        """Shut down."""
        self._machine.shutdown()


def _as_text(facts: Mapping[str, object]) -> dict[str, str]:
    """Return every fact as one line of text; a list becomes its elements, a yes or no those words."""
    text = {}
    for key, value in facts.items():
        if isinstance(value, bool):
            text[key] = "yes" if value else "no"
        elif isinstance(value, (list, tuple)):
            text[key] = "; ".join(map(str, value)) or "none"
        else:
            text[key] = str(value)
    return text


@dataclass(frozen=True, slots=True)
class ReplayDivergence:
    """One record that the model answers differently."""

    line: int
    record: Mapping[str, Any]
    expected: str
    got: str
    note: str


def replay_file(path: Path) -> Iterator[ReplayDivergence | None]:
    """Play one recording on the model; yield for each record how it differs, or None where it agrees.

    A file of SEAMCALL vectors goes to the TDX module model, one whose records name a scenario to the KVM model. Raise
    `ReplayInputError`, naming file and line, on a file that is malformed or truncated.
    """
    try:
        from sim_backend import kvm_replay
        from sim_backend import replay as module_replay
        from sim_backend.tdx_module.not_modelled import NotModelled
    except ModuleNotFoundError as error:
        raise _not_installed(error) from None
    line = 0
    try:
        steps: Iterator[tuple[Mapping[str, Any], Any]] = (
            kvm_replay.replay(path) if _is_kvm_recording(path) else module_replay.replay(path)
        )
        for line, (record, found) in enumerate(steps, 1):
            if found is None:
                yield None
            else:
                yield ReplayDivergence(line, record, found.expected, found.got, found.note)
    except NotModelled as error:
        yield ReplayDivergence(line + 1, {}, "an answer", f"not modelled: {error}", "")
    except module_replay.ReplayFormatError as error:
        raise ReplayInputError(f"{path}:{error.line}: {error.why}") from None
    except OSError as error:
        raise ReplayInputError(f"{path}: {error.strerror or error}") from None


def mrtd_on_model(steps: Iterable[tuple[int, bytes, bool]], pages: int, profile: str) -> bytes:
    """Build a TD on the TDX module model and return its MRTD.

    Each of `steps` is a GPA [bytes], the contents of that 4 KiB page, and whether it is measured (TDH.MR.EXTEND) or
    added (TDH.MEM.PAGE.ADD); `pages` is how many will be added. Raise `BackendUnavailable` without the simulator.
    """
    try:
        from sim_backend.cpu.static_cpu import StaticCpus
        from sim_backend.hw.memory import PhysicalMemory
        from sim_backend.hw.platform import load_platform
        from sim_backend.seamcall_host import GIB, SeamcallHost
        from sim_backend.tdx_module.module import TdxModule
        from sim_backend.tdx_module.profile import load_profile
    except ModuleNotFoundError as error:
        raise _not_installed(error) from None
    try:
        module_profile = load_profile(profile)
    except FileNotFoundError:
        raise UnknownName("TDX module", profile, _module_profiles()) from None
    # Pages and their Secure EPT, one table for each page at the worst.
    tdmr_gib = 1 + 2 * pages * _PAGE_SIZE // GIB
    ram = (2 + tdmr_gib) * GIB
    platform = load_platform("golden", ram_bytes=ram, cmrs=[(1 << 20, ram - (1 << 20))])
    memory = PhysicalMemory(platform.ram_bytes)
    try:
        host = SeamcallHost(TdxModule(platform, memory, module_profile, StaticCpus()), tdmr_gib=tdmr_gib)
        host.bring_up()
        td = host.create_td()
        host.create_vcpu(td)
        for gpa, page, measuring in steps:
            if measuring:
                host.extend_page(td, gpa)
            else:
                memory.write(_MEASURE_SOURCE, page)
                host.add_page(td, gpa, _MEASURE_SOURCE)
        return host.finalize(td)
    finally:
        memory.close()


def _module_profiles() -> list[str]:
    directory = files("sim_backend.tdx_module") / "profiles"
    return [entry.name.removesuffix(".yaml") for entry in directory.iterdir() if entry.name.endswith(".yaml")]


def _is_kvm_recording(path: Path) -> bool:
    """Tell a recording of ioctls from one of SEAMCALLs: each of its records belongs to a scenario."""
    opener: Any = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rb") as stream:
        try:
            first = json.loads(stream.readline())
        except (ValueError, EOFError, zlib.error, gzip.BadGzipFile):
            return False  # the SEAMCALL reader says what is wrong, and in which line
    return isinstance(first, dict) and "scenario" in first
