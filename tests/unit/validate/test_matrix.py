"""The matrix of module parameters: every combination once, and nothing that a command line could misunderstand."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tdxhw.history import queries
from tdxhw.history.queries import Wanted
from tdxhw.history.store import History, RunRecord
from tdxhw.report.results import Results, Status
from tdxhw.validate.matrix import MAX_BOOTS, MatrixError, differs, is_in_effect, parse, words
from tdxhw.validate.outcome import Outcome, Tried
from tests.unit.report.samples import result


def test_every_combination_is_one_boot_the_last_parameter_varying_fastest() -> None:
    assert parse(["kvm_intel.tdx=Y,N", "kvm_intel.ept=Y,N"]) == [
        {"kvm_intel.tdx": "Y", "kvm_intel.ept": "Y"},
        {"kvm_intel.tdx": "Y", "kvm_intel.ept": "N"},
        {"kvm_intel.tdx": "N", "kvm_intel.ept": "Y"},
        {"kvm_intel.tdx": "N", "kvm_intel.ept": "N"},
    ]


def test_no_matrix_is_one_boot() -> None:
    assert parse([]) == [{}]


def test_the_kernel_takes_a_dash_for_an_underscore() -> None:
    assert parse(["kvm-intel.tdx=Y"]) == [{"kvm_intel.tdx": "Y"}]
    with pytest.raises(MatrixError, match=r"kvm_intel\.tdx is there twice"):
        parse(["kvm-intel.tdx=Y", "kvm_intel.tdx=N"])


@pytest.mark.parametrize(
    "word",
    [
        "", "kvm_intel.tdx", "tdx=Y", "=Y", "kvm_intel.=Y", ".tdx=Y", "init=/bin/sh", "kvm_intel.tdx=",
        "kvm_intel.tdx=Y,", "kvm_intel.tdx=Y,Y", "kvm_intel.tdx=Y N", 'kvm_intel.tdx="Y"', "kvm_intel.tdx=$(reboot)",
        "kvm_intel.tdx=Y;reboot", "kvm_intel.tdx=Y\n", "kvm intel.tdx=Y", "kvm_intel.tdx.x=Y", "kvm_intel.tdx=`x`",
        "kvm_intel.tdx=Ý", "kvm_intel.tdx=Y\\", "kvm_intel.tdx=a=b", "kvm_intel.tdx=Y\0",
    ],
)  # fmt: skip
def test_refuses(word: str) -> None:
    with pytest.raises(MatrixError) as error:
        parse([word])
    assert repr(word) in str(error.value)
    assert "\n" not in str(error.value)


def test_refuses_more_boots_than_anybody_wants_to_wait_for() -> None:
    many = [f"m.p{number}=0,1" for number in range(7)]
    with pytest.raises(MatrixError, match=f"128 boots; at most {MAX_BOOTS}"):
        parse(many)
    assert len(parse(many[:6])) == MAX_BOOTS


@given(st.lists(st.text(max_size=12), max_size=3))
def test_whatever_is_accepted_is_plain_words_on_a_command_line(given_words: list[str]) -> None:
    try:
        boots = parse(given_words)
    except MatrixError:
        return
    for boot in boots:
        assert len(words(boot).split()) == len(boot)
        assert words(boot).isascii()


@given(st.dictionaries(st.sampled_from("abcd"), st.sets(st.sampled_from("0123"), min_size=1), max_size=3))
def test_the_boots_are_the_product_of_the_values_without_one_twice(axes: dict[str, set[str]]) -> None:
    boots = parse(f"m.{name}={','.join(sorted(values))}" for name, values in axes.items())
    size = 1
    for values in axes.values():
        size *= len(values)
    assert len({tuple(boot.items()) for boot in boots}) == len(boots) == size


def test_a_test_that_fails_with_other_parameters_is_not_flaky(tmp_path: Path) -> None:
    boots = parse(["kvm_intel.tdx=Y,N"])
    outcome = Outcome("spr-01", "6.19.0", Results(()))
    for number, (boot, status) in enumerate(zip(boots, (Status.PASS, Status.FAIL), strict=True)):
        outcome.tried.append(Tried(boot, [Results((result(status=status, started=1.7e9 + number),))]))
    with History.open(tmp_path / "history.sqlite") as history:
        assert history.add(RunRecord("validate"), outcome.results).new == 2
        assert queries.failing(history.database, Wanted(), only_flaky=True) == []
        assert [(line.passed, line.failed) for line in queries.failing(history.database, Wanted())] == [(0, 1)]


@pytest.mark.parametrize(
    ("asked", "shown", "other"),
    [
        ("Y", "Y", False), ("1", "Y", False), ("on", "Y", False), ("0", "Y", True), ("off", "Y", True),
        ("n", "N", False),
        ("y", "N", True), ("3", "3", False), ("3", "4", True),
    ],
)  # fmt: skip
def test_a_value_is_another_only_if_the_kernel_would_show_another(asked: str, shown: str, other: bool) -> None:
    assert differs({"kvm_intel.tdx": asked}, {"kvm_intel.tdx": shown}) is other


def test_a_parameter_that_the_own_kernel_does_not_show_is_no_other() -> None:
    assert not differs({"kvm_intel.new": "1"}, {"kvm_intel.tdx": "Y"})


@pytest.mark.parametrize(
    ("value", "shown", "is_so"),
    [
        ("Y", "Y", True), ("1", "Y", True), ("on", "Y", True), ("off", "N", True), ("N", "Y", False), ("1", "N", False),
        ("16", "16", True), ("0x10", "16", True), ("-1", "-1", True), ("1", "0", False), ("bad", "good", False),
        ("auto", "auto", True),
    ],
)  # fmt: skip
def test_a_value_is_in_effect_however_the_kernel_shows_it(value: str, shown: str, is_so: bool) -> None:
    assert is_in_effect(value, shown) is is_so
