"""How the processors of an ordinary VM start, stop and wait: INIT, SIPI, HLT and NMI, with an APIC in the kernel."""

import errno
from collections.abc import Callable
from typing import Final

import pytest

from tdxhw.errors import GuestTimeout
from tdxhw.exits import PortIo
from tdxhw.ordinary_vm import OrdinaryVm
from tdxhw.vmm import Guest, Vmm, run_together
from uapi_ctypes.caps import KvmCap
from uapi_ctypes.errors import KvmError
from uapi_ctypes.kvm import KvmMpStateValue
from uapi_ctypes.vcpu import Vcpu

pytestmark = pytest.mark.requires("kvm", "vm-type-default")

MAKE_VM = Callable[..., OrdinaryVm]
MAKE_VMM = Callable[[Guest], Vmm]
RUNNABLE: Final = KvmMpStateValue.KVM_MP_STATE_RUNNABLE
UNINITIALIZED: Final = KvmMpStateValue.KVM_MP_STATE_UNINITIALIZED
INIT_RECEIVED: Final = KvmMpStateValue.KVM_MP_STATE_INIT_RECEIVED
HALTED: Final = KvmMpStateValue.KVM_MP_STATE_HALTED
SIPI_RECEIVED: Final = KvmMpStateValue.KVM_MP_STATE_SIPI_RECEIVED
MSI_ADDRESS: Final = 0xFEE0_0000
MODE_NMI, MODE_INIT, MODE_STARTUP = 4 << 8, 5 << 8, 6 << 8
PAGE: Final = 2
"""Where a SIPI starts its vCPU [4 KiB]."""
STARTED: Final = 0x81
"""The port that the code there writes to."""
RESET_RIP, RESET_CS = 0xFFF0, 0xF000
CR0_ET, CR0_CD_NW = 1 << 4, 0b11 << 29
APIC_BASE_X2APIC: Final = 1 << 10
OUT_STARTED: Final = bytes((0xE6, STARTED, 0xF4))  # out 0x81, al; hlt
HLT: Final = b"\xf4"
SHORT_S: Final = 0.2
"""How long a vCPU is given to do what it must not [s]."""


def with_two_vcpus(ordinary_vm: MAKE_VM) -> OrdinaryVm:
    """Make a VM whose second vCPU waits for INIT; a SIPI to page 2 has it write to port 0x81."""
    vm = ordinary_vm()
    vm.vm.enable_cap(KvmCap.KVM_CAP_SPLIT_IRQCHIP, 24)
    vm.add_slot(0, 0x10000)
    for vcpu_id in range(2):
        vcpu = vm.create_vcpu(vcpu_id)
        vm.start_real_mode(vcpu, HLT)
        vcpu.set_lapic(vcpu.get_lapic())  # until then KVM's map of APIC ids does not have the newest vCPU
    vm.memory.write(PAGE << 12, OUT_STARTED)
    return vm


def send(vm: OrdinaryVm, mode: int, vector: int = 0, to: int = 1) -> None:
    """Send `mode` to the local APIC with the id `to`, as a device would."""
    assert vm.vm.signal_msi(MSI_ADDRESS | to << 12, mode | vector) == 1


def started(exit_: object) -> bool:
    return isinstance(exit_, PortIo) and exit_.port == STARTED


def test_the_newest_vcpu_gets_no_message_that_names_it_until_its_apic_is_set(ordinary_vm: MAKE_VM) -> None:
    vm = ordinary_vm()
    vm.vm.enable_cap(KvmCap.KVM_CAP_SPLIT_IRQCHIP, 24)
    vcpus = [vm.create_vcpu(vcpu_id) for vcpu_id in range(3)]
    assert [vm.vm.signal_msi(MSI_ADDRESS | index << 12, MODE_NMI) for index in range(3)] == [1, 1, 0]

    vcpus[0].set_lapic(vcpus[0].get_lapic())

    assert [vm.vm.signal_msi(MSI_ADDRESS | index << 12, MODE_NMI) for index in range(3)] == [1, 1, 1]
    assert vm.vm.signal_msi(MSI_ADDRESS | 0xFF << 12, MODE_NMI) == 3, "everybody"


def test_an_application_processor_waits_for_init(ordinary_vm: MAKE_VM, vmm: MAKE_VMM) -> None:
    vm = with_two_vcpus(ordinary_vm)

    with pytest.raises(GuestTimeout):
        vmm(vm).run(vm.vcpus[1], limit_s=SHORT_S)

    assert vm.vcpus[1].get_mp_state() == UNINITIALIZED


def test_init_ends_the_first_run_with_eagain_and_sipi_starts_the_vcpu(ordinary_vm: MAKE_VM, vmm: MAKE_VMM) -> None:
    vm = with_two_vcpus(ordinary_vm)
    second = vm.vcpus[1]

    send(vm, MODE_INIT)
    with pytest.raises(KvmError) as error:
        second.run()
    assert error.value.errno == errno.EAGAIN
    assert second.get_mp_state() == INIT_RECEIVED
    with pytest.raises(GuestTimeout):
        vmm(vm).run(second, limit_s=SHORT_S)

    send(vm, MODE_STARTUP, PAGE)
    assert started(vmm(vm).run(second))
    assert second.get_sregs().cs.selector == PAGE << 8


@pytest.mark.parametrize("state", [UNINITIALIZED, HALTED, RUNNABLE])
def test_a_sipi_without_an_init_is_lost(ordinary_vm: MAKE_VM, state: KvmMpStateValue) -> None:
    vm = with_two_vcpus(ordinary_vm)
    second = vm.vcpus[1]
    second.set_mp_state(state)

    send(vm, MODE_STARTUP, PAGE)

    assert second.get_mp_state() == state
    assert second.get_sregs().cs.selector == 0


def test_the_second_of_two_sipis_is_lost(ordinary_vm: MAKE_VM, vmm: MAKE_VMM) -> None:
    vm = with_two_vcpus(ordinary_vm)
    second = vm.vcpus[1]
    send(vm, MODE_INIT)
    send(vm, MODE_STARTUP, PAGE)
    assert started(vmm(vm).run(second))

    send(vm, MODE_STARTUP, PAGE + 1)

    assert second.get_mp_state() == RUNNABLE
    assert second.get_sregs().cs.selector == PAGE << 8


@pytest.mark.parametrize(
    "state", [SIPI_RECEIVED, INIT_RECEIVED], ids=["the-old-state-for-both", "waiting-and-then-a-sipi"]
)
def test_user_space_can_start_a_vcpu(ordinary_vm: MAKE_VM, vmm: MAKE_VMM, state: KvmMpStateValue) -> None:
    vm = with_two_vcpus(ordinary_vm)
    vm.memory.write(0, OUT_STARTED)  # a SIPI whose vector nobody gave starts at page 0
    vm.vcpus[1].set_mp_state(state)
    if state == INIT_RECEIVED:
        send(vm, MODE_STARTUP, PAGE)

    assert started(vmm(vm).run(vm.vcpus[1]))


@pytest.mark.parametrize("caching", [0, CR0_CD_NW], ids=["caches-on", "caches-off"])
@pytest.mark.parametrize(("vcpu_id", "state"), [(0, RUNNABLE), (1, INIT_RECEIVED)], ids=["bsp", "ap"])
def test_init_resets_the_registers_and_keeps_cd_and_nw(
    ordinary_vm: MAKE_VM, vcpu_id: int, state: KvmMpStateValue, caching: int
) -> None:
    vm = with_two_vcpus(ordinary_vm)
    vcpu = vm.vcpus[vcpu_id]
    sregs, regs = vcpu.get_sregs(), vcpu.get_regs()
    sregs.cr0, sregs.cr2 = CR0_ET | caching, 0x1234
    regs.rax = regs.r15 = 77
    vcpu.set_sregs(sregs)
    vcpu.set_regs(regs)
    events = vcpu.get_vcpu_events()
    events.nmi.masked = 1
    vcpu.set_vcpu_events(events)

    send(vm, MODE_INIT, to=vcpu_id)

    assert vcpu.get_mp_state() == state
    regs, sregs, events = vcpu.get_regs(), vcpu.get_sregs(), vcpu.get_vcpu_events()
    assert (regs.rip, regs.rflags, regs.rax, regs.r15) == (RESET_RIP, 2, 0, 0)
    assert (sregs.cs.selector, sregs.cs.base) == (RESET_CS, 0xFFFF_0000)
    assert (sregs.cr0, sregs.cr2) == (CR0_ET | caching, 0)
    assert (events.nmi.masked, events.smi.latched_init) == (0, 0)


def test_init_stops_a_running_application_processor(ordinary_vm: MAKE_VM, vmm: MAKE_VMM) -> None:
    vm = with_two_vcpus(ordinary_vm)
    second = vm.vcpus[1]
    second.set_mp_state(RUNNABLE)
    vm.memory.write(0x1000, OUT_STARTED)

    send(vm, MODE_INIT)
    with pytest.raises(GuestTimeout):
        vmm(vm).run(second, limit_s=SHORT_S)

    assert second.get_mp_state() == INIT_RECEIVED


def test_the_boot_processor_starts_an_application_processor(ordinary_vm: MAKE_VM, vmm: MAKE_VMM) -> None:
    """INIT and SIPI as firmware sends them, through the x2APIC's ICR, while the other vCPU waits in KVM_RUN."""
    vm = with_two_vcpus(ordinary_vm)
    for vcpu in vm.vcpus:
        vm.set_supported_cpuid(vcpu)
        sregs = vcpu.get_sregs()
        sregs.apic_base |= APIC_BASE_X2APIC
        vcpu.set_sregs(sregs)
    icr, to_second = b"\x66\xb9\x30\x08\x00\x00", b"\x66\xba\x01\x00\x00\x00"  # mov ecx, 0x830; mov edx, 1
    init, startup = (b"\x66\xb8" + (1 << 14 | mode).to_bytes(4, "little") for mode in (MODE_INIT, MODE_STARTUP | PAGE))
    wrmsr = b"\x0f\x30"
    vm.start_real_mode(vm.vcpus[0], icr + to_second + init + wrmsr + startup + wrmsr + b"\xe6\x80" + HLT)

    first, second = run_together(vmm(vm), vm.vcpus)

    assert isinstance(first, PortIo)
    assert first.port == 0x80
    assert started(second)


def with_nmi_handler(vm: OrdinaryVm) -> Vcpu:
    """Give the first vCPU an NMI handler that writes to port 0x83, halts and returns."""
    vm.memory.write(8, (0x3000).to_bytes(4, "little"))
    vm.memory.write(0x3000, b"\xe6\x83\xf4\xcf")  # out 0x83, al; hlt; iret
    return vm.vcpus[0]


def test_of_many_nmis_one_is_in_progress_and_one_pending(ordinary_vm: MAKE_VM, vmm: MAKE_VMM) -> None:
    vm = with_two_vcpus(ordinary_vm)
    vcpu = with_nmi_handler(vm)
    for _ in range(3):
        send(vm, MODE_NMI, to=0)
    assert vcpu.get_vcpu_events().nmi.pending == 2

    assert vmm(vm).run(vcpu) == PortIo(0x83, 1, True, bytes(1))

    for _ in range(3):
        events = vcpu.get_vcpu_events()
        assert (events.nmi.masked, events.nmi.pending) == (1, 1)
        vcpu.nmi()


def test_an_nmi_that_is_blocked_does_not_wake_a_halted_vcpu(ordinary_vm: MAKE_VM, vmm: MAKE_VMM) -> None:
    vm = with_two_vcpus(ordinary_vm)
    vcpu = with_nmi_handler(vm)
    for _ in range(2):
        vcpu.nmi()
    assert vmm(vm).run(vcpu) == PortIo(0x83, 1, True, bytes(1))

    with pytest.raises(GuestTimeout):
        vmm(vm).run(vcpu, limit_s=SHORT_S)

    assert vcpu.get_mp_state() == HALTED
    assert vcpu.get_vcpu_events().nmi.pending == 1
