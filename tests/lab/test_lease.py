"""Leases on real hosts: one winner, kept alive, given back, taken over when they ran out."""

import threading
import time
from pathlib import Path

import pytest

from tdxhw.lab.connection import Session
from tdxhw.lab.errors import LeaseHeld
from tdxhw.lab.hosts import Host
from tdxhw.lab.lease import Lease, holder_of


@pytest.fixture
def connect(hosts: list[Host], labs: Path, ssh_config: Path) -> object:
    return lambda: Session.open(hosts[1], labs, ssh_config=ssh_config)


def test_who_comes_second_is_told_who_has_it_for_what_and_until_when(connect: object) -> None:
    assert callable(connect)
    with connect() as session, connect() as other:
        with Lease(session, "tdxhw run lifecycle"):
            with pytest.raises(
                LeaseHeld, match=r"host-1 is taken by \S+@\S+ pid \d+ since .* for 'tdxhw run lifecycle'"
            ):
                Lease(other, "me too").take()
            assert holder_of(other) is not None
        assert holder_of(other) is None, "given back"


def test_of_many_that_race_exactly_one_wins(connect: object) -> None:
    assert callable(connect)
    barrier = threading.Barrier(6)
    won: list[Lease] = []
    lost: list[LeaseHeld] = []

    def race(session: Session, number: int) -> None:
        lease = Lease(session, f"racer {number}")
        barrier.wait()
        try:
            lease.take()
            won.append(lease)
        except LeaseHeld as error:
            lost.append(error)

    with connect() as session:
        threads = [threading.Thread(target=race, args=(session, number)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (len(won), len(lost)) == (1, 5)
        won[0].release()


def test_a_lease_is_kept_alive_while_in_use(connect: object) -> None:
    assert callable(connect)
    with connect() as session, connect() as other, Lease(session, "long", ttl_s=0.9):
        time.sleep(1.5)
        with pytest.raises(LeaseHeld):
            Lease(other, "me too").take()


def test_an_expired_lease_is_taken_over_with_a_note(connect: object) -> None:
    assert callable(connect)
    with connect() as session, connect() as other:
        abandoned = Lease(session, "abandoned", ttl_s=0.2)
        abandoned.take()
        time.sleep(0.4)
        with Lease(other, "next") as lease:
            assert "took over the expired lease of" in lease.note
            assert "(abandoned)" in lease.note
            abandoned.release()
            assert holder_of(session) is not None, "who lost a lease cannot release another's"
            with pytest.raises(LeaseHeld):
                abandoned.move_to(session)


def test_it_is_given_back_when_the_body_fails(connect: object) -> None:
    assert callable(connect)
    with connect() as session:
        with pytest.raises(RuntimeError, match="body"), Lease(session, "fails"):
            raise RuntimeError("body")
        assert holder_of(session) is None


def test_a_lease_goes_on_over_a_new_connection(connect: object) -> None:
    assert callable(connect)
    first = connect()
    with connect() as second, Lease(first, "moves") as lease:
        first.close()
        lease.move_to(second)
        holder = holder_of(second)
        assert holder is not None
        assert holder.reason == "moves"
    with connect() as third:
        assert holder_of(third) is None


def test_a_lease_file_that_a_full_disk_cut_off_is_no_lease(connect: object) -> None:
    assert callable(connect)
    with connect() as session:
        session.check('printf \'{"token": "x\' >/run/lock/tdxhw.lease')
        with Lease(session, "after the crash"):
            assert holder_of(session) is not None


def test_another_users_lease_file_does_not_lock_everybody_out(connect: object) -> None:
    assert callable(connect)
    with connect() as session:
        session.check("rm -f /run/lock/tdxhw.lease; : >/run/lock/tdxhw.lease; chown nobody /run/lock/tdxhw.lease")
        with Lease(session, "root after nobody"):
            assert holder_of(session) is not None


def test_a_symbolic_link_in_place_of_the_lease_is_not_followed(connect: object) -> None:
    assert callable(connect)
    with connect() as session:
        session.check("echo precious >/root/precious; ln -sf /root/precious /run/lock/tdxhw.lease")
        with pytest.raises(Exception, match="Too many levels of symbolic links"):
            Lease(session, "trap").take()
        assert session.check("cat /root/precious; rm /run/lock/tdxhw.lease") == "precious\n"
