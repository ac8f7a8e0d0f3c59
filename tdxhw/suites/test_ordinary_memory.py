"""Memory of ordinary VMs: memslots, their error paths, dirty logs and guest_memfd."""

import errno
from collections.abc import Callable, Iterator
from typing import Final

import pytest

from tdxhw.exits import HALT
from tdxhw.ordinary_vm import OrdinaryVm
from tdxhw.vmm import Guest, Vmm
from uapi_ctypes.caps import KvmCap
from uapi_ctypes.errors import KvmError
from uapi_ctypes.guest_memfd import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE
from uapi_ctypes.ioctl import KvmRequest
from uapi_ctypes.kvm import KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, KvmMemFlag
from uapi_ctypes.mapping import Mapping, anonymous
from uapi_ctypes.units import PAGE_SIZE

pytestmark = pytest.mark.requires("kvm", "vm-type-default")

MAKE_VM = Callable[..., OrdinaryVm]
MAKE_VMM = Callable[[Guest], Vmm]
SIZE: Final = 0x10000
KERNEL_ADDRESS: Final = 0xFFFF_8880_0000_0000
LOG: Final = KvmMemFlag.KVM_MEM_LOG_DIRTY_PAGES
READONLY: Final = KvmMemFlag.KVM_MEM_READONLY
GMEM: Final = KvmMemFlag.KVM_MEM_GUEST_MEMFD


@pytest.fixture
def buffer() -> Iterator[Mapping]:
    with anonymous(SIZE) as memory:
        yield memory


@pytest.mark.parametrize(
    ("slot", "gpa", "size", "offset", "flags"),
    [
        pytest.param(0, 0x800, 0x1000, 0, 0, id="gpa-unaligned"),
        pytest.param(0, 0, 0x800, 0, 0, id="size-unaligned"),
        pytest.param(0, 0, 0x1000, 0x10, 0, id="hva-unaligned"),
        pytest.param(0, -0x1000, 0x2000, 0, 0, id="gpa-wraps"),
        pytest.param(0, 0, 0x1000, 0, 1 << 7, id="unknown-flag"),
        pytest.param(0x7FFF, 0, 0x1000, 0, 0, id="slot-beyond-the-last"),
        pytest.param(0x2_0000, 0, 0x1000, 0, 0, id="address-space-beyond-the-last"),
        pytest.param(3, 0, 0, 0, 0, id="delete-what-is-not-there"),
    ],
)
def test_refuses_a_malformed_slot(
    ordinary_vm: MAKE_VM, buffer: Mapping, slot: int, gpa: int, size: int, offset: int, flags: int
) -> None:
    vm = ordinary_vm().vm

    with pytest.raises(KvmError) as error:
        vm.set_user_memory_region(slot, gpa, size, buffer.address + offset, flags)
    assert error.value.errno == errno.EINVAL


def test_refuses_memory_of_the_kernel(ordinary_vm: MAKE_VM) -> None:
    with pytest.raises(KvmError) as error:
        ordinary_vm().vm.set_user_memory_region(0, 0, 0x1000, KERNEL_ADDRESS)
    assert error.value.errno == errno.EINVAL


@pytest.mark.parametrize("pointer", [0, 1, KERNEL_ADDRESS], ids=["null", "bad", "kernel"])
@pytest.mark.parametrize("request_name", ["KVM_SET_USER_MEMORY_REGION", "KVM_GET_DIRTY_LOG", "KVM_ENABLE_CAP"])
def test_a_bad_pointer_is_efault(ordinary_vm: MAKE_VM, request_name: str, pointer: int) -> None:
    with pytest.raises(KvmError) as error:
        ordinary_vm().vm.ioctl(KvmRequest[request_name], pointer)
    assert error.value.errno == errno.EFAULT


@pytest.mark.parametrize(
    ("gpa", "size", "overlaps"),
    [
        (0x0000, 0x1000, False),
        (0x0000, 0x2000, True),
        (0x1000, 0x4000, True),
        (0x2000, 0x1000, True),
        (0x4000, 0x1000, True),
        (0x5000, 0x1000, False),
    ],
)
def test_slots_may_touch_and_not_overlap(
    ordinary_vm: MAKE_VM, buffer: Mapping, gpa: int, size: int, overlaps: bool
) -> None:
    vm = ordinary_vm().vm
    vm.set_user_memory_region(0, 0x1000, 0x4000, buffer.address)

    if overlaps:
        with pytest.raises(KvmError) as error:
            vm.set_user_memory_region(1, gpa, size, buffer.address)
        assert error.value.errno == errno.EEXIST
    else:
        vm.set_user_memory_region(1, gpa, size, buffer.address)


@pytest.mark.parametrize(
    ("gpa", "size", "offset", "flags", "allowed"),
    [
        pytest.param(0x1000, 0x4000, 0, 0, True, id="nothing-changes"),
        pytest.param(0x1000, 0x4000, 0, LOG, True, id="logging-on"),
        pytest.param(0x8000, 0x4000, 0, 0, True, id="moved"),
        pytest.param(0x8000, 0x4000, 0, LOG, True, id="moved-and-logging-on"),
        pytest.param(0x1000, 0x0000, 0, 0, True, id="deleted"),
        pytest.param(0x1000, 0x2000, 0, 0, False, id="shorter"),
        pytest.param(0x1000, 0x8000, 0, 0, False, id="longer"),
        pytest.param(0x1000, 0x4000, 0x1000, 0, False, id="other-hva"),
        pytest.param(0x1000, 0x4000, 0, READONLY, False, id="read-only-now"),
    ],
)
def test_a_slot_may_move_and_not_change_its_memory(
    ordinary_vm: MAKE_VM, buffer: Mapping, gpa: int, size: int, offset: int, flags: int, allowed: bool
) -> None:
    vm = ordinary_vm().vm
    vm.set_user_memory_region(0, 0x1000, 0x4000, buffer.address)

    if allowed:
        vm.set_user_memory_region(0, gpa, size, buffer.address + offset, flags)
    else:
        with pytest.raises(KvmError) as error:
            vm.set_user_memory_region(0, gpa, size, buffer.address + offset, flags)
        assert error.value.errno == errno.EINVAL


def test_every_slot_number_can_be_used_again(ordinary_vm: MAKE_VM, buffer: Mapping) -> None:
    vm = ordinary_vm().vm
    for slot in range(16):
        vm.set_user_memory_region(slot, slot * 0x1000, 0x1000, buffer.address + slot * 0x1000)
    for slot in range(16):
        vm.set_user_memory_region(slot, 0, 0, 0)

    for slot in range(16):
        vm.set_user_memory_region(slot, slot * 0x1000, 0x1000, buffer.address)
    with pytest.raises(KvmError) as error:
        vm.set_user_memory_region(16, 0xF000, 0x1000, buffer.address)
    assert error.value.errno == errno.EEXIST


WRITES: Final = bytes.fromhex("c6060020aa c6060030bb f4")
"""mov byte [0x2000], 0xaa; mov byte [0x3000], 0xbb; hlt: real mode."""


def logged(ordinary_vm: MAKE_VM, *, manual: bool = False) -> OrdinaryVm:
    vm = ordinary_vm()
    if manual:
        vm.vm.enable_cap(KvmCap.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE)
    slot = vm.add_slot(0, SIZE)
    vm.start_real_mode(vm.create_vcpu(), WRITES)
    vm.vm.set_user_memory_region(0, 0, SIZE, slot.shared.address, LOG)
    return vm


def bitmap_of(vm: OrdinaryVm, buffer: Mapping) -> int:
    vm.vm.get_dirty_log(0, buffer.address)
    return int.from_bytes(buffer.memory[:8], "little")


def test_the_dirty_log_names_the_pages_that_the_guest_wrote(
    ordinary_vm: MAKE_VM, vmm: MAKE_VMM, buffer: Mapping
) -> None:
    vm = logged(ordinary_vm)
    bitmap_of(vm, buffer)

    assert vmm(vm).run(vm.vcpus[0]) == HALT
    assert bitmap_of(vm, buffer) & 0b1100 == 0b1100
    assert bitmap_of(vm, buffer) == 0, "reading it clears it"


def test_with_manual_protection_reading_does_not_clear(ordinary_vm: MAKE_VM, vmm: MAKE_VMM, buffer: Mapping) -> None:
    vm = logged(ordinary_vm, manual=True)
    assert vmm(vm).run(vm.vcpus[0]) == HALT
    assert bitmap_of(vm, buffer) & 0b1100 == 0b1100
    assert bitmap_of(vm, buffer) & 0b1100 == 0b1100

    buffer.memory[:8] = (0b100).to_bytes(8, "little")
    vm.vm.clear_dirty_log(0, 0, SIZE // PAGE_SIZE, buffer.address)
    assert bitmap_of(vm, buffer) & 0b1100 == 0b1000


def test_the_dirty_log_of_a_slot_without_logging_is_enoent(ordinary_vm: MAKE_VM, buffer: Mapping) -> None:
    vm = ordinary_vm()
    vm.add_slot(0, SIZE)

    for slot in (0, 5):
        with pytest.raises(KvmError) as error:
            vm.vm.get_dirty_log(slot, buffer.address)
        assert error.value.errno == errno.ENOENT
    with pytest.raises(KvmError) as error:
        vm.vm.get_dirty_log(0x8000, buffer.address)
    assert error.value.errno == errno.EINVAL


def test_a_write_to_a_read_only_slot_is_mmio(ordinary_vm: MAKE_VM, vmm: MAKE_VMM, buffer: Mapping) -> None:
    vm = ordinary_vm()
    vm.add_slot(0, 0x2000)
    vm.vm.set_user_memory_region(1, 0x2000, 0x2000, buffer.address, READONLY)
    vm.start_real_mode(vm.create_vcpu(), WRITES)
    written: list[tuple[int, int, int]] = []
    serve = vmm(vm)
    serve.on_mmio(write=lambda gpa, value, size: written.append((gpa, value, size)))

    assert serve.run(vm.vcpus[0]) == HALT
    assert written == [(0x2000, 0xAA, 1), (0x3000, 0xBB, 1)]


@pytest.mark.requires("guest-memfd")
@pytest.mark.parametrize(
    ("size", "flags"),
    [(0, 0), (0x800, 0), (0x1001, 0), (-0x1000, 0), (0x1000, 1 << 40), (0x1000, 1 << 63)],
    ids=["empty", "half-a-page", "unaligned", "negative", "unknown-flag", "last-flag"],
)
def test_refuses_a_malformed_guest_memfd(ordinary_vm: MAKE_VM, size: int, flags: int) -> None:
    with pytest.raises(KvmError) as error:
        ordinary_vm().vm.create_guest_memfd(size, flags)
    assert error.value.errno == errno.EINVAL


@pytest.mark.requires("guest-memfd")
def test_space_in_a_guest_memfd_is_reserved_and_given_back(ordinary_vm: MAKE_VM) -> None:
    gmem = ordinary_vm().vm.create_guest_memfd(SIZE)
    gmem.fallocate(FALLOC_FL_KEEP_SIZE, 0, SIZE)
    gmem.punch_hole(0x1000, 0x2000)
    gmem.punch_hole(0, SIZE)
    gmem.fallocate(FALLOC_FL_KEEP_SIZE, 0x3000, 0x1000)

    for mode, offset, length, err in (
        (0, 0, SIZE, errno.EOPNOTSUPP),
        (FALLOC_FL_PUNCH_HOLE, 0, 0x1000, errno.EOPNOTSUPP),
        (FALLOC_FL_KEEP_SIZE, 0x800, 0x1000, errno.EINVAL),
        (FALLOC_FL_KEEP_SIZE, 0, 0x800, errno.EINVAL),
        (FALLOC_FL_KEEP_SIZE, 0, 0, errno.EINVAL),
        (FALLOC_FL_KEEP_SIZE, -0x1000, 0x1000, errno.EINVAL),
    ):
        with pytest.raises(KvmError) as error:
            gmem.fallocate(mode, offset, length)
        assert error.value.errno == err, (mode, offset, length)


@pytest.mark.requires("guest-memfd")
def test_a_guest_memfd_without_the_flag_cannot_be_mapped(ordinary_vm: MAKE_VM) -> None:
    gmem = ordinary_vm().vm.create_guest_memfd(SIZE)

    with pytest.raises(KvmError) as error:
        gmem.mmap(SIZE)
    assert error.value.errno == errno.ENODEV


@pytest.mark.requires("user-memory2")
def test_the_newer_form_of_a_slot_does_what_the_old_one_does(
    ordinary_vm: MAKE_VM, vmm: MAKE_VMM, buffer: Mapping
) -> None:
    vm = ordinary_vm()
    vm.vm.set_user_memory_region2(0, 0, SIZE, buffer.address)
    buffer.memory[0x1000 : 0x1000 + len(WRITES)] = WRITES
    vcpu = vm.create_vcpu()
    sregs = vcpu.get_sregs()
    sregs.cs.base = sregs.cs.selector = 0
    vcpu.set_sregs(sregs)
    regs = vcpu.get_regs()
    regs.rip, regs.rflags = 0x1000, 2
    vcpu.set_regs(regs)

    assert vmm(vm).run(vcpu) == HALT
    assert (buffer.memory[0x2000], buffer.memory[0x3000]) == (0xAA, 0xBB)
    vm.vm.set_user_memory_region2(0, 0, 0, 0)


@pytest.mark.requires("guest-memfd")
@pytest.mark.parametrize(
    ("gpa", "size", "offset"),
    [(0x800, 0x1000, 0), (0, 0x1000, 0x800), (0, SIZE, 0x1000), (0, 0x1000, SIZE), (0, 0x2000, -0x1000)],
    ids=["gpa-unaligned", "offset-unaligned", "beyond-the-end", "behind-the-end", "offset-wraps"],
)
def test_refuses_a_slot_that_does_not_fit_its_guest_memfd(
    ordinary_vm: MAKE_VM, buffer: Mapping, gpa: int, size: int, offset: int
) -> None:
    vm = ordinary_vm().vm
    gmem = vm.create_guest_memfd(SIZE)

    with pytest.raises(KvmError) as error:
        vm.set_user_memory_region2(
            0, gpa, size, buffer.address, GMEM, guest_memfd=gmem.fd, guest_memfd_offset=offset & (1 << 64) - 1
        )
    assert error.value.errno == errno.EINVAL


@pytest.mark.requires("guest-memfd")
def test_a_guest_memfd_belongs_to_the_vm_that_made_it(ordinary_vm: MAKE_VM, buffer: Mapping) -> None:
    one, other = ordinary_vm().vm, ordinary_vm().vm
    gmem = one.create_guest_memfd(SIZE)

    for vm, fd, err in ((other, gmem.fd, errno.EINVAL), (one, 0xFFFF_FFFF, errno.EBADF), (one, one.fd, errno.EINVAL)):
        with pytest.raises(KvmError) as error:
            vm.set_user_memory_region2(0, 0, 0x1000, buffer.address, GMEM, guest_memfd=fd)
        assert error.value.errno == err
    one.set_user_memory_region2(0, 0, SIZE, buffer.address, GMEM, guest_memfd=gmem.fd)
    one.set_user_memory_region2(0, 0, 0, 0)
    one.set_user_memory_region2(0, 0x8000, 0x1000, buffer.address, GMEM, guest_memfd=gmem.fd)
