"""What the inventory knows about a host, as values."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

DEFAULT_FOLDER: Final = Path("labs")


@dataclass(frozen=True, slots=True)
class SshTarget:
    """Where ssh(1) would go. What is ``None`` is left to ssh's own configuration."""

    host: str
    user: str | None = None
    port: int | None = None

    def __str__(self) -> str:
        """Return it as ssh(1) takes it."""
        user = f"{self.user}@" if self.user else ""
        host = f"[{self.host}]" if self.port and ":" in self.host else self.host
        return f"ssh://{user}{host}:{self.port}" if self.port else f"{user}{host}"


@dataclass(frozen=True, slots=True)
class Limits:
    """What a run may use of a host."""

    memory_gib: int | None = None  # [GiB] for all TDs of a run together
    run_timeout_s: int = 3600  # [s] for a whole run, on the host itself too
    test_timeout_s: int = 120  # [s] for one test
    tds: int | None = None  # TDs at the same time, at least 1


@dataclass(frozen=True, slots=True)
class Expectation:
    """What the doctor holds a host to, beyond being able to run TDs."""

    kernel: str | None = None  # glob over the kernel release: "6.1[6-9].*-tdx"
    module: str | None = None  # lowest acceptable TDX module version: "1.5.16"


@dataclass(frozen=True, slots=True)
class Driver:
    """A way to reach a host's power switch, its console or its lease: a driver's name and its options."""

    driver: str
    options: Mapping[str, str | int | tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Host:
    """One lab machine."""

    name: str
    ssh: SshTarget
    place: str  # "labs/spr-01.yaml:3"
    promises: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    limits: Limits = Limits()
    expects: Expectation = Expectation()
    power: Driver | None = None
    console: Driver | None = None
    lease: Driver | None = None  # None: on the host itself
