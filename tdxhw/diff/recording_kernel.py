"""`RecordingKernel`: passes every system call on to a kernel and writes down what was asked and what came back."""

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeAlias, TypeVar

from tdxhw.diff.fields import Fields, changes, fields_of
from tdxhw.diff.names import Names
from tdxhw.diff.pointees import pointee
from tdxhw.diff.run_page import RunPage
from uapi_ctypes.errors import BackendLimit, KvmError, errno_name
from uapi_ctypes.ioctl import KvmRequest, name_of, size_of
from uapi_ctypes.kernel import IoctlArg, Kernel, KernelMapping
from uapi_ctypes.kvm import KvmCreateDevice, KvmUserspaceMemoryRegion, KvmUserspaceMemoryRegion2

Call: TypeAlias = dict[str, Any]
"""One call: ``obj``, ``req``, ``arg``; ``ret``, or ``errno`` (and ``hw_error``), or ``limit`` (what the simulator does
not do); ``out``; for KVM_RUN ``exit`` too."""

Result = TypeVar("Result")

_RUN: Final = int(KvmRequest.KVM_RUN)
_CREATES: Final[dict[int, str]] = {
    KvmRequest.KVM_CREATE_VM: "vm",
    KvmRequest.KVM_CREATE_VCPU: "vcpu",
    KvmRequest.KVM_CREATE_GUEST_MEMFD: "gmem",
    KvmRequest.KVM_GET_STATS_FD: "stats",
}
_SET_REGION: Final = (KvmRequest.KVM_SET_USER_MEMORY_REGION, KvmRequest.KVM_SET_USER_MEMORY_REGION2)


@dataclass(slots=True)
class _Pending:
    """A call under way: what it was given, and what the object behind its argument held."""

    call: Call
    argument: Any = None
    before: Fields | None = None


class RecordingKernel:
    """A `Kernel` that records while a test runs, see `begin` and `end`."""

    def __init__(self, kernel: Kernel, sink: Callable[[Call], None], *, v17: bool = False) -> None:
        """Record the calls to `kernel` into `sink`; `v17` says how KVM_EXIT_TDX is laid out."""
        self.name = kernel.name
        self._kernel: Final = kernel
        self._sink: Final = sink
        self._v17: Final = v17
        self._recording = False
        self._names = Names()
        self._pages: dict[int, RunPage] = {}
        self._lock: Final = threading.RLock()  # vCPU threads record too; never held while the kernel works

    def begin(self) -> None:
        """Record from now on, all objects named anew."""
        with self._lock:
            self._names, self._pages, self._recording = Names(), {}, True

    def end(self) -> None:
        """Stop recording."""
        self._recording = False

    # ---- the system calls -----------------------------------------------------------------------------------

    def open(self, path: str, flags: int = os.O_RDWR | os.O_CLOEXEC) -> int:
        """Open `path` and return the file descriptor."""
        if not self._recording:
            return self._kernel.open(path, flags)
        pending = _Pending({"req": "open", "arg": {"path": path, "flags": flags}})
        fd = self._issue(pending, lambda: self._kernel.open(path, flags))
        with self._lock:
            pending.call["ret"] = self._names.created("kvm" if path == "/dev/kvm" else "file", fd)
        self._sink(pending.call)
        return fd

    def ioctl(self, fd: int, request: int, arg: IoctlArg = 0) -> int:
        """Issue `request` and return its non-negative result."""
        if not self._recording:
            return self._kernel.ioctl(fd, request, arg)
        if request == _RUN and fd in self._pages:
            return self._kvm_run(fd, self._pages[fd], arg)
        with self._lock:
            pending = self._describe(fd, request, arg)
        result = self._issue(pending, lambda: self._kernel.ioctl(fd, request, arg))
        with self._lock:
            self._answered(pending, request, result)
        self._sink(pending.call)
        return result

    def fallocate(self, fd: int, mode: int, offset: int, length: int) -> None:
        """Reserve or punch space from `offset` on [bytes]."""
        if not self._recording:
            self._kernel.fallocate(fd, mode, offset, length)
            return
        call = {
            "obj": self._names.of_fd(fd),
            "req": "fallocate",
            "arg": {"mode": mode, "offset": offset, "len": length},
        }
        pending = _Pending(call)
        self._issue(pending, lambda: self._kernel.fallocate(fd, mode, offset, length))
        self._sink(pending.call | {"ret": 0})

    def mmap(self, fd: int, length: int) -> KernelMapping:
        """Map `length` [bytes] of `fd` from its start."""
        if not self._recording:
            return self._kernel.mmap(fd, length)
        name = self._names.of_fd(fd)
        pending = _Pending({"obj": name, "req": "mmap", "arg": {"length": length}})
        mapping = self._issue(pending, lambda: self._kernel.mmap(fd, length))
        if str(name).startswith("vcpu"):
            with self._lock:
                self._pages[fd] = RunPage(mapping, v17=self._v17)
        self._sink(pending.call | {"ret": 0})
        return mapping

    def close(self, fd: int) -> None:
        """Close `fd`."""
        if not self._recording:
            self._kernel.close(fd)
            return
        pending = _Pending({"obj": self._names.of_fd(fd), "req": "close", "arg": {}})
        self._pages.pop(fd, None)
        self._issue(pending, lambda: self._kernel.close(fd))
        self._sink(pending.call | {"ret": 0})

    # ---- what is written down -------------------------------------------------------------------------------

    def _issue(self, pending: _Pending, do: Callable[[], Result]) -> Result:
        """Make the call; a refusal is recorded here and raised."""
        thread = threading.current_thread()
        if thread is not threading.main_thread():
            pending.call["thread"] = thread.name
        try:
            return do()
        except KvmError as error:
            with self._lock:
                self._refused(pending, error)
            self._sink(pending.call)
            raise
        except BackendLimit as limit:
            pending.call["limit"] = str(limit.args[0])
            self._sink(pending.call)
            raise

    def _describe(self, fd: int, request: int, arg: IoctlArg) -> _Pending:
        names = self._names
        call: Call = {"obj": names.of_fd(fd), "req": name_of(request)}
        if isinstance(arg, int):
            call["arg"] = names.of_address(arg) if size_of(request) else arg
            return _Pending(call)
        before = fields_of(arg, names)
        call["arg"] = before
        return _Pending(call, arg, before)

    def _refused(self, pending: _Pending, error: KvmError) -> None:
        pending.call["errno"] = errno_name(error.errno or 0)
        if error.hw_error:
            pending.call["hw_error"] = error.hw_error
        self._changed(pending)

    def _answered(self, pending: _Pending, request: int, result: int) -> None:
        call, argument, names = pending.call, pending.argument, self._names
        kind = _CREATES.get(request)
        call["ret"] = names.created(kind, result) if kind else result
        self._changed(pending)
        if isinstance(argument, KvmCreateDevice) and request == KvmRequest.KVM_CREATE_DEVICE and not argument.flags & 1:
            call["out"] = call.get("out", {}) | {"fd": names.created("device", argument.fd)}
        elif request in _SET_REGION and isinstance(argument, KvmUserspaceMemoryRegion | KvmUserspaceMemoryRegion2):
            names.slots[call["obj"], argument.slot] = argument.memory_size
        if found := pointee(str(call["obj"]), request, argument, names):
            call["out"] = call.get("out", {}) | found

    def _changed(self, pending: _Pending) -> None:
        if pending.before is None:
            return
        if out := changes(pending.before, fields_of(pending.argument, self._names)):
            pending.call["out"] = out

    def _kvm_run(self, fd: int, page: RunPage, arg: IoctlArg) -> int:
        with self._lock:
            inputs = page.inputs(self._names)
            pending = _Pending({"obj": self._names.of_fd(fd), "req": "KVM_RUN", "arg": inputs})
        thread = threading.current_thread()
        if thread is not threading.main_thread():
            pending.call["thread"] = thread.name
        failed = True
        try:
            result = self._kernel.ioctl(fd, _RUN, arg)
            pending.call["ret"] = result
            failed = False
        except KvmError as error:
            pending.call["errno"] = errno_name(error.errno or 0)
            raise
        except BackendLimit as limit:
            pending.call["limit"] = str(limit.args[0])
            raise
        finally:
            with self._lock:
                pending.call["exit"], pending.call["out"] = page.outputs(self._names, failed=failed)
            self._sink(pending.call)
        return result
