"""The HTML page in a real browser: it opens without a network, and its filters filter."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tdxhw.report import html
from tdxhw.report.trends import KernelPoint, trends
from tests.lab.missing import skip_or_fail
from tests.unit.report.samples import every_kind

CLICK = """<script>
for (const status of ["PASS", "SKIP"]) document.querySelector(`button[data-status="${status}"]`).click();
const suite = document.querySelector('select[data-filter="suite"]');
suite.value = "lifecycle"; suite.dispatchEvent(new Event("change"));
document.title = [...document.querySelectorAll("tbody tr:not([hidden])")].map(r => r.dataset.status).join();
</script></body>"""


@pytest.fixture(scope="module")
def browser() -> str:
    found = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
    if found is None:
        skip_or_fail("no browser here: apt-get install chromium")
    return found


def dom_of(browser: str, page: Path, profile: Path, *options: str) -> str:
    command = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND",
        f"--user-data-dir={profile}", "--virtual-time-budget=2000", "--dump-dom", *options, page.as_uri(),
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=True).stdout


def test_filters_hide_what_does_not_match(browser: str, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(html.render(every_kind()).replace("</body>", CLICK), encoding="utf-8")
    dom = dom_of(browser, page, tmp_path / "profile")

    assert "<title>FAIL,FAIL</title>" in dom
    assert re.search(r'<span id="shown"[^>]*>2 of 8 shown</span>', dom)


def test_nothing_that_a_test_printed_becomes_an_element(browser: str, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(html.render(every_kind()), encoding="utf-8")
    dom = dom_of(browser, page, tmp_path / "profile")

    assert dom.count("<script") == 1
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in dom


MEASURE = """<script>
const inside = (one, other) => { const a = one.getBoundingClientRect(), b = other.getBoundingClientRect();
  return a.left >= b.left - 1 && a.right <= b.right + 1 && a.top >= b.top - 1 && a.bottom <= b.bottom + 1; };
const texts = [...document.querySelectorAll("figure svg text")];
const stray = texts.filter(text => !inside(text, text.closest("figure"))).length;
const dots = [...document.querySelectorAll("figure circle")];
const drawn = dots.filter(dot => dot.getBoundingClientRect().width > 5).length;
const wide = document.documentElement.scrollWidth > document.documentElement.clientWidth;
document.title = `${texts.length} ${stray} ${drawn} ${wide}`;
</script></body>"""


@pytest.mark.parametrize("width", [1200, 400])
def test_trends_are_drawn_within_their_frames(browser: str, tmp_path: Path, width: int) -> None:
    kernels = [f"6.{minor}.0{suffix}" for minor in range(12, 20) for suffix in ("-rc3-00012-g0badf00d0badf00d", "")]
    points = {
        kernel: {"a::x": KernelPoint(3, number % 2, 1.0 + number), "a::y": KernelPoint(1, 0, 0.1)}
        for number, kernel in enumerate(kernels)
    }
    page = tmp_path / "page.html"
    found = trends("hardware", ["spr-01"], points)
    page.write_text(html.render(every_kind(), trends=[found]).replace("</body>", MEASURE), encoding="utf-8")
    dom = dom_of(browser, page, tmp_path / "profile", f"--window-size={width},900")

    title = re.search("<title>(.*?)</title>", dom)
    assert title
    labels = sum(len(chart.values) + len(chart.kernels) for chart in found.charts)
    assert title[1] == f"{labels} 0 {2 * len(kernels)} false"
    assert re.search(r'<span id="shown"[^>]*></span>', dom), "all results are shown; trends are none of them"
