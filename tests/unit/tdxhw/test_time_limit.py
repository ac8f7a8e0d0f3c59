"""The kicker, on a fake KVM_RUN that blocks in a system call until a signal arrives."""

import select as system_select
import signal
import threading
import time

import pytest

from tdxhw.errors import HarnessError
from tdxhw.time_limit import KICK_SIGNAL, TimeLimit, install_kick_handler
from uapi_ctypes.kvm_run import KvmRun


def block_until_kicked(run: KvmRun) -> float:
    """Block as KVM_RUN does: in system calls that a signal interrupts; return how long [s]."""
    begun = time.monotonic()
    while not run.immediate_exit:
        system_select.select([], [], [], 0.05)
        assert time.monotonic() - begun < 30
    return time.monotonic() - begun


def test_sets_immediate_exit_once_the_limit_has_passed() -> None:
    run = KvmRun()

    with TimeLimit(run, 0.1) as limit:
        took = block_until_kicked(run)

        assert limit.expired
    assert took >= 0.1
    assert not run.immediate_exit, "the vCPU is left as if it had never been kicked"


def test_does_nothing_before_the_limit() -> None:
    run = KvmRun()

    with TimeLimit(run, 60) as limit:
        pass

    assert not limit.expired
    assert not run.immediate_exit


def test_leaves_what_the_caller_set_alone() -> None:
    run = KvmRun(immediate_exit=1)

    with TimeLimit(run, 60):
        pass

    assert run.immediate_exit == 1


def test_interrupts_a_system_call_of_its_own_thread_only() -> None:
    install_kick_handler()
    run = KvmRun()
    interrupted: list[float] = []

    def vcpu_thread() -> None:
        with TimeLimit(run, 0.1):
            interrupted.append(block_until_kicked(run))

    thread = threading.Thread(target=vcpu_thread)
    thread.start()
    thread.join(5)

    assert len(interrupted) == 1


def test_leaves_no_thread_behind() -> None:
    before = threading.active_count()

    for _ in range(20):
        with TimeLimit(KvmRun(), 60):
            pass

    assert threading.active_count() == before


def test_the_handler_must_be_installed_from_the_main_thread() -> None:
    previous = signal.signal(KICK_SIGNAL, signal.SIG_DFL)
    problems: list[str] = []

    def elsewhere() -> None:
        with pytest.raises(HarnessError, match="in the main thread"):
            install_kick_handler()
        problems.append("raised")

    try:
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join(5)
    finally:
        signal.signal(KICK_SIGNAL, previous)

    assert problems == ["raised"]
