"""KVM_RUN around the guest: signals, kicks from other threads, halting, timers."""

import signal
import threading
import time

import pytest

from sim_backend.kernel import SimKernel
from tests.unit.kvm.small_vmm import CODE, SmallVm, errno_of, in_thread, ordinary_host, wait_until
from uapi_ctypes.kvm_run import KvmExit

ENDLESS_LOOP = b"\xeb\xfe"
STI_HLT_OUT = b"\xfb\xf4\xe6\x80\xf4"  # sti; hlt; out 0x80, al; hlt
IRET = b"\xcf"
MSI = 0xFEE0_0000
HALTED, UNINITIALIZED = 3, 1


@pytest.fixture
def alarm() -> object:
    """Return a function that sends SIGALRM, with a handler, to this thread and no other after a time [s]."""
    previous = signal.signal(signal.SIGALRM, lambda *_: None)
    timers: list[threading.Timer] = []

    def later(delay_s: float) -> None:
        timers.append(threading.Timer(delay_s, signal.pthread_kill, (threading.get_ident(), signal.SIGALRM)))
        timers[-1].start()

    yield later
    for timer in timers:
        timer.cancel()
        timer.join()
    signal.signal(signal.SIGALRM, previous)


def test_a_signal_ends_a_guest_that_loops(kernel: SimKernel, alarm: object) -> None:
    with SmallVm(kernel, ENDLESS_LOOP) as small:
        alarm(0.05)  # type: ignore[operator]
        begin = time.monotonic()
        assert errno_of(small.vcpu.run) == "EINTR"
        assert small.vcpu.exit_reason == KvmExit.KVM_EXIT_INTR
        assert 0.04 < time.monotonic() - begin < 10


def test_a_signal_ends_a_halted_vcpu_and_leaves_it_halted(kernel: SimKernel, alarm: object) -> None:
    with SmallVm(kernel, b"\xf4", split=True) as small:
        alarm(0.05)  # type: ignore[operator]
        assert errno_of(small.vcpu.run) == "EINTR"
        assert small.vcpu.get_mp_state() == HALTED


def test_a_signal_that_the_signal_mask_blocks_waits_until_the_run_is_over(kernel: SimKernel, alarm: object) -> None:
    out = b"\xe6\x80"
    with SmallVm(kernel, b"\x66\xb9\x00\x00\x00\x01" + b"\x67\xe2\xfd" + out) as small:  # mov ecx, 2^24; loop; out
        blocked = 1 << signal.SIGALRM - 1
        small.vcpu.set_signal_mask(blocked.to_bytes(8, "little"))
        alarm(0.005)  # type: ignore[operator]
        assert small.vcpu.run() == KvmExit.KVM_EXIT_IO
        assert signal.SIGALRM not in signal.pthread_sigmask(signal.SIG_BLOCK, ()), "the thread has its own mask again"
        small.vcpu.set_signal_mask(None)
        small.memory[CODE] = ENDLESS_LOOP
        small.start(small.vcpu, CODE)
        alarm(0.05)  # type: ignore[operator]
        assert errno_of(small.vcpu.run) == "EINTR"


def test_a_signal_that_only_the_signal_mask_lets_through_ends_the_run_and_stays_pending(
    kernel: SimKernel, alarm: object
) -> None:
    with SmallVm(kernel, ENDLESS_LOOP) as small:
        small.vcpu.set_signal_mask(bytes(8))
        outside = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
        try:
            alarm(0.02)  # type: ignore[operator]
            for _ in range(2):  # the second finds it pending already
                assert errno_of(small.vcpu.run) == "EINTR"
                assert small.vcpu.exit_reason == KvmExit.KVM_EXIT_INTR
                assert signal.SIGALRM in signal.sigpending()
            assert signal.sigtimedwait({signal.SIGALRM}, 0) is not None
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, outside)


@pytest.mark.parametrize("size", [1, 4096])
def test_code_that_user_space_replaces_between_two_runs_is_what_runs_next(kernel: SimKernel, size: int) -> None:
    with SmallVm(kernel, b"\x90" * 3 + b"\xf4") as small:
        for length in (4, 2, 3, 2):
            small.memory[CODE] = (b"\x90" * (length - 1) + b"\xf4").ljust(size, b"\xf4")
            small.start(small.vcpu, CODE)
            assert small.vcpu.run() == KvmExit.KVM_EXIT_HLT
            assert small.vcpu.get_regs().rip == CODE + length


def test_what_a_signal_handler_raises_comes_out_of_the_call(kernel: SimKernel) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGALRM, interrupt)
    try:
        with SmallVm(kernel, ENDLESS_LOOP) as small:
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            with pytest.raises(KeyboardInterrupt):
                small.vcpu.run()
            assert small.vcpu.get_regs().rip == CODE
    finally:
        signal.signal(signal.SIGALRM, previous)


def test_a_signal_from_before_the_call_does_not_end_it(kernel: SimKernel, alarm: object) -> None:
    with SmallVm(kernel) as small:
        alarm(0.01)  # type: ignore[operator]
        time.sleep(0.03)
        assert small.vcpu.run() == KvmExit.KVM_EXIT_HLT


def test_immediate_exit_from_another_thread_ends_that_threads_guest(kernel: SimKernel) -> None:
    with SmallVm(kernel, ENDLESS_LOOP) as small:
        thread, result = in_thread(small.vcpu.run)
        time.sleep(0.05)
        assert thread.is_alive()
        small.vcpu.kvm_run.immediate_exit = 1
        thread.join(2)
        assert result == ["EINTR"]


def test_immediate_exit_runs_no_guest_instruction_and_leaves_the_exit_reason(kernel: SimKernel) -> None:
    with SmallVm(kernel) as small:
        small.vcpu.kvm_run.exit_reason = 77
        small.vcpu.kvm_run.immediate_exit = 1
        assert errno_of(small.vcpu.run) == "EINTR"
        assert small.vcpu.exit_reason == 77
        assert small.vcpu.get_regs().rip == CODE


def test_the_ioctl_argument_of_run_must_be_zero(kernel: SimKernel) -> None:
    with SmallVm(kernel) as small:
        assert errno_of(lambda: kernel.ioctl(small.vcpu.fd, 0xAE80, 1)) == "EINVAL"


def test_an_msi_wakes_a_halted_vcpu_and_its_handler_runs(kernel: SimKernel) -> None:
    with SmallVm(kernel, STI_HLT_OUT, split=True) as small:
        small.memory[4 * 0x41] = b"\x00\x12\x00\x00"  # IVT: vector 0x41 at 0:0x1200
        small.memory[0x1200] = IRET
        state = small.vcpu.get_lapic()
        state.regs[0xF0:0xF2] = b"\xff\x01"  # SPIV: enabled
        small.vcpu.set_lapic(state)
        thread, result = in_thread(small.vcpu.run)
        wait_until(lambda: kernel.host.vms[-1].vcpus[0].mp_state == HALTED)
        assert small.vm.signal_msi(MSI, 0x41) == 1
        thread.join(2)
        assert result == [KvmExit.KVM_EXIT_IO]
        assert small.vcpu.kvm_run.io.port == 0x80


def test_an_msi_to_a_disabled_apic_is_taken_by_nobody(kernel: SimKernel) -> None:
    with SmallVm(kernel, split=True) as small:
        assert small.vm.signal_msi(MSI, 0x41) == 0
        assert small.vm.signal_msi(MSI | 0x7F << 12, 0x41) == 0


@pytest.mark.parametrize("pause_s", [0.0, 0.02], ids=["at-once", "one-after-the-other"])
def test_an_application_processor_blocks_until_init_and_sipi(kernel: SimKernel, pause_s: float) -> None:
    with SmallVm(kernel, b"\xf4", split=True, n_vcpus=2) as small:
        small.memory[0x2000] = b"\xe6\x81\xf4"  # out 0x81, al
        second = small.vcpus[1]
        assert second.get_mp_state() == UNINITIALIZED
        thread, result = in_thread(second.run)
        time.sleep(0.02)
        assert thread.is_alive()
        assert small.vm.signal_msi(MSI | 1 << 12, 5 << 8) == 1  # INIT
        time.sleep(pause_s)
        assert small.vm.signal_msi(MSI | 1 << 12, 6 << 8 | 2) == 1  # SIPI, page 2
        thread.join(2)
        assert result == ["EAGAIN"]
        thread, result = in_thread(second.run)
        thread.join(5)
        assert result == [KvmExit.KVM_EXIT_IO]
        assert second.kvm_run.io.port == 0x81


def test_a_running_application_processor_is_stopped_and_started_again_by_others(kernel: SimKernel) -> None:
    with SmallVm(kernel, ENDLESS_LOOP, split=True, n_vcpus=2) as small:
        small.memory[0x2000] = b"\xe6\x81\xf4"  # out 0x81, al
        second = small.vcpus[1]
        second.set_mp_state(0)
        thread, result = in_thread(second.run)
        time.sleep(0.02)
        for _ in range(2):
            assert small.vm.signal_msi(MSI | 1 << 12, 5 << 8) == 1  # INIT
            time.sleep(0.02)
            assert thread.is_alive(), "INIT alone makes it wait"
        assert small.vm.signal_msi(MSI | 1 << 12, 6 << 8 | 2) == 1  # SIPI, page 2
        thread.join(5)
        assert result == [KvmExit.KVM_EXIT_IO]
        assert second.kvm_run.io.port == 0x81


def test_the_apic_timer_wakes_a_halted_vcpu(kernel: SimKernel) -> None:
    with SmallVm(kernel, STI_HLT_OUT, split=True) as small:
        small.memory[4 * 0x50] = b"\x00\x12\x00\x00"
        small.memory[0x1200] = IRET
        state = small.vcpu.get_lapic()
        # One shot, 20 ms at 1 ns; KVM_SET_LAPIC goes on from the current count.
        registers = {0xF0: 0x1FF, 0x320: 0x50, 0x3E0: 0xB, 0x380: 20_000_000, 0x390: 20_000_000}
        for offset, value in registers.items():
            state.regs[offset : offset + 4] = value.to_bytes(4, "little")
        small.vcpu.set_lapic(state)
        begin = time.monotonic()
        assert small.vcpu.run() == KvmExit.KVM_EXIT_IO
        assert 0.015 < time.monotonic() - begin < 10


def test_more_running_vcpus_than_processors_all_get_their_turn() -> None:
    kernel = SimKernel(ordinary_host(lps=1))
    count_to_port = b"\xb9\x00\x00\x49\x75\xfd\xe6\x80\xf4"  # mov cx, 0; 1: dec cx; jnz 1b; out
    with SmallVm(kernel, count_to_port, n_vcpus=3) as small:
        runs = [in_thread(vcpu.run) for vcpu in small.vcpus]
        for thread, result in runs:
            thread.join(5)
            assert result == [KvmExit.KVM_EXIT_IO]


def test_deleting_memory_under_a_running_guest_stops_it_using_it(kernel: SimKernel) -> None:
    with SmallVm(kernel, b"\xa0\x00\x20\xeb\xfb") as small:  # 1: mov al, [0x2000]; jmp 1b
        thread, result = in_thread(small.vcpu.run)
        time.sleep(0.03)
        small.vm.set_user_memory_region(0, 0, 0, 0)
        thread.join(2)
        assert result == [KvmExit.KVM_EXIT_INTERNAL_ERROR]


def test_the_run_page_is_consistent_for_a_thread_that_watches(kernel: SimKernel) -> None:
    with SmallVm(kernel, b"\xe6\x10\xeb\xfc") as small:  # 1: out 0x10, al; jmp 1b
        stop = threading.Event()
        ports: set[int] = set()

        def watch() -> None:
            while not stop.is_set():
                ports.add(small.vcpu.kvm_run.io.port)

        thread = threading.Thread(target=watch)
        thread.start()
        for _ in range(200):
            assert small.vcpu.run() == KvmExit.KVM_EXIT_IO
        stop.set()
        thread.join()
        assert ports <= {0, 0x10}


@pytest.mark.parametrize(("kernel", "error"), [("pvm", "ENOSPC"), ("svm", None)], indirect=["kernel"])
def test_shadow_paging_cannot_run_before_the_first_memslot(kernel: SimKernel, error: str | None) -> None:
    with SmallVm(kernel, n_vcpus=0) as small:
        bare = small.kvm.create_vm()
        vcpu = bare.create_vcpu(0)
        assert errno_of(vcpu.run) == error
        bare.set_user_memory_region(0, 0, small.memory.length, small.memory.hva)
        bare.set_user_memory_region(0, 0, 0, 0)
        assert errno_of(vcpu.run) is None
        assert vcpu.exit_reason == KvmExit.KVM_EXIT_INTERNAL_ERROR
        vcpu.close()
        bare.close()


@pytest.mark.parametrize(
    ("code", "exits"),
    [
        (b"\x6c\xf4", [KvmExit.KVM_EXIT_IO, KvmExit.KVM_EXIT_MMIO, KvmExit.KVM_EXIT_HLT]),  # INS: port, then memory
        (b"\x6e\xf4", [KvmExit.KVM_EXIT_MMIO, KvmExit.KVM_EXIT_IO, KvmExit.KVM_EXIT_HLT]),  # OUTS: memory, then port
    ],
)
def test_a_string_port_access_to_mmio_asks_user_space_for_both(
    kernel: SimKernel, code: bytes, exits: list[KvmExit]
) -> None:
    with SmallVm(kernel, code) as small:
        sregs = small.vcpu.get_sregs()
        sregs.es.base = sregs.ds.base = 0x2_0000
        small.vcpu.set_sregs(sregs)
        regs = small.vcpu.get_regs()
        regs.rdx = 0x80
        small.vcpu.set_regs(regs)
        assert [small.vcpu.run() for _ in exits] == exits


@pytest.mark.parametrize("injected_by_user", [False, True])
def test_an_exception_in_real_mode_loses_its_error_code_when_it_is_delivered(
    kernel: SimKernel, injected_by_user: bool
) -> None:
    with SmallVm(kernel, b"\x90\xf4" if injected_by_user else b"\x0f\x30\xf4") as small:  # NOP, or WRMSR
        small.memory[4 * 13] = (0x1200).to_bytes(4, "little")
        small.memory[0x1200] = b"\xf4"
        regs = small.vcpu.get_regs()
        regs.rcx = 0xDEAD_BEEF
        small.vcpu.set_regs(regs)
        if injected_by_user:
            events = small.vcpu.get_vcpu_events()
            events.exception.injected, events.exception.nr = 1, 13
            events.exception.has_error_code, events.exception.error_code = 1, 8
            small.vcpu.set_vcpu_events(events)
            assert small.vcpu.get_vcpu_events().exception.has_error_code == 1
        assert small.vcpu.run() == KvmExit.KVM_EXIT_HLT
        assert small.vcpu.get_regs().rip == 0x1201, "the handler of #GP"
        exception = small.vcpu.get_vcpu_events().exception
        assert (exception.nr, exception.has_error_code, exception.injected) == (13, 0, 0)
