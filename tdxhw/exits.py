"""What a KVM_RUN came back with, in one vocabulary for both dialects.

`decode` reads ``struct kvm_run`` and returns one of these values. v17 hands every TDVMCALL to user space as one raw
KVM_EXIT_TDX; mainline spreads them over KVM_EXIT_HYPERCALL, SYSTEM_EVENT and typed KVM_EXIT_TDX. Tests see neither.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, TypeAlias

from uapi_ctypes.kvm import KVM_HC_MAP_GPA_RANGE, KVM_MAP_GPA_RANGE_ENCRYPTED
from uapi_ctypes.kvm_run import (
    KVM_EXIT_IO_OUT,
    KVM_MEMORY_EXIT_FLAG_PRIVATE,
    KvmExit,
    KvmRun,
    KvmSystemEvent,
)
from uapi_ctypes.tdx_leaves import TdvmcallLeaf
from uapi_ctypes.units import PAGE_SHIFT, PAGE_SIZE
from uapi_ctypes.vcpu import Vcpu


@dataclass(frozen=True, slots=True)
class PortIo:
    """KVM_EXIT_IO: port I/O, by IN/OUT or by TDG.VP.VMCALL<Instruction.IO>."""

    port: int
    size: int
    is_write: bool
    data: bytes

    @property
    def value(self) -> int:
        """The data as one number."""
        return int.from_bytes(self.data, "little")


@dataclass(frozen=True, slots=True)
class Mmio:
    """KVM_EXIT_MMIO. `gpa` carries no shared bit."""

    gpa: int
    size: int
    is_write: bool
    data: bytes

    @property
    def value(self) -> int:
        """The data as one number."""
        return int.from_bytes(self.data, "little")


@dataclass(frozen=True, slots=True)
class MapGpa:
    """The guest wants `nr_pages` from `gpa` (without shared bit) to become private, or shared."""

    gpa: int
    nr_pages: int
    to_private: bool


@dataclass(frozen=True, slots=True)
class MemoryFault:
    """KVM_EXIT_MEMORY_FAULT: the guest accessed memory as private (or shared) that is not."""

    gpa: int
    size: int
    private: bool


@dataclass(frozen=True, slots=True)
class FatalError:
    """TDG.VP.VMCALL<ReportFatalError>: the guest gives up."""

    code: int
    gpa: int
    message: bytes

    def __str__(self) -> str:
        """``fatal error 0xbaaaaaad, "text"``."""
        text = self.message.rstrip(b"\0").decode("ascii", "backslashreplace")
        return f"fatal error {self.code:#x}" + (f", {text!r}" if text else "")


@dataclass(frozen=True, slots=True)
class Tdvmcall:
    """Another TDVMCALL for user space: GetQuote, SetupEventNotifyInterrupt, GetTdVmCallInfo; on v17 any leaf."""

    leaf: int
    args: tuple[int, ...]
    """r12, r13, r14, r15 as far as the kernel passes them on. GetQuote: GPA without shared bit, size [bytes]."""


@dataclass(frozen=True, slots=True)
class MsrAccess:
    """KVM_EXIT_X86_RDMSR or KVM_EXIT_X86_WRMSR."""

    index: int
    data: int
    is_write: bool
    reason: int


@dataclass(frozen=True, slots=True)
class Hypercall:
    """KVM_EXIT_HYPERCALL with another number than MAP_GPA_RANGE."""

    nr: int
    args: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class InternalError:
    """KVM_EXIT_INTERNAL_ERROR."""

    suberror: int
    data: tuple[int, ...] = field(default=())


@dataclass(frozen=True, slots=True)
class FailEntry:
    """KVM_EXIT_FAIL_ENTRY."""

    reason: int
    cpu: int


@dataclass(frozen=True, slots=True)
class ExceptionExit:
    """KVM_EXIT_EXCEPTION."""

    vector: int
    error_code: int


@dataclass(frozen=True, slots=True)
class SystemEvent:
    """KVM_EXIT_SYSTEM_EVENT of another type than TDX_FATAL."""

    type: int
    data: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PlainExit:
    """An exit whose number says it all: HLT, SHUTDOWN, INTR, X86_BUS_LOCK, ..."""

    reason: int

    def __str__(self) -> str:
        """``KVM_EXIT_SHUTDOWN``."""
        return KvmExit.name_of(self.reason)


Exit: TypeAlias = (
    PortIo | Mmio | MapGpa | MemoryFault | FatalError | Tdvmcall | MsrAccess | Hypercall | InternalError
    | FailEntry | ExceptionExit | SystemEvent | PlainExit
)  # fmt: skip

HALT: Final = PlainExit(KvmExit.KVM_EXIT_HLT)
SHUTDOWN: Final = PlainExit(KvmExit.KVM_EXIT_SHUTDOWN)

_FATAL_MESSAGE: Final = ("r14", "r15", "rbx", "rdi", "rsi", "r8", "r9", "rdx")
"""Registers that hold the bytes of a fatal error's message, in order (GHCI, ReportFatalError)."""
_EVENT_INDEX: Final = {"rdx": 2, "rbx": 3, "rsi": 6, "rdi": 7, "r8": 8, "r9": 9, "r14": 14, "r15": 15}


def decode(vcpu: Vcpu, shared_bit: int) -> Exit:
    """Return why `vcpu` came back. `shared_bit` is the mask of the GPA's shared bit, 0 without one."""
    run = vcpu.kvm_run
    reason = run.exit_reason
    if reason == KvmExit.KVM_EXIT_IO:
        io = run.io
        return PortIo(io.port, io.size, io.direction == KVM_EXIT_IO_OUT, bytes(vcpu.io_data()))
    reader = _READERS.get(reason)
    return reader(run, shared_bit) if reader else PlainExit(reason)


def _mmio(run: KvmRun, _shared_bit: int) -> Exit:
    mmio = run.mmio
    return Mmio(mmio.phys_addr, mmio.len, bool(mmio.is_write), bytes(mmio.data[: mmio.len]))


def _hypercall(run: KvmRun, shared_bit: int) -> Exit:
    call = run.hypercall
    if call.nr != KVM_HC_MAP_GPA_RANGE:
        return Hypercall(call.nr, tuple(call.args))
    return MapGpa(call.args[0] & ~shared_bit, call.args[1], bool(call.args[2] & KVM_MAP_GPA_RANGE_ENCRYPTED))


def _memory_fault(run: KvmRun, _shared_bit: int) -> Exit:
    fault = run.memory_fault
    return MemoryFault(fault.gpa, fault.size, bool(fault.flags & KVM_MEMORY_EXIT_FLAG_PRIVATE))


def _system_event(run: KvmRun, _shared_bit: int) -> Exit:
    event = run.system_event
    if event.type != KvmSystemEvent.KVM_SYSTEM_EVENT_TDX_FATAL:
        return SystemEvent(event.type, tuple(event.data[: event.ndata]))
    message = b"".join(event.data[_EVENT_INDEX[name]].to_bytes(8, "little") for name in _FATAL_MESSAGE)
    return FatalError(event.data[12], event.data[13], message)


def _tdx(run: KvmRun, shared_bit: int) -> Exit:
    """Tell mainline's `flags` (zero so far) from v17's `type` (one): both are the first word of the union."""
    if run.tdx_v17.type:
        return _tdx_v17(run, shared_bit)
    tdx = run.tdx
    data = tdx.unknown.data
    count = {TdvmcallLeaf.GET_QUOTE: 2}.get(tdx.nr, 1)
    return Tdvmcall(tdx.nr, tuple(data[:count]))


def _tdx_v17(run: KvmRun, shared_bit: int) -> Exit:
    call = run.tdx_v17.vmcall
    leaf = call.subfunction
    gpa, size = call.in_r12, call.in_r13
    if leaf == TdvmcallLeaf.MAP_GPA and size and not (gpa | size) % PAGE_SIZE:
        return MapGpa(gpa & ~shared_bit, size >> PAGE_SHIFT, not gpa & shared_bit)
    if leaf == TdvmcallLeaf.REPORT_FATAL_ERROR:
        message = b"".join(getattr(call, f"in_{name}").to_bytes(8, "little") for name in _FATAL_MESSAGE)
        return FatalError(call.in_r12, call.in_r13, message)
    if leaf == TdvmcallLeaf.GET_QUOTE:
        return Tdvmcall(leaf, (call.in_r12 & ~shared_bit, call.in_r13))
    return Tdvmcall(leaf, (call.in_r12, call.in_r13, call.in_r14, call.in_r15))


def _msr(run: KvmRun, _shared_bit: int) -> Exit:
    msr = run.msr
    is_write = run.exit_reason == KvmExit.KVM_EXIT_X86_WRMSR
    return MsrAccess(msr.index, msr.data if is_write else 0, is_write, msr.reason)


def _internal_error(run: KvmRun, _shared_bit: int) -> Exit:
    internal = run.internal
    return InternalError(internal.suberror, tuple(internal.data[: internal.ndata]))


def _fail_entry(run: KvmRun, _shared_bit: int) -> Exit:
    return FailEntry(run.fail_entry.hardware_entry_failure_reason, run.fail_entry.cpu)


def _exception(run: KvmRun, _shared_bit: int) -> Exit:
    return ExceptionExit(run.ex.exception, run.ex.error_code)


_READERS: Final[dict[int, Callable[[KvmRun, int], Exit]]] = {
    KvmExit.KVM_EXIT_MMIO: _mmio,
    KvmExit.KVM_EXIT_HYPERCALL: _hypercall,
    KvmExit.KVM_EXIT_MEMORY_FAULT: _memory_fault,
    KvmExit.KVM_EXIT_SYSTEM_EVENT: _system_event,
    KvmExit.KVM_EXIT_TDX: _tdx,
    KvmExit.KVM_EXIT_X86_RDMSR: _msr,
    KvmExit.KVM_EXIT_X86_WRMSR: _msr,
    KvmExit.KVM_EXIT_INTERNAL_ERROR: _internal_error,
    KvmExit.KVM_EXIT_FAIL_ENTRY: _fail_entry,
    KvmExit.KVM_EXIT_EXCEPTION: _exception,
}
