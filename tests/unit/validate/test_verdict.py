"""The verdict: what proves a regression, what only casts doubt, and what changes nothing."""

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tdxhw.lab.console.findings import KINDS, Finding
from tdxhw.report.compare import Change
from tdxhw.report.results import Result, Results, Status
from tdxhw.validate.verdict import CHANGE_WEIGHTS, FINDING_WEIGHTS, Verdict, Weight, judge, why_useless
from tests.unit.report.samples import GNR, SIM, SPR, result

GOOD, REGRESSED, INCONCLUSIVE = Verdict.GOOD, Verdict.REGRESSED, Verdict.INCONCLUSIVE
PASS, FAIL, MISS, SKIP = Status.PASS, Status.FAIL, Status.MISS, Status.SKIP
NAME = "lifecycle::test_td_is_created"


def finding(kind: str, text: str, decoded: str = "", test: str = "") -> Finding:
    return Finding(kind, 1.7e9, text, (text,), decoded, test)


def run(*statuses: Status, test: str = "test_td_is_created", provenance: dict[str, str] = SPR) -> Results:
    return Results(tuple(result(test=test, status=status, provenance=provenance) for status in statuses))


def both(*parts: Results) -> Results:
    return Results(tuple(one for part in parts for one in part.results))


STEADY = run(PASS, test="test_steady")
CASES = {
    # what became of a test beside one that passes steadily
    "passes_as_before": ((PASS,), (PASS,), GOOD),
    "fails_now": ((PASS,), (FAIL,), REGRESSED),
    "fails_every_try": ((PASS,), (FAIL, FAIL, FAIL), REGRESSED),
    "breaks_now": ((PASS,), (Status.ERROR,), REGRESSED),
    "passes_on_the_second_try": ((PASS,), (FAIL, PASS), GOOD),
    "was_flaky_already": ((PASS, FAIL), (FAIL,), GOOD),
    "fails_as_before": ((FAIL,), (FAIL,), GOOD),
    "is_fixed": ((FAIL,), (PASS,), GOOD),
    "was_lost_with_the_host": ((PASS,), (MISS,), INCONCLUSIVE),
    "was_lost_once_and_then_passed": ((PASS,), (MISS, PASS), GOOD),
    "was_lost_once_and_then_failed": ((PASS,), (MISS, FAIL), REGRESSED),
    "is_skipped_now": ((PASS,), (SKIP,), INCONCLUSIVE),
    "is_gone": ((PASS,), (), INCONCLUSIVE),
    "never_passed_and_is_gone": ((SKIP,), (), GOOD),
    "failed_and_is_skipped_now": ((FAIL,), (SKIP,), GOOD),
    "is_new_and_passes": ((), (PASS,), GOOD),
    "is_new_and_fails": ((), (FAIL,), INCONCLUSIVE),
    "was_skipped_and_fails_now": ((SKIP,), (FAIL,), INCONCLUSIVE),
    "was_skipped_and_is_skipped": ((SKIP,), (SKIP,), GOOD),
}


@pytest.mark.parametrize("case", CASES)
def test_a_build_under_which_a_test(case: str) -> None:
    before, now, verdict = CASES[case]
    judgement = judge(both(STEADY, run(*before)), both(STEADY, run(*now)))
    assert judgement.verdict is verdict
    assert judgement.line.startswith(f"{verdict.name}: ")
    assert "\n" not in judgement.line


@pytest.mark.parametrize(
    ("now", "verdict"), [(SKIP, GOOD), (MISS, INCONCLUSIVE), (FAIL, REGRESSED)], ids=lambda one: one.value
)
def test_with_other_parameters_only_a_skip_is_what_was_asked_for(now: Status, verdict: Verdict) -> None:
    judgement = judge(both(STEADY, run(PASS)), both(STEADY, run(now)), other_parameters=True)
    assert judgement.verdict is verdict
    assert any(NAME in reason for reason in judgement.reasons), "it is told all the same"


def test_with_other_parameters_a_boot_that_skips_everything_says_nothing() -> None:
    assert judge(run(PASS), run(SKIP), other_parameters=True).verdict is INCONCLUSIVE


def test_tests_that_were_not_asked_for_are_no_loss_and_nothing_else_is_excused() -> None:
    base = both(STEADY, run(PASS))
    judgement = judge(base, STEADY, narrowed=True)
    assert judgement.verdict is GOOD
    assert "1 tests of the baseline did not run: they were not asked for" in judgement.reasons
    assert judge(base, both(STEADY, run(FAIL)), narrowed=True).verdict is REGRESSED
    assert judge(base, both(STEADY, run(MISS)), narrowed=True).verdict is INCONCLUSIVE
    assert judge(run(PASS), STEADY, narrowed=True).verdict is INCONCLUSIVE, "none of them ran"


def test_parameters_that_did_not_take_effect_leave_no_verdict_but_excuse_no_regression() -> None:
    told = "kvm_intel.tdx is N, although Y was asked for"
    judgement = judge(STEADY, STEADY, not_as_asked=[told])
    assert judgement.line == f"INCONCLUSIVE: not with the parameters that were asked for: {told}"
    assert judge(run(PASS), run(FAIL), not_as_asked=[told]).verdict is REGRESSED


def test_a_baseline_of_another_host_is_told() -> None:
    judgement = judge(STEADY, Results(tuple(replace(one, host="spr-07") for one in STEADY.results)))
    assert judgement.verdict is GOOD
    assert "the baseline is of another host: spr-01" in judgement.reasons
    assert not any("another host" in reason for reason in judge(STEADY, STEADY).reasons)


@pytest.mark.parametrize(
    ("base", "told"),
    [
        (STEADY, ""),
        (run(PASS, provenance=SIM), "has no result from hardware (the simulator says nothing about a kernel build)"),
        (Results(()), "has no result from hardware"),
        (run(FAIL, SKIP), "has no test that passed on hardware"),
        (both(run(PASS, provenance=SIM), run(FAIL)), "has no test that passed on hardware"),
    ],
)
def test_a_baseline_that_can_never_lead_to_a_verdict_is_known_before_the_first_boot(base: Results, told: str) -> None:
    assert why_useless(base) == told
    if told:
        assert judge(base, both(STEADY, run(PASS))).verdict is INCONCLUSIVE


def test_the_tables_have_every_change() -> None:
    assert set(CHANGE_WEIGHTS) == set(Change)
    assert [change for change, weight in CHANGE_WEIGHTS.items() if weight is Weight.REGRESSES] == [Change.REGRESSION]


def test_every_kind_of_finding_is_weighed_and_all_but_two_prove_a_regression() -> None:
    assert set(FINDING_WEIGHTS) == set(KINDS)
    others = {kind: weight for kind, weight in FINDING_WEIGHTS.items() if weight is not Weight.REGRESSES}
    assert others == {"machine-check": Weight.UNCLEAR, "seamcall": Weight.NOTE}


def test_the_exit_codes_are_those_of_git_bisect_run() -> None:
    assert {verdict.name: verdict.value for verdict in Verdict} == {"GOOD": 0, "REGRESSED": 1, "INCONCLUSIVE": 125}


def test_a_regression_is_told_with_what_the_test_said() -> None:
    failed = Results((result(status=FAIL, message="KVM_TDX_INIT_VM: EIO"),))
    judgement = judge(run(PASS), failed)
    assert judgement.line == f"REGRESSED: 1 test fails that passed: {NAME} (KVM_TDX_INIT_VM: EIO)"
    assert judgement.reasons[0] == f"regression: {NAME} [spr-01]: KVM_TDX_INIT_VM: EIO"


def test_the_line_names_some_and_the_reasons_have_all() -> None:
    tests = [f"test_{number}" for number in range(9)]
    base, new = (both(*(run(status, test=test) for test in tests)) for status in (PASS, FAIL))
    judgement = judge(base, new)
    assert judgement.line.startswith("REGRESSED: 9 tests fail that passed: ")
    assert judgement.line.endswith("; and 6 more")
    assert all(any(f"::{test} " in reason for reason in judgement.reasons) for test in tests)


def test_what_a_test_said_is_the_same_whatever_the_order_of_its_tries() -> None:
    tries = [result(status=FAIL, message=message) for message in ("EIO", "EBUSY", "ENOMEM", "EINVAL")]
    lines = {judge(run(PASS), Results(tuple(order))).line for order in (tries, tries[::-1])}
    assert lines == {f"REGRESSED: 1 test fails that passed: {NAME} (EBUSY)"}


def test_a_flake_is_named_and_no_regression() -> None:
    judgement = judge(both(STEADY, run(PASS)), both(STEADY, run(FAIL, PASS)))
    assert judgement.flaky == (NAME,)
    assert judgement.line == "GOOD: 1 test passes as before, 1 flaky"


# ---- what cannot be compared ----

CANNOT = {
    "baseline_is_empty": (Results(()), run(PASS), "the baseline has no result from hardware"),
    "run_is_empty": (run(PASS), Results(()), "the run of the new kernel has no result from hardware"),
    "baseline_is_simulated": (run(PASS, provenance=SIM), run(PASS), "the baseline has no result from hardware"),
    "run_is_simulated": (run(PASS), run(FAIL, provenance=SIM), "the run of the new kernel has no result"),
    "tests_have_other_names": (run(PASS), run(PASS, test="test_y"), "have no test in common"),
    "dialect_is_another": (run(PASS), run(FAIL, provenance=SPR | {"dialect": "v17"}), "dialect mainline → v17"),
    "baseline_only_skipped": (run(SKIP), run(PASS), "no test that passed in the baseline has passed or failed now"),
    "baseline_only_failed": (run(FAIL), run(FAIL), "no test that passed in the baseline has passed or failed now"),
    "run_only_skipped": (run(PASS), run(SKIP), "no test that passed in the baseline has passed or failed now"),
}


@pytest.mark.parametrize("case", CANNOT)
def test_nothing_is_concluded_if_the(case: str) -> None:
    base, new, why = CANNOT[case]
    judgement = judge(base, new)
    assert judgement.verdict is INCONCLUSIVE
    assert why in judgement.line


def test_what_else_changed_is_told() -> None:
    judgement = judge(run(PASS), run(FAIL, provenance=SPR | {"microcode": "0x2b000700", "kernel": "6.20.0"}))
    assert "also changed: microcode 0x2b000639 → 0x2b000700" in judgement.reasons
    assert not any("kernel" in reason for reason in judgement.reasons), "the kernel is what is on trial"


# ---- infrastructure ----


def test_infrastructure_casts_doubt_on_what_looks_good() -> None:
    judgement = judge(run(PASS), run(PASS), problems=["spr-01: the run took longer than 900 s"])
    assert judgement.verdict is INCONCLUSIVE
    assert judgement.line == "INCONCLUSIVE: infrastructure: spr-01: the run took longer than 900 s"


def test_infrastructure_does_not_hide_a_regression() -> None:
    judgement = judge(both(STEADY, run(PASS)), run(FAIL), problems=["spr-01: the connection is lost"])
    assert judgement.verdict is REGRESSED
    assert "infrastructure: spr-01: the connection is lost" in judgement.reasons
    assert judgement.reasons[0].startswith("regression: ")


def test_a_kernel_that_does_not_boot_has_regressed_without_a_result() -> None:
    judgement = judge(run(PASS), Results(()), boot_failure="panics at boot: Kernel panic - not syncing: VFS")
    assert judgement.verdict is REGRESSED
    expected = "REGRESSED: the kernel does not boot: panics at boot: Kernel panic - not syncing: VFS"
    assert judgement.line == expected
    assert judgement.reasons == ("boot: panics at boot: Kernel panic - not syncing: VFS",)


# ---- console ----


@pytest.mark.parametrize("kind", [kind for kind, weight in FINDING_WEIGHTS.items() if weight is Weight.REGRESSES])
def test_a_new_finding_is_a_regression_though_every_test_passes(kind: str) -> None:
    found = finding(kind, "something at kvm_tdx_init", test=NAME)
    judgement = judge(run(PASS), run(PASS), findings=[found])
    assert judgement.verdict is REGRESSED
    assert judgement.reasons[0] == f"console: {kind}: something at kvm_tdx_init (during {NAME})"


def test_a_finding_that_the_baseline_has_is_not_new_though_its_addresses_are() -> None:
    before = finding("warning", "WARNING: CPU: 3 PID: 1041 at arch/x86/kvm/vmx/tdx.c:512 tdx_x+0x1c/0x40")
    now = replace(before, text=before.text.replace("CPU: 3 PID: 1041", "CPU: 11 PID: 2"), at=9.0)
    elsewhere = replace(before, text=before.text.replace("tdx_x", "tdx_y"))
    assert judge(run(PASS), run(PASS), findings=[now], base_findings=[before]).verdict is GOOD
    assert judge(run(PASS), run(PASS), findings=[elsewhere], base_findings=[before]).verdict is REGRESSED


def test_a_failed_seamcall_explains_a_regression_and_is_none() -> None:
    found = finding("seamcall", "SEAMCALL 8 failed: 0x8000020000000000", "OPERAND_BUSY(RAX)", NAME)
    assert judge(run(PASS), run(PASS), findings=[found]).verdict is GOOD

    judgement = judge(run(PASS), run(FAIL), findings=[found])
    assert "console: seamcall: SEAMCALL 8 failed: 0x8000020000000000 (OPERAND_BUSY(RAX))" in judgement.reasons[0]


def test_two_seamcalls_that_failed_differently_are_two_findings() -> None:
    told = [finding("seamcall", f"SEAMCALL {leaf} failed: {leaf:#x}") for leaf in (8, 9, 9)]
    judgement = judge(run(PASS), run(PASS), findings=told)
    assert len([reason for reason in judgement.reasons if reason.startswith("console: ")]) == 2


def test_a_finding_of_a_kind_that_nobody_weighed_is_not_called_good() -> None:
    assert judge(run(PASS), run(PASS), findings=[finding("tainted", "x")]).verdict is INCONCLUSIVE


# ---- rules over random results ----

ONE = st.builds(
    result,
    suite=st.sampled_from(["lifecycle", "mmu"]),
    test=st.sampled_from(["test_a", "test_b", "test_c[1]"]),
    host=st.sampled_from(["spr-01", "gnr-01"]),
    status=st.sampled_from(Status),
    provenance=st.sampled_from([SPR, GNR, SIM, SPR | {"dialect": "v17"}]),
    message=st.sampled_from(["", "EIO", "EINVAL"]),
)
RUNS = st.lists(ONE, max_size=12).map(lambda results: Results(tuple(results)))
PROBLEMS = st.lists(st.sampled_from(["the lease was lost", "no power"]), max_size=2)
FINDINGS = st.lists(
    st.builds(finding, st.sampled_from([*FINDING_WEIGHTS, "?"]), st.sampled_from(["x", "y"])), max_size=2
)
RANK = {GOOD: 0, INCONCLUSIVE: 1, REGRESSED: 2}


def verdict_of(base: Results, new: Results, problems: Sequence[str] = (), findings: Sequence[Finding] = ()) -> Verdict:
    return judge(base, new, problems=problems, findings=findings).verdict


@given(RUNS, RUNS, PROBLEMS, FINDINGS)
def test_infrastructure_never_makes_or_hides_a_regression(
    base: Results, new: Results, problems: list[str], findings: list[Finding]
) -> None:
    without, with_them = verdict_of(base, new, (), findings), verdict_of(base, new, problems, findings)
    assert (without is REGRESSED) == (with_them is REGRESSED)
    assert not problems or with_them is not GOOD


@given(RUNS, RUNS, st.data())
def test_what_was_lost_with_the_host_never_makes_a_regression(base: Results, new: Results, data: st.DataObject) -> None:
    lost = tuple(replace(one, status=MISS) if data.draw(st.booleans()) else one for one in new.results)
    if verdict_of(base, new) is not REGRESSED:
        # Losing a pass may leave a test with failures alone; that is a different run, so keep the passes.
        kept = tuple(b if b.status is PASS else a for a, b in zip(lost, new.results, strict=True))
        assert verdict_of(base, Results(kept)) is not REGRESSED
    added = Results((*new.results, *(replace(one, status=MISS) for one in new.results)))
    assert (verdict_of(base, added) is REGRESSED) == (verdict_of(base, new) is REGRESSED)


@given(RUNS, RUNS, FINDINGS, st.randoms(use_true_random=False))
def test_the_order_of_results_says_nothing(
    base: Results, new: Results, findings: list[Finding], shuffler: random.Random
) -> None:
    judgements = []
    for _ in range(2):
        judgements.append(judge(base, new, findings=findings))
        sides: list[list[Result]] = [list(base.results), list(new.results)]
        for side in sides:
            shuffler.shuffle(side)
        base, new = (Results(tuple(side)) for side in sides)
        shuffler.shuffle(findings)
    one, other = judgements
    assert (one.verdict, one.line, one.reasons, one.flaky) == (other.verdict, other.line, other.reasons, other.flaky)


@given(RUNS)
def test_a_run_is_as_good_as_itself(base: Results) -> None:
    assume(any(one.status is PASS and not one.is_simulated for one in base.results))
    assert verdict_of(base, base) is GOOD


@given(RUNS, RUNS, FINDINGS)
def test_a_new_finding_never_makes_a_build_better(base: Results, new: Results, findings: list[Finding]) -> None:
    assert RANK[verdict_of(base, new, (), findings)] >= RANK[verdict_of(base, new)]


@given(RUNS, RUNS)
def test_a_retry_that_passes_clears_every_test(base: Results, new: Results) -> None:
    again = Results((*new.results, *(replace(one, status=PASS) for one in new.results if one.status.is_bad)))
    assert verdict_of(base, again) is not REGRESSED


@given(RUNS, RUNS)
def test_results_of_the_simulator_change_nothing(base: Results, new: Results) -> None:
    real_base, real_new = (Results(tuple(r for r in side.results if not r.is_simulated)) for side in (base, new))
    assert verdict_of(base, new) is verdict_of(real_base, real_new)


@given(RUNS, RUNS, PROBLEMS, FINDINGS)
def test_a_verdict_other_than_good_has_its_reason_first(
    base: Results, new: Results, problems: list[str], findings: list[Finding]
) -> None:
    judgement = judge(base, new, problems=problems, findings=findings)
    assert len(set(judgement.reasons)) == len(judgement.reasons)
    if judgement.verdict is REGRESSED:
        assert judgement.reasons[0].startswith(("regression: ", "console: "))
    if judgement.verdict is INCONCLUSIVE:
        assert judgement.reasons
