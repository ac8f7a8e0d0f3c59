"""#VE.RequestMMIO: one access to memory that is a device, at a shared address."""

from typing import TYPE_CHECKING, Final

from sim_backend.hw.gprs import R10, R11, R12, R13, R14, R15
from sim_backend.kvm.kvm_run_page import EXIT_REASON, UNION, UNION_U32, UNION_U64
from sim_backend.kvm.tdx.tdvmcall.status import INVALID_OPERAND

if TYPE_CHECKING:
    from sim_backend.kvm.tdx.ops import TdxOps
    from sim_backend.kvm.vcpu import Vcpu

KVM_EXIT_MMIO: Final = 6
_SIZES: Final = frozenset({1, 2, 4, 8})
_DATA: Final = UNION + 8  # [bytes] kvm_run.mmio.data
_LEN_U32: Final = UNION_U32 + 4
_IS_WRITE_U8: Final = UNION + 20


def tdvmcall_mmio(ops: "TdxOps", vcpu: "Vcpu", regs: list[int]) -> bool:
    """R12 = size, R13 = direction (1: write), R14 = GPA, R15 = value; a value read returns in R11.

    Size and direction are cut to 32 bits before they are looked at; the first and the last byte must carry
    the S-bit (`tdx_emulate_mmio()`). v17 takes either kind of address, but neither a page crossing nor a slot.
    """
    size, write = regs[R12] & 0xFFFF_FFFF, regs[R13] & 0xFFFF_FFFF
    gpa = regs[R14]
    shared_bit = ops.td.gfn_shared_bit << 12
    if size not in _SIZES or write > 1:
        regs[R10] = INVALID_OPERAND
        return True
    last = gpa + size - 1
    address = gpa & ~shared_bit
    if ops.host.is_v17:
        refused = gpa >> 12 != last >> 12 or vcpu.vm.find_memslot(address >> 12) is not None
    else:
        refused = not gpa & shared_bit or not last & shared_bit
    if refused:
        regs[R10] = INVALID_OPERAND
        return True
    run = vcpu.run
    if write:
        data = (regs[R15] & (1 << 8 * size) - 1).to_bytes(size, "little")
        bus = vcpu.vm.io_bus
        if (bus.eventfds or bus.zones) and bus.write(vcpu, address, data, pio=False):
            return True
        run.u8[_DATA : _DATA + size] = data
    else:
        vcpu.complete_userspace_io = lambda: _complete_read(vcpu, size)
    run.u32[EXIT_REASON] = KVM_EXIT_MMIO
    run.u64[UNION_U64] = address
    run.u32[_LEN_U32] = size
    run.u8[_IS_WRITE_U8] = write
    return False


def _complete_read(vcpu: "Vcpu", size: int) -> bool:
    vcpu.vendor.regs[R11] = int.from_bytes(vcpu.run.u8[_DATA : _DATA + size], "little")
    return True
