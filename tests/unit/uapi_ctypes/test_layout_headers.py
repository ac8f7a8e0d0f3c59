"""The binding against the C compiler: every structure, field, number and flag of the kernel headers.

Runs twice: on the machine's own headers, whatever their age, and on headers with KVM_TDX_* (Linux 6.16 or
later), which `make uapi-headers` fetches into `.cache/` and TDXHW_UAPI_HEADERS may name instead. A line of the
probe that does not compile is something these headers do not have; on the newer ones nothing may be missing.
"""

import ctypes
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from enum import IntEnum, IntFlag
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from uapi_ctypes import caps, ioctl, kvm, kvm_run, kvm_state, tdx_mainline

ROOT = Path(__file__).parents[3]
MODULES: tuple[ModuleType, ...] = (caps, ioctl, kvm, kvm_run, kvm_state, tdx_mainline)

# Ours, not the header's: v16 and v17 numbers, and a limit that the kernel keeps to itself.
NOT_IN_HEADERS = {
    "KVM_EXIT_TDX_VMCALL_V17",
    "KVM_GUEST_MEMFD_ALLOW_HUGEPAGE_V17",
    "KVM_SET_MEMORY_ATTRIBUTES_V16",
    "KVM_X86_TDX_VM_V17",
    "KVM_MAX_CPUID_ENTRIES",
}
# C spells these paths differently.
C_PATHS = {
    "debug.exception": "debug.arch.exception",
    "debug.pad": "debug.arch.pad",
    "debug.pc": "debug.arch.pc",
    "debug.dr6": "debug.arch.dr6",
    "debug.dr7": "debug.arch.dr7",
    "debugreg": "arch.debugreg",
}
SKIPPED_PATHS = re.compile(r"tdx_v17\b|^u$|\bpad(ding)?\d*$|^reserved$|^_")


def members(layout: Any, prefix: str = "") -> Iterator[tuple[str, int, int]]:
    """Yield path, offset and size [bytes] of every field, anonymous members looked through."""
    anonymous = getattr(layout, "_anonymous_", ())
    for member in layout._fields_:
        name, kind = member[0], member[1]
        offset = getattr(layout, name).offset
        nested = isinstance(kind, type) and issubclass(kind, (ctypes.Structure, ctypes.Union))
        inner = "" if name in anonymous else f"{prefix}{name}."
        if name not in anonymous:
            yield f"{prefix}{name}", offset, ctypes.sizeof(kind)
        if nested:
            for path, deeper, size in members(kind, inner if name not in anonymous else prefix):
                yield path, offset + deeper, size


def structures() -> Iterator[tuple[str, type[Any]]]:
    """Yield the C name and the class of every structure that names one in its docstring."""
    for module in MODULES:
        for layout in vars(module).values():
            if isinstance(layout, type) and issubclass(layout, (ctypes.Structure, ctypes.Union)):
                named = re.match(r"``struct (\w+)``", layout.__doc__ or "")
                if named and layout.__module__ == module.__name__:
                    yield named[1], layout


def expectations() -> dict[str, tuple[str, int]]:
    """Return, for each thing to check, its C expression and the binding's value."""
    wanted: dict[str, tuple[str, int]] = {}
    for c_name, layout in structures():
        wanted[f"sizeof {c_name}"] = (f"sizeof(struct {c_name})", ctypes.sizeof(layout))
        for path, offset, size in members(layout):
            if SKIPPED_PATHS.search(path) or size == 0:
                continue
            c_path = C_PATHS.get(path, path)
            wanted[f"offset {c_name}.{path}"] = (f"offsetof(struct {c_name}, {c_path})", offset)
            if path != "debug":  # C wraps it once more
                wanted[f"size {c_name}.{path}"] = (f"sizeof(((struct {c_name} *)0)->{c_path})", size)
    for module in MODULES:
        for name, value in vars(module).items():
            if isinstance(value, type) and issubclass(value, (IntEnum, IntFlag)):
                for member in value:
                    if re.match(r"(KVM|GUEST_MEMFD)_", member.name or ""):
                        wanted[str(member.name)] = (str(member.name), int(member))
            elif isinstance(value, int) and name.startswith("KVM_"):
                wanted[name] = (name, int(value))
    return {key: value for key, value in wanted.items() if key not in NOT_IN_HEADERS}


def probe(include: list[Path], work: Path) -> tuple[dict[str, int], set[str]]:
    """Compile and run a C program against the headers: what it says, and what the headers do not have."""
    compiler = shutil.which("cc") or pytest.skip("no C compiler (cc) on this machine")
    flags = [f"-I{directory}" for directory in include]
    wanted = expectations()
    lines = {key: f'    {{"{key}", (unsigned long long)({c})}},' for key, (c, _) in wanted.items()}
    head = "#include <stddef.h>\n#include <stdio.h>\n#include <linux/kvm.h>\n#include <linux/kvm_para.h>\n"
    head += "static const struct { const char *name; unsigned long long value; } probes[] = {\n"
    tail = (
        "};\nint main(void) { for (size_t i = 0; i < sizeof(probes) / sizeof(*probes); i++) "
        'printf("%s=%llu\\n", probes[i].name, probes[i].value); }\n'
    )
    source = work / "probe.c"

    source.write_text(head + "\n".join(lines.values()) + "\n" + tail)
    first = head.count("\n") + 1
    checked = subprocess.run(
        [compiler, "-fsyntax-only", *flags, str(source)], capture_output=True, text=True, check=False
    )
    failed = {int(number) - first for number in re.findall(r"probe\.c:(\d+):\d+: error", checked.stderr)}
    keys = list(lines)
    missing = {keys[number] for number in failed if 0 <= number < len(keys)}

    source.write_text(head + "\n".join(line for key, line in lines.items() if key not in missing) + "\n" + tail)
    program = work / "probe"
    built = subprocess.run(
        [compiler, *flags, str(source), "-o", str(program)], capture_output=True, text=True, check=False
    )
    assert built.returncode == 0, built.stderr
    output = subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout
    said = {name: int(value) for name, value in (line.rsplit("=", 1) for line in output.splitlines())}
    return said, missing


def newer_headers() -> list[Path]:
    """Return the include directories of Linux >= 6.16 headers, or skip saying how to get them."""
    named = os.environ.get("TDXHW_UAPI_HEADERS")
    root = Path(named) if named else ROOT / ".cache" / "uapi-headers" / "usr" / "include"
    if not (root / "linux" / "kvm.h").exists():
        pytest.skip(
            f"no linux/kvm.h in {root}: `make uapi-headers` fetches it, or set TDXHW_UAPI_HEADERS to an include "
            "directory of Linux >= 6.16"
        )
    return [directory for directory in (root, root / "x86_64-linux-gnu") if directory.is_dir()]


def test_agrees_with_the_machines_own_headers(tmp_path: Path) -> None:
    if not Path("/usr/include/linux/kvm.h").exists():
        pytest.skip("no /usr/include/linux/kvm.h: install linux-libc-dev")
    said, missing = probe([], tmp_path)
    wanted = expectations()
    assert {key: value for key, value in said.items() if value != wanted[key][1]} == {}
    assert len(said) > len(wanted) // 2, f"implausibly much is missing: {sorted(missing)}"


def test_agrees_with_headers_that_have_tdx(tmp_path: Path) -> None:
    include = newer_headers()
    said, missing = probe(include, tmp_path)
    wanted = expectations()
    assert {key: value for key, value in said.items() if value != wanted[key][1]} == {}
    assert sorted(missing) == []
    assert said["offset kvm_tdx_capabilities.cpuid"] == 2048


def test_the_probe_notices_a_wrong_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not Path("/usr/include/linux/kvm.h").exists():
        pytest.skip("no /usr/include/linux/kvm.h: install linux-libc-dev")
    wrong = {"KVM_RUN": ("KVM_RUN", 0xAE81), "sizeof kvm_nothing": ("sizeof(struct kvm_nothing)", 1)}
    monkeypatch.setitem(globals(), "expectations", lambda: wrong)
    said, missing = probe([], tmp_path)
    assert said == {"KVM_RUN": 0xAE80}
    assert missing == {"sizeof kvm_nothing"}
