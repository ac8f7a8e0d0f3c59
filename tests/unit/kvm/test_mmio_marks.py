"""A frame without memory that was accessed once is marked as MMIO, and only a change of the slots takes that back."""

import errno

import pytest

from sim_backend.kernel import SimKernel
from tests.unit.kvm.small_vmm import CODE, SmallVm, errno_of
from uapi_ctypes.kvm import KvmPreFaultMemory
from uapi_ctypes.kvm_run import KvmExit

DEFAULT, SW_PROTECTED = 0, 1
PRIVATE = 8
GPA = 0x1_2000
READ = b"\x8a\x07\xf4"  # mov al, [bx]
PRIVATE_FAULT, SHARED_FAULT = PRIVATE, 0

pytestmark = pytest.mark.parametrize("kernel", ["svm"], indirect=True)


def vm_about_to_read(kernel: SimKernel, vm_type: int = SW_PROTECTED) -> SmallVm:
    small = SmallVm(kernel, READ, vm_type=vm_type)
    sregs = small.vcpu.get_sregs()
    sregs.ds.base = GPA
    small.vcpu.set_sregs(sregs)
    return small


def read_again(small: SmallVm) -> int | str | None:
    """Return the exit of one more read, or its errno."""
    regs = small.vcpu.get_regs()
    regs.rip = CODE
    small.vcpu.set_regs(regs)
    failure = errno_of(small.vcpu.run)
    reason = small.vcpu.exit_reason
    if reason == KvmExit.KVM_EXIT_MMIO:
        assert small.vcpu.run() == KvmExit.KVM_EXIT_HLT
    return failure or reason


def fault_flags(small: SmallVm) -> int:
    assert small.vcpu.exit_reason == KvmExit.KVM_EXIT_MEMORY_FAULT
    return int(small.vcpu.kvm_run.memory_fault.flags)


def test_the_first_access_to_a_private_frame_without_memory_is_a_private_fault(kernel: SimKernel) -> None:
    with vm_about_to_read(kernel) as small:
        small.vm.set_memory_attributes(GPA, 0x1000, PRIVATE)
        assert read_again(small) == "EFAULT"
        assert fault_flags(small) == PRIVATE_FAULT


def test_mmio_stays_mmio_when_its_frame_becomes_private(kernel: SimKernel) -> None:
    with vm_about_to_read(kernel) as small:
        assert read_again(small) == KvmExit.KVM_EXIT_MMIO
        small.vm.set_memory_attributes(GPA, 0x1000, PRIVATE)
        assert read_again(small) == KvmExit.KVM_EXIT_MMIO


def test_once_the_slots_changed_the_fault_on_the_mark_counts_as_shared(kernel: SimKernel) -> None:
    with vm_about_to_read(kernel) as small:
        assert read_again(small) == KvmExit.KVM_EXIT_MMIO
        small.vm.set_memory_attributes(GPA, 0x1000, PRIVATE)
        small.vm.set_user_memory_region(1, 0x10_0000, 0x1000, small.memory.hva)
        for _ in range(2):
            assert read_again(small) == "EFAULT"
            assert fault_flags(small) == SHARED_FAULT, "and it agrees with the attributes no more"
        small.vm.set_memory_attributes(GPA, 0x1000, 0)
        assert read_again(small) == KvmExit.KVM_EXIT_MMIO


def test_pre_faulting_does_not_look_at_the_mark(kernel: SimKernel) -> None:
    with vm_about_to_read(kernel) as small:
        assert read_again(small) == KvmExit.KVM_EXIT_MMIO
        region = KvmPreFaultMemory(gpa=GPA, size=0x1000)
        assert errno_of(lambda: small.vcpu.pre_fault_memory(region)) == errno.errorcode[errno.ENOENT]
        small.vm.set_memory_attributes(GPA, 0x1000, PRIVATE)
        assert errno_of(lambda: small.vcpu.pre_fault_memory(region)) == errno.errorcode[errno.EFAULT]


def test_memory_that_takes_the_place_of_mmio_ends_the_mark(kernel: SimKernel) -> None:
    with vm_about_to_read(kernel) as small:
        assert read_again(small) == KvmExit.KVM_EXIT_MMIO
        small.memory[0x3000] = b"\x77"
        small.vm.set_user_memory_region(1, GPA, 0x1000, small.memory.hva + 0x3000)
        assert read_again(small) == KvmExit.KVM_EXIT_HLT
        assert small.vcpu.get_regs().rax & 0xFF == 0x77


def test_shared_faults_on_a_mappable_guest_memfd_fail_once_it_is_closed(kernel: SimKernel) -> None:
    with vm_about_to_read(kernel, DEFAULT) as small:
        gmem = small.vm.create_guest_memfd(0x1000, 3)  # MMAP, INIT_SHARED
        small.vm.set_user_memory_region2(
            1, GPA, 0x1000, small.memory.hva + 0x3000, flags=4, guest_memfd=gmem.fd, guest_memfd_offset=0
        )
        assert read_again(small) == KvmExit.KVM_EXIT_HLT
        gmem.close()
        assert read_again(small) == "EFAULT"
        assert fault_flags(small) == SHARED_FAULT
