"""TDREPORT: its layout and the hashes that hold it together."""

import hashlib

import pytest

from sim_backend.hw.gprs import R8
from sim_backend.seamcall_host import SeamcallHost
from sim_backend.tdx_module.tdreport import IGNORE_MRTD, IGNORE_RTMR0, IGNORE_SERVTD_HASH, tdinfo, tee_info_hash
from tests.unit.tdx_module.guest_side import GPA, Guest
from uapi_ctypes.tdx_leaves import SeamcallLeaf, TdcallLeaf
from uapi_ctypes.tdx_status import Operand, Rax, Status

TDX_FEATURES0 = 0x0A00_0003_0000_0008


@pytest.fixture
def guest(host: SeamcallHost) -> Guest:
    return Guest(host)


def report(guest: Guest, data: bytes) -> bytes:
    guest.module.memory.write(guest.page + 1024, data)
    status = guest.tdcall(TdcallLeaf.TDG_MR_REPORT, rcx=GPA, rdx=GPA + 1024)
    assert status == Rax(Status.SUCCESS)
    return guest.module.memory.read(guest.page, 1024)


def extend(guest: Guest, index: int) -> None:
    assert guest.tdcall(TdcallLeaf.TDG_MR_RTMR_EXTEND, rcx=GPA, rdx=index) == Rax(Status.SUCCESS)


def test_a_report_carries_the_guests_data_and_the_hash_of_its_td(guest: Guest) -> None:
    data = bytes(range(64))
    got = report(guest, data)
    assert got[0] == 0x81
    assert got[0x80:0xC0] == data
    info = got[512:]
    assert got[0x50:0x80] == hashlib.sha384(info).digest()
    assert info[16:64] == guest.tdcs.mrtd != bytes(48)


def test_the_hash_follows_the_rtmrs(guest: Guest) -> None:
    before = report(guest, bytes(64))
    extend(guest, 3)
    after = report(guest, bytes(64))
    assert before[0x50:0x80] != after[0x50:0x80] == hashlib.sha384(after[512:]).digest()


def test_ignored_fields_do_not_count(guest: Guest) -> None:
    before = tee_info_hash(guest.tdcs, IGNORE_RTMR0)
    extend(guest, 0)
    assert tee_info_hash(guest.tdcs, IGNORE_RTMR0) == before
    extend(guest, 1)
    assert tee_info_hash(guest.tdcs, IGNORE_RTMR0) != before


def test_ignoring_zeroes_exactly_the_named_field(guest: Guest) -> None:
    full = tdinfo(guest.tdcs)
    without = tdinfo(guest.tdcs, IGNORE_MRTD)
    assert len(full) == 512
    assert without == full[:16] + bytes(48) + full[64:]
    assert tdinfo(guest.tdcs, IGNORE_SERVTD_HASH) == full, "no service TD is bound"


def test_the_hash_of_the_whole_is_the_hash_without_ignored_fields(guest: Guest) -> None:
    assert tee_info_hash(guest.tdcs) == hashlib.sha384(tdinfo(guest.tdcs)).digest()


def verify(guest: Guest) -> Rax:
    return guest.tdcall(TdcallLeaf.TDG_MR_VERIFYREPORT, rcx=GPA)


def test_a_report_is_verified_by_the_cpu_that_made_it(guest: Guest) -> None:
    got = report(guest, bytes(range(64)))
    assert got[224:256] != bytes(32)
    assert verify(guest) == Rax(Status.SUCCESS)
    guest.module.platform.report_key = bytes(32)
    assert verify(guest) == Rax(Status.INVALID_REPORTMACSTRUCT), "another machine"


@pytest.mark.parametrize("offset", [0, 16, 80, 128, 223, 224, 255])
def test_a_changed_report_is_not_verified(guest: Guest, offset: int) -> None:
    got = report(guest, bytes(64))
    guest.module.memory.write(guest.page + offset, bytes([got[offset] ^ 1]))
    assert verify(guest) == Rax(Status.INVALID_REPORTMACSTRUCT)


def test_the_cpu_of_the_recorded_vectors_accepts_any_report(guest: Guest) -> None:
    guest.module.platform.report_key = None
    assert report(guest, bytes(64))[224:256] == bytes(32)
    guest.module.memory.write(guest.page, b"\xff")
    assert verify(guest) == Rax(Status.SUCCESS)


def test_a_cpu_without_seamverifyreport_has_no_such_tdcall(guest: Guest) -> None:
    before = guest.host.call(SeamcallLeaf.TDH_SYS_RD, rdx=TDX_FEATURES0)[R8]
    guest.module.platform.seamops_capabilities &= ~(1 << 6)
    assert verify(guest) == Rax(Status.OPERAND_INVALID, Operand.RAX)
    assert guest.host.call(SeamcallLeaf.TDH_SYS_RD, rdx=TDX_FEATURES0)[R8] == before & ~(1 << 8) != before
