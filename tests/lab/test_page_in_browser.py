"""The HTML page in a real browser: it opens without a network, and its filters filter."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tdxhw.report import html
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


def dom_of(browser: str, page: Path, profile: Path) -> str:
    command = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND",
        f"--user-data-dir={profile}", "--virtual-time-budget=2000", "--dump-dom", page.as_uri(),
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
