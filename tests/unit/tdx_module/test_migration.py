"""Migration leaves: everything short of a session."""

import pytest

from sim_backend.hw.gprs import R8, RAX, RCX, RDX, new_gprs
from sim_backend.seamcall_host import SeamcallHost, TdParams
from sim_backend.tdx_module.migration import MBMD_BYTES, session_leaf
from sim_backend.tdx_module.not_modelled import NotModelled
from sim_backend.tdx_module.op_states import ALLOWED, OpState
from sim_backend.tdx_module.pamt import PageType
from sim_backend.tdx_module.td_params import ATTR_MIGRATABLE
from tests.unit.tdx_module.guest_side import FREE_GPA, GPA, Guest
from uapi_ctypes.tdx_leaves import SeamcallLeaf
from uapi_ctypes.tdx_status import Operand, Rax, Status

LIST = 4 << 20
MIGRATE = 1 << 52
SUCCESS = Rax(Status.SUCCESS)
EXPORT, IMPORT = SeamcallLeaf.TDH_EXPORT_STATE_IMMUTABLE, SeamcallLeaf.TDH_IMPORT_STATE_IMMUTABLE
SESSION_LEAVES = [leaf for leaf in SeamcallLeaf if session_leaf(leaf) is not None]
REACHABLE = (OpState.UNINITIALIZED, OpState.INITIALIZED, OpState.RUNNABLE)


@pytest.fixture
def guest(host: SeamcallHost) -> Guest:
    return Guest(host, TdParams(attributes=ATTR_MIGRATABLE), enter=False)


def test_no_session_leaf_is_allowed_in_a_state_that_a_td_can_reach() -> None:
    assert len(SESSION_LEAVES) == 14
    for leaf in SESSION_LEAVES:
        assert not any(ALLOWED[leaf] >> state & 1 for state in REACHABLE), leaf.name


@pytest.mark.parametrize("leaf", SESSION_LEAVES, ids=lambda leaf: leaf.name)
def test_a_session_leaf_outside_a_session_is_out_of_place(guest: Guest, leaf: SeamcallLeaf) -> None:
    operand = guest.tdvpr if leaf.name.endswith("_VP") else guest.td.tdr
    lists = {SeamcallLeaf.TDH_EXPORT_BLOCKW, SeamcallLeaf.TDH_EXPORT_MEM, SeamcallLeaf.TDH_IMPORT_MEM}
    where = {"rcx": LIST, "rdx": operand} if leaf in lists else {"rcx": operand}
    assert guest.seamcall(leaf, **where) == Rax(Status.OP_STATE_INCORRECT)


@pytest.mark.parametrize("leaf", SESSION_LEAVES, ids=lambda leaf: leaf.name)
def test_a_session_leaf_in_a_session_says_that_it_is_not_modelled(guest: Guest, leaf: SeamcallLeaf) -> None:
    guest.tdcs.op_state = next(state for state in OpState if ALLOWED[leaf] >> state & 1)
    regs = new_gprs()
    regs[RAX] = leaf
    regs[RCX] = regs[RDX] = guest.tdvpr if leaf.name.endswith("_VP") else guest.td.tdr
    with pytest.raises(NotModelled, match=leaf.name):
        guest.module.seamcall(0, regs)


# Streams


def create_stream(guest: Guest) -> int:
    page = guest.host.page()
    assert guest.seamcall(SeamcallLeaf.TDH_MIG_STREAM_CREATE, rcx=page, rdx=guest.td.tdr) == SUCCESS
    return page


def test_a_stream_takes_a_page_until_the_td_is_torn_down(guest: Guest) -> None:
    before = guest.tdr.chldcnt
    pages = [create_stream(guest) for _ in range(2)]
    assert guest.tdcs.num_migs == 2
    assert guest.tdr.chldcnt == before + 2
    pamt = guest.module.pamt
    assert [pamt.page_type(pamt.entry_4k(page)) for page in pages] == [PageType.TDCX] * 2
    guest.td.tdcx[:0] = pages
    guest.host.destroy(guest.td)
    assert [pamt.page_type(pamt.entry_4k(page)) for page in pages] == [PageType.NDA] * 2


def test_a_stream_needs_a_free_page_and_a_td(guest: Guest) -> None:
    leaf = SeamcallLeaf.TDH_MIG_STREAM_CREATE
    status = guest.seamcall(leaf, rcx=guest.page, rdx=guest.td.tdr)
    assert status == Rax(Status.PAGE_METADATA_INCORRECT, Operand.RCX)
    status = guest.seamcall(leaf, rcx=guest.host.page(), rdx=guest.page)
    assert status == Rax(Status.PAGE_METADATA_INCORRECT, Operand.RDX)


def test_a_td_has_at_most_512_streams(guest: Guest) -> None:
    guest.tdcs.num_migs = 512
    status = guest.seamcall(SeamcallLeaf.TDH_MIG_STREAM_CREATE, rcx=guest.host.page(), rdx=guest.td.tdr)
    assert status == Rax(Status.MAX_MIGS_NUM_EXCEEDED)


# The start of a session

MBMD = LIST | MBMD_BYTES << 52
PAGES = LIST | 2 << 55


def export(guest: Guest, *, mbmd: int = MBMD, pages: int = PAGES, stream: int = 0) -> Rax | None:
    return guest.seamcall(EXPORT, rcx=guest.td.tdr, rdx=77, r8=mbmd, r9=pages, r10=stream)


def test_an_export_needs_a_migratable_td_with_streams_and_a_key(guest: Guest, host: SeamcallHost) -> None:
    assert export(Guest(host, enter=False)) == Rax(Status.TD_NOT_MIGRATABLE)
    assert export(guest) == Rax(Status.MIN_MIGS_NOT_CREATED)
    create_stream(guest)
    assert export(guest) == Rax(Status.MIN_MIGS_NOT_CREATED)
    create_stream(guest)
    assert export(guest) == Rax(Status.MIGRATION_DECRYPTION_KEY_NOT_SET)
    assert guest.regs[RDX] == 0
    assert guest.tdcs.op_state == OpState.RUNNABLE
    guest.tdcs.mig_dec_key_set = True
    with pytest.raises(NotModelled, match="migration session"):
        export(guest)


@pytest.mark.parametrize(
    ("operands", "operand"),
    [
        ({"mbmd": LIST | MBMD_BYTES - 1 << 52}, Operand.R8),
        ({"mbmd": MBMD | 64}, Operand.R8),
        ({"stream": 1}, Operand.R10),
        ({"stream": 1 << 62}, Operand.R10),
        ({"pages": LIST | 1 << 55}, Operand.R9),
        ({"pages": PAGES | 1}, Operand.R9),
        ({"pages": PAGES | 1 << 52}, Operand.R9),
    ],
)
def test_bad_operands_of_an_export_are_named(guest: Guest, operands: dict[str, int], operand: Operand) -> None:
    create_stream(guest)
    create_stream(guest)
    assert export(guest, **operands) == Rax(Status.OPERAND_INVALID, operand)


def test_there_is_nothing_to_resume(guest: Guest) -> None:
    create_stream(guest)
    create_stream(guest)
    assert export(guest, stream=1 << 63) == Rax(Status.MIGRATION_STREAM_STATE_INCORRECT)


def test_an_import_needs_an_uninitialised_td_with_streams_and_a_key(guest: Guest, host: SeamcallHost) -> None:
    def start(tdr: int) -> Rax | None:
        return guest.seamcall(IMPORT, rcx=tdr, rdx=77)

    assert start(guest.td.tdr) == Rax(Status.OP_STATE_INCORRECT)
    td = host.create_td(init=False)
    assert start(td.tdr) == Rax(Status.MIN_MIGS_NOT_CREATED)
    assert (guest.regs[RCX], guest.regs[RDX]) == (0, 0)
    for _ in range(2):
        host.call(SeamcallLeaf.TDH_MIG_STREAM_CREATE, rcx=host.page(), rdx=td.tdr)
    assert start(td.tdr) == Rax(Status.MIGRATION_DECRYPTION_KEY_NOT_SET)
    host.module.tdrs[td.tdr].tdcs.mig_dec_key_set = True
    with pytest.raises(NotModelled, match="migration session"):
        start(td.tdr)


# After an export that was aborted


def restore(guest: Guest, entries: list[int], *, first: int = 0, form: int = 0) -> Rax | None:
    guest.module.memory.write(LIST, b"".join(entry.to_bytes(8, "little") for entry in entries))
    operand = LIST | form | first << 3 | len(entries) - 1 << 55
    return guest.seamcall(SeamcallLeaf.TDH_EXPORT_RESTORE, rcx=operand, rdx=guest.td.tdr)


def statuses(guest: Guest, count: int) -> list[int]:
    return [int.from_bytes(guest.module.memory.read(LIST + 8 * i, 8), "little") >> 56 & 0x1F for i in range(count)]


def test_restore_gives_each_entry_its_status_and_counts_the_failures(guest: Guest) -> None:
    status = restore(guest, [GPA, GPA | MIGRATE, 1 << 30 | MIGRATE, FREE_GPA | MIGRATE])
    assert status == Rax(Status.SUCCESS, 3)
    assert statuses(guest, 4) == [1, 4, 2, 4]
    assert guest.regs[RCX] >> 3 & 0x1FF == 4


@pytest.mark.parametrize(
    "entry", [GPA | MIGRATE | 1, GPA | MIGRATE | 1 << 3, GPA | MIGRATE | 1 << 63, 1 << 47 | MIGRATE]
)
def test_restore_stops_at_an_entry_that_is_no_entry(guest: Guest, entry: int) -> None:
    status = restore(guest, [GPA, entry, GPA])
    assert status == Rax(Status.OPERAND_INVALID, Operand.GPA_LIST_ENTRY)
    assert statuses(guest, 3) == [1, 15, 0]
    assert guest.regs[RCX] >> 3 & 0x1FF == 1


def test_restore_goes_on_after_an_interrupt(guest: Guest) -> None:
    guest.module.platform.wrmsr(0x9A, 1)
    assert restore(guest, [GPA, GPA]) == Rax(Status.INTERRUPTED_RESUMABLE)
    assert guest.regs[RCX] >> 3 & 0x1FF == 1


@pytest.mark.parametrize(("first", "form"), [(1, 0), (0, 1), (0, 7)])
def test_restore_needs_a_list_with_entries(guest: Guest, first: int, form: int) -> None:
    assert restore(guest, [GPA], first=first, form=form) == Rax(Status.OPERAND_INVALID, Operand.RCX)


def test_nothing_is_blocked_for_writing_outside_a_session(guest: Guest) -> None:
    leaf = SeamcallLeaf.TDH_EXPORT_UNBLOCKW
    status = guest.seamcall(leaf, rcx=GPA, rdx=guest.td.tdr)
    assert status == Rax(Status.EPT_ENTRY_STATE_INCORRECT, Operand.RCX)
    assert guest.regs[RDX] >> 8 & 0xFF == 4, "MAPPED"
    assert guest.seamcall(leaf, rcx=1 << 30, rdx=guest.td.tdr) == Rax(Status.EPT_WALK_FAILED, Operand.RCX)
    assert guest.seamcall(leaf, rcx=GPA | 1, rdx=guest.td.tdr) == Rax(Status.OPERAND_INVALID, Operand.RCX)
    assert guest.regs[R8] == 0
