"""The state of ordinary vCPUs: registers, events, debugging, clocks, and what KVM refuses to set."""

import ctypes
import errno
from collections.abc import Callable
from typing import Any, Final

import pytest

from tdxhw.exits import HALT
from tdxhw.ordinary_vm import OrdinaryVm
from tdxhw.vmm import Guest, Vmm
from uapi_ctypes.caps import KvmCap
from uapi_ctypes.errors import KvmError
from uapi_ctypes.ioctl import KvmRequest
from uapi_ctypes.kvm import KvmMpStateValue
from uapi_ctypes.kvm_run import KvmExit
from uapi_ctypes.kvm_state import (
    KVM_GUESTDBG_ENABLE,
    KVM_GUESTDBG_SINGLESTEP,
    KVM_SYNC_X86_REGS,
    KVM_VCPUEVENT_VALID_NMI_PENDING,
    KvmDebugregs,
    KvmGuestDebug,
    KvmVcpuEvents,
)
from uapi_ctypes.vcpu import Vcpu

pytestmark = pytest.mark.requires("kvm", "vm-type-default")

MAKE_VM = Callable[..., OrdinaryVm]
MAKE_VMM = Callable[[Guest], Vmm]
HLT: Final = b"\xf4"
NOP: Final = b"\x90"
CMP_AX_AX: Final = b"\x39\xc0"
"""Sets every arithmetic flag: shifts, MUL and DIV leave some of them undefined."""
CR0_PE: Final = 1
CR0_PG: Final = 1 << 31
EFER_LME: Final = 1 << 8
EFER_LMA: Final = 1 << 10

GETTERS: Final = ("regs", "sregs", "sregs2", "fpu", "xsave", "xcrs", "debugregs", "vcpu_events")


@pytest.mark.parametrize("state", GETTERS)
def test_state_that_is_set_unchanged_reads_back_unchanged(ordinary_vm: MAKE_VM, state: str) -> None:
    vm = ordinary_vm()
    vcpu = vm.create_vcpu()
    vm.set_supported_cpuid(vcpu)
    get, put = getattr(vcpu, f"get_{state}"), getattr(vcpu, f"set_{state}")
    before = get()

    put(before)

    assert bytes(get()) == bytes(before)


@pytest.mark.parametrize("state", [*GETTERS, "mp_state"])
@pytest.mark.parametrize("pointer", [0, 1], ids=["null", "bad"])
def test_a_bad_pointer_is_efault(ordinary_vm: MAKE_VM, state: str, pointer: int) -> None:
    vcpu = ordinary_vm().create_vcpu()

    for direction in ("GET", "SET"):
        with pytest.raises(KvmError) as error:
            vcpu.ioctl(KvmRequest[f"KVM_{direction}_{state.upper()}"], pointer)
        assert error.value.errno == errno.EFAULT


@pytest.mark.parametrize("name", ["rax", "rbx", "rsp", "r8", "r15", "rip"])
@pytest.mark.parametrize("value", [0, 1, 0x7FFF_FFFF_FFFF, (1 << 64) - 1], ids=hex)
def test_a_register_holds_any_value(ordinary_vm: MAKE_VM, name: str, value: int) -> None:
    vcpu = ordinary_vm().create_vcpu()
    regs = vcpu.get_regs()
    setattr(regs, name, value)

    vcpu.set_regs(regs)

    assert getattr(vcpu.get_regs(), name) == value


@pytest.mark.parametrize(
    ("cr0", "cr4", "efer"),
    [
        pytest.param(CR0_PG, 0, 0, id="paging-without-protection"),
        pytest.param(CR0_PG | CR0_PE, 0, EFER_LME | EFER_LMA, id="long-mode-without-pae"),
        pytest.param(CR0_PE, 1 << 5, EFER_LMA, id="active-long-mode-without-paging"),
        pytest.param(0, 1 << 63, 0, id="reserved-cr4-bit"),
        pytest.param(1 << 32, 0, 0, id="reserved-cr0-bit"),
    ],
)
def test_refuses_control_registers_that_no_cpu_takes(ordinary_vm: MAKE_VM, cr0: int, cr4: int, efer: int) -> None:
    vm = ordinary_vm()
    vcpu = vm.create_vcpu()
    vm.set_supported_cpuid(vcpu)
    sregs = vcpu.get_sregs()
    sregs.cr0, sregs.cr4, sregs.efer = cr0, cr4, efer

    with pytest.raises(KvmError) as error:
        vcpu.set_sregs(sregs)
    assert error.value.errno == errno.EINVAL


@pytest.mark.parametrize("name", ["cs", "ds", "es", "fs", "gs", "ss"])
@pytest.mark.parametrize("selector", [0, 8, 0xFFF8])
def test_a_segment_reads_back_as_it_was_set(ordinary_vm: MAKE_VM, name: str, selector: int) -> None:
    vcpu = ordinary_vm().create_vcpu()
    sregs = vcpu.get_sregs()
    segment = getattr(sregs, name)
    segment.selector, segment.base = selector, selector << 4

    vcpu.set_sregs(sregs)

    found = getattr(vcpu.get_sregs(), name)
    assert (found.selector, found.base, found.limit) == (selector, selector << 4, segment.limit)


@pytest.mark.parametrize(
    ("dr6", "dr7", "flags", "allowed"),
    [
        (0xFFFF_0FF0, 0x400, 0, True),
        (0xFFFF_0FF0, 0x401, 0, True),
        (1 << 32, 0x400, 0, False),
        (0xFFFF_0FF0, 1 << 32, 0, False),
        (0xFFFF_0FF0, 0x400, 1, False),
    ],
)
def test_debug_registers_have_no_upper_half(
    ordinary_vm: MAKE_VM, dr6: int, dr7: int, flags: int, allowed: bool
) -> None:
    vcpu = ordinary_vm().create_vcpu()
    registers = KvmDebugregs(dr6=dr6, dr7=dr7, flags=flags)
    registers.db[:] = (0x1000, 0x2000, 0x3000, 0x4000)

    if allowed:
        vcpu.set_debugregs(registers)
        assert list(vcpu.get_debugregs().db) == [0x1000, 0x2000, 0x3000, 0x4000]
    else:
        with pytest.raises(KvmError) as error:
            vcpu.set_debugregs(registers)
        assert error.value.errno == errno.EINVAL


def test_without_an_apic_a_vcpu_is_always_runnable(ordinary_vm: MAKE_VM) -> None:
    vcpu = ordinary_vm().create_vcpu()

    assert vcpu.get_mp_state() == KvmMpStateValue.KVM_MP_STATE_RUNNABLE
    vcpu.set_mp_state(KvmMpStateValue.KVM_MP_STATE_RUNNABLE)
    for state in (1, 2, 3, 4, 5, 9, 10, 0xFFFF_FFFF):
        with pytest.raises(KvmError) as error:
            vcpu.set_mp_state(state)
        assert error.value.errno == errno.EINVAL, state
    assert vcpu.get_mp_state() == KvmMpStateValue.KVM_MP_STATE_RUNNABLE


def test_a_pending_nmi_shows_in_the_events(ordinary_vm: MAKE_VM) -> None:
    vcpu = ordinary_vm().create_vcpu()
    assert vcpu.get_vcpu_events().nmi.pending == 0

    vcpu.nmi()
    assert vcpu.get_vcpu_events().nmi.pending == 1

    events = vcpu.get_vcpu_events()
    events.nmi.pending, events.flags = 0, events.flags | KVM_VCPUEVENT_VALID_NMI_PENDING
    vcpu.set_vcpu_events(events)
    assert vcpu.get_vcpu_events().nmi.pending == 0


@pytest.mark.parametrize("flags", [1 << 6, 1 << 31, 16], ids=["bit-6", "bit-31", "payload-without-its-capability"])
def test_refuses_event_flags_that_it_does_not_know(ordinary_vm: MAKE_VM, flags: int) -> None:
    vcpu = ordinary_vm().create_vcpu()

    with pytest.raises(KvmError) as error:
        vcpu.set_vcpu_events(KvmVcpuEvents(flags=flags))
    assert error.value.errno == errno.EINVAL


@pytest.mark.parametrize("vector", [0, 13, 31])
def test_an_injected_exception_reads_back(ordinary_vm: MAKE_VM, vector: int) -> None:
    vcpu = ordinary_vm().create_vcpu()
    events = vcpu.get_vcpu_events()
    events.exception.injected, events.exception.nr = 1, vector

    vcpu.set_vcpu_events(events)

    found = vcpu.get_vcpu_events().exception
    assert (found.injected, found.nr) == (1, vector)


@pytest.mark.parametrize("vector", [2, 32, 255])
def test_refuses_to_inject_what_is_no_exception(ordinary_vm: MAKE_VM, vector: int) -> None:
    vcpu = ordinary_vm().create_vcpu()
    events = vcpu.get_vcpu_events()
    events.exception.injected, events.exception.nr = 1, vector

    with pytest.raises(KvmError) as error:
        vcpu.set_vcpu_events(events)
    assert error.value.errno == errno.EINVAL


def test_the_tsc_frequency_of_a_vcpu_is_its_vm_s(ordinary_vm: MAKE_VM) -> None:
    vm = ordinary_vm()
    before = vm.vm.get_tsc_khz()

    assert vm.create_vcpu().get_tsc_khz() == before > 0


@pytest.mark.parametrize("state", ["regs", "sregs", "sregs2", "xcrs", "debugregs", "vcpu_events", "mp_state"])
def test_a_guest_that_ran_left_the_same_state_each_time(ordinary_vm: MAKE_VM, vmm: MAKE_VMM, state: str) -> None:
    seen: list[Any] = []
    for _ in range(2):
        vm = ordinary_vm()
        vm.add_slot(0, 0x10000)
        vcpu = vm.create_vcpu()
        # mov ax, 0x1234; xor bx, bx; push ax; pop cx; hlt
        vm.start_real_mode(vcpu, bytes.fromhex("b83412 31db 50 59 f4"))
        assert vmm(vm).run(vcpu) == HALT
        value = getattr(vcpu, f"get_{state}")()
        seen.append(value if isinstance(value, int) else bytes(value))

    assert seen[0] == seen[1]


@pytest.mark.parametrize(
    ("code", "register", "value"),
    [
        ("b8 34 12", "rax", 0x1234),
        ("66 b8 78 56 34 12", "rax", 0x1234_5678),
        ("b8 01 00 05 ff 7f", "rax", 0x8000),
        ("b8 05 00 2d 06 00", "rax", 0xFFFF),
        ("b8 34 12 b9 04 00 d3 e0", "rax", 0x2340),
        ("b8 34 12 86 e0", "rax", 0x3412),
        ("b8 07 00 ba 00 00 b9 02 00 f7 f1", "rdx", 1),
        ("b8 00 10 b9 00 10 f7 e1", "rdx", 0x100),
        ("b9 05 00 31 c0 40 e2 fd", "rax", 5),
        ("bc 00 80 b8 cd ab 50 5b", "rbx", 0xABCD),
        ("b8 ff 00 0f b6 d8", "rbx", 0xFF),
        ("b8 80 00 98", "rax", 0xFF80),
        ("be 00 10 ad", "rsi", 0x1002),
        ("f9 0f 92 c3", "rbx", 1),
    ],
)
def test_real_mode_code_computes(ordinary_vm: MAKE_VM, vmm: MAKE_VMM, code: str, register: str, value: int) -> None:
    vm = ordinary_vm()
    vm.add_slot(0, 0x10000)
    vcpu = vm.create_vcpu()
    vm.start_real_mode(vcpu, bytes.fromhex(code) + CMP_AX_AX + HLT)

    assert vmm(vm).run(vcpu) == HALT
    assert getattr(vcpu.get_regs(), register) == value


def test_a_single_step_comes_back_after_each_instruction(ordinary_vm: MAKE_VM) -> None:
    vm = ordinary_vm()
    vm.add_slot(0, 0x10000)
    vcpu = vm.create_vcpu()
    vm.start_long_mode(vcpu, NOP * 3 + HLT)
    vcpu.set_guest_debug(KvmGuestDebug(KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP))

    for address in (0x1001, 0x1002, 0x1003):
        assert vcpu.run() == KvmExit.KVM_EXIT_DEBUG
        assert vcpu.kvm_run.debug.pc == address
    vcpu.set_guest_debug(KvmGuestDebug())
    assert vcpu.run() == KvmExit.KVM_EXIT_HLT


@pytest.mark.parametrize("address", [0, 0x1000, 0x1F_FFFF, 0x20_0000, 0x8000_0000])
def test_translation_follows_the_page_tables(ordinary_vm: MAKE_VM, address: int) -> None:
    vm = ordinary_vm()
    vm.add_slot(0, 0x10000)
    vcpu = vm.create_vcpu()
    vm.set_supported_cpuid(vcpu)
    vm.start_long_mode(vcpu, HLT)

    translation = vcpu.translate(address)

    mapped = address < 0x20_0000
    assert translation.valid == mapped
    if mapped:
        assert translation.physical_address == address


def test_registers_are_synchronised_through_the_run_page(ordinary_vm: MAKE_VM, vmm: MAKE_VMM) -> None:
    vm = ordinary_vm()
    assert vm.vm.check_extension(KvmCap.KVM_CAP_SYNC_REGS) & KVM_SYNC_X86_REGS
    vm.add_slot(0, 0x10000)
    vcpu = vm.create_vcpu()
    vm.start_real_mode(vcpu, b"\x40" + HLT + b"\x40" + HLT)  # inc ax; hlt; inc ax; hlt
    run = vcpu.kvm_run
    run.kvm_valid_regs = KVM_SYNC_X86_REGS

    assert vmm(vm).run(vcpu) == HALT
    assert run.s.regs.regs.rax == vcpu.get_regs().rax == 1
    run.s.regs.regs.rax, run.kvm_dirty_regs = 0x41, KVM_SYNC_X86_REGS
    assert vmm(vm).run(vcpu) == HALT
    assert run.s.regs.regs.rax == 0x42


@pytest.mark.parametrize("field", ["kvm_valid_regs", "kvm_dirty_regs"])
def test_synchronising_what_does_not_exist_is_einval(ordinary_vm: MAKE_VM, field: str) -> None:
    vcpu = ordinary_vm().create_vcpu()
    setattr(vcpu.kvm_run, field, 1 << 20)

    with pytest.raises(KvmError) as error:
        vcpu.run()
    assert error.value.errno == errno.EINVAL


def test_statistics_can_be_had_of_vm_and_vcpu(ordinary_vm: MAKE_VM) -> None:
    vm = ordinary_vm()
    vcpu = vm.create_vcpu()

    for maker in (vm.vm, vcpu):
        with maker.get_stats_fd() as stats:
            assert stats.fd >= 0


@pytest.mark.parametrize("vcpu_id", [-1, 1 << 20, 1 << 31])
def test_a_vcpu_id_beyond_the_limit_is_einval(ordinary_vm: MAKE_VM, vcpu_id: int) -> None:
    with pytest.raises(KvmError) as error:
        ordinary_vm().create_vcpu(vcpu_id)
    assert error.value.errno == errno.EINVAL


@pytest.mark.parametrize("name", ["KVM_GET_LAPIC", "KVM_SET_LAPIC"])
def test_without_an_apic_its_registers_are_einval(ordinary_vm: MAKE_VM, name: str) -> None:
    vcpu = ordinary_vm().create_vcpu()

    with pytest.raises(KvmError) as error:
        vcpu.ioctl(KvmRequest[name], (ctypes.c_uint8 * 1024)())
    assert error.value.errno == errno.EINVAL


def closed(vcpu: Vcpu) -> int:
    fd = vcpu.fd
    vcpu.close()
    return fd


@pytest.mark.parametrize("name", ["KVM_GET_REGS", "KVM_RUN", "KVM_NMI", "KVM_GET_TSC_KHZ"])
def test_a_closed_vcpu_is_ebadf(ordinary_vm: MAKE_VM, name: str) -> None:
    vm = ordinary_vm()
    fd = closed(vm.create_vcpu())

    with pytest.raises(KvmError) as error:
        vm.kernel.ioctl(fd, KvmRequest[name], 0)
    assert error.value.errno == errno.EBADF
