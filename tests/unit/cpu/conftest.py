"""A bare machine for the CPU: 1 MiB of memory mapped one to one, and a CPU in a mode of the test's choice."""

from collections.abc import Iterator

import pytest

from sim_backend.cpu.engine import Segment
from sim_backend.cpu.ticker import TICKER
from sim_backend.cpu.unicorn_cpu import UnicornCpu
from sim_backend.cpu.unicorn_engine import UnicornEngine
from sim_backend.hw.gprs import RSP
from sim_backend.hw.memory import PhysicalMemory

RAM_BYTES = 0x10_0000
CODE, STACK = 0x2000, 0x8000
IDT, PML4, PDPT, PD, GDT, TSS = 0x3000, 0x4000, 0x5000, 0x6000, 0x7000, 0x7800
HANDLERS = 0x9000  # vector n: HLT at + 16 n


class IdentityEpt:
    """Maps RAM one to one; `entries` overrides single GFNs, `ve` collects #VE information."""

    def __init__(self) -> None:
        self.entries: dict[int, int] = {}
        self.walks: list[int] = []
        self.ve: list[tuple[int, int, int]] = []
        self.ve_enabled = True

    def walk(self, gpa: int) -> int:
        self.walks.append(gpa)
        default = gpa | 7 if gpa < RAM_BYTES else 1 << 63
        return self.entries.get(gpa >> 12, default)

    def deliver_ve(self, qualification: int, gla: int, gpa: int) -> bool:
        if not self.ve_enabled:
            return False
        self.ve.append((qualification, gla, gpa))
        return True


class MsrPolicy:
    def __init__(self) -> None:
        self.exiting: set[int] = set()

    def exits(self, msr: int, write: bool) -> bool:
        return msr in self.exiting


class Machine:
    def __init__(self) -> None:
        self.memory = PhysicalMemory(RAM_BYTES)
        self.engine = UnicornEngine(self.memory)
        self.ept = IdentityEpt()
        self.msrs = MsrPolicy()
        self.cpu = self.new_cpu()

    def new_cpu(self) -> UnicornCpu:
        cpu = self.engine.new_cpu()
        assert isinstance(cpu, UnicornCpu)
        cpu.second_level = self.ept
        cpu.msr_policy = self.msrs
        return cpu

    def code(self, hexadecimal: str, at: int = CODE) -> None:
        self.memory.write(at, bytes.fromhex(hexadecimal))

    def entry(self, at: int, value: int, size: int = 8) -> None:
        self.memory.write(at, value.to_bytes(size, "little"))

    def long_mode(self, cpu: UnicornCpu | None = None) -> UnicornCpu:
        """64-bit mode on one identity-mapped 2 MiB user page, an IDT of HLT handlers, a TSS with RSP0 and IST1."""
        cpu = cpu or self.cpu
        self.entry(PML4, PDPT | 7)
        self.entry(PDPT, PD | 7)
        self.entry(PD, 0x87)
        descriptors = [0, 0xAF9B000000FFFF, 0xCF93000000FFFF, 0xCFFB000000FFFF, 0xCFF3000000FFFF, 0xAFFB000000FFFF]
        self.memory.write(GDT, b"".join(value.to_bytes(8, "little") for value in descriptors))
        for vector in range(256):
            address = HANDLERS + 16 * vector
            ist = 1 if vector == 8 else 0
            dpl = 3 if vector in (3, 0x80) else 0
            gate = address | 8 << 16 | ist << 32 | (0x8E00 | dpl << 13) << 32
            self.memory.write(IDT + 16 * vector, gate.to_bytes(16, "little"))
            self.memory.write(address, b"\xf4")
        self.memory.write(TSS, bytes(102) + b"\xff\xff")  # no I/O bitmap
        self.entry(TSS + 4, 0xF000)  # RSP0
        self.entry(TSS + 36, 0xE000)  # IST1
        state = cpu.get_state()
        state.cr0, state.cr3, state.cr4, state.efer = 0x80010033, PML4, 0x40660, 0xD01
        state.cs = Segment(8, 0, 0xFFFF_FFFF, 0xA09B)
        for name in ("ds", "es", "ss"):
            setattr(state, name, Segment(16, 0, 0xFFFF_FFFF, 0xC093))
        state.tr = Segment(0x30, TSS, 103, 0x8B)
        state.gdtr_base, state.gdtr_limit = GDT, 47
        state.idtr_base, state.idtr_limit = IDT, 4095
        cpu.set_state(state)
        return self.begin(cpu)

    def protected_mode(self, cpu: UnicornCpu | None = None) -> UnicornCpu:
        """Flat 32-bit protected mode without paging."""
        cpu = cpu or self.cpu
        state = cpu.get_state()
        state.cr0, state.efer = 0x21, 0
        state.cs = Segment(8, 0, 0xFFFF_FFFF, 0xC09B)
        for name in ("ds", "es", "ss"):
            setattr(state, name, Segment(16, 0, 0xFFFF_FFFF, 0xC093))
        cpu.set_state(state)
        return self.begin(cpu)

    def user_mode(self) -> UnicornCpu:
        """64-bit mode at CPL 3."""
        cpu = self.long_mode()
        state = cpu.get_state()
        state.cs = Segment(0x2B, 0, 0xFFFF_FFFF, 0xA0FB)
        state.ss = Segment(0x23, 0, 0xFFFF_FFFF, 0xC0F3)
        cpu.set_state(state)
        return cpu

    def begin(self, cpu: UnicornCpu) -> UnicornCpu:
        cpu.gprs[:] = [0] * 16
        cpu.gprs[RSP] = STACK
        cpu.rip, cpu.rflags = CODE, 2
        return cpu

    def stack(self, cpu: UnicornCpu, words: int) -> list[int]:
        data = self.memory.read(cpu.gprs[RSP], 8 * words)
        return [int.from_bytes(data[index : index + 8], "little") for index in range(0, len(data), 8)]


@pytest.fixture
def machine() -> Iterator[Machine]:
    machine = Machine()
    TICKER.forget(machine.cpu)  # on a busy machine it would end runs that the tests want whole
    yield machine
    machine.cpu.close()
    machine.memory.close()
