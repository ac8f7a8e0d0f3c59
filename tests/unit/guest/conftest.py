"""Just enough of a TD to run a payload: the reset state, the memory map, and TDCALLs answered by the test."""

from collections.abc import Callable, Iterator

import pytest

from sim_backend.cpu.engine import ExitReason, Segment, VmExit
from sim_backend.cpu.unicorn_cpu import UnicornCpu
from sim_backend.cpu.unicorn_engine import UnicornEngine
from sim_backend.hw.gprs import R8, R9, R10, R11, R12, R13, R14, R15, RAX, RBX, RCX, RDX
from sim_backend.hw.memory import PhysicalMemory
from tdxhw.guest import layout
from tdxhw.guest.payload import Payload

IMAGE_HPA = 0x10000
PAGE_GPA, PAGE_HPA = 0x10_0000, 0x30000
INVALID_OPERAND = 1 << 63
_TICKS = 10


class TinyTd:
    """One vCPU of a TD with GPAW `gpaw`; `ports` collects (port, size, value), `inputs` answers reads."""

    def __init__(self, memory: PhysicalMemory, engine: UnicornEngine, payload: Payload, gpaw: int = 48) -> None:
        self.memory = memory
        self.shared_bit = 1 << (gpaw - 1)
        self.ports: list[tuple[int, int, int]] = []
        self.inputs: list[int] = []
        self.calls: list[tuple[int, int, int, int, int]] = []
        self.answer: Callable[[TinyTd, int], int] = lambda td, function: INVALID_OPERAND
        self.pending: set[int] = set()
        self.ve: tuple[int, ...] | None = None
        self.converted: set[int] = set()
        memory.write(IMAGE_HPA, payload.image)
        cpu = engine.new_cpu()
        assert isinstance(cpu, UnicornCpu)
        self.cpu = cpu
        cpu.second_level = self
        state = cpu.get_state()
        state.cr0, state.cr4, state.efer = 0x21, 0x40, 0x901
        state.cs = Segment(0, 0, 0xFFFF_FFFF, 0xC09B)
        for name in ("ds", "es", "ss", "fs", "gs"):
            setattr(state, name, Segment(0, 0, 0xFFFF_FFFF, 0xC093))
        cpu.set_state(state)
        cpu.rip = payload.entry
        cpu.gprs[RBX] = gpaw

    def walk(self, gpa: int) -> int:
        private = gpa & ~self.shared_bit
        if private >> 12 in self.pending:
            return 0
        if private >= layout.IMAGE_GPA and not gpa & self.shared_bit:
            return IMAGE_HPA + (private - layout.IMAGE_GPA) | 7
        if private & ~0xFFF == PAGE_GPA and bool(gpa & self.shared_bit) == (PAGE_GPA in self.converted):
            return PAGE_HPA | 7
        return 1 << 63

    def deliver_ve(self, qualification: int, gla: int, gpa: int) -> bool:
        self.ve = (48, qualification, gla, gpa, 0)
        return True

    def run(self) -> VmExit:
        """Run until an exit that no TDCALL of this class answers, or the last HLT.

        The ticker interrupts any run; only a guest that outlasts several ticks is one that goes on for ever.
        """
        cpu, gprs = self.cpu, self.cpu.gprs
        ticks = 0
        while True:
            exit_ = cpu.run()
            if exit_.reason == ExitReason.EXTERNAL_INTERRUPT and ticks < _TICKS:
                ticks += 1
                continue
            if exit_.reason == ExitReason.CR_ACCESS:
                state = cpu.get_state()
                value = gprs[exit_.qualification >> 8 & 15]
                setattr(state, f"cr{exit_.qualification & 15}", value)
                cpu.set_state(state)
            elif exit_.reason == ExitReason.TDCALL:
                if gprs[RAX] == 0 and gprs[R11] == 12:
                    return exit_
                if not self._tdcall(gprs):
                    return exit_
            else:
                return exit_
            cpu.rip += exit_.instruction_length

    def _tdcall(self, gprs: list[int]) -> bool:
        leaf, gprs[RAX] = gprs[RAX], 0
        if leaf == 3 and self.ve:
            gprs[RCX], gprs[RDX], gprs[R8], gprs[R9], gprs[R10] = self.ve
        elif leaf == 6:
            self.pending.discard(gprs[RCX] >> 12)
            self.cpu.invalidate()
        elif leaf:
            gprs[RAX] = self.answer(self, leaf)
        elif gprs[R11] == 30 and gprs[R12] in (1, 2, 4):
            gprs[R10] = 0
            if gprs[R13]:
                self.ports.append((gprs[R14], gprs[R12], gprs[R15] & ((1 << 8 * gprs[R12]) - 1)))
            else:
                gprs[R11] = self.inputs.pop(0)
        elif gprs[R11] == 0x10001:
            page = gprs[R12] & ~self.shared_bit
            (self.converted.add if gprs[R12] & self.shared_bit else self.converted.discard)(page)
            self.cpu.invalidate()
            gprs[R10] = 0
        else:
            self.calls.append((gprs[R11], gprs[R12], gprs[R13], gprs[R14], gprs[R15]))
            if gprs[R11] == 0x10003:
                return False
            gprs[R10] = self.answer(self, gprs[R11])
        return True


@pytest.fixture
def boot() -> Iterator[Callable[..., TinyTd]]:
    memory = PhysicalMemory(0x10_0000)
    engine = UnicornEngine(memory)
    started: list[TinyTd] = []

    def start(payload: Payload, gpaw: int = 48) -> TinyTd:
        started.append(TinyTd(memory, engine, payload, gpaw))
        return started[-1]

    yield start
    for td in started:
        td.cpu.close()
    memory.close()
