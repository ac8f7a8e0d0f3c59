"""Replay of recorded ioctls: each scenario in a fresh process of a host with the recorded kernel's profile."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from sim_backend.cpu.unicorn_engine import UnicornEngine
from sim_backend.hw.memory import PhysicalMemory
from sim_backend.kernel import SimKernel
from sim_backend.kvm.errors import SimLimit
from sim_backend.kvm.host import KvmHost
from sim_backend.kvm.host_pages import HostPages
from sim_backend.kvm.lp_pool import LpPool
from sim_backend.kvm.profile import HostProfile
from sim_backend.kvm.recorded_host import profile_of_recording
from sim_backend.kvm.vm_kinds import ordinary_vm_types
from sim_backend.kvm_player import Player, PlayError, SimBug
from sim_backend.kvm_recording import Record, read_records
from sim_backend.vector_file import ReplayFormatError

__all__ = ["Divergence", "RecordedHost", "ReplayFormatError", "replay"]

_RAM_BYTES: Final = 64 << 20  # an ordinary VM's memory is user space's: the host needs next to none
_COMPARED: Final = ("ret", "errno", "out", "exit", "run", "sync_regs")
_REPLAY_WATCHDOG_S: Final = 0.3  # [s] the recorder waited ten times longer for guests that never exit
_SLOWNESS: Final = 4.0  # a guest that came to its end before the signal must do so on a busy machine too
_PATH: Final = re.compile(r"([^.\[\]]+)|\[(\d+)\]")


@dataclass(frozen=True, slots=True)
class Divergence:
    """One record that the model answers differently."""

    record: Record
    expected: str
    got: str

    @property
    def note(self) -> str:
        """Where in the recording it is."""
        return f"{self.record.get('scenario')} step {self.record.get('i')}"


class RecordedHost:
    """A simulated host like the one that was recorded, for one scenario after the other."""

    def __init__(self, profile: HostProfile) -> None:
        self._memory: Final = PhysicalMemory(_RAM_BYTES)
        self._host: Final = KvmHost(
            profile=profile,
            memory=self._memory,
            pages=HostPages(self._memory, [(1 << 20, _RAM_BYTES)]),
            cpus=UnicornEngine(self._memory),
            seam=None,
            lps=LpPool(profile.n_cpus),
            vm_types=ordinary_vm_types(profile),
        )

    def player(self) -> Player:
        """Return a player for a fresh process on this host."""
        return Player(SimKernel(self._host), watchdog_s=_REPLAY_WATCHDOG_S, slowness=_SLOWNESS)

    def leftovers(self) -> list[str]:
        """Say what is still held although every process has ended."""
        found = []
        if self._host.vms:
            found.append(f"{len(self._host.vms)} VMs")
        if self._host.pages.in_use:
            found.append(f"{self._host.pages.in_use} pages")
        return found

    def close(self) -> None:
        """Give the memory back."""
        self._memory.close()


def replay(path: Path) -> Iterator[tuple[Record, Divergence | None]]:
    """Play the recording at `path`; yield each record and how the model's answer differs, if it does.

    The kernel and its CPU are taken from ``host.json`` beside the file. Raise `ReplayFormatError` or ``OSError``.
    """
    host = RecordedHost(profile_of_recording(path))
    try:
        player: Player | None = None
        scenario = ""
        for line, record in enumerate(read_records(path), 1):
            if record["scenario"] != scenario or player is None:
                if player is not None:
                    player.close()
                player, scenario = host.player(), record["scenario"]
            try:
                answer = player.play(record)
            except PlayError as error:
                raise ReplayFormatError(line, str(error)) from None
            except SimLimit as limit:
                yield record, Divergence(record, _answer_text(record), f"not modelled: {limit}")
                continue
            yield record, compare(record, answer)
        if player is not None:
            player.close()
        if left := host.leftovers():
            raise SimBug(f"{path.name}: every descriptor is closed and still there are {', '.join(left)}")
    finally:
        host.close()


def compare(record: Record, answer: Mapping[str, Any]) -> Divergence | None:
    """Compare an answer with the recorded one, less what the recording says is no property of the interface."""
    if record.get("check") is False:
        return None
    expected = {key: record.get(key) for key in _COMPARED}
    got = {key: answer.get(key) for key in _COMPARED}
    for side in (expected, got):
        for key in _COMPARED:
            side[key] = json.loads(json.dumps(side[key]))
        if side["out"] is None and record.get("out") in (None, {}):
            side["out"] = record.get("out")
        exit_ = side["exit"]
        if isinstance(exit_, dict) and exit_.get("reason") == "KVM_EXIT_INTERNAL_ERROR":
            for debug_word in ("data", "ndata"):
                exit_.pop(debug_word, None)
        for path in (*record.get("unstable", ()), *record.get("host_specific", ())):
            _forget(side, path)
    if expected == got:
        return None
    return Divergence(record, *_differences(expected, got))


def _forget(answer: dict[str, Any], path: str) -> None:
    """Replace the value at a dotted path, so that it is not compared."""
    keys = [int(index) if index else name for name, index in _PATH.findall(path)]
    place: Any = answer
    for key in keys[:-1]:
        try:
            place = place[key]
        except (KeyError, IndexError, TypeError):
            return
    if isinstance(place, dict) or (isinstance(place, list) and isinstance(keys[-1], int) and keys[-1] < len(place)):
        place[keys[-1]] = "not compared"


def _differences(expected: dict[str, Any], got: dict[str, Any]) -> tuple[str, str]:
    left: list[str] = []
    right: list[str] = []
    for key in _COMPARED:
        a, b = expected[key], got[key]
        if a == b:
            continue
        if isinstance(a, dict) and isinstance(b, dict):
            names = [name for name in (*a, *(name for name in b if name not in a)) if a.get(name) != b.get(name)]
            left.extend(f"{key}.{name}={a.get(name)}" for name in names)
            right.extend(f"{key}.{name}={b.get(name)}" for name in names)
        else:
            left.append(f"{key}={a}")
            right.append(f"{key}={b}")
    return " ".join(left), " ".join(right)


def _answer_text(record: Record) -> str:
    return " ".join(f"{key}={record[key]}" for key in _COMPARED if record.get(key) is not None)
