"""What `gather` recorded of one host, typed: a check cannot mistake "could not be read" for an answer."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Self

from tdxhw.lab.doctor.gather import FORMAT
from tdxhw.lab.errors import FactsError
from tdxhw.lab.kernel_command_line import halves

# KVM_CAP_VM_TYPES is a bitmap of VM types: TDX is type 5 in mainline, and was type 2 in the series before.
# On mainline, and on every AMD host, 2 is SEV. Source: the uapi header arch/x86/include/uapi/asm/kvm.h.
_MAINLINE_TDX_BIT: Final = 1 << 5
_V17_TDX_BIT: Final = 1 << 2


@dataclass(frozen=True, slots=True)
class Cpu:
    """The first CPU in /proc/cpuinfo."""

    vendor_id: str
    model_name: str
    microcode: str
    flags: frozenset[str]


@dataclass(frozen=True, slots=True)
class KernelLog:
    """The lines of this boot about TDX and KVM; `error` says why there are none."""

    lines: tuple[str, ...]
    complete: bool  # reaches back to the first message of the boot
    error: str | None = None


@dataclass(frozen=True, slots=True)
class KvmDevice:
    """What /dev/kvm is and answers."""

    error: str | None
    mode: int | None  # permission bits
    gid: int | None
    api_version: int | None
    extensions: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Holder:
    """A process that holds VMs."""

    pid: int
    comm: str
    vms: int


@dataclass(frozen=True, slots=True)
class Facts:
    """One host at one moment."""

    release: str
    machine: str
    python: tuple[int, ...]
    uid: int
    groups: frozenset[int]
    cpu: Cpu
    packages: tuple[str, ...]
    msrs: Mapping[int, Mapping[str, int | str]]  # by MSR and package: the value, or the name of the errno
    kernel_log: KernelLog
    kvm: KvmDevice
    kernels: Mapping[str, Mapping[str, str | None] | None]  # configuration by release; None: not to be found
    holders: tuple[Holder, ...]
    unreadable_processes: int
    cgroup_capacity: str | None
    cgroup_current: str | None
    files: Mapping[str, str | None]

    @classmethod
    def from_json(cls, text: str, origin: str) -> Self:
        """Read what `gather` wrote. Raise ``FactsError`` naming `origin` if it is anything else."""
        try:
            return cls._from_record(json.loads(text))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise FactsError(f"{origin}: not what `tdxhw doctor --record` writes: {error!r}") from error

    @classmethod
    def _from_record(cls, record: dict[str, Any]) -> Self:
        if record["format"] != FORMAT:
            raise ValueError(f"format {record['format']}, this tdxhw reads {FORMAT}")
        cpu, log, kvm = record["cpu"], record["kernel_log"], record["kvm"]
        status = kvm.get("stat", {})
        return cls(
            release=str(record["release"]),
            machine=str(record["machine"]),
            python=tuple(int(part) for part in record["python"]),
            uid=int(record["uid"]),
            groups=frozenset(record["groups"]),
            cpu=Cpu(cpu["vendor_id"], cpu["model_name"], cpu["microcode"], frozenset(cpu["flags"])),
            packages=tuple(record["packages"]),
            msrs={
                int(msr, 16): {package: reading.get("value", reading.get("error")) for package, reading in by.items()}
                for msr, by in record["msrs"].items()
            },
            kernel_log=KernelLog(tuple(log.get("lines", ())), bool(log.get("complete")), log.get("error")),
            kvm=KvmDevice(
                error=kvm.get("error"),
                mode=status.get("mode"),
                gid=status.get("gid"),
                api_version=kvm.get("api_version"),
                extensions={name: int(value) for name, value in kvm.get("extensions", {}).items()},
            ),
            kernels={release: config.get("options") for release, config in record["kernels"].items()},
            holders=tuple(Holder(**holder) for holder in record["vms"]["holders"]),
            unreadable_processes=int(record["vms"]["unreadable"]),
            cgroup_capacity=record["misc_cgroup"]["capacity"],
            cgroup_current=record["misc_cgroup"]["current"],
            files={path: reading.get("text") for path, reading in record["files"].items()},
        )

    # ---- what several checks want to know ----

    def text(self, path: str) -> str | None:
        """Return the stripped text of a file, ``None`` if it could not be read."""
        text = self.files.get(path)
        return None if text is None else text.strip()

    def msr(self, address: int) -> Mapping[str, int] | str:
        """Return the value by package, or the name of the errno if one package could not be read."""
        readings = self.msrs.get(address, {})
        values: dict[str, int] = {}
        for package, reading in readings.items():
            if isinstance(reading, str):
                return reading
            values[package] = reading
        return values or "not recorded"

    @property
    def is_intel(self) -> bool:
        """Whether the CPU is Intel's; MSRs mean something else on others."""
        return self.cpu.vendor_id == "GenuineIntel"

    @property
    def command_line(self) -> tuple[str, ...]:
        """The kernel's parameters: not what is for init."""
        return tuple(halves(self.text("/proc/cmdline") or "")[0])

    @property
    def kvm_tdx_dialect(self) -> str | None:
        """``mainline`` or ``v17`` if KVM offers a TDX VM type, else ``None``."""
        types = self.kvm.extensions.get("KVM_CAP_VM_TYPES", 0)
        if not self.is_intel:
            return None
        if types & _MAINLINE_TDX_BIT:
            return "mainline"
        return "v17" if types & _V17_TDX_BIT else None

    def tdx_keyids(self, listing: str | None) -> int | None:
        """Return the number after ``tdx`` in a misc cgroup file, ``None`` if it is not there."""
        match = re.search(r"^tdx (\d+)$", listing or "", re.MULTILINE)
        return int(match.group(1)) if match else None
