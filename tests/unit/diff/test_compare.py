"""Comparing recordings: what counts as a difference, what is said and not counted, what is not compared."""

from typing import Any

import pytest

from tdxhw.diff import report
from tdxhw.diff.compare import Comparison, compare
from tdxhw.diff.recording import Recording, TestCalls
from tdxhw.diff.rules import RULES

Call = dict[str, Any]
OPEN: Call = {"req": "open", "arg": {"path": "/dev/kvm"}, "ret": "kvm0"}
VERSION: Call = {"obj": "kvm0", "req": "KVM_GET_API_VERSION", "arg": 0, "ret": 12}
REGION: Call = {"obj": "vm0", "req": "KVM_SET_USER_MEMORY_REGION", "arg": {"slot": 1}, "errno": "EEXIST"}
SREGS: Call = {"obj": "vcpu0", "req": "KVM_GET_SREGS", "arg": {}, "ret": 0, "out": {"cr0": 0x10, "cs.base": 1}}
RUN: Call = {"obj": "vcpu0", "req": "KVM_RUN", "arg": {}, "ret": 0, "exit": "KVM_EXIT_HLT", "out": {"if_flag": 1}}


def side(*calls: Call, outcome: str = "passed", reason: str = "", name: str = "s::test") -> Recording:
    return Recording("a side", {"kernel": "x"}, {}, ["s"], {name: TestCalls(name, outcome, reason, list(calls))})


def compared(first: Recording, second: Recording) -> tuple[int, int]:
    result = compare(first, second)
    return result.compared, len(result.differences)


def last_line(result: Comparison) -> str:
    return list(report.lines(result))[-1]


def test_equal_sides_have_no_difference() -> None:
    calls = (OPEN, VERSION, REGION, SREGS, RUN)
    result = compare(side(*calls), side(*calls))

    assert last_line(result) == "5 calls compared, 0 differences"


@pytest.mark.parametrize(
    ("call", "change", "path"),
    [
        (VERSION, {"ret": 13}, "ret"),
        (REGION, {"errno": "EINVAL"}, "errno"),
        (REGION, {"arg": {"slot": 2}}, "arg.slot"),
        (SREGS, {"out": {"cr0": 0x11, "cs.base": 1}}, "cr0"),
        (SREGS, {"out": {"cr0": 0x10}}, "cs.base"),
        (RUN, {"exit": "KVM_EXIT_SHUTDOWN"}, "exit"),
        (RUN, {"out": {"if_flag": 0}}, "if_flag"),
        (SREGS, {"hw_error": 1 << 63}, "hw_error"),
    ],
)
def test_every_part_of_an_answer_counts(call: Call, change: Call, path: str) -> None:
    result = compare(side(OPEN, call), side(OPEN, call | change))

    (difference,) = result.differences
    assert [field for field, _, _ in difference.fields] == [path]
    assert result.compared == 2
    assert any(path in line for line in report.lines(result))


def test_a_refusal_against_a_success_shows_both() -> None:
    accepted = {"obj": "vm0", "req": REGION["req"], "arg": REGION["arg"], "ret": 0}

    (difference,) = compare(side(REGION), side(accepted)).differences

    assert difference.fields == (("ret", None, 0), ("errno", "EEXIST", None))


def test_sides_that_go_different_ways_are_not_compared_any_further() -> None:
    result = compare(side(OPEN, VERSION, SREGS), side(OPEN, SREGS, SREGS))

    assert (result.compared, len(result.differences), result.uncompared_calls) == (2, 1, 2)


def test_calls_that_one_side_does_not_make_are_a_difference() -> None:
    assert compared(side(OPEN, VERSION), side(OPEN)) == (2, 1)
    assert compared(side(OPEN), side(OPEN, VERSION, SREGS)) == (2, 1)


def test_the_first_of_each_kind_is_shown_with_how_many_there_are() -> None:
    other = SREGS | {"out": {"cr0": 0x11, "cs.base": 1}}
    result = compare(side(SREGS, SREGS, SREGS, REGION), side(other, other, other, REGION | {"errno": "EINVAL"}))

    kinds = result.kinds()
    assert [len(found) for found in kinds.values()] == [3, 1]
    assert any("2 more of this kind, in 1 tests" in line for line in report.lines(result))
    assert last_line(result) == "4 calls compared, 4 differences"


def test_threads_are_compared_each_for_itself() -> None:
    one, other = RUN | {"thread": "v0"}, RUN | {"thread": "v1", "obj": "vcpu1"}

    assert compared(side(one, other), side(other, one)) == (2, 0)


def test_a_test_that_one_side_skips_is_said_and_not_counted() -> None:
    result = compare(side(OPEN), side(outcome="skipped", reason="needs guest-memfd"))

    assert (result.compared, len(result.differences)) == (0, 0)
    assert result.left_out == ["s::test: skipped on a side: needs guest-memfd"]
    assert any("needs guest-memfd" in line for line in report.lines(result))


def test_a_test_that_one_side_does_not_have_is_said() -> None:
    result = compare(side(OPEN), side(OPEN, name="s::other"))

    assert len(result.left_out) == 2
    assert result.uncompared_calls == 2


def test_a_test_that_fails_on_one_side_though_every_call_agrees_is_a_difference() -> None:
    result = compare(side(OPEN), side(OPEN, outcome="failed", reason="assert 1 == 2"))

    (difference,) = result.differences
    assert difference.fields == (("outcome", "passed", "failed"), ("reason", "", "assert 1 == 2"))
    assert any("assert 1 == 2" in line for line in report.lines(result))


def test_a_test_that_fails_on_both_sides_is_said() -> None:
    result = compare(side(OPEN, outcome="failed", reason="x"), side(OPEN, outcome="failed", reason="y"))

    assert result.failed_on_both == ["s::test: x"]


def test_clocks_are_not_compared_and_counted() -> None:
    clock = {"obj": "vm0", "req": "KVM_GET_CLOCK", "arg": {}, "ret": 0, "out": {"clock": 1, "flags": 2}}
    result = compare(side(clock), side(clock | {"out": {"clock": 9, "flags": 2}}))

    assert result.differences == []
    assert result.not_compared == {"clocks run on": 1}
    assert compare(side(clock), side(clock | {"out": {"clock": 1, "flags": 3}})).differences


@pytest.mark.parametrize("same_equipment", [False, True])
def test_tables_of_the_cpu_are_compared_when_one_side_took_them_from_the_other(same_equipment: bool) -> None:
    cpuid = {"obj": "kvm0", "req": "KVM_GET_SUPPORTED_CPUID", "arg": {}, "ret": 0, "out": {"cpuid[0x7,0x0].ebx": 1}}
    other = side(cpuid | {"out": {"cpuid[0x7,0x0].ebx": 3}})
    other.like_other_side = same_equipment

    assert len(compare(side(cpuid), other).differences) == same_equipment


def test_the_apic_id_of_a_cpu_is_never_compared() -> None:
    cpuid = {"obj": "kvm0", "req": "KVM_GET_SUPPORTED_CPUID", "arg": {}, "ret": 0, "out": {"cpuid[0x1,0x0].ebx": 1}}
    other = side(cpuid | {"out": {"cpuid[0x1,0x0].ebx": 3}})
    other.like_other_side = True

    assert compare(side(cpuid), other).differences == []


def test_debug_words_of_an_internal_error_are_not_compared_and_its_suberror_is() -> None:
    error = RUN | {"exit": "KVM_EXIT_INTERNAL_ERROR", "out": {"internal.suberror": 1, "internal.data[3]": 5}}
    words = error | {"out": {"internal.suberror": 1, "internal.data[3]": 6}}
    suberror = error | {"out": {"internal.suberror": 3, "internal.data[3]": 5}}

    assert compared(side(error), side(words)) == (1, 0)
    assert compared(side(error), side(suberror)) == (1, 1)


def test_every_rule_gives_a_reason() -> None:
    assert all(rule.reason and rule.paths and rule.requests for rule in RULES)


def test_the_document_has_everything_that_the_report_has() -> None:
    document = report.document(compare(side(OPEN, SREGS), side(OPEN, SREGS | {"ret": 1})))

    assert (document["compared"], document["differences"], document["kinds"][0]["count"]) == (2, 1, 1)
    assert document["kinds"][0]["first"]["fields"] == [{"path": "ret", "a": 0, "b": 1}]
    assert [entry["provenance"] for entry in document["sides"]] == [{"kernel": "x"}] * 2


@pytest.mark.parametrize("request_name", ["KVM_GET_SUPPORTED_CPUID", "KVM_SET_CPUID2", "KVM_GET_CPUID2"])
@pytest.mark.parametrize(
    "path", ["cpuid[0x1,0x0].ebx", "cpuid[0xb,0x0].edx", "cpuid[0xb,0x1].edx", "cpuid[0x8000001e,0x0]"]
)
def test_the_apic_id_is_no_difference_wherever_a_table_is_passed(request_name: str, path: str) -> None:
    def call(value: int) -> Call:
        return {"obj": "x", "req": request_name, "arg": {path: value}, "ret": 0, "out": {path: value}}

    other = side(call(2))
    other.like_other_side = True

    assert compare(side(call(1)), other).differences == []
