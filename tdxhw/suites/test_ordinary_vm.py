"""Ordinary VMs: memory, registers, port I/O, MMIO, halt, shutdown and time limits."""

import errno
from collections.abc import Callable

import pytest

from tdxhw.errors import GuestTimeout
from tdxhw.exits import HALT, SHUTDOWN, Mmio, PortIo
from tdxhw.ordinary_vm import OrdinaryVm
from tdxhw.vmm import Guest, Vmm
from uapi_ctypes.errors import KvmError

pytestmark = pytest.mark.requires("kvm", "vm-type-default")

HLT = b"\xf4"
UD2 = b"\x0f\x0b"
OUT_AL_0X10 = b"\xe6\x10"
IN_AL_0X11 = b"\xe4\x11"
MAKE_VM = Callable[..., OrdinaryVm]
MAKE_VMM = Callable[[Guest], Vmm]


def started(ordinary_vm: MAKE_VM, code: bytes) -> OrdinaryVm:
    vm = ordinary_vm()
    vm.add_slot(0, 0x10000)
    vm.start_real_mode(vm.create_vcpu(), code)
    return vm


def test_a_guest_halts(ordinary_vm: MAKE_VM, vmm: MAKE_VMM) -> None:
    vm = started(ordinary_vm, HLT)

    assert vmm(vm).run(vm.vcpus[0]) == HALT


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_port_write_comes_back_with_its_size_and_data(ordinary_vm: MAKE_VM, vmm: MAKE_VMM, size: int) -> None:
    out = {1: OUT_AL_0X10, 2: b"\xe7\x10", 4: b"\x66\xe7\x10"}[size]
    vm = started(ordinary_vm, b"\x66\xb8\x44\x33\x22\x11" + out + HLT)  # mov eax, 0x11223344

    exit_ = vmm(vm).run(vm.vcpus[0])

    assert exit_ == PortIo(0x10, size, True, bytes.fromhex("44332211")[:size])


def test_a_port_read_gets_what_user_space_answers(ordinary_vm: MAKE_VM, vmm: MAKE_VMM) -> None:
    vm = started(ordinary_vm, IN_AL_0X11 + b"\xfe\xc0" + OUT_AL_0X10 + HLT)  # in; inc al; out
    serve, written = vmm(vm), []
    serve.on_port(0x11, read=lambda size: 0x41 if size == 1 else 0)
    serve.on_port(0x10, write=lambda value, _size: written.append(value))

    assert serve.run(vm.vcpus[0]) == HALT
    assert written == [0x42]


def test_an_mmio_write_outside_any_slot_comes_back(ordinary_vm: MAKE_VM, vmm: MAKE_VMM) -> None:
    # mov ax, 0x2000; mov ds, ax; mov byte [0x10], 0x5a
    vm = started(ordinary_vm, b"\xb8\x00\x20\x8e\xd8\xc6\x06\x10\x00\x5a" + HLT)

    assert vmm(vm).run(vm.vcpus[0]) == Mmio(0x20010, 1, True, b"\x5a")


def test_an_mmio_read_gets_what_user_space_answers(ordinary_vm: MAKE_VM, vmm: MAKE_VMM) -> None:
    # mov ax, 0x2000; mov ds, ax; mov al, [0x10]; out 0x10, al
    vm = started(ordinary_vm, b"\xb8\x00\x20\x8e\xd8\xa0\x10\x00" + OUT_AL_0X10 + HLT)
    serve = vmm(vm)
    serve.on_mmio(read=lambda gpa, size: 0x77 if (gpa, size) == (0x20010, 1) else 0)

    assert serve.expect(vm.vcpus[0], PortIo).value == 0x77


def test_the_guest_s_writes_are_visible_to_the_host(ordinary_vm: MAKE_VM, vmm: MAKE_VMM) -> None:
    vm = started(ordinary_vm, b"\xc7\x06\x00\x20\xcd\xab" + HLT)  # mov word [0x2000], 0xabcd

    vmm(vm).run(vm.vcpus[0])

    assert vm.memory.read(0x2000, 2) == b"\xcd\xab"


def test_registers_read_back_as_they_were_set(ordinary_vm: MAKE_VM) -> None:
    vm = ordinary_vm()
    vcpu = vm.create_vcpu()
    regs = vcpu.get_regs()
    regs.rax, regs.r15, regs.rflags = 0x0123_4567_89AB_CDEF, 0xFEDC_BA98_7654_3210, 2

    vcpu.set_regs(regs)

    assert bytes(vcpu.get_regs()) == bytes(regs)


def test_a_new_vcpu_starts_at_the_reset_vector(ordinary_vm: MAKE_VM) -> None:
    vcpu = ordinary_vm().create_vcpu()

    sregs = vcpu.get_sregs()
    assert (sregs.cs.base, sregs.cs.selector, vcpu.get_regs().rip) == (0xFFFF_0000, 0xF000, 0xFFF0)


def test_a_triple_fault_is_a_shutdown(ordinary_vm: MAKE_VM, vmm: MAKE_VMM) -> None:
    vm = ordinary_vm()
    vm.add_slot(0, 0x10000)
    vm.start_long_mode(vm.create_vcpu(), UD2)  # its vector is beyond the empty IDT, and so is every further one

    assert vmm(vm).run(vm.vcpus[0]) == SHUTDOWN


def test_a_64_bit_guest_runs(ordinary_vm: MAKE_VM, vmm: MAKE_VMM) -> None:
    vm = ordinary_vm()
    vm.add_slot(0, 0x10000)
    code = bytes.fromhex("48b8efcdab8967452301 48c1e820 e710")  # mov rax, imm64; shr rax, 32; out 0x10, eax
    vm.start_long_mode(vm.create_vcpu(), code)

    assert vmm(vm).run(vm.vcpus[0]) == PortIo(0x10, 4, True, bytes.fromhex("67452301"))


def test_an_endless_loop_ends_at_its_time_limit_with_registers_shown(ordinary_vm: MAKE_VM, vmm: MAKE_VMM) -> None:
    vm = started(ordinary_vm, b"\xb8\x34\x12\xeb\xfe")  # mov ax, 0x1234; jmp .

    with pytest.raises(GuestTimeout, match=r"still running after 0\.2 s; rax=0x1234 .*rip=0x1003"):
        vmm(vm).run(vm.vcpus[0], limit_s=0.2)


def test_a_vcpu_runs_on_after_its_time_limit(ordinary_vm: MAKE_VM, vmm: MAKE_VMM) -> None:
    vm = started(ordinary_vm, b"\xeb\xfe" + HLT)  # jmp .
    vcpu = vm.vcpus[0]
    with pytest.raises(GuestTimeout):
        vmm(vm).run(vcpu, limit_s=0.1)
    regs = vcpu.get_regs()
    regs.rip += 2
    vcpu.set_regs(regs)

    assert vmm(vm).run(vcpu) == HALT


def test_immediate_exit_is_eintr(ordinary_vm: MAKE_VM) -> None:
    vm = started(ordinary_vm, HLT)
    vcpu = vm.vcpus[0]
    vcpu.kvm_run.immediate_exit = 1

    with pytest.raises(KvmError) as error:
        vcpu.run()
    assert error.value.errno == errno.EINTR


def test_overlapping_slots_are_eexist(ordinary_vm: MAKE_VM) -> None:
    vm = ordinary_vm()
    slot = vm.add_slot(0, 0x4000)

    with pytest.raises(KvmError) as error:
        vm.vm.set_user_memory_region(1, 0x3000, 0x1000, slot.shared.address)
    assert error.value.errno == errno.EEXIST


def test_deleting_a_slot_that_does_not_exist_is_einval(ordinary_vm: MAKE_VM) -> None:
    with pytest.raises(KvmError) as error:
        ordinary_vm().vm.set_user_memory_region(7, 0, 0, 0)
    assert error.value.errno == errno.EINVAL


def test_the_same_vcpu_id_twice_is_eexist(ordinary_vm: MAKE_VM) -> None:
    vm = ordinary_vm()
    vm.create_vcpu(0)

    with pytest.raises(KvmError) as error:
        vm.create_vcpu(0)
    assert error.value.errno == errno.EEXIST


def test_a_tdx_sub_command_on_an_ordinary_vm_is_enotty(ordinary_vm: MAKE_VM) -> None:
    with pytest.raises(KvmError) as error:
        ordinary_vm().vm.tdx_capabilities(8)
    assert error.value.errno == errno.ENOTTY
