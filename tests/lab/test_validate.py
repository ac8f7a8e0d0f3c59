"""``tdxhw validate`` on a machine under emulation: real GRUB, dpkg and kernels, power cuts, simulated BMCs.

Whatever the kernel is like and whenever the power goes, the machine ends with its own kernel and as it was, nobody has
a lease on it, and the verdict is true.
"""

import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest

from tdxhw.abi.deb import kernel_parts
from tdxhw.abi.kernel_files import Role
from tdxhw.cli import main
from tdxhw.validate.course import FILE
from tdxhw.validate.machine import FOLDER
from tests.lab import bmc_ipmi, bmc_redfish, grub_image, virtual_machine
from tests.lab.bmc_ipmi import IpmiBmc
from tests.lab.bmc_redfish import RedfishBmc
from tests.lab.grub_lab import BOOT_LIMIT_S, GrubLab
from tests.lab.missing import skip_or_fail
from tools.tdx_kernel.variants import Kernel, built

pytestmark = pytest.mark.timeout(1800)  # several boots under software emulation, beside whatever else runs

SUITE: Final = '''
"""What a kernel can do, without much ado."""
import fcntl
import time

def test_offers_vms():
    with open("/dev/kvm") as kvm:
        assert fcntl.ioctl(kvm, 0xAE00, 0) == 12

def test_offers_protected_vms():
    with open("/dev/kvm") as kvm:
        assert fcntl.ioctl(kvm, 0xAE03, 235) & 2, "KVM_CAP_VM_TYPES: no KVM_X86_SW_PROTECTED_VM"

def test_takes_its_time():
    time.sleep(12)
'''


@dataclass(frozen=True, slots=True)
class Image:
    """A kernel of ours without its package: that saves an emulated machine most of a minute of dpkg."""

    kernel: Path
    modules: tuple[str, ...] = ()  # as an argument


@pytest.fixture(scope="session")
def disk_image() -> Any:
    for reason in (virtual_machine.why_impossible(), bmc_ipmi.why_impossible(), bmc_redfish.why_impossible()):
        if reason:
            skip_or_fail(reason)
    return grub_image.build()


def kernel(name: str) -> Kernel:
    found = built(name)
    if found is None:
        skip_or_fail(f"no kernel {name!r}: `make tdx-kernel` builds it")
    return found


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Image]:
    folder = tmp_path_factory.mktemp("images")

    def image(name: str) -> Image:
        data = next(data for place, _, data in kernel_parts(kernel(name).deb) if place.role is Role.IMAGE)
        target = folder / f"bzImage-{name}"
        target.write_bytes(data)
        modules = folder / f"modules-{name}.tar"
        with modules.open("wb") as file:
            subprocess.run(["dpkg-deb", "--fsys-tarfile", kernel(name).deb], stdout=file, check=True)
        return Image(target, ("--modules", str(modules)))

    return image


@pytest.fixture
def lab(disk_image: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[GrubLab]:
    lab = GrubLab(tmp_path / "lab", disk_image)
    monkeypatch.setenv("TDXHW_LABS", str(lab.labs))
    monkeypatch.setenv("TDXHW_SSH_CONFIG", str(lab.ssh_config))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    (tmp_path / "test_offers.py").write_text(SUITE)
    try:
        lab.to_snapshot()
        yield lab
    finally:
        lab.machine.kill()


# What the suite gives on a kernel that is as it should be: made on the first good one, for all the others.
BASELINE: Final = Path("results.jsonl")


@pytest.fixture(scope="session")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kept")


@pytest.fixture
def baseline(kept: Path, lab: GrubLab, images: Callable[[str], Image], tmp_path: Path) -> Path:
    """Return results of the good kernel. Its first validation is against the host's own, which has no protected VMs."""
    results = kept / BASELINE
    if not results.exists():
        own = tmp_path / "own.jsonl"
        suite = str(tmp_path / "test_offers.py")
        assert main(["run", "--on", "lab:vm", suite, "--report-log", str(own)]) == 1
        out = tmp_path / "good"
        code = main([*arguments(images("good"), own, out), suite])
        document = json.loads((out / "outcome.json").read_text())
        assert (code, document["verdict"]) == (0, "GOOD"), document
        shutil.copy(out / "results.jsonl", results)
    return results


def arguments(image: Image, baseline: Path, out: Path) -> list[str]:
    """Return the command line of a validation."""
    return [
        "validate", "--lab", "vm", "--kernel", str(image.kernel), *image.modules, "--baseline", str(baseline),
        "--boot-limit", str(BOOT_LIMIT_S), "--out", str(out), "--retries", "1",
    ]  # fmt: skip


def state(lab: GrubLab) -> dict[str, str]:
    """Return what has to be the same before and after."""
    commands = {
        "kernel": "uname -r",
        "packages": "dpkg-query -W -f '${Package} ${Version} ${db:Status-Status}\\n'",
        "audit": "dpkg --audit",
        "boot": "cd /boot; find . -type f ! -name grubenv | sort | xargs sha256sum",
        "environment": "grub-editenv - list",
        "modules": "ls /lib/modules",
        "etc": "find /etc/default /etc/systemd /etc/grub.d | sort; cat /etc/default/grub",
        "journal": f"test ! -e {FOLDER}",
        "lease": "cat /run/lock/tdxhw.lease /var/lib/tdxhw/lease 2>/dev/null || :",
    }
    with lab.connect() as session:
        return {name: session.check(command) for name, command in commands.items()}


def validate(lab: GrubLab, image: Image, baseline: Path, folder: Path, *more: str) -> tuple[int, dict[str, Any]]:
    """Run a validation to its end; return its exit code and its document. The machine has to be as it was."""
    before = state(lab)
    out = folder / "out"
    code = main([*arguments(image, baseline, out), *more, str(folder / "test_offers.py")])
    document: dict[str, Any] = json.loads((out / "outcome.json").read_text())
    told = (document["line"], (out / FILE).read_text())
    lab.machine.wait_until(lab.is_up, limit_s=200)
    assert state(lab) == before, told
    assert document["host_state"] == "RESTORED", told
    return code, document


def test_a_package_is_installed_booted_once_verified_and_removed(
    lab: GrubLab, baseline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    package = Image(kernel("good").deb)
    before = state(lab)
    argv = arguments(package, baseline, tmp_path / "out")
    argv += ["--parameters", "kvm_amd.nested=1,0", "--history", str(tmp_path / "h.sqlite")]
    code = main([*argv, str(tmp_path / "test_offers.py")])
    output = capsys.readouterr().out
    assert code == 0, output
    last = output.strip().splitlines()[-1]
    assert last.startswith("GOOD linux 7.2")
    assert last.endswith("on vm: 6 passed, 0 regressions, 0 flaky")
    assert state(lab) == before
    document = json.loads((tmp_path / "out/outcome.json").read_text())
    ran = [result["provenance"]["kernel"] for boot in document["boots"] for result in boot["results"]]
    assert len(ran) == 6
    assert set(ran) == {last.split()[2]}, "every result is of the kernel on trial"
    assert [boot["parameters"] for boot in document["boots"]] == [{"kvm_amd.nested": "1"}, {"kvm_amd.nested": "0"}]
    assert main(["history", "runs", "--db", str(tmp_path / "h.sqlite")]) == 0
    assert "GOOD" in capsys.readouterr().out


def test_a_kernel_that_lost_something_has_regressed(
    lab: GrubLab, baseline: Path, images: Callable[[str], Image], tmp_path: Path
) -> None:
    code, document = validate(lab, images("worse"), baseline, tmp_path)
    assert code == 1, document["line"]
    assert "1 test fails that passed: offers::test_offers_protected_vms" in document["line"]
    results = [result["status"] for result in document["boots"][0]["results"] if "protected" in result["test"]]
    assert results == ["FAIL", "FAIL"], "it was run again before it was called a regression"


def test_a_kernel_that_panics_comes_back_by_itself(
    lab: GrubLab, baseline: Path, images: Callable[[str], Image], tmp_path: Path
) -> None:
    lab.describe(power=False)
    code, document = validate(lab, images("panic"), baseline, tmp_path)
    assert code == 1, document["line"]
    assert "panics at boot: Kernel panic - not syncing: Attempted to kill init!" in document["line"]
    assert "Kernel panic - not syncing" in (tmp_path / "out/console.log").read_text()


def test_a_kernel_that_hangs_is_reset_over_redfish(
    lab: GrubLab, baseline: Path, images: Callable[[str], Image], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ExitStack() as stack:
        hook = attach(lab, "redfish", stack, tmp_path, monkeypatch)
        code, document = validate(lab, images("hang"), baseline, tmp_path, "--retries", "0")
    assert code == 1, document["line"]
    assert "hangs at boot" in document["line"]
    assert hook.pressed[:1] == ["reset"]


def test_a_kernel_without_network_reboots_by_itself_and_says_what_it_lacked(
    lab: GrubLab, baseline: Path, images: Callable[[str], Image], tmp_path: Path
) -> None:
    lab.describe(power=False)
    code, document = validate(lab, images("nonet"), baseline, tmp_path)
    assert code == 1, document["line"]
    assert "boots, but cannot be reached: it has no network interface" in document["line"]


# ---- power cuts ----


def attach(lab: GrubLab, driver: str, stack: ExitStack, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Give the machine a BMC; return the hook that presses its buttons."""
    place = folder / driver
    place.mkdir()
    bmc: Any
    if driver == "ipmi":
        bmc = stack.enter_context(IpmiBmc(place, lab.machine, lab.machine.console_socket))
    else:
        bmc = stack.enter_context(RedfishBmc(place, lab.machine))
    monkeypatch.setenv("BMC_OF_VM", bmc.credentials)
    text = (lab.labs / "vm.yaml").read_text()
    host = json.loads(text)["host"]
    console = "console: {driver: ipmi-sol}" if driver == "ipmi" else f"console: {json.dumps(host['console'])}"
    (lab.labs / "vm.yaml").write_text(
        f"host:\n  name: vm\n  ssh: {host['ssh']!r}\n  promises: [kvm]\n"
        f"  power: {{driver: {driver}, {bmc.lab_options('BMC_OF_VM')}}}\n  {console}\n"
    )
    return bmc.hook


class AtStep(threading.Thread):
    """Does something when a validation has come to a step."""

    def __init__(self, progress: Path, step: str, delay_s: float, action: Callable[[], None]) -> None:
        super().__init__(daemon=True)
        self._progress, self._step, self._delay_s, self._action = progress, step, delay_s, action
        self.happened = False

    def run(self) -> None:
        until = time.monotonic() + 600
        while time.monotonic() < until:
            if self._progress.exists() and self._step in self._progress.read_text():
                time.sleep(self._delay_s)
                self.happened = True
                self._action()
                return
            time.sleep(0.02)


# What the progress says, how long after it the power goes [s], over what it comes back, and what is true then.
CUTS: Final = [
    ('"PREPARED"', 0.0, "ipmi", 125),
    ("sending", 0.3, "redfish", 125),
    ('"ARMED"', 0.2, "ipmi", 125),
    ('"BOOTING"', 6.0, "redfish", 0),  # this emulator does not see the cut: it looks like a hang, which is tried twice
    ('"CANDIDATE"', 14.0, "ipmi", 0),  # under a test, which is then tried again
    ('"RETURNING"', 0.2, "command", 0),
    ('"RETURNING"', 12.0, "redfish", 0),
    ('"BACK"', 0.5, "ipmi", 0),  # while everything is undone
]


@pytest.mark.parametrize(("step", "delay_s", "driver", "expected"), CUTS, ids=[f"{cut[0]}-{cut[2]}" for cut in CUTS])
def test_a_power_cut_in_any_step_ends_on_the_own_kernel(
    lab: GrubLab,
    baseline: Path,
    images: Callable[[str], Image],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
    delay_s: float,
    driver: str,
    expected: int,
) -> None:
    with ExitStack() as stack:
        if driver != "command":
            attach(lab, driver, stack, tmp_path, monkeypatch)
        cut = AtStep(tmp_path / "out" / FILE, step, delay_s, lab.machine.kill)
        cut.start()
        code, document = validate(lab, images("good"), baseline, tmp_path)
        assert cut.happened
    assert code == expected, document["line"]


def test_a_power_cut_in_the_middle_of_dpkg_is_undone(
    lab: GrubLab, baseline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = Image(kernel("good").deb)
    before = state(lab)
    out = tmp_path / "out"
    with ExitStack() as stack:
        attach(lab, "ipmi", stack, tmp_path, monkeypatch)
        cut = AtStep(out / FILE, "installing", 12.0, lab.machine.kill)
        cut.start()
        code = main([*arguments(package, baseline, out), str(tmp_path / "test_offers.py")])
        document = json.loads((out / "outcome.json").read_text())
        assert cut.happened
    assert code == 125, document["line"]
    assert state(lab) == before, document["problems"]


def test_a_controller_that_is_killed_leaves_what_recover_undoes(
    lab: GrubLab, baseline: Path, images: Callable[[str], Image], tmp_path: Path
) -> None:
    before = state(lab)
    out = tmp_path / "out"
    program = [sys.executable, "-c", "import sys; from tdxhw.cli import main; sys.exit(main())"]
    argv = [*program, *arguments(images("good"), baseline, out), str(tmp_path / "test_offers.py")]
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL)
    killer = AtStep(out / FILE, "verified", 5.0, lambda: process.send_signal(signal.SIGKILL))
    killer.start()
    assert process.wait(timeout=600) == -signal.SIGKILL
    assert state_of_lease(lab) != "", "it is left, and names a process that has died"
    assert main(["validate", "--lab", "vm", "--recover", "--boot-limit", str(BOOT_LIMIT_S)]) == 0
    assert state(lab) == before


def test_ctrl_c_rolls_back(lab: GrubLab, baseline: Path, images: Callable[[str], Image], tmp_path: Path) -> None:
    before = state(lab)
    out = tmp_path / "out"
    program = [sys.executable, "-c", "import sys; from tdxhw.cli import main; sys.exit(main())"]
    argv = [*program, *arguments(images("good"), baseline, out), str(tmp_path / "test_offers.py")]
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL)
    AtStep(out / FILE, '"CANDIDATE"', 12.0, lambda: process.send_signal(signal.SIGINT)).start()
    assert process.wait(timeout=900) == 130
    assert state(lab) == before
    document = json.loads((out / "outcome.json").read_text())
    assert (document["interrupted"], document["host_state"]) == (True, "RESTORED")
    assert [result["status"] for result in document["boots"][0]["results"]][:2] == ["PASS", "PASS"], "kept"


def state_of_lease(lab: GrubLab) -> str:
    return lab.check("cat /var/lib/tdxhw/lease 2>/dev/null || :")
