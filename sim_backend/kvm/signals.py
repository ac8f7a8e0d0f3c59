"""Noticing that a signal arrived while a thread was inside KVM_RUN.

Python runs its handlers between bytecodes of the main thread, so a blocking call cannot see them. The C-level
handler does write the signal's number to the wakeup descriptor, though, at once and in whichever thread. Here that
descriptor is a memfd whose pages are mapped: reading one byte tells whether a signal came, without a system call.
"""

import fcntl
import mmap
import os
import signal
import threading
from typing import Final

_BYTES: Final = 1 << 16
_SPARE: Final = 256  # at the end, for signals that come while the memory is emptied [bytes]


class SignalWatch:
    """The process's wakeup descriptor. `mark` says where we are, `since` whether a signal came after that.

    A mark counts the bytes of all times. When the memory is full it begins anew, and whoever still holds a mark from
    before is told of a signal: the byte behind that mark was one.
    """

    def __init__(self) -> None:
        self._fd = os.memfd_create("kvm-signals", os.MFD_CLOEXEC)
        os.ftruncate(self._fd, _BYTES)
        fcntl.fcntl(self._fd, fcntl.F_SETFL, fcntl.fcntl(self._fd, fcntl.F_GETFL) | os.O_NONBLOCK)
        self._bytes = mmap.mmap(self._fd, _BYTES)
        self._position = 0  # of all times
        self._past = 0  # bytes before those in the memory now
        self._lock = threading.Lock()
        self._previous = -1
        self._installed = False

    def install(self) -> None:
        """Become the wakeup descriptor when the caller is the main thread and we are not it yet."""
        if threading.current_thread() is not threading.main_thread():
            return
        previous = signal.set_wakeup_fd(self._fd, warn_on_full_buffer=False)
        if previous != self._fd:
            self._previous = previous
        self._installed = True

    def mark(self) -> int:
        """Return the current position, to be given to `since`."""
        if not self._installed:
            self.install()
        past, received = self._past, self._bytes
        position = max(self._position - past, 0)
        while received[position]:
            position += 1
            if position >= _BYTES - _SPARE:
                return self._wrap(past)
        self._position = position = past + position
        return position

    def since(self, mark: int) -> bool:
        """Tell whether a signal with a Python handler arrived after `mark`; pass the bytes on if others wait."""
        mark -= self._past
        if mark < 0:
            return True
        if not self._bytes[mark]:
            return False
        if self._previous >= 0:
            end = mark
            while self._bytes[end]:
                end += 1
            os.write(self._previous, self._bytes[mark:end])
        return True

    def _wrap(self, past: int) -> int:
        with self._lock:
            if past == self._past:
                self._bytes[:] = bytes(_BYTES)
                self._past = past + _BYTES  # from here on the marks from before are old
                os.lseek(self._fd, 0, os.SEEK_SET)
            return self._past


class RunMask:
    """The thread's signals while KVM_RUN has a mask of its own (KVM_SET_SIGNAL_MASK, `kvm_sigset_activate()`).

    A signal that the thread blocks and the run does not stays blocked here: it ends the run and stays pending, as in
    the kernel, which gives the thread its mask back before any handler could run.
    """

    def __init__(self, mask: int) -> None:
        block = {number for number in signal.valid_signals() if mask >> int(number) - 1 & 1}
        self._outside = signal.pthread_sigmask(signal.SIG_BLOCK, block)
        self._ends_run: Final = self._outside - block

    def pending(self) -> bool:
        """Tell whether a signal that the thread blocks, but not the run, waits."""
        return bool(self._ends_run) and not self._ends_run.isdisjoint(signal.sigpending())

    def restore(self) -> None:
        """Give the thread its mask back."""
        signal.pthread_sigmask(signal.SIG_SETMASK, self._outside)


SIGNALS: Final = SignalWatch()
"""One per process, because the wakeup descriptor is."""
