"""CPUID in a TD: configuration, run-time bits, and who answers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim_backend.cpu.engine import ExitReason
from sim_backend.hw.gprs import RAX, RBX, RCX, RDX
from sim_backend.seamcall_host import SeamcallError, SeamcallHost, TdParams
from sim_backend.tdx_module.cpuid_virtualization import (
    CPUID_CONFIG,
    CPUID_LOOKUP,
    LAST_BASE_LEAF,
    clamp_leaf,
    cpuid_index,
)
from tests.unit.tdx_module.guest_side import VE, Guest
from uapi_ctypes.tdx_leaves import SeamcallLeaf, TdcallLeaf
from uapi_ctypes.tdx_status import Operand, Status

LAST_EXTENDED = 0x8000_0008
TD_PARAMS_CPUID = 0x100
CR4_OSXSAVE = 1 << 18


@pytest.fixture
def guest(host: SeamcallHost) -> Guest:
    return Guest(host)


def cpuid(guest: Guest, leaf: int, subleaf: int = 0) -> tuple[int, int, int, int]:
    gprs = guest.cpu.gprs
    gprs[RAX], gprs[RCX] = leaf, subleaf
    assert guest.exit(ExitReason.CPUID) is None
    assert guest.cpu.injected == 0
    return gprs[RAX], gprs[RBX], gprs[RCX], gprs[RDX]


@given(st.integers(0, 0xFFFF_FFFF))
def test_leaves_beyond_the_last_read_as_the_last_base_leaf(leaf: int) -> None:
    clamped = clamp_leaf(leaf, LAST_EXTENDED)
    if leaf <= LAST_BASE_LEAF or 0x8000_0000 <= leaf <= LAST_EXTENDED or 0x4000_0000 <= leaf < 0x5000_0000:
        assert clamped == leaf
    else:
        assert clamped == LAST_BASE_LEAF


def test_every_line_of_the_table_is_found_by_its_leaf() -> None:
    for row in CPUID_LOOKUP:
        assert cpuid_index(row.leaf, 0 if row.subleaf is None else row.subleaf) == row.index


def test_a_td_is_identified_by_the_vendor_leaf(guest: Guest) -> None:
    eax, ebx, ecx, edx = cpuid(guest, 0x21)
    name = b"".join(register.to_bytes(4, "little") for register in (ebx, edx, ecx))
    assert (eax, name) == (0, b"IntelTDX    ")


def test_answers_complete_the_instruction_and_are_32_bits(guest: Guest) -> None:
    rip = guest.cpu.rip
    assert all(register < 1 << 32 for register in cpuid(guest, 1 | 0xABCD << 32))
    assert guest.cpu.rip == rip + 2


def test_the_initial_apic_id_is_the_vcpu_index(host: SeamcallHost) -> None:
    td = host.create_td()
    host.create_vcpu(td)
    second = host.create_vcpu(td)
    host.finalize(td)
    guest = Guest(host)
    guest.try_tdcall(TdcallLeaf.TDG_VP_VMCALL)
    guest.td, guest.tdvpr = td, second
    guest.enter()
    assert cpuid(guest, 1)[1] >> 24 == 1


def test_osxsave_follows_cr4(guest: Guest) -> None:
    assert not cpuid(guest, 1)[2] & 1 << 27
    guest.cpu.state.cr4 |= CR4_OSXSAVE
    assert cpuid(guest, 1)[2] & 1 << 27


def test_syscall_shows_in_64_bit_mode_only(guest: Guest) -> None:
    assert cpuid(guest, 0x8000_0001)[3] & 1 << 11
    guest.cpu.state.cs.ar &= ~(1 << 13)
    assert not cpuid(guest, 0x8000_0001)[3] & 1 << 11


@pytest.mark.parametrize(("leaf", "subleaf"), [(0x4000_0000, 0), (0x2, 0), (0x16, 0), (0x7, 5), (0x9, 0)])
def test_leaves_that_the_module_does_not_answer_become_a_ve(guest: Guest, leaf: int, subleaf: int) -> None:
    gprs = guest.cpu.gprs
    gprs[RAX], gprs[RCX] = leaf, subleaf
    assert guest.exit(ExitReason.CPUID) is None
    assert guest.cpu.injected == VE
    assert gprs[RAX] == leaf


@pytest.mark.parametrize(("cpl", "control", "is_ve"), [(0, 1, True), (0, 2, False), (3, 1, False), (3, 2, True)])
def test_a_guest_may_want_a_ve_by_privilege_level(guest: Guest, cpl: int, control: int, is_ve: bool) -> None:
    guest.tdcall(TdcallLeaf.TDG_VP_CPUIDVE_SET, rcx=control)
    guest.cpu.state.ss.ar = guest.cpu.state.ss.ar & ~(3 << 5) | cpl << 5
    guest.cpu.gprs[RAX], guest.cpu.gprs[RCX] = 1, 0
    guest.exit(ExitReason.CPUID)
    assert (guest.cpu.injected == VE) == is_ve


def configured(host: SeamcallHost, index: int, registers: list[int]) -> None:
    """Execute TDH.MNG.INIT with one CPUID_CONFIG entry set."""
    td = host.create_td(init=False)
    buffer = 8 << 20
    data = bytearray(TdParams().encode())
    at = TD_PARAMS_CPUID + 16 * index
    for number, register in enumerate(registers):
        data[at + 4 * number : at + 4 * number + 4] = register.to_bytes(4, "little")
    host.module.memory.write(buffer, bytes(data))
    host.call(SeamcallLeaf.TDH_MNG_INIT, rcx=td.tdr, rdx=buffer)


@pytest.mark.parametrize("index", range(len(CPUID_CONFIG)))
def test_a_td_may_ask_for_what_the_module_says_can_be_configured_and_for_nothing_else(
    host: SeamcallHost, index: int
) -> None:
    row = CPUID_CONFIG[index]
    registers = [0, 0, 0, 0]
    register, bit = next(
        (register, bit)
        for register in (3, 2, 1, 0)
        for bit in range(32)
        if not (row.config_direct[register] | row.allow_direct[register]) >> bit & 1
    )
    registers[register] = 1 << bit
    with pytest.raises(SeamcallError) as error:
        configured(host, index, registers)
    assert error.value.rax == Status.OPERAND_INVALID << 32 | Operand.CPUID_CONFIG
    assert error.value.regs[RCX] == row.leaf_subleaf
    configured(host, index, [0, 0, 0, 0])
