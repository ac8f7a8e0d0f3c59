"""The check of everything that the engine assumes about Unicorn, by tiny programs, before the first guest.

Takes a few milliseconds, once in a process.
"""

from collections.abc import Callable
from typing import Final

from sim_backend.cpu.engine import ExitReason, Segment, VmExit
from sim_backend.cpu.errors import EngineError, EngineSelfTestError, UnsupportedInstruction
from sim_backend.cpu.unicorn_cpu import UnicornCpu
from sim_backend.hw.gprs import RAX, RBX, RCX, RDX, RSP

_CODE: Final = 0x2000
_STACK: Final = 0x8000
_IDT: Final = 0x3000
_PML4, _PDPT, _PD = 0x4000, 0x5000, 0x6000
_GDT: Final = 0x7000
_HANDLER: Final = 0x2800
_UNMAPPED: Final = 0x4000_1238


class _Flat:
    """64 KiB of memory, mapped one to one."""

    def walk(self, gpa: int) -> int:
        return gpa | 7 if gpa < 0x10000 else 1 << 63

    def deliver_ve(self, qualification: int, gla: int, gpa: int) -> bool:  # noqa: ARG002
        return False


class _KicksAtEveryWalk(_Flat):
    def __init__(self, cpu: UnicornCpu) -> None:
        self._cpu = cpu

    def walk(self, gpa: int) -> int:
        self._cpu.kick()
        return super().walk(gpa)


class _NativeMsrs:
    def exits(self, msr: int, write: bool) -> bool:  # noqa: ARG002
        return False


def prepare(cpu: UnicornCpu, write: Callable[[int, bytes], None]) -> None:
    """Bring `cpu` into 64-bit mode on one identity-mapped GiB, with an IDT whose gates all lead to a HLT."""
    write(_PML4, (_PDPT | 7).to_bytes(8, "little"))
    write(_PDPT, (_PD | 7).to_bytes(8, "little"))
    write(_PD, (0x87).to_bytes(8, "little"))
    write(_GDT, b"".join(entry.to_bytes(8, "little") for entry in (0, 0xAF9B000000FFFF, 0xCF93000000FFFF)))
    gate = _HANDLER | 0x08 << 16 | 0x8E00 << 32
    write(_IDT, b"".join((gate).to_bytes(16, "little") for _ in range(32)))
    write(_HANDLER, b"\xf4")
    cpu.second_level = _Flat()
    cpu.msr_policy = _NativeMsrs()
    state = cpu.get_state()
    state.cr0, state.cr3, state.cr4, state.efer = 0x80010033, _PML4, 0x40660, 0xD01
    state.cs = Segment(8, 0, 0xFFFF_FFFF, 0xA09B)
    for name in ("ds", "es", "ss"):
        setattr(state, name, Segment(16, 0, 0xFFFF_FFFF, 0xC093))
    state.gdtr_base, state.gdtr_limit = _GDT, 23
    state.idtr_base, state.idtr_limit = _IDT, 511
    state.msrs = {0xC000_0082: 0x1234_5678_9ABC}
    cpu.set_state(state)


_MOST_TICKS: Final = 1000  # of ten milliseconds: a program that does not end has gone wrong

# Code, the exit that it must lead to, how far RIP must be, what else must hold.
_PROGRAMS: Final[tuple[tuple[str, str, ExitReason, int, Callable[[UnicornCpu], bool]], ...]] = (
    ("TDCALL", "ffc0 660f01cc", ExitReason.TDCALL, 2, lambda c: c.gprs[RAX] == 1),
    ("CPUID", "ffc0 0fa2", ExitReason.CPUID, 2, lambda c: c.gprs[RAX] == 1),
    ("HLT", "90 f4", ExitReason.HLT, 1, lambda c: c.exit.instruction_length == 1),
    ("WBINVD", "0f09", ExitReason.WBINVD, 0, lambda c: c.exit.instruction_length == 2),
    ("MOV to CR0", "0f22c0", ExitReason.CR_ACCESS, 0, lambda c: c.exit.qualification == 0),
    ("MOV to CR4", "0f22e3", ExitReason.CR_ACCESS, 0, lambda c: c.exit.qualification == 0x304),
    ("MOV to CR8", "440f22c0", ExitReason.CR_ACCESS, 0, lambda c: c.exit.qualification == 8),
    ("OUT", "b07f e630 40b001", ExitReason.IO_INSTRUCTION, 2, lambda c: c.gprs[RAX] == 0x7F),
    ("IN", "66baf803 ed 31c0", ExitReason.IO_INSTRUCTION, 4, lambda c: c.exit.qualification == 0x3F8_000B),
    ("XSETBV", "b803000000 31c9 31d2 0f01d1", ExitReason.XSETBV, 9, lambda c: c.gprs[RAX] == 3),
    ("native RDMSR", "b9820000c0 0f32 f4", ExitReason.HLT, 7, lambda c: c.gprs[RDX] == 0x1234),
    ("lazy flags", "31c0 f8 f4", ExitReason.HLT, 3, lambda c: c.rflags & 0x8D5 == 0x44),
    ("flags going in", "0f92c0 f4", ExitReason.HLT, 3, lambda c: c.gprs[RAX] == 1 and c.rflags == 3),
    ("INT3", "cc", ExitReason.HLT, _HANDLER - _CODE, lambda c: c.gprs[RSP] == _STACK - 40),
    ("UD2", "0f0b", ExitReason.HLT, _HANDLER - _CODE, lambda c: c.gprs[RSP] == _STACK - 40),
    ("#GP", "66b80010 8ed8", ExitReason.HLT, _HANDLER - _CODE, lambda c: c.gprs[RSP] <= _STACK - 40),
    ("#PF", "48a13812004000000000", ExitReason.HLT, _HANDLER - _CODE, lambda c: c.get_state().cr2 == _UNMAPPED),
    ("STI window", "fb 90 90 f4", ExitReason.INTERRUPT_WINDOW, 2, lambda c: bool(c.rflags & 0x200)),
    ("XGETBV", "31c9 0f01d0 f4", ExitReason.HLT, 5, lambda c: c.gprs[RAX] == 1),
    ("loop", "b9e8030000 ffc3 e2fc f4", ExitReason.HLT, 9, lambda c: c.gprs[RBX] == 1000),
)


def self_test(cpu: UnicornCpu, write: Callable[[int, bytes], None]) -> None:
    """Run every program on `cpu`; raise `EngineSelfTestError` naming the first that goes wrong."""
    for name, code, reason, distance, holds in _PROGRAMS:
        prepare(cpu, write)
        _start(cpu, write, bytes.fromhex(code))
        cpu.request_interrupt_window(name == "STI window")
        try:
            exit_ = _run(cpu)
        except EngineError as error:
            raise EngineSelfTestError(f"Unicorn self-test, {name}: {error}") from error
        if exit_.reason != reason or cpu.rip != _CODE + distance or not holds(cpu):
            raise EngineSelfTestError(
                f"Unicorn self-test, {name}: exit {exit_.reason} at RIP {cpu.rip:#x}, "
                f"not {reason.name} at {_CODE + distance:#x} with the right state"
            )
    cpu.request_interrupt_window(wanted=False)
    _refuses_vex(cpu, write)
    _stops_between_blocks(cpu, write)


def _run(cpu: UnicornCpu) -> VmExit:
    """Run on after the ticker's exits: on a busy machine ten milliseconds pass before the first instruction."""
    for _ in range(_MOST_TICKS):
        exit_ = cpu.run()
        if exit_.reason != ExitReason.EXTERNAL_INTERRUPT:
            break
    return exit_


def _refuses_vex(cpu: UnicornCpu, write: Callable[[int, bytes], None]) -> None:
    """TCG executes this as PADDD XMM0, XMM2, which is wrong; it must never get there, cached or not."""
    for _ in range(2):
        prepare(cpu, write)
        _start(cpu, write, bytes.fromhex("90 c5f1fec2 f4"))  # VPADDD XMM0, XMM1, XMM2
        try:
            _run(cpu)
        except UnsupportedInstruction:
            continue
        raise EngineSelfTestError("Unicorn self-test: a VEX-encoded instruction was executed")


def _stops_between_blocks(cpu: UnicornCpu, write: Callable[[int, bytes], None]) -> None:
    """Kick the guest at every memory access: a run must not end in the middle of the instruction."""
    prepare(cpu, write)
    _start(cpu, write, bytes.fromhex("eb00 ffc0 ff042500900000 eb00 f4"))  # INC EAX; INC dword [0x9000]
    cpu.second_level = _KicksAtEveryWalk(cpu)
    for _ in range(20):
        exit_ = cpu.run()
        if cpu.rip not in (_CODE, _CODE + 2, _CODE + 11, _CODE + 13):
            raise EngineSelfTestError(f"Unicorn self-test: a stop request ended a block at RIP {cpu.rip:#x}")
        if exit_.reason == ExitReason.HLT:
            return
    raise EngineSelfTestError("Unicorn self-test: a guest that is stopped again and again never ends")


def _start(cpu: UnicornCpu, write: Callable[[int, bytes], None], code: bytes) -> None:
    write(_CODE, code.ljust(64, b"\xcc"))
    cpu.invalidate_code(_CODE, 64)
    cpu.gprs[:] = [0] * 16
    cpu.gprs[RSP] = _STACK
    cpu.gprs[RCX] = 0
    cpu.rip = _CODE
    cpu.rflags = 3  # CF
