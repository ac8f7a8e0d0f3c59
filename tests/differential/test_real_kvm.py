"""The binding and the seam against the machine's own /dev/kvm: ordinary KVM, no TDX needed."""

import ctypes
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from uapi_ctypes.device import Kvm
from uapi_ctypes.dialect import DIALECTS, detect
from uapi_ctypes.errors import KvmError, errno_name
from uapi_ctypes.ioctl import KvmRequest
from uapi_ctypes.kvm import (
    KVM_API_VERSION,
    GuestMemfdFlag,
    KvmCap,
    KvmMemFlag,
    KvmMpStateValue,
)
from uapi_ctypes.kvm_run import KVM_EXIT_IO_IN, KVM_EXIT_IO_OUT, KvmExit
from uapi_ctypes.kvm_state import KvmMsrEntry, KvmMsrList, KvmMsrs, KvmRegs
from uapi_ctypes.linux import LinuxKernel
from uapi_ctypes.mapping import Mapping, anonymous
from uapi_ctypes.tdx_mainline import KvmTdxCmd
from uapi_ctypes.vcpu import Vcpu
from uapi_ctypes.vm import Vm

pytestmark = pytest.mark.skipif(
    not os.access("/dev/kvm", os.R_OK | os.W_OK),
    reason="no usable /dev/kvm: load kvm_intel or kvm_amd, or join the kvm group",
)

CODE_GPA = 0x1000
MEMORY_SIZE = 0x10000
BAD_POINTER = 1
KERNEL_POINTER = 0xFFFF_8880_0000_0000


@pytest.fixture
def kernel() -> LinuxKernel:
    return LinuxKernel()


@pytest.fixture
def kvm(kernel: LinuxKernel) -> Iterator[Kvm]:
    with Kvm(kernel) as kvm:
        yield kvm


@pytest.fixture
def vm(kvm: Kvm) -> Iterator[Vm]:
    with kvm.create_vm() as vm:
        yield vm


@pytest.fixture
def memory(vm: Vm) -> Iterator[Mapping]:
    """64 KiB of guest memory at GPA 0; closed after the VM is done with it."""
    with anonymous(MEMORY_SIZE) as memory:
        vm.set_user_memory_region(0, 0, MEMORY_SIZE, memory.address)
        yield memory
        vm.close()


def load(vm: Vm, memory: Mapping, code: bytes, **registers: int) -> Vcpu:
    """Return a vCPU about to run `code` in real mode at `CODE_GPA`."""
    memory.memory[CODE_GPA : CODE_GPA + len(code)] = code
    vcpu = vm.create_vcpu(0)
    sregs = vcpu.get_sregs()
    sregs.cs.base = sregs.cs.selector = 0
    vcpu.set_sregs(sregs)
    vcpu.set_regs(KvmRegs(rip=CODE_GPA, rflags=2, **registers))
    return vcpu


def refused(call: pytest.ExceptionInfo[KvmError]) -> str:
    """Return the name of the errno with which `call` failed."""
    return errno_name(call.value.errno or 0)


def open_files() -> set[str]:
    """Return the numbers of this process's open file descriptors."""
    return {path.name for path in Path("/proc/self/fd").iterdir()}


# -- /dev/kvm --


def test_api_version_is_12(kvm: Kvm) -> None:
    assert kvm.get_api_version() == KVM_API_VERSION == 12


def test_run_area_has_room_for_the_io_page(kvm: Kvm) -> None:
    size = kvm.get_vcpu_mmap_size()
    assert size >= 2 * 4096
    assert size % 4096 == 0


def test_offers_what_every_kvm_offers(kvm: Kvm) -> None:
    for cap in (KvmCap.KVM_CAP_USER_MEMORY, KvmCap.KVM_CAP_IRQCHIP, KvmCap.KVM_CAP_IMMEDIATE_EXIT):
        assert kvm.check_extension(cap) == 1, cap.name
    assert kvm.check_extension(KvmCap.KVM_CAP_NR_MEMSLOTS) >= 32


def test_unknown_capability_is_zero(kvm: Kvm) -> None:
    assert kvm.check_extension(0x7FFF_0000) == 0
    assert kvm.check_extension(0xFFFF_FFFF) == 0


def test_dialect_agrees_with_the_vm_types(kvm: Kvm) -> None:
    dialect = detect(kvm.check_extension)
    types = kvm.check_extension(KvmCap.KVM_CAP_VM_TYPES)
    if dialect is None:
        assert not types >> 5 & 1
    else:
        assert dialect in DIALECTS.values()
        assert types >> dialect.tdx_vm_type & 1


def test_supported_cpuid_lists_the_basic_leaves(kvm: Kvm) -> None:
    leaves = {entry.function for entry in kvm.get_supported_cpuid(256).filled()}
    assert {0, 1, 7, 0x8000_0000} <= leaves


def test_too_little_room_for_cpuid_is_e2big(kvm: Kvm) -> None:
    with pytest.raises(KvmError) as error:
        kvm.get_supported_cpuid(1)
    assert refused(error) == "E2BIG"
    assert error.value.request == "KVM_GET_SUPPORTED_CPUID"


def test_msr_list_says_how_much_room_it_needs(kvm: Kvm) -> None:
    msrs = KvmMsrList.allocate(0)
    with pytest.raises(KvmError) as error:
        kvm.get_msr_index_list(msrs)
    assert refused(error) == "E2BIG"
    assert msrs.count > 10

    msrs = KvmMsrList.allocate(msrs.count)
    kvm.get_msr_index_list(msrs)
    assert 0x10 in msrs.filled(), "IA32_TIME_STAMP_COUNTER"


def test_unknown_vm_type_is_einval(kvm: Kvm) -> None:
    with pytest.raises(KvmError) as error:
        kvm.create_vm(63)
    assert refused(error) == "EINVAL"


# -- errors of the seam --


def test_missing_device_says_what_to_do(kernel: LinuxKernel, tmp_path: Path) -> None:
    with pytest.raises(KvmError, match=f"open {tmp_path}/kvm: ENOENT"):
        Kvm(kernel, str(tmp_path / "kvm"))


def test_ioctl_on_a_closed_descriptor_is_ebadf(kernel: LinuxKernel) -> None:
    fd = kernel.open("/dev/kvm")
    kernel.close(fd)
    for call in (
        lambda: kernel.ioctl(fd, KvmRequest.KVM_GET_API_VERSION),
        lambda: kernel.ioctl(fd, KvmRequest.KVM_GET_REGS, KvmRegs()),
        lambda: kernel.ioctl(-1, KvmRequest.KVM_GET_API_VERSION),
        lambda: kernel.close(fd),
    ):
        with pytest.raises(KvmError) as error:
            call()
        assert refused(error) == "EBADF"


def test_closed_handle_is_ebadf_even_when_its_number_is_in_use_again(kernel: LinuxKernel) -> None:
    kvm = Kvm(kernel)
    number = kvm.fd
    kvm.close()
    kvm.close()
    with Kvm(kernel) as other:
        assert other.fd == number
        with pytest.raises(KvmError) as error:
            kvm.get_api_version()
    assert refused(error) == "EBADF"


def test_requests_belong_to_their_own_kind_of_descriptor(kvm: Kvm, vm: Vm) -> None:
    vcpu = vm.create_vcpu(0)
    cases = [
        (kvm, KvmRequest.KVM_RUN, "EINVAL"),
        (vm, KvmRequest.KVM_RUN, "ENOTTY"),
        (vm, KvmRequest.KVM_GET_API_VERSION, "ENOTTY"),
        (vcpu, KvmRequest.KVM_CREATE_VCPU, "EINVAL"),
    ]
    for handle, request, expected in cases:
        with pytest.raises(KvmError) as error:
            handle.ioctl(request)
        assert refused(error) == expected, request.name
        assert error.value.request == request.name


def test_requests_on_a_foreign_file_are_enotty(kernel: LinuxKernel) -> None:
    fd = kernel.open("/dev/null")
    with pytest.raises(KvmError) as error:
        kernel.ioctl(fd, KvmRequest.KVM_GET_API_VERSION)
    kernel.close(fd)
    assert refused(error) == "ENOTTY"


@pytest.mark.parametrize("pointer", [0, BAD_POINTER, KERNEL_POINTER])
def test_bad_pointers_are_efault(vm: Vm, pointer: int) -> None:
    vcpu = vm.create_vcpu(0)
    for request in (KvmRequest.KVM_SET_REGS, KvmRequest.KVM_GET_REGS, KvmRequest.KVM_SET_MP_STATE):
        with pytest.raises(KvmError) as error:
            vcpu.ioctl(request, pointer)
        assert refused(error) == "EFAULT", request.name


# -- VM --


def test_vm_answers_capabilities_too(vm: Vm) -> None:
    assert vm.check_extension(KvmCap.KVM_CAP_CHECK_EXTENSION_VM) >= 1
    assert vm.check_extension(KvmCap.KVM_CAP_MAX_VCPUS) >= 1


def test_unknown_capability_cannot_be_enabled(vm: Vm) -> None:
    with pytest.raises(KvmError) as error:
        vm.enable_cap(0xFFFF)
    assert refused(error) == "EINVAL"
    assert str(error.value) == "KVM_ENABLE_CAP: EINVAL"


def test_memslot_rules(vm: Vm, memory: Mapping) -> None:
    for arguments, expected in (
        ((1, 0x800, 0x1000, memory.address), "EINVAL"),  # GPA not aligned
        ((1, 0x100000, 0x800, memory.address), "EINVAL"),  # size not aligned
        ((1, 0x100000, 0x1000, memory.address + 1), "EINVAL"),  # HVA not aligned
        ((1, 0x1000, 0x1000, memory.address), "EEXIST"),  # overlaps slot 0
        ((1, 0x100000, 0, memory.address), "EINVAL"),  # deletes a slot that is not there
        ((0, 0, 0x2000, memory.address), "EINVAL"),  # changes the size of a slot
    ):
        with pytest.raises(KvmError) as error:
            vm.set_user_memory_region(*arguments)
        assert refused(error) == expected, arguments


def test_a_deleted_slot_makes_room(vm: Vm, memory: Mapping) -> None:
    vm.set_user_memory_region(0, 0, 0, 0)
    vm.set_user_memory_region(1, 0, 0x1000, memory.address, KvmMemFlag.KVM_MEM_LOG_DIRTY_PAGES)


def test_ordinary_vm_has_no_memory_encryption(vm: Vm) -> None:
    with pytest.raises(KvmError) as error:
        vm.memory_encrypt_op(KvmTdxCmd(0))
    assert refused(error) == "ENOTTY"
    assert error.value.request == "KVM_TDX_CAPABILITIES"
    assert error.value.hw_error == 0


def test_vcpu_ids_are_unique_and_bounded(vm: Vm) -> None:
    vm.create_vcpu(0)
    with pytest.raises(KvmError, match="KVM_CREATE_VCPU: EEXIST"):
        vm.create_vcpu(0)
    with pytest.raises(KvmError, match="KVM_CREATE_VCPU: EINVAL"):
        vm.create_vcpu(vm.check_extension(KvmCap.KVM_CAP_MAX_VCPU_ID))


def test_irqchip_is_created_once(vm: Vm) -> None:
    vm.create_irqchip()
    with pytest.raises(KvmError, match="KVM_CREATE_IRQCHIP: EEXIST"):
        vm.create_irqchip()
    vm.irq_line(4, 1)
    assert vm.get_irqchip(0).chip_id == 0


def test_clock_runs(vm: Vm) -> None:
    assert vm.get_clock().clock < vm.get_clock().clock


def test_statistics_have_a_header(vm: Vm) -> None:
    if not vm.check_extension(KvmCap.KVM_CAP_BINARY_STATS_FD):
        pytest.skip("this kernel has no KVM_CAP_BINARY_STATS_FD")
    with vm.get_stats_fd() as stats:
        assert int.from_bytes(os.pread(stats.fd, 4, 8), "little") > 0, "num_desc"


def test_guest_memfd_rules(kvm: Kvm, vm: Vm) -> None:
    if not vm.check_extension(KvmCap.KVM_CAP_GUEST_MEMFD):
        pytest.skip("this kernel has no KVM_CAP_GUEST_MEMFD")
    for size, flags in ((0, 0), (0x800, 0), (0x1000, 1 << 40)):
        with pytest.raises(KvmError) as error:
            vm.create_guest_memfd(size, flags)
        assert refused(error) == "EINVAL"
    gmem = vm.create_guest_memfd(0x4000)
    gmem.fallocate(1, 0, 0x4000)
    gmem.punch_hole(0x1000, 0x1000)
    with pytest.raises(KvmError) as error:
        gmem.punch_hole(0x800, 0x1000)
    assert refused(error) == "EINVAL"
    with pytest.raises(KvmError, match="mmap: ENODEV"):
        gmem.mmap(0x1000)
    assert kvm.fd != gmem.fd


def test_guest_memfd_with_the_mmap_flag_is_ordinary_memory(vm: Vm) -> None:
    wanted = GuestMemfdFlag.GUEST_MEMFD_FLAG_MMAP | GuestMemfdFlag.GUEST_MEMFD_FLAG_INIT_SHARED
    if vm.check_extension(KvmCap.KVM_CAP_GUEST_MEMFD_FLAGS) & wanted != wanted:
        pytest.skip("this kernel has no GUEST_MEMFD_FLAG_MMAP and INIT_SHARED")
    gmem = vm.create_guest_memfd(0x2000, wanted)
    mapping = gmem.mmap(0x2000)
    mapping.memory[0x1000] = 0x5A
    gmem.punch_hole(0x1000, 0x1000)
    assert mapping.memory[0x1000] == 0
    mapping.close()


# -- vCPU --


def test_reset_state_is_the_architectures(vm: Vm) -> None:
    vcpu = vm.create_vcpu(0)
    assert vcpu.get_regs().rip == 0xFFF0
    assert vcpu.get_sregs().cs.base == 0xFFFF_0000
    assert vcpu.get_mp_state() == KvmMpStateValue.KVM_MP_STATE_RUNNABLE


def test_registers_come_back_as_they_were_set(vm: Vm) -> None:
    vcpu = vm.create_vcpu(0)
    regs = KvmRegs(**{f"r{number}": number << 60 | 0x1234_5678 for number in range(8, 16)}, rflags=2, rip=0x77)
    vcpu.set_regs(regs)
    assert bytes(vcpu.get_regs()) == bytes(regs)


def test_cpuid_msrs_and_events_make_the_round_trip(kvm: Kvm, vm: Vm) -> None:
    vcpu = vm.create_vcpu(0)
    vcpu.set_cpuid2(kvm.get_supported_cpuid(256))
    assert vcpu.get_cpuid2(256).count > 5

    msrs = KvmMsrs.of([KvmMsrEntry(index=0x174, data=0x10)])  # IA32_SYSENTER_CS
    assert vcpu.set_msrs(msrs) == 1
    msrs.entries[0].data = 0
    assert vcpu.get_msrs(msrs) == 1
    assert msrs.entries[0].data == 0x10

    events = vcpu.get_vcpu_events()
    vcpu.set_vcpu_events(events)
    assert bytes(vcpu.get_vcpu_events()) == bytes(events)


def test_a_guest_does_port_io_and_halts(vm: Vm, memory: Mapping) -> None:
    #  out dx, al / in al, dx / add al, 1 / out dx, ax / hlt
    vcpu = load(vm, memory, bytes.fromhex("ee ec 04 01 ef f4"), rax=0x2241, rdx=0x3F8)
    run = vcpu.kvm_run

    assert vcpu.run() == KvmExit.KVM_EXIT_IO
    assert (run.io.direction, run.io.size, run.io.port, run.io.count) == (KVM_EXIT_IO_OUT, 1, 0x3F8, 1)
    assert bytes(vcpu.io_data()) == b"A"

    assert vcpu.run() == KvmExit.KVM_EXIT_IO
    assert (run.io.direction, run.io.size) == (KVM_EXIT_IO_IN, 1)
    vcpu.io_data()[:] = b"\x10"

    assert vcpu.run() == KvmExit.KVM_EXIT_IO
    assert bytes(vcpu.io_data()) == b"\x11\x22"

    assert vcpu.run() == KvmExit.KVM_EXIT_HLT
    assert vcpu.get_regs().rip == CODE_GPA + 6


def test_a_guest_reads_and_writes_memory_that_is_not_there(vm: Vm, memory: Mapping) -> None:
    # mov ax, 0x2000 / mov ds, ax / mov al, [0] / mov [4], al / hlt: the first byte past the slot is 0x20000
    code = bytes.fromhex("b8 00 20 8e d8 a0 00 00 a2 04 00 f4")
    vcpu = load(vm, memory, code)
    mmio = vcpu.kvm_run.mmio

    assert vcpu.run() == KvmExit.KVM_EXIT_MMIO
    assert (mmio.phys_addr, mmio.len, mmio.is_write) == (0x20000, 1, 0)
    mmio.data[0] = 0x42
    assert vcpu.run() == KvmExit.KVM_EXIT_MMIO
    assert (mmio.phys_addr, mmio.len, mmio.is_write, mmio.data[0]) == (0x20004, 1, 1, 0x42)
    assert vcpu.run() == KvmExit.KVM_EXIT_HLT


def test_a_guest_writes_to_the_memory_of_its_slot(vm: Vm, memory: Mapping) -> None:
    vcpu = load(vm, memory, bytes.fromhex("c6 06 00 50 99 f4"))  # mov byte [0x5000], 0x99 / hlt
    assert vcpu.run() == KvmExit.KVM_EXIT_HLT
    assert memory.memory[0x5000] == 0x99


def test_immediate_exit_is_eintr(vm: Vm, memory: Mapping) -> None:
    vcpu = load(vm, memory, b"\xeb\xfe")  # jmp $
    vcpu.kvm_run.immediate_exit = 1
    with pytest.raises(KvmError, match="KVM_RUN: EINTR"):
        vcpu.run()


def test_a_signal_ends_an_endless_guest_with_eintr(vm: Vm, memory: Mapping) -> None:
    vcpu = load(vm, memory, b"\xeb\xfe")  # jmp $
    seen: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda number, _: seen.append(number))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)  # again and again: one may come before KVM_RUN
        with pytest.raises(KvmError, match="KVM_RUN: EINTR"):
            vcpu.run()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert seen
    assert vcpu.exit_reason == KvmExit.KVM_EXIT_INTR


# -- lifetimes --


def test_a_vm_lives_as_long_as_its_vcpu(vm: Vm, memory: Mapping) -> None:
    vcpu = load(vm, memory, b"\xf4")
    vm.close_fd()
    assert vcpu.run() == KvmExit.KVM_EXIT_HLT


def test_closing_a_vm_closes_what_was_made_from_it(kvm: Kvm) -> None:
    before = open_files()
    vm = kvm.create_vm()
    vcpu = vm.create_vcpu(0)
    vm.close()
    vm.close()
    assert vcpu.closed
    assert open_files() == before


def test_a_view_of_a_closed_run_area_is_safe_and_empty(vm: Vm, memory: Mapping) -> None:
    vcpu = load(vm, memory, b"\xf4")
    vcpu.run()
    run, area = vcpu.kvm_run, vcpu.run_area
    assert run.exit_reason == KvmExit.KVM_EXIT_HLT
    vcpu.close()
    assert run.exit_reason == 0
    with pytest.raises(ValueError, match="closed"):
        area.view(ctypes.c_uint8 * 1)


def test_the_run_area_pins_its_vcpu(kernel: LinuxKernel, kvm: Kvm) -> None:
    vm = kvm.create_vm()
    vcpu = vm.create_vcpu(0)
    area = kernel.mmap(vcpu.fd, vm.vcpu_mmap_size)
    assert "kvm-vcpu" in Path("/proc/self/maps").read_text()
    vm.close()
    assert "kvm-vcpu" in Path("/proc/self/maps").read_text()
    area.close()
    assert "kvm-vcpu" not in Path("/proc/self/maps").read_text()
