import errno

import pytest

from sim_backend.hw.gprs import R8, R9, RAX, RDX
from sim_backend.kvm.tdx import vp_fields
from sim_backend.kvm.tdx.init_vcpu import POSTED_INTERRUPT_VECTOR
from sim_backend.machine import Machine
from tests.unit.kvm.tdx.scripted_seam import ScriptedSeam
from tests.unit.kvm.tdx.vmm import X2APIC, TestTd, cpuid_entry
from uapi_ctypes.errors import KvmError
from uapi_ctypes.kvm_state import KvmCpuid2
from uapi_ctypes.tdx_leaves import SeamcallLeaf as H
from uapi_ctypes.vcpu import Vcpu

BUSY = 0x8000_0200 << 32
RUNNABLE, UNINITIALIZED = 0, 1
BUS_LOCK_EXIT, NOTIFY_VMEXIT = 193, 219


def failing(vcpu: Vcpu, flags: int = 0) -> int | None:
    with pytest.raises(KvmError) as raised:
        vcpu.tdx_command(vcpu.dialect.init_vcpu, 0, flags)
    return raised.value.errno


@pytest.fixture
def vcpu(td: TestTd) -> Vcpu:
    td.enable_caps().init_vm()
    return td.create_vcpu(init=False)


def test_flags_are_einval(vcpu: Vcpu, td: TestTd) -> None:
    td.set_cpuid(vcpu)
    assert failing(vcpu, flags=1) == errno.EINVAL


def test_a_second_time_is_einval(vcpu: Vcpu, td: TestTd) -> None:
    td.set_cpuid(vcpu)
    vcpu.tdx_init_vcpu()
    assert failing(vcpu) == errno.EINVAL


def test_the_cpuid_table_must_have_x2apic(vcpu: Vcpu, td: TestTd) -> None:
    assert failing(vcpu) == errno.EINVAL
    vcpu.set_cpuid2(KvmCpuid2.of([cpuid_entry(1)]))
    assert failing(vcpu) == errno.EINVAL
    td.set_cpuid(vcpu)
    vcpu.tdx_init_vcpu()


def test_a_table_with_narrow_addresses_is_einval(vcpu: Vcpu) -> None:
    table = [cpuid_entry(1, ecx=X2APIC), cpuid_entry(0x80000000, eax=0x80000008), cpuid_entry(0x80000008, eax=31)]
    vcpu.set_cpuid2(KvmCpuid2.of(table))
    assert failing(vcpu) == errno.EINVAL


def test_an_application_processor_is_runnable_at_once(vcpu: Vcpu, td: TestTd) -> None:
    other = td.create_vcpu(1, init=False)
    assert (vcpu.get_mp_state(), other.get_mp_state()) == (RUNNABLE, UNINITIALIZED)
    td.set_cpuid(other)
    other.tdx_init_vcpu()
    assert other.get_mp_state() == RUNNABLE


def test_the_seamcalls_come_in_the_kernels_order(td: TestTd, seam: ScriptedSeam) -> None:
    td.enable_caps().init_vm()
    vcpu = td.create_vcpu(init=False)
    td.set_cpuid(vcpu)
    seam.calls.clear()
    vcpu.tdx_init_vcpu(0x1000)
    assert seam.leaves() == [
        H.TDH_VP_CREATE,
        *[H.TDH_VP_ADDCX] * 5,
        H.TDH_VP_INIT,
        *[H.TDH_VP_WR] * 3,
    ]
    init = seam.calls[6]
    assert (init.rcx, init.rdx) == (seam.calls[0].rcx, 0x1000)


def written_fields(td: TestTd, seam: ScriptedSeam, vcpu_id: int = 0) -> dict[int, tuple[int, int]]:
    """Initialise a vCPU; return what TDH.VP.WR wrote: value and mask by field. R8 of TDH.VP.INIT is at 0."""
    fields: dict[int, tuple[int, int]] = {}

    def spy(lp: int, regs: list[int]) -> None:
        if regs[RAX] & 0xFFFF == H.TDH_VP_WR:
            fields[regs[RDX]] = regs[R8], regs[R9]
        elif regs[RAX] & 0xFFFF == H.TDH_VP_INIT:
            fields[0] = regs[R8], regs[RAX] >> 16
        seam.execute(lp, regs)

    vcpu = td.create_vcpu(vcpu_id, init=False)
    td.set_cpuid(vcpu)
    seam.hook = spy
    vcpu.tdx_init_vcpu()
    seam.hook = None
    return fields


def test_the_x2apic_id_is_the_vcpu_id_and_interrupts_are_posted(td: TestTd, seam: ScriptedSeam) -> None:
    td.enable_caps().init_vm()
    fields = written_fields(td, seam, 9)
    assert fields[0] == (9, 1), "version 1"
    assert fields[vp_fields.POSTED_INTERRUPT_VECTOR] == (POSTED_INTERRUPT_VECTOR, 0xFFFF)
    descriptor = td.ops.vm.vcpus[0].vendor.pi_descriptor
    assert fields[vp_fields.POSTED_INTERRUPT_DESCRIPTOR] == (descriptor, (1 << 64) - 1)
    assert fields[vp_fields.PIN_BASED_CONTROLS] == (1 << 7, 1 << 7)


@pytest.mark.parametrize(("machine", "effective"), [("7.3", True), ("7.2", False)], indirect=["machine"])
class TestControls:
    """Notify window and bus-lock exits: effective for TDs since Linux 7.3."""

    def test_a_notify_window(self, td: TestTd, seam: ScriptedSeam, effective: bool) -> None:
        td.vm.enable_cap(NOTIFY_VMEXIT, 0x1234 << 32 | 1)
        td.enable_caps().init_vm()
        fields = written_fields(td, seam)
        expected = {
            vp_fields.INSTRUCTION_TIMEOUT: (0x1234, 0xFFFF_FFFF),
            vp_fields.SECONDARY_CONTROLS: (1 << 31, 1 << 31),
        }
        assert (expected.items() <= fields.items()) == effective

    def test_bus_lock_exits(self, td: TestTd, seam: ScriptedSeam, effective: bool) -> None:
        td.vm.enable_cap(BUS_LOCK_EXIT, 2)
        td.enable_caps().init_vm()
        fields = written_fields(td, seam)
        assert (fields.get(vp_fields.SECONDARY_CONTROLS) == (1 << 30, 1 << 30)) == effective


@pytest.mark.parametrize("leaf", [H.TDH_VP_CREATE, H.TDH_VP_ADDCX, H.TDH_VP_INIT])
def test_a_module_failure_is_eio_and_bugs_the_vm(td: TestTd, seam: ScriptedSeam, leaf: H) -> None:
    td.enable_caps().init_vm()
    vcpu = td.create_vcpu(init=False)
    td.set_cpuid(vcpu)
    seam.fail(leaf, BUSY)
    assert failing(vcpu) == errno.EIO
    with pytest.raises(KvmError) as raised:
        vcpu.get_mp_state()
    assert raised.value.errno == errno.EIO


def test_a_failing_vp_wr_bugs_the_vm_but_this_call_still_succeeds(td: TestTd, seam: ScriptedSeam) -> None:
    td.enable_caps().init_vm()
    vcpu = td.create_vcpu(init=False)
    td.set_cpuid(vcpu)
    seam.fail(H.TDH_VP_WR, BUSY)
    vcpu.tdx_init_vcpu()
    with pytest.raises(KvmError) as raised:
        vcpu.get_mp_state()
    assert raised.value.errno == errno.EIO


def test_out_of_memory_gives_everything_back_and_a_retry_is_legal(vcpu: Vcpu, td: TestTd, machine: Machine) -> None:
    td.set_cpuid(vcpu)
    base = machine.pages.in_use
    try:
        for allowed in range(6):
            machine.pages.limit_pages = base + allowed
            assert failing(vcpu) == errno.ENOMEM
            assert machine.pages.in_use == base
    finally:
        machine.pages.limit_pages = machine.pages.total_pages
    vcpu.tdx_init_vcpu()
