"""``tdxhw run --on lab:vm``: a Debian kernel in a virtual machine, from a snapshot, and its own nested /dev/kvm."""

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tdxhw.cli import main
from tdxhw.lab import host_run, inventory
from tdxhw.lab.archive import build as build_archive
from tdxhw.lab.connection import Session
from tdxhw.lab.errors import LabUnreachable
from tdxhw.lab.host_run import HostRun, Wish
from tdxhw.report.read import read
from tdxhw.report.results import Status
from tdxhw.runner import suite_files
from tests.lab import vm_image
from tests.lab.missing import skip_or_fail
from tests.lab.virtual_machine import SNAPSHOT, VirtualMachine, why_impossible
from tests.lab.vm_image import Image

pytestmark = pytest.mark.timeout(900)  # cold: a Debian to install, and to boot under emulation

PANICS = '''
"""A test that takes the kernel down."""
from pathlib import Path

def test_before():
    pass

def test_panics():
    Path("/proc/sysrq-trigger").write_text("c")

def test_after():
    pass
'''


def lab_files(vm: VirtualMachine, folder: Path) -> tuple[Path, Path]:
    """Write a lab file, known hosts and an ssh configuration for the machine."""
    folder.mkdir(exist_ok=True)
    (folder / "vm.yaml").write_text(
        f"host: {{name: vm, ssh: 'ssh://root@127.0.0.1:{vm.port}', promises: [kvm, vm-type-default]}}\n"
    )
    (folder / "known_hosts").write_text(vm.known_hosts_line())
    config = folder / "ssh_config"
    config.write_text(f"Host *\n  IdentityFile {vm.image.client_key}\n  IdentitiesOnly yes\n")
    return folder, config


def connect(labs: Path, config: Path) -> Session:
    return Session.open(inventory.load(labs).host("vm"), labs, ssh_config=config)


def answers(labs: Path, config: Path) -> Callable[[], bool]:
    """Return whether one can log in and the boot is over. QEMU accepts connections before there is a guest."""

    def ask() -> bool:
        try:
            with connect(labs, config) as session:
                session.check("systemctl is-system-running --wait >/dev/null || :; test -c /dev/kvm")
        except LabUnreachable:
            return False
        return True

    return ask


def warm_disk(image: Image, folder: Path) -> Path:
    """Return the disk with a snapshot of the booted machine; boot it once if it is not in the cache."""
    recipe = Path(vm_image.__file__).with_name("virtual_machine.py").read_bytes()
    disk = image.folder / f"warm-{hashlib.sha256(recipe).hexdigest()[:16]}.qcow2"
    if not disk.exists():
        vm = VirtualMachine(image, folder)
        try:
            vm.start(image.disk)
            took_s = vm.wait_until(answers(*lab_files(vm, folder / "labs")), limit_s=400)
            print(f"cold boot: {took_s:.1f} s")  # noqa: T201
            vm.save()
            vm.disk.rename(disk)
        finally:
            vm.stop()
    return disk


@pytest.fixture(scope="module")
def vm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VirtualMachine]:
    if reason := why_impossible():
        skip_or_fail(f"no virtual machine here: {reason}")
    image = vm_image.build()
    disk = warm_disk(image, tmp_path_factory.mktemp("cold"))
    vm = VirtualMachine(image, tmp_path_factory.mktemp("vm"))
    try:
        vm.start(disk, snapshot=SNAPSHOT)
        yield vm
    finally:
        vm.stop()


@pytest.fixture
def lab(vm: VirtualMachine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Describe the running machine, and set its clock: it still shows the time of the snapshot."""
    labs, config = lab_files(vm, tmp_path / "labs")
    monkeypatch.setenv("TDXHW_LABS", str(labs))
    monkeypatch.setenv("TDXHW_SSH_CONFIG", str(config))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    vm.wait_until(answers(labs, config), limit_s=200)
    with connect(labs, config) as session:
        session.check(f"date -s @{time.time():.0f}")
    return labs, config


def test_the_ordinary_suites_run_on_the_guest_kernel_s_own_kvm(
    lab: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    with connect(*lab) as session:
        release = session.check("uname -r").strip()
    suites = [name for name in suite_files() if name == "kvm_device" or name.startswith("ordinary_")]
    code = main(["run", "--on", "lab:vm", *suites, "--json"])
    output = capsys.readouterr()
    document = json.loads(output.out)
    by_outcome: dict[str, dict[str, str]] = {}
    for result in document["results"]:
        by_outcome.setdefault(result["outcome"], {})[result["test"]] = result["reason"]

    assert code == 0, (output.err, {name: by_outcome.get(name) for name in ("failed", "error", "missed")})
    assert by_outcome.keys() <= {"passed", "skipped"}
    assert len(by_outcome["passed"]) > 100
    # Debian's kernel has no KVM_SW_PROTECTED_VM, so no guest_memfd; nothing else may be missing.
    assert all("KVM_CAP_" in reason or "VM_TYPES" in reason for reason in by_outcome.get("skipped", {}).values())
    provenance = document["results"][0]["provenance"]
    assert (provenance["host"], provenance["kernel"], provenance["backend"]) == ("vm", release, "local")
    assert release != Path("/proc/sys/kernel/osrelease").read_text().strip(), "the guest's kernel, not this machine's"


def test_what_needs_tdx_is_skipped_and_says_why(lab: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--on", "lab:vm", "-k", "test_td_lifecycle.py", "--json"]) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    reasons = [result["reason"] for result in results if result["outcome"] == "skipped"]
    assert len(reasons) > 3
    assert all("no TDX" in reason for reason in reasons)


def test_the_doctor_says_that_this_machine_has_no_tdx(
    lab: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", "--on", "lab:vm", "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    checks = {check["name"]: check["status"] for check in document["checks"]}
    assert checks["dev-kvm"] == "PASS"
    assert checks["python"] == "PASS"
    assert "FAIL" in checks.values()


def test_a_kernel_panic_is_the_failure_of_the_test_that_caused_it(
    lab: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_run, "_RECONNECT_EVERY_S", 1.0)
    labs, config = lab
    suite = tmp_path / "test_panics.py"
    suite.write_text(PANICS)
    notes: list[str] = []
    with connect(labs, config) as session:
        before = session.check("cat /proc/sys/kernel/random/boot_id")
    run = HostRun(
        inventory.load(labs).host("vm"), Wish(suites=(str(suite),)), tmp_path / "log.jsonl", labs, "panics",
        build_archive(), config, on_note=notes.append,
    )  # fmt: skip
    run.run()
    results = {result.test: result for result in read(tmp_path / "log.jsonl").results}

    assert run.problem == "", notes
    assert {name: result.status for name, result in results.items()} == {
        "test_before": Status.PASS, "test_panics": Status.FAIL, "test_after": Status.PASS,
    }  # fmt: skip
    assert results["test_panics"].message == "the host rebooted during this test"
    with connect(labs, config) as session:
        assert session.check("cat /proc/sys/kernel/random/boot_id") != before, "it really went down"
