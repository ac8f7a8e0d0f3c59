"""Playing one recorded scenario on a kernel, real or simulated: each record becomes the call that it was."""

import ctypes
import errno
import os
import signal
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, Final

from sim_backend.file_calls import FileCalls, RawMapping
from sim_backend.kernel import SimKernel
from sim_backend.kvm.kvm_run_page import EXIT_REASON, IMMEDIATE_EXIT, PIO_PAGE_OFFSET, SYNC_REGS, UNION
from sim_backend.kvm_exits import decode_exit, decode_header
from sim_backend.kvm_recording import (
    Record,
    byte_string,
    is_list,
    layout,
    number,
    pack_argument,
    request_info,
    shown,
    unpack_argument,
)
from uapi_ctypes.errors import KvmError
from uapi_ctypes.kernel import IoctlArg, Kernel, KernelMapping

_NEVER_OPEN: Final = 0x7FFF_FFFF  # a descriptor
UNTOUCHED: Final = 0xEEEE_EEEE
WATCHDOG_S: Final = 3.0  # a guest that never exits is interrupted after this time [s]
_POINTERS: Final = {"null": 0, "bad": 1, "kernel": 0xFFFF_8880_0000_0000}
_PROTECTIONS: Final = {"rw": 3, "r": 1, "none": 0}
_KVM_RUN: Final = 0xAE80
_MAP_PRIVATE_ANONYMOUS: Final = 0x22
_REQUEST_INTERRUPT_WINDOW: Final = 0
_CR8: Final = 16
_VALID_REGS: Final = 288
_DIRTY_REGS: Final = 296


class PlayError(Exception):
    """A record cannot be played: it names an object that does not exist, or a step that is not known."""


class SimBug(RuntimeError):  # noqa: N818 - the house word for an invariant of ours that broke
    """The simulated kernel raised what no kernel raises."""


class Player:
    """One process's view of a kernel while a scenario runs."""

    def __init__(self, kernel: Kernel, *, watchdog_s: float = WATCHDOG_S, slowness: float = 1.0) -> None:
        """Play on `kernel`, whose guests take `slowness` times as long as those that were recorded.

        Guests that the recording interrupted, as they never exit, are interrupted after `watchdog_s` already.
        """
        self._kernel: Final = kernel
        self._files: Final = FileCalls(kernel)
        self._watchdog_s: Final = watchdog_s
        self._signal_unit_s: Final = slowness / 1000
        self._fds: Final[dict[str, int]] = {}
        self._closed: Final[set[str]] = set()
        self._buffers: Final[dict[str, RawMapping]] = {}
        self._runs: Final[dict[str, KernelMapping]] = {}
        self._counts: Final[dict[str, int]] = {}
        self._steps: Final[dict[str, Callable[[Record], dict[str, Any]]]] = {
            "open": self._open,
            "buf": self._buf,
            "poke": self._poke,
            "peek": self._peek,
            "munmap": self._munmap,
            "eventfd": self._eventfd,
            "memfd": self._memfd,
            "devnull": self._devnull,
            "close": self._close,
            "mmap_run": self._mmap_run,
            "fallocate": self._fallocate,
            "fstat": self._fstat,
            "read": self._read,
            "write": self._write,
            "lseek": self._lseek,
            "ftruncate": self._ftruncate,
            "mmap": self._mmap,
        }

    def play(self, record: Record) -> dict[str, Any]:
        """Make the call of `record`; return its answer in the recording's terms. Raise `PlayError`."""
        try:
            if "nr" in record:
                with self._process_of(record):
                    return self._ioctl(record)
            step = self._steps.get(record["req"])
            if step is None:
                raise PlayError(f"no step is called {record['req']!r}")
            return step(record)
        except KvmError as error:
            return {"ret": -1, "errno": _errno_name(error)}
        except (KeyError, ValueError, TypeError, struct.error) as error:
            raise PlayError(f"malformed record: {error!r}") from error

    def close(self) -> None:
        """Close every descriptor and mapping that is left, as the end of the process would."""
        for run in self._runs.values():
            run.close()
        for name, fd in self._fds.items():
            if name not in self._closed:
                self._kernel.close(fd)
        for buffer in self._buffers.values():
            buffer.close()
        self._runs.clear()
        self._fds.clear()
        self._buffers.clear()

    # ---- names --------------------------------------------------------------------------------------------------

    def _resolve(self, name: str) -> int:
        if name.startswith("hva:"):
            buffer, _, offset = name.removeprefix("hva:").partition("+")
            return self._buffers[buffer].address + (int(offset, 0) if offset else 0)
        return self._number_of(name)

    def _fd(self, record: Record) -> int:
        return self._number_of(record["obj"])

    def _number_of(self, name: str) -> int:
        """Return the descriptor of an object. Once closed, another object may have its number, but nothing of ours."""
        fd = self._fds[name]
        if name not in self._closed or any(fd == other for key, other in self._fds.items() if key not in self._closed):
            return fd
        return _NEVER_OPEN

    def _name(self, kind: str, fd: int) -> str:
        index = self._counts.get(kind, 0)
        self._counts[kind] = index + 1
        name = f"{kind}{index}"
        self._fds[name] = fd
        return name

    def _process_of(self, record: Record) -> Any:
        kernel = self._kernel
        if record.get("ctx") and isinstance(kernel, SimKernel):
            return kernel.in_another_process()
        return nullcontext()

    # ---- host steps ---------------------------------------------------------------------------------------------

    def _open(self, record: Record) -> dict[str, Any]:
        return {"ret": self._name("kvm", self._kernel.open(record["arg"]["path"]))}

    def _buf(self, record: Record) -> dict[str, Any]:
        arg = record["arg"]
        size = number(arg["size"])
        buffer = self._files.mmap(-1, size, 3, _MAP_PRIVATE_ANONYMOUS, 0)
        if number(arg["fill"]):
            ctypes.memset(buffer.address, number(arg["fill"]), size)
        protection = _PROTECTIONS[arg["prot"]]
        if protection != _PROTECTIONS["rw"] and _mprotect(buffer.address, size, protection):
            raise PlayError("mprotect failed")
        self._buffers[arg["id"]] = buffer
        return {"ret": 0}

    def _poke(self, record: Record) -> dict[str, Any]:
        data = byte_string(record["arg"]["data"])
        ctypes.memmove(self._resolve(record["arg"]["at"]), data, len(data))
        return {"ret": 0}

    def _peek(self, record: Record) -> dict[str, Any]:
        data = ctypes.string_at(self._resolve(record["arg"]["at"]), number(record["arg"]["len"]))
        return {"ret": 0, "out": {"data": "hex:" + data.hex()}}

    def _munmap(self, record: Record) -> dict[str, Any]:
        self._buffers.pop(record["arg"]["id"]).close()
        return {"ret": 0}

    def _eventfd(self, record: Record) -> dict[str, Any]:
        fd = os.eventfd(number(record["arg"]["initval"]), os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        return {"ret": self._name("eventfd", fd)}

    def _memfd(self, _record: Record) -> dict[str, Any]:
        return {"ret": self._name("memfd", os.memfd_create("player", os.MFD_CLOEXEC))}

    def _devnull(self, _record: Record) -> dict[str, Any]:
        return {"ret": self._name("devnull", os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC))}

    def _close(self, record: Record) -> dict[str, Any]:
        self._kernel.close(self._fd(record))
        self._closed.add(record["obj"])
        return {"ret": 0}

    # ---- files --------------------------------------------------------------------------------------------------

    def _mmap_run(self, record: Record) -> dict[str, Any]:
        self._runs[record["obj"]] = self._kernel.mmap(self._fd(record), number(record["arg"]["size"]))
        return {"ret": 0}

    def _fallocate(self, record: Record) -> dict[str, Any]:
        arg = record["arg"]
        self._kernel.fallocate(self._fd(record), number(arg["mode"]), number(arg["offset"]), number(arg["len"]))
        return {"ret": 0}

    def _fstat(self, record: Record) -> dict[str, Any]:
        return {"ret": 0, "out": self._files.fstat(self._fd(record))}

    def _read(self, record: Record) -> dict[str, Any]:
        if record["fd"] != "eventfd":
            data = self._files.read(self._fd(record), number(record["arg"]["len"]))
            return {"ret": len(data), "out": {"data": "hex:" + data.hex()}}
        try:
            data = self._files.read(self._fd(record), number(record["arg"]["len"]))
        except KvmError as error:
            return {"ret": -1, "errno": errno.errorcode[error.errno or 0], "out": {}}
        return {"ret": len(data), "out": {"value": int.from_bytes(data, "little")}}

    def _write(self, record: Record) -> dict[str, Any]:
        arg = record["arg"]
        data = byte_string(arg["data"]) if "data" in arg else number(arg["value"]).to_bytes(8, "little")
        return {"ret": self._files.write(self._fd(record), data)}

    def _lseek(self, record: Record) -> dict[str, Any]:
        arg = record["arg"]
        return {"ret": self._files.lseek(self._fd(record), number(arg["offset"]), number(arg["whence"]))}

    def _ftruncate(self, record: Record) -> dict[str, Any]:
        self._files.ftruncate(self._fd(record), number(record["arg"]["length"]))
        return {"ret": 0}

    def _mmap(self, record: Record) -> dict[str, Any]:
        arg = record["arg"]
        self._buffers[arg["id"]] = self._files.mmap(
            self._fd(record), *(number(arg[key]) for key in ("size", "prot", "flags", "offset"))
        )
        return {"ret": 0}

    # ---- ioctls -------------------------------------------------------------------------------------------------

    def _ioctl(self, record: Record) -> dict[str, Any]:
        request, argument = number(record["nr"]), record["arg"]
        if request == _KVM_RUN and record["obj"] in self._runs and "int" not in argument:
            return self._kvm_run(record)
        fd = self._fd(record)
        if "int" in argument:
            return self._result(record, self._call(fd, request, number(argument["int"])))
        if "ptr" in argument:
            return self._result(record, self._call(fd, request, _POINTERS[argument["ptr"]]))
        if "zeros" in argument:
            zeros = ctypes.create_string_buffer(number(argument["zeros"]))
            return self._result(record, self._call(fd, request, zeros))
        if "struct" not in argument:
            return self._result(record, self._call(fd, request, 0))
        return self._ioctl_struct(record, fd, request)

    def _ioctl_struct(self, record: Record, fd: int, request: int) -> dict[str, Any]:
        name = record["arg"]["struct"]
        before = bytes(pack_argument(record["arg"], self._resolve))
        # Room behind the structure, as on the stack of the recorder: a request may carry a larger one.
        memory = ctypes.create_string_buffer(before, len(before) + 4096)
        failure: KvmError | None = None
        result = 0
        try:
            result = self._call(fd, request, memory)
        except KvmError as error:
            failure = error
        after = memory.raw[: len(before)]
        if failure is None:
            answer = self._result(record, result)
        else:
            answer = {"ret": -1, "errno": _errno_name(failure)}
        info = request_info(record["req"])
        reads = failure is None and info is not None and not record["req"].startswith("KVM_SET")
        pure_get = reads and info is not None and info.direction == "R"
        if reads and info is not None and info.direction == "RW" and is_list(name):
            answer["out"] = unpack_argument(name, after, before)
            return answer
        fields = self._written(name, before, after, pure_get=pure_get)
        if fields or pure_get:
            answer["out"] = fields
        return answer

    def _written(self, name: str, before: bytes, after: bytes, *, pure_get: bool) -> dict[str, Any]:
        """Return the fields that a call wrote, as a recording shows them."""
        if not pure_get and before == after:
            return {}
        fields = unpack_argument(name, after, before)
        if pure_get:
            return {key: value for key, value in fields.items() if value not in (0, "hex:", {})}
        old = unpack_argument(name, before, before)
        changed = {key: value for key, value in fields.items() if old.get(key) != value}
        changed |= {key: fields[key] for key in _SHOWN_WITH_LISTS if key in fields and name != "msrs"}
        if name == "create_device" and "fd" in changed:
            changed["fd"] = self._name("device", number(changed["fd"]))
        return changed

    def _result(self, record: Record, result: int) -> dict[str, Any]:
        kind = _CREATES.get(record["req"])
        if kind is not None and record["fd"] in _CREATORS[kind]:
            return {"ret": self._name(kind, result)}
        return {"ret": shown(result) if result >= 0 else result}

    def _call(self, fd: int, request: int, argument: IoctlArg) -> int:
        """Make the call; a Python error inside a simulated kernel is our bug, not the recording's."""
        try:
            return self._kernel.ioctl(fd, request, argument)
        except (KeyError, ValueError, TypeError, struct.error) as error:
            raise SimBug(f"the simulated kernel failed in ioctl {request:#x}: {error!r}") from error

    # ---- KVM_RUN ------------------------------------------------------------------------------------------------

    def _kvm_run(self, record: Record) -> dict[str, Any]:
        argument = record["arg"]
        mapping = self._runs[record["obj"]]
        memory = mapping.memory
        _prepare(memory, argument)
        answer: dict[str, Any]
        with self._interruption(memory, argument, self.patience_s(record)):
            try:
                answer = {"ret": self._call(self._fd(record), _KVM_RUN, 0)}
            except KvmError as error:
                answer = {"ret": -1, "errno": _errno_name(error)}
        reason = struct.unpack_from("<I", memory, EXIT_REASON * 4)[0]
        answer["exit"] = {"reason": "untouched"} if reason == UNTOUCHED else decode_exit(memory, reason)
        answer["run"] = decode_header(memory)
        if number(argument.get("valid_regs", 0)) & 1:
            regs = layout("regs")
            image = bytes(memory[SYNC_REGS : SYNC_REGS + regs.size])
            answer["sync_regs"] = {key: value for key, value in regs.unpack(image).items() if value}
        return answer

    def patience_s(self, record: Record) -> float:
        """Return after what time the guest of a KVM_RUN without a signal is interrupted."""
        return self._watchdog_s if record.get("watchdog") else WATCHDOG_S

    @contextmanager
    def _interruption(self, memory: memoryview, argument: Mapping[str, Any], watchdog_s: float) -> Iterator[None]:
        """Interrupt the run after the recorded time, or by the watchdog."""
        delay_s = watchdog_s
        if "signal_after_ms" in argument:
            delay_s = number(argument["signal_after_ms"]) * self._signal_unit_s
        if threading.current_thread() is threading.main_thread():
            previous = signal.signal(signal.SIGALRM, _ignore)
            signal.setitimer(signal.ITIMER_REAL, delay_s)
            try:
                yield
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
                signal.signal(signal.SIGALRM, previous)
            return
        timer = threading.Timer(delay_s, _set_immediate_exit, (memory,))
        timer.start()
        try:
            yield
        finally:
            timer.cancel()


def _prepare(memory: memoryview, argument: Mapping[str, Any]) -> None:
    """Store what user space stores before KVM_RUN."""
    memory[IMMEDIATE_EXIT] = number(argument.get("immediate_exit", 0))
    memory[_REQUEST_INTERRUPT_WINDOW] = number(argument.get("request_interrupt_window", 0))
    if "cr8" in argument:
        struct.pack_into("<Q", memory, _CR8, number(argument["cr8"]))
    if "io_data" in argument:
        data = byte_string(argument["io_data"])
        memory[PIO_PAGE_OFFSET : PIO_PAGE_OFFSET + len(data)] = data
    if "mmio_data" in argument:
        data = byte_string(argument["mmio_data"])
        memory[UNION + 8 : UNION + 8 + len(data)] = data
    if "msr_data" in argument:
        struct.pack_into("<Q", memory, UNION + 16, number(argument["msr_data"]))
    if "msr_error" in argument:
        memory[UNION] = number(argument["msr_error"])
    if "hypercall_ret" in argument:
        struct.pack_into("<Q", memory, UNION + 56, number(argument["hypercall_ret"]) & 0xFFFF_FFFF_FFFF_FFFF)
    struct.pack_into("<Q", memory, _VALID_REGS, number(argument.get("valid_regs", 0)))
    struct.pack_into("<Q", memory, _DIRTY_REGS, number(argument.get("dirty_regs", 0)))
    struct.pack_into("<I", memory, EXIT_REASON * 4, UNTOUCHED)


def _ignore(_signal: int, _frame: object) -> None:
    """Handle the signal: that it has a handler is what ends KVM_RUN."""


def _set_immediate_exit(memory: memoryview) -> None:
    memory[IMMEDIATE_EXIT] = 1


def _errno_name(error: KvmError) -> str:
    number_ = error.errno or 0
    if number_ == errno.EOPNOTSUPP:
        return "EOPNOTSUPP"  # Python calls 95 ENOTSUP
    return errno.errorcode.get(number_) or _UNNAMED.get(number_, str(number_))


_SHOWN_WITH_LISTS: Final = ("nent", "nmsrs")
_UNNAMED: Final = {133: "EHWPOISON", 524: "ENOTSUPP"}
_CREATES: Final = {
    "KVM_CREATE_VM": "vm",
    "KVM_CREATE_VCPU": "vcpu",
    "KVM_CREATE_GUEST_MEMFD": "gmem",
    "KVM_GET_STATS_FD": "stats",
}
_CREATORS: Final = {"vm": ("kvm",), "vcpu": ("vm",), "gmem": ("vm",), "stats": ("vm", "vcpu")}
_libc: Final = ctypes.CDLL(None, use_errno=True)
_mprotect: Final = _libc.mprotect
_mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
