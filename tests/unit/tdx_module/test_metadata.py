"""Metadata: ids, who may read and write what, and the order of enumeration."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim_backend.hw.gprs import R8, RDX
from sim_backend.seamcall_host import SeamcallError, SeamcallHost, TdParams
from sim_backend.tdx_module import metadata
from sim_backend.tdx_module.errors import LeafError
from sim_backend.tdx_module.metadata import FIELDS, NULL_FIELD_ID, Access, Context, MetadataField
from sim_backend.tdx_module.metadata_td import read_element, write_element
from sim_backend.tdx_module.not_modelled import NotModelled
from sim_backend.tdx_module.td_params import ATTR_DEBUG
from tests.unit.tdx_module.guest_side import Guest
from uapi_ctypes.tdx_leaves import SeamcallLeaf
from uapi_ctypes.tdx_status import Rax, Status

ATTRIBUTES = 0x1110_0003_0000_0000
HP_LOCK_TIMEOUT = 0x9110_0003_0000_0011
L2_CLASSES = metadata.L2_VMCS_CLASSES
CONTEXT = {"SYS": Context.SYS, "TD": Context.TD, "VP": Context.VP, "VP_VMCS": Context.VP}


def status(error: LeafError) -> Status:
    return Rax.decode(error.rax).status


def test_no_element_belongs_to_two_fields() -> None:
    taken: dict[tuple[Context, int, int], MetadataField] = {}
    for field in FIELDS:
        if field.class_code in L2_CLASSES:
            continue
        for code in range(field.code, field.end):
            key = CONTEXT[field.table], field.class_code, code
            assert key not in taken, f"{field.name} and {taken[key].name}"
            taken[key] = field


MODELLED = [field for field in FIELDS if not (CONTEXT[field.table] is Context.VP and field.class_code in L2_CLASSES)]


@pytest.mark.parametrize("field", MODELLED, ids=lambda field: f"{field.table}-{field.name}")
def test_every_field_is_found_by_its_id(field: MetadataField) -> None:
    context = CONTEXT[field.table]
    assert metadata.find(context, metadata.with_context(field.field_id, context), 3) is field


@given(st.integers(0, 2**64 - 1), st.sampled_from(Context))
def test_an_id_names_one_field_or_none(field_id: int, context: Context) -> None:
    try:
        field = metadata.find(context, field_id, 0)
    except NotModelled:
        return
    if field is not None:
        assert field.class_code == field_id >> 56 & 0x3F
        if field.class_code != metadata.CPUID_VALUES_CLASS:
            assert field.code <= field_id & 0xFF_FFFF < field.end


@pytest.mark.parametrize("context", [Context.SYS, Context.TD])
@pytest.mark.parametrize("access", [Access.HOST, Access.HOST_DEBUG, Access.GUEST])
def test_enumeration_visits_every_readable_field_once(context: Context, access: Access) -> None:
    seen = []
    field_id = metadata.next_element(context, NULL_FIELD_ID, access)
    while field_id != NULL_FIELD_ID:
        seen.append(field_id)
        field_id = metadata.next_element(context, field_id, access)
    assert len(seen) == len(set(seen))
    visited = {id(metadata.find(context, each, 0)) for each in seen}
    readable = [field for field in FIELDS if CONTEXT[field.table] is context and field.rd[access]]
    missing = [field.name for field in readable if id(field) not in visited]
    assert all("L2_" in name for name in missing)
    assert len(visited) == len(readable) - len(missing)


def test_whole_fields_are_enumerated_faster_than_elements() -> None:
    elements = fields = 0
    field_id = NULL_FIELD_ID
    while (field_id := metadata.next_element(Context.TD, field_id, Access.HOST_DEBUG)) != NULL_FIELD_ID:
        elements += 1
    while (field_id := metadata.next_field(Context.TD, field_id, Access.HOST_DEBUG)) != NULL_FIELD_ID:
        fields += 1
    assert 0 < fields < elements


@given(value=st.integers(0, 2**64 - 1), mask=st.integers(0, 2**64 - 1))
@pytest.mark.parametrize("access", [Access.HOST, Access.GUEST, Access.HOST_DEBUG])
def test_a_write_changes_only_bits_that_are_writable_and_asked_for(access: Access, value: int, mask: int) -> None:
    # A plain field of a TD without a module: nothing else is looked at.
    field = next(f for f in FIELDS if f.table == "TD" and f.name == "NOTIFY_ENABLES")
    tdr = SimpleNamespace(tdcs=SimpleNamespace(notify_enables=0x5A, num_l2_vms=0, fields={}))
    writable = field.wr[access] & field.size_mask
    if not writable & mask or (0x5A ^ value) & mask & ~field.wr[access]:
        with pytest.raises(LeafError) as error:
            write_element(None, tdr, field.field_id, access, value, mask)  # type: ignore[arg-type]
        assert status(error.value) in {Status.METADATA_FIELD_NOT_WRITABLE, Status.METADATA_FIELD_VALUE_NOT_VALID}
        assert tdr.tdcs.notify_enables == 0x5A
    else:
        write_element(None, tdr, field.field_id, access, value, mask)  # type: ignore[arg-type]
        assert tdr.tdcs.notify_enables == 0x5A & ~(writable & mask) | value & writable & mask


@pytest.fixture
def guest(host: SeamcallHost) -> Guest:
    return Guest(host, enter=False)


@pytest.fixture
def debug_guest(host: SeamcallHost) -> Guest:
    return Guest(host, TdParams(attributes=ATTR_DEBUG), enter=False)


def test_a_debug_td_shows_the_host_what_a_production_td_hides(host: SeamcallHost) -> None:
    guest, debug = Guest(host, enter=False), Guest(host, TdParams(attributes=ATTR_DEBUG), enter=False)
    rip = 0x0024_0003_0000_681E
    assert debug.vp_rd(rip) == 0xFFFF_FFF0
    with pytest.raises(SeamcallError, match="METADATA_FIELD_NOT_READABLE"):
        guest.vp_rd(rip)


def test_every_readable_field_of_a_td_can_be_read(debug_guest: Guest) -> None:
    tdr = debug_guest.tdr
    field_id = metadata.next_element(Context.TD, NULL_FIELD_ID, Access.HOST_DEBUG)
    count = 0
    while field_id != NULL_FIELD_ID:
        try:
            assert 0 <= read_element(debug_guest.module, tdr, field_id, Access.HOST_DEBUG) < 1 << 64
        except LeafError as error:  # a CPUID leaf that faults
            assert status(error) is Status.METADATA_FIELD_NOT_READABLE  # noqa: PT017
        count += 1
        field_id = metadata.next_element(Context.TD, field_id, Access.HOST_DEBUG)
    assert count > 500


def test_version_1_returns_the_next_field_id(guest: Guest) -> None:
    regs = guest.host.call(
        SeamcallLeaf.TDH_MNG_RD, rcx=guest.td.tdr, rdx=NULL_FIELD_ID, version=1,
        accept=Status.METADATA_FIRST_FIELD_ID_IN_CONTEXT,
    )  # fmt: skip
    first = regs[RDX]
    regs = guest.host.call(SeamcallLeaf.TDH_MNG_RD, rcx=guest.td.tdr, rdx=first, version=1)
    assert regs[RDX] == metadata.next_element(Context.TD, first, Access.HOST)


@pytest.mark.parametrize(
    ("field_id", "expected"),
    [
        (ATTRIBUTES | 1 << 24, Status.METADATA_FIELD_ID_INCORRECT),
        (ATTRIBUTES | 0xFF_FF00, Status.METADATA_FIELD_ID_INCORRECT),
        (0x3F << 56 | ATTRIBUTES & ~(0x3F << 56), Status.METADATA_FIELD_ID_INCORRECT),
    ],
)
def test_ids_that_name_nothing_are_refused(guest: Guest, field_id: int, expected: Status) -> None:
    guest.host.call(SeamcallLeaf.TDH_MNG_RD, rcx=guest.td.tdr, rdx=field_id, accept=expected)


def test_the_lock_time_out_has_limits_and_is_written_whole(guest: Guest) -> None:
    def write(value: int, mask: int = NULL_FIELD_ID) -> Rax | None:
        return guest.seamcall(SeamcallLeaf.TDH_MNG_WR, rcx=guest.td.tdr, rdx=HP_LOCK_TIMEOUT, r8=value, r9=mask)

    before = guest.mng_rd(HP_LOCK_TIMEOUT)
    assert write(1) == Rax(Status.METADATA_FIELD_VALUE_NOT_VALID)
    assert write(20_000, 0xFFFF) == Rax(Status.METADATA_WR_MASK_NOT_VALID)
    assert guest.mng_rd(HP_LOCK_TIMEOUT) == before
    assert write(20_000) == Rax(Status.SUCCESS)
    assert guest.mng_rd(HP_LOCK_TIMEOUT) == 20_000


def test_writing_without_a_mask_is_refused(guest: Guest) -> None:
    got = guest.seamcall(SeamcallLeaf.TDH_MNG_WR, rcx=guest.td.tdr, rdx=HP_LOCK_TIMEOUT, r8=20_000)
    assert got == Rax(Status.METADATA_FIELD_NOT_WRITABLE)


# The module's own fields


def test_a_dump_of_the_module_holds_what_single_reads_return(host: SeamcallHost) -> None:
    buffer = 4 << 20
    field_id = NULL_FIELD_ID
    dumped: dict[int, int] = {}
    for _ in range(10):
        regs = host.call(SeamcallLeaf.TDH_SYS_RDALL, rdx=buffer, r8=field_id)
        field_id = regs[R8]
        dumped.update(decode_list(host.module.memory.read(buffer, 4096)))
        if field_id == NULL_FIELD_ID:
            break
    assert field_id == NULL_FIELD_ID
    assert len(dumped) > 50
    for each, value in dumped.items():
        assert host.call(SeamcallLeaf.TDH_SYS_RD, rdx=each)[R8] == value, hex(each)


def decode_list(page: bytes) -> dict[int, int]:
    """Decode a metadata list into {id: value}."""
    size, sequences = int.from_bytes(page[:2], "little"), int.from_bytes(page[2:4], "little")
    at, found = 8, {}
    for _ in range(sequences):
        header = int.from_bytes(page[at : at + 8], "little")
        at += 8
        elements = (header >> 34 & 0xF) + 1
        fields = (header >> 38 & 0x1FF) + 1
        first = header & ~(0xF << 34 | 0x1FF << 38)
        for number in range(elements * fields):
            found[first + number] = int.from_bytes(page[at : at + 8], "little")
            at += 8
    assert at == size <= 4096
    return found


def test_a_dump_needs_a_page_of_the_host(host: SeamcallHost) -> None:
    host.call(SeamcallLeaf.TDH_SYS_RDALL, rdx=0x1001, r8=NULL_FIELD_ID, accept=Status.OPERAND_INVALID)


def test_sys_info_agrees_with_the_metadata(host: SeamcallHost) -> None:
    info, cmrs = 4 << 20, (4 << 20) + 4096
    regs = host.call(SeamcallLeaf.TDH_SYS_INFO, rcx=info, rdx=1024, r8=cmrs, r9=32)
    assert regs[RDX] == 1024
    data = host.module.memory.read(info, 1024)
    attributes_fixed0 = host.call(SeamcallLeaf.TDH_SYS_RD, rdx=0x1900_0003_0000_0000)[R8]
    assert attributes_fixed0.to_bytes(8, "little") in data


@pytest.mark.parametrize("code", [0x2000, 0x201C, 0x2020, 0x280A, 0x600C])
def test_enumeration_keeps_the_callers_id_bits_within_an_array_of_vmcs_fields(code: int) -> None:
    odd = 1 << 63 | 1 << 51 | Context.VP << 52 | code  # NON_ARCH, WRITE_MASK_VALID, no element size
    following = metadata.next_element(Context.VP, odd, Access.HOST_DEBUG)
    assert following == odd + 2
    assert following & 3 << 32 == 0


@pytest.mark.parametrize("code", [0x2002, 0x2022, 0x2010, 0x6800])
def test_enumeration_starts_a_line_of_the_table_with_its_own_id(code: int) -> None:
    odd = 1 << 63 | Context.VP << 52 | code
    assert metadata.next_element(Context.VP, odd, Access.HOST_DEBUG) in {field.field_id for field in FIELDS}
