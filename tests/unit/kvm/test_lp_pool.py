"""The pool of logical processors: one thread on each, also while processors come and go."""

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim_backend.kvm.lp_pool import LpPool


def test_a_preferred_processor_is_given_when_it_is_free_and_another_when_it_is_not() -> None:
    pool = LpPool(3)
    assert pool.get(2) == 2
    others: list[int] = []
    thread = threading.Thread(target=lambda: others.append(pool.get(2)))
    thread.start()
    thread.join(10)
    assert others == [0]
    pool.put()


def test_a_nested_get_stays_on_the_processor_until_the_last_put() -> None:
    pool = LpPool(2)
    assert pool.get(1) == 1
    assert pool.get(0) == 1, "whatever it prefers"
    pool.put()
    assert pool.current() == 1
    pool.put()
    assert pool.current() == -1


def test_who_finds_no_processor_waits_until_one_is_put_back() -> None:
    pool = LpPool(1)
    pool.get()
    got = threading.Event()

    def want() -> None:
        pool.get()
        got.set()
        pool.put()

    thread = threading.Thread(target=want)
    thread.start()
    assert not got.wait(0.1)
    assert pool.waiting == 1
    pool.put()
    assert got.wait(10)
    thread.join(10)


def test_a_processor_taken_out_of_use_under_somebody_is_not_given_out_again_until_it_is_back() -> None:
    pool = LpPool(2)
    assert pool.get(1) == 1
    pool.set_online(1, False)
    pool.put()
    assert pool.get(1) == 0
    pool.put()
    pool.set_online(1, True)
    assert pool.get(1) == 1
    pool.put()


def test_a_processor_that_comes_back_while_somebody_is_still_on_it_is_his_alone() -> None:
    pool = LpPool(2)
    assert pool.get(1) == 1
    pool.set_online(1, False)
    pool.set_online(1, True)
    others: list[int] = []
    thread = threading.Thread(target=lambda: others.append(pool.get(1)))
    thread.start()
    thread.join(10)
    assert others == [0]
    pool.put()
    assert pool.get(1) == 1
    pool.put()


@given(st.lists(st.tuples(st.sampled_from(["get", "put", "off", "on"]), st.integers(0, 2)), max_size=40))
def test_no_sequence_loses_a_processor(steps: list[tuple[str, int]]) -> None:
    pool, depth = LpPool(3), 0
    for step, lp in steps:
        if step == "get":
            if not depth and not any(pool.online):
                continue  # it would wait
            depth += 1
            pool.get(lp)
        elif step == "put" and depth:
            depth -= 1
            pool.put()
        elif step in ("off", "on"):
            pool.set_online(lp, step == "on")
    for _ in range(depth):
        pool.put()
    for lp in range(3):
        pool.set_online(lp, True)
    taken: list[int] = []
    threads = [threading.Thread(target=lambda: taken.append(pool.get())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert sorted(taken) == [0, 1, 2]


@pytest.mark.parametrize("toggling", [False, True])
def test_threads_never_share_a_processor(toggling: bool) -> None:
    pool = LpPool(2)
    users = [0, 0]
    clashes: list[int] = []
    stop = threading.Event()

    def work() -> None:
        for _ in range(400):
            lp = pool.get(0)
            users[lp] += 1
            if users[lp] != 1:
                clashes.append(lp)
            threading.Event().wait(0)  # let somebody else in
            users[lp] -= 1
            pool.put()

    def toggle() -> None:
        while not stop.wait(0.0005):
            pool.set_online(1, not pool.online[1])

    threads = [threading.Thread(target=work) for _ in range(4)]
    toggler = threading.Thread(target=toggle)
    for thread in threads:
        thread.start()
    if toggling:
        toggler.start()
    for thread in threads:
        thread.join(60)
    stop.set()
    if toggling:
        toggler.join(10)
    assert not any(thread.is_alive() for thread in threads)
    assert not clashes
