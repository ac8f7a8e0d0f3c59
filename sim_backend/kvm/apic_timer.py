"""The local APIC's timer: one-shot, periodic and TSC-deadline, on the host's monotonic clock."""

import time
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from sim_backend.kvm.lapic import LocalApic

_LVTT: Final = 0x32
_TMICT: Final = 0x38
_TDCR: Final = 0x3E
_ONE_SHOT, _PERIODIC, _TSC_DEADLINE = range(3)
_U32: Final = 0xFFFF_FFFF


class ApicTimer:
    """The timer of one APIC; its registers are the APIC's."""

    def __init__(self, apic: "LocalApic") -> None:
        self._apic: Final = apic
        self.expires_ns = 0  # time.monotonic_ns() of the next expiry, 0: not armed
        self.tsc_deadline = 0

    def _mode(self) -> int:
        return self._apic.regs[_LVTT] >> 17 & 3

    def _divide_shift(self) -> int:
        divide = self._apic.regs[_TDCR]
        return ((divide & 3 | divide >> 1 & 4) + 1) & 7

    def _period_ns(self) -> int:
        return (self._apic.regs[_TMICT] << self._divide_shift()) * self._apic.vcpu.vm.apic_bus_cycle_ns

    def start(self) -> None:
        """Begin a count from the initial-count register."""
        period = self._period_ns()
        if self._mode() == _TSC_DEADLINE or not period:
            self.expires_ns = 0
            return
        self.expires_ns = time.monotonic_ns() + period
        self._apic.vcpu.timer_armed(self.expires_ns)

    def arm_tsc_deadline(self, value: int, tsc_now: int) -> None:
        """Take a write of IA32_TSC_DEADLINE; ignored outside TSC-deadline mode."""
        if self._mode() != _TSC_DEADLINE:
            return
        self.tsc_deadline = value
        if not value:
            self.expires_ns = 0
            return
        vcpu = self._apic.vcpu
        ticks = max(value - tsc_now, 0)
        self.expires_ns = time.monotonic_ns() + ticks * 1_000_000 // max(vcpu.tsc_khz, 1)
        vcpu.timer_armed(self.expires_ns)

    def expire(self, now_ns: int) -> None:
        """Fire when it is due at `now_ns` (vCPU's thread)."""
        if not self.expires_ns or now_ns < self.expires_ns:
            self._apic.vcpu.timer_armed(self.expires_ns)
            return
        period = self._period_ns()
        if self._mode() == _PERIODIC and period:
            self.expires_ns = now_ns + period
            self._apic.vcpu.timer_armed(self.expires_ns)
        else:
            self.expires_ns = 0
            self.tsc_deadline = 0
        self._apic.deliver_local(_LVTT)

    def current_count(self) -> int:
        """Return what the current-count register shows."""
        if not self.expires_ns or self._mode() == _TSC_DEADLINE:
            return 0
        left_ns = max(self.expires_ns - time.monotonic_ns(), 0)
        return left_ns // (self._apic.vcpu.vm.apic_bus_cycle_ns << self._divide_shift()) & _U32
