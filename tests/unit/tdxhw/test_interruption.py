"""Ctrl-C and SIGTERM in the middle of things: no result is lost, nothing is cut off half-way."""

import json
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from tdxhw.backends.select import select
from tdxhw.console import SilentDisplay
from tdxhw.runner import RunOptions, run_on
from tests.unit.tdxhw.fake_host import MAINLINE_CAPS, FakeHost
from tests.unit.tdxhw.test_run_command import needs_dev_kvm
from tests.unit.tdxhw.test_runner import Run, outcomes

HEADER = "import os, signal, threading\ndef interrupt(): os.kill(os.getpid(), signal.{signal})\n"
SUITE = """
def test_first(host): pass

@pytest.fixture
def closing(host):
    {set_up}
    yield
    {tear_down}
    open({marker!r}, "w").close()

def test_second(closing): {call}

def test_never_reached(host): pass
"""


@pytest.fixture
def host() -> FakeHost:
    return FakeHost("mainline", MAINLINE_CAPS)


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize(
    ("where", "done"),
    [("set_up", ["test_first"]), ("call", ["test_first"]), ("tear_down", ["test_first", "test_second"])],
)
def test_results_so_far_are_kept_and_tear_down_is_not_cut_off(
    tmp_path: Path, host: FakeHost, where: str, done: list[str], number: str
) -> None:
    marker, junit, log = tmp_path / "closed", tmp_path / "j.xml", tmp_path / "log.jsonl"
    steps = {"set_up": "pass", "call": "pass", "tear_down": "pass"} | {where: "interrupt()"}
    source = HEADER.format(signal=number) + SUITE.format(marker=str(marker), **steps)

    record = Run(tmp_path)(source, host, junit=junit, report_log=log)

    assert (record.exit_code, record.interrupted) == (130, True)
    assert outcomes(record) == [(name, "mainline", "passed") for name in done]
    assert marker.exists()
    reported = [case.get("name", "") for case in ET.parse(junit).iter("testcase")]
    assert reported[: len(done)] == [f"{name}[mainline]" for name in done]
    assert json.loads(log.read_text().splitlines()[-1])["$report_type"] == "SessionFinish"


def test_what_an_interrupted_test_left_over_is_no_failure(tmp_path: Path, host: FakeHost) -> None:
    host.left = ["1 VM"]

    record = Run(tmp_path)(HEADER.format(signal="SIGINT") + "def test_it(host): interrupt()\n", host)

    assert (record.exit_code, record.results) == (130, [])


def test_an_interrupt_lost_in_a_c_callback_comes_again(tmp_path: Path, host: FakeHost) -> None:
    source = HEADER.format(signal="SIGINT") + (
        "import time\n"
        "@pytest.mark.filterwarnings('ignore')\n"
        "def test_it(host):\n"
        "    try: interrupt()\n"
        "    except KeyboardInterrupt: pass  # as ctypes does\n"
        "    time.sleep(60)\n"
        "def test_never_reached(host): pass\n"
    )
    begun = time.monotonic()

    record = Run(tmp_path)(source, host)

    assert (record.exit_code, record.results) == (130, [])
    assert time.monotonic() - begun < 30


def test_a_signal_that_our_parent_had_us_ignore_stays_ignored() -> None:
    code = (
        "import os, signal\n"
        "from tdxhw.interruption import Interruption\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "with Interruption() as i: os.kill(os.getpid(), signal.SIGINT); print(i.requested)\n"
    )

    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "False\n"


@needs_dev_kvm
def test_endless_vcpus_in_threads_end_at_once(tmp_path: Path) -> None:
    """Each would run for its own time limit of 60 s."""
    suite = tmp_path / "test_own.py"
    suite.write_text(
        "import os, signal, threading\n"
        "from tdxhw.vmm import run_together\n"
        "def test_it(ordinary_vm, vmm):\n"
        "    vm = ordinary_vm()\n"
        "    vm.add_slot(0, 0x10000)\n"
        "    for _ in range(2): vm.start_real_mode(vm.create_vcpu(), bytes.fromhex('ebfe'))\n"
        "    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()\n"
        "    run_together(vmm(vm), vm.vcpus, limit_s=60)\n"
    )
    begun = time.monotonic()

    record = run_on(select("local"), [suite], RunOptions(), SilentDisplay())

    assert (record.exit_code, record.results) == (130, [])
    assert time.monotonic() - begun < 30
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("tdxhw-vcpu")] == []
