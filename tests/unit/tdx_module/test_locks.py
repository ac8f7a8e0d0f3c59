"""The module's locks: what a failed attempt leaves behind, and who goes first."""

import hypothesis.strategies as st
from hypothesis import HealthCheck, given, settings

from sim_backend.seamcall_host import SeamcallHost
from sim_backend.tdx_module.errors import LeafError
from sim_backend.tdx_module.locks import (
    EXCLUSIVE,
    HOST_PRIORITY,
    HP_READER,
    READER,
    GuestTry,
    HostPriorityLock,
    SharexLock,
)
from sim_backend.tdx_module.pamt import PageType
from uapi_ctypes.tdx_status import Operand, Rax, Status


def plain(raw: int) -> SharexLock:
    lock = SharexLock()
    lock.raw = raw
    return lock


def host_priority(raw: int) -> HostPriorityLock:
    lock = HostPriorityLock()
    lock.raw = raw
    return lock


WORDS = st.sampled_from([0, EXCLUSIVE, READER, 3 * READER])
HP_WORDS = st.sampled_from(
    [0, EXCLUSIVE, HOST_PRIORITY, HP_READER, EXCLUSIVE | HOST_PRIORITY, 2 * HP_READER | HOST_PRIORITY]
)


@given(WORDS)
def test_trying_a_plain_lock_is_acquiring_and_releasing_it(raw: int) -> None:
    taken, tried = plain(raw), plain(raw)
    acquired = taken.acquire_shared()
    if acquired:
        taken.release_shared()
    assert tried.try_shared() == acquired
    assert tried.raw == taken.raw

    taken, tried = plain(raw), plain(raw)
    acquired = taken.acquire_exclusive()
    if acquired:
        taken.release_exclusive()
    assert tried.try_exclusive() == acquired
    assert tried.raw == taken.raw


@given(HP_WORDS)
def test_trying_a_host_priority_lock_is_acquiring_and_releasing_it(raw: int) -> None:
    taken, tried = host_priority(raw), host_priority(raw)
    acquired = taken.acquire_shared()
    if acquired:
        taken.release_shared()
    assert tried.try_shared() == acquired
    assert tried.raw == taken.raw

    taken, tried = host_priority(raw), host_priority(raw)
    acquired = taken.acquire_exclusive()
    if acquired:
        taken.release_exclusive()
    assert tried.try_exclusive() == acquired
    assert tried.raw == taken.raw


def test_a_failed_reader_stays_counted_until_the_writer_leaves() -> None:
    lock = plain(EXCLUSIVE)
    assert not lock.acquire_shared()
    assert lock.raw == EXCLUSIVE | READER
    lock.release_exclusive()
    assert lock.raw == 0


def test_a_host_that_fails_asks_for_priority_and_gets_it() -> None:
    lock = host_priority(HP_READER)
    assert not lock.try_exclusive()
    assert lock.guest_try_shared() is GuestTry.BUSY_HOST_PRIORITY
    lock.release_shared()
    assert lock.guest_try_exclusive() is GuestTry.BUSY_HOST_PRIORITY
    assert lock.try_exclusive()
    assert lock.guest_try_exclusive() is GuestTry.ACQUIRED


def test_priority_survives_an_exclusive_release() -> None:
    lock = host_priority(EXCLUSIVE)
    assert not lock.try_shared()
    lock.release_exclusive()
    assert lock.raw == HOST_PRIORITY


@given(
    page_type=st.sampled_from(list(PageType)),
    lock=st.sampled_from([0, EXCLUSIVE, HOST_PRIORITY, HP_READER, EXCLUSIVE | HOST_PRIORITY]),
    upper=st.sampled_from([0, EXCLUSIVE, HOST_PRIORITY, HP_READER]),
    wanted=st.sampled_from(list(PageType)),
    exclusive=st.integers(0, 1),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_fast_way_to_lock_a_page_is_the_walk(
    host: SeamcallHost, page_type: PageType, lock: int, upper: int, wanted: PageType, exclusive: int
) -> None:
    results = []
    for method in ("lock", "walk"):
        pamt = host.module.pamt
        hpa = (1 << 30) + 0x5000
        entries = [pamt.entry(hpa, level) for level in (0, 1, 2)]
        pamt.q[entries[0]] = page_type << 16 | lock
        pamt.q[entries[1]] = pamt.q[entries[2]] = upper
        error = None
        try:
            if method == "lock":
                pamt.lock(hpa, wanted, Operand.R8, exclusive)
            else:
                pamt.walk(hpa, Operand.R8, exclusive)
                error = None if page_type == wanted else int(Rax(Status.PAGE_METADATA_INCORRECT, Operand.R8))
        except LeafError as found:
            error = found.rax
        taken = [pamt.q[entry] for entry in entries]
        pamt.release()
        results.append((error, taken, [pamt.q[entry] for entry in entries]))
        for entry in entries:
            pamt.q[entry] = 0
    assert results[0] == results[1]


def test_one_page_for_two_operands_is_busy(host: SeamcallHost) -> None:
    td = host.create_td(init=False)
    regs = host.call(1, rcx=td.tdr, rdx=td.tdr, accept=Status.OPERAND_BUSY)
    assert Rax.decode(regs[0]) == Rax(Status.OPERAND_BUSY, Operand.RCX)
