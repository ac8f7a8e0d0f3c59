"""The local APIC's timer: one-shot, periodic and TSC-deadline, on the host's monotonic clock.

An expiry makes the timer *pending*; the vCPU's thread turns that into an interrupt when it looks (`expire`). However
many periods went by before it looked, they are one interrupt, and the next one comes on the grid that the first set.
"""

import time
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from sim_backend.kvm.lapic import LocalApic

_LVTT: Final = 0x32
_TMICT: Final = 0x38
_TDCR: Final = 0x3E
_ONE_SHOT, _PERIODIC, _TSC_DEADLINE = range(3)
_MODE_SHIFT: Final = 17
_MASKED: Final = 1 << 16
_CPUID_TSC_DEADLINE: Final = 24  # leaf 1, ECX
_MIN_PERIOD_NS: Final = 200_000  # the module parameter min_timer_period_us
_U32: Final = 0xFFFF_FFFF


class ApicTimer:
    """The timer of one APIC (`struct kvm_timer`); its registers are the APIC's."""

    def __init__(self, apic: "LocalApic") -> None:
        self._apic: Final = apic
        self.tsc_deadline = 0
        self._mode = _ONE_SHOT
        self._divisor = 2
        self._period_ns = 0
        self._target_ns = 0  # time.monotonic_ns() at which the current count is zero
        self._due_ns = 0  # time.monotonic_ns() of the next expiry, 0: not armed
        self._pending = False  # it expired, and no interrupt was sent yet

    # ---- registers --------------------------------------------------------------------------------------

    @property
    def mode_bits(self) -> int:
        """The mode bits that LVTT has: none before there is a CPUID table (`kvm_vcpu_after_set_cpuid()`)."""
        cpuid = self._apic.vcpu.cpuid
        if not cpuid.entries:
            return 0
        return (3 if cpuid.has(1, "ecx", _CPUID_TSC_DEADLINE) else 1) << _MODE_SHIFT

    def update_mode(self) -> None:
        """Take the mode from LVTT: a change to or from TSC-deadline mode stops the timer (`apic_update_lvtt()`)."""
        mode = (self._apic.regs[_LVTT] & self.mode_bits) >> _MODE_SHIFT
        if mode == self._mode:
            return
        if (mode == _TSC_DEADLINE) != (self._mode == _TSC_DEADLINE):
            self.cancel()
            self._apic.regs[_TMICT] = 0
            self._period_ns = self.tsc_deadline = 0
        self._catch_up(time.monotonic_ns())
        self._mode = mode
        self._limit_period()

    def update_divisor(self) -> None:
        """Take the divisor from TDCR."""
        divide = self._apic.regs[_TDCR]
        self._divisor = 1 << (((divide & 3 | divide >> 1 & 4) + 1) & 7)

    def write_divide(self) -> None:
        """Act on a write of TDCR: what is left of the count runs on at the new rate."""
        old = self._divisor
        self.update_divisor()
        if self._divisor == old or not self._period_ns:
            return
        now = time.monotonic_ns()
        self._catch_up(now)
        self._period_ns = self._to_ns(self._apic.regs[_TMICT])
        self._limit_period()
        self._target_ns = now + max(self._target_ns - now, 0) * self._divisor // old
        self._due_ns = 0
        self._arm()

    def write_initial_count(self, value: int) -> None:
        """Act on a write of TMICT, which counts for nothing in TSC-deadline mode."""
        if self._mode == _TSC_DEADLINE:
            return
        self.cancel()
        self._apic.regs[_TMICT] = value
        if self._set_target(value):
            self._arm()

    def restore(self, current_count: int) -> None:
        """Begin as KVM_SET_LAPIC's page says (`kvm_apic_set_state()`): from its current count, not its initial one."""
        self.cancel()
        self.update_mode()
        self.update_divisor()
        if self._mode == _TSC_DEADLINE or self._set_target(current_count):
            self._arm()

    def read_tsc_deadline(self) -> int:
        """Return IA32_TSC_DEADLINE, zero outside TSC-deadline mode."""
        return self.tsc_deadline if self._mode == _TSC_DEADLINE and self._apic.hw_enabled else 0

    def arm_tsc_deadline(self, value: int, tsc_now: int) -> None:
        """Take a write of IA32_TSC_DEADLINE; ignored outside TSC-deadline mode."""
        if self._mode != _TSC_DEADLINE or not self._apic.hw_enabled:
            return
        self.cancel()
        self.tsc_deadline = value
        ticks = max(value - tsc_now, 0)
        self._target_ns = time.monotonic_ns() + ticks * 1_000_000 // max(self._apic.vcpu.tsc_khz, 1)
        self._arm()

    def current_count(self) -> int:
        """Return what the current-count register shows."""
        if not self._apic.regs[_TMICT] or not self._period_ns:
            return 0
        now = time.monotonic_ns()
        self._catch_up(now)
        left_ns = max(self._target_ns - now, 0) % self._period_ns
        return left_ns // (self._apic.vcpu.vm.apic_bus_cycle_ns * self._divisor) & _U32

    # ---- running ----------------------------------------------------------------------------------------

    def cancel(self) -> None:
        """Stop, and forget an expiry that sent no interrupt yet."""
        self._due_ns = 0
        self._pending = False

    def forget_pending(self) -> None:
        """Forget an expiry that sent no interrupt yet: the APIC was disabled by software."""
        self._catch_up(time.monotonic_ns())
        self._pending = False

    def reset(self) -> None:
        """Stop at RESET or INIT, the registers being zero."""
        self.cancel()
        self.update_mode()
        self.update_divisor()

    def expire(self, now_ns: int) -> None:
        """Send the interrupt of what expired by `now_ns` (vCPU's thread, `kvm_apic_inject_pending_timer_irqs()`)."""
        self._catch_up(now_ns)
        apic = self._apic
        if self._pending and apic.sw_enabled and apic.hw_enabled and not apic.regs[_LVTT] & _MASKED:
            self._pending = False
            apic.deliver_local(_LVTT)
            if self._mode == _TSC_DEADLINE:
                self.tsc_deadline = 0
            elif self._mode == _ONE_SHOT:
                self._target_ns = 0
        if self._due_ns:
            apic.vcpu.timer_armed(self._due_ns)

    def look_again(self) -> None:
        """Have the vCPU look: an expiry that LVTT or SPIV held back may be let through now."""
        if self._pending:
            self._apic.vcpu.timer_armed(1)

    def _to_ns(self, count: int) -> int:
        return count * self._apic.vcpu.vm.apic_bus_cycle_ns * self._divisor

    def _limit_period(self) -> None:
        if self._mode == _PERIODIC and self._period_ns:
            self._period_ns = max(self._period_ns, _MIN_PERIOD_NS)

    def _set_target(self, count: int) -> bool:
        """Let the count begin at `count`; False where there is no period to count (`set_target_expiration()`)."""
        initial = self._apic.regs[_TMICT]
        self._period_ns = self._to_ns(initial)
        if not self._period_ns:
            return False
        self._limit_period()
        left = self._period_ns
        if count != initial:
            left = min(self._to_ns(count), self._period_ns)
            if not left and self._mode == _PERIODIC:
                left = self._period_ns
        self._target_ns = time.monotonic_ns() + left
        return True

    def _arm(self) -> None:
        if self._mode == _TSC_DEADLINE and not self.tsc_deadline:
            return
        if self._pending and self._mode != _PERIODIC:
            return
        self._due_ns = self._target_ns
        self._apic.vcpu.timer_armed(self._due_ns)

    def _catch_up(self, now: int) -> None:
        """Let what the host's timer did by `now` have happened (`apic_timer_fn()`)."""
        due = self._due_ns
        if not due or now < due:
            return
        self._pending = True
        if self._mode == _PERIODIC and self._period_ns:
            self._due_ns = self._target_ns = due + ((now - due) // self._period_ns + 1) * self._period_ns
        else:
            self._due_ns = 0
