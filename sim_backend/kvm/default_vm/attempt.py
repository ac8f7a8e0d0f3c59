"""What an emulated instruction works on: registers as copies, memory through the slots, MMIO through user space."""

import errno
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from sim_backend.cpu.engine import Cpu, CpuState
from sim_backend.kvm.default_vm.guest_events import GP, SS
from sim_backend.kvm.default_vm.instruction import Instruction, segment_of
from sim_backend.kvm.default_vm.io_exits import FRAGMENT
from sim_backend.kvm.errors import Errno, NotModelled
from sim_backend.kvm.guest_paging import CR4_LA57, read_guest, translate, write_guest
from sim_backend.kvm.memslots import KVM_MEM_READONLY

if TYPE_CHECKING:
    from sim_backend.kvm.vcpu import Vcpu

LONGEST: Final = 15  # [bytes] of an instruction
_U64: Final = (1 << 64) - 1
_CR0_PE: Final = 1
_AR_WRITABLE, _AR_EXPAND_DOWN, _AR_CODE = 2, 4, 8  # of the type: readable for code, conforming for code
AR_BIG: Final = 1 << 14
_AR_UNUSABLE: Final = 1 << 16


class NeedsPort(Exception):  # noqa: N818 - control flow of an attempt
    """INS has no data yet."""

    def __init__(self, port: int, size: int, count: int) -> None:
        self.port = port
        self.size = size
        self.count = count


class NeedsRead(Exception):  # noqa: N818 - control flow of an attempt
    """An operand is MMIO, or part of it behind a page boundary is, and has no answer yet."""

    def __init__(self, parts: list[bytes | None], fragments: list[tuple[int, int]]) -> None:
        self.parts = parts  # None: one of the fragments
        self.fragments = fragments  # GPA and length [bytes]


class PageFault(Exception):  # noqa: N818 - control flow of an attempt
    """The guest's page tables do not map an operand."""

    def __init__(self, linear: int, write: bool) -> None:
        self.linear = linear
        self.write = write


class Unhandled(Exception):  # noqa: N818 - control flow of an attempt
    """KVM's emulator does not know this instruction (`opcode_table` and its groups)."""


class GuestException(Exception):  # noqa: N818 - control flow of an attempt
    """The instruction faults by itself: #DE, or #GP for a misaligned operand."""

    def __init__(self, vector: int) -> None:
        self.vector = vector


def not_modelled(cpu: Cpu, code: bytes) -> NotModelled:
    """Return the error for an instruction that KVM's emulator knows and this one does not."""
    return NotModelled(
        f"KVM's instruction emulator has an instruction that the model of it lacks, at RIP {cpu.rip:#x}: "
        f"bytes {code.hex(' ')}"
    )


@dataclass(slots=True)
class Decoded:
    """What is kept of an instruction while it waits for user space (``struct x86_emulate_ctxt``)."""

    state: CpuState
    operands: list[int]  # general registers when it was decoded
    rip: int
    rflags: int
    long_mode: bool
    instruction: Instruction
    code: bytes
    reads: list[int]  # the operands read so far: executed again, it takes them from here (``mem_read``)
    port_data: bytes | None = None  # what user space gave for INS
    stale: bool = False  # the vCPU's registers were set meanwhile: results go nowhere, increments to the new values


class Attempt:
    """One execution of an instruction on copies of the registers; `commit` makes it real."""

    def __init__(self, vcpu: "Vcpu", cpu: Cpu, decoded: Decoded) -> None:
        self.vcpu: Final = vcpu
        self._cpu: Final = cpu
        self._decoded: Final = decoded
        self.state: Final = decoded.state
        self._reads: Final = list(decoded.reads)
        self.gprs: Final = list(cpu.gprs)
        self._operands: Final = list(decoded.operands) if decoded.stale else self.gprs
        self.rflags = decoded.rflags
        self.rip = decoded.rip
        self.fragments: Final[list[tuple[int, bytes]]] = []
        self.port_write: tuple[int, bytes] | None = None
        self.long_mode: Final = decoded.long_mode
        self.code: Final = decoded.code
        self._fxsave: bytes | None = None
        self._segment: tuple[str, int] | None = None

    @staticmethod
    def fetch(vcpu: "Vcpu", cpu: Cpu, state: CpuState) -> bytes:
        """Return the bytes at RIP."""
        linear = cpu.rip if cpu.in_64bit_mode() else state.cs.base + cpu.rip & 0xFFFF_FFFF
        code = b""
        for start in (linear, (linear & ~0xFFF) + 4096):
            length = min(LONGEST - len(code), 4096 - (start & 0xFFF))
            if length <= 0:
                break
            physical = translate(vcpu, start)
            part = read_guest(vcpu.vm, physical, length) if physical is not None else None
            if part is None:
                break
            code += part
        if not code:
            raise Unhandled
        return code

    def not_modelled(self) -> NotModelled:
        """Return the error for an instruction that KVM's emulator knows and this one does not."""
        return not_modelled(self._cpu, self.code)

    def commit(self) -> None:
        """Store registers, flags and RIP."""
        cpu = self._cpu
        self.commit_gprs()
        cpu.rflags = self.rflags
        cpu.rip = self.rip if self.long_mode else self.rip & 0xFFFF_FFFF
        if self._fxsave is not None or self._segment is not None:
            state = cpu.get_state()
            if self._fxsave is not None:
                state.fxsave = self._fxsave
            if self._segment is not None:
                name, selector = self._segment
                segment = segment_of(state, name)
                segment.selector, segment.base = selector, selector << 4
            cpu.set_state(state)

    def commit_gprs(self) -> None:
        """Store the general registers only, as between two elements of a repeated string instruction."""
        self._cpu.gprs[:] = self.gprs

    def cpl(self) -> int:
        """Return the privilege level."""
        return self._cpu.cpl()

    def branch_target(self, target: int) -> int:
        """Return where a near branch goes; raise #GP before it does anything else (`assign_eip`)."""
        if not self.long_mode and target > self.state.cs.limit:
            raise GuestException(GP)
        return target

    def load_real_segment(self, name: str, selector: int) -> None:
        """Load a segment register as real mode does."""
        self._segment = name, selector

    def set_fxsave(self, image: bytes) -> None:
        """Replace x87 and SSE state."""
        self._fxsave = image

    # ---- memory ---------------------------------------------------------------------------------------------

    def linear(self, segment: str, offset: int, address_bytes: int, size: int, *, write: bool = False) -> int:
        """Return the linear address of an operand; raise #GP or #SS where its segment forbids it (`__linearize`)."""
        offset &= (1 << 8 * address_bytes) - 1
        descriptor = segment_of(self.state, segment)
        if self.long_mode:
            linear = (descriptor.base if segment in ("fs", "gs") else 0) + offset & _U64
            highest = 1 << (56 if self.state.cr4 & CR4_LA57 else 47)
            if not (linear + size <= highest or linear >= (1 << 64) - highest):
                raise GuestException(SS if segment == "ss" else GP)
            return linear
        kind, last = descriptor.ar, descriptor.limit
        code = bool(kind & _AR_CODE)
        allowed = not kind & _AR_UNUSABLE
        if write:
            allowed &= bool(kind & _AR_WRITABLE) and not (code and self.state.cr0 & _CR0_PE)
        elif code:
            allowed &= bool(kind & _AR_WRITABLE)
        if kind & _AR_EXPAND_DOWN and not code:
            allowed &= offset > last
            last = 0xFFFF_FFFF if kind & AR_BIG else 0xFFFF
        if not allowed or offset > last or (last != 0xFFFF_FFFF and offset + size > last + 1):
            raise GuestException(SS if segment == "ss" else GP)
        return descriptor.base + offset & 0xFFFF_FFFF

    def _pages(self, linear: int, size: int, write: bool) -> list[tuple[int, int]]:
        pages = []
        while size:
            length = min(size, 4096 - (linear & 0xFFF))
            physical = translate(self.vcpu, linear)
            if physical is None:
                raise PageFault(linear, write)
            pages.append((physical, length))
            linear, size = linear + length, size - length
        return pages

    def load(self, linear: int, size: int) -> int:
        """Read memory, or MMIO; raise `NeedsRead` or `PageFault`."""
        if self._reads:
            return self._reads.pop(0)
        parts: list[bytes | None] = []
        fragments = []
        for gpa, length in self._pages(linear, size, False):
            part = self._read_physical(gpa, length)
            parts.append(part)
            if part is None:
                fragments.append((gpa, length))
        if fragments:
            raise NeedsRead(parts, fragments)
        value = int.from_bytes(b"".join(part or b"" for part in parts), "little")
        self._decoded.reads.append(value)
        return value

    def _read_physical(self, gpa: int, length: int) -> bytes | None:
        vm = self.vcpu.vm
        if vm.find_memslot(gpa >> 12) is not None:
            data = read_guest(vm, gpa, length)
            if data is None:
                raise Errno(errno.EFAULT)
            return data
        return vm.io_bus.read(self.vcpu, gpa, length, pio=False)

    def port_read(self, port: int, size: int, count: int) -> bytes:
        """Return elements from a port; raise `NeedsPort`."""
        if self._decoded.port_data is not None:
            return self._decoded.port_data
        data = b""
        for _ in range(count):
            element = self.vcpu.vm.io_bus.read(self.vcpu, port, size, pio=True)
            if element is None and not data:
                raise NeedsPort(port, size, count)
            data += element or bytes(size)
        return data

    def write_port(self, port: int, data: bytes) -> None:
        """Write to a port: a device in the kernel takes it, or user space hears of it when the instruction is over."""
        if not self.vcpu.vm.io_bus.write(self.vcpu, port, data, pio=True):
            self.port_write = port, data

    def store(self, linear: int, size: int, value: int) -> None:
        """Write memory, or post MMIO fragments; raise `PageFault`."""
        self.store_bytes(linear, (value & ((1 << 8 * size) - 1)).to_bytes(size, "little"))

    def store_bytes(self, linear: int, data: bytes) -> None:
        """Write memory, or post MMIO fragments; raise `PageFault`."""
        vm = self.vcpu.vm
        for gpa, length in self._pages(linear, len(data), True):
            part, data = data[:length], data[length:]
            slot = vm.find_memslot(gpa >> 12)
            if slot is not None and not slot.flags & KVM_MEM_READONLY:
                if not write_guest(vm, gpa, part):
                    raise Errno(errno.EFAULT)
                if self.vcpu.cpu is not None and slot.window is not None:
                    self.vcpu.cpu.invalidate_code(slot.user_hpa(vm.host.memory, gpa >> 12), 4096)
            elif not vm.io_bus.write(self.vcpu, gpa, part, pio=False):
                self.fragments.extend((gpa + at, part[at : at + FRAGMENT]) for at in range(0, length, FRAGMENT))

    # ---- registers ------------------------------------------------------------------------------------------

    def get(self, register: int, size: int, rex: int) -> int:
        """Return a general register; without REX, byte registers 4-7 are AH, CH, DH, BH."""
        if size == 1 and not rex and 4 <= register < 8:
            return self._operands[register - 4] >> 8 & 0xFF
        return self._operands[register] & ((1 << 8 * size) - 1)

    def address(self, register: int) -> int:
        """Return a register that addresses an operand, as it was when the instruction was decoded."""
        return self._operands[register]

    def put(self, register: int, size: int, value: int, rex: int) -> None:
        """Set a general register; a 32-bit result is zero-extended."""
        if not self._decoded.stale:
            self.put_late(register, size, value, rex)

    def put_late(self, register: int, size: int, value: int, rex: int) -> None:
        """Set a register that the instruction chooses only when it executes."""
        gprs = self.gprs
        if size == 4:
            gprs[register] = value & 0xFFFF_FFFF
        elif size == 8:
            gprs[register] = value & _U64
        elif size == 1 and not rex and 4 <= register < 8:
            gprs[register - 4] = gprs[register - 4] & ~0xFF00 | (value & 0xFF) << 8
        else:
            mask = (1 << 8 * size) - 1
            gprs[register] = gprs[register] & ~mask | value & mask

    def read_rm(self, one: Instruction, size: int) -> int:
        """Return the operand that ModRM.rm names."""
        if not one.is_memory:
            return self.get(one.rm, size, one.rex)
        return self.load(self.linear(one.segment, one.offset, one.address_bytes, size), size)

    def write_rm(self, one: Instruction, size: int, value: int) -> None:
        """Set the operand that ModRM.rm names."""
        if one.is_memory:
            self.store(self.linear(one.segment, one.offset, one.address_bytes, size, write=True), size, value)
        else:
            self.put(one.rm, size, value, one.rex)
