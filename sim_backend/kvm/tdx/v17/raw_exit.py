"""v17's KVM_EXIT_TDX: the guest's registers as they are, for user space to interpret."""

from typing import TYPE_CHECKING, Final

from sim_backend.hw.gprs import R8, R9, R10, R11, R12, R13, R14, R15, RBX, RCX, RDI, RDX, RSI
from sim_backend.kvm.kvm_run_page import EXIT_REASON, UNION_U32, UNION_U64

if TYPE_CHECKING:
    from sim_backend.kvm.tdx.ops import TdxOps
    from sim_backend.kvm.vcpu import Vcpu

KVM_EXIT_TDX: Final = 40
KVM_EXIT_TDX_VMCALL: Final = 1
_REG_MASK_U64: Final = UNION_U64 + 1
_TYPE_U64: Final = UNION_U64 + 2
_SUBFUNCTION_U64: Final = UNION_U64 + 3
_IN_U64: Final = UNION_U64 + 4
_STATUS_CODE_U64: Final = UNION_U64 + 14
_OUT_R11_U64: Final = UNION_U64 + 15
_OUT_U64: Final = UNION_U64 + 16
_REGISTERS: Final = (
    # GPR, bit of reg_mask: this header has RBX and RDX the other way round than the architecture
    (R12, 12),
    (R13, 13),
    (R14, 14),
    (R15, 15),
    (RBX, 2),
    (RDI, 7),
    (RSI, 6),
    (R8, 8),
    (R9, 9),
    (RDX, 3),
)


def tdvmcall_to_user_space(ops: "TdxOps", vcpu: "Vcpu", regs: list[int]) -> bool:
    """Hand the TDVMCALL to user space; its outputs are pre-loaded with the inputs."""
    del ops
    words = vcpu.run.u64
    mask = regs[RCX]
    vcpu.run.u32[EXIT_REASON] = KVM_EXIT_TDX
    vcpu.run.u32[UNION_U32] = KVM_EXIT_TDX_VMCALL
    vcpu.run.u32[UNION_U32 + 1] = 0
    words[_REG_MASK_U64] = mask
    words[_TYPE_U64] = words[_STATUS_CODE_U64] = regs[R10]
    words[_SUBFUNCTION_U64] = words[_OUT_R11_U64] = regs[R11]
    for word, (gpr, bit) in enumerate(_REGISTERS):
        words[_IN_U64 + word] = words[_OUT_U64 + word] = regs[gpr] if mask >> bit & 1 else 0
    vcpu.complete_userspace_io = lambda: _complete(vcpu, mask)
    return False


def _complete(vcpu: "Vcpu", mask: int) -> bool:
    """Take the answer back: the guest's own mask decides which registers, whatever reg_mask says now."""
    words, regs = vcpu.run.u64, vcpu.vendor.regs
    regs[R10] = words[_STATUS_CODE_U64]
    if mask >> R11 & 1:
        regs[R11] = words[_OUT_R11_U64]
    for word, (gpr, bit) in enumerate(_REGISTERS):
        if mask >> bit & 1:
            regs[gpr] = words[_OUT_U64 + word]
    return True
