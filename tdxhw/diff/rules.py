"""What is not compared, and why: values that belong to one machine and not to the interface.

A rule names requests and field paths by `fnmatch` pattern. A value under a rule is counted, never silently dropped.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Final


@dataclass(frozen=True, slots=True)
class Rule:
    """One kind of value that is not compared."""

    requests: str
    """Pattern of the request's name."""
    paths: str
    """Pattern of the field's path; ``ret`` is the call's result, ``arg.…`` what it was given."""
    reason: str
    same_equipment: bool = False
    """Whether the values are compared after all when one side took its equipment from the other."""
    exit: str = "*"
    """Pattern of the exit's name, for KVM_RUN."""


_CLOCK: Final = "clocks run on"
_CPU: Final = "a property of the CPU, not of the interface"
_CALLED_ON: Final = "the APIC id of the CPU that the call ran on"
_TABLE: Final = "the CPU's table; compared when one side took it from the other"

RULES: Final = (
    Rule("KVM_GET_CLOCK", "clock", _CLOCK),
    Rule("KVM_GET_CLOCK", "realtime", _CLOCK),
    Rule("KVM_GET_CLOCK", "host_tsc", _CLOCK),
    Rule("KVM_SET_CLOCK", "arg.*", _CLOCK),
    Rule("KVM_GET_MSRS", "msr[[]0x10]", "IA32_TIME_STAMP_COUNTER runs on"),
    Rule("KVM_GET_MSRS", "msr[[]0xe[78]]", "IA32_MPERF and IA32_APERF count on"),
    Rule("KVM_GET_MSRS", "msr[[]0x40000020]", "HV_X64_MSR_TIME_REF_COUNT runs on"),
    Rule("KVM_*ET_LAPIC", "*regs[[]0x390]", "the APIC timer's current count runs on"),
    Rule("KVM_*ET_PIT2", "*channels*.count_load_time", _CLOCK),
    Rule("KVM_*ET_XSAVE*", "*[[]0x1c]", "MXCSR_MASK: " + _CPU, same_equipment=True),
    Rule("KVM_*ET_XSAVE*", "*[[]0x1[def]?]", "the FXSAVE area's software bytes: " + _CPU, same_equipment=True),
    Rule("KVM_*ET_*CPUID*", "*cpuid[[]0x1,0x0].ebx", _CALLED_ON),
    Rule("KVM_*ET_*CPUID*", "*cpuid[[]0xb,*].edx", _CALLED_ON),
    Rule("KVM_*ET_*CPUID*", "*cpuid[[]0x1f,*].edx", _CALLED_ON),
    Rule("KVM_*ET_*CPUID*", "*cpuid[[]0x8000001e,*]*", _CALLED_ON),
    Rule("KVM_GET_*_CPUID", "*", _TABLE, same_equipment=True),
    Rule("KVM_*ET_CPUID2", "*", _TABLE, same_equipment=True),
    Rule("KVM_GET_MSR*_INDEX_LIST", "*", _TABLE, same_equipment=True),
    Rule("KVM_*ET_MSRS", "*", _TABLE, same_equipment=True),
    Rule("KVM_CHECK_EXTENSION", "ret", "what is built in; compared when one side took it from the other", True),
    Rule("KVM_GET_TSC_KHZ", "ret", "the machine's TSC frequency", same_equipment=True),
    Rule("KVM_SET_TSC_KHZ", "arg", "the machine's TSC frequency", same_equipment=True),
    Rule("KVM_MEMORY_ENCRYPT_OP", "[*]data.source_addr", "one past the caller's buffer: where an allocator put it"),
    Rule("KVM_RUN", "internal.data*", "debug words beyond the suberror", exit="KVM_EXIT_INTERNAL_ERROR"),
    Rule("KVM_RUN", "internal.ndata", "debug words beyond the suberror", exit="KVM_EXIT_INTERNAL_ERROR"),
    Rule("KVM_RUN", "debug.dr6", _CPU, exit="KVM_EXIT_DEBUG"),
    Rule("KVM_RUN", "fail_entry.cpu", "the CPU that the thread happened to be on", exit="KVM_EXIT_FAIL_ENTRY"),
)


class RuleSet:
    """The rules that apply to one comparison, and how often each did."""

    def __init__(self, *, same_equipment: bool, rules: Iterable[Rule] = RULES) -> None:
        """`same_equipment`: one side is simulated with the other's capabilities and CPU."""
        self._rules = [rule for rule in rules if not (rule.same_equipment and same_equipment)]
        self._by_request: dict[str, list[Rule]] = {}
        self.skipped: dict[str, int] = {}
        """Values not compared, by reason."""

    def applying(self, call: Mapping[str, Any]) -> list[Rule]:
        """Return the rules for `call`'s request and exit."""
        request = call["req"]
        rules = self._by_request.get(request)
        if rules is None:
            rules = self._by_request[request] = [r for r in self._rules if fnmatchcase(request, r.requests)]
        return [rule for rule in rules if fnmatchcase(call.get("exit", ""), rule.exit)] if rules else rules

    def skips(self, rules: Iterable[Rule], path: str) -> bool:
        """Tell whether one of `rules` keeps the value at `path` from being compared, and count it."""
        for rule in rules:
            if fnmatchcase(path, rule.paths):
                self.skipped[rule.reason] = self.skipped.get(rule.reason, 0) + 1
                return True
        return False
