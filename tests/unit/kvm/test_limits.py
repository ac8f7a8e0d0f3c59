"""What the model of an ordinary VM does not do is refused by name, at the moment at which it would matter."""

import mmap
import struct

import pytest

from sim_backend.kernel import SimKernel
from sim_backend.kvm.errors import NotModelled, SimLimit
from tests.unit.kvm.small_vmm import SmallVm, errno_of
from uapi_ctypes.caps import KvmCap
from uapi_ctypes.ioctl import KvmRequest
from uapi_ctypes.kvm_run import KvmExit
from uapi_ctypes.kvm_state import KvmGuestDebug

ENABLE_WITH_HARDWARE_BREAKPOINTS = 0x2_0001
WRITE_OF_BREAKPOINT_0 = 0x1_0401
LOG_DIRTY_PAGES = 1
VALID_SMM = 8
DIRTY_RING_OFFSET = 64 << 12
NESTED = {"guest_mode": 1, "run_pending": 2, "gif_set": 0x100}


def test_running_with_a_data_breakpoint_is_refused(kernel: SimKernel) -> None:
    with SmallVm(kernel) as small:
        debug = KvmGuestDebug(control=ENABLE_WITH_HARDWARE_BREAKPOINTS)
        debug.debugreg[7] = WRITE_OF_BREAKPOINT_0
        small.vcpu.set_guest_debug(debug)
        with pytest.raises(NotModelled, match="data and I/O breakpoints"):
            small.vcpu.run()


@pytest.mark.parametrize("dr7", [1, 0x80, 0x2000])
def test_running_with_breakpoints_in_the_guest_s_own_dr7_is_refused(kernel: SimKernel, dr7: int) -> None:
    with SmallVm(kernel) as small:
        registers = small.vcpu.get_debugregs()
        registers.dr7 |= dr7
        small.vcpu.set_debugregs(registers)
        with pytest.raises(NotModelled, match="debug registers"):
            small.vcpu.run()
        registers.dr7 &= ~dr7
        small.vcpu.set_debugregs(registers)
        assert small.vcpu.run() == KvmExit.KVM_EXIT_HLT


def test_a_guest_that_sets_a_breakpoint_itself_is_refused(kernel: SimKernel) -> None:
    code = bytes.fromhex("66b801000000 0f23f8 f4")  # mov eax, 1; mov dr7, eax; hlt
    with SmallVm(kernel, code) as small, pytest.raises(SimLimit, match="breakpoints"):
        small.vcpu.run()


def test_an_smi_that_comes_as_a_message_is_taken_and_then_refused(kernel: SimKernel) -> None:
    with SmallVm(kernel, split=True) as small:
        assert small.vm.signal_msi(0xFEE0_0000, 0x200) == 1
        with pytest.raises(NotModelled, match="system management mode"):
            small.vcpu.run()


def test_a_system_management_interrupt_is_refused_at_the_next_run(kernel: SimKernel) -> None:
    with SmallVm(kernel) as small:
        small.vcpu.smi()
        with pytest.raises(NotModelled, match="system management mode"):
            small.vcpu.run()


def test_an_init_waits_for_the_end_of_system_management_mode(kernel: SimKernel) -> None:
    with SmallVm(kernel, split=True) as small:
        events = small.vcpu.get_vcpu_events()
        events.smi.smm, events.flags = 1, VALID_SMM
        small.vcpu.set_vcpu_events(events)
        small.vm.signal_msi(0xFEE0_0000, 0x4500)  # INIT
        assert small.vcpu.get_mp_state() == 0
        events = small.vcpu.get_vcpu_events()
        assert (events.smi.smm, events.smi.latched_init) == (1, 1)
        events.smi.smm = 0
        events.flags = VALID_SMM
        small.vcpu.set_vcpu_events(events)
        small.vcpu.get_mp_state()
        assert small.vcpu.get_vcpu_events().smi.latched_init == 0
        assert small.vcpu.get_regs().rip == 0xFFF0, "it has been reset"


@pytest.mark.parametrize("logging", [False, True])
def test_a_dirty_ring_is_refused_where_a_slot_logs(kernel: SimKernel, logging: bool) -> None:
    with SmallVm(kernel, n_vcpus=0) as small:
        small.vm.enable_cap(KvmCap.KVM_CAP_DIRTY_LOG_RING, 65536)
        small.vm.set_user_memory_region(
            0, 0, small.memory.length, small.memory.hva, flags=LOG_DIRTY_PAGES if logging else 0
        )
        small.vcpus.append(small.vm.create_vcpu(0))
        small.start(small.vcpu, 0x1000)
        if logging:
            with pytest.raises(NotModelled, match="dirty rings"):
                small.vcpu.run()
        else:
            assert small.vcpu.run() == KvmExit.KVM_EXIT_HLT


def test_a_dirty_ring_can_be_mapped_and_is_empty(kernel: SimKernel) -> None:
    with SmallVm(kernel, n_vcpus=0) as small:
        small.vm.enable_cap(KvmCap.KVM_CAP_DIRTY_LOG_RING, 65536)
        small.vcpus.append(small.vm.create_vcpu(0))
        with mmap.mmap(small.vcpu.fd, 65536, offset=DIRTY_RING_OFFSET) as ring:
            assert ring[:] == bytes(65536)
        assert small.vm.ioctl(KvmRequest.KVM_RESET_DIRTY_RINGS) == 0


@pytest.mark.parametrize("kernel", ["svm"], indirect=True)
def test_an_svm_vcpu_says_that_gif_is_set_and_takes_that_back(kernel: SimKernel) -> None:
    with SmallVm(kernel) as small:
        state = small.vcpu.get_nested_state(128)
        assert (state.flags, state.format, state.size) == (NESTED["gif_set"], 1, 128)
        small.vcpu.set_nested_state(state)


@pytest.mark.parametrize("kernel", ["svm"], indirect=True)
@pytest.mark.parametrize(("flags", "size"), [(NESTED["run_pending"], 128), (NESTED["guest_mode"], 128), (4, 128)])
def test_a_nested_state_that_cannot_be_is_einval(kernel: SimKernel, flags: int, size: int) -> None:
    with SmallVm(kernel) as small:
        state = small.vcpu.get_nested_state(128)
        state.flags, state.size = flags, size
        assert errno_of(lambda: small.vcpu.set_nested_state(state)) == "EINVAL"


def enable_svm(small: SmallVm) -> None:
    """Offer SVM to the guest and set EFER.SVME."""
    small.vcpu.set_cpuid2(small.kvm.get_supported_cpuid(100))
    sregs = small.vcpu.get_sregs()
    sregs.efer |= 1 << 12
    small.vcpu.set_sregs(sregs)


@pytest.mark.parametrize("kernel", ["svm"], indirect=True)
def test_a_nested_guest_is_refused_by_name_where_svm_is_on_and_einval_where_it_is_off(kernel: SimKernel) -> None:
    with SmallVm(kernel) as small:
        state = small.vcpu.get_nested_state(128 + 4096)
        state.flags, state.size = NESTED["guest_mode"], 128 + 4096
        assert errno_of(lambda: small.vcpu.set_nested_state(state)) == "EINVAL"
        enable_svm(small)
        with pytest.raises(NotModelled, match="nested guests"):
            small.vcpu.set_nested_state(state)
        struct.pack_into("<Q", state, 8, 0x123)  # an impossible address of a VMCB
        assert errno_of(lambda: small.vcpu.set_nested_state(state)) == "EINVAL"


@pytest.mark.parametrize("kernel", ["svm"], indirect=True)
def test_a_cleared_global_interrupt_flag_is_kept_and_refused_at_the_next_run(kernel: SimKernel) -> None:
    with SmallVm(kernel) as small:
        state = small.vcpu.get_nested_state(128)
        state.flags = 0
        small.vcpu.set_nested_state(state)
        assert small.vcpu.get_nested_state(128).flags == 0
        with pytest.raises(NotModelled, match="global interrupt flag"):
            small.vcpu.run()
        state.flags = NESTED["gif_set"]
        small.vcpu.set_nested_state(state)
        assert small.vcpu.run() == KvmExit.KVM_EXIT_HLT


def test_a_vmx_vcpu_has_neither_a_vmxon_region_nor_a_vmcs(kernel: SimKernel) -> None:
    with SmallVm(kernel) as small:
        state = small.vcpu.get_nested_state(128)
        assert bytes(state)[8:24] == b"\xff" * 16
        small.vcpu.set_nested_state(state)
        struct.pack_into("<Q", state, 8, 0x123)
        assert errno_of(lambda: small.vcpu.set_nested_state(state)) == "EINVAL"


@pytest.mark.parametrize("kernel", ["svm"], indirect=True)
def test_a_software_protected_vm_takes_an_smi_although_it_has_one_address_space(kernel: SimKernel) -> None:
    with SmallVm(kernel, vm_type=1) as small:
        small.vcpu.smi()
        assert small.vcpu.get_vcpu_events().smi.pending == 1
        assert errno_of(lambda: small.vm.set_user_memory_region(1 << 16, 0, 0x1000, small.memory.hva)) == "EINVAL"
