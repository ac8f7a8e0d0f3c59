"""Which machines a run happens on, and what is said when they cannot be had."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tdxhw.backends import local
from tdxhw.backends.local import probe
from tdxhw.backends.select import select
from tdxhw.errors import BackendUnavailable, HarnessError, UnknownName
from tdxhw.lab.archive import build
from tests.unit.abi.samples import BUILD_ID, NOTES
from tests.unit.tdxhw.fake_host import MAINLINE_CAPS, PLAIN_CAPS, V17_CAPS, FakeKernel


@pytest.mark.parametrize(("caps", "dialect"), [(MAINLINE_CAPS, "mainline"), (V17_CAPS, "v17"), (PLAIN_CAPS, "None")])
def test_finds_the_dialect_and_leaves_nothing_open(caps: dict[object, int], dialect: str) -> None:
    kernel = FakeKernel(caps)  # type: ignore[arg-type]

    assert str(probe(kernel)) == dialect
    assert not kernel.open_fds


@pytest.mark.parametrize(("notes", "build_id"), [(NOTES, BUILD_ID.hex()), (b"", "unknown")])
def test_results_say_which_build_of_the_kernel_ran(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, notes: bytes, build_id: str
) -> None:
    """A kernel that is built again keeps its release: only its build id tells the two apart."""
    (tmp_path / "notes").write_bytes(notes)
    monkeypatch.setattr(local, "_NOTES", tmp_path / "notes")
    assert local.LocalHost(None).provenance()["build_id"] == build_id


def test_a_missing_dev_kvm_is_one_line() -> None:
    with pytest.raises(BackendUnavailable, match="open /dev/kvm: ENOENT") as error:
        probe(FakeKernel({}))
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def sent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Unpack what `tdxhw lab archive` packs."""
    folder = tmp_path_factory.mktemp("sent")
    subprocess.run(["tar", "-xzf", "-", "-C", folder], input=build().data, check=True)
    return folder


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["run", "--on", "sim", "kvm_device"], "what is sent to lab hosts carries no simulator"),
        (["replay", "x.jsonl"], "what is sent to lab hosts carries no simulator"),
        (["diff", "--on", "sim", "--on", "sim"], "what is sent to lab hosts carries no simulator"),
    ],
)
def test_what_was_sent_to_a_lab_host_says_what_it_does_not_carry(sent: Path, arguments: list[str], told: str) -> None:
    command = [sys.executable, "-I", "-S", str(sent), *arguments]

    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=sent)

    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"tdxhw: {told}")
    assert done.stderr.count("\n") == 1


def test_unknown_backend() -> None:
    with pytest.raises(UnknownName, match="there are: auto, lab:NAME, local, sim"):
        select("moon")


def test_a_profile_needs_the_simulator() -> None:
    with pytest.raises(HarnessError, match="add --on sim"):
        select("local", ["v17"])


@pytest.mark.parametrize("missing", ["unicorn", "yaml"])
def test_without_the_simulator_s_packages_the_error_says_what_to_install(missing: str) -> None:
    script = (
        f"import sys; sys.modules[{missing!r}] = None\n"
        "from tdxhw.cli import main; sys.exit(main(['run', '--on', 'sim', 'kvm_device']))"
    )

    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)

    assert done.returncode == 2
    assert done.stderr == f"tdxhw: the simulator needs {missing}: pip install 'tdxhw[sim]'\n"
    assert not done.stdout


@pytest.mark.parametrize(
    ("breakage", "said"),
    [
        ("unicorn_internals.UNICORN_VERSION = '2.0.0'", "the CPU engine needs Unicorn 2.0.0, but .*: pip install .*"),
        ("unicorn_internals.CPU_ENV += 8", "Unicorn's CPU state is not .*; pip install --force-reinstall unicorn==.*"),
        ("unicorn_exits.HANDLERS.clear()", "Unicorn self-test, .*; pip install --force-reinstall unicorn==.*"),
    ],
)
def test_a_cpu_engine_that_fails_its_self_test_ends_the_run_before_the_first_test(breakage: str, said: str) -> None:
    script = (
        f"from sim_backend.cpu import unicorn_internals, unicorn_exits; {breakage}\n"
        "import sys; from tdxhw.cli import main; sys.exit(main(['run', '--on', 'sim', 'kvm_device']))"
    )

    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)

    assert done.returncode == 2
    assert re.fullmatch(rf"tdxhw: the simulated host 'mainline' cannot start: {said}\n", done.stderr)
    assert not done.stdout
