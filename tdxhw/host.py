"""What a run needs to know about the machine it runs on, real or simulated."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

from uapi_ctypes.kernel import Kernel

Provenance: TypeAlias = Mapping[str, str]
"""backend, profile, dialect, kernel, build_id, tdx_module, cpu, microcode, tdxhw: in every result."""


class Host(Protocol):
    """One machine with a /dev/kvm. Tests see its `kernel` and nothing else."""

    id: str
    """Names the host in test ids: ``mainline``, ``v17``, ``local``."""
    kernel: Kernel
    simulated: bool

    def provenance(self) -> Provenance:
        """Return where results of this host come from."""

    def leftovers(self) -> Sequence[str]:
        """Name what the kernel still holds although every test closed its files. Empty where nobody can tell."""

    def start_anew(self) -> None:
        """Replace a simulated machine that a failed test left unclean; do nothing on a real one."""

    def debug_registers(self, vcpu_fd: int) -> Mapping[str, int] | None:
        """Return a TD vCPU's registers for a failure message, or None where the hardware protects them."""

    def close(self) -> None:
        """Give the machine back."""


@dataclass(frozen=True, slots=True)
class Backend:
    """The machines of one run, and why it is these."""

    name: str
    """``sim`` or ``local``."""
    reason: str
    """One phrase for the header: who chose and on what ground."""
    hosts: tuple[Host, ...]
    promises: frozenset[str] = field(default_factory=frozenset)
    """Capabilities whose absence fails the run."""

    def close(self) -> None:
        """Give back every machine."""
        for host in self.hosts:
            host.close()
