"""IN and OUT of an ordinary guest (`kvm_fast_pio`, and the emulator's string forms)."""

from typing import TYPE_CHECKING, Final

from sim_backend.cpu.engine import Cpu
from sim_backend.hw.gprs import RAX, RCX, RDI, RSI
from sim_backend.kvm.default_vm.guest_events import skip_instruction
from sim_backend.kvm.errors import SimLimit
from sim_backend.kvm.guest_paging import read_guest, translate, write_guest
from sim_backend.kvm.kvm_run_page import EXIT_REASON, PIO_PAGE_OFFSET, UNION, UNION_U32, UNION_U64

if TYPE_CHECKING:
    from sim_backend.kvm.vcpu import Vcpu

KVM_EXIT_IO: Final = 2
_IN: Final = 1 << 3
_STRING: Final = 1 << 4
_REP: Final = 1 << 5
_RFLAGS_DF: Final = 1 << 10
_QUIRK_PORT: Final = 0x7E
_QUIRK_OUT_7E_INC_RIP: Final = 1 << 3
_RFLAGS_RF: Final = 1 << 16
_U64: Final = (1 << 64) - 1


def emulate_port_io(vcpu: "Vcpu", cpu: Cpu) -> bool:
    """Serve the access in the kernel, or exit with KVM_EXIT_IO and complete it at the next KVM_RUN."""
    qualification = cpu.exit.qualification
    size = (qualification & 7) + 1
    port = qualification >> 16 & 0xFFFF
    if qualification & _STRING:
        return _string_io(vcpu, cpu, port, size)
    bus = vcpu.vm.io_bus
    if qualification & _IN:
        data = bus.read(vcpu, port, size, pio=True)
        if data is not None:
            _set_accumulator(cpu, data, size)
            skip_instruction(vcpu, cpu)
            return True
        rip = cpu.rip

        def complete_in() -> bool:
            if cpu.rip == rip:  # user space may have moved it meanwhile
                _set_accumulator(cpu, bytes(vcpu.run.u8[PIO_PAGE_OFFSET : PIO_PAGE_OFFSET + size]), size)
                skip_instruction(vcpu, cpu)
            return True

        return _exit_io(vcpu, 0, size, port, 1, complete_in)
    data = (cpu.gprs[RAX] & ((1 << 8 * size) - 1)).to_bytes(size, "little")
    if bus.write(vcpu, port, data, pio=True):
        skip_instruction(vcpu, cpu)
        return True
    vcpu.run.u8[PIO_PAGE_OFFSET : PIO_PAGE_OFFSET + size] = data
    quirk = port == _QUIRK_PORT and not vcpu.vm.disabled_quirks & _QUIRK_OUT_7E_INC_RIP
    if quirk or vcpu.vm.host.profile.behaves("interprets_guest_code"):
        skip_instruction(vcpu, cpu)
        return _exit_io(vcpu, 1, size, port, 1, _nothing_left)
    rip = cpu.rip

    def complete_out() -> bool:
        if cpu.rip == rip:
            skip_instruction(vcpu, cpu)
        return True

    return _exit_io(vcpu, 1, size, port, 1, complete_out)


def _nothing_left() -> bool:
    """Complete an access that was over when it exited."""
    return True


def _exit_io(vcpu: "Vcpu", direction: int, size: int, port: int, count: int, complete: object) -> bool:
    run = vcpu.run
    run.u32[EXIT_REASON] = KVM_EXIT_IO
    run.u8[UNION] = direction
    run.u8[UNION + 1] = size
    run.u16[UNION // 2 + 1] = port
    run.u32[UNION_U32 + 1] = count
    run.u64[UNION_U64 + 1] = PIO_PAGE_OFFSET
    if not direction:
        run.u8[PIO_PAGE_OFFSET : PIO_PAGE_OFFSET + size * count] = bytes(size * count)
    vcpu.complete_userspace_io = complete  # type: ignore[assignment]
    return False


def _set_accumulator(cpu: Cpu, data: bytes, size: int) -> None:
    value = int.from_bytes(data, "little")
    if size == 4:
        cpu.gprs[RAX] = value
    else:
        mask = (1 << 8 * size) - 1
        cpu.gprs[RAX] = cpu.gprs[RAX] & ~mask | value


# ---- INS and OUTS -------------------------------------------------------------------------------------------


def _address_mask(cpu: Cpu) -> int:
    """Return the mask of the address size: bits 9:7 of the instruction information, as VMX reports it."""
    return ((1 << 16) - 1, (1 << 32) - 1, _U64, _U64)[cpu.exit.instruction_info >> 7 & 3]


def _advance(cpu: Cpu, register: int, delta: int, mask: int) -> None:
    """Add to a register within the address size; 32-bit results are zero-extended."""
    value = cpu.gprs[register] + delta & mask
    cpu.gprs[register] = value if mask >> 16 else cpu.gprs[register] & ~mask | value


def _string_io(vcpu: "Vcpu", cpu: Cpu, port: int, size: int) -> bool:
    """One element of OUTS, or as many of INS as fit in a page: memory is the emulator's to move."""
    qualification = cpu.exit.qualification
    mask = _address_mask(cpu)
    rep = bool(qualification & _REP)
    remaining = cpu.gprs[RCX] & mask if rep else 1
    step = -size if cpu.rflags & _RFLAGS_DF else size
    rip = cpu.rip
    if not remaining:
        skip_instruction(vcpu, cpu)
        return True
    if qualification & _IN:
        in_page = (cpu.gprs[RDI] & 0xFFF) if step < 0 else 4096 - (cpu.gprs[RDI] & 0xFFF)
        # The kernel compares a number of bytes with numbers of elements here.
        count = max(min(in_page, 1024 // size, remaining), 1)
        linear = cpu.exit.gla

        def complete_ins() -> bool:
            if cpu.rip != rip:
                return True
            data = bytes(vcpu.run.u8[PIO_PAGE_OFFSET : PIO_PAGE_OFFSET + size * count])
            for index in range(count):
                _store_linear(vcpu, linear + index * step, data[index * size : (index + 1) * size])
            _advance(cpu, RDI, step * count, mask)
            _finish_rep(vcpu, cpu, rep, count, mask)
            return True

        return _exit_io(vcpu, 0, size, port, count, complete_ins)
    data = _load_linear(vcpu, cpu.exit.gla, size)
    _advance(cpu, RSI, step, mask)
    _finish_rep(vcpu, cpu, rep, 1, mask)
    if vcpu.vm.io_bus.write(vcpu, port, data, pio=True):
        return True
    vcpu.run.u8[PIO_PAGE_OFFSET : PIO_PAGE_OFFSET + size] = data
    return _exit_io(vcpu, 1, size, port, 1, _nothing_left)


def _finish_rep(vcpu: "Vcpu", cpu: Cpu, rep: bool, count: int, mask: int) -> None:
    if rep:
        _advance(cpu, RCX, -count, mask)
        if cpu.gprs[RCX] & mask:
            cpu.rflags |= _RFLAGS_RF  # between two elements, as the emulator leaves it
            return
    cpu.rflags &= ~_RFLAGS_RF
    skip_instruction(vcpu, cpu)


def _load_linear(vcpu: "Vcpu", linear: int, size: int) -> bytes:
    physical = translate(vcpu, linear)
    data = read_guest(vcpu.vm, physical, size) if physical is not None else None
    if data is None:
        raise SimLimit(f"OUTS from linear address {linear:#x}, which is no memory")
    return data


def _store_linear(vcpu: "Vcpu", linear: int, data: bytes) -> None:
    physical = translate(vcpu, linear)
    if physical is None or not write_guest(vcpu.vm, physical, data):
        raise SimLimit(f"INS to linear address {linear:#x}, which is no memory")
    if vcpu.cpu is not None:
        vcpu.cpu.invalidate()
