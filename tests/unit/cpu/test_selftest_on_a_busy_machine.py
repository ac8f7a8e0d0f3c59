"""The engine's self-test says what Unicorn does, not how busy the machine is."""

import itertools
from typing import Any

import pytest

from sim_backend.cpu import unicorn_selftest
from sim_backend.cpu.unicorn_cpu import UnicornCpu


def test_runs_that_the_ticker_ends_are_gone_on_with(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run = UnicornCpu.run
    runs = itertools.count()

    def run_on_a_busy_machine(cpu: UnicornCpu) -> Any:
        if next(runs) % 2 == 0:
            cpu.kick()
        return run(cpu)

    monkeypatch.setattr(UnicornCpu, "run", run_on_a_busy_machine)
    unicorn_selftest.self_test(machine.cpu, machine.memory.write)
    assert next(runs) > 2 * 20, "each program was kicked, and went on"
