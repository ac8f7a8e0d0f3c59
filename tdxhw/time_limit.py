"""End a KVM_RUN that takes too long, the same way on a real and on a simulated kernel.

`kvm_run.immediate_exit` is set first and the signal sent second: a kick that arrives while the vCPU thread is
still in user space is then found by KVM at the next entry (`arch/x86/kvm/x86.c`, kvm_arch_vcpu_ioctl_run), and one
that arrives inside KVM_RUN interrupts it.
"""

import signal
import threading
from types import FrameType, TracebackType
from typing import Final, Self

from tdxhw.errors import HarnessError
from uapi_ctypes.kvm_run import KvmRun

KICK_SIGNAL: Final = signal.SIGRTMIN
"""Delivered to the vCPU's thread only; its handler does nothing, the interruption is the message."""


def _kicked(_signum: int, _frame: FrameType | None) -> None:
    """Do nothing: an ignored signal would not interrupt KVM_RUN, a handled one does."""


def install_kick_handler() -> None:
    """Make `KICK_SIGNAL` interrupt system calls. Idempotent; must first be called in the main thread."""
    if signal.getsignal(KICK_SIGNAL) is _kicked:
        return
    if threading.current_thread() is not threading.main_thread():
        raise HarnessError("call install_kick_handler() in the main thread before vCPU threads start")
    signal.signal(KICK_SIGNAL, _kicked)


class TimeLimit:
    """While entered, kicks the vCPU of `run` out of KVM_RUN on the calling thread once `limit_s` [s] have passed."""

    def __init__(self, run: KvmRun, limit_s: float) -> None:
        install_kick_handler()
        self.limit_s = limit_s
        self.expired = False
        self._run = run
        self._thread_id = threading.get_ident()
        self._done = threading.Event()
        self._kicker = threading.Thread(target=self._kick, name="tdxhw-kicker", daemon=True)

    def __enter__(self) -> Self:
        """Start the clock."""
        self._kicker.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the clock and leave the vCPU as if it had never been kicked."""
        self._done.set()
        self._kicker.join()
        if self.expired:
            self._run.immediate_exit = 0

    def _kick(self) -> None:
        if self._done.wait(self.limit_s):
            return
        # Repeated, because Python runs between two KVM_RUNs may have swallowed a signal on the simulator.
        self.expired = True
        while not self._done.is_set():
            self._run.immediate_exit = 1
            signal.pthread_kill(self._thread_id, KICK_SIGNAL)
            self._done.wait(0.1)
