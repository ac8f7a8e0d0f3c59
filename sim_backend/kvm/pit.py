"""The 8254 timer of a full irqchip: three counters, of which channel 0 raises GSI 0 (`arch/x86/kvm/i8254.c`).

The interrupt comes when a vCPU looks at its timers: ticks that all of them miss are one, whatever
KVM_REINJECT_CONTROL says.
"""

import struct
import time
from typing import TYPE_CHECKING, Final

from sim_backend.kvm.lapic import LVT0, MODE_NMI

if TYPE_CHECKING:
    from sim_backend.kvm.vm import Vm

_CHANNEL: Final = struct.Struct("<IH10BQ")  # struct kvm_pit_channel_state
PIT_STATE_BYTES: Final = 112  # struct kvm_pit_state2
KVM_PIT_FLAGS_HPET_LEGACY: Final = 1
KVM_PIT_SPEAKER_DUMMY: Final = 1
PIT_HZ: Final = 1_193_182
_ONE_SHOT_MODES: Final = (0, 1, 4)
_PERIODIC_MODES: Final = (2, 3)
_MIN_PERIOD_NS: Final = 200_000  # the module parameter min_timer_period_us
_IRQ_SOURCE_ID: Final = 2  # KVM_PIT_IRQ_SOURCE_ID


class PitChannel:
    """One counter."""

    def __init__(self, *, gate: int) -> None:
        self.count = 0x10000
        self.latched_count = 0
        self.count_latched = 0
        self.status_latched = 0
        self.status = 0
        self.read_state = 0
        self.write_state = 0
        self.write_latch = 0
        self.rw_mode = 0
        self.mode = 0xFF  # none until the guest chooses one (kvm_pit_reset)
        self.bcd = 0
        self.gate = gate
        self.load_time_ns = time.monotonic_ns()

    def counter(self) -> int:
        """Return what the counter shows now."""
        ticks = (time.monotonic_ns() - self.load_time_ns) * PIT_HZ // 1_000_000_000
        period = self.count or 0x10000
        if self.mode in (2, 3):
            return period - ticks % period
        return (period - ticks) & 0xFFFF

    def pack(self) -> bytes:
        """Return ``struct kvm_pit_channel_state``."""
        return _CHANNEL.pack(
            self.count,
            self.latched_count,
            self.count_latched,
            self.status_latched,
            self.status,
            self.read_state,
            self.write_state,
            self.write_latch,
            self.rw_mode,
            self.mode,
            self.bcd,
            self.gate,
            self.load_time_ns,
        )


class Pit:
    """Three counters behind ports 0x40-0x43, and the speaker gate behind 0x61."""

    def __init__(self, vm: "Vm", flags: int) -> None:
        self._vm: Final = vm
        self.due_ns = 0  # time.monotonic_ns() of channel 0's next interrupt, 0: none
        self._period_ns = 0  # between interrupts, 0: there is one only
        self.speaker = bool(flags & KVM_PIT_SPEAKER_DUMMY)
        self.flags = 0
        self.reinject = True
        self.channels: Final = [PitChannel(gate=int(index != 2)) for index in range(3)]

    def state(self) -> bytes:
        """Return ``struct kvm_pit_state2``."""
        body = b"".join(channel.pack() for channel in self.channels)
        return (body + struct.pack("<I", self.flags)).ljust(PIT_STATE_BYTES, b"\0")

    def set_state(self, data: bytes) -> None:
        """Take ``struct kvm_pit_state2``."""
        for index, channel in enumerate(self.channels):
            (
                channel.count,
                channel.latched_count,
                channel.count_latched,
                channel.status_latched,
                channel.status,
                channel.read_state,
                channel.write_state,
                channel.write_latch,
                channel.rw_mode,
                channel.mode,
                channel.bcd,
                channel.gate,
                _load_time,
            ) = _CHANNEL.unpack_from(data, index * _CHANNEL.size)
            channel.load_time_ns = time.monotonic_ns()
            channel.count = channel.count or 0x10000
        was_hpet = self.flags & KVM_PIT_FLAGS_HPET_LEGACY
        (self.flags,) = struct.unpack_from("<I", data, 3 * _CHANNEL.size)
        if self.flags & KVM_PIT_FLAGS_HPET_LEGACY and not was_hpet:
            self.due_ns = 0
        else:
            self._arm()

    def port_write(self, port: int, value: int) -> bool:
        """OUT of one byte; False when the port is not one of ours."""
        if port == 0x43:
            self._command(value)
        elif 0x40 <= port <= 0x42:
            if self._load(self.channels[port & 3], value) and port == 0x40:
                self._arm()
        elif port == 0x61 and self.speaker:
            self.channels[2].gate = value & 1
        else:
            return False
        return True

    def _command(self, value: int) -> None:
        if value >> 6 == 3:
            return
        channel = self.channels[value >> 6]
        access = value >> 4 & 3
        if access == 0:
            channel.latched_count, channel.count_latched = channel.counter(), channel.rw_mode or 3
            return
        channel.rw_mode = channel.read_state = channel.write_state = access
        mode = value >> 1 & 7
        channel.mode = mode - 4 if mode > 5 else mode
        channel.bcd = value & 1

    @staticmethod
    def _load(channel: PitChannel, value: int) -> bool:
        """Take a byte of a count; return True when the count is complete."""
        state = channel.write_state
        if state == 3:
            channel.write_latch, channel.write_state = value, 4
            return False
        if state == 4:
            count, channel.write_state = channel.write_latch | value << 8, 3
        elif state == 2:
            count = value << 8
        else:
            count = value
        channel.count = count or 0x10000
        channel.load_time_ns = time.monotonic_ns()
        return True

    # ---- the interrupt of channel 0 -------------------------------------------------------------------------

    def _arm(self) -> None:
        """Start the timer that the mode asks for, or stop it (create_pit_timer, destroy_pit_timer)."""
        channel = self.channels[0]
        if channel.mode not in _ONE_SHOT_MODES and channel.mode not in _PERIODIC_MODES:
            self.due_ns = 0
            return
        if self.flags & KVM_PIT_FLAGS_HPET_LEGACY:
            return  # the HPET drives GSI 0; a timer that runs goes on
        period = (channel.count or 0x10000) * 1_000_000_000 // PIT_HZ
        self._period_ns = max(period, _MIN_PERIOD_NS) if channel.mode in _PERIODIC_MODES else 0
        self.due_ns = time.monotonic_ns() + period
        self._tell_vcpus()
        for vcpu in self._vm.vcpus:
            vcpu.kick()

    def _tell_vcpus(self) -> None:
        for vcpu in self._vm.vcpus:
            vcpu.timer_armed(self.due_ns)

    def expire(self, now_ns: int) -> None:
        """Pulse GSI 0 when it is due at `now_ns` (the thread of whichever vCPU looks first)."""
        irqchip = self._vm.irqchip
        if not self.due_ns or irqchip is None:
            return
        with irqchip.lock:
            if now_ns >= self.due_ns > 0:
                period = self._period_ns
                self.due_ns += ((now_ns - self.due_ns) // period + 1) * period if period else -self.due_ns
                irqchip.set_irq(_IRQ_SOURCE_ID, 0, True)
                irqchip.set_irq(_IRQ_SOURCE_ID, 0, False)
                self._deliver_nmi_watchdog()
        self._tell_vcpus()

    def _deliver_nmi_watchdog(self) -> None:
        """Give each tick to the local APICs whose LINT0 is in NMI mode too (pit_do_work)."""
        for vcpu in self._vm.vcpus:
            if vcpu.apic is not None and vcpu.apic.regs[LVT0] >> 8 & 7 == MODE_NMI:
                vcpu.apic.deliver_local(LVT0)

    def port_read(self, port: int) -> int | None:
        """IN of one byte; None when the port is not one of ours."""
        if port == 0x61 and self.speaker:
            return self.channels[2].gate | (time.monotonic_ns() // 15_000 & 1) << 4
        if not 0x40 <= port <= 0x42:
            return None
        channel = self.channels[port & 3]
        value = channel.latched_count if channel.count_latched else channel.counter()
        state = channel.read_state
        if state == 3:
            channel.read_state = 4
            return value & 0xFF
        if state == 4:
            channel.read_state, channel.count_latched = 3, 0
            return value >> 8 & 0xFF
        channel.count_latched = 0
        return (value >> 8 if state == 2 else value) & 0xFF
