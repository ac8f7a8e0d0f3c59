"""``tdxhw abi`` as a user sees it, with a bpftool that answers for a real kernel."""

import errno
import json
import lzma
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tdxhw.abi import kconfig
from tdxhw.abi.binding import COMMANDS, TDX
from tdxhw.abi.check import Status, check
from tdxhw.abi.kernel_files import KernelFiles
from tdxhw.cli import main
from tests.unit.abi.samples import (
    CONFIG,
    RELEASE,
    bzimage,
    classic_package,
    deb,
    fake_bpftool,
    module,
    recorded,
    types_of,
    vmlinux,
)

LIB = f"usr/lib/modules/{RELEASE}/kernel/arch/x86/kvm"
Abi = Callable[..., tuple[int, str]]


@pytest.fixture
def bpftool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, Any]], None]:
    """Put a bpftool on the PATH that gives these answers; at first those of a real kernel."""

    def answer(answers: dict[str, Any]) -> None:
        monkeypatch.setenv("PATH", str(fake_bpftool(tmp_path / "bin", answers)))

    answer(recorded())
    return answer


@pytest.fixture
def abi(tmp_path: Path, bpftool: object, capsys: pytest.CaptureFixture[str]) -> Abi:
    """Run it on packages with these files; return the exit code and what it says."""

    def run(*packages: dict[str, bytes], options: tuple[str, ...] = ()) -> tuple[int, str]:
        given = []
        for number, files in enumerate(packages):
            path = tmp_path / f"linux-image-{number}.deb"
            path.write_bytes(deb(files))
            given.append(str(path))
        code = main(["abi", *options, *given])
        output = capsys.readouterr()
        return code, output.out + output.err

    return run


def test_a_kernel_that_fits_is_zero_and_one_summary_line(abi: Abi) -> None:
    code, said = abi(classic_package())
    assert code == 0, said
    assert said.splitlines()[-1] == (
        f"{RELEASE} (linux-image-0.deb): can run TDs, dialect mainline; "
        "64 structures agree, by BTF of vmlinux, kvm-intel.ko, kvm.ko"
    )
    assert f"configuration from linux-image-0.deb:boot/config-{RELEASE}" in said


@pytest.mark.parametrize("option", ["INTEL_TDX_HOST", "KVM_INTEL_TDX"])
def test_an_option_that_is_off_is_one_and_says_how_to_set_it(abi: Abi, option: str) -> None:
    config = CONFIG.replace(f"CONFIG_{option}=y", f"# CONFIG_{option} is not set")
    code, said = abi(classic_package(config))
    assert code == 1
    assert f"build with CONFIG_{option}=y" in said
    assert said.splitlines()[-1].endswith(f"built without TDX; first: CONFIG_{option}: not set")


def test_what_an_option_depends_on_is_said_too(abi: Abi) -> None:
    config = CONFIG.replace("CONFIG_INTEL_TDX_HOST=y\n", "").replace("CONFIG_X86_X2APIC=y\n", "")
    _, said = abi(classic_package(config))
    assert "build with CONFIG_INTEL_TDX_HOST=y, which needs CONFIG_X86_X2APIC=y" in said


@pytest.mark.parametrize(("release", "needs"), [("6.17.9", True), ("6.18.0-rc1", False), ("7.2.13", False)])
def test_an_older_kernel_needs_kexec_off(release: str, needs: bool) -> None:
    (option,) = (one for one in kconfig.OPTIONS if one.names == ("CONFIG_INTEL_TDX_HOST",))
    config = kconfig.parse(CONFIG.replace("CONFIG_INTEL_TDX_HOST=y", "CONFIG_KEXEC_CORE=y"))
    told = "build with CONFIG_INTEL_TDX_HOST=y"
    hint = ", which needs CONFIG_KEXEC_CORE=n (before Linux 6.18)"
    assert kconfig.remedy(option, config, release) == (told + hint if needs else told)


def test_a_kernel_from_before_tdx_is_not_told_to_set_what_it_has_not() -> None:
    (option,) = (one for one in kconfig.OPTIONS if one.names == ("CONFIG_KVM_INTEL_TDX",))
    assert kconfig.remedy(option, {}, "6.12.117+deb13").startswith("mainline has it since Linux 6.16: a newer kernel")
    backported = kconfig.parse("# CONFIG_KVM_INTEL_TDX is not set\nCONFIG_INTEL_TDX_HOST=y\n")
    assert kconfig.remedy(option, backported, "5.14.0-600.el9") == "build with CONFIG_KVM_INTEL_TDX=y"


def test_the_older_names_of_options_count(abi: Abi) -> None:
    config = CONFIG.replace("KVM_GUEST_MEMFD", "KVM_PRIVATE_MEM").replace(
        "HAVE_KVM_ARCH_GMEM_POPULATE", "KVM_GENERIC_PRIVATE_MEM"
    )
    code, said = abi(classic_package(config))
    assert code == 0, said
    assert "CONFIG_KVM_PRIVATE_MEM" in said


def test_without_a_configuration_it_cannot_tell(abi: Abi) -> None:
    files = classic_package()
    del files[f"boot/config-{RELEASE}"]
    code, said = abi(files)
    assert code == 2
    assert "cannot tell; first: CONFIG_KVM_INTEL: no configuration among what was given" in said


def test_the_configuration_inside_the_image_will_do(abi: Abi) -> None:
    files = classic_package()
    del files[f"boot/config-{RELEASE}"]
    files[f"boot/vmlinuz-{RELEASE}"] = bzimage(vmlinux(config=CONFIG))
    code, said = abi(files)
    assert code == 0, said
    assert "configuration from inside linux-image-0.deb:boot/vmlinuz" in said


def test_a_module_without_the_parameter_is_one(abi: Abi) -> None:
    files = classic_package()
    files[f"{LIB}/kvm-intel.ko.xz"] = lzma.compress(module(parameters={"ept": "bool"}))
    code, said = abi(files)
    assert code == 1
    assert "kvm-intel.ko has no parameter tdx" in said
    assert "kvm-intel.ko is of another build than this configuration" in said


def test_a_built_in_kvm_has_its_parameter_from_modules_builtin_modinfo(abi: Abi) -> None:
    files = {name: data for name, data in classic_package().items() if not name.endswith(".ko.xz")}
    files[f"boot/config-{RELEASE}"] = CONFIG.replace("KVM_INTEL=m", "KVM_INTEL=y").encode()
    files[f"usr/lib/modules/{RELEASE}/modules.builtin.modinfo"] = (
        b"kvm.license=GPL\0kvm_intel.parmtype=ept:bool\0kvm_intel.parmtype=tdx:bool\0"
    )
    _, said = abi(files)
    assert "bool (modules.builtin.modinfo)" in said


def test_a_built_in_kvm_without_that_is_unknown_and_no_module_is_asked_for(abi: Abi) -> None:
    files = {name: data for name, data in classic_package().items() if not name.endswith(".ko.xz")}
    files[f"boot/config-{RELEASE}"] = CONFIG.replace("KVM_INTEL=m", "KVM_INTEL=y").encode()
    code, said = abi(files)
    assert code == 2
    assert "kvm_intel is built in, and no modules.builtin.modinfo is among what was given" in said


def test_without_modules_it_cannot_tell_and_asks_for_them(abi: Abi) -> None:
    files = {name: data for name, data in classic_package().items() if not name.endswith(".ko.xz")}
    code, said = abi(files)
    assert code == 2
    assert "no kvm-intel.ko among what was given" in said
    assert "kvm_tdx_cmd" in said
    assert "not described by the kernel's type information" in said


def test_without_an_image_split_btf_cannot_be_read_and_it_says_so(abi: Abi) -> None:
    files = classic_package()
    del files[f"boot/vmlinuz-{RELEASE}"]
    code, said = abi(files)
    assert code == 2
    assert f"no kernel image of {RELEASE}: a module's BTF refers to the vmlinux it was built with" in said


def test_without_type_information_it_cannot_tell(abi: Abi) -> None:
    files = classic_package()
    bare = vmlinux().replace(b".BTF", b".nix")
    files[f"boot/vmlinuz-{RELEASE}"] = bzimage(bare)
    code, said = abi(files)
    assert code == 2
    assert "no type information: neither BTF (CONFIG_DEBUG_INFO_BTF=y) nor DWARF" in said


def test_a_module_without_btf_is_described_by_its_dwarf(
    abi: Abi, bpftool: Callable[[dict[str, Any]], None], tmp_path: Path
) -> None:
    """As without CONFIG_DEBUG_INFO_BTF_MODULES."""
    of_tdx = types_of({bound.name: bound.structure for bound in TDX["mainline"]})
    values = [{"name": one.name, "val": int(one)} for one in COMMANDS["mainline"].values]
    of_tdx["types"].append({"id": 10**6, "kind": "ENUM", "name": "kvm_tdx_cmd_id", "size": 4, "values": values})
    bpftool(recorded() | {"kvm-intel": of_tdx})
    pahole = tmp_path / "bin" / "pahole"
    pahole.write_text(f"#!{sys.executable}\nimport sys\nopen(sys.argv[sys.argv.index('-J') - 1], 'w').close()\n")
    pahole.chmod(0o755)
    files = classic_package()
    in_dwarf = module(RELEASE, {"tdx": "bool"}, **{".debug_info": b"DWARF"}).replace(b"\0.BTF\0", b"\0.nix\0")
    files[f"{LIB}/kvm-intel.ko.xz"] = lzma.compress(in_dwarf)
    code, said = abi(files)
    assert code == 0, said
    assert "structures from BTF of vmlinux, kvm.ko, DWARF of kvm-intel.ko" in said
    assert abi(files, options=("--types", "btf"))[0] == 2


def test_a_difference_is_one_and_named(abi: Abi, bpftool: Callable[[dict[str, Any]], None]) -> None:
    answers = recorded()
    for part in answers.values():
        for one in part["types"]:
            if one["name"] == "kvm_tdx_init_mem_region":
                one["members"][1]["bits_offset"] += 64
    bpftool(answers)
    code, said = abi(classic_package())
    assert code == 1
    assert "differs" in said
    assert said.splitlines()[-1].endswith(
        "1 difference from the binding; first: kvm_tdx_init_mem_region.gpa: offset 16 in the kernel, 8 here"
    )


def test_a_number_that_differs_is_one_and_named_in_the_document_too(
    abi: Abi, bpftool: Callable[[dict[str, Any]], None]
) -> None:
    answers = recorded()
    for one in answers["kvm-intel"]["types"]:
        if one["name"] == "kvm_tdx_cmd_id":
            one["values"][4]["val"] = 40
    bpftool(answers)
    code, said = abi(classic_package(), options=("--json",))
    assert code == 1
    (report,) = json.loads(said)
    assert report["summary"].endswith(
        "1 difference from the binding; first: kvm_tdx_cmd_id.KVM_TDX_FINALIZE_VM: 40 in the kernel, 4 here"
    )
    (difference,) = next(one for one in report["structures"] if one["name"] == "kvm_tdx_cmd_id")["differences"]
    assert (difference["kernel"], difference["binding"]) == ({"value": 40}, {"value": 4})


def test_a_structure_that_a_kernel_may_lack_is_not_counted_as_agreeing(
    abi: Abi, bpftool: Callable[[dict[str, Any]], None]
) -> None:
    answers = recorded()
    for part in answers.values():
        for one in part["types"]:
            if one["name"] == "kvm_one_reg":
                one["name"] = "renamed"
    bpftool(answers)
    code, said = abi(classic_package())
    assert code == 0
    assert "63 structures agree" in said.splitlines()[-1]


def test_the_worst_of_several_kernels_decides(abi: Abi) -> None:
    release = "7.3-other"
    other = {f"boot/vmlinuz-{release}": bzimage(vmlinux(release), release=release), f"boot/config-{release}": b"#\n"}
    code, said = abi(classic_package(), other)
    assert code == 1
    first, second = said.splitlines()[-2:]
    assert "can run TDs" in first
    assert second.startswith(f"{release} (linux-image-1.deb): built without TDX")


def test_json_is_one_document_with_every_structure(abi: Abi) -> None:
    code, said = abi(classic_package(), options=("--json",))
    assert code == 0
    (report,) = json.loads(said)
    assert report["verdict"] == "fits"
    assert report["dialect"] == "mainline"
    sizes = {one["name"]: one["size"] for one in report["structures"]}
    assert sizes["kvm_tdx_init_vm"] == 264
    assert {one["status"] for one in report["configuration"]} == {"ok"}


@pytest.mark.parametrize(("value", "status"), [("Y", Status.OK), ("N", Status.NOTE)])
def test_a_running_kernel_that_could_but_does_not_is_told(tmp_path: Path, value: str, status: Status) -> None:
    found = check(KernelFiles(RELEASE, tmp_path, parameter=value)).parameter
    assert [one.status for one in found] == [status]
    assert found[0].detail.startswith(f"{value} now")


def test_a_full_disk_is_two_and_one_line(
    abi: Abi, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(path: Path, _data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(KernelFiles, "add_image", lambda kernel, *_, **__: full(kernel.folder / "vmlinux", b""))
    code, said = abi(classic_package())
    assert code == 2
    assert said.startswith("tdxhw: ")
    assert said.endswith("No space left on device\n")
    assert said.count("\n") == 1


def test_what_cannot_be_read_is_two_and_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["abi", "/nowhere/vmlinuz"]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("tdxhw: /nowhere/vmlinuz: no such file")
    assert output.err.count("\n") == 1
