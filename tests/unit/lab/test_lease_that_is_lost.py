"""A lease that ends before its run does: the run notices, and does nothing more to a host that is not its own."""

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tdxhw.lab import labgrid_place
from tdxhw.lab import lease as module
from tdxhw.lab.errors import ConnectionLost, LabUnreachable, LeaseLost
from tdxhw.lab.hosts import Driver, Host, SshTarget
from tdxhw.lab.labgrid_place import LabgridPlace
from tdxhw.lab.lease import Lease, holder_of
from tests.unit.lab.test_lease_over_reboots import FILE, Here

BOB = {"token": "bob", "owner": "bob@ws pid 7", "reason": "tdxhw run", "ttl_s": 99}


@pytest.fixture
def here(tmp_path: Path) -> Here:
    return Here(tmp_path)


@pytest.fixture
def sleep(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Have this machine sleep: nothing runs meanwhile, and the time is over afterwards."""
    slept = [0.0]
    now = module._now
    monkeypatch.setattr(module, "_now", lambda: now() + slept[0])

    def fall_asleep(seconds: float) -> None:
        slept[0] += seconds

    return fall_asleep


def lease(here: Any, **more: Any) -> Lease:
    return Lease(here, "mine", folder=str(here.folder), **more)


def taken_by_bob(here: Here) -> None:
    (here.folder / FILE).unlink()
    here.python("lease.py", str(here.folder), "take", stdin=json.dumps(BOB).encode())


def until_it_is_noticed(mine: Lease | LabgridPlace) -> str:
    for _ in range(200):
        try:
            mine.check(None)
        except LeaseLost as error:
            return str(error)
        time.sleep(0.05)
    raise AssertionError("it was never noticed")


def test_somebody_else_who_broke_it_is_noticed_and_named_and_keeps_the_host(here: Here) -> None:
    with lease(here, ttl_s=30.0) as mine:
        mine._done.set()  # its keeper would ask in some seconds
        assert mine._keeper is not None
        mine._keeper.join()
        mine._done.clear()
        taken_by_bob(here)
        mine.check(here)  # type: ignore[arg-type]
        mine._renew(here)  # type: ignore[arg-type]
        told = until_it_is_noticed(mine)
        assert told.startswith("here is taken by bob@ws pid 7 since")
        assert told.endswith("it is not ours any more, so nothing more is done to it")
        with pytest.raises(LeaseLost, match="bob@ws"):
            mine.move_to(here)  # type: ignore[arg-type]
    holder = holder_of(here, folder=str(here.folder))  # type: ignore[arg-type]
    assert holder is not None
    assert holder.owner == "bob@ws pid 7", "giving ours back takes nothing away from bob"


def test_the_keeper_notices_by_itself_that_it_was_removed(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RENEW_S", 0.05)
    with lease(here) as mine:
        mine.check(here)  # type: ignore[arg-type]
        (here.folder / FILE).unlink()
        assert until_it_is_noticed(mine).startswith("here: somebody removed our lease: it is not ours any more")
        assert not (here.folder / FILE).read_text(), "and it does not take the host again"


def test_one_that_ran_out_while_this_machine_slept_is_renewed_before_the_host_is_used(
    here: Here, sleep: Callable[[float], None]
) -> None:
    with lease(here) as mine:
        sleep(1000.0)
        with pytest.raises(LeaseLost, match="has run out, and it cannot be asked who has it now"):
            mine.check(None)  # power control: nobody can be asked
        mine.check(here)  # type: ignore[arg-type]
        mine.check(None)
        sleep(1000.0)
        taken_by_bob(here)
        with pytest.raises(LeaseLost, match="here is taken by bob@ws"):
            mine.check(here)  # type: ignore[arg-type]


def test_a_lease_whose_connection_is_gone_goes_on_over_the_one_that_is_used(
    here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that reconnected closes its connection in the end; the lease of `tdxhw validate` goes on after it."""
    monkeypatch.setattr(module, "RENEW_S", 0.05)

    class Closed(Here):
        def python(self, name: str, *arguments: str, stdin: bytes = b"") -> str:
            raise ConnectionLost("here: the connection is lost")

    def expires() -> float:
        holder = holder_of(here, folder=str(here.folder))  # type: ignore[arg-type]
        assert holder is not None
        return holder.expires

    with lease(here) as mine:
        closed: Any = Closed(here.folder)
        mine._session = closed
        for _ in range(400):
            if mine._is_stuck:
                break
            time.sleep(0.05)
        before = expires()
        time.sleep(0.2)
        assert expires() == pytest.approx(before, abs=0.1), "nobody renews it"
        mine.check(here)  # type: ignore[arg-type]
        assert expires() > before + 0.15
        used: object = mine._session
        assert used is here
        time.sleep(0.3)
        assert not mine._is_stuck, "its keeper goes on over that one"


class Place(LabgridPlace):
    """A place of a coordinator that is told here who has it; an error: it does not answer."""

    answer: str | LabUnreachable = ""

    def holder(self) -> str:
        if isinstance(self.answer, LabUnreachable):
            raise self.answer
        return self.answer

    def _client(self, *command: str) -> "subprocess.CompletedProcess[str]":
        if command == ("acquire",):
            self.answer = "ws/me"
        return subprocess.CompletedProcess(command, 0, "", "")


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setattr(labgrid_place, "RENEW_S", 0.01)
    return Place(Host("here", SshTarget("here"), "labs/here.yaml:1", lease=Driver("labgrid", {"place": "p"})))


@pytest.mark.parametrize(("by", "told"), [("ws2/bob", "by ws2/bob"), ("", "by nobody")])
def test_a_labgrid_place_that_was_taken_away_is_noticed_under_way(place: Place, by: str, told: str) -> None:
    with place:
        place.check(None)
        place.answer = by
        assert f"was taken away {told}: it is not ours any more" in until_it_is_noticed(place)
        with pytest.raises(LeaseLost, match="was taken away"):
            place.move_to(None)  # type: ignore[arg-type]


def test_a_coordinator_that_does_not_answer_takes_no_place_away(place: Place) -> None:
    """Else its restart would have a host that is well reset by power control: nobody would get a connection to it."""
    with place:
        place.answer = LabUnreachable("no labgrid coordinator")
        time.sleep(0.1)
        place.move_to(None)  # type: ignore[arg-type]
        place.answer = "ws/me"
        place.move_to(None)  # type: ignore[arg-type]
