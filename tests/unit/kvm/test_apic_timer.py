"""The local APIC's timer in interleaved order, as a real host (Linux 6.18) has it."""

import time
from math import floor

import pytest

from sim_backend.kernel import SimKernel
from tests.unit.kvm.interrupting_vmm import CPUID, InterruptingVm, apic_write
from tests.unit.kvm.small_vmm import in_thread, wait_until
from uapi_ctypes.kvm_state import KvmMsrEntry, KvmMsrs

LVTT, TMICT, TMCCT, TDCR, SPIV = 0x320, 0x380, 0x390, 0x3E0, 0xF0
ONE_SHOT, PERIODIC, TSC_DEADLINE, MASKED = 0x50, 0x20050, 0x40050, 1 << 16
IRR_50 = 0x220  # vectors 0x40 to 0x5F
BIT_50 = 1 << 16
LONG = 0x4000_0000  # 2 s at a divisor of 2
SHORT = 5_000_000  # 10 ms


def is_near(value: int, expected: int) -> bool:
    """Tell whether a count has barely run since it was `expected`."""
    return expected * 3 // 4 < value <= expected


def test_periodic_and_one_shot_are_exchanged_while_the_count_runs_on(kernel: SimKernel) -> None:
    with InterruptingVm(kernel, split=True) as vm:
        vm.port_after(apic_write(LVTT, ONE_SHOT) + apic_write(TMICT, LONG) + apic_write(LVTT, PERIODIC))
        assert vm.apic(TMICT) == LONG
        assert is_near(vm.apic(TMCCT), LONG)


@pytest.mark.parametrize(("first", "second"), [(ONE_SHOT, TSC_DEADLINE), (TSC_DEADLINE, PERIODIC)])
def test_a_change_to_or_from_tsc_deadline_mode_stops_the_count(kernel: SimKernel, first: int, second: int) -> None:
    with InterruptingVm(kernel, split=True) as vm:
        vm.port_after(apic_write(LVTT, first) + apic_write(TMICT, LONG) + apic_write(LVTT, second))
        assert (vm.apic(TMICT), vm.apic(TMCCT)) == (0, 0)


def test_modes_need_a_cpuid_table(kernel: SimKernel) -> None:
    with InterruptingVm(kernel, split=True, cpuid=False) as vm:
        vm.port_after(apic_write(LVTT, PERIODIC))
        assert vm.apic(LVTT) == 0x50


def test_a_new_divisor_scales_what_is_left(kernel: SimKernel) -> None:
    with InterruptingVm(kernel, split=True) as vm:
        vm.port_after(apic_write(LVTT, ONE_SHOT) + apic_write(TMICT, LONG))
        time.sleep(0.1)
        left = vm.apic(TMCCT)
        assert left < LONG - 40_000_000
        vm.port_after(apic_write(TDCR, 3))
        assert is_near(vm.apic(TMCCT), left)


def test_get_and_set_lapic_keep_the_count(kernel: SimKernel) -> None:
    with InterruptingVm(kernel, split=True) as vm:
        vm.port_after(apic_write(LVTT, ONE_SHOT) + apic_write(TMICT, LONG))
        time.sleep(0.1)
        left = vm.apic(TMCCT)
        vm.set_apic({})
        assert is_near(vm.apic(TMCCT), left)
        vm.set_apic({TMCCT: 0})
        assert vm.apic(TMCCT) == 0
        vm.port_after(CPUID * 2)
        assert vm.apic(IRR_50) & BIT_50, "a one-shot count that was over fires when it is restored"


@pytest.mark.parametrize("sleeps", [True, False])
def test_an_expiry_waits_behind_the_mask(kernel: SimKernel, sleeps: bool) -> None:
    with InterruptingVm(kernel, split=True) as vm:
        vm.port_after(apic_write(LVTT, ONE_SHOT | MASKED) + apic_write(TMICT, SHORT if sleeps else LONG))
        if sleeps:
            time.sleep(0.03)
        vm.port_after(CPUID * 2)
        assert not vm.apic(IRR_50) & BIT_50
        vm.port_after(apic_write(LVTT, ONE_SHOT) + CPUID * 2)
        assert bool(vm.apic(IRR_50) & BIT_50) == sleeps


def test_disabling_the_apic_by_software_forgets_an_expiry_and_keeps_the_count(kernel: SimKernel) -> None:
    with InterruptingVm(kernel, split=True) as vm:
        vm.port_after(apic_write(LVTT, ONE_SHOT) + apic_write(TMICT, LONG) + apic_write(SPIV, 0xFF))
        assert is_near(vm.apic(TMCCT), LONG)
        assert vm.apic(LVTT) & MASKED
        vm.port_after(apic_write(TMICT, SHORT))
        time.sleep(0.03)
        vm.port_after(apic_write(SPIV, 0xFF) + apic_write(SPIV, 0x1FF) + apic_write(LVTT, ONE_SHOT) + CPUID * 2)
        assert not vm.apic(IRR_50) & BIT_50


def test_a_tsc_deadline_is_seen_in_its_mode_only_and_until_it_fired(kernel: SimKernel) -> None:
    def deadline(value: int | None = None) -> int:
        msrs = KvmMsrs.of([KvmMsrEntry(index=0x6E0, data=value or 0)])
        (vm.vcpu.get_msrs if value is None else vm.vcpu.set_msrs)(msrs)
        return int(msrs.entries[0].data)

    with InterruptingVm(kernel, split=True) as vm:
        vm.port_after(apic_write(LVTT, ONE_SHOT))
        deadline(1 << 60)
        assert deadline() == 0
        vm.port_after(apic_write(LVTT, TSC_DEADLINE))
        deadline(1 << 60)
        assert deadline() == 1 << 60
        deadline(1)
        assert deadline() == 1
        vm.port_after(CPUID * 2)
        assert deadline() == 0
        assert vm.apic(IRR_50) & BIT_50


def test_periods_that_pass_unseen_are_one_interrupt_and_the_next_keeps_the_grid(kernel: SimKernel) -> None:
    with InterruptingVm(kernel, split=True) as vm:
        count, period_s = 20_000_000, 0.04
        before = time.monotonic()
        vm.port_after(apic_write(LVTT, PERIODIC) + apic_write(TMICT, count))
        after = time.monotonic()
        time.sleep(0.1)
        vm.port_after(CPUID * 2)
        assert vm.apic(IRR_50) & BIT_50
        asked = time.monotonic()
        left_s = vm.apic(TMCCT) * 2 / 1e9
        answered = time.monotonic()
        # The end of this period is a whole number of periods after the start, which was between `before` and `after`.
        shortest, longest = asked + left_s - after - 0.001, answered + left_s - before + 0.001
        assert floor(longest / period_s) > floor(shortest / period_s)


def test_a_halted_vcpu_is_woken_at_every_period(kernel: SimKernel) -> None:
    with InterruptingVm(kernel, split=True) as vm:
        handler = b"\xff\x06\x00\x70" + apic_write(0xB0, 0) + b"\xcf"  # inc word [ds:0x7000]: DS is made flat
        vm.memory[0x3000] = handler
        vm.put(apic_write(LVTT, PERIODIC) + apic_write(TMICT, 1_000_000) + b"\xfb\xf4\xeb\xfd")
        sregs = vm.vcpu.get_sregs()
        sregs.ds.base = 0
        vm.vcpu.set_sregs(sregs)
        thread, _ = in_thread(vm.vcpu.run)
        begin = time.monotonic()
        wait_until(lambda: vm.memory.word(0x7000) & 0xFFFF >= 50)
        assert time.monotonic() - begin > 0.08, "50 periods of 2 ms"
        vm.vcpu.kvm_run.immediate_exit = 1
        thread.join(5)
        assert not thread.is_alive()
