"""The scanner of console logs: real logs of two kernels, the wordings of others, and whatever a bad line sends."""

import json
import re
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tdxhw import report_log
from tdxhw.lab import kernel_marks
from tdxhw.lab.console.finding_kinds import BEGINNINGS, MAYBE
from tdxhw.lab.console.findings import KINDS, Finding, scan, tie
from tdxhw.lab.console.lines import ConsoleLine, read_log
from tdxhw.report.results import Result, Status
from tdxhw.results import RunRecord
from uapi_ctypes.tdx_status import describe

CONSOLES = Path(__file__).with_name("consoles")


def lines(text: str, at: float = 100.0, step_s: float = 0.001) -> list[ConsoleLine]:
    return [ConsoleLine(at + number * step_s, line) for number, line in enumerate(text.strip("\n").splitlines())]


def kinds(text: str) -> list[str]:
    return [finding.kind for finding in scan(lines(text))]


# ---- real logs ----


def real(name: str) -> list[Finding]:
    with (CONSOLES / name).open(encoding="utf-8") as file:
        return scan(read_log(file))


def test_linux_7_2_with_its_crash_test_module() -> None:
    found = real("linux-7.2.13-lkdtm.log")
    assert [(finding.kind, finding.text) for finding in found] == [
        ("warning", "WARNING: drivers/misc/lkdtm/bugs.c:164 at lkdtm_WARNING+0xe/0x20 [lkdtm], CPU#0: bash/227"),
        # The next line was glued to this one on the way.
        ("warning", ("Warning message trigger count: 3; WARNING: drivers/misc/lkdtm/bugs.c:169 at "
         "lkdtm_WARNING_MESSAGE+0x1a/0x20 [lkdtm], CPU#0: bash/264")),
        ("oops", "kernel BUG at drivers/misc/lkdtm/bugs.c:132!"),
        ("oops", "BUG: kernel NULL pointer dereference, address: 0000000000000000"),
        ("warning", ("refcount_t: decrement hit 0; leaking memory.; WARNING: lib/refcount.c:31 at "
         "refcount_warn_saturate+0x22/0x70, CPU#0: bash/302")),
        ("panic", "Kernel panic - not syncing: dumptest"),
    ]  # fmt: skip
    for finding in found[:5]:
        assert "[ cut here ]" in finding.lines[0] or "BUG: kernel NULL" in finding.lines[0]
        assert "---[ end trace" in finding.lines[-1]
        assert any("RIP: 0010:" in line for line in finding.lines)
    assert "Rebooting in 5 seconds.." in found[5].lines[-1]
    assert found[0].at == pytest.approx(1795441208.218, abs=0.01)


def test_linux_6_12_with_hung_tasks_that_panics_and_boots_again() -> None:
    found = real("linux-6.12-hung-task-and-panic.log")
    assert [finding.kind for finding in found] == ["hung-task"] * 5 + ["panic"]
    assert found[0].text == "INFO: task sh:503 blocked for more than 4 seconds."
    assert found[3].text == "INFO: task systemd-journal:235 blocked for more than 4 seconds."
    assert found[5].text == "Kernel panic - not syncing: sysrq triggered crash"
    assert not any("Linux version" in line for finding in found for line in finding.lines), "that is the next boot"


# ---- wordings ----

WORDINGS = {
    "panic": "[   12.000000] Kernel panic - not syncing: Attempted to kill init! exitcode=0x0000000b",
    "kasan": "[    1.5] BUG: KASAN: slab-use-after-free in tdx_vcpu_load+0x10/0x20 [kvm_intel]",
    "kcsan": "[   12.000000] BUG: KCSAN: data-race in tdx_flush / tdx_vcpu_load",
    "kmsan": "[   12.000000] BUG: KMSAN: uninit-value in kvm_arch_vcpu_ioctl+0x1/0x2",
    "kfence": "[   12.000000] BUG: KFENCE: out-of-bounds read in tdx_x+0x1/0x2",
    "ubsan": "[   12.000000] UBSAN: array-index-out-of-bounds in arch/x86/kvm/vmx/tdx.c:123:45",
    "soft-lockup": "[   12.000000] watchdog: BUG: soft lockup - CPU#1 stuck for 26s! [qemu-system-x86:123]",
    "hard-lockup": "[   12.000000] watchdog: CPU28: Watchdog detected hard LOCKUP on cpu 28",
    "rcu-stall": "[   12.000000] rcu: INFO: rcu_preempt detected stalls on CPUs/tasks:",
    "hung-task": "[   12.000000] INFO: task kworker/0:1:77 blocked in I/O wait for more than 122 seconds.",
    "lockdep": "[   12.000000] WARNING: possible circular locking dependency detected",
    "oops": "[   12.000000] Oops: general protection fault, probably for non-canonical address 0xdead: 0000 [#1] SMP",
    "warning": "[   12.000000] WARNING: CPU: 3 PID: 812 at arch/x86/kvm/vmx/tdx.c:1234 tdx_x+0x1/0x2 [kvm_intel]",
    "bug": "[   12.000000] BUG: scheduling while atomic: qemu/123/0x00000002",
    "machine-check": "[   12.000000] mce: [Hardware Error]: CPU 3: Machine Check Exception: 5 Bank 1: be00000000800400",
    "seamcall": "[   12.000000] kvm_intel: SEAMCALL TDH_VP_CREATE failed: 0xc000030000000001",
}
MORE = [
    ("hard-lockup", "NMI watchdog: Watchdog detected hard LOCKUP on cpu 0"),
    ("rcu-stall", "rcu: INFO: rcu_sched self-detected stall on CPU"),
    ("rcu-stall", "rcu: INFO: rcu_preempt detected expedited stalls on CPUs/tasks: { 3-.... }"),
    ("lockdep", "WARNING: suspicious RCU usage"),
    ("lockdep", "WARNING: inconsistent lock state"),
    ("lockdep", "WARNING: HARDIRQ-safe -> HARDIRQ-unsafe lock order detected"),
    ("lockdep", "[ BUG: Invalid wait context ]"),
    ("oops", "general protection fault: 0000 [#2] PREEMPT SMP"),
    ("oops", "invalid opcode: 0000 [#1] PREEMPT SMP NOPTI"),
    ("oops", "BUG: unable to handle page fault for address: ffffc90000000000"),
    ("warning", "WARNING: at tdx_x+0x1/0x2 [kvm_intel], CPU#1: qemu/12"),
    ("seamcall", "virt/tdx: SEAMCALL (34) failed: 0xc000050500000000"),
    ("seamcall", "virt/tdx: SEAMCALL (0x0000000000000022) failed: 0xc000050500000000"),
    ("seamcall", "kvm_intel: SEAMCALL[TDH.MEM.PAGE.ADD] failed: 0xc0000b0d00000001"),
    ("seamcall", "kvm_intel: tdh_mng_vpflushdone() failed. HKID 33 is leaked."),
    ("seamcall", "tdx: SEAMCALL failed: CPU 94: leaf 33, error 0xc000092100000122."),
    ("seamcall", "virt/tdx: SEAMCALL failed: TDX module not loaded."),
    ("lockdep", "WARNING: bad contention detected!"),
    ("lockdep", "[ INFO: possible circular locking dependency detected ]"),
    ("lockdep", "BUG: key ffff888101234567 has not been registered!"),
    ("oops", "traps: PANIC: double fault, error_code: 0x0"),
    (
        "warning",
        "unchecked MSR access error: WRMSR to 0x83f (tried to write 0xf6) at rIP: 0xffff (native_write_msr+0x4/0x20)",
    ),
    ("bug", "BUG kmalloc-64 (Not tainted): Redzone overwritten"),
    ("bug", "BUG kvm_vcpu (Tainted: G        W         ): Objects remaining on __kmem_cache_shutdown()"),
    ("bug", "VFS: Close: file count is 0 (f_op=kvm_gmem_fops)"),
    ("hung-task", "INFO: task qemu-system-x86:4213 can't die for more than 143 seconds."),
]
HARMLESS = """
[    1.000000] traps: cc1[12] general protection fault ip:7f00 sp:7ff0 error:0 in libc.so[7f00+1000]
[    1.000000] cc1[12]: segfault at 0 ip 000055 sp 00007f error 4 in cc1
[    1.000000] rcu: Hierarchical RCU implementation.
[    1.000000] NMI watchdog: Enabled. Permanently consumes one hw-PMU counter.
[    1.000000] systemd[1]: Failed to start x.service: failed: 0xc000050500000000
[    1.000000] INFO: lockdep is turned off.
[    1.000000] Kernel command line: panic=5 oops=panic
[    1.000000] WARNING: this is a user's program speaking
[    1.000000] UBSAN is enabled
[    1.000000] VFS: Finished mounting rootfs on nullfs
[    1.000000] msr: Write to unrecognized MSR 0x17f by mcelog (pid: 2).
[    1.000000] ---[ end trace 0000000000000000 ]---
"""


@pytest.mark.parametrize(("kind", "line"), [*WORDINGS.items(), *MORE])
def test_every_wording_is_found_with_and_without_its_prefix(kind: str, line: str) -> None:
    body = line.partition("] ")[2] if line.startswith("[  ") else line
    for form in (
        line,
        body,
        f"<4>[   12.345678][  T123] {body}",
        f"<2>{body}",
        f"tdxhw-vm login: [    1.000000] {body}",
    ):
        assert kinds(form) == [kind], form


def test_the_table_of_kinds_is_tested_as_a_whole() -> None:
    assert set(WORDINGS) == set(KINDS)


def test_what_is_no_complaint_of_the_kernel_is_no_finding() -> None:
    assert kinds(HARMLESS) == []


def test_the_quick_look_lets_every_wording_through() -> None:
    for line in [*WORDINGS.values(), *(line for _, line in MORE)]:
        assert MAYBE.search(line), line


# ---- reports ----

WARN_WITH_SEAMCALL = """
[   50.000000] ------------[ cut here ]------------
[   50.000001] SEAMCALL TDH_MEM_PAGE_REMOVE failed: 0xc0000b0d00000001
[   50.000002] WARNING: CPU: 3 PID: 812 at arch/x86/kvm/vmx/tdx.c:1740 tdx_sept_remove+0x1/0x2 [kvm_intel]
[   50.000003] Modules linked in: kvm_intel kvm
[   50.000004] ---[ end trace 0000000000000000 ]---
"""
FROM_6_19_ON = """
[   50.000000] ------------[ cut here ]------------
[   50.000002] WARNING: arch/x86/kvm/vmx/tdx.c:1740 at tdx_sept_remove+0x1/0x2 [kvm_intel], CPU#3: qemu/812
[   50.000001] SEAMCALL TDH_MEM_PAGE_REMOVE failed: 0xc0000b0d00000001
[   50.000003] Modules linked in: kvm_intel kvm
[   50.000004] ---[ end trace 0000000000000000 ]---
"""


@pytest.mark.parametrize("text", [WARN_WITH_SEAMCALL, FROM_6_19_ON])
def test_a_warning_about_a_seamcall_is_one_finding_with_its_status_decoded(text: str) -> None:
    (found,) = scan(lines(text))
    assert found.kind == "seamcall"
    assert found.decoded == "EPT_ENTRY_STATE_INCORRECT(RCX)"
    assert found.text == "SEAMCALL TDH_MEM_PAGE_REMOVE failed: 0xc0000b0d00000001"
    assert len(found.lines) == 5


def test_the_registers_after_a_failed_seamcall_belong_to_it_and_nothing_else_does() -> None:
    text = """
[    5.0] virt/tdx: SEAMCALL (45) failed: 0xc000010000000001
[    5.0] virt/tdx: RCX 0x0000000000001000 RDX 0x0000000000000002 R08 0x0000000000000000
[    5.0] virt/tdx: module initialization failed (-5)
"""
    (found,) = scan(lines(text))
    assert (len(found.lines), found.decoded) == (2, "OPERAND_INVALID(RCX)")


def test_the_addresses_of_a_failed_seamcall_are_in_its_lines_but_not_in_its_name() -> None:
    line = "[    5.000000] kvm_intel: SEAMCALL TDH_MEM_PAGE_AUG failed: 0xc0000b0d00000001, rcx 0x812000, rdx 0x43f000"
    (found,) = scan(lines(line))
    assert found.text == "SEAMCALL TDH_MEM_PAGE_AUG failed: 0xc0000b0d00000001"
    assert found.lines == (line,)


@pytest.mark.parametrize(
    ("text", "decoded", "count"),
    [
        # Public reports: canonical/tdx issues 25 (Ubuntu 6.5), 153 (6.8, KVM), 331 (6.8, module setup).
        (
            ("[    7.592823] tdx: SEAMCALL failed: CPU 94: leaf 33, error 0xc000092100000122.\n"
            "[    7.592932] tdx: additional output: rcx 0x0, rdx 0x0, r8 0x0, r9 0x0, r10 0x0, r11 0x0."),
            0xC000092100000122, 2,
        ),
        (
            "[  261.262866] SEAMCALL (0x000000000000001c) failed: 0xc000030000000001 RCX 0x0000000000000000 RDX 0x0",
            0xC000030000000001, 1,
        ),
        (
            ("[   10.798780] virt/tdx: SEAMCALL (0x0000000000000022) failed: 0xc000050500000000\n"
            "[   10.798786] virt/tdx: RCX 0x0000000000000000 RDX 0x9100000100000008 R08 0x0000000000000000\n"
            "[   10.798790] virt/tdx: R09 0x0000000000000000 R10 0x0000000000000000 R11 0x0000000000000000"),
            0xC000050500000000, 3,
        ),
    ],
)  # fmt: skip
def test_the_status_of_a_seamcall_is_decoded_in_every_wording(text: str, decoded: int, count: int) -> None:
    (found,) = scan(lines(text))
    assert (found.kind, found.decoded, len(found.lines)) == ("seamcall", describe(decoded), count)


def test_an_unknown_status_is_shown_as_a_number_and_not_left_out() -> None:
    (found,) = scan(lines("kvm_intel: SEAMCALL TDH_NEW_LEAF failed: 0xdeadbeef00000000"))
    assert "0xdeadbeef00000000" in found.text
    assert found.decoded


def test_two_cpus_at_once_are_told_apart_by_their_caller_ids() -> None:
    text = """
[   50.000000][    C1] ------------[ cut here ]------------
[   50.000000][   T77] ------------[ cut here ]------------
[   50.000001][    C1] WARNING: CPU: 1 PID: 0 at a.c:1 a+0x1/0x2
[   50.000001][   T77] WARNING: CPU: 2 PID: 77 at b.c:1 b+0x1/0x2
[   50.000002][    C1] RIP: 0010:a+0x1/0x2
[   50.000002][   T77] RIP: 0010:b+0x1/0x2
[   50.000003][    C1] ---[ end trace 0000000000000000 ]---
[   50.000003][   T77] ---[ end trace 0000000000000000 ]---
"""
    one, other = scan(lines(text))
    assert all("[    C1]" in line for line in one.lines)
    assert all("[   T77]" in line for line in other.lines)
    assert len(one.lines) == len(other.lines) == 4


def test_an_oops_is_one_finding_from_its_cause_to_its_end_and_the_next_one_is_another() -> None:
    oops = """
[   50.000000] BUG: unable to handle page fault for address: ffffc90000000000
[   50.000000] #PF: supervisor read access in kernel mode
[   50.000000] Oops: Oops: 0000 [#%d] SMP NOPTI
[   50.000000] RIP: 0010:tdx_x+0x1/0x2
"""
    found = scan(lines(oops % 1 + oops.lstrip("\n") % 2))
    assert [len(finding.lines) for finding in found] == [4, 4]


def test_a_warning_whose_first_or_middle_line_was_lost_is_still_found() -> None:
    *all_lines, _ = WARN_WITH_SEAMCALL.strip().splitlines()
    assert kinds("\n".join(all_lines[2:])) == ["warning"]
    (found,) = scan(lines("\n".join([all_lines[0], "something", *all_lines[3:]])))
    assert (found.kind, found.text) == ("warning", "something")


def test_a_kasan_report_ends_at_its_rule_and_a_lockdep_report_does_not_end_at_its_own() -> None:
    rule = "=" * 66
    kasan = f"{rule}\nBUG: KASAN: slab-out-of-bounds in x\nRead of size 8\n{rule}\nafter\n"
    (found,) = scan(lines(kasan))
    assert found.lines == ("BUG: KASAN: slab-out-of-bounds in x", "Read of size 8", rule)

    lockdep = f"{rule}\nWARNING: possible recursive locking detected\n{'-' * 44}\nqemu/12 is trying to acquire lock:\n"
    (found,) = scan(lines(lockdep))
    assert len(found.lines) == 3


def test_lockdep_s_own_assertion_is_lockdep_and_one_finding() -> None:
    text = """
------------[ cut here ]------------
DEBUG_LOCKS_WARN_ON(lock->magic != lock)
WARNING: CPU: 0 PID: 1 at kernel/locking/mutex.c:587 __mutex_lock+0x1/0x2
---[ end trace 0000000000000000 ]---
"""
    (found,) = scan(lines(text))
    assert (found.kind, len(found.lines)) == ("lockdep", 4)


def test_a_report_without_an_end_is_over_after_a_pause() -> None:
    stall = lines("rcu: INFO: rcu_preempt self-detected stall on CPU\n0-....: (1 GPs behind)", at=100)
    (found,) = scan([*stall, *lines("much later, something else", at=150)])
    assert len(found.lines) == 2


def test_an_endless_report_is_cut_off() -> None:
    (found,) = scan(lines("Kernel panic - not syncing: x\n" + "noise\n" * 5000))
    assert len(found.lines) == 200


def test_machine_checks_of_one_event_are_one_finding() -> None:
    text = "\n".join(f"mce: [Hardware Error]: {line}" for line in ("CPU 3: Machine Check: 0 Bank 1", "RIP 10", "TSC 1"))
    assert kinds(f"{text}\nsomething else\n{text}") == ["machine-check", "machine-check"]


# ---- whatever comes ----

PIECES = [
    *(line for _, line in MORE), *WORDINGS.values(), *WARN_WITH_SEAMCALL.strip().splitlines(),
    "=" * 66, "---[ end trace", "[ cut here ]", "[    1.000000]", "<4>", "WARNING: ", "BUG: ", "\x1b[31m",
]  # fmt: skip
TORN = st.builds(
    lambda piece, start, end: piece[start:end], st.sampled_from(PIECES), st.integers(0, 40), st.integers(0, 90)
)
TEXT = st.lists(st.one_of(TORN, st.text(max_size=60)), max_size=4).map("".join)
TIME = st.one_of(st.floats(0, 1e10), st.floats())


@given(st.lists(st.builds(ConsoleLine, TIME, TEXT), max_size=40))
def test_nothing_that_comes_makes_it_raise_and_no_line_is_in_two_findings(some: list[ConsoleLine]) -> None:
    found = scan(some)
    assert all(finding.kind in KINDS and finding.lines for finding in found)
    assert sum(len(finding.lines) for finding in found) <= len(some)


@pytest.mark.parametrize(
    "line",
    ["INFO: task " * 100, "WARNING: " * 120, ": 0000 [" * 130, "SEAMCALL " * 120, "[" * 1100, "\x1b[" * 500, "=" * 1100,
     "TDH_" * 270, "Oops: " * 180, "BUG: " * 200, "a" * 100_000, "[    " * 200],
)  # fmt: skip
def test_the_time_is_linear_in_the_log_whatever_the_lines(line: str) -> None:
    started = time.perf_counter()
    scan([ConsoleLine(1.0, line)] * 100)
    assert time.perf_counter() - started < 2.0, "20 ms for one line"


def test_no_pattern_repeats_a_repetition() -> None:
    for beginning in BEGINNINGS:
        assert not re.search(r"[*+]\)[*+]", beginning.pattern.pattern)


# ---- which test was it ----


def result(test: str, started: float, duration_s: float, status: Status = Status.PASS, message: str = "") -> Result:
    return Result("td", test, "spr-01", status, duration_s, started, message)


RESULTS = [
    result("test_a", 100.0, 1.0),
    result("test_b", 101.0, 5.0),
    result("test_crash", 110.0, 0.1, Status.FAIL, "the host rebooted during this test"),
    result("test_after", 200.0, 1.0),
    result("test_without_time", 0.0, 0.0),
]


@pytest.mark.parametrize(
    ("at", "test"),
    [
        (99.9, ""),
        (100.5, "td::test_a"),
        (103.0, "td::test_b"),
        (107.5, "td::test_b"),  # a serial line is late
        (109.0, ""),
        (130.0, "td::test_crash"),  # it could not tell how long it ran
        (200.5, "td::test_after"),
        (300.0, ""),
    ],
)
def test_a_finding_is_tied_to_the_test_that_was_running(at: float, test: str) -> None:
    (tied,) = tie([Finding("warning", at, "x", ("x",))], RESULTS)
    assert tied.test == test


def test_the_clock_of_the_host_may_be_another() -> None:
    (tied,) = tie([Finding("warning", 100.5, "x", ("x",))], [result("test_a", 3700.0, 1.0)], host_ahead_s=3600.0)
    assert tied.test == "td::test_a"


# ---- marks: the host's own clock says which test it was ----

UP_AT = 5000.0
"""When the host that these lines are of was switched on, by its own clock [s since 1970]."""


def marked(nodeid: str, stamp: float) -> str:
    return f"[{stamp:12.6f}] tdxhw: {nodeid} began at {UP_AT + stamp:.6f}"


def warned(stamp: float, where: str = "x.c:1 f+0x1/0x2") -> list[str]:
    return [f"[{stamp:12.6f}] WARNING: CPU: 1 PID: 7 at {where}", f"[{stamp:12.6f}] ---[ end trace 0 ]---"]


def tied_tests(said: list[str], *, late_s: float = 0.0, every_s: float = 0.0) -> list[str]:
    """Return the tests of the findings in lines that arrive late, `every_s` after another."""
    arrived = [ConsoleLine(UP_AT + 1000.0 + late_s + number * every_s, line) for number, line in enumerate(said)]
    results = [result(name, UP_AT + at, 1.0) for name, at in (("test_a", 10.0), ("test_b", 11.0), ("test_c", 12.0))]
    return [finding.test.removeprefix("td::") for finding in tie(scan(arrived), results, host_ahead_s=-1000.0)]


SERIAL = [
    *warned(9.999999),
    marked("test_td.py::test_a", 10.000001),
    *warned(10.9),
    marked("test_td.py::test_b", 11.000001),
    *warned(11.000002),
    marked("test_td.py::test_c", 12.000001),
    *warned(12.5),
]


@pytest.mark.parametrize("late_s", [0.0, 9.0, 3600.0])
def test_with_marks_it_does_not_matter_how_late_a_console_is(late_s: float) -> None:
    assert tied_tests(SERIAL, late_s=late_s, every_s=0.3) == ["", "test_a", "test_b", "test_c"]


def test_a_lost_or_torn_mark_is_made_up_for_by_another() -> None:
    for spoilt in ("", "[   11.000001] tdxhw: test_td.py::test_b began at 50", "tdxhw: test_td.py::test_b be"):
        said = [spoilt if "test_b began" in line else line for line in SERIAL]
        assert tied_tests(said, late_s=5.0) == ["", "test_a", "test_b", "test_c"]


def test_a_mark_of_another_boot_says_nothing() -> None:
    """Switched on again at 11.0: by the old boot's marks this would have been long before."""
    banner = "[    0.000000] Linux version 7.2.13-trial (x@y)"
    for begins in ([banner], ["[    0.000000] Command line: quiet"]):
        said = [marked("test_td.py::test_a", 10.0), *begins, *warned(0.5)]
        (finding,) = scan([ConsoleLine(UP_AT + 11.5, line) for line in said])
        assert finding.host_at is None
        assert finding.at == UP_AT + 11.5


def test_a_mark_is_no_finding_and_in_no_report_whatever_its_test_is_called() -> None:
    name = "test_td.py::test_it[BUG: KASAN: Kernel panic - not syncing: Oops: 0 [#1] SEAMCALL failed: 0x1]"
    said = ["[   10.000001] BUG: KASAN: use-after-free in f", marked(name, 10.000002), "[   10.000003] the rest"]
    (finding,) = scan([ConsoleLine(1.0, line) for line in said])
    assert finding.lines == (said[0], said[2])
    assert scan([ConsoleLine(1.0, marked(name, 1.0)[:-3])]) == []


def test_a_mark_is_one_line_that_the_kernel_takes_and_that_is_read_back(tmp_path: Path) -> None:
    kmsg = tmp_path / "kmsg"
    kmsg.touch()
    before = time.time()
    at = kernel_marks.mark("test_é.py::test[\n" + "x" * 2000, path=str(kmsg))
    written = kmsg.read_bytes()
    assert before <= at <= time.time()
    assert written.startswith(b"<4>tdxhw: test_\\xe9.py::test[")
    assert written.endswith(b"\n")
    assert len(written) < 1000
    (line,) = written.decode("ascii").splitlines()
    assert kernel_marks.marked_time(line.removeprefix("<4>")) == pytest.approx(at, abs=1e-6)


@pytest.mark.parametrize("name", ["nowhere/kmsg", "a-folder", "/dev/full"])
def test_where_the_kernel_log_cannot_be_written_a_test_begins_all_the_same(tmp_path: Path, name: str) -> None:
    (tmp_path / "a-folder").mkdir()
    before = time.time()
    assert before <= kernel_marks.mark("test_td.py::test_a", path=str(tmp_path / name)) <= time.time()
    assert [path.name for path in tmp_path.rglob("*")] == ["a-folder"]


@pytest.mark.parametrize(
    ("backend", "asked", "marks"),
    [("local", "1", ["test_td.py::test_a"]), ("local", "0", []), ("local", "", []), ("sim", "1", [])],
)
def test_a_run_that_is_asked_to_marks_its_tests_with_the_time_that_it_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str, asked: str, marks: list[str]
) -> None:
    begun: list[str] = []

    def mark(nodeid: str) -> float:
        begun.append(nodeid)
        return 1234.5

    monkeypatch.setenv(kernel_marks.ASKED_FOR, asked)
    monkeypatch.setattr(kernel_marks, "mark", mark)
    log = report_log.ReportLog(tmp_path / "log.jsonl", RunRecord(backend, "", {}))
    before = time.time()
    log.pytest_runtest_logstart("test_td.py::test_a")
    log.pytest_unconfigure()
    assert begun == marks
    starts = [json.loads(line)["start"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    if backend == "sim":
        assert starts == []
    elif marks:
        assert starts == [1234.5]
    else:
        assert before <= starts[0] <= time.time()
