"""KVM_RUN: everything around entering the guest, in the kernel's order (`kvm_arch_vcpu_ioctl_run`, `vcpu_run`)."""

import errno
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from sim_backend.cpu.errors import UnsupportedInstruction
from sim_backend.kvm.errors import Errno, SimLimit
from sim_backend.kvm.kvm_run_page import (
    APIC_BASE,
    CR8,
    EXIT_REASON,
    FLAGS,
    IF_FLAG,
    IMMEDIATE_EXIT,
    KVM_DIRTY_REGS,
    KVM_VALID_REGS,
    READY_FOR_INTERRUPT_INJECTION,
    REQUEST_INTERRUPT_WINDOW,
    UNION,
)
from sim_backend.kvm.signals import SIGNALS, RunMask
from sim_backend.kvm.sync_regs import load_sync_regs, store_sync_regs
from sim_backend.kvm.vcpu import MpState

if TYPE_CHECKING:
    from sim_backend.kvm.vcpu import Vcpu

KVM_EXIT_UNKNOWN: Final = 0
KVM_EXIT_IO: Final = 2
KVM_EXIT_MMIO: Final = 6
KVM_EXIT_IRQ_WINDOW_OPEN: Final = 7
KVM_EXIT_INTR: Final = 10
KVM_EXIT_IOAPIC_EOI: Final = 26
KVM_SYNC_X86_VALID_FIELDS: Final = 7
_POLL_S: Final = 0.005  # how long a halted vCPU sleeps before it looks for signals and immediate_exit [s]
_RUNNABLE: Final = int(MpState.RUNNABLE)
_UNINITIALIZED: Final = int(MpState.UNINITIALIZED)
_HALTED: Final = int(MpState.HALTED)


def make_run(vcpu: "Vcpu") -> Callable[[int], int]:
    """Return the KVM_RUN handler of `vcpu`: one closure, because this is the hottest ioctl there is."""
    vm = vcpu.vm
    ops = vm.ops
    mutex = vcpu.mutex
    run = vcpu.run
    u8, u16, u32, u64 = run.u8, run.u16, run.u32, run.u64
    lps = vm.host.lps
    counters = vcpu.counters
    get_lp, put_lp = lps.get, lps.put
    mark, since = SIGNALS.mark, SIGNALS.since
    get_ident = threading.get_ident
    vcpu_run, vcpu_pre_run = ops.vcpu_run, ops.vcpu_pre_run
    is_protected = ops.has_protected_state
    sync_mask = 0 if is_protected else KVM_SYNC_X86_VALID_FIELDS

    def kvm_run(arg: int) -> int:
        if arg:
            raise Errno(errno.EINVAL)
        try:
            with mutex:
                if vm.dead:
                    raise Errno(errno.EIO)
                vcpu.thread = get_ident()
                vcpu.signal_mark = signals = mark()
                lp = get_lp(vcpu.lp)
                loaded = False
                if vcpu.signal_mask is not None:
                    vcpu.run_mask = RunMask(vcpu.signal_mask)
                try:
                    ops.vcpu_load(vcpu, lp)
                    vcpu.lp = lp
                    loaded = True
                    u16[FLAGS] = 0
                    if vcpu.mp_state == _UNINITIALIZED:
                        _wait_uninitialized(signals)
                    if u64[KVM_VALID_REGS] or u64[KVM_DIRTY_REGS]:
                        if (u64[KVM_VALID_REGS] | u64[KVM_DIRTY_REGS]) & ~sync_mask:
                            raise Errno(errno.EINVAL)
                        if u64[KVM_DIRTY_REGS]:
                            load_sync_regs(vcpu)
                    if vm.irqchip is None and not vcpu.set_cr8(u64[CR8]):
                        raise Errno(errno.EINVAL)
                    complete = vcpu.complete_userspace_io
                    if complete is not None:
                        vcpu.complete_userspace_io = None
                        if not complete():
                            return 0
                    if u8[IMMEDIATE_EXIT]:
                        raise Errno(errno.EINTR)
                    vcpu_pre_run(vcpu)
                    loop(signals)
                except UnsupportedInstruction as limit:
                    raise SimLimit(str(limit)) from limit
                else:
                    return 0
                finally:
                    post()
                    if vcpu.stats_files:
                        publish_counters()
                    vcpu.thread = 0
                    if loaded:
                        ops.vcpu_put(vcpu)
                    put_lp()
                    if vcpu.run_mask is not None:
                        vcpu.run_mask.restore()
                        vcpu.run_mask = None
        finally:
            if not vm.users:
                vm.destroy_when_idle()

    def _wait_uninitialized(signals: int) -> None:
        if u8[IMMEDIATE_EXIT]:
            raise Errno(errno.EINTR)
        while not (interrupted := since(signals) or pending_signal() or bool(u8[IMMEDIATE_EXIT])):
            if vm.dead:
                raise Errno(errno.EIO)
            if vcpu.has_work():
                break
            sleep(_POLL_S)
        vcpu.accept_apic_events()
        if interrupted:
            u32[EXIT_REASON] = KVM_EXIT_INTR
            counters["signal_exits"] += 1
        raise Errno(errno.EINTR if interrupted else errno.EAGAIN)

    def sleep(timeout_s: float) -> None:
        """Wait for a kick with the logical processor given up; SET_MP_STATE and the like need the mutex."""
        put_lp()
        try:
            with vcpu.wakeup:
                if not vcpu.kicked:
                    vcpu.wakeup.wait(timeout_s)
                vcpu.kicked = False
        finally:
            lp = get_lp(vcpu.lp)
            if lp != vcpu.lp:
                ops.vcpu_load(vcpu, lp)
                vcpu.lp = lp

    def loop(signals: int) -> None:
        u32[EXIT_REASON] = KVM_EXIT_UNKNOWN
        if vcpu.run_mask is not None and pending_signal():
            u32[EXIT_REASON] = KVM_EXIT_INTR
            counters["signal_exits"] += 1
            raise Errno(errno.EINTR)
        while True:
            if vcpu.mp_state == _RUNNABLE:
                vcpu.kicked = False
                if vm.dead:
                    raise Errno(errno.EIO)
                if vcpu.nmi_queued:
                    vcpu.process_nmi()
                if vcpu.nmi_pending:
                    ops.inject_nmi(vcpu)
                counters["exits"] += 1
                if not vcpu_run(vcpu):
                    count_exit()
                    return
            else:
                block()
            if vcpu.timer_due_ns:
                expire_timer()
            if vcpu.ioapic_eoi_vector >= 0:
                u32[EXIT_REASON] = KVM_EXIT_IOAPIC_EOI
                u8[UNION] = vcpu.ioapic_eoi_vector
                vcpu.ioapic_eoi_vector = -1
                return
            if u8[REQUEST_INTERRUPT_WINDOW] and vcpu.wants_interrupt_window() and vcpu.ready_for_interrupt():
                u32[EXIT_REASON] = KVM_EXIT_IRQ_WINDOW_OPEN
                return
            if vm.dead:
                raise Errno(errno.EIO)
            if since(signals) or u8[IMMEDIATE_EXIT] or (vcpu.run_mask is not None and pending_signal()):
                u32[EXIT_REASON] = KVM_EXIT_INTR
                counters["signal_exits"] += 1
                raise Errno(errno.EINTR)
            if lps.waiting:
                yield_processor()

    def pending_signal() -> bool:
        """Tell whether a signal waits that only the mask of KVM_SET_SIGNAL_MASK lets through."""
        mask = vcpu.run_mask
        return mask is not None and mask.pending()

    def yield_processor() -> None:
        """Let another thread have the logical processor, as the scheduler would at its tick."""
        ops.vcpu_put(vcpu)
        put_lp()
        time.sleep(0)
        lp = get_lp(vcpu.lp)
        ops.vcpu_load(vcpu, lp)
        vcpu.lp = lp

    def expire_timer() -> None:
        now = time.monotonic_ns()
        with vcpu.wakeup:
            if now < vcpu.timer_due_ns:
                return
            vcpu.timer_due_ns = 0
        if vcpu.apic is not None:
            vcpu.apic.timer.expire(now)
        if vm.pit is not None:
            vm.pit.expire(now)

    def count_exit() -> None:
        reason = u32[EXIT_REASON]
        if reason == KVM_EXIT_IO:
            counters["io_exits"] += 1
        elif reason == KVM_EXIT_MMIO:
            counters["mmio_exits"] += 1

    def publish_counters() -> None:
        for stats in vcpu.stats_files:
            stats.store(counters)

    def block() -> None:
        has_work = vcpu.has_work()
        if not has_work:
            timeout = _POLL_S
            if vcpu.timer_due_ns:
                timeout = min(timeout, max(vcpu.timer_due_ns - time.monotonic_ns(), 0) / 1e9)
            sleep(timeout)
            if vcpu.timer_due_ns:
                expire_timer()
            has_work = vcpu.has_work()
        if has_work:
            counters["halt_wakeup"] += 1
            vcpu.unhalt()

    def post() -> None:
        """Fill the header's outputs (post_kvm_run_save)."""
        apic = vcpu.apic
        u64[CR8] = vcpu.get_cr8()
        u64[APIC_BASE] = vcpu.apic_base
        if is_protected:
            u8[IF_FLAG] = 0
            u8[READY_FOR_INTERRUPT_INJECTION] = apic is not None and apic.accepts_extint()
        else:
            u8[IF_FLAG] = vcpu.interrupt_flag()
            u8[READY_FOR_INTERRUPT_INJECTION] = vcpu.ready_for_interrupt()
            if u64[KVM_VALID_REGS]:
                store_sync_regs(vcpu)

    return kvm_run
