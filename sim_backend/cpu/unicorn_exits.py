"""What each stop of TCG means to the guest: the exit it becomes, or what is done so that the guest goes on.

`HANDLERS` maps Unicorn's exception index (0x100 + SVM exit code) to a function that tells whether to exit.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from sim_backend.cpu import events
from sim_backend.cpu import unicorn_internals as u
from sim_backend.cpu.decode import Instruction, missing_instruction
from sim_backend.cpu.engine import ExitReason, Segment
from sim_backend.cpu.errors import UnsupportedInstruction
from sim_backend.cpu.events import Event
from sim_backend.cpu.msr_access import read_msr, write_msr
from sim_backend.cpu.paging import CR0_PE, EptViolation, PageFault
from sim_backend.cpu.virtual_apic import ApicWriteExit, VirtualApic
from sim_backend.hw.gprs import R11, RAX, RCX, RDI, RDX, RSI, RSP

if TYPE_CHECKING:
    from sim_backend.cpu.unicorn_cpu import UnicornCpu

Handler = Callable[["UnicornCpu"], bool]

_MASK: Final = 0xFFFF_FFFF_FFFF_FFFF
_EFER_SCE: Final = 1
_RFLAGS_VM: Final = 1 << 17
_RFLAGS_RF: Final = 1 << 16
_MSR_SYSENTER_ESP: Final = 0x175
_MSR_SYSENTER_EIP: Final = 0x176
_MSR_LSTAR: Final = 0xC000_0082
_MSR_FMASK: Final = 0xC000_0084
_MSR_STAR: Final = 0xC000_0081
_MSR_SYSENTER_CS: Final = 0x174
_DR6_BS: Final = 1 << 14
_DR7_BREAKPOINTS: Final = 0x20FF  # L0 to G3, and GD


# ---- Instructions that TCG does not know ----

_BY_MODRM: Final = {  # 0F 01 with a register operand, without and with prefix 66
    0xC0: ExitReason.ENCLV,
    0xC1: ExitReason.VMCALL,
    0xC2: ExitReason.VMLAUNCH,
    0xC3: ExitReason.VMRESUME,
    0xC4: ExitReason.VMXOFF,
    0xC5: ExitReason.PCONFIG,
    0xC8: ExitReason.MONITOR,
    0xC9: ExitReason.MWAIT,
    0xCF: ExitReason.ENCLS,
    0xD4: ExitReason.VMFUNC,
}
_BY_MODRM_66: Final = {0xCC: ExitReason.TDCALL, 0xCF: ExitReason.SEAMCALL}
_BY_OPCODE: Final = {
    0x0F37: ExitReason.GETSEC,
    0x0F78: ExitReason.VMREAD,
    0x0F79: ExitReason.VMWRITE,
}
_PRIVILEGED: Final = frozenset((ExitReason.MONITOR, ExitReason.MWAIT, ExitReason.ENCLS, ExitReason.PCONFIG))


def _vmx_exit(instruction: Instruction) -> ExitReason | None:
    """Return the exit reason of an instruction that always leaves the guest; None for others."""
    modrm = instruction.modrm
    if instruction.encoding:
        return None
    if instruction.opcode == 0x0F01:
        return (_BY_MODRM_66 if 0x66 in instruction.prefixes else _BY_MODRM).get(modrm)
    if instruction.opcode == 0x0FC7 and modrm < 0xC0:
        if modrm >> 3 & 7 == 6:
            if 0xF3 in instruction.prefixes:
                return ExitReason.VMXON
            return ExitReason.VMCLEAR if 0x66 in instruction.prefixes else ExitReason.VMPTRLD
        return ExitReason.VMPTRST if modrm >> 3 & 7 == 7 else None
    if instruction.opcode in (0x0F3880, 0x0F3881) and 0x66 in instruction.prefixes and modrm < 0xC0:
        return ExitReason.INVVPID if instruction.opcode & 1 else ExitReason.INVEPT
    return _BY_OPCODE.get(instruction.opcode)


def _invalid_opcode(cpu: "UnicornCpu") -> bool:
    instruction = cpu.instruction()
    if instruction is None:
        return cpu.raise_exception(events.UD)
    reason = _vmx_exit(instruction)
    if reason is not None:
        if reason in _PRIVILEGED and cpu.cpl():
            return cpu.raise_exception(events.GP)
        cpu.leave(reason, length=instruction.length)
        return True
    if instruction.opcode == 0x0F01 and instruction.modrm == 0xE8 and not instruction.prefixes:  # SERIALIZE
        return _skip(cpu, instruction.length)
    if instruction.opcode == 0x0F3882 and 0x66 in instruction.prefixes and instruction.modrm < 0xC0:  # INVPCID
        if cpu.cpl():
            return cpu.raise_exception(events.GP)
        cpu.instance.flush_tlb()  # more than any INVPCID type asks for
        return _skip(cpu, instruction.length)
    name = missing_instruction(instruction)
    if name is not None:
        raise UnsupportedInstruction(cpu.rip, cpu.code(instruction.length), name)
    return cpu.raise_exception(events.UD)


# ---- Exceptions ----


def _exception(vector: int) -> Handler:
    def handle(cpu: "UnicornCpu") -> bool:
        return cpu.raise_exception(vector, cpu.instance.error_code.value)

    return handle


def _general_protection(cpu: "UnicornCpu") -> bool:
    error_code = cpu.instance.error_code.value
    if not error_code:
        instruction = cpu.instruction()
        if instruction is not None and (instruction.opcode, instruction.modrm) == (0x0F01, 0xD1):
            if cpu.cpl():
                return cpu.raise_exception(events.GP)
            cpu.leave(ExitReason.XSETBV, length=instruction.length)
            return True
    return cpu.raise_exception(events.GP, error_code)


def _debug(cpu: "UnicornCpu") -> bool:
    if cpu.port_io is not None:
        return _port_io(cpu)
    if cpu.exception_bitmap >> events.DB & 1:
        return cpu.raise_exception(events.DB, qualification=_DR6_BS)
    cpu.dr[4] |= _DR6_BS  # DR6: the list is DR0 to DR3, DR6, DR7
    return cpu.raise_exception(events.DB)


def _software_interrupt(cpu: "UnicornCpu") -> bool:
    instruction = cpu.instruction()
    if instruction is None:
        return cpu.raise_exception(events.UD)
    length = instruction.length
    if instruction.opcode == 0xCD:
        vector = cpu.code(length)[-1]
        return cpu.deliver(Event(vector, events.SOFTWARE_INTERRUPT, length=length))
    vector = events.BP if instruction.opcode == 0xCC else events.OF
    if cpu.exception_bitmap >> vector & 1:
        cpu.leave(ExitReason.EXCEPTION_OR_NMI, length=length)
        cpu.exit.interruption_info = vector | events.SOFTWARE_EXCEPTION << 8 | 1 << 31
        return True
    return cpu.deliver(Event(vector, events.SOFTWARE_EXCEPTION, length=length))


def _icebp(cpu: "UnicornCpu") -> bool:
    return cpu.deliver(Event(events.DB, events.PRIVILEGED_SOFTWARE_EXCEPTION, length=1))


# ---- Instructions that exit ----


def _exits_with(reason: ExitReason, opcode: bytes) -> Handler:
    def handle(cpu: "UnicornCpu") -> bool:
        length = len(opcode)
        if cpu.code(length) != opcode:  # prefixes before it
            instruction = cpu.instruction()
            length = instruction.length if instruction is not None else length
        cpu.leave(reason, length=length)
        return True

    return handle


def _cache_flush(cpu: "UnicornCpu") -> bool:
    """WBINVD and INVD, for which TCG has one exit code."""
    instruction = cpu.instruction()
    is_invd = instruction is not None and instruction.opcode == 0x0F08
    reason = ExitReason.INVD if is_invd else ExitReason.WBINVD
    cpu.leave(reason, length=2 if instruction is None else instruction.length)
    return True


def _interrupt_window(cpu: "UnicornCpu") -> bool:
    if cpu.virtual_apic is not None:
        cpu.request_interrupt_window(False)  # the window is the CPU's own: the run loop delivers
        return False
    cpu.leave(ExitReason.INTERRUPT_WINDOW)
    return True


def _msr(cpu: "UnicornCpu") -> bool:
    write = bool(cpu.instance.error_code.value)
    msr = cpu.quads[RCX] & 0xFFFF_FFFF
    instruction = cpu.instruction()
    length = instruction.length if instruction is not None else 2
    if cpu.msr_policy.exits(msr, write):
        cpu.leave(ExitReason.MSR_WRITE if write else ExitReason.MSR_READ, length=length)
        return True
    try:
        if write:
            write_msr(cpu, msr, (cpu.quads[RDX] & 0xFFFF_FFFF) << 32 | cpu.quads[RAX] & 0xFFFF_FFFF)
        else:
            value = read_msr(cpu, msr)
            cpu.quads[RAX], cpu.quads[RDX] = value & 0xFFFF_FFFF, value >> 32
    except (KeyError, ValueError):
        return cpu.raise_exception(events.GP)
    except ApicWriteExit as exit_:  # trap-like: RIP is behind the instruction
        _skip(cpu, length)
        cpu.leave(ExitReason.APIC_WRITE, exit_.offset)
        return True
    return _skip(cpu, length)


def undo_port_io(cpu: "UnicornCpu") -> tuple[int, int, bool]:
    """Go back to before the I/O instruction that TCG has just executed; return its port, size and direction."""
    assert cpu.port_io is not None
    port_io, cpu.port_io = cpu.port_io, None
    cpu.quads[(u.ENV_DR >> 3) + 7] = 0x400
    u.GPRS.pack_into(cpu.instance.buffer, 0, *cpu.io_gprs)
    cpu.rip = cpu.io_rip
    return port_io


def _port_io(cpu: "UnicornCpu") -> bool:
    """TCG has executed the instruction up to its end: take that back, and exit before it."""
    port, size, is_in = undo_port_io(cpu)
    quads = cpu.quads
    state_flags = quads[u.ENV_EFLAGS >> 3]
    iopl = state_flags >> 12 & 3
    protected = quads[u.ENV_CR >> 3] & CR0_PE
    if protected and (cpu.cpl() > iopl or state_flags & _RFLAGS_VM) and not _io_permitted(cpu, port, size):
        return cpu.raise_exception(events.GP)
    instruction = cpu.instruction()
    if instruction is None:
        return cpu.raise_exception(events.UD)
    qualification = size - 1 | (8 if is_in else 0) | port << 16
    opcode = instruction.opcode
    gla = 0
    if opcode < 0x70:  # INS, OUTS
        qualification |= 0x10
        if 0xF3 in instruction.prefixes or 0xF2 in instruction.prefixes:
            qualification |= 0x20
        gla = _string_address(cpu, instruction, is_in)
    elif opcode < 0xE8:
        qualification |= 0x40
    cpu.leave(ExitReason.IO_INSTRUCTION, qualification, instruction.length)
    cpu.exit.gla = gla
    return True


def _string_address(cpu: "UnicornCpu", instruction: Instruction, is_in: bool) -> int:
    """Return the linear address of the memory operand of INS or OUTS."""
    flags = cpu.instance.hflags.value
    bits = 64 if flags & u.HF_CS64 else 32 if flags & u.HF_CS32 else 16
    if 0x67 in instruction.prefixes:
        bits = {64: 32, 32: 16, 16: 32}[bits]
    segment = 0 if is_in else 3
    if not is_in:
        for prefix in instruction.prefixes:
            segment = {0x26: 0, 0x2E: 1, 0x36: 2, 0x3E: 3, 0x64: 4, 0x65: 5}.get(prefix, segment)
    base = u.SEGMENT.unpack_from(cpu.instance.raw, u.ENV_SEGS + 24 * segment)[1]
    if flags & u.HF_CS64 and segment < 4:
        base = 0
    address = base + (cpu.io_gprs[RDI if is_in else RSI] & ((1 << bits) - 1))
    return int(address) & (_MASK if flags & u.HF_CS64 else 0xFFFF_FFFF)


def _io_permitted(cpu: "UnicornCpu", port: int, size: int) -> bool:
    """Consult the I/O permission bitmap of a 32-bit or 64-bit TSS."""
    _, base, limit, flags = u.SEGMENT.unpack_from(cpu.instance.raw, u.ENV_SEGS + 24 * 7)
    if flags >> 8 & 0xF not in (9, 11) or limit < 0x67:
        return False
    try:
        offset = int.from_bytes(cpu.read_supervisor(base + 0x66, 2), "little") + (port >> 3)
        if offset + 1 > limit:
            return False
        bits = int.from_bytes(cpu.read_supervisor(base + offset, 2), "little") >> (port & 7)
    except (PageFault, EptViolation):
        return False
    return not bits & ((1 << size) - 1)


def _control_register(number: int) -> Handler:
    def handle(cpu: "UnicornCpu") -> bool:
        instruction = cpu.instruction()
        if instruction is None:
            return cpu.raise_exception(events.UD)
        qualification = number
        if instruction.opcode == 0x0F22:
            qualification |= instruction.rm << 8
        elif instruction.opcode == 0x0F06:
            qualification |= 2 << 4
        else:  # LMSW
            return _lmsw(cpu, instruction)
        if number == 8 and cpu.virtual_apic is not None:
            return _write_cr8(cpu, cpu.virtual_apic, instruction)
        cpu.leave(ExitReason.CR_ACCESS, qualification, instruction.length)
        return True

    return handle


def _lmsw(cpu: "UnicornCpu", instruction: Instruction) -> bool:
    if instruction.modrm < 0xC0:
        raise UnsupportedInstruction(cpu.rip, cpu.code(instruction.length), "LMSW from memory")
    source = cpu.quads[instruction.rm] & 0xFFFF
    cpu.leave(ExitReason.CR_ACCESS, 3 << 4 | source << 16, instruction.length)
    return True


def _write_cr8(cpu: "UnicornCpu", apic: VirtualApic, instruction: Instruction) -> bool:
    value = cpu.quads[instruction.rm]
    if value >> 4:
        return cpu.raise_exception(events.GP)
    apic.tpr = value << 4
    return _skip(cpu, instruction.length)


def _read_cr8(cpu: "UnicornCpu") -> bool:
    instruction = cpu.instruction()
    if instruction is None:
        return cpu.raise_exception(events.UD)
    apic = cpu.virtual_apic
    cpu.quads[instruction.rm] = cpu.cr8 if apic is None else apic.tpr >> 4
    return _skip(cpu, instruction.length)


def _debug_register(cpu: "UnicornCpu") -> bool:
    """MOV to and from DRn: kept. Raise ``UnsupportedInstruction`` for a DR7 with breakpoints, which could not fire."""
    instruction = cpu.instruction()
    if instruction is None:
        return cpu.raise_exception(events.UD)
    index = instruction.register & 7
    if index in (4, 5):
        index += 2
    slot = index if index < 4 else index - 2
    wide = cpu.in_64bit_mode()
    if instruction.opcode == 0x0F21:
        value = cpu.dr[slot]
        cpu.quads[instruction.rm] = value if wide else value & 0xFFFF_FFFF
        return _skip(cpu, instruction.length)
    value = cpu.quads[instruction.rm]
    if index >= 6:
        if wide and value >> 32:
            return cpu.raise_exception(events.GP)
        if index == 7 and value & _DR7_BREAKPOINTS:
            raise UnsupportedInstruction(cpu.rip, cpu.code(instruction.length), f"breakpoints (DR7 = {value:#x})")
        value = value & 0xE00F | 0xFFFF_0FF0 if index == 6 else value & 0xFFFF_2FFF | 0x400
    cpu.dr[slot] = value if wide else value & 0xFFFF_FFFF
    return _skip(cpu, instruction.length)


def _skip(cpu: "UnicornCpu", length: int) -> bool:
    """Step over the instruction that we have executed ourselves."""
    cpu.rip += length
    if not cpu.in_64bit_mode():
        cpu.rip &= 0xFFFF_FFFF
    cpu.quads[u.ENV_RIP >> 3] = cpu.rip
    cpu.instance.hflags.value &= ~u.HF_INHIBIT_IRQ
    return False


# ---- SYSCALL and SYSENTER, which Unicorn only reports ----


def syscall(cpu: "UnicornCpu") -> bool:
    """Execute the SYSCALL or SYSENTER that TCG has skipped (RIP is behind it)."""
    following, cpu.rip = cpu.rip, cpu.io_rip
    code = cpu.code(15)
    instruction = cpu.instruction()
    if instruction is None:
        return cpu.raise_exception(events.UD)
    state = cpu.get_system_state()
    flags = cpu.rflags
    if instruction.opcode == 0x0F05:
        if not state.efer & _EFER_SCE or not cpu.in_64bit_mode():
            return cpu.raise_exception(events.UD)
        cpu.quads[RCX] = following
        cpu.quads[R11] = flags & ~_RFLAGS_RF
        selector = state.msrs.get(_MSR_STAR, 0) >> 32 & 0xFFFC
        cpu.rip = state.msrs.get(_MSR_LSTAR, 0)
        flags &= ~(state.msrs.get(_MSR_FMASK, 0) | _RFLAGS_RF)
    elif instruction.opcode == 0x0F34:
        selector = state.msrs.get(_MSR_SYSENTER_CS, 0) & 0xFFFC
        if not selector or not state.cr0 & CR0_PE:
            return cpu.raise_exception(events.GP)
        cpu.rip = state.msrs.get(_MSR_SYSENTER_EIP, 0)
        cpu.quads[RSP] = state.msrs.get(_MSR_SYSENTER_ESP, 0)
        flags &= ~(1 << 9 | _RFLAGS_VM)
    else:
        raise UnsupportedInstruction(cpu.rip, code[: instruction.length], "a system call")
    long_mode = bool(state.efer & 1 << 10)
    state.cs = Segment(selector, 0, 0xFFFF_FFFF, 0xA09B if long_mode else 0xC09B)
    state.ss = Segment(selector + 8, 0, 0xFFFF_FFFF, 0xC093)
    cpu.set_system_state(state)
    cpu.rflags = flags
    cpu.quads[u.ENV_RIP >> 3] = cpu.rip
    return False


HANDLERS: Final[dict[int, Handler]] = {
    **{u.EXIT_EXCEPTION + vector: _exception(vector) for vector in range(32)},
    u.EXIT_EXCEPTION + events.UD: _invalid_opcode,
    u.EXIT_EXCEPTION + events.GP: _general_protection,
    u.EXIT_EXCEPTION + events.DB: _debug,
    u.EXIT_READ_CR0 + 8: _read_cr8,
    u.EXIT_WRITE_CR0: _control_register(0),
    u.EXIT_WRITE_CR0 + 4: _control_register(4),
    u.EXIT_WRITE_CR0 + 8: _control_register(8),
    **{u.EXIT_READ_DR0 + index: _debug_register for index in range(8)},
    **{u.EXIT_WRITE_DR0 + index: _debug_register for index in range(8)},
    u.EXIT_VINTR: _interrupt_window,
    u.EXIT_RDPMC: _exits_with(ExitReason.RDPMC, b"\x0f\x33"),
    u.EXIT_CPUID: _exits_with(ExitReason.CPUID, b"\x0f\xa2"),
    u.EXIT_SWINT: _software_interrupt,
    u.EXIT_INVD: _cache_flush,
    u.EXIT_HLT: _exits_with(ExitReason.HLT, b"\xf4"),
    u.EXIT_MSR: _msr,
    u.EXIT_ICEBP: _icebp,
    u.EXIT_WBINVD: _cache_flush,
    u.EXIT_MONITOR: _exits_with(ExitReason.MONITOR, b"\x0f\x01\xc8"),
    u.EXIT_MWAIT: _exits_with(ExitReason.MWAIT, b"\x0f\x01\xc9"),
}
