"""Dialect detection: from capability answers alone, never from versions and never by trying a VM type."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uapi_ctypes.dialect import DIALECTS, MAINLINE, V17, CommandFd, Dialect, detect
from uapi_ctypes.kvm import KvmCap

VM_TYPES = int(KvmCap.KVM_CAP_VM_TYPES)
PRE_FAULT = int(KvmCap.KVM_CAP_PRE_FAULT_MEMORY)
BUS_LOCK = int(KvmCap.KVM_CAP_X86_BUS_LOCK_EXIT)

HOSTS: list[tuple[str, dict[int, int], Dialect | None]] = [
    ("mainline TDX", {VM_TYPES: 0b100011, PRE_FAULT: 1, BUS_LOCK: 3}, MAINLINE),
    ("mainline TDX without software-protected VMs", {VM_TYPES: 0b100001, PRE_FAULT: 1, BUS_LOCK: 3}, MAINLINE),
    ("mainline Intel without TDX", {VM_TYPES: 0b11, PRE_FAULT: 1, BUS_LOCK: 3}, None),
    ("mainline SEV, SEV-ES and SNP", {VM_TYPES: 0b11111, PRE_FAULT: 1}, None),
    ("mainline SEV and SEV-ES", {VM_TYPES: 0b1111, PRE_FAULT: 1}, None),
    ("mainline SEV only", {VM_TYPES: 0b101, PRE_FAULT: 1}, None),
    ("mainline SEV only, CPU with bus lock detection", {VM_TYPES: 0b101, PRE_FAULT: 1, BUS_LOCK: 3}, None),
    ("6.10 SEV only", {VM_TYPES: 0b111}, None),
    ("6.10 SEV and SEV-ES", {VM_TYPES: 0b1111}, None),
    ("v17 TDX", {VM_TYPES: 0b111, BUS_LOCK: 3}, V17),
    ("v17 TDX without software-protected VMs", {VM_TYPES: 0b101, BUS_LOCK: 3}, V17),
    ("v17 tree on an SNP host", {VM_TYPES: 0b1011}, None),
    ("v17 tree without TDX", {VM_TYPES: 0b11, BUS_LOCK: 3}, None),
    ("6.8-based tree with a later series", {VM_TYPES: 0b111, PRE_FAULT: 1, BUS_LOCK: 3}, None),
    ("before KVM_CAP_VM_TYPES", {}, None),
]


@pytest.mark.parametrize(("answers", "dialect"), [host[1:] for host in HOSTS], ids=[host[0] for host in HOSTS])
def test_recognises(answers: dict[int, int], dialect: Dialect | None) -> None:
    assert detect(lambda cap: answers.get(cap, 0)) is dialect


@given(st.integers(0, 63), st.integers(0, 1), st.integers(0, 3))
def test_never_names_a_vm_type_that_the_kernel_does_not_offer(types: int, pre_fault: int, bus_lock: int) -> None:
    answers = {VM_TYPES: types, PRE_FAULT: pre_fault, BUS_LOCK: bus_lock}
    dialect = detect(lambda cap: answers.get(cap, 0))
    assert (dialect is MAINLINE) == bool(types >> 5 & 1)
    if dialect is not None:
        assert types >> dialect.tdx_vm_type & 1


@pytest.mark.parametrize("dialect", DIALECTS.values(), ids=str)
def test_commands_are_numbered_without_gaps(dialect: Dialect) -> None:
    assert [command.id for command in dialect.commands] == list(range(6))


def test_commands_go_to_the_descriptor_of_their_dialect() -> None:
    assert [command.fd for command in MAINLINE.commands] == [
        CommandFd.VM,
        CommandFd.VM,
        CommandFd.VCPU,
        CommandFd.VCPU,
        CommandFd.VM,
        CommandFd.VCPU,
    ]
    assert [command.fd for command in V17.commands] == [
        CommandFd.VM,
        CommandFd.VM,
        CommandFd.VCPU,
        CommandFd.VM,
        CommandFd.VM,
        CommandFd.VM,
    ]


def test_number_five_is_a_different_command_in_each_dialect() -> None:
    assert MAINLINE.command_name(5) == "KVM_TDX_GET_CPUID"
    assert V17.command_name(5) == "KVM_TDX_RELEASE_VM"
    assert MAINLINE.command_name(6) == "KVM_MEMORY_ENCRYPT_OP(6)"
