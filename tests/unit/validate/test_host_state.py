"""Before and after: what is ours and not back, and what is only told."""

from typing import Any

import pytest

from tdxhw.validate.host_state import differences

BEFORE: dict[str, Any] = {
    "release": "6.1", "build_id": "aa" * 20, "cmdline": "ro", "packages": "a 1\nb 1", "boot_files": ["vmlinuz-6.1"],
    "module_folders": ["6.1"], "grub_digest": "cc", "parameters": {"kvm_intel.tdx": "Y"}, "tainted": 0,
    "modules": ["kvm"], "hkids": 31, "hkids_used": 0, "memory_kib": 1 << 20, "tdx_log": ["module initialized"],
    "grub": {"environment": "saved_entry=x\n", "custom": None},
}  # fmt: skip


def told(**changes: object) -> list[tuple[str, bool]]:
    return [(str(one), one.is_ours) for one in differences(BEFORE, BEFORE | changes)]


def test_a_host_that_is_as_it_was_differs_in_nothing() -> None:
    assert told() == []
    assert told(memory_kib=(1 << 20) - 100) == [], "two boots differ by some pages"
    assert told(grub={"environment": "saved_entry=x\nnext_entry=\n", "custom": ""}) == [], "unset is empty"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"release": "7.2"}, "not restored: kernel: 6.1 → 7.2"),
        ({"packages": "a 1\nb 1\nc 1"}, "not restored: packages: 2 → 3 (+c 1)"),
        ({"boot_files": []}, "not restored: files in /boot: 1 → 0 (-vmlinuz-6.1)"),
        ({"module_folders": ["6.1", "7.2"]}, "not restored: folders in /lib/modules: 1 → 2 (+7.2)"),
        ({"grub_digest": "dd"}, "not restored: GRUB's menu: cc → dd"),
        ({"grub": {"environment": "", "custom": None}}, "not restored: GRUB's environment: ['saved_entry=x'] → -"),
    ],
)
def test_what_was_changed_and_is_not_back_is_ours(changes: dict[str, Any], expected: str) -> None:
    assert told(**changes) == [(expected, True)]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"hkids_used": 2}, "HKIDs in use: 0 → 2"),
        ({"tainted": 512}, "taint: 0 → 512"),
        ({"cmdline": "ro quiet"}, "command line: ro → ro quiet"),
        ({"parameters": {"kvm_intel.tdx": "N"}}, "module parameters: 1 → 1 (+kvm_intel.tdx=N -kvm_intel.tdx=Y)"),
        ({"modules": ["kvm", "lkdtm"]}, "loaded modules: 1 → 2 (+lkdtm)"),
        ({"memory_kib": 1 << 19}, "usable memory: 1048576 KiB → 524288 KiB"),
        ({"tdx_log": []}, "what the kernel says about the TDX module: 1 → 0 (-module initialized)"),
    ],
)
def test_what_a_reboot_changed_is_told(changes: dict[str, Any], expected: str) -> None:
    assert told(**changes) == [(f"differs after the reboot: {expected}", False)]
