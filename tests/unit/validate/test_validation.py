"""`tdxhw validate` from one end to the other on a simulated host, with everything that can go wrong."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tdxhw.lab.host_run import Rescue
from tdxhw.report.results import Results, Status
from tdxhw.validate.machine import FOLDER
from tdxhw.validate.outcome import Outcome
from tdxhw.validate.recovery import recover
from tdxhw.validate.states import State
from tdxhw.validate.validation import Validation
from tdxhw.validate.verdict import Verdict
from tests.unit.validate.simulated_debian import MEMORY, OWN
from tests.unit.validate.simulated_lab import NEW, Fault, Kernel, SimulatedLab, plan_for

MOST_OPERATIONS = 45
"""More than a validation has: see the test that counts them."""


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=MEMORY) as name:
        yield Path(name)


def validate(lab: SimulatedLab, folder: Path, **changes: object) -> tuple[Outcome, list[str]]:
    said: list[str] = []
    return Validation(plan_for(folder, **changes), lab, said.append).run(), said


def assert_as_it_was(lab: SimulatedLab, before: dict[str, str], said: object = "") -> None:
    after = lab.debian.snapshot()
    after.pop("boot/grub/grub.cfg.new", None)  # GRUB's own, of a run that was cut off; the next one replaces it
    assert after == before, said
    assert lab.debian.environment() == {}
    assert lab.debian.packages().keys() == {"linux-image-own"}
    assert not lab.debian.file(FOLDER[1:]).exists(), "the journal is gone"
    assert (lab.release, lab.is_up) == (OWN, True)
    assert not lab.is_held


def test_a_good_kernel_is_good_and_leaves_nothing_behind(folder: Path) -> None:
    lab = SimulatedLab(folder / "host")
    before = lab.debian.snapshot()
    outcome, said = validate(lab, folder)
    assert outcome.line == f"GOOD linux {NEW} on vm: 1 passed, 0 regressions, 0 flaky"
    assert (outcome.exit_code, outcome.state, outcome.differences) == (0, State.RESTORED, [])
    assert lab.boots == 2, "there and back"
    assert any("build id cafecafecafe" in line for line in said)
    assert_as_it_was(lab, before)
    assert lab.operations < MOST_OPERATIONS


def test_the_candidate_is_never_the_default_not_even_while_it_is_installed(folder: Path) -> None:
    lab = SimulatedLab(folder / "host")
    booted: list[str] = []
    original = lab.run_suites

    def run_suites(*arguments: object) -> list[str]:
        lab.boot()  # whatever reboots the host now finds its own kernel
        booted.append(lab.release)
        lab.boot()
        booted.append(lab.release)
        return original(*arguments)  # type: ignore[arg-type]

    lab.run_suites = run_suites  # type: ignore[assignment,method-assign]
    validate(lab, folder)
    assert booted == [OWN, OWN]


def test_a_package_may_be_called_whatever_it_is_here(folder: Path) -> None:
    lab = SimulatedLab(folder / "host")
    plan = plan_for(folder)
    named = folder / "a kernel (1).package"
    (package,) = plan.candidate.packages
    package.path.rename(named)
    renamed = replace(plan.candidate, packages=(replace(package, path=named),))
    outcome = Validation(replace(plan, candidate=renamed), lab, print).run()
    assert outcome.verdict is Verdict.GOOD, outcome.problems


@pytest.mark.parametrize(("after", "verdict"), [(3, Verdict.INCONCLUSIVE), (1, Verdict.GOOD), (0, Verdict.GOOD)])
def test_hkids_that_the_suites_leave_in_use_are_told_loudly(folder: Path, after: int, verdict: Verdict) -> None:
    lab = SimulatedLab(folder / "host")
    lab.hkids_used = 1
    original = lab.run_suites

    def run_suites(*arguments: object) -> list[str]:
        lab.hkids_used = after
        return original(*arguments)  # type: ignore[arg-type]

    lab.run_suites = run_suites  # type: ignore[assignment,method-assign]
    outcome, _ = validate(lab, folder)
    assert outcome.verdict is verdict
    told = f"INCONCLUSIVE linux {NEW} on vm: left behind by the suites: HKIDs in use: 1 before, 3 after: leaked"
    assert (outcome.line == told) is (verdict is Verdict.INCONCLUSIVE)


def test_a_regression_is_told_by_name(folder: Path) -> None:
    lab = SimulatedLab(folder / "host")
    lab.tests = {"a": [Status.FAIL]}
    before = lab.debian.snapshot()
    outcome, _ = validate(lab, folder)
    assert outcome.exit_code == 1
    assert outcome.line == f"REGRESSED linux {NEW} on vm: 1 test fails that passed: suite::a"
    assert_as_it_was(lab, before)


@pytest.mark.parametrize(
    ("fails", "message", "verdict"),
    [
        (1, "", Verdict.INCONCLUSIVE),
        (2, "", Verdict.INCONCLUSIVE),
        (3, "", Verdict.REGRESSED),
        (1, "the host rebooted during this test", Verdict.REGRESSED),
    ],
)
def test_a_failure_whose_tries_were_cut_short_is_no_regression_unless_it_took_the_host_down(
    folder: Path, fails: int, message: str, verdict: Verdict
) -> None:
    lab = SimulatedLab(folder / "host")
    lab.tests = {"a": [Status.FAIL] * fails}
    original = lab.run_suites

    def run_suites(base: Results, name: str, collected: list[Results], *rest: object) -> list[str]:
        original(base, name, collected, *rest)  # type: ignore[arg-type]
        collected[-1] = Results(tuple(replace(one, message=message) for one in collected[-1].results))
        return ["vm: its network was down for an hour"]

    lab.run_suites = run_suites  # type: ignore[assignment,method-assign]
    outcome, _ = validate(lab, folder, retries=2)
    assert outcome.verdict is verdict, outcome.line
    told = any("not tried again" in reason for reason in outcome.judgements[0][1].reasons)
    assert told is (verdict is Verdict.INCONCLUSIVE)


@pytest.mark.parametrize("lag_s", [0.0, 9.0, 60.0])
def test_what_a_slow_console_says_at_the_very_end_of_the_suites_is_still_heard(folder: Path, lag_s: float) -> None:
    lab = SimulatedLab(folder / "host")
    lab.has_console = True
    original = lab.run_suites

    def run_suites(*arguments: object) -> list[str]:
        lab.console_lag_s = lag_s
        lab.say("[  899.000000] WARNING: CPU: 1 PID: 7 at x.c:1 f+0x1/0x2", "[  899.000001] ---[ end trace 0 ]---")
        return original(*arguments)  # type: ignore[arg-type]

    lab.run_suites = run_suites  # type: ignore[assignment,method-assign]
    before = lab.clock.now()
    outcome, _ = validate(lab, folder)
    assert lab.clock.now() - before < 200, "nobody waits for ever"
    heard = lag_s < 15
    assert outcome.verdict is (Verdict.REGRESSED if heard else Verdict.GOOD)
    assert [finding.kind for tried in outcome.tried for finding in tried.findings] == ["warning"] * heard


def test_a_flake_is_told_and_is_no_regression(folder: Path) -> None:
    lab = SimulatedLab(folder / "host")
    lab.tests = {"a": [Status.FAIL, Status.PASS]}
    outcome, _ = validate(lab, folder)
    assert outcome.line == f"GOOD linux {NEW} on vm: 1 passed, 0 regressions, 1 flaky (suite::a)"


@pytest.mark.parametrize(
    ("kernel", "told", "presses"),
    [
        (Kernel.PANICS, "dies without a word (the host came back by itself)", []),
        (Kernel.HANGS, "dies without a word (the host came back after power control (reset))", ["reset", "reset"]),
        (Kernel.NO_NETWORK, "boots, but cannot be reached: it has no network interface", []),
    ],
)  # fmt: skip
def test_a_kernel_that_does_not_boot_is_a_regression_and_the_host_is_back(
    folder: Path, kernel: Kernel, told: str, presses: list[str]
) -> None:
    lab = SimulatedLab(folder / "host", kernel=kernel)
    before = lab.debian.snapshot()
    outcome, said = validate(lab, folder)
    assert outcome.verdict is Verdict.REGRESSED
    assert told in outcome.line, said
    assert lab.presses == presses
    assert_as_it_was(lab, before)


@pytest.mark.parametrize(
    ("kernel", "told"),
    [
        (Kernel.PANICS, f"{NEW} panics at boot: Kernel panic - not syncing: Attempted to kill init!"),
        (Kernel.BROKEN, f"GRUB cannot load {NEW}: invalid magic number."),
    ],
)
def test_what_its_console_says_proves_the_failure_at_once(folder: Path, kernel: Kernel, told: str) -> None:
    lab = SimulatedLab(folder / "host", kernel=kernel)
    lab.has_console = True
    before = lab.debian.snapshot()
    outcome, said = validate(lab, folder)
    assert outcome.line == f"REGRESSED linux {NEW} on vm: the kernel does not boot: {told}", said
    assert sum("boots 7.2.13-new once" in line for line in said) == 1, "it is not tried again"
    assert_as_it_was(lab, before)


@pytest.mark.parametrize("has_console", [True, False])
def test_a_signature_that_the_firmware_does_not_know_is_not_the_kernel_s_fault(folder: Path, has_console: bool) -> None:
    lab = SimulatedLab(folder / "host", kernel=Kernel.BROKEN)
    lab.has_console, lab.has_secure_boot, lab.grub_says = has_console, True, "bad shim signature"
    before = lab.debian.snapshot()
    plan = plan_for(folder)
    signed = replace(plan, candidate=replace(plan.candidate, is_signed=True))
    outcome = Validation(signed, lab, print).run()
    assert outcome.verdict is Verdict.INCONCLUSIVE
    told = f"Secure Boot refuses {NEW} (bad shim signature.)" if has_console else "its signature may have been refused"
    assert told in outcome.line
    assert_as_it_was(lab, before)


def test_a_kernel_that_hangs_where_there_is_no_power_control_is_no_verdict_and_asks_for_a_person(folder: Path) -> None:
    lab = SimulatedLab(folder / "host", kernel=Kernel.HANGS, has_power=False)
    before = lab.debian.snapshot()
    outcome, _ = validate(lab, folder)
    assert (outcome.verdict, outcome.state) == (Verdict.INCONCLUSIVE, State.STRANDED)
    assert "reset it by hand" in outcome.problems[0]
    assert "--recover" in outcome.problems[0]

    lab.reset()  # by hand
    lab.is_held = False  # it has run out
    lab.clock.sleep(100)
    assert recover("vm", lab, 100, print) == []
    assert_as_it_was(lab, before)


def test_power_control_that_does_not_work_is_found_out_before_anything_is_touched(folder: Path) -> None:
    lab = SimulatedLab(folder / "host")
    before = lab.debian.snapshot()
    lab.switch_is_broken = True
    outcome, _ = validate(lab, folder)
    assert outcome.verdict is Verdict.INCONCLUSIVE
    assert "its BMC does not answer" in outcome.line
    assert lab.boots == 0
    assert_as_it_was(lab, before)


def test_a_host_that_is_on_its_way_is_waited_for_before_a_recovery_resets_it(folder: Path) -> None:
    lab = SimulatedLab(folder / "host")
    lab.boot()  # somebody else's validation: 30 s
    assert recover("vm", lab, 100, print) == []
    assert lab.presses == []

    lab.hang()
    before = lab.clock.now()
    assert recover("vm", lab, 100, print) == []
    assert (lab.presses, lab.clock.now() - before > 100) == (["reset"], True)

    lab.lose_power(comes_back=False)
    before = lab.clock.now()
    assert recover("vm", lab, 100, print) == []
    assert (lab.presses, lab.clock.now() - before < 60) == (["reset", "reset"], True), "there is nothing to wait for"


def test_another_build_of_the_same_release_is_no_verdict_about_this_one(folder: Path) -> None:
    lab = SimulatedLab(folder / "host", kernel=Kernel.OTHER_BUILD)
    before = lab.debian.snapshot()
    outcome, _ = validate(lab, folder)
    assert outcome.verdict is Verdict.INCONCLUSIVE
    assert "no verdict about another kernel" in outcome.line
    assert_as_it_was(lab, before)


def test_each_of_several_parameters_has_its_own_boot(folder: Path) -> None:
    lab = SimulatedLab(folder / "host")
    before = lab.debian.snapshot()
    matrix = [{"kvm_intel.tdx": "Y"}, {"kvm_intel.tdx": "N"}]
    outcome, said = validate(lab, folder, matrix=matrix)
    assert outcome.verdict is Verdict.GOOD, outcome.problems
    assert [one.parameters for one in outcome.tried] == matrix
    assert [line for line in said if "with kvm_intel.tdx=N" in line]
    assert lab.boots == 3
    assert_as_it_was(lab, before)


@pytest.mark.parametrize(
    ("parameter", "value", "told"),
    [
        ("kvm_intel.tdx", "Y", "kvm_intel.tdx is N, although Y was asked for"),
        ("kvm_intel.tdx", "off", ""),
        ("kvm_intel.nonsense", "1", "kvm_intel.nonsense=1 was asked for: kvm_intel shows no such parameter"),
        ("nonsense.tdx", "1", "nonsense.tdx=1 was asked for: nonsense is not loaded"),
    ],
)
def test_a_parameter_that_has_not_taken_effect_is_no_good_verdict(
    folder: Path, parameter: str, value: str, told: str
) -> None:
    lab = SimulatedLab(folder / "host")
    lab.stuck = {"kvm_intel.tdx": "N\n"}
    outcome, _ = validate(lab, folder, matrix=[{parameter: value}])
    head = f"INCONCLUSIVE linux {NEW} on vm with {parameter}={value}: not with the parameters that were asked for: "
    assert outcome.line == (head + told if told else f"GOOD linux {NEW} on vm: 1 passed, 0 regressions, 0 flaky")


def test_parameters_take_effect_where_the_host_s_own_command_line_ends_with_words_for_init(folder: Path) -> None:
    lab = SimulatedLab(folder / "host")
    lab.debian.arguments = "root=/dev/sda1 ro -- single"
    lab.debian.update_grub()
    before = lab.debian.snapshot()
    outcome, said = validate(lab, folder, matrix=[{"kvm_intel.tdx": "N"}], command_line="quiet")
    assert outcome.verdict is Verdict.GOOD, said
    assert_as_it_was(lab, before)


def test_results_of_another_kernel_do_not_count(folder: Path) -> None:
    lab = SimulatedLab(folder / "host")
    original = lab.run_suites

    def run_suites(*arguments: object) -> list[str]:
        lab.release = OWN
        problems = original(*arguments)  # type: ignore[arg-type]
        lab.release = NEW
        return problems

    lab.run_suites = run_suites  # type: ignore[assignment,method-assign]
    outcome, _ = validate(lab, folder)
    assert outcome.verdict is Verdict.INCONCLUSIVE
    assert f"1 results are of {OWN}, not of {NEW}" in outcome.line


def test_results_of_suites_that_note_no_kernel_are_those_of_the_verified_one(folder: Path) -> None:
    lab = SimulatedLab(folder / "host")
    original = lab.run_suites

    def run_suites(base: Results, name: str, collected: list[Results], *rest: object) -> list[str]:
        problems = original(base, name, collected, *rest)  # type: ignore[arg-type]
        bare = tuple(replace(one, provenance={"host": "vm"}) for one in collected[-1].results)
        collected[-1] = Results(bare)
        return problems

    lab.run_suites = run_suites  # type: ignore[assignment,method-assign]
    outcome, _ = validate(lab, folder)
    assert [dict(one.provenance) for one in outcome.results.results] == [{"kernel": NEW, "host": "vm"}]


def test_a_host_whose_power_went_under_a_test_is_switched_on_at_once_one_that_hangs_is_reset_after_the_limit(
    folder: Path,
) -> None:
    lab = SimulatedLab(folder / "host")
    original = lab.run_suites
    done: list[Rescue] = []

    def run_suites(
        base: Results,
        name: str,
        collected: list[Results],
        up_again: Callable[[], None],
        rescue: Callable[[float], Rescue],
    ) -> list[str]:
        losses: list[Callable[[], None]] = [partial(lab.lose_power, comes_back=False), lab.hang]
        for lose in losses:
            lose()
            done.extend(rescue(waited_s) for waited_s in (5.0, 31.0))
            if not lab.is_on or done[-1] is Rescue.NOTHING:
                done.append(rescue(plan_for(folder).boot_limit_s))
            lab.clock.sleep(60)
            up_again()
        return original(base, name, collected, up_again, rescue)

    lab.run_suites = run_suites  # type: ignore[method-assign]
    outcome, _ = validate(lab, folder)
    assert done == [Rescue.NOTHING, Rescue.SWITCHED_ON, Rescue.NOTHING, Rescue.NOTHING, Rescue.RESET]
    assert lab.presses == ["on", "reset"]
    assert (outcome.verdict, outcome.state) == (Verdict.GOOD, State.RESTORED)


def test_a_package_for_which_nothing_makes_an_initial_ram_disk_is_no_verdict_about_its_kernel(folder: Path) -> None:
    """It would panic for want of its root, and be called a regression."""
    lab = SimulatedLab(folder / "host")
    lab.debian.has_initramfs_hook = False
    before = lab.debian.snapshot()
    outcome, _ = validate(lab, folder)
    assert outcome.verdict is Verdict.INCONCLUSIVE
    assert f"nothing made an initial RAM disk for {NEW}" in outcome.line
    assert lab.boots == 0
    assert_as_it_was(lab, before)


def test_a_kernel_that_reads_no_initial_ram_disk_is_booted_without(folder: Path) -> None:
    lab = SimulatedLab(folder / "host")
    plan = plan_for(folder)
    plan = replace(plan, candidate=replace(plan.candidate, reads_initrd=False))
    lab.debian.arguments = "root=UUID=12 ro"
    lab.debian.update_grub()
    booted: list[str] = []
    original = lab.run_suites

    def run_suites(*arguments: object) -> list[str]:
        booted.append(lab.cmdline)
        assert f"initrd.img-{NEW}" not in lab.debian.file("boot/grub/custom.cfg").read_text()
        return original(*arguments)  # type: ignore[arg-type]

    lab.run_suites = run_suites  # type: ignore[assignment,method-assign]
    outcome = Validation(plan, lab, print).run()
    assert outcome.verdict is Verdict.GOOD, outcome.problems
    assert "root=PARTUUID=12-01" in booted[0], "without one it cannot look for a UUID"


def test_a_program_that_fails_is_told_and_everything_before_it_is_undone(folder: Path) -> None:
    lab = SimulatedLab(folder / "host")
    before = lab.debian.snapshot()
    lab.debian.broken = {"update-initramfs"}
    outcome, _ = validate(lab, folder)
    assert outcome.verdict is Verdict.INCONCLUSIVE
    assert "update-initramfs" in outcome.line
    assert_as_it_was(lab, before)


def test_what_cannot_be_undone_is_told_and_no_good_verdict_is_given(folder: Path) -> None:
    lab = SimulatedLab(folder / "host")
    original = lab.run_suites

    def run_suites(*arguments: object) -> list[str]:
        lab.debian.broken = {"dpkg"}
        return original(*arguments)  # type: ignore[arg-type]

    lab.run_suites = run_suites  # type: ignore[assignment,method-assign]
    outcome, _ = validate(lab, folder)
    assert (outcome.verdict, outcome.state) == (Verdict.INCONCLUSIVE, State.DAMAGED)
    assert any(problem.startswith("rolling back: packages") for problem in outcome.problems)
    assert any("not restored: packages" in problem for problem in outcome.problems)

    lab.debian.broken = set()
    assert recover("vm", lab, 100, print) == []
    assert lab.debian.packages().keys() == {"linux-image-own"}


@given(
    fault=st.sampled_from(Fault),
    at=st.integers(0, MOST_OPERATIONS),
    inside=st.integers(0, 12),
    kernel=st.sampled_from(Kernel),
)
@settings(max_examples=250, deadline=None)
def test_whatever_happens_and_whenever_the_host_ends_as_it_was_and_the_verdict_is_true(
    fault: Fault, at: int, inside: int, kernel: Kernel
) -> None:
    with tempfile.TemporaryDirectory(dir=MEMORY) as name:
        folder = Path(name)
        lab = SimulatedLab(folder / "host", kernel=kernel)
        before = lab.debian.snapshot()
        lab.fault, lab.fault_at, lab.inside = fault, at, inside
        outcome, said = validate(lab, folder)

        if outcome.state is not State.RESTORED and lab.debian.file(FOLDER[1:]).exists():
            # Cut off before it could do more: whoever comes next finds the journal.
            lab.clock.sleep(1000)
            assert recover("vm", lab, 100, said.append) == [], said
        elif not lab.is_up:
            lab.reset()  # nothing was changed yet, so nobody came back to switch it on
            lab.clock.sleep(100)
        assert_as_it_was(lab, before, said)
        if kernel is Kernel.GOOD:
            assert outcome.verdict is not Verdict.REGRESSED, said
        else:
            assert outcome.verdict is not Verdict.GOOD, said
        if fault is Fault.INTERRUPT and at < lab.operations - 1:
            assert outcome.exit_code == 130


@given(at=st.integers(0, MOST_OPERATIONS), kernel=st.sampled_from([Kernel.GOOD, Kernel.PANICS, Kernel.NO_NETWORK]))
@settings(max_examples=60, deadline=None)
def test_a_controller_that_dies_leaves_what_the_next_validation_rolls_back(at: int, kernel: Kernel) -> None:
    class Died(BaseException):
        """SIGKILL."""

    with tempfile.TemporaryDirectory(dir=MEMORY) as name:
        folder = Path(name)
        lab = SimulatedLab(folder / "host", kernel=kernel)
        before = lab.debian.snapshot()
        original = lab.happens

        def happens() -> bool:
            if lab.operations >= at:
                raise Died
            return original()

        lab.happens = happens  # type: ignore[method-assign]
        with suppress(Died):
            validate(lab, folder)
        lab.happens = original  # type: ignore[method-assign]
        lab.is_held = False
        lab.clock.sleep(1000)
        lab.kernel = Kernel.GOOD
        outcome, said = validate(lab, folder)
        assert outcome.verdict is Verdict.GOOD, said
        assert_as_it_was(lab, before, said)


@given(at=st.integers(0, MOST_OPERATIONS), kernel=st.sampled_from(Kernel), has_power=st.booleans())
@settings(max_examples=120, deadline=None)
def test_a_host_that_somebody_else_has_by_now_is_left_alone_and_can_be_recovered_later(
    at: int, kernel: Kernel, has_power: bool
) -> None:
    with tempfile.TemporaryDirectory(dir=MEMORY) as name:
        folder = Path(name)
        lab = SimulatedLab(folder / "host", kernel=kernel, has_power=has_power)
        before = lab.debian.snapshot()
        original = lab.happens

        def happens() -> bool:
            lab.is_lost |= lab.operations == at
            return original()

        lab.happens = happens  # type: ignore[method-assign]

        def pressed(press: Callable[[], None]) -> None:
            assert not lab.is_lost, "its power is the other's to switch"
            press()

        for button in ("on", "off", "reset"):
            setattr(lab, button, partial(pressed, getattr(lab, button)))
        outcome, said = validate(lab, folder)
        if at >= lab.operations:
            return
        assert lab.operations == at + 1, "nothing more was done to it"
        if outcome.state is not State.RESTORED:  # else it was over just then
            assert outcome.verdict is not Verdict.GOOD
            told = sum("vm is taken by bob@ws pid 7" in problem for problem in outcome.problems)
            assert told == 1 or outcome.state is State.STRANDED, "it may not have answered from then on"

        # Whoever has it rolls back, or we do once it is free.
        lab.is_lost, lab.happens = False, original  # type: ignore[method-assign]
        lab.clock.sleep(1000)
        if not lab.is_up:
            lab.reset()
            lab.clock.sleep(100)
        assert recover("vm", lab, 100, said.append) == [], said
        assert_as_it_was(lab, before, said)


def test_what_the_console_says_when_somebody_else_has_the_host_is_not_held_against_the_kernel(folder: Path) -> None:
    lab = SimulatedLab(folder / "host")
    lab.has_console = True
    original = lab.run_suites

    def run_suites(*arguments: object) -> list[str]:
        problems = original(*arguments)  # type: ignore[arg-type]
        lab.is_lost = True
        lab.say("[  899.000000] WARNING: CPU: 1 PID: 7 at x.c:1 f+0x1/0x2", "[  899.000001] ---[ end trace 0 ]---")
        return problems

    lab.run_suites = run_suites  # type: ignore[assignment,method-assign]
    outcome, _ = validate(lab, folder)
    assert outcome.verdict is Verdict.INCONCLUSIVE
    assert [finding for tried in outcome.tried for finding in tried.findings] == []
    assert lab.boots == 1, "it is left as it is"


def test_it_is_asked_whose_the_host_is_right_before_it_is_taken_down_or_changed_back(folder: Path) -> None:
    lab = SimulatedLab(folder / "host")
    asked_before: list[int] = []
    original = lab.boot

    def boot() -> None:
        asked_before.append(lab.asked)
        original()

    lab.boot = boot  # type: ignore[method-assign]
    validate(lab, folder)
    there, back = asked_before
    assert there >= 1
    assert back > there + 1, "once for the connection to the candidate, once more before it is left"
    assert lab.asked > back + 1, "and before its changes are undone"
