"""Trends over kernels: their order, what is counted and compared, and that the page holds whatever they are called."""

import re
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tdxhw.report import html
from tdxhw.report.kernel_order import kernel_order
from tdxhw.report.trends import HEIGHT, WIDTH, KernelPoint, Trends, trends
from tests.unit.report.samples import NASTY, every_kind

IN_ORDER = [
    "not a release", "5.10.0", "6.6.0-rc1-tdx-v17", "6.9.0", "6.10.0-rc2", "6.10.0-rc10", "6.10.0-rc10-00012-g0badf00d",
    "6.10.0", "6.10.0-3-amd64", "6.10.0-12-amd64", "6.10.1", "simulated 7.3.4", "7.3.4+bpo13-cloud-amd64", "7.4.0~rc7",
    "7.4.0",
]  # fmt: skip


def passed(seconds: float = 1.0, times: int = 1) -> KernelPoint:
    return KernelPoint(times, 0, seconds)


FAILED = KernelPoint(0, 1, None)
MIXED = KernelPoint(1, 1, 1.0)


@given(st.permutations(IN_ORDER))
def test_kernels_are_in_the_order_in_which_they_came(releases: list[str]) -> None:
    assert sorted(releases, key=kernel_order) == IN_ORDER


@given(st.lists(st.text(max_size=12) | st.from_regex(r"[0-9]{1,2}\.[0-9]{1,2}(-rc[0-9])?.{0,4}", fullmatch=True)))
def test_whatever_a_kernel_calls_itself_has_its_place(releases: list[str]) -> None:
    ordered = sorted(releases, key=kernel_order)
    releases.reverse()
    assert sorted(releases, key=kernel_order) == ordered


def test_the_numbers_are_those_of_the_history() -> None:
    found = trends("hardware", ["spr-01"], {
        "6.18.0": {"a::x": passed(2.0), "a::y": FAILED, "a::z": passed(4.0)},
        "6.17.0": {"a::x": passed(1.0, times=3), "a::y": passed(8.0)},
    })  # fmt: skip
    assert [(line.kernel, line.passed, line.failed, line.rate) for line in found.lines] == [
        ("6.17.0", 4, 0, "100 %"),
        ("6.18.0", 2, 1, "66.7 %"),
    ]
    # Only a::x passed under both: other times cannot be compared.
    assert found.compared == 1
    assert [line.duration for line in found.lines] == ["1.00 s", "2.00 s"]
    assert [chart.name for chart in found.charts] == ["pass rate", "duration"]
    rate = found.charts[0]
    assert [dot.told for dot in rate.dots] == [
        "6.17.0: 4 of 4 passed (100 %)", "6.18.0: 2 of 3 passed (66.7 %)"
    ]  # fmt: skip
    assert [dot.bad for dot in rate.dots] == [False, True]
    assert rate.dots[0].y < rate.dots[1].y, "better is higher"
    assert [label.text for label in rate.values] == ["60 %", "70 %", "80 %", "90 %", "100 %"]


def test_almost_all_is_not_all() -> None:
    points = {kernel: {"a::x": KernelPoint(99_999, 1, 0.1)} for kernel in ("6.1.0", "6.2.0")}
    assert [line.rate for line in trends("hardware", ["h"], points).lines] == ["99.9 %", "99.9 %"]


@pytest.mark.parametrize("kernels", [(), ("6.18.0",)])
def test_one_kernel_is_no_trend(kernels: tuple[str, ...]) -> None:
    found = trends("hardware", ["h"], {kernel: {"a::x": passed()} for kernel in kernels})
    assert found.charts == ()
    assert len(found.lines) == len(kernels)
    page = html.render(every_kind(), trends=[found])
    assert "trends need two" in page
    assert "<svg viewBox" not in page


def test_without_a_test_that_passed_everywhere_no_durations_are_compared() -> None:
    found = trends("hardware", ["h"], {"6.1.0": {"a::x": passed()}, "6.2.0": {"a::x": FAILED}})
    assert [chart.name for chart in found.charts] == ["pass rate"]
    assert [line.duration for line in found.lines] == ["-", "-"]


def test_tests_that_changed_are_listed_and_what_fails_now_is_first() -> None:
    kernels = ("6.1.0", "6.2.0", "6.3.0")
    tests = {
        "a::steady": (passed(), passed(1.4), passed()),
        "a::failed_once": (passed(), FAILED, passed()),
        "a::fails_now": (passed(), passed(), FAILED),
        "a::slower": (passed(0.2), passed(0.2), passed(1.0)),
        "a::twice_as_long_and_still_nothing": (passed(0.01), passed(0.02), passed(0.04)),
        "a::flaky": (MIXED, passed(), passed()),
        "a::new": (None, None, passed()),
    }
    points = {
        kernel: {name: point for name, of_kernels in tests.items() if (point := of_kernels[index]) is not None}
        for index, kernel in enumerate(kernels)
    }
    rows = trends("hardware", ["h"], points).rows
    assert [row.name for row in rows] == ["a::fails_now", "a::failed_once", "a::flaky", "a::slower"]
    assert [cell.state for cell in rows[2].cells] == ["mixed", "pass", "pass"]
    assert rows[2].cells[0].told == "6.1.0: failed 1 of 2 (1.00 s)"
    assert rows[3].duration == "0.20 → 1.00 s, 5.0 times as long"


def test_a_test_that_did_not_run_is_no_failure() -> None:
    found = trends("hardware", ["h"], {"6.1.0": {"a::x": FAILED}, "6.2.0": {"a::y": passed()}})
    (row,) = found.rows
    assert [cell.told for cell in row.cells] == ["6.1.0: failed", "6.2.0: did not run"]


def test_where_no_test_passed_under_every_kernel_the_page_says_why_there_are_no_durations() -> None:
    gaps = trends("hardware", ["h"], {"6.1.0": {"a::x": passed()}, "6.2.0": {"a::y": passed()}})
    assert [chart.name for chart in gaps.charts] == ["pass rate"]
    assert "there are no durations to compare" in html.render(every_kind(), trends=[gaps])
    shared = trends("hardware", ["h"], {"6.1.0": {"a::x": passed()}, "6.2.0": {"a::x": passed()}})
    assert "there are no durations to compare" not in html.render(every_kind(), trends=[shared])


def test_kernels_of_the_page_that_the_history_does_not_have_are_named() -> None:
    found = trends("hardware", ["h"], {"6.1.0": {"a::x": passed()}}, ["6.1.0", "6.10.0", "6.9.0"])
    assert found.missing == ("6.9.0", "6.10.0")
    assert "The history has nothing of 6.9.0" in html.render(every_kind(), trends=[found])


POINTS = st.dictionaries(
    st.text(max_size=20) | st.sampled_from(IN_ORDER) | st.sampled_from([NASTY, "9" * 5000, "6.1-rc" + "9" * 5000]),
    st.dictionaries(
        st.sampled_from(["a::x", "a::y", NASTY]),
        st.builds(
            KernelPoint, st.integers(0, 10**6), st.integers(0, 10**6), st.none() | st.floats(0, 1e5)
        ).filter(lambda point: point.passed + point.failed > 0),
    ),
    max_size=40,
)  # fmt: skip


class Page(HTMLParser):
    """Collects the elements of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))


@given(POINTS)
def test_every_picture_stays_within_its_frame_and_has_its_words(points: dict[str, dict[str, KernelPoint]]) -> None:
    found = trends("hardware", ["h"], points)
    for chart in found.charts:
        assert len(chart.dots) == len(points)
        assert all(0 <= dot.x <= WIDTH and 0 <= dot.y <= HEIGHT for dot in chart.dots)
        assert [dot.x for dot in chart.dots] == sorted(dot.x for dot in chart.dots)
        assert len(chart.kernels) <= 10
        assert len({label.text for label in chart.values}) == 5
    page = Page(html.render(every_kind(), trends=[found]))
    assert [tag for tag, _ in page.seen].count("script") == 1
    pictures = [attributes for tag, attributes in page.seen if tag == "svg"]
    assert len(pictures) == len(found.charts) + len(found.rows)
    assert all(attributes["role"] == "img" and attributes["aria-label"] for attributes in pictures)


@pytest.mark.parametrize("duration_s", [5e-324, 1e-9, 0.001])
def test_durations_that_nobody_can_measure_still_have_a_scale(duration_s: float) -> None:
    point = KernelPoint(passed=1, failed=0, duration_s=duration_s)
    (_, chart) = trends("hardware", ["h"], {"6.1.0": {"a::x": point}, "6.2.0": {"a::x": point}}).charts
    assert [label.text for label in chart.values] == ["0 s", "0.00025 s", "0.0005 s", "0.00075 s", "0.001 s"]


def test_a_page_without_a_history_has_no_trends() -> None:
    page = html.render(every_kind())
    assert "<svg" not in page
    assert "Over kernels" not in page


def test_the_pages_own_table_is_what_the_filters_filter() -> None:
    found: Trends = trends("hardware", ["h"], {"6.1.0": {"a::x": FAILED}, "6.2.0": {"a::x": passed()}})
    page = html.render(every_kind(), trends=[found])
    assert re.search(r'querySelectorAll\("#results tbody tr"\)', page)
    assert page.count('<table id="results">') == 1
