"""``tdxhw abi`` on real kernels: Debian's, which cannot run TDs, and one built here, which can."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tdxhw.cli import main
from tests.lab.missing import skip_or_fail
from tools import debian_archive
from tools.tdx_kernel.variants import Kernel, built

CACHE = Path(__file__).parents[2] / ".cache" / "debian"
SPLIT = ("image", "binary", "modules", "base")


def report_of(capsys: pytest.CaptureFixture[str], *given: str | Path) -> tuple[int, dict[str, Any]]:
    code = main(["abi", "--json", *map(str, given)])
    output = capsys.readouterr()
    assert output.err == ""
    (report,) = json.loads(output.out)
    assert isinstance(report, dict)
    return code, report


def statuses(report: dict[str, Any]) -> dict[str, str]:
    return {
        check["what"]: check["status"] for part in ("configuration", "parameter", "layout") for check in report[part]
    }


def agreeing(report: dict[str, Any]) -> int:
    return sum(one["agreement"] == "agrees" for one in report["structures"])


# ---- Debian's ----


def packages(suite_name: str, pattern: str, kinds: tuple[str, ...]) -> list[Path]:
    """Return the packages of the newest kernel in a Debian suite, from the cache if they are there."""
    uri = debian_archive.mirror()
    if uri is None:
        skip_or_fail("no Debian mirror in /etc/apt to take kernels from")
    suite = debian_archive.Suite(uri, suite_name, CACHE / "apt")
    try:
        suite.update()
        names = [name for name in suite.names(pattern) if not name.endswith(("-dbg", "-unsigned"))]
        newest = max(names, key=_version).removeprefix("linux-image-")
        return [suite.download(f"linux-{kind}-{newest}", CACHE / "packages") for kind in kinds]
    except (subprocess.CalledProcessError, ValueError) as error:
        skip_or_fail(f"no kernel from Debian {suite_name}: {error}")


def _version(name: str) -> list[int]:
    release = name.removeprefix("linux-image-").split("+")[0]
    return [int(part) for part in release.split(".")]


def test_debian_stables_kernel_is_built_without_tdx(capsys: pytest.CaptureFixture[str]) -> None:
    (package,) = packages("trixie", r"linux-image-6\.12\.\d+\+deb13-cloud-amd64", ("image",))
    code, report = report_of(capsys, package)
    assert code == 1
    assert "built without TDX" in report["summary"]
    found = statuses(report)
    assert found["CONFIG_KVM_INTEL"] == "ok"
    assert found["CONFIG_INTEL_TDX_HOST"] == found["CONFIG_KVM_INTEL_TDX"] == found["kvm_intel.tdx"] == "off"
    assert found["kvm_tdx_cmd"] == "note"  # not described, and why
    assert "differs" not in found.values()
    assert len(report["build_id"]) == 40
    assert agreeing(report) > 50  # what it shares with a kernel that has TDX is as the binding has it


def test_debians_split_packages_are_one_kernel_without_tdx(capsys: pytest.CaptureFixture[str]) -> None:
    given = packages("trixie-backports", r"linux-image-7\.(?:[3-9]|\d\d)[\d.]*\+deb13-cloud-amd64", SPLIT)
    code, report = report_of(capsys, *given)
    assert code == 1
    assert statuses(report)["CONFIG_INTEL_TDX_HOST"] == "off"
    assert statuses(report)["CONFIG_KVM_GUEST_MEMFD"] == "ok"
    assert report["types_from"] == "BTF of vmlinux, kvm-intel.ko, kvm.ko"
    assert agreeing(report) > 50
    assert main(["abi", str(given[0])]) == 2
    assert "split over several packages; give also linux-base-7." in capsys.readouterr().err


# ---- built here ----


@pytest.fixture(scope="module")
def good() -> Kernel:
    """Return the kernel with TDX that `make tdx-kernel` built."""
    return built("good") or skip_or_fail("no kernel with TDX in .cache/tdx-kernel: make tdx-kernel")


def assert_fits(code: int, report: dict[str, Any]) -> None:
    assert code == 0, report["summary"]
    assert report["dialect"] == "mainline"
    assert {one["name"]: one["agreement"] for one in report["structures"] if one["agreement"] != "agrees"} == {}
    assert agreeing(report) > 60
    assert set(statuses(report).values()) == {"ok"}


def test_a_package_with_tdx_fits(good: Kernel, capsys: pytest.CaptureFixture[str]) -> None:
    code, report = report_of(capsys, good.deb)
    assert_fits(code, report)
    assert report["types_from"].startswith("BTF of vmlinux, ")


@pytest.mark.parametrize("types", ["btf", "dwarf"])
def test_btf_and_dwarf_of_the_same_build_say_the_same(
    good: Kernel, types: str, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [good.debug / name for name in ("vmlinux", "kvm.ko", "kvm-intel.ko")]
    code, report = report_of(capsys, "--types", types, *files)
    assert_fits(code, report)
    assert report["types_from"].startswith(f"{types.upper()} of vmlinux, ")


def test_an_image_with_its_modules_beside_it_fits(
    good: Kernel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    subprocess.run(["dpkg-deb", "-x", str(good.deb), str(tmp_path)], check=True)
    (image,) = (tmp_path / "boot").glob("vmlinuz-*")
    assert_fits(*report_of(capsys, image))
    # Without its modules nothing says what KVM's structures are like, and that is no pass.
    alone = tmp_path / "bzImage"
    image.rename(alone)
    code, report = report_of(capsys, alone)
    assert code == 2
    assert statuses(report)["kvm_tdx_cmd"] == statuses(report)["kvm_intel.tdx"] == "unknown"
    assert statuses(report)["CONFIG_KVM_INTEL_TDX"] == "ok"  # CONFIG_IKCONFIG


def test_build_id_is_the_one_that_readelf_shows(good: Kernel, capsys: pytest.CaptureFixture[str]) -> None:
    _, report = report_of(capsys, good.deb)
    shown = subprocess.run(["readelf", "-n", str(good.debug / "vmlinux")], check=True, capture_output=True, text=True)
    assert f"Build ID: {report['build_id']}" in shown.stdout


def test_the_recording_that_the_gate_compares_with_is_of_the_same_layouts(good: Kernel) -> None:
    from tdxhw.abi import btf
    from tdxhw.abi.binding import COMMANDS, KVM, TDX
    from tests.unit.abi.test_compare import PARTS, kernel_types

    base = btf.read(good.debug / "vmlinux")
    now = [*(btf.read(good.debug / f"{name}.ko", good.debug / "vmlinux", base) for name in ("kvm-intel", "kvm")), base]
    recorded = kernel_types(PARTS)
    for bound in (*TDX["mainline"], *KVM["mainline"]):
        layouts = [[layout for part in types for layout in part.layouts(bound.name)] for types in (now, recorded)]
        assert layouts[0] == layouts[1], bound.name
    commands = COMMANDS["mainline"].name
    numbers = [[one for part in types for one in part.enumerations(commands)] for types in (now, recorded)]
    assert numbers[0] == numbers[1] != []


def test_the_running_kernel_can_be_asked(capsys: pytest.CaptureFixture[str]) -> None:
    if not Path("/sys/kernel/btf/vmlinux").exists():
        pytest.skip("this kernel has no BTF")
    code, report = report_of(capsys, "running")
    assert code in (0, 1, 2)
    assert report["types_from"].startswith("BTF of vmlinux")
    assert statuses(report).get("CONFIG_KVM_INTEL") in ("ok", "off", "unknown")
