"""Record what bpftool says of what the binding shares with a real kernel, for the tests of the gate.

``python -m tools.tdx_kernel.record_types`` reads the kernel ``good`` (``make tdx-kernel``) and writes
``tests/golden/abi/kernel-types.json.gz``: for vmlinux and each module, bpftool's answer, cut down to those structures
and enumerations and what they refer to.
"""

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

from tdxhw.abi.binding import COMMANDS, KVM, TDX
from tools.tdx_kernel.variants import built

TARGET: Final = Path(__file__).parents[2] / "tests" / "golden" / "abi" / "kernel-types.json.gz"
PARTS: Final = ("vmlinux", "kvm", "kvm-intel")


def dump(folder: Path, part: str) -> list[dict[str, Any]]:
    """Return every type of a part, as bpftool says it."""
    base = [] if part == "vmlinux" else ["--base-btf", str(folder / "vmlinux")]
    file = folder / (part if part == "vmlinux" else f"{part}.ko")
    done = subprocess.run(
        ["bpftool", "--json", *base, "btf", "dump", "file", str(file)], check=True, capture_output=True
    )
    types: list[dict[str, Any]] = json.loads(done.stdout)["types"]
    return types


def references(one: dict[str, Any]) -> list[int]:
    """Return the types that one type is made of, not what it points to."""
    if one["kind"] == "PTR":
        return []
    found = [member["type_id"] for member in one.get("members", ())]
    return [*found, one["type_id"]] if "type_id" in one else found


def main() -> int:
    """Record. Exit 2 when the kernel was not built."""
    kernel = built("good")
    if kernel is None:
        print("no kernel: make tdx-kernel", file=sys.stderr)
        return 2
    every = {part: dump(kernel.debug, part) for part in PARTS}
    by_number = {part: {one["id"]: one for one in types} for part, types in every.items()}
    names = {("STRUCT", bound.name) for group in (TDX, KVM) for bounds in group.values() for bound in bounds}
    names |= {("ENUM", bound.name) for bound in COMMANDS.values()}
    kept: dict[str, dict[int, dict[str, Any]]] = {part: {} for part in PARTS}
    for part in PARTS:
        todo = [one["id"] for one in every[part] if (one["kind"], one["name"]) in names]
        while todo:
            number = todo.pop()
            home = part if number in by_number[part] else "vmlinux"
            if number and number not in kept[home]:
                kept[home][number] = by_number[home][number]
                todo += references(kept[home][number])
    document = {
        "provenance": f"{kernel.source}, tools/tdx_kernel/tdx-host.config, gcc and pahole of Debian 12",
        "parts": {part: {"types": [kept[part][number] for number in sorted(kept[part])]} for part in PARTS},
    }
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    TARGET.write_bytes(gzip.compress(json.dumps(document, separators=(",", ":")).encode(), mtime=0))
    print(f"{TARGET}: {', '.join(f'{part} {len(types)} types' for part, types in kept.items())}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
