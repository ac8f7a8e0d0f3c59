"""What the KVM model needs from the file layer above it: publishing descriptors, and looking them up."""

from collections.abc import Callable
from typing import Protocol

from sim_backend.kvm.address_space import AddressSpace
from sim_backend.kvm.dispatch import CallTable


class Files(Protocol):
    """The descriptor table of the process that calls, and its memory."""

    mm: AddressSpace

    def add_file(self, fd: int, kind: str, calls: CallTable, target: object, release: Callable[[], None]) -> int:
        """Publish a descriptor; `release` runs when it is closed and no mapping is left."""
        ...

    def object_of(self, fd: int) -> object:
        """Return the object behind a simulated descriptor, None for a foreign one; ``Errno(EBADF)`` if closed."""
        ...
