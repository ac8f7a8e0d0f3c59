"""A seam that answers some SEAMCALLs as the test says, and passes the others to the TDX module."""

from collections import defaultdict
from collections.abc import Callable
from typing import Final, NamedTuple

from sim_backend.hw.gprs import RAX, RCX, RDX, Gprs
from sim_backend.seam_port import SeamPort
from uapi_ctypes.tdx_leaves import SeamcallLeaf


class Call(NamedTuple):
    """One SEAMCALL as KVM issued it."""

    lp: int
    leaf: SeamcallLeaf
    rcx: int
    rdx: int


class ScriptedSeam:
    """Wraps `port`. `fail` queues completion statuses; `calls` is what was issued, in order."""

    def __init__(self, port: SeamPort) -> None:
        self._port: Final = port
        self._queued: Final[dict[int, list[int | None]]] = defaultdict(list)
        self._exits: Final[list[dict[int, int]]] = []
        self.calls: Final[list[Call]] = []
        self.hook: Callable[[int, Gprs], None] | None = None  # sees every call; `execute` is what it passes it to
        self.kick: Final = port.kick
        self.interrupt: Final = port.interrupt
        self.invept: Final = port.invept

    def fail(self, leaf: SeamcallLeaf, *statuses: int | None) -> None:
        """Answer the next calls of `leaf` with `statuses`; None lets one through."""
        self._queued[int(leaf)] += statuses

    def td_exit(self, rax: int, **registers: int) -> None:
        """Make the next TDH.VP.ENTER return `rax`, with registers as named ("rcx", "r8", …)."""
        self._exits.append({RAX: rax} | {_NUMBERS[name]: value for name, value in registers.items()})

    def leaves(self) -> list[SeamcallLeaf]:
        """Return the leaves that were issued, in order."""
        return [call.leaf for call in self.calls]

    def seamcall(self, lp: int, regs: Gprs) -> None:
        """Execute SEAMCALL, through `hook` when there is one."""
        if self.hook is None:
            self.execute(lp, regs)
        else:
            self.hook(lp, regs)

    def execute(self, lp: int, regs: Gprs) -> None:
        """Execute SEAMCALL as the script says."""
        leaf = regs[RAX] & 0xFFFF
        self.calls.append(Call(lp, SeamcallLeaf(leaf), regs[RCX], regs[RDX]))
        if leaf == SeamcallLeaf.TDH_VP_ENTER and self._exits:
            for number in range(16):
                regs[number] = 0
            for number, value in self._exits.pop(0).items():
                regs[number] = value
            return
        queued = self._queued[leaf]
        status = queued.pop(0) if queued else None
        if status is None:
            self._port.seamcall(lp, regs)
        else:
            regs[RAX] = status


_NUMBERS: Final = {
    name: number
    for number, name in enumerate(
        ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15")
    )
}
