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


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("count", [1, 3, 8])
def test_a_string_of_port_writes_delivers_every_item(
    ordinary_vm: MAKE_VM, vmm: MAKE_VMM, size: int, count: int
) -> None:
    outs = {1: b"\xf3\x6e", 2: b"\xf3\x6f", 4: b"\x66\xf3\x6f"}[size]
    # mov si, 0x2000; mov cx, count; mov dx, 0x10; cld; rep outs
    code = b"\xbe\x00\x20\xb9" + count.to_bytes(2, "little") + b"\xba\x10\x00\xfc" + outs + HLT
    vm = started(ordinary_vm, code)
    data = bytes(range(1, size * count + 1))
    vm.memory.write(0x2000, data)
    serve, written = vmm(vm), []
    serve.on_port(0x10, write=lambda value, width: written.append(value.to_bytes(width, "little")))

    assert serve.run(vm.vcpus[0]) == HALT
    assert b"".join(written) == data
    assert vm.vcpus[0].get_regs().rsi == 0x2000 + len(data)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_string_of_port_reads_lands_in_memory(ordinary_vm: MAKE_VM, vmm: MAKE_VMM, size: int) -> None:
    ins = {1: b"\xf3\x6c", 2: b"\xf3\x6d", 4: b"\x66\xf3\x6d"}[size]
    # mov di, 0x2000; mov cx, 4; mov dx, 0x11; cld; rep ins
    vm = started(ordinary_vm, b"\xbf\x00\x20\xb9\x04\x00\xba\x11\x00\xfc" + ins + HLT)
    serve = vmm(vm)
    serve.on_port(0x11, read=lambda width: int.from_bytes(b"\xa1\xb2\xc3\xd4"[:width], "little"))

    assert serve.run(vm.vcpus[0]) == HALT
    assert vm.memory.read(0x2000, 4 * size) == b"\xa1\xb2\xc3\xd4"[:size] * 4


@pytest.mark.parametrize("port", [0x0, 0x60, 0x80, 0x3F8, 0xCF8, 0xFFFF])
def test_every_port_reaches_user_space(ordinary_vm: MAKE_VM, vmm: MAKE_VMM, port: int) -> None:
    # mov dx, port; mov al, 0x21; out dx, al; in al, dx; hlt
    vm = started(ordinary_vm, b"\xba" + port.to_bytes(2, "little") + b"\xb0\x21\xee\xec" + HLT)
    serve, written = vmm(vm), []
    serve.on_port(port, read=lambda _size: 0x5C, write=lambda value, _size: written.append(value))

    assert serve.run(vm.vcpus[0]) == HALT
    assert written == [0x21]
    assert vm.vcpus[0].get_regs().rax & 0xFF == 0x5C


MMIO_WRITES = {
    "byte": ("c6 06 10 00 5a", b"\x5a"),
    "word": ("c7 06 10 00 5a a5", b"\x5a\xa5"),
    "dword": ("66 c7 06 10 00 01 02 03 04", b"\x01\x02\x03\x04"),
    "register": ("b8 cd ab a3 10 00", b"\xcd\xab"),
    "unaligned": ("b8 cd ab a3 11 00", b"\xcd\xab"),
    "movs": ("bf 10 00 be 12 00 1e 07 31 c0 ab", b"\x00\x00"),
}


@pytest.mark.parametrize("name", MMIO_WRITES)
def test_mmio_writes_of_every_width_come_back(ordinary_vm: MAKE_VM, vmm: MAKE_VMM, name: str) -> None:
    code, data = MMIO_WRITES[name]
    vm = started(ordinary_vm, b"\xb8\x00\x20\x8e\xd8" + bytes.fromhex(code) + HLT)  # mov ax, 0x2000; mov ds, ax
    serve, written = vmm(vm), []
    serve.on_mmio(write=lambda gpa, value, size: written.append((gpa, value.to_bytes(size, "little"))))

    assert serve.run(vm.vcpus[0]) == HALT
    assert written == [(0x20011 if name == "unaligned" else 0x20010, data)]


MMIO_READS = {
    "byte": ("a0 10 00", 1),
    "word": ("a1 10 00", 2),
    "dword": ("66 a1 10 00", 4),
    "zero-extended": ("66 0f b6 06 10 00", 1),
    "sign-extended": ("66 0f be 06 10 00", 1),
    "added": ("66 31 c0 03 06 10 00", 2),
}


@pytest.mark.parametrize("name", MMIO_READS)
@pytest.mark.parametrize("value", [0x0, 0x11223344, 0x8899AABB], ids=hex)
def test_mmio_reads_of_every_width_are_answered(ordinary_vm: MAKE_VM, vmm: MAKE_VMM, name: str, value: int) -> None:
    code, width = MMIO_READS[name]
    # mov ax, 0x2000; mov ds, ax; xor eax, eax; the read; cmp ax, ax
    vm = started(ordinary_vm, b"\xb8\x00\x20\x8e\xd8\x66\x31\xc0" + bytes.fromhex(code) + b"\x39\xc0" + HLT)
    serve, asked = vmm(vm), []

    def answer(gpa: int, size: int) -> int:
        asked.append((gpa, size))
        return value & (1 << 8 * size) - 1

    serve.on_mmio(read=answer)

    assert serve.run(vm.vcpus[0]) == HALT
    assert asked == [(0x20010, width)]
    got = value & (1 << 8 * width) - 1
    if name == "sign-extended" and got & 0x80:
        got |= 0xFFFF_FF00
    assert vm.vcpus[0].get_regs().rax == got


def test_mmio_may_be_read_changed_and_written(ordinary_vm: MAKE_VM, vmm: MAKE_VMM) -> None:
    # mov ax, 0x2000; mov ds, ax; inc byte [0x10]; or word [0x20], 0x0f0f
    vm = started(ordinary_vm, b"\xb8\x00\x20\x8e\xd8" + bytes.fromhex("fe 06 10 00 81 0e 20 00 0f 0f") + HLT)
    serve, device = vmm(vm), {0x20010: 0x41, 0x20020: 0x1010}
    serve.on_mmio(read=lambda gpa, _size: device[gpa], write=lambda gpa, value, _size: device.__setitem__(gpa, value))

    assert serve.run(vm.vcpus[0]) == HALT
    assert device == {0x20010: 0x42, 0x20020: 0x1F1F}


@pytest.mark.parametrize("times", [1, 4, 16])
def test_a_guest_can_be_halted_and_run_on_many_times(ordinary_vm: MAKE_VM, vmm: MAKE_VMM, times: int) -> None:
    vm = started(ordinary_vm, HLT * times)

    for count in range(1, times + 1):
        assert vmm(vm).run(vm.vcpus[0]) == HALT
        assert vm.vcpus[0].get_regs().rip == 0x1000 + count


@pytest.mark.parametrize("vcpus", [1, 2, 4])
def test_vcpus_of_one_vm_share_its_memory(ordinary_vm: MAKE_VM, vmm: MAKE_VMM, vcpus: int) -> None:
    vm = ordinary_vm()
    vm.add_slot(0, 0x10000)
    for vcpu_id in range(vcpus):
        vm.start_real_mode(vm.create_vcpu(vcpu_id), b"\xfe\x06\x00\x20" + HLT)  # inc byte [0x2000]

    for vcpu in vm.vcpus:
        assert vmm(vm).run(vcpu) == HALT
    assert vm.memory.read(0x2000, 1) == bytes([vcpus])


def test_a_vm_lives_until_its_last_vcpu_is_closed(ordinary_vm: MAKE_VM, vmm: MAKE_VMM) -> None:
    vm = started(ordinary_vm, HLT)
    vm.vm.close_fd()

    assert vmm(vm).run(vm.vcpus[0]) == HALT


def test_two_vms_have_nothing_in_common(ordinary_vm: MAKE_VM, vmm: MAKE_VMM) -> None:
    one, other = (started(ordinary_vm, b"\xc6\x06\x00\x20" + value + HLT) for value in (b"\x11", b"\x22"))

    for vm in (one, other):
        assert vmm(vm).run(vm.vcpus[0]) == HALT
    assert (one.memory.read(0x2000, 1), other.memory.read(0x2000, 1)) == (b"\x11", b"\x22")
