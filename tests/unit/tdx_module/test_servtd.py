"""Service TDs: binding, and what a bound migration TD may read and write."""

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim_backend.hw.gprs import R8, R10, R11, R12, R13, RAX, RCX, RDX
from sim_backend.seamcall_host import SeamcallHost, Td
from sim_backend.tdx_module.metadata import CPUID_VALUES_CLASS
from sim_backend.tdx_module.servtd import BindingState, break_handle, make_handle
from sim_backend.tdx_module.tdreport import tee_info_hash
from tests.unit.tdx_module.guest_side import GPA, SOURCE, Guest
from uapi_ctypes.tdx_leaves import SeamcallLeaf, TdcallLeaf
from uapi_ctypes.tdx_status import Operand, Rax, Status

BIND, PREBIND = SeamcallLeaf.TDH_SERVTD_BIND, SeamcallLeaf.TDH_SERVTD_PREBIND
RD, WR = TdcallLeaf.TDG_SERVTD_RD, TdcallLeaf.TDG_SERVTD_WR
SUCCESS = Rax(Status.SUCCESS)
NULL = (1 << 64) - 1
INSTANCE_BINDING = 1
IGNORE_RTMR3 = 1 << 32 + 9
MIG_DEC_KEY, MIG_DEC_KEY_SET, MIG_ENC_KEY = 0x9810_0003_0000_0010, 0x9810_0000_0000_0001, 0x9810_0003_0000_0018
MIG_VERSION = 0x9810_0001_0000_0020
HASH_PAGE = 4 << 20


class Pair:
    """A running migration TD and a TD that is being built."""

    def __init__(self, host: SeamcallHost) -> None:
        self.host = host
        self.service = Guest(host)
        self.target: Td = host.create_td()

    @property
    def target_tdr(self):  # type: ignore[no-untyped-def]
        return self.host.module.tdrs[self.target.tdr]

    def bind(self, *, service: int | None = None, slot: int = 0, kind: int = 0, attributes: int = 0) -> Rax:
        status = self.service.seamcall(
            BIND, rcx=self.target.tdr, rdx=service or self.service.td.tdr, r8=slot, r9=kind, r10=attributes
        )
        assert status is not None
        self.regs = self.service.regs
        return status

    def bound(self) -> dict[str, int]:
        """Bind and return the operands that the service TD needs."""
        assert self.bind() == SUCCESS
        names = ("r10", "r11", "r12", "r13")
        uuid = {name: self.regs[register] for name, register in zip(names, (R10, R11, R12, R13), strict=True)}
        return {"rcx": self.regs[RCX], **uuid}


@pytest.fixture
def pair(host: SeamcallHost) -> Pair:
    return Pair(host)


@given(uuid=st.integers(0, 2**64 - 1), tdr=st.integers(0, 2**40 - 1).map(lambda n: n << 12), slot=st.integers(0, 4095))
def test_only_the_service_td_can_take_its_handle_apart(uuid: int, tdr: int, slot: int) -> None:
    handle = make_handle([uuid, 0, 0, 0], tdr, slot)
    assert break_handle(handle, [uuid, 0, 0, 0]) == (tdr, slot)


def test_a_binding_returns_a_handle_and_the_targets_uuid(pair: Pair) -> None:
    operands = pair.bound()
    assert [operands[name] for name in ("r10", "r11", "r12", "r13")] == pair.target_tdr.td_uuid
    assert break_handle(operands["rcx"], pair.service.tdr.td_uuid) == (pair.target.tdr, 0)


def test_a_td_does_not_serve_itself(pair: Pair) -> None:
    assert pair.bind(service=pair.target.tdr) == Rax(Status.OPERAND_INVALID, Operand.RDX)


@pytest.mark.parametrize(
    ("operands", "operand"),
    [
        ({"slot": 1}, Operand.R8),
        ({"kind": 1}, Operand.R9),
        ({"kind": 1 << 16}, Operand.R9),
        ({"attributes": 2}, Operand.R10),
    ],
)
def test_bad_operands_are_named_and_bind_nothing(pair: Pair, operands: dict[str, int], operand: Operand) -> None:
    assert pair.bind(**operands) == Rax(Status.OPERAND_INVALID, operand)
    assert pair.regs[RCX] == pair.regs[R10] == 0
    assert pair.target_tdr.tdcs.servtd_num == 0


def test_a_service_td_that_is_not_finalised_cannot_be_bound(pair: Pair) -> None:
    other = pair.host.create_td()
    assert pair.bind(service=other.tdr) == Rax(Status.OP_STATE_INCORRECT)


def test_a_first_binding_after_finalize_is_too_late(pair: Pair) -> None:
    finished = Guest(pair.host, enter=False)
    pair.target = finished.td
    assert pair.bind() == Rax(Status.OP_STATE_INCORRECT)


def test_a_busy_table_and_busy_rtmrs_are_named(pair: Pair) -> None:
    pair.target_tdr.tdcs.servtd_bindings_lock.raw = 1
    assert pair.bind() == Rax(Status.OPERAND_BUSY, Operand.SERVTD_BINDINGS)
    pair.target_tdr.tdcs.servtd_bindings_lock.raw = 0
    pair.service.tdcs.rtmr_lock.raw = 1
    assert pair.bind() == Rax(Status.OPERAND_BUSY, Operand.RTMR)


def test_binding_again_needs_the_same_attributes_and_measurements(pair: Pair) -> None:
    assert pair.bind() == SUCCESS
    assert pair.bind() == SUCCESS
    assert pair.bind(attributes=INSTANCE_BINDING) == Rax(Status.SERVTD_ATTR_MISMATCH)
    pair.service.tdcall(TdcallLeaf.TDG_MR_RTMR_EXTEND, rcx=GPA)
    assert pair.bind() == Rax(Status.SERVTD_INFO_HASH_MISMATCH)


def test_an_instance_binding_is_to_one_td_only(pair: Pair) -> None:
    assert pair.bind(attributes=INSTANCE_BINDING) == SUCCESS
    twin = Guest(pair.host, enter=False)
    assert pair.bind(service=twin.td.tdr, attributes=INSTANCE_BINDING) == Rax(Status.SERVTD_UUID_MISMATCH)


def test_another_td_with_the_same_measurements_may_take_over(pair: Pair) -> None:
    assert pair.bind() == SUCCESS
    twin = Guest(pair.host, enter=False)
    assert twin.tdcs.mrtd == pair.service.tdcs.mrtd
    assert pair.bind(service=twin.td.tdr) == SUCCESS
    assert pair.target_tdr.tdcs.servtd_num == 1


def prebind(pair: Pair, info_hash: bytes) -> Rax | None:
    pair.host.module.memory.write(HASH_PAGE, info_hash)
    return pair.service.seamcall(PREBIND, rcx=pair.target.tdr, rdx=HASH_PAGE)


def test_a_late_binding_must_match_what_was_bound_before(pair: Pair) -> None:
    assert prebind(pair, bytes(48)) == SUCCESS
    assert pair.bind() == Rax(Status.SERVTD_INFO_HASH_MISMATCH)
    assert prebind(pair, tee_info_hash(pair.service.tdcs)) == SUCCESS
    assert pair.bind() == SUCCESS
    assert prebind(pair, bytes(48)) == Rax(Status.SERVTD_BOUND)
    assert pair.target_tdr.tdcs.servtd_bindings[0].state is BindingState.BOUND


def test_prebinding_needs_a_64_byte_aligned_hash(pair: Pair) -> None:
    status = pair.service.seamcall(PREBIND, rcx=pair.target.tdr, rdx=HASH_PAGE + 32)
    assert status == Rax(Status.OPERAND_INVALID, Operand.RDX)


def test_finalize_measures_the_binding(pair: Pair) -> None:
    pair.bound()
    host = pair.host
    host.create_vcpu(pair.target, lp=1)
    host.add_page(pair.target, GPA, SOURCE)
    host.finalize(pair.target)
    expected = tee_info_hash(pair.service.tdcs) + (0).to_bytes(2, "little") + (0).to_bytes(8, "little")
    assert pair.target_tdr.tdcs.servtd_hash == hashlib.sha384(expected).digest()


# TDG.SERVTD.RD and WR


def test_a_bound_td_writes_the_migration_key(pair: Pair) -> None:
    operands = pair.bound()
    assert not pair.target_tdr.tdcs.mig_dec_key_set
    assert pair.service.tdcall(WR, rdx=MIG_DEC_KEY, r8=0x1234, r9=NULL, **operands) == SUCCESS
    assert pair.target_tdr.tdcs.mig_dec_key_set
    assert pair.service.tdcall(RD, rdx=MIG_DEC_KEY, **operands) == SUCCESS
    assert pair.service.cpu.gprs[R8] == 0x1234


def test_each_reading_of_the_encryption_key_begins_with_a_new_one(pair: Pair) -> None:
    operands = pair.bound()
    old = list(pair.target_tdr.tdcs.mig_enc_key)
    keys = []
    for _ in range(2):
        for element in range(4):
            assert pair.service.tdcall(RD, rdx=MIG_ENC_KEY + element, **operands) == SUCCESS
            keys.append(pair.service.cpu.gprs[R8])
    assert keys[4:] == pair.target_tdr.tdcs.mig_enc_key
    assert len({tuple(old), tuple(keys[:4]), tuple(keys[4:])}) == 3
    pair.service.module.platform.rand_fail = 1000
    assert pair.service.tdcall(RD, rdx=MIG_ENC_KEY + 1, **operands) == SUCCESS, "only its first element is drawn"
    assert pair.service.tdcall(RD, rdx=MIG_ENC_KEY, **operands) == Rax(Status.RND_NO_ENTROPY)


def test_a_bound_td_writes_nothing_else(pair: Pair) -> None:
    operands = pair.bound()
    status = pair.service.tdcall(WR, rdx=MIG_ENC_KEY, r8=1, r9=NULL, **operands)
    assert status.status is Status.METADATA_FIELD_NOT_WRITABLE
    status = pair.service.tdcall(WR, rdx=MIG_VERSION, r8=1, r9=NULL, **operands)
    assert status.status is Status.METADATA_FIELD_VALUE_NOT_VALID


def test_a_bound_td_enumerates_what_it_may_read_up_to_a_cpuid_leaf_that_has_no_value(pair: Pair) -> None:
    operands = pair.bound()
    assert pair.service.tdcall(RD, rdx=NULL, **operands).status is Status.METADATA_FIRST_FIELD_ID_IN_CONTEXT
    field_id = pair.service.cpu.gprs[RDX]
    seen = []
    while pair.service.tdcall(RD, rdx=field_id, **operands) == SUCCESS:
        seen.append(field_id)
        field_id = pair.service.cpu.gprs[RDX]
    assert len(set(seen)) == len(seen) > 20
    assert field_id >> 56 & 0x3F == CPUID_VALUES_CLASS
    assert pair.service.cpu.gprs[RDX] == NULL


def test_a_wrong_uuid_is_the_guests_mistake(pair: Pair) -> None:
    operands = pair.bound()
    operands["r10"] ^= 1
    assert pair.service.tdcall(RD, rdx=MIG_VERSION, **operands) == Rax(Status.TARGET_UUID_MISMATCH)
    assert pair.service.cpu.gprs[RDX] == NULL


def test_a_slot_that_does_not_exist_is_the_guests_mistake(pair: Pair) -> None:
    operands = pair.bound()
    operands["rcx"] += 1
    assert pair.service.tdcall(RD, rdx=MIG_VERSION, **operands) == Rax(Status.OPERAND_INVALID, Operand.RCX)


def test_a_handle_that_names_no_td_is_a_matter_for_the_host(pair: Pair) -> None:
    operands = pair.bound()
    operands["rcx"] += 1 << 12
    rip = pair.service.cpu.rip
    status = pair.service.try_tdcall(RD, rdx=MIG_VERSION, **operands)
    assert status == Rax(Status.CROSS_TD_TRAP)
    expected = Rax(Status.PAGE_METADATA_INCORRECT, Operand.TDR)
    assert Rax.decode(pair.service.regs[RDX]) == expected
    assert pair.service.regs[R8] == pair.target.tdr + 4096
    assert Rax.decode(pair.service.cpu.gprs[RAX]) == expected
    assert pair.service.cpu.rip == rip + 4, "a trap: the TDCALL is completed"
    pair.service.enter()


def test_a_service_td_that_was_replaced_is_a_matter_for_the_host(pair: Pair) -> None:
    operands = pair.bound()
    twin = Guest(pair.host, enter=False)
    assert pair.bind(service=twin.td.tdr) == SUCCESS
    assert pair.service.try_tdcall(RD, rdx=MIG_VERSION, **operands) == Rax(Status.CROSS_TD_TRAP)
    assert Rax.decode(pair.service.regs[RDX]) == Rax(Status.SERVTD_UUID_MISMATCH)


def test_a_service_td_that_extends_itself_loses_its_binding(pair: Pair) -> None:
    operands = pair.bound()
    pair.service.tdcall(TdcallLeaf.TDG_MR_RTMR_EXTEND, rcx=GPA, rdx=3)
    assert pair.service.try_tdcall(RD, rdx=MIG_VERSION, **operands) == Rax(Status.CROSS_TD_TRAP)
    assert Rax.decode(pair.service.regs[RDX]) == Rax(Status.SERVTD_INFO_HASH_MISMATCH)


def test_a_binding_may_ignore_an_rtmr(pair: Pair) -> None:
    assert pair.bind(attributes=IGNORE_RTMR3) == SUCCESS
    operands = {"rcx": pair.regs[RCX], "r10": pair.regs[R10], "r11": pair.regs[R11], "r12": pair.regs[R12],
                "r13": pair.regs[R13]}  # fmt: skip
    pair.service.tdcall(TdcallLeaf.TDG_MR_RTMR_EXTEND, rcx=GPA, rdx=3)
    assert pair.service.tdcall(RD, rdx=MIG_VERSION, **operands) == SUCCESS


def test_a_guest_yields_to_a_host_that_waits_for_the_targets_tdr(pair: Pair) -> None:
    operands = pair.bound()
    pamt = pair.host.module.pamt
    pair.host.module.q[pamt.entry_4k(pair.target.tdr)] |= 1  # a writer
    status = pair.service.tdcall(RD, rdx=MIG_VERSION, **operands)
    assert status == Rax(Status.OPERAND_BUSY, Operand.TDR)
