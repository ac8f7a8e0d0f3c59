"""irqfds: eventfds that raise a GSI (`virt/kvm/eventfd.c`).

One daemon thread of the VM waits for all of them with epoll, as the kernel's wait-queue callbacks would.
"""

import contextlib
import errno
import os
import select
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from sim_backend.kvm.errors import Errno
from sim_backend.kvm.io_bus import duplicate_eventfd, same_eventfd
from sim_backend.kvm.irqchip import IRQFD_RESAMPLE_SOURCE

if TYPE_CHECKING:
    from sim_backend.kvm.vm import Vm

_USER_SOURCE: Final = 0  # KVM_USERSPACE_IRQ_SOURCE_ID


@dataclass(frozen=True, slots=True)
class Irqfd:
    """One registration; both descriptors are our own duplicates."""

    fd: int
    gsi: int
    resample_fd: int | None


class Irqfds:
    """The irqfds of one VM; they do not pin it: closing the VM fd shuts them down.

    Lock order: `_firing`, then the irqchip's, then `_lock`, which is held for no call.
    """

    def __init__(self, vm: "Vm") -> None:
        self._vm: Final = vm
        self._by_fd: Final[dict[int, Irqfd]] = {}
        self._firing: Final = threading.Lock()  # while one fires: none does so after its deassignment has returned
        self._lock: Final = threading.Lock()  # of `_by_fd`, and of what is closed
        self._resampled: frozenset[int] = frozenset()  # GSIs
        self._epoll: Final = select.epoll()
        self._stop: Final = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll.register(self._stop, select.EPOLLIN)
        self._thread: threading.Thread | None = None

    def assign(self, fd: int, gsi: int, resamplefd: int | None) -> None:
        """Register; EBUSY when the eventfd is registered already."""
        own, resample = duplicate_eventfd(fd), None
        try:
            resample = duplicate_eventfd(resamplefd) if resamplefd is not None else None
            self._register(Irqfd(own, gsi, resample))
        except Errno:
            os.close(own)
            if resample is not None:
                os.close(resample)
            raise
        self._epoll.register(own, select.EPOLLIN | select.EPOLLET)
        if self._thread is None:
            self._thread = threading.Thread(target=self._serve, name="kvm-irqfd", daemon=True)
            self._thread.start()

    def _register(self, irqfd: Irqfd) -> None:
        with self._lock:
            if any(same_eventfd(other.fd, irqfd.fd) for other in self._by_fd.values()):
                raise Errno(errno.EBUSY)
            self._by_fd[irqfd.fd] = irqfd
            self._note_resampled()

    def _note_resampled(self) -> None:
        self._resampled = frozenset(one.gsi for one in self._by_fd.values() if one.resample_fd is not None)

    def deassign(self, fd: int, gsi: int) -> None:
        """Unregister every one with this eventfd and GSI; none is fine."""
        probe = duplicate_eventfd(fd)
        try:
            with self._firing:
                was_resampled = gsi in self._resampled
                with self._lock:
                    gone = [one for one in self._by_fd.values() if one.gsi == gsi and same_eventfd(one.fd, probe)]
                    for one in gone:
                        self._drop(one)
                    self._note_resampled()
                irqchip = self._vm.irqchip
                if was_resampled and gsi not in self._resampled and irqchip is not None:
                    irqchip.set_irq(IRQFD_RESAMPLE_SOURCE, gsi, False)
        finally:
            os.close(probe)

    def resamples(self, gsi: int) -> bool:
        """Tell whether somebody wants to know of the end of the GSI's interrupts."""
        return gsi in self._resampled

    def resample(self, gsi: int) -> None:
        """Signal the resample eventfds of `gsi` (any thread)."""
        with self._lock:
            for one in self._by_fd.values():
                if one.gsi == gsi and one.resample_fd is not None:
                    os.eventfd_write(one.resample_fd, 1)

    def _drop(self, irqfd: Irqfd) -> None:
        del self._by_fd[irqfd.fd]
        with contextlib.suppress(OSError):
            self._epoll.unregister(irqfd.fd)
        os.close(irqfd.fd)
        if irqfd.resample_fd is not None:
            os.close(irqfd.resample_fd)

    def _serve(self) -> None:
        while True:
            for fd, _events in self._epoll.poll():
                if fd == self._stop:
                    return
                with self._firing:
                    with self._lock:
                        irqfd = self._by_fd.get(fd)
                        if irqfd is None or not self._consume(fd):
                            continue
                    self._fire(irqfd)

    @staticmethod
    def _consume(fd: int) -> bool:
        """Empty the eventfd; False where it was empty: a descriptor that was closed and opened anew was meant."""
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        if not poll.poll(0):
            return False
        os.read(fd, 8)
        return True

    def _fire(self, irqfd: Irqfd) -> None:
        irqchip = self._vm.irqchip
        if irqchip is None or self._vm.dead:
            return
        if irqfd.resample_fd is not None:
            irqchip.set_irq(IRQFD_RESAMPLE_SOURCE, irqfd.gsi, True)  # until the guest has ended the interrupt
            return
        irqchip.set_irq(_USER_SOURCE, irqfd.gsi, True)
        irqchip.set_irq(_USER_SOURCE, irqfd.gsi, False)

    def close(self) -> None:
        """Shut everything down (the VM fd is closed)."""
        os.eventfd_write(self._stop, 1)
        if self._thread is not None:
            self._thread.join(2)
        with self._lock:
            for irqfd in list(self._by_fd.values()):
                self._drop(irqfd)
        self._epoll.close()
        os.close(self._stop)
