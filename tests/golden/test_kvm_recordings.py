"""The simulated KVM answers every recorded call as the two real kernels did."""

from pathlib import Path

import pytest

from sim_backend.kvm_replay import Divergence, replay

RECORDINGS = Path(__file__).parent / "kvm"
FILES = sorted(RECORDINGS.glob("*/*.jsonl.gz"))

# kvm_pvm adds leaves of its own to every table that KVM_SET_CPUID2 sets.
PVM_ADDS_CPUID_LEAVES = {
    "cpuid/cpu.0.supported step 8",
    "cpuid/cpu.0.get_small step 9",
    "cpuid/cpu.0.get_small step 10",
    "cpuid/cpu.0.get_small step 11",
    "cpuid/cpu.0.after_run_diff step 15",
    "cpuid/cpu.0.kvmleaf step 7",
    "run_misc/guest_cpuid.cpuid1.set step 12",
}
# Its shadow MMU runs out of roots where there is no memory at all, and takes an unwritable buffer for MMIO.
PVM_SHADOW_MMU = {
    "run_misc/entry.0.no_memory_real step 7",
    "run_misc/more.ro_hva step 15",
    "run_misc/more.ro_hva step 16",
}
KNOWN = {"kvm-6.18-pvm": PVM_ADDS_CPUID_LEAVES | PVM_SHADOW_MMU, "kvm-7.2.13-svm-nested": set()}


def test_both_kernels_and_every_group_are_there() -> None:
    assert len(FILES) == 56
    assert {path.parent.name for path in FILES} == set(KNOWN)


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.name.partition('.')[0]}")
def test_every_answer_agrees(path: Path) -> None:
    records = 0
    divergences: list[Divergence] = []
    for _, divergence in replay(path):
        records += 1
        if divergence is not None and divergence.note not in KNOWN[path.parent.name]:
            divergences.append(divergence)
    story = "\n".join(
        f"{each.note} {each.record['req']}:\n  expected {each.expected}\n  got      {each.got}"
        for each in divergences[:3]
    )
    assert records > 10
    assert not divergences, f"{len(divergences)} of {records} answers differ\n{story}"
