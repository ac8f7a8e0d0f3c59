"""What the host tells the module about posted interrupts, and what it can learn of pending ones."""

import pytest

from sim_backend.cpu.virtual_apic import IA32_X2APIC_TPR, NO_VECTOR, VirtualApic
from sim_backend.hw.gprs import R8
from sim_backend.seamcall_host import SeamcallHost, TdParams
from sim_backend.tdx_module.tdvps import VAPIC_PAGE
from tests.unit.tdx_module.guest_side import Guest
from uapi_ctypes.tdx_leaves import SeamcallLeaf
from uapi_ctypes.tdx_status import Rax, Status

VECTOR, DESCRIPTOR_FIELD, PIN_CONTROLS = 0x0024_0001_0000_0002, 0x0024_0003_0000_2016, 0x0024_0002_0000_4000
GUEST_INTERRUPT_STATUS = 0x0024_0001_0000_0810
VCPU_STATE_DETAILS = 0x9120_0003_0000_0100
VAPIC = 0x0120_0003_0000_0000
PROCESS_POSTED_INTERRUPTS = 1 << 7
ATTRIBUTES_DEBUG = 1
DESCRIPTOR = 0x30_0040
NOTIFICATION = 0xF2


@pytest.fixture
def guest(host: SeamcallHost) -> Guest:
    return Guest(host, TdParams(attributes=ATTRIBUTES_DEBUG), enter=False)


def apic_of(guest: Guest) -> VirtualApic:
    apic = guest.cpu.virtual_apic
    assert apic is not None
    return apic


def vp_wr(guest: Guest, field: int, value: int, mask: int = (1 << 64) - 1) -> None:
    guest.host.call(SeamcallLeaf.TDH_VP_WR, rcx=guest.tdvpr, rdx=field, r8=value, r9=mask)


def set_up(guest: Guest, descriptor: int = DESCRIPTOR) -> VirtualApic:
    vp_wr(guest, VECTOR, NOTIFICATION, 0xFFFF)
    vp_wr(guest, DESCRIPTOR_FIELD, descriptor)
    vp_wr(guest, PIN_CONTROLS, PROCESS_POSTED_INTERRUPTS, PROCESS_POSTED_INTERRUPTS)
    return apic_of(guest)


def post(guest: Guest, vector: int, descriptor: int = DESCRIPTOR) -> None:
    guest.module.q[(descriptor >> 3) + (vector >> 6)] |= 1 << (vector & 63)
    guest.cpu.external_interrupt(NOTIFICATION)


def test_posting_begins_with_the_pin_based_control(guest: Guest) -> None:
    vp_wr(guest, VECTOR, NOTIFICATION, 0xFFFF)
    vp_wr(guest, DESCRIPTOR_FIELD, DESCRIPTOR)
    assert apic_of(guest).notification_vector == NO_VECTOR
    vp_wr(guest, PIN_CONTROLS, PROCESS_POSTED_INTERRUPTS, PROCESS_POSTED_INTERRUPTS)
    assert apic_of(guest).notification_vector == NOTIFICATION
    post(guest, 0x41)
    assert apic_of(guest).recognized() == 0x41


def test_posting_ends_with_the_pin_based_control(guest: Guest) -> None:
    apic = set_up(guest)
    vp_wr(guest, PIN_CONTROLS, 0, PROCESS_POSTED_INTERRUPTS)
    post(guest, 0x41)
    assert guest.cpu.kicked
    assert apic.recognized() == NO_VECTOR


def test_the_descriptor_may_move_and_carry_a_shared_hkid(guest: Guest) -> None:
    set_up(guest)
    moved = DESCRIPTOR + 0x1000
    vp_wr(guest, DESCRIPTOR_FIELD, moved | 1 << guest.module.hkid_start_bit)
    post(guest, 0x99, moved)
    assert apic_of(guest).recognized() == 0x99


def test_the_apic_page_is_the_vapic_fields(guest: Guest) -> None:
    apic_of(guest).write_msr(IA32_X2APIC_TPR, 0x70)
    page = guest.tdvps.tdvps_page_pa[VAPIC_PAGE]
    assert guest.module.q[page + 0x80 >> 3] == 0x70
    assert guest.vp_rd(VAPIC + (0x80 >> 3)) == 0x70


def test_vcpu_state_details_tells_whether_an_interrupt_could_be_delivered(guest: Guest) -> None:
    apic = set_up(guest)
    post(guest, 0x41)
    found = [guest.vp_rd(VCPU_STATE_DETAILS)]
    apic.recognized()  # as the next entry does
    found.append(guest.vp_rd(VCPU_STATE_DETAILS))
    apic.write_msr(IA32_X2APIC_TPR, 0x40)
    found.append(guest.vp_rd(VCPU_STATE_DETAILS))
    assert found == [0, 1, 0]


def test_a_debugger_reads_and_writes_rvi_and_svi(guest: Guest) -> None:
    apic = set_up(guest)
    post(guest, 0x41)
    apic.recognized()
    assert guest.vp_rd(GUEST_INTERRUPT_STATUS) == 0x41
    vp_wr(guest, GUEST_INTERRUPT_STATUS, 0x3055)
    assert (apic.rvi, apic.svi, apic.attention) == (0x55, 0x30, True)


def test_without_debug_nobody_sees_rvi(host: SeamcallHost) -> None:
    guest = Guest(host, enter=False)
    status, registers = Rax(Status.METADATA_FIELD_NOT_READABLE), {"rcx": guest.tdvpr, "rdx": GUEST_INTERRUPT_STATUS}
    assert guest.seamcall(SeamcallLeaf.TDH_VP_RD, **registers) == status
    assert guest.regs[R8] == 0
