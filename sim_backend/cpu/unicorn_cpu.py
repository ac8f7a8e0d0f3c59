"""One virtual CPU on Unicorn: the run loop, the hooks, and the architectural state."""

from typing import TYPE_CHECKING, Final

from sim_backend.cpu import events
from sim_backend.cpu import unicorn_internals as u
from sim_backend.cpu.decode import Instruction, decode, find_misexecuted
from sim_backend.cpu.engine import CpuState, ExitReason, MsrPolicy, SecondLevel, VmExit
from sim_backend.cpu.errors import EngineError, UnsupportedInstruction
from sim_backend.cpu.events import Event
from sim_backend.cpu.fpu_state import RESET_IMAGE, load_fpu, save_fpu
from sim_backend.cpu.guest_memory import GuestMemory
from sim_backend.cpu.msr_access import MIRRORED, read_msr, store_mirror
from sim_backend.cpu.paging import CR0_PG, EFER_LMA, EptViolation, PageFault
from sim_backend.cpu.ticker import TICKER
from sim_backend.cpu.unicorn_exits import HANDLERS, syscall, undo_port_io
from sim_backend.cpu.unicorn_instance import UnicornInstance
from sim_backend.cpu.unicorn_state import load_segments, save_segments, translation_flags
from sim_backend.cpu.virtual_apic import NO_VECTOR, VirtualApic
from sim_backend.hw.gprs import Gprs, new_gprs

if TYPE_CHECKING:
    from sim_backend.cpu.unicorn_engine import UnicornEngine

_UD: Final = u.EXIT_EXCEPTION + events.UD
_TDCALL: Final = b"\x66\x0f\x01\xcc"
_TDCALL_EXIT: Final = int(ExitReason.TDCALL)
_Q_RIP: Final = u.ENV_RIP >> 3
_Q_EFLAGS: Final = u.ENV_EFLAGS >> 3
_Q_CR: Final = u.ENV_CR >> 3
_Q_CR3: Final = _Q_CR + 3
_Q_CS_BASE: Final = (u.ENV_SEGS + 24 + 8) >> 3
_EFER_LME: Final = 1 << 8
_RFLAGS_TF: Final = 1 << 8
_RFLAGS_IF: Final = 1 << 9
_VALID: Final = 1 << 31


class _NoSecondLevel:
    """Before anybody sets one, nothing is mapped."""

    def walk(self, gpa: int) -> int:  # noqa: ARG002
        """Not present."""
        return 1 << 63

    def deliver_ve(self, qualification: int, gla: int, gpa: int) -> bool:  # noqa: ARG002
        """Not enabled."""
        return False


class _EveryMsrExits:
    def exits(self, msr: int, write: bool) -> bool:  # noqa: ARG002
        """Leave the guest."""
        return True


class UnicornCpu:
    """One virtual CPU on one Unicorn instance: implements `sim_backend.cpu.engine.Cpu`.

    Beyond the protocol: `exception_bitmap` (guest exceptions that exit instead of being delivered), and
    `tsc_offset`.
    """

    def __init__(self, engine: "UnicornEngine", instance: UnicornInstance) -> None:
        self.instance = instance
        self.quads = instance.quads
        self._gpr_quads = instance.quads[:16]
        self._closed = False
        self._engine = engine
        self._memory = GuestMemory(engine, instance, _NoSecondLevel())
        self.gprs: Gprs = new_gprs()
        self.rip = 0
        self.exit: VmExit = VmExit()
        self.msr_policy: MsrPolicy = _EveryMsrExits()
        self.exception_bitmap = 0
        self.steps = False
        self.virtual_apic: VirtualApic | None = None
        self.msrs: dict[int, int] = {}
        self.cr8 = 0
        self.dr = [0, 0, 0, 0, 0xFFFF0FF0, 0x400]
        self.port_io: tuple[int, int, bool] | None = None  # port, size, is_in: stopped at this instruction
        self.syscall = False
        self.io_gprs: Gprs = self.gprs
        self.io_rip = 0
        self.run_count = 0
        self.running = False
        self._error: BaseException | None = None
        self._kicked = False
        self._stopped_to_look = False  # uc_emu_stop was called so that `virtual_apic` is looked at
        self._pending: Event | None = None
        instance.client = self
        self.set_state(reset_state())
        self.rip = 0xFFF0
        self.rflags = 2
        TICKER.watch(self)

    # ---- Running ----

    def run(self) -> VmExit:
        """Run the guest until it exits. After `kick` the exit is EXTERNAL_INTERRUPT."""
        if self._closed:
            raise EngineError("this CPU is closed")
        arbiter = self._engine.arbiter
        arbiter.acquire(self)
        self.run_count += 1
        self.running = True  # before looking whether the ticker is awake: it looks in the other order
        try:
            if not TICKER.awake:
                TICKER.wake()
            instance = self.instance
            quads = self.quads
            apic = self.virtual_apic
            u.GPRS.pack_into(instance.buffer, 0, *self.gprs)
            self._memory.revalidate()
            try:
                while True:
                    if self._kicked:
                        self._kicked = False
                        return self.leave(ExitReason.EXTERNAL_INTERRUPT)
                    if self._pending is not None and not self._deliver_pending():
                        return self.exit
                    if apic is not None and apic.attention and not self._look_at(apic):
                        return self.exit
                    u.uc_emu_start(instance.handle, self.rip, 0, 0, 0)
                    self.rip = quads[_Q_RIP]
                    index = instance.exception_index.value
                    if index == _UD and self.code(4) == _TDCALL:
                        return self.leave(_TDCALL_EXIT, 0, 4)
                    if self._error is not None:
                        error, self._error = self._error, None
                        instance.flush_code()  # or the refused block would run next time
                        raise error  # noqa: TRY301 - it came out of a hook
                    handler = HANDLERS.get(index)
                    if handler is not None:
                        if handler(self):
                            return self.exit
                    elif self._after_stop(index):
                        return self.exit
            except BaseException:
                self._salvage()
                raise
        finally:
            self.running = False
            arbiter.release()

    def _salvage(self) -> None:
        """Make the registers valid after an exception (Ctrl-C, say) came out of the middle of a run."""
        quads = self.quads
        self.rip = quads[_Q_RIP]
        if self.port_io is not None:
            undo_port_io(self)
        if self.syscall:
            self.syscall = False
            self.rip = self.io_rip
        self._memory.forget_fault()
        self.gprs[:] = self._gpr_quads.tolist()

    def leave(self, reason: int, qualification: int = 0, length: int = 0) -> VmExit:
        """Write the exit and make `gprs` valid."""
        exit_ = self.exit
        exit_.reason = reason
        exit_.qualification = qualification
        exit_.instruction_length = length
        exit_.interruption_info = 0
        self.gprs[:] = self._gpr_quads.tolist()
        return exit_

    def kick(self) -> None:
        """Make the current or the next `run` end soon. May be called from any thread.

        A stop request that Unicorn has not yet started to listen for is lost; the ticker repeats it.
        """
        self._kicked = True
        if self.running:
            u.uc_emu_stop(self.instance.handle)

    def external_interrupt(self, vector: int) -> None:
        """Make an external interrupt arrive: posted-interrupt processing, or an exit. May be called from any thread."""
        apic = self.virtual_apic
        if apic is None or apic.notification_vector != vector:
            self.kick()
            return
        apic.notify()
        if self.running:
            self._stopped_to_look = True
            u.uc_emu_stop(self.instance.handle)  # lost if it is too early, like a kick: the ticker's exit makes up

    def _after_stop(self, index: int) -> bool:
        """Sort out a stop without exception: a fault of ours, a stop request, a new window."""
        memory = self._memory
        fault, memory.fault = memory.fault, None
        if memory.map_missing_window():
            return False
        if self.syscall:
            self.syscall = False
            return syscall(self)
        if fault is None:
            if index not in (-1, 0x10000):
                raise EngineError(f"Unicorn stopped at RIP {self.rip:#x} with unknown index {index:#x}")
            if self._stopped_to_look and not self._kicked:
                self._stopped_to_look = False
                return False
            self._kicked = False
            self.leave(ExitReason.EXTERNAL_INTERRUPT)
            return True
        gla = self.instance.fault_address.value
        if isinstance(fault, PageFault):
            return self.raise_page_fault(gla, fault.error_code)
        return self.raise_ept_violation(gla, fault)

    def raise_page_fault(self, gla: int, error_code: int) -> bool:
        """Deliver #PF, or exit when the exception bitmap asks for it. Tell whether to exit."""
        if self.exception_bitmap >> events.PF & 1:
            return self.raise_exception(events.PF, error_code, qualification=gla)
        self.quads[_Q_CR + 2] = gla
        return self.deliver(Event(events.PF, error_code=error_code))

    def raise_ept_violation(self, gla: int, violation: EptViolation) -> bool:
        """Deliver #VE where EPT says so, otherwise exit. Tell whether to exit."""
        qualification = violation.qualification
        gpa = violation.gpa
        if qualification & 0x100:
            gpa = (gpa & ~0xFFF) | (gla & 0xFFF)
        convertible = not violation.entry >> 63 and not violation.entry & 7
        if convertible and self.second_level.deliver_ve(qualification, gla, gpa):
            return self.deliver(Event(events.VE))
        self.leave(ExitReason.EPT_VIOLATION, qualification)
        self.exit.gla = gla
        self.exit.gpa = gpa
        return True

    def raise_exception(self, vector: int, error_code: int = 0, *, qualification: int = 0) -> bool:
        """Deliver a hardware exception, or exit when the exception bitmap asks for it. Tell whether to exit."""
        with_code = vector in events.WITH_ERROR_CODE
        if self.exception_bitmap >> vector & 1:
            self.leave(ExitReason.EXCEPTION_OR_NMI, qualification)
            kind = events.HARDWARE_EXCEPTION << 8 | (1 << 11 if with_code else 0)
            self.exit.interruption_info = vector | kind | _VALID
            self.exit.interruption_error = error_code
            return True
        return self.deliver(Event(vector, error_code=error_code if with_code else None))

    def deliver(self, event: Event) -> bool:
        """Deliver `event` now. Tell whether to exit (triple fault, or no memory for the stack)."""
        instance = self.instance
        self.gprs[:] = self.quads[:16].tolist()
        try:
            if self.steps:
                self.rflags &= ~_RFLAGS_TF
            try:
                events.deliver(self, event)
            finally:
                if self.steps:
                    self.rflags |= _RFLAGS_TF
        except events.TripleFault:
            self.leave(ExitReason.TRIPLE_FAULT)
            return True
        except EptViolation as violation:
            self._pending = event
            self.leave(ExitReason.EPT_VIOLATION, violation.qualification)
            self.exit.gpa = violation.gpa
            self.exit.gla = 0
            self.exit.vectoring_info = event.vector | event.kind << 8 | _VALID
            if event.error_code is not None:
                self.exit.vectoring_info |= 1 << 11
                self.exit.vectoring_error = event.error_code
            return True
        instance.hflags.value &= ~u.HF_INHIBIT_IRQ
        u.GPRS.pack_into(instance.buffer, 0, *self.gprs)
        return False

    def _deliver_pending(self) -> bool:
        """Deliver what `inject` left. Tell whether the guest may run."""
        event, self._pending = self._pending, None
        return event is None or not self.deliver(event)

    # ---- Events ----

    def _look_at(self, apic: VirtualApic) -> bool:
        """Deliver the virtual interrupt that is recognized, or wait for its window. Tell whether the guest may run."""
        self._stopped_to_look = False
        while (vector := apic.recognized()) != NO_VECTOR:
            if not self.can_take_interrupt():
                self.request_interrupt_window(True)
                return True
            self.request_interrupt_window(False)
            apic.acknowledge()
            if self.deliver(Event(vector, events.EXTERNAL_INTERRUPT)):
                return False
        self.request_interrupt_window(False)
        return True

    def inject(self, interruption_info: int, error_code: int = 0, instruction_length: int = 0) -> None:
        """Deliver an event at the next `run` (VM-entry interruption-information format)."""
        if not interruption_info & _VALID:
            self._pending = None
            return
        code = error_code if interruption_info & 1 << 11 else None
        kind = interruption_info >> 8 & 7
        self._pending = Event(interruption_info & 0xFF, kind, code, instruction_length)

    def take_back(self) -> tuple[int, int, int]:
        """Return and forget what `inject` left and no run has delivered: its arguments, or zeros."""
        event, self._pending = self._pending, None
        if event is None:
            return 0, 0, 0
        has_code = event.error_code is not None
        information = _VALID | event.kind << 8 | event.vector | has_code << 11
        return information, event.error_code or 0, event.length

    def can_take_interrupt(self) -> bool:
        """Tell whether an external interrupt could be injected now (IF set, no STI/MOV SS shadow)."""
        return bool(
            self.quads[_Q_EFLAGS] & _RFLAGS_IF
            and not self.instance.hflags.value & u.HF_INHIBIT_IRQ
            and self._pending is None
        )

    def request_interrupt_window(self, wanted: bool) -> None:
        """Ask for an INTERRUPT_WINDOW exit as soon as `can_take_interrupt` holds."""
        request = self.instance.interrupt_request
        request.value = u.CPU_INTERRUPT_VIRQ if wanted else 0

    @property
    def tsc_offset(self) -> int:
        """What RDTSC adds to the host's TSC; scaling is not modelled."""
        return self.quads[u.ENV_TSC_OFFSET >> 3]

    @tsc_offset.setter
    def tsc_offset(self, value: int) -> None:
        self.quads[u.ENV_TSC_OFFSET >> 3] = value & 0xFFFF_FFFF_FFFF_FFFF

    # ---- State ----

    @property
    def rflags(self) -> int:
        """RFLAGS: Unicorn folds the condition codes in when it stops, and takes them out when it starts."""
        return self.quads[_Q_EFLAGS]

    @rflags.setter
    def rflags(self, value: int) -> None:
        self.quads[_Q_EFLAGS] = value | 2

    def get_state(self) -> CpuState:
        """Return a copy of the rest of the architectural state."""
        state = self.get_system_state()
        state.fxsave = save_fpu(self.instance)
        return state

    def set_state(self, state: CpuState) -> None:
        """Replace the rest of the architectural state. EFER.LMA follows CR0.PG and EFER.LME."""
        self.set_system_state(state)
        load_fpu(self.instance, state.fxsave or RESET_IMAGE)

    def get_system_state(self) -> CpuState:
        """Return what `get_state` does, without the FPU."""
        state = CpuState()
        raw, quads = self.instance.raw, self.quads
        state.cr0, _, state.cr2, state.cr3, state.cr4 = quads[_Q_CR : _Q_CR + 5]
        state.cr8 = self.cr8 if self.virtual_apic is None else self.virtual_apic.tpr >> 4
        state.efer = quads[u.ENV_EFER >> 3]
        state.xcr0 = quads[u.ENV_XCR0 >> 3]
        state.dr = list(self.dr)
        save_segments(raw, state)
        state.msrs = dict(self.msrs)
        for msr in MIRRORED:
            if msr in state.msrs:
                state.msrs[msr] = read_msr(self, msr)
        return state

    def set_system_state(self, state: CpuState) -> None:
        """Do what `set_state` does, and leave the FPU alone."""
        instance, raw, quads = self.instance, self.instance.raw, self.quads
        efer = state.efer & ~EFER_LMA
        if state.cr0 & CR0_PG and efer & _EFER_LME:
            efer |= EFER_LMA
        old = quads[_Q_CR], quads[_Q_CR3], quads[_Q_CR + 4], quads[u.ENV_EFER >> 3]
        quads[_Q_CR] = state.cr0
        quads[_Q_CR + 2] = state.cr2
        quads[_Q_CR3] = state.cr3
        quads[_Q_CR + 4] = state.cr4
        quads[u.ENV_EFER >> 3] = efer
        quads[u.ENV_XCR0 >> 3] = state.xcr0
        self.cr8 = state.cr8
        self.dr = list(state.dr)
        load_segments(raw, state)
        self.msrs = dict(state.msrs)
        for msr, (offset, width) in MIRRORED.items():
            store_mirror(self, offset, width, state.msrs.get(msr, 0))
        instance.hflags.value = translation_flags(raw, state.cr0, state.cr4, efer, quads[_Q_EFLAGS])
        if old != (state.cr0, state.cr3, state.cr4, efer):
            self._memory.configure(state.cr0, state.cr3, state.cr4, efer)

    def in_64bit_mode(self) -> bool:
        """Tell whether EFER.LMA and CS.L are both set."""
        both = u.HF_LMA | u.HF_CS64
        return self.instance.hflags.value & both == both

    def cpl(self) -> int:
        """Return the current privilege level, 0 to 3."""
        return self.instance.hflags.value & u.HF_CPL

    # ---- Memory ----

    @property
    def second_level(self) -> SecondLevel:
        """The EPT. Another one forgets every translation; not while the guest runs."""
        return self._memory.second_level

    @second_level.setter
    def second_level(self, second_level: SecondLevel) -> None:
        self._memory.second_level = second_level

    def invalidate(self) -> None:
        """Forget every cached second-level translation (INVEPT). Not while the guest runs."""
        self._memory.invalidate()

    def invalidate_code(self, hpa: int, length: int) -> None:
        """Forget code translated from these host pages: somebody else wrote there."""
        self._memory.invalidate_code(hpa, length)

    def read_linear(self, gla: int, length: int) -> bytes:
        """Read guest memory through both levels of paging, for diagnostics; raise ``LookupError``."""
        return self._memory.read_linear(gla, length)

    def read_supervisor(self, gla: int, length: int) -> bytes:
        """Read as the CPU itself does; raise `PageFault` or `EptViolation`."""
        return self._memory.read_supervisor(gla, length)

    def write_supervisor(self, gla: int, data: bytes) -> None:
        """Write as the CPU itself does, all or nothing; raise `PageFault` or `EptViolation`."""
        self._memory.write_supervisor(gla, data)

    def code(self, length: int) -> bytes:
        """Return up to `length` bytes of the instruction at RIP: fewer where the next page is not there."""
        linear = self.quads[_Q_CS_BASE] + self.rip
        if linear > 0xFFFF_FFFF and not self.instance.hflags.value & u.HF_CS64:
            linear &= 0xFFFF_FFFF
        return self._memory.code(linear, length)

    def instruction(self) -> Instruction | None:
        """Decode the instruction at RIP; None when its bytes are cut off or are no instruction."""
        flags = self.instance.hflags.value
        return decode(self.code(15), long_mode=bool(flags & u.HF_CS64), default_32=bool(flags & u.HF_CS32))

    def close(self) -> None:
        """Give the context back. Its registers stay readable; it runs no more."""
        if self._closed:
            return
        self._closed = True
        TICKER.forget(self)  # and with that, nobody stops it any more
        self._memory.close()
        self._engine.give_back(self.instance)
        self.quads = self.instance.quads
        self._gpr_quads = self.quads[:16]

    # ---- Hooks: called from inside uc_emu_start; nothing may escape ----

    def on_tlb_fill(self, gla: int, kind: int, entry: int) -> bool:
        """Translate the page of `gla` through both levels of paging."""
        try:
            return self._memory.fill_tlb(gla, kind, entry)
        except BaseException as error:  # noqa: BLE001 - re-raised by run()
            self._error = error
            return False

    def on_new_block(self, block: int) -> None:
        """Refuse a block with an instruction that TCG would execute wrongly."""
        try:
            pc, _, size = u.TB.unpack_from(u.TB_BUFFER.from_address(block))
            self._check_block(pc, size)
        except BaseException as error:  # noqa: BLE001 - re-raised by run()
            self._error = error
            u.uc_emu_stop(self.instance.handle)

    def _check_block(self, pc: int, size: int) -> None:
        code = self._memory.code(pc, size)
        if len(code) != size:
            raise EngineError(f"a block at {pc:#x} was translated from a page that was never fetched")
        flags = self.instance.hflags.value
        found = find_misexecuted(code, long_mode=bool(flags & u.HF_CS64), default_32=bool(flags & u.HF_CS32))
        if found is not None:
            offset, instruction = found
            rip = pc + offset - self.quads[_Q_CS_BASE]
            name = "WAITPKG/SSE4a"
            if instruction.encoding:
                name = f"a {instruction.encoding}-encoded instruction"
            elif 0xF0 in instruction.prefixes:
                name = "a LOCK prefix where none is allowed"
            self._error = UnsupportedInstruction(rip, code[offset : offset + instruction.length], name)
            u.uc_emu_stop(self.instance.handle)

    def on_port_io(self, port: int, size: int, is_in: bool) -> int:
        """Note an IN or OUT, and make the helper that follows it raise #DB, which ends the run."""
        quads = self.quads
        self.port_io = (port, size, is_in)
        self.io_gprs = quads[:16].tolist()
        self.io_rip = quads[_Q_RIP]
        quads[u.ENV_DR >> 3] = port
        quads[(u.ENV_DR >> 3) + 7] = 0x2_0402 | 0x400
        return 0

    def on_syscall(self) -> None:
        """Stop after the SYSCALL, which TCG skips; `unicorn_exits.syscall` then does it."""
        self.syscall = True
        self.io_rip = self.quads[_Q_RIP]
        u.uc_emu_stop(self.instance.handle)


def reset_state() -> CpuState:
    """Return the state after a reset: real mode at F000:FFF0 with the base of CS at 0xFFFF0000."""
    state = CpuState()
    for name in ("es", "ss", "ds", "fs", "gs"):
        segment = getattr(state, name)
        segment.limit, segment.ar = 0xFFFF, 0x93
    state.cs.selector, state.cs.base, state.cs.limit, state.cs.ar = 0xF000, 0xFFFF_0000, 0xFFFF, 0x9B
    state.ldtr.limit, state.ldtr.ar = 0xFFFF, 0x82
    state.tr.limit, state.tr.ar = 0xFFFF, 0x8B
    return state
