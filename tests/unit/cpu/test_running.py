"""Starting, stopping and sharing the processor."""

import threading
import time
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from sim_backend.cpu import unicorn_engine, unicorn_internals, unicorn_layout
from sim_backend.cpu.engine import ExitReason
from sim_backend.cpu.errors import EngineError, EngineSelfTestError
from sim_backend.cpu.ticker import TICKER
from sim_backend.hw.gprs import RAX, RBX, RCX, RSP
from sim_backend.hw.memory import PhysicalMemory

CODE = 0x2000
ENDLESS = "48ffc3 ebfb"  # INC RBX; JMP back


@pytest.fixture(autouse=True)
def ticker_watches(machine: Any) -> None:
    TICKER.watch(machine.cpu)


def test_a_kick_before_the_run_ends_it_at_once(machine: Any) -> None:
    cpu = machine.long_mode()
    machine.code(ENDLESS)
    cpu.kick()
    assert cpu.run().reason == ExitReason.EXTERNAL_INTERRUPT
    assert cpu.gprs[RBX] == 0


def test_a_kick_from_another_thread_ends_an_endless_run(machine: Any) -> None:
    cpu = machine.long_mode()
    machine.code(ENDLESS)
    for _ in range(20):
        timer = threading.Timer(0.001, cpu.kick)
        timer.start()
        start = time.monotonic()
        assert cpu.run().reason == ExitReason.EXTERNAL_INTERRUPT
        assert time.monotonic() - start < 5
        timer.join()
    assert cpu.gprs[RBX] > 0
    assert cpu.rip in (CODE, CODE + 3)


def test_the_ticker_ends_a_long_run_by_itself(machine: Any) -> None:
    cpu = machine.long_mode()
    machine.code(ENDLESS)
    assert cpu.run().reason == ExitReason.EXTERNAL_INTERRUPT
    before = cpu.gprs[RBX]
    assert cpu.run().reason == ExitReason.EXTERNAL_INTERRUPT
    assert cpu.gprs[RBX] > before


def test_the_ticker_ends_a_storm_of_exceptions(machine: Any) -> None:
    cpu = machine.long_mode()
    machine.code("48ffc3 0f0b")
    machine.code("48ffc3 48cf", at=0x9000 + 16 * 6)  # returns to the same UD2
    assert cpu.run().reason == ExitReason.EXTERNAL_INTERRUPT
    assert cpu.gprs[RBX] > 1


def test_locked_increments_of_two_cpus_all_count(machine: Any) -> None:
    rounds = 200_000
    second = machine.new_cpu()
    machine.code("f0ff042500a00000 48ffc9 75f3 f4")  # LOCK INC [0xA000]; DEC RCX; JNZ
    machine.entry(0xA000, 0)
    finished: list[int] = []

    def spin(cpu: Any) -> None:
        machine.begin(cpu).gprs[RCX] = rounds
        while cpu.run().reason == ExitReason.EXTERNAL_INTERRUPT:
            pass
        finished.append(cpu.exit.reason)

    for cpu in (machine.cpu, second):
        machine.long_mode(cpu)
    threads = [threading.Thread(target=spin, args=(cpu,)) for cpu in (machine.cpu, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    second.close()
    assert finished == [ExitReason.HLT, ExitReason.HLT]
    assert int.from_bytes(machine.memory.read(0xA000, 4), "little") == 2 * rounds


def test_a_kick_never_makes_an_instruction_execute_twice(machine: Any) -> None:
    rounds = 20_000_000
    cpu = machine.long_mode()
    machine.code("48ffc0 f0ff042500a00000 48ffc9 75f0 f4")  # INC RAX; LOCK INC [0xA000]; DEC RCX; JNZ
    machine.entry(0xA000, 0)
    machine.begin(cpu).gprs[RCX] = rounds
    done = threading.Event()

    def kick() -> None:
        while not done.wait(0.0003):
            cpu.kick()

    kicker = threading.Thread(target=kick)
    kicker.start()
    kicks = 0
    while cpu.run().reason == ExitReason.EXTERNAL_INTERRUPT:
        kicks += 1
    done.set()
    kicker.join()
    assert kicks > 10
    assert (cpu.gprs[RAX], int.from_bytes(machine.memory.read(0xA000, 4), "little")) == (rounds, rounds)


def test_a_waiting_cpu_gets_its_turn_from_an_endless_one(machine: Any) -> None:
    second = machine.new_cpu()
    machine.long_mode(second)
    machine.long_mode()
    machine.code(ENDLESS)
    machine.code("f4", at=0x2100)
    stop = threading.Event()

    def spin() -> None:
        while not stop.is_set():
            machine.cpu.run()

    thread = threading.Thread(target=spin)
    thread.start()
    try:
        longest = 0.0
        for _ in range(10):
            second.rip = 0x2100
            start = time.monotonic()
            while second.run().reason == ExitReason.EXTERNAL_INTERRUPT:
                pass
            longest = max(longest, time.monotonic() - start)
    finally:
        stop.set()
        machine.cpu.kick()
        thread.join(timeout=30)
        second.close()
    assert longest < 2


def test_a_reused_instance_remembers_nothing(machine: Any) -> None:
    machine.long_mode()
    machine.code("b801000000 f4")
    machine.cpu.rflags = 0x202
    machine.cpu.request_interrupt_window(True)
    machine.cpu.run()
    machine.cpu.close()
    machine.cpu = machine.new_cpu()
    state = machine.cpu.get_state()
    assert (state.cr0, state.cs.base, machine.cpu.rip, machine.cpu.rflags) == (0x6000_0010, 0xFFFF_0000, 0xFFF0, 2)
    machine.long_mode()
    machine.code("b802000000 f4")
    machine.cpu.rflags = 0x202
    assert machine.cpu.run().reason == ExitReason.HLT
    assert machine.cpu.gprs[RAX] == 2


def test_a_closed_cpu_keeps_its_state_and_runs_no_more(machine: Any) -> None:
    cpu = machine.new_cpu()
    machine.long_mode(cpu)
    machine.code("f9 660f01cc")
    cpu.run()
    state = cpu.get_state()
    cpu.close()
    cpu.close()
    assert cpu.get_state() == state
    assert cpu.rflags == 3
    cpu.set_state(state)
    cpu.invalidate()
    cpu.invalidate_code(CODE, 4096)
    with pytest.raises(EngineError, match="closed"):
        cpu.run()


def test_an_exception_from_the_second_level_leaves_the_registers_valid(machine: Any) -> None:
    cpu = machine.long_mode()
    machine.code("48ffc0 488b03 f4")
    cpu.gprs[RBX] = 0x30000
    walk = machine.ept.walk

    def interrupted(gpa: int) -> int:
        if gpa >> 12 == 0x30:
            raise KeyboardInterrupt
        return int(walk(gpa))

    machine.ept.walk = interrupted
    with pytest.raises(KeyboardInterrupt):
        cpu.run()
    assert (cpu.rip, cpu.gprs[RAX]) == (CODE + 3, 1)
    machine.ept.walk = walk
    assert cpu.run().reason == ExitReason.HLT


def test_a_host_of_512_gib_costs_nothing_to_open_and_close() -> None:
    memory = PhysicalMemory(512 << 30)
    engine = unicorn_engine.UnicornEngine(memory)
    engine.new_cpu().close()  # the self-test is over
    start = time.monotonic()
    for _ in range(10):
        engine.new_cpu().close()
    assert time.monotonic() - start < 1
    memory.close()


def test_state_comes_back_as_it_was_set(machine: Any) -> None:
    cpu = machine.long_mode()
    state = cpu.get_state()
    state.cr2, state.cr8, state.xcr0 = 0x1234, 5, 7
    state.dr = [1, 2, 3, 4, 0xFFFF0FF0, 0x402]
    state.gs.base = 0x7FFF_0000_0000
    cpu.set_state(state)
    assert cpu.get_state() == state
    assert cpu.in_64bit_mode()
    assert cpu.cpl() == 0


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(code=st.binary(min_size=1, max_size=24), registers=st.lists(st.integers(0, 2**64 - 1), min_size=16, max_size=16))
@example(code=bytes.fromhex("0faed10d3b3f89ad2226e87c6ba04e3f"), registers=[0] * 16)
@example(code=bytes.fromhex("aae9791ae268dec5251040952e05dd6d"), registers=[0] * 16)
def test_any_bytes_end_in_an_exit_or_a_clear_stop(machine: Any, code: bytes, registers: list[int]) -> None:
    cpu = machine.long_mode()
    machine.memory.write(CODE, code.ljust(64, b"\xf4"))
    cpu.invalidate_code(CODE, 64)
    cpu.gprs[:] = registers
    cpu.gprs[RSP] = 0x8000
    try:
        assert cpu.run().reason in list(ExitReason)
    except EngineError as error:
        assert "cannot execute" in str(error)  # noqa: PT017 - any of several instructions


def test_another_unicorn_version_is_refused_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unicorn_internals, "UNICORN_VERSION", "2.0.1")
    with pytest.raises(EngineSelfTestError, match=r"needs Unicorn 2\.0\.1.*pip install unicorn==2\.0\.1"):
        unicorn_layout.check_version()


@pytest.mark.parametrize(("name", "wrong"), [("UC_CPU", 0x1C0), ("CPU_ENV", 0x138), ("UC_CPU", 0x3A20)])
def test_a_wrong_offset_is_an_error_and_not_a_crash(
    machine: Any, monkeypatch: pytest.MonkeyPatch, name: str, wrong: int
) -> None:
    monkeypatch.setattr(unicorn_internals, name, wrong)
    monkeypatch.setattr(unicorn_layout, "_layout_is_verified", list)
    with pytest.raises(EngineSelfTestError, match="Unicorn's CPU state"):
        unicorn_layout.locate_cpu(machine.cpu.instance.handle)


def test_the_self_test_fails_when_an_assumption_does(monkeypatch: pytest.MonkeyPatch) -> None:
    from sim_backend.cpu import unicorn_exits

    handlers = dict(unicorn_exits.HANDLERS)
    monkeypatch.setitem(unicorn_exits.HANDLERS, unicorn_internals.EXIT_CPUID, handlers[unicorn_internals.EXIT_HLT])
    with pytest.raises(EngineSelfTestError, match="CPUID"):
        unicorn_engine.run_self_test()
