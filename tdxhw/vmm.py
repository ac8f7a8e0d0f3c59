"""Serve the exits of a guest: port I/O, MMIO, conversions, TDVMCALLs, all under a time limit."""

import errno
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol, TypeVar

from tdxhw.errors import GuestFatalError, GuestTimeout, UnexpectedExit
from tdxhw.exits import Exit, FatalError, MapGpa, MemoryFault, Mmio, MsrAccess, Tdvmcall, decode
from tdxhw.replies import reply_map_gpa, reply_mmio, reply_msr, reply_port, reply_tdvmcall
from tdxhw.time_limit import KICK_SIGNAL, TimeLimit, install_kick_handler
from uapi_ctypes.errors import KvmError
from uapi_ctypes.kvm_run import KVM_EXIT_IO_OUT, KvmExit
from uapi_ctypes.tdx_status import TdvmcallStatus
from uapi_ctypes.vcpu import Vcpu

DEFAULT_LIMIT_S: Final = 20.0
"""For one `Vmm.run` [s]: far above what any suite's guest needs, far below a test's limit."""

_EHWPOISON: Final = 133  # the errno module does not have it
_FAULT_ERRNOS: Final = (errno.EFAULT, _EHWPOISON)
"""With these KVM_RUN reports a KVM_EXIT_MEMORY_FAULT."""

ExitType = TypeVar("ExitType", bound=Exit)


class Guest(Protocol):
    """What a VMM needs of its VM: `tdxhw.td.TrustDomain`, `tdxhw.ordinary_vm.OrdinaryVm`."""

    shared_bit: int
    """Mask of the GPA's shared bit, 0 where there is none."""

    def set_private(self, gpa: int, size_bytes: int, *, private: bool) -> None:
        """Convert memory."""

    def debug_registers(self, vcpu: Vcpu) -> Mapping[str, int] | None:
        """Return a vCPU's registers, or None where they are protected."""


@dataclass(slots=True)
class Port:
    """What answers a port, and what was written to it."""

    read: Callable[[int], int] | None = None
    """size [bytes] -> value"""
    write: Callable[[int, int], None] | None = None
    """value, size [bytes]"""


class Vmm:
    """Runs vCPUs and serves the exits it was given handlers for; `run` returns the first that it was not."""

    def __init__(self, guest: Guest) -> None:
        install_kick_handler()
        self._guest = guest
        self._ports: dict[int, Port] = {}
        self._mmio_read: Callable[[int, int], int] | None = None
        self._mmio_write: Callable[[int, int, int], None] | None = None
        self._msr: Callable[[MsrAccess], int | None] | None = None
        self._tdvmcalls: dict[int, Callable[[Tdvmcall], TdvmcallStatus | tuple[TdvmcallStatus, Sequence[int]]]] = {}
        self.on_map_gpa: Callable[[MapGpa], TdvmcallStatus] = self.convert
        """Serves MapGPA; grants the conversion by default."""
        self.convert_on_fault = False
        """Serve KVM_EXIT_MEMORY_FAULT by converting the memory to what the guest took it for."""
        self.limit_s = DEFAULT_LIMIT_S
        self._given_up = False

    def on_port(
        self, port: int, *, read: Callable[[int], int] | None = None, write: Callable[[int, int], None] | None = None
    ) -> None:
        """Serve port I/O at `port`: `read` takes a size and returns a value, `write` takes value and size."""
        self._ports[port] = Port(read, write)

    def on_mmio(
        self, *, read: Callable[[int, int], int] | None = None, write: Callable[[int, int, int], None] | None = None
    ) -> None:
        """Serve MMIO: `read` takes GPA and size and returns a value, `write` takes GPA, value and size."""
        self._mmio_read, self._mmio_write = read, write

    def on_msr(self, serve: Callable[[MsrAccess], int | None]) -> None:
        """Serve MSR exits: `serve` returns the value (anything for a write), or None to fail the access."""
        self._msr = serve

    def on_tdvmcall(
        self, leaf: int, serve: Callable[[Tdvmcall], TdvmcallStatus | tuple[TdvmcallStatus, Sequence[int]]]
    ) -> None:
        """Serve another TDVMCALL: `serve` returns the status, or the status and what goes to r11, r12, ..."""
        self._tdvmcalls[leaf] = serve

    def convert(self, request: MapGpa) -> TdvmcallStatus:
        """Convert the memory that `request` names."""
        self._guest.set_private(request.gpa, request.nr_pages << 12, private=request.to_private)
        return TdvmcallStatus.SUCCESS

    def run(self, vcpu: Vcpu, *, limit_s: float | None = None) -> Exit:
        """Run `vcpu` until an exit that nothing serves, and return it.

        Raise `GuestTimeout` when there is none within `limit_s` [s], `KvmError` when KVM_RUN fails.
        """
        limit_s = self.limit_s if limit_s is None else limit_s
        run = vcpu.kvm_run
        with TimeLimit(run, limit_s) as limit:
            while True:
                self._enter(vcpu, limit)
                # Before anything is made of it: port I/O is how guests talk to their test.
                if run.exit_reason == KvmExit.KVM_EXIT_IO and self._serve_port(vcpu):
                    continue
                exit_ = decode(vcpu, self._guest.shared_bit)
                if not self._serve(vcpu, exit_):
                    return exit_

    def expect(self, vcpu: Vcpu, wanted: type[ExitType], *, limit_s: float | None = None) -> ExitType:
        """Run `vcpu` until an exit that nothing serves and return it if it is of the type `wanted`.

        Raise `GuestFatalError` or `UnexpectedExit` if it is another.
        """
        exit_ = self.run(vcpu, limit_s=limit_s)
        if isinstance(exit_, wanted):
            return exit_
        if isinstance(exit_, FatalError):
            raise GuestFatalError(f"the guest reported {exit_} where {wanted.__name__} was expected")
        raise UnexpectedExit(f"{exit_} where {wanted.__name__} was expected{self._registers(vcpu)}")

    def give_up(self, vcpus: Sequence[Vcpu], threads: Sequence[threading.Thread]) -> None:
        """Kick `vcpus` out of KVM_RUN until all `threads`, in which they run, have ended."""
        self._given_up = True
        while running := [thread for thread in threads if thread.is_alive()]:
            for vcpu in vcpus:
                vcpu.kvm_run.immediate_exit = 1
            for thread in running:
                if thread.ident is not None and thread.is_alive():
                    signal.pthread_kill(thread.ident, KICK_SIGNAL)
            running[0].join(0.05)
        self._given_up = False
        for vcpu in vcpus:
            vcpu.kvm_run.immediate_exit = 0

    def _enter(self, vcpu: Vcpu, limit: TimeLimit) -> None:
        """Enter the guest once; signals other than the kick are waited out.

        So is EAGAIN: an INIT or a SIPI came to a vCPU that waited for it.
        """
        run = vcpu.kvm_run
        while True:
            try:
                vcpu.run()
            except KvmError as error:
                if error.errno in (errno.EINTR, errno.EAGAIN):
                    if self._given_up:
                        raise GuestTimeout("given up: the test has ended") from None
                    if limit.expired:
                        text = f"the guest was still running after {limit.limit_s:g} s{self._registers(vcpu)}"
                        raise GuestTimeout(text) from None
                    continue
                if error.errno not in _FAULT_ERRNOS or run.exit_reason != KvmExit.KVM_EXIT_MEMORY_FAULT:
                    raise
            return

    def _serve(self, vcpu: Vcpu, exit_: Exit) -> bool:
        """Serve `exit_` and return True, or return False when nothing here serves it."""
        match exit_:
            case Mmio():
                return self._serve_mmio(vcpu, exit_)
            case MapGpa():
                reply_map_gpa(vcpu.kvm_run, exit_, self.on_map_gpa(exit_))
                return True
            case MemoryFault() if self.convert_on_fault:
                self._guest.set_private(exit_.gpa, exit_.size, private=exit_.private)
                return True
            case MsrAccess() if self._msr is not None:
                reply_msr(vcpu.kvm_run, self._msr(exit_))
                return True
            case Tdvmcall() if exit_.leaf in self._tdvmcalls:
                answer = self._tdvmcalls[exit_.leaf](exit_)
                status, outputs = answer if isinstance(answer, tuple) else (answer, ())
                reply_tdvmcall(vcpu.kvm_run, status, outputs)
                return True
            case _:
                return False

    def _serve_port(self, vcpu: Vcpu) -> bool:
        io = vcpu.kvm_run.io
        port = self._ports.get(io.port)
        if port is None:
            return False
        data, size = vcpu.io_data(), io.size
        # A string instruction delivers several items at once.
        if io.direction == KVM_EXIT_IO_OUT:
            if port.write is None:
                return False
            for start in range(0, len(data), size):
                port.write(int.from_bytes(data[start : start + size], "little"), size)
            return True
        if port.read is None:
            return False
        reply_port(vcpu, [port.read(size) for _ in range(len(data) // size)], size)
        return True

    def _serve_mmio(self, vcpu: Vcpu, exit_: Mmio) -> bool:
        if exit_.is_write:
            if self._mmio_write is None:
                return False
            self._mmio_write(exit_.gpa, exit_.value, exit_.size)
            return True
        if self._mmio_read is None:
            return False
        reply_mmio(vcpu.kvm_run, self._mmio_read(exit_.gpa, exit_.size))
        return True

    def _registers(self, vcpu: Vcpu) -> str:
        registers = self._guest.debug_registers(vcpu)
        if registers is None:
            return "; its registers are not readable: protected"
        return "; " + " ".join(f"{name}={value:#x}" for name, value in registers.items())


def run_together(vmm: Vmm, vcpus: Sequence[Vcpu], *, limit_s: float | None = None) -> list[Exit]:
    """Run each vCPU in a thread of its own and return the exit of each, in their order.

    Every thread has ended when this returns or raises. Raise what the first failing vCPU raised.
    """
    exits: dict[int, Exit] = {}
    failures: list[BaseException] = []

    def work(index: int, vcpu: Vcpu) -> None:
        try:
            exits[index] = vmm.run(vcpu, limit_s=limit_s)
        except BaseException as error:  # noqa: BLE001 (handed on to the caller's thread below)
            failures.append(error)

    threads = [
        threading.Thread(target=work, args=pair, name=f"tdxhw-vcpu-{pair[0]}", daemon=True) for pair in enumerate(vcpus)
    ]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    except BaseException:  # Ctrl-C, or the test's time limit
        vmm.give_up(vcpus, threads)
        raise
    if failures:
        raise failures[0]
    return [exits[index] for index in range(len(vcpus))]
