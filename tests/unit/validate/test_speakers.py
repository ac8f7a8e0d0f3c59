"""Who said what on a console that two kernels and GRUB share."""

import tempfile
from pathlib import Path

import pytest

from tdxhw.lab.console.lines import ConsoleLine
from tdxhw.validate.speakers import said_by
from tdxhw.validate.verdict import Verdict
from tests.unit.validate.simulated_debian import MEMORY, OWN
from tests.unit.validate.simulated_lab import NEW, Kernel, SimulatedLab
from tests.unit.validate.test_validation import validate

DOWN = ["[ 9000.1] systemd-shutdown: rebooting", "[ 9000.2] WARNING: own, going down"]
UP = [f"[    0.000000] Linux version {NEW} (a@b) (gcc)", "[    1.5] WARNING: new"]
BACK = [f"[    0.000000] Linux version {OWN} (a@b) (gcc)", "[    1.5] WARNING: own, coming up"]
QUIET_UP = ["[    1.5] WARNING: new"]
GRUB = [f"  Booting `Kernel on trial: vmlinuz-{NEW}'"]


@pytest.mark.parametrize(
    ("texts", "warnings"),
    [
        pytest.param([*DOWN, *UP], ["new"], id="there"),
        pytest.param([*DOWN, *UP, *BACK], ["new"], id="there and back"),
        pytest.param([*DOWN, *UP, *BACK, *DOWN, *UP], ["new", "new"], id="there twice"),
        pytest.param([*DOWN, *QUIET_UP], ["own, going down", "new"], id="quiet: who knows"),
        pytest.param([*QUIET_UP, "[    0.1] x"], ["new"], id="quiet, and then another boot"),
        pytest.param([*DOWN, *GRUB, *QUIET_UP], ["new"], id="quiet, but GRUB speaks"),
        pytest.param([*DOWN, *GRUB, *QUIET_UP, "[    0.1] x"], ["new"], id="and then the own one, quiet"),
        pytest.param([*DOWN, *GRUB, *BACK], [], id="GRUB could not load it"),
        pytest.param(QUIET_UP, ["new"], id="nothing tells them apart"),
        pytest.param([*DOWN, f"[ 0.000000] Linux version {NEW[:5]}[ 0.1] x", *QUIET_UP],
                     ["own, going down", "new"], id="torn: who knows"),
        pytest.param([*DOWN, *UP, "[    0.2] WARNING: late line of another CPU"], ["new", "late line of another CPU"],
                     id="out of order"),
    ],
)  # fmt: skip
def test_only_what_the_kernel_on_trial_said_is_held_against_it(texts: list[str], warnings: list[str]) -> None:
    said = said_by([ConsoleLine(0.0, text) for text in texts], NEW, OWN)
    assert [line.text.partition("WARNING: ")[2] for line in said if "WARNING" in line.text] == warnings


def test_a_log_over_ssh_that_lost_the_first_lines_of_a_boot_loses_no_finding() -> None:
    """The own kernel had just begun, so that no time goes back."""
    own = [ConsoleLine(1000.0 + second, f"[{second:5}.000000] x") for second in range(3)]
    own[0] = ConsoleLine(1000.0, f"[    0.000000] Linux version {OWN} (a@b)")
    new = [ConsoleLine(1100.0 + second, f"[{second:5}.000000] WARNING: new") for second in (10, 20)]
    assert said_by([*own, *new], NEW, OWN) == new


SHUTDOWN = "[ 9000.000000] WARNING: CPU: 1 PID: 2 at drivers/watchdog/watchdog_dev.c:1 watchdog_release+0x1/0x2"
OOPS = "[ 9000.500000] Kernel panic - not syncing: Fatal exception"


class Noisy(SimulatedLab):
    """A host whose own kernel complains whenever it goes down."""

    complaint = SHUTDOWN

    def boot(self) -> None:
        if self.release == OWN:
            self.say(self.complaint)
        super().boot()


def test_a_warning_of_the_own_kernel_that_goes_down_is_no_regression_of_the_candidate() -> None:
    with tempfile.TemporaryDirectory(dir=MEMORY) as name:
        lab = Noisy(Path(name) / "host")
        lab.has_console = True
        outcome, _ = validate(lab, Path(name))
    assert outcome.verdict is Verdict.GOOD, outcome.line


def test_a_panic_of_the_own_kernel_that_goes_down_proves_nothing_about_the_candidate() -> None:
    with tempfile.TemporaryDirectory(dir=MEMORY) as name:
        lab = Noisy(Path(name) / "host", kernel=Kernel.HANGS)
        lab.has_console, lab.complaint = True, OOPS
        outcome, said = validate(lab, Path(name))
    assert "panics" not in outcome.line
    assert sum(f"boots {NEW} once" in line for line in said) == 2, "nothing was proven, so it is tried again"
