"""Which machines a run happens on, and what is said when they cannot be had."""

import re
import subprocess
import sys

import pytest

from tdxhw.backends.local import probe
from tdxhw.backends.select import select
from tdxhw.errors import BackendUnavailable, HarnessError, UnknownName
from tests.unit.tdxhw.fake_host import MAINLINE_CAPS, PLAIN_CAPS, V17_CAPS, FakeKernel


@pytest.mark.parametrize(("caps", "dialect"), [(MAINLINE_CAPS, "mainline"), (V17_CAPS, "v17"), (PLAIN_CAPS, "None")])
def test_finds_the_dialect_and_leaves_nothing_open(caps: dict[object, int], dialect: str) -> None:
    kernel = FakeKernel(caps)  # type: ignore[arg-type]

    assert str(probe(kernel)) == dialect
    assert not kernel.open_fds


def test_a_missing_dev_kvm_is_one_line() -> None:
    with pytest.raises(BackendUnavailable, match="open /dev/kvm: ENOENT") as error:
        probe(FakeKernel({}))
    assert "\n" not in str(error.value)


def test_unknown_backend() -> None:
    with pytest.raises(UnknownName, match="there are: auto, local, sim"):
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
