"""The seam to the TDX module: SEAMCALL is an instruction, and this is all that KVM knows of the module."""

from typing import Protocol

from sim_backend.hw.gprs import Gprs


class Seam(Protocol):
    """A platform whose logical processors execute SEAMCALL."""

    def seamcall(self, lp: int, regs: Gprs) -> None:
        """Execute SEAMCALL on logical processor `lp`: RAX is the leaf in, the completion status out.

        TDH.VP.ENTER returns at the TD exit, with the host's view of the registers in `regs`.
        """
        ...

    def invept(self, lp: int) -> None:
        """Execute INVEPT on `lp`: TDs that it enters from now on use the shared EPT as it is now."""
        ...

    def kick(self, lp: int) -> None:
        """Send an IPI to `lp`: a TD that runs there, or is about to, exits soon. Callable from any thread."""
        ...

    def interrupt(self, lp: int, vector: int) -> None:
        """Send an IPI with `vector` to `lp`, which may be the caller's own. Callable from any thread.

        A TD that runs there, or is about to, exits soon, unless the vector is the one by which its vCPU is told of
        posted interrupts: then it goes on, and takes them.
        """
        ...
