"""Instruction.IO: one port access, the hottest exit of a TD."""

from typing import TYPE_CHECKING, Final

from sim_backend.hw.gprs import R10, R11, R12, R13, R14, R15
from sim_backend.kvm.kvm_run_page import EXIT_REASON, PIO_PAGE_OFFSET, UNION_U32, UNION_U64
from sim_backend.kvm.tdx.tdvmcall.status import INVALID_OPERAND

if TYPE_CHECKING:
    from sim_backend.kvm.tdx.ops import TdxOps
    from sim_backend.kvm.vcpu import Vcpu

KVM_EXIT_IO: Final = 2
KVM_EXIT_IO_OUT: Final = 1
_SIZES: Final = frozenset({1, 2, 4})
_DATA_OFFSET_U64: Final = UNION_U64 + 1


def tdvmcall_io(ops: "TdxOps", vcpu: "Vcpu", regs: list[int]) -> bool:
    """R12 = size, R13 = direction (1: write), R14 = port, R15 = value; a value read returns in R11.

    Size and direction are compared as 64-bit values, the port is cut to 16 bits (`tdx_emulate_io()`).
    """
    size, write = regs[R12], regs[R13]
    if ops.host.is_v17:
        size, write = size & 0xFFFF_FFFF, int(write != 0)
    if size not in _SIZES or write > 1:
        regs[R10] = INVALID_OPERAND
        return True
    port = regs[R14] & 0xFFFF
    run = vcpu.run
    if write:
        value = regs[R15]
        bus = vcpu.vm.io_bus
        if (bus.eventfds or bus.zones) and bus.write(vcpu, port, _bytes_of(value, size), pio=True):
            return True
        if size == 1:
            run.u8[PIO_PAGE_OFFSET] = value & 0xFF
        elif size == 4:
            run.u32[PIO_PAGE_OFFSET // 4] = value & 0xFFFF_FFFF
        else:
            run.u16[PIO_PAGE_OFFSET // 2] = value & 0xFFFF
    else:
        run.u8[PIO_PAGE_OFFSET : PIO_PAGE_OFFSET + size] = bytes(size)
        vcpu.complete_userspace_io = lambda: _complete_in(vcpu, size)
    run.u32[EXIT_REASON] = KVM_EXIT_IO
    run.u32[UNION_U32] = write | size << 8 | port << 16
    run.u32[UNION_U32 + 1] = 1
    run.u64[_DATA_OFFSET_U64] = PIO_PAGE_OFFSET
    return False


def _bytes_of(value: int, size: int) -> bytes:
    return (value & (1 << 8 * size) - 1).to_bytes(size, "little")


def _complete_in(vcpu: "Vcpu", size: int) -> bool:
    page = vcpu.run.u8
    vcpu.vendor.regs[R11] = int.from_bytes(page[PIO_PAGE_OFFSET : PIO_PAGE_OFFSET + size], "little")
    return True
