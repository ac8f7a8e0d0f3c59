"""A host whose kernel answers KVM_CHECK_EXTENSION and little else: for tests of the harness alone."""

import errno
import os
from collections.abc import Mapping, Sequence

from tdxhw.host import Backend
from uapi_ctypes.caps import KvmCap
from uapi_ctypes.errors import KvmError
from uapi_ctypes.ioctl import KvmRequest, name_of
from uapi_ctypes.kernel import IoctlArg, Kernel, KernelMapping

MAINLINE_CAPS = {KvmCap.KVM_CAP_VM_TYPES: 1 << 5 | 1, KvmCap.KVM_CAP_MAX_VCPUS: 4}
V17_CAPS = {KvmCap.KVM_CAP_VM_TYPES: 1 << 2 | 1, KvmCap.KVM_CAP_MAX_VCPUS: 4, KvmCap.KVM_CAP_X86_BUS_LOCK_EXIT: 3}
PLAIN_CAPS = {KvmCap.KVM_CAP_VM_TYPES: 1, KvmCap.KVM_CAP_MAX_VCPUS: 1}


class FakeKernel:
    """Answers from a table of capabilities; a VM is a /dev/null."""

    def __init__(self, caps: Mapping[KvmCap, int]) -> None:
        self.name = "fake"
        self.caps = caps
        self.open_fds: set[int] = set()
        self.asked: list[str] = []

    def _new(self) -> int:
        fd = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        self.open_fds.add(fd)
        return fd

    def open(self, path: str, flags: int = os.O_RDWR) -> int:
        if not self.caps:
            raise KvmError(f"open {path}", errno.ENOENT)
        return self._new()

    def ioctl(self, fd: int, request: int, arg: IoctlArg = 0) -> int:
        assert fd in self.open_fds
        self.asked.append(name_of(request))
        if request == KvmRequest.KVM_CHECK_EXTENSION:
            assert isinstance(arg, int)
            return self.caps.get(KvmCap(arg), 0)
        if request == KvmRequest.KVM_GET_API_VERSION:
            return 12
        if request == KvmRequest.KVM_GET_VCPU_MMAP_SIZE:
            return 12288
        if request == KvmRequest.KVM_CREATE_VM:
            return self._new()
        raise KvmError(name_of(request), errno.ENOTTY)

    def fallocate(self, fd: int, mode: int, offset: int, length: int) -> None:
        raise KvmError("fallocate", errno.ENOTTY)

    def mmap(self, fd: int, length: int) -> KernelMapping:
        raise KvmError("mmap", errno.ENODEV)

    def close(self, fd: int) -> None:
        self.open_fds.discard(fd)
        os.close(fd)


class FakeHost:
    simulated = True

    def __init__(self, name: str, caps: Mapping[KvmCap, int]) -> None:
        self.id = name
        self.fake = FakeKernel(caps)
        self.kernel: Kernel = self.fake
        self.left: list[str] = []
        self.restarts = 0
        self.closed = False

    def provenance(self) -> Mapping[str, str]:
        return {"backend": "fake", "dialect": self.id, "kernel": "0.0"}

    def leftovers(self) -> Sequence[str]:
        return [*self.left, *(f"fd {fd}" for fd in self.fake.open_fds)]

    def start_anew(self) -> None:
        self.restarts += 1
        self.left.clear()
        for fd in list(self.fake.open_fds):
            self.fake.close(fd)

    def debug_registers(self, vcpu_fd: int) -> Mapping[str, int] | None:
        return None

    def close(self) -> None:
        self.closed = True


def fake_backend(*hosts: FakeHost, promises: Sequence[str] = ()) -> Backend:
    return Backend("fake", "a test", hosts, frozenset(promises))
