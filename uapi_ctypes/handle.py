"""What every KVM object is: a file descriptor of a kernel, closed once."""

from typing import Self

from uapi_ctypes.kernel import IoctlArg, Kernel


class Handle:
    """A KVM file descriptor. A context manager; `close` is idempotent."""

    def __init__(self, kernel: Kernel, fd: int) -> None:
        self.kernel = kernel
        self.fd = fd
        """The file descriptor; -1 once closed, so that later calls are EBADF whatever reuses the number."""

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self.fd < 0

    def fileno(self) -> int:
        """Return the file descriptor, as select(2) and friends want it."""
        return self.fd

    def ioctl(self, request: int, arg: IoctlArg = 0) -> int:
        """Issue any `request`; every named method does no more than this."""
        return self.kernel.ioctl(self.fd, request, arg)

    def close(self) -> None:
        """Close the file descriptor; a second time does nothing."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            self.kernel.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
