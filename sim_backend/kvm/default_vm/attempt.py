"""What an emulated instruction works on: registers as copies, memory through the slots, MMIO through user space."""

import errno
from typing import TYPE_CHECKING, Final

from sim_backend.cpu.engine import Cpu, CpuState
from sim_backend.kvm.default_vm.instruction import Instruction, segment_of
from sim_backend.kvm.errors import Errno, NotModelled
from sim_backend.kvm.guest_paging import read_guest, translate, write_guest
from sim_backend.kvm.memslots import KVM_MEM_READONLY

if TYPE_CHECKING:
    from sim_backend.kvm.vcpu import Vcpu

FRAGMENT: Final = 8  # [bytes] the most that one MMIO exit carries
LONGEST: Final = 15  # [bytes] of an instruction
_U64: Final = (1 << 64) - 1


class NeedsRead(Exception):  # noqa: N818 - control flow of an attempt
    """An MMIO read has no answer yet."""

    def __init__(self, gpa: int, size: int) -> None:
        self.gpa = gpa
        self.size = size


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


class Attempt:
    """One execution of an instruction on copies of the registers; `commit` makes it real."""

    def __init__(self, vcpu: "Vcpu", cpu: Cpu, state: CpuState, answers: list[bytes]) -> None:
        self._vcpu: Final = vcpu
        self._cpu: Final = cpu
        self.state: Final = state
        self._answers: Final = list(answers)
        self.gprs: Final = list(cpu.gprs)
        self.rflags = cpu.rflags
        self.rip = cpu.rip
        self._segments: dict[str, int] = {}
        self.fragments: Final[list[tuple[int, bytes]]] = []
        self.long_mode: Final = cpu.in_64bit_mode()
        self.code = b""
        self._state_changed = False

    def fetch(self) -> bytes:
        """Return the bytes at RIP."""
        linear = self.rip if self.long_mode else self.state.cs.base + self.rip & 0xFFFF_FFFF
        code = b""
        for start in (linear, (linear & ~0xFFF) + 4096):
            length = min(LONGEST - len(code), 4096 - (start & 0xFFF))
            if length <= 0:
                break
            physical = translate(self._vcpu, start)
            part = read_guest(self._vcpu.vm, physical, length) if physical is not None else None
            if part is None:
                break
            code += part
        if not code:
            raise Unhandled
        self.code = code
        return code

    def not_modelled(self) -> NotModelled:
        """Return the error for an instruction that KVM's emulator knows and this one does not."""
        return NotModelled(
            f"KVM's instruction emulator has an instruction that the model of it lacks, at RIP {self._cpu.rip:#x}: "
            f"bytes {self.code.hex(' ')}"
        )

    def commit(self) -> None:
        """Store registers, flags and RIP."""
        cpu = self._cpu
        cpu.gprs[:] = self.gprs
        cpu.rflags = self.rflags
        cpu.rip = self.rip if self.long_mode else self.rip & 0xFFFF_FFFF
        if self._state_changed:
            cpu.set_state(self.state)

    def cpl(self) -> int:
        """Return the privilege level."""
        return self._cpu.cpl()

    def set_fxsave(self, image: bytes) -> None:
        """Replace x87 and SSE state."""
        self.state.fxsave = image
        self._state_changed = True

    # ---- memory ---------------------------------------------------------------------------------------------

    def linear(self, segment: str, offset: int, address_bytes: int) -> int:
        """Return the linear address of an offset in a segment."""
        offset &= (1 << 8 * address_bytes) - 1
        if self.long_mode:
            base = segment_of(self.state, segment).base if segment in ("fs", "gs") else 0
            return base + offset & _U64
        return segment_of(self.state, segment).base + offset & 0xFFFF_FFFF

    def _pages(self, linear: int, size: int, write: bool) -> list[tuple[int, int]]:
        pages = []
        while size:
            length = min(size, 4096 - (linear & 0xFFF))
            physical = translate(self._vcpu, linear)
            if physical is None:
                raise PageFault(linear, write)
            pages.append((physical, length))
            linear, size = linear + length, size - length
        return pages

    def load(self, linear: int, size: int) -> int:
        """Read memory, or MMIO; raise `NeedsRead` or `PageFault`."""
        data = b"".join(self._load_physical(gpa, length) for gpa, length in self._pages(linear, size, False))
        return int.from_bytes(data, "little")

    def _load_physical(self, gpa: int, length: int) -> bytes:
        vm = self._vcpu.vm
        if vm.find_memslot(gpa >> 12) is not None:
            data = read_guest(vm, gpa, length)
            if data is None:
                raise Errno(errno.EFAULT)
            return data
        device = vm.io_bus.read(self._vcpu, gpa, length, pio=False)
        if device is not None:
            return device
        if self._answers:
            return self._answers.pop(0)
        raise NeedsRead(gpa, length)

    def store(self, linear: int, size: int, value: int) -> None:
        """Write memory, or post MMIO fragments; raise `PageFault`."""
        data = (value & ((1 << 8 * size) - 1)).to_bytes(size, "little")
        vm = self._vcpu.vm
        for gpa, length in self._pages(linear, size, True):
            part, data = data[:length], data[length:]
            slot = vm.find_memslot(gpa >> 12)
            if slot is not None and not slot.flags & KVM_MEM_READONLY:
                if not write_guest(vm, gpa, part):
                    raise Errno(errno.EFAULT)
                if self._vcpu.cpu is not None and slot.window is not None:
                    self._vcpu.cpu.invalidate_code(slot.user_hpa(vm.host.memory, gpa >> 12), 4096)
            elif not vm.io_bus.write(self._vcpu, gpa, part, pio=False):
                self.fragments.extend((gpa + at, part[at : at + FRAGMENT]) for at in range(0, length, FRAGMENT))

    # ---- registers ------------------------------------------------------------------------------------------

    def get(self, register: int, size: int, rex: int) -> int:
        """Return a general register; without REX, byte registers 4-7 are AH, CH, DH, BH."""
        if size == 1 and not rex and 4 <= register < 8:
            return self.gprs[register - 4] >> 8 & 0xFF
        return self.gprs[register] & ((1 << 8 * size) - 1)

    def put(self, register: int, size: int, value: int, rex: int) -> None:
        """Set a general register; a 32-bit result is zero-extended."""
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
        return self.load(self.linear(one.segment, one.offset, one.address_bytes), size)

    def write_rm(self, one: Instruction, size: int, value: int) -> None:
        """Set the operand that ModRM.rm names."""
        if one.is_memory:
            self.store(self.linear(one.segment, one.offset, one.address_bytes), size, value)
        else:
            self.put(one.rm, size, value, one.rex)
