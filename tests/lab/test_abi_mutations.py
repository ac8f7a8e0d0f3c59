"""A kernel whose structures are not ours: real headers, altered, through a real compiler and a real BTF encoder."""

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tdxhw.cli import main
from tests.lab.missing import skip_or_fail
from tests.unit.abi.samples import CONFIG

HEADERS = Path(__file__).parents[2] / ".cache" / "uapi-headers" / "usr" / "include"
KVM_H = "x86_64-linux-gnu/asm/kvm.h"
PROGRAM = """\
#include <linux/kvm.h>
#ifdef V17
struct kvm_tdx_cmd { __u32 id; __u32 flags; __u64 data; __u64 error; };
struct kvm_tdx_cpuid_config { __u32 leaf, sub_leaf, eax, ebx, ecx, edx; };
struct kvm_tdx_capabilities {
	__u64 attrs_fixed0, attrs_fixed1, xfam_fixed0, xfam_fixed1;
	__u32 supported_gpaw, padding;
	__u64 reserved[251];
	__u32 nr_cpuid_configs;
	struct kvm_tdx_cpuid_config cpuid_configs[];
};
struct kvm_tdx_init_vm {
	__u64 attributes;
	__u64 mrconfigid[6], mrowner[6], mrownerconfig[6];
	__u64 reserved[1004];
	struct kvm_cpuid2 cpuid;
};
struct kvm_tdx_init_mem_region { __u64 source_addr, gpa, nr_pages; };
struct kvm_tdx_cpuid_config config;
#endif
const char banner[] = "Linux version 7.2.13-mutated (someone@somewhere) #1 SMP";
struct kvm_tdx_cmd cmd;
struct kvm_tdx_capabilities *capabilities(struct kvm_tdx_capabilities *p) { p->reserved[0] = 0; return p; }
struct kvm_tdx_init_vm *init_vm(struct kvm_tdx_init_vm *p) { p->reserved[0] = 0; return p; }
struct kvm_tdx_init_mem_region region;
struct kvm_run run;
struct kvm_regs regs;
"""

Built = Callable[..., dict[str, Any]]


@pytest.fixture
def build(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Built:
    """Compile a kernel's structures with altered headers, and return what `abi` says of them."""
    for program in ("cc", "pahole", "bpftool"):
        if shutil.which(program, path="/usr/bin:/usr/sbin:/bin:/sbin") is None:
            skip_or_fail(f"no {program}: `make test-lab` installs it")
    if not (HEADERS / KVM_H).exists():
        skip_or_fail("no headers with KVM_TDX_*: make uapi-headers")

    def run(old: str = "", new: str = "", types: str = "btf", defines: tuple[str, ...] = ()) -> dict[str, Any]:
        include = tmp_path / "include"
        shutil.copytree(HEADERS, include, dirs_exist_ok=True)
        header = include / KVM_H
        text = header.read_text()
        if old:
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        if "-DV17" in defines:
            text = re.sub(r"struct kvm_tdx_\w+ \{.*?\n\};\n", "", text, flags=re.DOTALL)
            assert "struct kvm_tdx_" not in text
        header.write_text(text)
        source = tmp_path / "kernel.c"
        source.write_text(PROGRAM)
        vmlinux = tmp_path / "vmlinux"
        flags = ["-g", "-O0", "-c", *defines, f"-I{include}", f"-I{include}/x86_64-linux-gnu"]
        subprocess.run(["cc", *flags, str(source), "-o", str(vmlinux)], check=True)
        if types == "btf":
            subprocess.run(["pahole", "-J", str(vmlinux)], check=True)
        root = tmp_path / "root"
        lib = root / "usr/lib/debug/lib/modules/7.2.13-mutated"
        lib.mkdir(parents=True)
        shutil.copy(vmlinux, lib / "vmlinux")
        (root / "boot").mkdir()
        (root / "boot/config-7.2.13-mutated").write_text(CONFIG)
        main(["abi", "--json", "--types", types, str(root)])
        (report,) = json.loads(capsys.readouterr().out)
        assert isinstance(report, dict)
        return report

    return run


def differences(report: dict[str, Any]) -> list[str]:
    return [one["text"] for structure in report["structures"] for one in structure["differences"]]


def agreeing(report: dict[str, Any]) -> set[str]:
    return {one["name"] for one in report["structures"] if one["agreement"] == "agrees"}


TDX = {"kvm_tdx_cmd", "kvm_tdx_capabilities", "kvm_tdx_init_vm", "kvm_tdx_init_mem_region"}


@pytest.mark.parametrize("types", ["btf", "dwarf"])
def test_the_headers_as_they_are_agree(build: Built, types: str) -> None:
    report = build(types=types)
    assert differences(report) == []
    assert agreeing(report) >= TDX | {"kvm_run", "kvm_regs"}


@pytest.mark.parametrize("types", ["btf", "dwarf"])
@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        pytest.param(
            "\t__u64 xfam;\n\t__u64 mrconfigid[6];",
            "\t__u64 xfam;\n\t__u64 added;\n\t__u64 mrconfigid[6];",
            [
                "kvm_tdx_init_vm: 272 bytes in the kernel, 264 here",
                "kvm_tdx_init_vm.mrconfigid: offset 24 in the kernel, 16 here",
                "kvm_tdx_init_vm.mrowner: offset 72 in the kernel, 64 here",
                "kvm_tdx_init_vm.mrownerconfig: offset 120 in the kernel, 112 here",
                "kvm_tdx_init_vm.reserved: offset 168 in the kernel, 160 here",
                "kvm_tdx_init_vm.cpuid: offset 264 in the kernel, 256 here",
            ],
            id="a field inserted",
        ),
        pytest.param(
            "\t__u64 gpa;\n\t__u64 nr_pages;",
            "\t__u64 nr_pages;\n\t__u64 gpa;",
            [
                "kvm_tdx_init_mem_region.gpa: offset 16 in the kernel, 8 here",
                "kvm_tdx_init_mem_region.nr_pages: offset 8 in the kernel, 16 here",
            ],
            id="two fields swapped",
        ),
        pytest.param(
            "\t__u64 hw_error;",
            "\t__u32 hw_error;\n\t__u32 more;",
            ["kvm_tdx_cmd.hw_error: 4 bytes in the kernel, 8 here"],
            id="a field halved",
        ),
    ],
)
def test_an_altered_header_is_named_with_its_offsets(
    build: Built, types: str, old: str, new: str, expected: list[str]
) -> None:
    report = build(old, new, types)
    assert differences(report) == expected
    assert report["verdict"] == "does-not"


def test_a_kernel_with_v17s_structures_speaks_v17(build: Built) -> None:
    report = build(types="dwarf", defines=("-DV17",))
    assert report["dialect"] == "v17"
    assert agreeing(report) >= TDX | {"kvm_tdx_cpuid_config"}
    # These headers are mainline's, so kvm_run has mainline's exit; v17's is missed, and named.
    assert any(text.startswith("kvm_run.tdx.type: not in the kernel") for text in differences(report))
