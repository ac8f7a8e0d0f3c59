"""Delivery of exceptions and interrupts to the guest, by hand: Unicorn never does it itself.

Source: Intel SDM Vol. 3, "Interrupt and Exception Handling". Task gates are not modelled.
"""

import struct
from dataclasses import dataclass
from typing import Final, Protocol

from sim_backend.cpu.engine import CpuState, Segment
from sim_backend.cpu.paging import CR0_PE, EFER_LMA, PageFault
from sim_backend.hw.gprs import RSP, Gprs

EXTERNAL_INTERRUPT: Final = 0
NMI: Final = 2
HARDWARE_EXCEPTION: Final = 3
SOFTWARE_INTERRUPT: Final = 4
PRIVILEGED_SOFTWARE_EXCEPTION: Final = 5
SOFTWARE_EXCEPTION: Final = 6
"""Event types of the VM-entry interruption-information field."""

DE, DB, BP, OF, UD, DF, TS, NP, SS, GP, PF, VE = 0, 1, 3, 4, 6, 8, 10, 11, 12, 13, 14, 20
WITH_ERROR_CODE: Final = frozenset((DF, TS, NP, SS, GP, PF, 17, 21))
_CONTRIBUTORY: Final = frozenset((DE, TS, NP, SS, GP))

_TF, _IF, _NT, _RF, _VM, _AC = 1 << 8, 1 << 9, 1 << 14, 1 << 16, 1 << 17, 1 << 18
_EXT: Final = 1


@dataclass(frozen=True, slots=True)
class Event:
    """Something to deliver through the IDT."""

    vector: int
    kind: int = HARDWARE_EXCEPTION
    error_code: int | None = None
    length: int = 0  # of the instruction that raised a software event [bytes]

    @property
    def is_software(self) -> bool:
        """Raised by an instruction: gate privilege is checked, and the return address is the next one."""
        return self.kind in (SOFTWARE_INTERRUPT, PRIVILEGED_SOFTWARE_EXCEPTION, SOFTWARE_EXCEPTION)


class GuestException(Exception):  # noqa: N818 - the architecture's name
    """Delivering an event raised an exception of its own."""

    def __init__(self, vector: int, error_code: int) -> None:
        super().__init__(f"exception {vector} during event delivery")
        self.vector = vector
        self.error_code = error_code


class TripleFault(Exception):  # noqa: N818 - the architecture's name
    """An exception while delivering a double fault: shutdown."""


class Target(Protocol):
    """The CPU to which events are delivered."""

    gprs: Gprs
    rip: int

    @property
    def rflags(self) -> int:
        """The guest's RFLAGS."""
        ...

    @rflags.setter
    def rflags(self, value: int) -> None: ...

    def get_system_state(self) -> CpuState:
        """Return a copy of the system registers."""
        ...

    def set_system_state(self, state: CpuState) -> None:
        """Replace the system registers."""
        ...

    def read_supervisor(self, gla: int, length: int) -> bytes:
        """Read as the CPU itself does; raise `PageFault` or `EptViolation`."""
        ...

    def write_supervisor(self, gla: int, data: bytes) -> None:
        """Write as the CPU itself does; raise `PageFault` or `EptViolation`."""
        ...


def deliver(cpu: Target, event: Event) -> None:
    """Deliver `event`, or the double fault that comes of it; raise `TripleFault` or `EptViolation`."""
    while True:
        try:
            _deliver_once(cpu, event)
        except PageFault as fault:
            nested = Event(PF, error_code=fault.error_code)
        except GuestException as fault:
            nested = Event(fault.vector, error_code=fault.error_code)
        else:
            return
        if event.vector == DF and event.kind == HARDWARE_EXCEPTION:
            raise TripleFault
        event = _combine(event, nested)


def _combine(first: Event, second: Event) -> Event:
    """Intel SDM Vol. 3, "Conditions for Generating a Double Fault"."""
    if first.kind == HARDWARE_EXCEPTION and (
        (first.vector in _CONTRIBUTORY and second.vector in _CONTRIBUTORY)
        or (first.vector in (PF, VE) and (second.vector in _CONTRIBUTORY or second.vector == PF))
    ):
        return Event(DF, error_code=0)
    return second


def _deliver_once(cpu: Target, event: Event) -> None:
    state = cpu.get_system_state()
    if not state.cr0 & CR0_PE:
        _deliver_real(cpu, event, state)
    elif state.efer & EFER_LMA:
        _deliver_long(cpu, event, state)
    else:
        _deliver_protected(cpu, event, state)


def _return_rip(cpu: Target, event: Event) -> int:
    return cpu.rip + event.length if event.is_software else cpu.rip


def _saved_flags(cpu: Target, event: Event) -> int:
    """RFLAGS as pushed: RF is set for faults, so that the return does not trip over a breakpoint."""
    is_fault = event.kind == HARDWARE_EXCEPTION and event.vector not in (DB, DF)
    return cpu.rflags | _RF if is_fault else cpu.rflags


def _deliver_real(cpu: Target, event: Event, state: CpuState) -> None:
    if event.vector * 4 + 3 > state.idtr_limit:
        raise GuestException(DF if event.vector == GP else GP, 0)
    offset, selector = struct.unpack("<HH", cpu.read_supervisor(state.idtr_base + event.vector * 4, 4))
    sp = cpu.gprs[RSP] & 0xFFFF
    flags = cpu.rflags
    for value in (flags, state.cs.selector, _return_rip(cpu, event)):
        sp = (sp - 2) & 0xFFFF
        cpu.write_supervisor(state.ss.base + sp, struct.pack("<H", value & 0xFFFF))
    # ---- Every memory access succeeded: from here on the delivery cannot fail. ----
    cpu.gprs[RSP] = (cpu.gprs[RSP] & ~0xFFFF) | sp
    state.cs.selector, state.cs.base = selector, selector << 4
    cpu.set_system_state(state)
    cpu.rip = offset
    cpu.rflags = flags & ~(_IF | _TF | _AC)


def _gate_error(event: Event, vector: int) -> GuestException:
    return GuestException(vector, event.vector << 3 | 2 | (0 if event.is_software else _EXT))


def _deliver_protected(cpu: Target, event: Event, state: CpuState) -> None:
    if event.vector * 8 + 7 > state.idtr_limit:
        raise _gate_error(event, GP)
    low, high = struct.unpack("<II", cpu.read_supervisor(state.idtr_base + event.vector * 8, 8))
    gate_type = high >> 8 & 0x1F
    if gate_type not in (6, 7, 14, 15):
        raise _gate_error(event, GP)
    cpl = _cpl(state)
    if event.is_software and (high >> 13 & 3) < cpl:
        raise _gate_error(event, GP)
    if not high & 0x8000:
        raise _gate_error(event, NP)
    selector = low >> 16
    code = _code_segment(cpu, event, state, selector, cpl, long_mode=False)
    new_cpl = code.ar >> 5 & 3 if not code.ar & 4 else cpl
    wide = gate_type >= 14
    size = 4 if wide else 2
    flags = cpu.rflags
    frame: list[int] = []
    stack, sp = state.ss, cpu.gprs[RSP]
    if new_cpl < cpl:
        if state.tr.ar & 0xF in (1, 3):
            sp, ss = struct.unpack("<HH", cpu.read_supervisor(state.tr.base + 2 + 4 * new_cpl, 4))
        else:
            sp, ss = struct.unpack("<IHxx", cpu.read_supervisor(state.tr.base + 4 + 8 * new_cpl, 8))
        stack = _load_segment(cpu, event, state, ss)
        if ss & 3 != new_cpl or stack.ar >> 5 & 3 != new_cpl or not stack.ar & 2 or stack.ar & 8:
            raise GuestException(TS, ss & ~3 | (0 if event.is_software else _EXT))
        frame += [state.ss.selector, cpu.gprs[RSP]]
        if flags & _VM:
            frame = [state.gs.selector, state.fs.selector, state.ds.selector, state.es.selector, *frame]
    frame += [_saved_flags(cpu, event), state.cs.selector, _return_rip(cpu, event)]
    if event.error_code is not None:
        frame.append(event.error_code)
    mask = 0xFFFF_FFFF if stack.ar & 0x4000 else 0xFFFF
    new_sp = sp & mask
    for value in frame:
        new_sp = (new_sp - size) & mask
        cpu.write_supervisor(stack.base + new_sp, (value & ((1 << 8 * size) - 1)).to_bytes(size, "little"))
    # ---- Every memory access succeeded: from here on the delivery cannot fail. ----
    cpu.gprs[RSP] = (sp & ~mask & 0xFFFF_FFFF) | new_sp
    state.ss = stack
    code.selector = selector & ~3 | new_cpl
    state.cs = code
    if flags & _VM:
        for name in ("ds", "es", "fs", "gs"):
            setattr(state, name, Segment())
    cpu.set_system_state(state)
    cpu.rip = low & 0xFFFF | (high & 0xFFFF_0000 if wide else 0)
    cpu.rflags = flags & ~(_TF | _NT | _RF | _VM | (0 if gate_type & 1 else _IF))


def _deliver_long(cpu: Target, event: Event, state: CpuState) -> None:
    if event.vector * 16 + 15 > state.idtr_limit:
        raise _gate_error(event, GP)
    low, middle, high = struct.unpack("<IIQ", cpu.read_supervisor(state.idtr_base + event.vector * 16, 16))
    gate_type = middle >> 8 & 0x1F
    if gate_type not in (14, 15):
        raise _gate_error(event, GP)
    cpl = _cpl(state)
    if event.is_software and (middle >> 13 & 3) < cpl:
        raise _gate_error(event, GP)
    if not middle & 0x8000:
        raise _gate_error(event, NP)
    selector = low >> 16
    code = _code_segment(cpu, event, state, selector, cpl, long_mode=True)
    new_cpl = code.ar >> 5 & 3 if not code.ar & 4 else cpl
    stack = cpu.gprs[RSP]
    if middle & 7:
        (stack,) = struct.unpack("<Q", cpu.read_supervisor(state.tr.base + 28 + 8 * (middle & 7), 8))
    elif new_cpl < cpl:
        (stack,) = struct.unpack("<Q", cpu.read_supervisor(state.tr.base + 4 + 8 * new_cpl, 8))
    frame = [_return_rip(cpu, event), state.cs.selector, _saved_flags(cpu, event), cpu.gprs[RSP]]
    frame.append(state.ss.selector)
    if event.error_code is not None:
        frame.insert(0, event.error_code)
    data = struct.pack(f"<{len(frame)}Q", *[value & 0xFFFF_FFFF_FFFF_FFFF for value in frame])
    new_sp = ((stack & ~0xF) - len(data)) & 0xFFFF_FFFF_FFFF_FFFF
    cpu.write_supervisor(new_sp, data)
    # ---- Every memory access succeeded: from here on the delivery cannot fail. ----
    flags = cpu.rflags
    cpu.gprs[RSP] = new_sp
    if new_cpl != cpl:
        state.ss = Segment(new_cpl, 0, 0xFFFF_FFFF, 0xC093 | new_cpl << 5)
    code.selector = selector & ~3 | new_cpl
    code.base = 0
    state.cs = code
    cpu.set_system_state(state)
    cpu.rip = low & 0xFFFF | middle & 0xFFFF_0000 | (high & 0xFFFF_FFFF) << 32
    cpu.rflags = flags & ~(_TF | _NT | _RF | _VM | (0 if gate_type & 1 else _IF))


def _cpl(state: CpuState) -> int:
    return state.ss.ar >> 5 & 3


def _load_segment(cpu: Target, event: Event, state: CpuState, selector: int) -> Segment:
    """Read a descriptor from the GDT or LDT; #GP when it is outside its table."""
    base, limit = (state.ldtr.base, state.ldtr.limit) if selector & 4 else (state.gdtr_base, state.gdtr_limit)
    error = selector & ~3 | (0 if event.is_software else _EXT)
    if selector & ~3 == 0 or (selector | 7) > limit:
        raise GuestException(GP, error)
    low, high = struct.unpack("<II", cpu.read_supervisor(base + (selector & ~7), 8))
    if not high & 0x8000:
        raise GuestException(NP, error)
    segment_limit = low & 0xFFFF | high & 0xF0000
    if high & 0x80_0000:
        segment_limit = segment_limit << 12 | 0xFFF
    segment_base = low >> 16 | (high & 0xFF) << 16 | high & 0xFF00_0000
    return Segment(selector, segment_base, segment_limit, high >> 8 & 0xF0FF)


def _code_segment(cpu: Target, event: Event, state: CpuState, selector: int, cpl: int, *, long_mode: bool) -> Segment:
    code = _load_segment(cpu, event, state, selector)
    error = selector & ~3 | (0 if event.is_software else _EXT)
    if code.ar & 0x18 != 0x18 or (code.ar >> 5 & 3) > cpl:
        raise GuestException(GP, error)
    if long_mode and code.ar & 0x6000 != 0x2000:
        raise GuestException(GP, error)
    return code
