"""`SimKernel`: the system calls of a simulated host, byte for byte and errno for errno as the real ones."""

import contextlib
import ctypes
import errno
import os
import weakref
from collections.abc import Callable, Iterator
from typing import Final

from sim_backend.cpu.engine import Cpu
from sim_backend.fds import FdTable, OpenFile
from sim_backend.hw.gprs import GPR_NAMES
from sim_backend.kvm.address_space import AddressSpace, OwnProcess
from sim_backend.kvm.dispatch import CallTable
from sim_backend.kvm.errors import Errno
from sim_backend.kvm.guest_memfd import GUEST_MEMFD_FLAG_MMAP, GuestMemfd
from sim_backend.kvm.host import KvmHost
from sim_backend.kvm.system_ioctls import SystemIoctls
from sim_backend.kvm.vcpu import Vcpu
from uapi_ctypes.errors import BackendLimit, KvmError
from uapi_ctypes.ioctl import name_of
from uapi_ctypes.kernel import IoctlArg
from uapi_ctypes.linux import LinuxKernel
from uapi_ctypes.mapping import Mapping

_FILE_REQUESTS: Final = frozenset({0x5450, 0x5451, 0x5421, 0x5452})
"""FIONCLEX, FIOCLEX, FIONBIO, FIOASYNC: handled for every file before its own ioctls (`do_vfs_ioctl`)."""
_U64: Final = (1 << 64) - 1
_addressof: Final = ctypes.addressof


class PinnedMapping(Mapping):
    """A native mapping of a simulated file, which keeps that file until it is closed."""

    __slots__ = ("_file",)

    def __init__(self, length: int, file: OpenFile) -> None:
        super().__init__(length, fd=file.fd)
        self._file: OpenFile | None = file
        file.get()

    def close(self) -> None:
        """Unmap and let the file go. Idempotent."""
        super().close()
        file, self._file = self._file, None
        if file is not None:
            file.put()


class SimKernel:
    """The kernel of one simulated host; satisfies `uapi_ctypes.kernel.Kernel`."""

    def __init__(self, host: KvmHost, mm: AddressSpace | None = None) -> None:
        self.name = f"sim:{host.profile.name}"
        self.host: Final = host
        self.fds: Final = FdTable()
        self.mm: AddressSpace = mm if mm is not None else OwnProcess()
        self.protected_cpu: Callable[[Vcpu], Cpu | None] = _no_cpu
        """Finds the CPU of a vCPU that KVM cannot see into; the machine knows where."""
        self._linux: Final = LinuxKernel()
        self._calls = self.fds.calls
        _KERNELS.add(self)

    def open(self, path: str, flags: int = os.O_RDWR | os.O_CLOEXEC) -> int:
        """Open the simulated /dev/kvm, or any other path for real."""
        if path != "/dev/kvm":
            return self._linux.open(path, flags)
        fd = os.memfd_create("kvm", os.MFD_CLOEXEC if flags & os.O_CLOEXEC else 0)
        return self.fds.install(OpenFile(fd, "kvm", SystemIoctls(self.host, self).table(), None, _nothing))

    def ioctl(self, fd: int, request: int, arg: IoctlArg = 0) -> int:
        """Issue `request` and return its non-negative result; raise `KvmError` or `BackendLimit`."""
        calls = self._calls.get(fd)
        if calls is None:
            raise KvmError(name_of(request), self._errno_of_foreign(fd))
        handler = calls.get(request)
        if handler is None:
            if request in _FILE_REQUESTS:
                return self._linux.ioctl(fd, request, arg)
            raise KvmError(name_of(request), calls.unknown)
        try:
            return handler(arg & _U64 if isinstance(arg, int) else _addressof(arg))
        except Errno as refusal:
            raise KvmError(name_of(request), refusal.errno, hw_error=refusal.hw_error) from None
        except BackendLimit as limit:
            limit.registers = self.debug_registers(fd)
            raise

    def fallocate(self, fd: int, mode: int, offset: int, length: int) -> None:
        """Allocate or punch `length` at `offset` [bytes], with the `mode` bits of the system call."""
        file = self.fds.files.get(fd)
        if file is None:
            self._linux.fallocate(fd, mode, offset, length)
            return
        if not isinstance(file.object, GuestMemfd):
            raise KvmError("fallocate", errno.ENODEV)
        try:
            file.object.fallocate(mode, offset, length)
        except Errno as refusal:
            raise KvmError("fallocate", refusal.errno) from None

    def mmap(self, fd: int, length: int) -> Mapping:
        """Map `length` [bytes] of `fd` from its start, shared, readable and writable."""
        file = self.fds.files.get(fd)
        if file is None:
            return self._linux.mmap(fd, length)
        if isinstance(file.object, GuestMemfd):
            mappable = bool(file.object.flags & GUEST_MEMFD_FLAG_MMAP)
        else:
            mappable = file.kind == "kvm-vcpu"
        if not mappable:
            raise KvmError("mmap", errno.ENODEV)
        return PinnedMapping(length, file)

    def close(self, fd: int) -> None:
        """Close `fd`; the last close of a KVM object destroys it."""
        try:
            self.fds.close(fd)
        except OSError as error:
            raise KvmError("close", error.errno or errno.EBADF) from None

    def debug_registers(self, vcpu_fd: int) -> dict[str, int]:
        """Return the guest's registers for a failure message, also those that hardware would protect.

        Empty when `vcpu_fd` is no vCPU or nobody holds its registers. Not while the guest runs.
        """
        file = self.fds.files.get(vcpu_fd)
        if file is None or not isinstance(file.object, Vcpu):
            return {}
        cpu = file.object.cpu or self.protected_cpu(file.object)
        if cpu is None:
            return {}
        registers = dict(zip(GPR_NAMES, cpu.gprs, strict=True))
        state = cpu.get_state()
        return {"rip": cpu.rip, "rflags": cpu.rflags, **registers} | {
            "cr0": state.cr0,
            "cr2": state.cr2,
            "cr3": state.cr3,
            "cr4": state.cr4,
            "efer": state.efer,
            "cs": state.cs.selector,
        }

    # ---- what the KVM model asks of us (`sim_backend.kvm.files.Files`) --------------------------------------

    def add_file(self, fd: int, kind: str, calls: CallTable, target: object, release: Callable[[], None]) -> int:
        """Publish a descriptor that the model made."""
        return self.fds.install(OpenFile(fd, kind, calls, target, release))

    def object_of(self, fd: int) -> object:
        """Return the object behind a simulated descriptor, None for a foreign one; ``Errno(EBADF)`` if closed."""
        file = self.fds.files.get(fd)
        if file is not None:
            return file.object
        if self._errno_of_foreign(fd) == errno.EBADF:
            raise Errno(errno.EBADF)
        return None

    @contextlib.contextmanager
    def in_another_process(self) -> Iterator[None]:
        """Answer as to a forked child that inherited the descriptors: what belongs to an mm is EIO there."""
        own_calls, own_mm = self._calls, self.mm
        foreign = CallTable({}, errno.EIO)
        self._calls = {
            fd: foreign if file.kind in ("kvm-vm", "kvm-vcpu", "kvm-device") else file.calls
            for fd, file in self.fds.files.items()
        }
        self.mm = OwnProcess()
        try:
            yield
        finally:
            self._calls, self.mm = own_calls, own_mm

    @staticmethod
    def _errno_of_foreign(fd: int) -> int:
        try:
            os.fstat(fd)
        except (OSError, OverflowError):
            return errno.EBADF
        return errno.ENOTTY


def _no_cpu(_vcpu: Vcpu) -> Cpu | None:
    """Know no protected CPU."""
    return None


def _nothing() -> None:
    """Release nothing: /dev/kvm has no object behind it."""


_KERNELS: Final["weakref.WeakSet[SimKernel]"] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    """Make every VM and vCPU of the parent EIO: their mm is not this process's."""
    for kernel in _KERNELS:
        kernel.mm = OwnProcess()
        for file in kernel.fds.files.values():
            if file.kind in ("kvm-vm", "kvm-vcpu", "kvm-device"):
                file.calls.kill()


os.register_at_fork(after_in_child=_after_fork_in_child)
