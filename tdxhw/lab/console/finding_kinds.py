"""How the kernel's complaints begin, go on and end, as a table. Wordings from Linux 6.1 to 7.x, x86.

Sources: `kernel/panic.c`, `lib/bug.c`, `arch/x86/kernel/dumpstack.c`, `arch/x86/mm/fault.c`,
`kernel/locking/lockdep.c`, `kernel/rcu/tree_stall.h` and `tree_exp.h`, `kernel/rcu/tasks.h`, `mm/kasan/report.c`,
`mm/kfence/report.c`, `mm/kmsan/report.c`, `mm/slub.c`, `kernel/kcsan/report.c`, `lib/ubsan.c`, `kernel/hung_task.c`,
`kernel/watchdog.c`, `kernel/watchdog_perf.c`, `kernel/sched/core.c`, `arch/x86/kernel/cpu/mce/core.c`,
`arch/x86/mm/extable.c`, `fs/open.c`, `fs/super.c`, `arch/x86/kvm/vmx/tdx.c`, `arch/x86/virt/vmx/tdx/tdx.c`.
"""

import re
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Beginning:
    """A line that begins a complaint, or goes on with one of its kind."""

    kind: str
    pattern: re.Pattern[str]
    goes_on_with: re.Pattern[str] | None = None
    """Only such lines belong to it; without one everything does, until it ends."""


def _begin(kind: str, pattern: str, goes_on_with: str = "") -> Beginning:
    return Beginning(kind, re.compile(pattern), re.compile(goes_on_with) if goes_on_with else None)


_REGISTERS: Final = r"\b(?:RCX|RDX|R0?8|R0?9|R10|R11|rcx|rdx|r8|r9|r10|r11) 0x"

# Looked for anywhere in a line: the front of a torn one is missing. The first match wins.
BEGINNINGS: Final = (
    _begin("panic", r"Kernel panic - not syncing"),
    _begin("kasan", r"BUG: KASAN: "),
    _begin("kcsan", r"BUG: KCSAN: "),
    _begin("kmsan", r"BUG: KMSAN: "),
    _begin("kfence", r"BUG: KFENCE: "),
    _begin("ubsan", r"UBSAN: (?:[a-z]|Undefined )"),
    _begin("soft-lockup", r"BUG: soft lockup - CPU#\d"),
    _begin("hard-lockup", r"Watchdog detected hard LOCKUP"),
    _begin("rcu-stall", r"INFO: \w* ?(?:self-)?detected (?:expedited )?stalls? on (?:CPU|task)"),
    _begin("rcu-stall", r"rcu: \w+ kthread (?:starved|timer wakeup)"),
    _begin("hung-task", r"INFO: task .{1,100}? (?:blocked (?:in I/O wait )?|can't die )for more than \d+ seconds"),
    _begin("lockdep", r"(?:WARNING|INFO|BUG): possible (?:circular locking|recursive locking|irq lock inversion)"),
    _begin(
        "lockdep",
        r"(?:WARNING|INFO|BUG): (?:inconsistent lock state|suspicious RCU usage|bad (?:unlock balance|contention))",
    ),
    _begin("lockdep", r"(?:WARNING|INFO|BUG): (?:held lock freed|lock held (?:when|at)|Nested lock was not taken)"),
    _begin("lockdep", r"(?:WARNING|INFO|BUG): \S+-safe -> \S+-unsafe lock order"),
    _begin(
        "lockdep", r"BUG: (?:Invalid wait context|MAX_LOCK|MAX_STACK|key \S+ (?:has not|not in))|still has locks held"
    ),
    _begin("lockdep", r"INFO: trying to register non-static key"),
    _begin("lockdep", r"DEBUG_LOCKS_WARN_ON\("),
    _begin("oops", r"BUG: (?:unable to handle|kernel NULL pointer dereference)"),
    _begin("oops", r"kernel BUG at "),
    _begin("oops", r"PANIC: double fault"),
    _begin("oops", r"\bOops: .{0,200}?\[#\d+\]"),
    # "traps: cc1[12] general protection fault ip:…" is a user's program.
    _begin("oops", r"general protection fault(?:, (?:probably|maybe) |: )"),
    _begin("oops", r": [0-9a-f]{4} \[#\d+\]"),
    _begin("warning", r"WARNING: (?:CPU: ?\d+ PID: ?\d+ at |.{1,200}?, CPU#\d+: )"),
    _begin("warning", r"WARNING: (?:stack (?:recursion|going)|kernel stack)"),
    _begin("warning", r"unchecked MSR access error: (?:RD|WR)MSR"),
    _begin("bug", r"BUG: (?:sleeping function called|scheduling while atomic|using \w+\(\) in preemptible|workqueue )"),
    _begin("bug", r"BUG [^ :]{1,80} \((?:Not tainted|Tainted: )"),  # of a slab cache
    _begin("bug", r"VFS: (?:Close: file count is |Busy inodes after unmount)"),
    _begin("bug", r"BUG: (?:spinlock|rwlock|Bad (?:page|rss-counter)|Dentry|Objects remaining|non-zero pgtables)"),
    _begin("machine-check", r"\[Hardware Error\]: |mce: CPUs not responding to MCE", r"\[Hardware Error\]: "),
    # mainline: "SEAMCALL TDH_VP_ENTER failed: 0x…[, rcx 0x…]", "SEAMCALL (34) failed: 0x…"; with "[…]" in older trees;
    # Ubuntu's 6.2 and 6.5: "SEAMCALL failed: CPU 94: leaf 33, error 0x…."
    _begin("seamcall", r"SEAMCALL\b.{0,60}? failed", _REGISTERS),
    _begin("seamcall", r"\b(?:TD[HG]_[A-Z_]{3,40}|td[hg]_[a-z_]{3,40})(?:\(\))? failed", _REGISTERS),
    _begin("seamcall", r"HKID \d+ is leaked", _REGISTERS),
)
KINDS: Final = tuple(dict.fromkeys(beginning.kind for beginning in BEGINNINGS))
"""Every kind of finding, the worst first."""

CUT_HERE: Final = "[ cut here ]"
"""Before a WARN, a BUG or an UBSAN report: which of them it is comes a line or two later."""
END: Final = re.compile(r"---\[ end |Rebooting in \d+ seconds")
NEW_BOOT: Final = re.compile(r"\bLinux version \d")
"""Another kernel speaks: whatever the last one was saying is over."""
RULE: Final = re.compile(r"={40,}$")
HAVE_A_RULE_AT_THE_END: Final = frozenset({"kasan", "kcsan", "kmsan", "kfence", "ubsan"})

MAYBE: Final = re.compile(
    r"panic|PANIC|BUG|UBSAN|LOCKUP|INFO: |WARNING: |Oops|general protection|\[#|_WARN_ON|Hardware Error|mce: "
    r"|failed|leaked|still has|kthread |\[ cut|---\[ end|=====|Rebooting in|Linux version|unchecked MSR|VFS: "
)
"""What every beginning and end has. Most lines have none of it, and are done with after this one search."""
