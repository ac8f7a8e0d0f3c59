"""The register area of ``struct kvm_run``: read and written around KVM_RUN when user space asks (KVM_CAP_SYNC_REGS)."""

from typing import TYPE_CHECKING, Final

from sim_backend.kvm.kvm_run_page import KVM_DIRTY_REGS, KVM_VALID_REGS, SYNC_REGS
from sim_backend.kvm.registers import REGS, SREGS_BYTES
from sim_backend.kvm.vcpu_events import EVENTS, pack_events, unpack_events

if TYPE_CHECKING:
    from sim_backend.kvm.vcpu import Vcpu

KVM_SYNC_X86_REGS: Final = 1
KVM_SYNC_X86_SREGS: Final = 2
KVM_SYNC_X86_EVENTS: Final = 4
_REGS: Final = slice(SYNC_REGS, SYNC_REGS + REGS.size)
_SREGS: Final = slice(_REGS.stop, _REGS.stop + SREGS_BYTES)
_EVENTS: Final = slice(_SREGS.stop, _SREGS.stop + EVENTS.size)


def load_sync_regs(vcpu: "Vcpu") -> None:
    """Take what user space marked dirty (`sync_regs`); raise EINVAL where the matching ioctl would."""
    run = vcpu.run
    dirty = run.u64[KVM_DIRTY_REGS]
    if dirty & KVM_SYNC_X86_REGS:
        vcpu.unpack_regs(bytes(run.u8[_REGS]))
        run.u64[KVM_DIRTY_REGS] &= ~KVM_SYNC_X86_REGS
    if dirty & KVM_SYNC_X86_SREGS:
        vcpu.unpack_sregs(bytes(run.u8[_SREGS]))
        run.u64[KVM_DIRTY_REGS] &= ~KVM_SYNC_X86_SREGS
    if dirty & KVM_SYNC_X86_EVENTS:
        unpack_events(vcpu, bytes(run.u8[_EVENTS]))
        run.u64[KVM_DIRTY_REGS] &= ~KVM_SYNC_X86_EVENTS


def store_sync_regs(vcpu: "Vcpu") -> None:
    """Store what user space asked for (`store_regs`)."""
    run = vcpu.run
    valid = run.u64[KVM_VALID_REGS]
    if valid & KVM_SYNC_X86_REGS:
        run.u8[_REGS] = vcpu.pack_regs()
    if valid & KVM_SYNC_X86_SREGS:
        run.u8[_SREGS] = vcpu.pack_sregs()
    if valid & KVM_SYNC_X86_EVENTS:
        run.u8[_EVENTS] = pack_events(vcpu)
