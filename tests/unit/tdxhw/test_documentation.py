"""The documentation is true: what it links to exists, what it tells to type can be typed, its code runs."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest

from tdxhw.cli import cli
from tdxhw.guest.build import build, missing_tools

ROOT = Path(__file__).parents[3]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("tests/golden/**/*.md")])
IDS = [str(page.relative_to(ROOT)) for page in PAGES]
ON_EVERY_PAGE = pytest.mark.parametrize("page", PAGES, ids=IDS)
Process = Callable[..., "subprocess.CompletedProcess[str]"]


def anchor(heading: str) -> str:
    """Return what GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def code(page: str, language: str, holding: str = "") -> str:
    """Return the one block of code in `language` that has `holding` in it."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)
    (found,) = [block for of, block in blocks if of == language and holding in block]
    return str(found)


def typed(text: str) -> Iterator[list[str]]:
    """Yield the words of every command line that begins with tdxhw, but for those of the shell around it."""
    lines = re.findall(r"`(tdxhw [^`\n]+)`", text)
    lines += re.findall(r"^(?:\$ | {4}|\s*\.venv/bin/|\$ \.venv/bin/)(tdxhw (?:[^\n]|(?<=\\)\n)+)", text, re.MULTILINE)
    for line in lines:
        words = re.split(r" +[#;|>]", line.replace("\\\n", " ").replace("\\|", "/"))[0]
        if not words.startswith("tdxhw:"):
            yield shlex.split(words.replace("…", " ").replace("[", " ").replace("]", " "))


def test_what_is_typed_is_found() -> None:
    """So that no change of this file's patterns makes the next test one that cannot fail."""
    lines = [words for page in PAGES for words in typed(page.read_text())]

    assert len(lines) > 60
    assert ["tdxhw", "lab", "power", "spr-01", "status"] in lines
    assert any(words[1:3] == ["bisect", "--good"] and "--build" in words for words in lines)


@ON_EVERY_PAGE
def test_every_command_line_names_commands_and_options_that_exist(page: Path) -> None:
    wrong = []
    for words in typed(page.read_text()):
        command: click.Command = cli
        options: list[str] = []
        rest = words[1:]
        while rest and isinstance(command, click.Group):
            name = rest.pop(0)
            if name.startswith("-") or name.isupper() or "/" in name:
                break
            found = command.get_command(click.Context(command), name)
            if found is None:
                wrong.append(f"{shlex.join(words)}: no command {name}")
                break
            command = found
        for word in rest:
            if word == "--":
                break
            if re.fullmatch(r"--?[a-z][a-z-]*(=.*)?", word):
                options.append(word.partition("=")[0])
        known = {option for one in command.params for option in (*one.opts, *one.secondary_opts)} | {"--help"}
        if isinstance(command, click.Group):
            known.add("--version")
        wrong += [f"{shlex.join(words)}: no option {option}" for option in options if option not in known]

    assert wrong == []


@ON_EVERY_PAGE
def test_every_link_leads_somewhere(page: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if "://" in target:
            continue
        path, _, fragment = target.partition("#")
        file = page.parent / path if path else page
        headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE) if file.suffix == ".md" else []
        if not file.exists() or (fragment and fragment not in map(anchor, headings)):
            broken.append(target)

    assert broken == []


def test_no_page_names_this_machine() -> None:
    told = re.compile(r"/work/|/root/|/home/\w|\.\./shared|/opt/pypi|pypi\.org")

    assert [page.name for page in PAGES if told.search(page.read_text())] == []


@pytest.mark.parametrize(("page", "holding"), [("README.md", ""), ("docs/testing.md", "faults=")])
def test_the_code_of_a_page_runs(page: str, holding: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning", "-c", code(page, "python", holding)],
        capture_output=True, text=True, check=False, timeout=60, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout in ("", "2\n")


def test_the_suite_of_the_testing_page_passes(tdxhw_process: Process, tmp_path: Path) -> None:
    suite = tmp_path / "test_mine.py"
    suite.write_text(code("docs/testing.md", "python", "def test_"))

    done = tdxhw_process("run", "--on", "sim", str(suite))

    assert done.returncode == 0, done.stdout + done.stderr
    assert "test_a_port_is_written_and_read_back" in done.stdout


@pytest.mark.skipif(bool(missing_tools()), reason=f"needs binutils: {', '.join(missing_tools())}")
def test_the_payload_of_the_testing_page_builds(tmp_path: Path) -> None:
    source = tmp_path / "mine.S"
    source.write_text(code("docs/testing.md", "", "guest_main"))

    build(source, tmp_path)

    assert (tmp_path / "mine.bin").stat().st_size > 0


def test_every_target_of_the_makefile_that_a_page_names_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {name for page in PAGES for name in re.findall(r"`make ([a-z_-]+)", page.read_text())}

    assert named - targets == {"modules_install", "tinyconfig"}, "those are the kernel's"


def test_every_subcommand_is_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()

    assert [name for name in cli.list_commands(click.Context(cli)) if f"`tdxhw {name}" not in readme] == []


def test_every_decision_is_numbered_and_none_is_missing() -> None:
    names = sorted(path.name for path in (ROOT / "docs/adr").glob("*.md"))

    assert [int(name[:4]) for name in names] == list(range(1, len(names) + 1))
