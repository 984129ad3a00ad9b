"""AM: async-mutex-lite. A keyed mutex: `coalesce="serialize"`, where every call runs, in its turn."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from celery_coalesce import Coalescer, Disposition, HoldTimeout, NotReentrant, PredecessorFailed
from tests.conformance import story_tasks
from tests.support.app import HarnessApp
from tests.support.holders import Holder
from tests.support.journal import Journal, assert_no_overlap
from tests.support.process import ROOT, wait_until
from tests.support.traces import traces
from tests.support.worker import WorkerProcess

pytestmark = pytest.mark.core

MakeApp = Callable[..., HarnessApp]
MakeWorker = Callable[..., WorkerProcess]

PATIENCE = 20  # seconds


def test_am_1_calls_of_one_key_run_one_after_the_other(
    app: HarnessApp, worker: WorkerProcess, journal: Journal
) -> None:
    """Every call is a run of its own, and starts when the one before it has ended."""
    serialize = app.tasks["serialize"]
    results = [serialize.delay(journal.key(), n, gate="g") for n in range(3)]
    words = [result.disposition for result in results]
    assert words == [Disposition.DISPATCHED, Disposition.QUEUED, Disposition.QUEUED]
    assert len({result.id for result in results}) == 3
    for n, result in enumerate(results):
        journal.wait("start", task_id=result.id, timeout=PATIENCE)
        assert len(journal.events("start")) == n + 1
        journal.open("g")
        assert result.get(timeout=PATIENCE) == n
    order = [(event["event"], event["task_id"]) for event in journal.events() if event["event"] in ("start", "end")]
    assert order == [(event, result.id) for result in results for event in ("start", "end")]
    assert_no_overlap(journal.events())


def test_am_2_twenty_calls_end_in_the_order_in_which_they_were_accepted(
    app: HarnessApp, worker: WorkerProcess, journal: Journal
) -> None:
    """Strict FIFO: the gates of the twenty runs open in a random order, which changes nothing."""
    serialize = app.tasks["serialize"]
    results = [serialize.delay(journal.key(), n, gate=f"g{n}") for n in range(20)]
    journal.wait("start", timeout=PATIENCE)
    order = list(range(20))
    random.shuffle(order)
    for n in order:
        journal.open(f"g{n}")
    assert [result.get(timeout=PATIENCE) for result in results] == list(range(20))
    journal.wait("end", count=20, timeout=PATIENCE)
    for event in ("start", "end"):
        assert [each["task_id"] for each in journal.events(event)] == [r.id for r in results], order
    assert_no_overlap(journal.events())


def test_am_3_different_keys_run_in_parallel(app: HarnessApp, worker: WorkerProcess, journal: Journal) -> None:
    """Each of four keys has a run in progress before any of them ends."""
    serialize = app.tasks["serialize"]
    keys = [f"key{n}" for n in range(4)]
    results = [serialize.delay(journal.key(key), n, gate="g") for n, key in enumerate(keys) for _ in "ab"]
    for key in keys:
        journal.wait("start", key=key, timeout=PATIENCE)
    assert not journal.events("end")
    journal.open("g", 8)
    assert [result.get(timeout=PATIENCE) for result in results] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert_no_overlap(journal.events())


def test_am_4_every_caller_gets_the_value_of_its_own_run_falsy_or_not(
    app: HarnessApp, worker: WorkerProcess, journal: Journal
) -> None:
    """Nothing, zero and emptiness are values like any other."""
    serialize = app.tasks["serialize"]
    values: list[Any] = [0, "", None, [], {}, False, 1, "x"]
    results = [serialize.delay(journal.key(), value) for value in values]
    answers = [result.get(timeout=PATIENCE) for result in results]
    assert list(map(repr, answers)) == list(map(repr, values))
    journal.wait("coalesce_drain", timeout=PATIENCE)
    assert [each["task_id"] for each in journal.events("start")] == [result.id for result in results]


def test_am_5_an_error_reaches_its_caller_alone_and_the_next_still_runs(
    app: HarnessApp, worker: WorkerProcess, journal: Journal
) -> None:
    """A failure in the line stops nobody behind it, and the key can be used again."""
    serialize, key = app.tasks["serialize"], journal.key()
    before, bad, after = (
        serialize.delay(key, 1, gate="g"),
        serialize.delay(key, error="boom"),
        serialize.delay(key, 3),
    )
    journal.open("g")
    assert before.get(timeout=PATIENCE) == 1
    with pytest.raises(RuntimeError, match="boom"):
        bad.get(timeout=PATIENCE)
    assert after.get(timeout=PATIENCE) == 3
    journal.wait("coalesce_drain", timeout=PATIENCE)
    again = serialize.delay(key, 4)
    assert again.disposition is Disposition.DISPATCHED
    assert again.get(timeout=PATIENCE) == 4
    assert_no_overlap(journal.events())


def test_am_6_stop_on_error_runs_nothing_that_was_waiting(
    app: HarnessApp, worker: WorkerProcess, journal: Journal
) -> None:
    """The callers of what was waiting can tell that from a failure of their own; then the key works again."""
    serialize, key = app.tasks["serialize_stop"], journal.key()
    bad = serialize.delay(key, error="boom", gate="g")
    journal.wait("start", timeout=PATIENCE)
    waiting = [serialize.delay(key, n) for n in range(3)]
    journal.open("g")
    with pytest.raises(RuntimeError, match="boom"):
        bad.get(timeout=PATIENCE)
    for result in waiting:
        with pytest.raises(PredecessorFailed, match="boom"):
            result.get(timeout=PATIENCE)
    again = serialize.delay(key, 7)
    assert again.get(timeout=PATIENCE) == 7
    assert [event["task_id"] for event in journal.events("start")] == [bad.id, again.id]
    outcomes = [event["outcome"] for event in journal.events("coalesce_skip")]
    assert outcomes == ["<Outcome.STOPPED: 'stopped'>"] * 3


def test_am_7_a_hundred_keys_leave_no_state_and_can_be_used_again(
    app: HarnessApp, worker: WorkerProcess, journal: Journal
) -> None:
    """After a key's last run nothing of it is in the store, and the next call finds it idle."""
    serialize = app.tasks["serialize"]
    for turn in (1, 2):
        results = [serialize.delay(journal.key(f"key{n}"), n) for n in range(100)]
        assert {result.disposition for result in results} == {Disposition.DISPATCHED}
        journal.wait("coalesce_drain", count=100 * turn, timeout=PATIENCE)
        assert [result.get(timeout=PATIENCE) for result in results] == list(range(100))
        assert traces(app, "serialize", journal.name) == []
    busy = serialize.delay(journal.key("key0"), gate="g")
    assert traces(app, "serialize", journal.key("key0")) != []
    journal.open("g")
    busy.get(timeout=PATIENCE)


CALL_FROM_ANOTHER_PROCESS = """
import sys
from tests.support.app import make_app

url, key, side, *values = sys.argv[1:]
app = make_app(url, url)
for value in values:
    result = app.tasks["serialize"].apply_async((key, int(value), "g"), queue=side)
    print(result.disposition, result.get(timeout=60), flush=True)
"""


@pytest.mark.timeout(120)
def test_am_8_the_mutex_holds_across_machines_and_processes(
    make_app: MakeApp, make_worker: MakeWorker, journal: Journal
) -> None:
    """Two producers and two workers share nothing but the store, and have one run at a time."""
    app = make_app()
    sides = ("left", "right")
    workers = [make_worker(app, queues=[side], hostname=f"{side}@{side}", wait=False) for side in sides]
    for worker in workers:
        worker.wait_ready()
    command = [
        sys.executable,
        "-c",
        CALL_FROM_ANOTHER_PROCESS,
        str(app.conf.broker_url),
        journal.key(),
    ]
    callers = [
        subprocess.Popen([*command, side, "1", "2"], cwd=ROOT, stdout=subprocess.PIPE, text=True) for side in sides
    ]
    try:
        for n in range(4):
            journal.wait("start", count=n + 1, timeout=2 * PATIENCE)
            journal.assert_never(
                lambda event, n=n: event["event"] == "start" and event["coalesce_run_index"] > n,
                within=0.2,
            )
            journal.open("g")
        outputs = [caller.communicate(timeout=2 * PATIENCE)[0].split() for caller in callers]
    finally:
        for caller in callers:
            caller.kill()
            caller.wait()
    assert [output[1::2] for output in outputs] == [["1", "2"]] * 2
    starts = journal.events("start")
    assert sorted(each["hostname"] for each in starts) == ["left@left"] * 2 + ["right@right"] * 2
    assert_no_overlap(journal.events())


def test_am_9_two_checkouts_at_once_never_both_deduct(
    make_app: MakeApp, make_worker: MakeWorker, journal: Journal
) -> None:
    """Of two requests for 80 of a user's 100 one is declined; without the key both are paid."""
    app = make_app()
    story_tasks.define(app)
    make_worker(app, include=[story_tasks.__name__])
    checkout = app.tasks["checkout"]

    def both(user: str, **options: Any) -> list[Any]:
        together = threading.Barrier(2)

        def request(_: int) -> Any:
            together.wait(PATIENCE)
            return checkout.apply_async((user, 80, "g"), **options)

        journal.client.set(story_tasks.balance(user), 100)
        with ThreadPoolExecutor(2) as threads:
            return list(threads.map(request, range(2)))

    user, careless = journal.key("user"), journal.key("careless")
    orders = both(user)
    first = journal.wait("start", key="user", timeout=PATIENCE)
    [other] = [order for order in orders if order.id != first["task_id"]]
    journal.assert_never("start", task_id=other.id)
    journal.open("g")
    journal.wait("read", key="user", count=2, timeout=PATIENCE)
    journal.open("g")
    assert sorted(order.get(timeout=PATIENCE) for order in orders) == ["declined", "paid"]
    assert journal.client.get(story_tasks.balance(user)) == "20"
    assert_no_overlap(journal.events())

    orders = both(careless, coalesce_key=None)
    journal.wait("read", key="careless", count=2, timeout=PATIENCE)
    journal.open("g", 2)
    assert [order.get(timeout=PATIENCE) for order in orders] == ["paid", "paid"]
    journal.client.delete(story_tasks.balance(user), story_tasks.balance(careless))


@pytest.mark.timeout(120)
def test_am_10_plain_code_holds_the_key_as_a_run_does(
    make_app: MakeApp, make_worker: MakeWorker, journal: Journal
) -> None:
    """It waits in line for 5 s at most, excludes the key's tasks, and frees the key on exit, exception and crash."""
    app = make_app(conf={"coalesce_lease": 2})
    make_worker(app)
    serialize, key = app.tasks["serialize"], journal.key()
    coalescer = Coalescer(app)

    # In line with what is pending, and not for longer than it says.
    first, second = serialize.delay(key, 1, gate="g"), serialize.delay(key, 2, gate="g")
    journal.wait("start", timeout=PATIENCE)
    began = time.monotonic()
    with pytest.raises(HoldTimeout), coalescer.hold(key, scope=serialize, timeout=5):
        pass
    assert 5 <= time.monotonic() - began < 8
    journal.open("g", 2)
    with coalescer.hold(key, scope=serialize, timeout=PATIENCE) as lease:
        assert [event["task_id"] for event in journal.events("end")] == [first.id, second.id]
        # Longer than a lease, and nobody of the key runs.
        third = serialize.delay(key, 3)
        with pytest.raises(NotReentrant), coalescer.hold(key, scope=serialize):
            pass
        journal.assert_never("start", task_id=third.id, within=5)
        lease.check()
    assert third.get(timeout=PATIENCE) == 3

    with pytest.raises(RuntimeError, match="boom"), coalescer.hold(key, scope=serialize, timeout=PATIENCE):
        raise RuntimeError("boom")
    assert serialize.delay(key, 4).get(timeout=PATIENCE) == 4

    with Holder(app, journal, "hold", scope="serialize") as holder:
        held = journal.wait("held", timeout=PATIENCE)
        assert held["token"] > lease.token
        last = serialize.delay(key, 5)
        journal.assert_never("start", task_id=last.id)
        holder.kill()
        began = time.monotonic()
        assert last.get(timeout=PATIENCE) == 5
        assert time.monotonic() - began < 8
    journal.wait("coalesce_drain", timeout=PATIENCE)
    assert_no_overlap(journal.events())
    wait_until(lambda: traces(app, "serialize", key) == [], PATIENCE)
