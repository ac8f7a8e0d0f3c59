"""What a TD's guest asks of its VMM: port I/O, MMIO, CPUID, MSRs, HLT, a fatal error."""

from collections.abc import Callable

import pytest

from tdxhw.errors import GuestTimeout
from tdxhw.exits import FatalError, MsrAccess, PortIo
from tdxhw.guest.layout import PORT_SUCCESS, PORT_TEST
from tdxhw.msr_filter import MsrAllowance, deny_all_but
from tdxhw.td import TrustDomain
from tdxhw.td_cpuid import find
from tdxhw.vmm import Guest, Vmm
from uapi_ctypes.caps import KvmCap
from uapi_ctypes.kvm import KvmMpStateValue, KvmMsrExitReason
from uapi_ctypes.kvm_state import KvmMsrEntry, KvmMsrs

pytestmark = pytest.mark.requires("tdx")

LAUNCH = Callable[..., TrustDomain]
MAKE_VMM = Callable[[Guest], Vmm]
SUCCESS = PortIo(PORT_SUCCESS, 4, True, bytes(4))
MMIO_GPA = 0x8000_0000
MTRR_PHYSBASE = (0x200, 0x202, 0x204)
FILTER = deny_all_but(
    MsrAllowance(0x200, read=True, write=True), MsrAllowance(0x202, read=True), MsrAllowance(0x204, write=True)
)


def test_a_port_is_written_and_read_back(launch: LAUNCH, vmm: MAKE_VMM) -> None:
    td = launch("td_ioexit")
    serve = vmm(td)
    written: list[int] = []
    serve.on_port(PORT_TEST, read=lambda _size: written[-1] + 1, write=lambda value, _size: written.append(value))

    assert serve.run(td.vcpus[0]) == SUCCESS
    assert written == [0xAB]


def test_port_writes_of_1_2_and_4_bytes_arrive_and_5_are_refused(launch: LAUNCH, vmm: MAKE_VMM) -> None:
    td = launch("guest_writes")
    serve, written = vmm(td), []
    serve.on_port(PORT_TEST, write=lambda value, size: written.append((size, value)))

    assert serve.run(td.vcpus[0]) == SUCCESS
    assert written == [(1, 0xAB), (2, 0xABCD), (4, 0xFFAB_CDEF)]


def test_port_reads_of_1_2_and_4_bytes_are_answered_and_5_are_refused(launch: LAUNCH, vmm: MAKE_VMM) -> None:
    td = launch("guest_reads")
    serve, sizes = vmm(td), []

    def answer(size: int) -> int:
        sizes.append(size)
        return {1: 0xAB, 2: 0xABCD, 4: 0xFFAB_CDEF}[size]

    serve.on_port(PORT_TEST, read=answer)

    assert serve.run(td.vcpus[0]) == SUCCESS
    assert sizes == [1, 2, 4]


def test_mmio_reads_are_answered_by_size(launch: LAUNCH, vmm: MAKE_VMM) -> None:
    td = launch("mmio_reads")
    serve, reads = vmm(td), []

    def answer(gpa: int, size: int) -> int:
        reads.append((gpa, size))
        return 0x1234_5678_90AB_CDEF >> 8 * (8 - size)

    serve.on_mmio(read=answer)

    assert serve.run(td.vcpus[0]) == SUCCESS
    assert reads == [(MMIO_GPA, size) for size in (1, 2, 4, 8)], "the shared bit never reaches user space"


def test_mmio_writes_arrive_by_size(launch: LAUNCH, vmm: MAKE_VMM) -> None:
    td = launch("mmio_writes")
    serve, written = vmm(td), []
    serve.on_mmio(write=lambda gpa, value, size: written.append((gpa, size, value)))

    assert serve.run(td.vcpus[0]) == SUCCESS
    values = (0x12, 0x1234, 0x1234_5678, 0x1234_5678_90AB_CDEF)
    assert written == [(MMIO_GPA, size, value) for size, value in zip((1, 2, 4, 8), values, strict=True)]


def test_get_td_vm_call_info_says_that_there_is_nothing_special(launch: LAUNCH, vmm: MAKE_VMM) -> None:
    td = launch("get_td_vmcall_info")

    assert vmm(td).run(td.vcpus[0]) == SUCCESS


def test_a_cpuid_tdvmcall_returns_what_set_cpuid2_said(
    trust_domain: Callable[..., TrustDomain], launch: LAUNCH, vmm: MAKE_VMM
) -> None:
    reference = trust_domain().create()
    reference.init_vm()
    leaf_1 = find(reference.cpuid_table(reference.create_vcpu()), 1)
    assert leaf_1 is not None
    td = launch("cpuid_tdcall")
    serve, sent = vmm(td), []
    serve.on_port(PORT_TEST, write=lambda value, _size: sent.append(value))

    assert serve.run(td.vcpus[0]) == SUCCESS
    assert (sent[0], sent[3]) == (leaf_1.eax, leaf_1.edx)


def test_the_cpuid_instruction_says_that_there_is_a_hypervisor_and_x2apic(launch: LAUNCH, vmm: MAKE_VMM) -> None:
    td = launch("td_cpuid")
    serve, sent = vmm(td), []
    serve.on_port(PORT_TEST, write=lambda value, _size: sent.append(value))

    assert serve.run(td.vcpus[0]) == SUCCESS
    assert sent[2] & 1 << 31
    assert sent[2] & 1 << 21


@pytest.mark.dialects("mainline")
def test_msr_reads_pass_the_filter(launch: LAUNCH, vmm: MAKE_VMM) -> None:
    td = launch("msr_reads")
    vcpu = td.vcpus[0]
    vcpu.set_msrs(
        KvmMsrs.of(KvmMsrEntry(index=msr, data=data) for msr, data in zip(MTRR_PHYSBASE, (4, 5, 6), strict=True))
    )
    td.vm.x86_set_msr_filter(FILTER.argument)
    serve, sent = vmm(td), []
    serve.on_port(PORT_TEST, write=lambda value, _size: sent.append(value))

    assert serve.run(vcpu) == SUCCESS
    assert sent == [4, 5]


@pytest.mark.dialects("mainline")
def test_msr_writes_pass_the_filter(launch: LAUNCH, vmm: MAKE_VMM) -> None:
    td = launch("msr_writes")
    vcpu = td.vcpus[0]
    td.vm.x86_set_msr_filter(FILTER.argument)

    assert vmm(td).run(vcpu) == SUCCESS
    msrs = KvmMsrs.of(KvmMsrEntry(index=msr) for msr in MTRR_PHYSBASE)
    assert vcpu.get_msrs(msrs) == 3
    assert [entry.data for entry in msrs.filled()] == [4, 0, 6]


@pytest.mark.dialects("mainline")
def test_a_filtered_msr_can_be_served_by_user_space(launch: LAUNCH, vmm: MAKE_VMM) -> None:
    td = launch("msr_writes")
    td.vm.enable_cap(KvmCap.KVM_CAP_X86_USER_SPACE_MSR, KvmMsrExitReason.KVM_MSR_EXIT_REASON_FILTER)
    td.vm.x86_set_msr_filter(FILTER.argument)
    serve, seen = vmm(td), []

    def refuse(access: MsrAccess) -> None:
        seen.append(access)

    serve.on_msr(refuse)

    assert serve.run(td.vcpus[0]) == SUCCESS, "the payload wants the filtered write to be refused"
    assert seen == [MsrAccess(0x202, 5, True, KvmMsrExitReason.KVM_MSR_EXIT_REASON_FILTER)]


def test_a_halted_guest_sleeps_until_it_is_made_runnable(launch: LAUNCH, vmm: MAKE_VMM) -> None:
    td = launch("guest_hlt")
    vcpu = td.vcpus[0]
    with pytest.raises(GuestTimeout):
        vmm(td).run(vcpu, limit_s=0.1)
    halted = vcpu.get_mp_state()

    vcpu.set_mp_state(KvmMpStateValue.KVM_MP_STATE_RUNNABLE)

    assert halted == KvmMpStateValue.KVM_MP_STATE_HALTED
    assert vmm(td).run(vcpu) == SUCCESS


def test_a_fatal_error_reaches_the_vmm_with_its_code(launch: LAUNCH, vmm: MAKE_VMM) -> None:
    td = launch("report_fatal_error")

    error = vmm(td).expect(td.vcpus[0], FatalError)

    assert (error.code, error.gpa) == (0x0BAA_AAAD_0000_0000, 0)
