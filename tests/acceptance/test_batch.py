"""Batches of calls with a real worker: results in order, whatever becomes of each call."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from celery.result import GroupResult

from celery_coalesce import CoalescedResult, Disposition, QueueFull, TriggerMeta
from celery_coalesce.signals import coalesce_trigger
from tests.support.app import HarnessApp
from tests.support.journal import Journal, assert_no_overlap
from tests.support.worker import WorkerProcess

MakeApp = Callable[..., HarnessApp]

PATIENCE = 20  # seconds


@pytest.fixture
def told() -> Iterator[list[TriggerMeta]]:
    """What `coalesce_trigger` tells in this process."""
    seen: list[TriggerMeta] = []

    def receive(meta: TriggerMeta, **_: Any) -> None:
        seen.append(meta)

    coalesce_trigger.connect(receive, weak=False)
    yield seen
    coalesce_trigger.disconnect(receive)


def words(results: Sequence[CoalescedResult]) -> list[str]:
    """Return what became of each call."""
    return [str(result.disposition) for result in results]


def values(results: Sequence[CoalescedResult]) -> list[Any]:
    """Return the value of each call."""
    return [result.get(timeout=PATIENCE) for result in results]


def test_results_are_in_order_whatever_the_keys(
    app: HarnessApp, worker: WorkerProcess, journal: Journal, told: list[TriggerMeta]
) -> None:
    """Two keys and calls without one, mixed: each has the value of the run that covers it, and one event."""
    a, b, keyed = journal.key("a"), journal.key("b"), app.tasks["keyed"]
    running = keyed.batch_delay([(a, 0, "g"), (b, 0, "g")])
    journal.wait("start", count=2, timeout=PATIENCE)
    told.clear()
    results = keyed.batch_delay([(a, 1), (b, 2), (a, -1), (b, 3), (a, 4), (b, -2)])
    assert words(results) == ["queued", "queued", "exempt", "coalesced", "coalesced", "exempt"]
    assert [meta.disposition.value for meta in told] == ["queued", "queued", "coalesced", "coalesced"]
    assert [meta.key for meta in told] == [a, b, b, a]
    assert values([results[2], results[5]]) == [-1, -2]
    journal.open("g", 2)
    assert values(running) == [0, 0]
    assert values(results) == [4, 3, -1, 3, 4, -2]
    assert [result.key for result in results] == [a, b, None, b, a, None]


def test_an_empty_batch_does_nothing(app: HarnessApp, worker: WorkerProcess) -> None:
    """And has no results."""
    assert app.tasks["queue"].batch_delay([]) == []


def test_keyword_arguments_and_options_are_those_of_apply_async(
    app: HarnessApp, worker: WorkerProcess, journal: Journal
) -> None:
    """The same options for every call, the coalescing ones among them."""
    queue = app.tasks["queue"]
    calls = [((journal.key(),), {"value": n}) for n in range(4)]
    results = queue.batch_apply_async(calls, coalesce="serialize", countdown=0.1, headers={"x": "y"})
    assert words(results) == ["queued"] * 4
    assert values(results) == [0, 1, 2, 3]
    assert [each["kwargs"]["value"] for each in journal.events("start")] == [0, 1, 2, 3]
    assert_no_overlap(journal.events())


def test_each_mode_answers_as_single_calls_do(app: HarnessApp, worker: WorkerProcess, journal: Journal) -> None:
    """Free slots, waiting runs, single flights."""
    expected = {
        "five": ["dispatched"] * 5 + ["coalesced"],
        "three": ["dispatched", "queued", "queued", "coalesced", "coalesced", "coalesced"],
        "skip": ["dispatched"] + ["skipped"] * 5,
        "first": ["dispatched"] + ["coalesced"] * 5,
        "serialize": ["dispatched"] + ["queued"] * 5,
    }
    made = {name: app.tasks[name].batch_delay([(journal.key(name), n) for n in range(6)]) for name in expected}
    assert {name: words(results) for name, results in made.items()} == expected
    assert values(made["five"]) == [0, 1, 2, 3, 5, 5]
    assert values(made["three"]) == [0, 1, 5, 5, 5, 5]
    assert values(made["skip"]) == values(made["first"]) == [0] * 6
    assert values(made["serialize"]) == [0, 1, 2, 3, 4, 5]


def test_a_merge_function_sees_every_call_once(app: HarnessApp, worker: WorkerProcess, journal: Journal) -> None:
    """In the first run and in the follow-up."""
    merge = app.tasks["merge"]
    first = merge.delay(journal.key(), 1, gate="g")
    journal.wait("start", timeout=PATIENCE)
    results = merge.batch_delay([(journal.key(), 10**n) for n in range(6)])
    assert words(results) == ["queued"] + ["coalesced"] * 5
    journal.open("g")
    assert values([first, *results]) == [1] + [111111] * 6


@pytest.mark.timeout(120)
def test_nothing_is_lost_between_batches_that_merge_at_the_same_time(
    app: HarnessApp, worker: WorkerProcess, journal: Journal
) -> None:
    """Chains of merges break where another's comes between, and are made again upon it."""
    merge, key = app.tasks["merge"], journal.key()
    first = merge.delay(key, 0, gate="g")
    journal.wait("start", timeout=PATIENCE)

    def batch(_: int) -> list[CoalescedResult]:
        results: list[CoalescedResult] = merge.batch_delay([(key, 1)] * 30)
        return results

    with ThreadPoolExecutor(4) as pool:
        made = [result for results in pool.map(batch, range(12)) for result in results]
    journal.open("g")
    assert first.get(timeout=PATIENCE) == 0
    assert sorted(words(made)) == ["coalesced"] * 359 + ["queued"]
    assert set(values(made)) == {360}


def test_a_rejected_call_says_so_when_its_value_is_asked_for(
    app: HarnessApp, worker: WorkerProcess, journal: Journal, told: list[TriggerMeta]
) -> None:
    """`coalesce_overflow="reject"`: the batch raises nothing, `get()` raises `QueueFull` at once."""
    reject, key = app.tasks["reject"], journal.key()
    running = reject.delay(key, 0, gate="g")
    journal.wait("start", timeout=PATIENCE)
    results = reject.batch_delay([(key, 1), (key, 2), (journal.key("other"), 3), (key, 4)])
    assert words(results) == ["queued", "rejected", "dispatched", "rejected"]
    assert [str(meta.disposition) for meta in told[1:]] == words(results)
    for result in (results[1], results[3]):
        for same in (result, copy.copy(result), pickle.loads(pickle.dumps(result))):
            assert (same.disposition, same.ready(), same.state) == (Disposition.REJECTED, True, "FAILURE")
            with pytest.raises(QueueFull) as raised:
                same.get()
            assert (raised.value.task, raised.value.key, raised.value.run_id) == ("reject", key, results[0].run_id)
            assert isinstance(same.get(propagate=False), QueueFull)
    with pytest.raises(QueueFull):
        GroupResult("group", results[1:2]).get(timeout=1)
    with pytest.raises(QueueFull):
        reject.delay(key, 5)
    journal.open("g")
    assert values([running, results[0], results[2]]) == [0, 1, 3]


def test_what_was_done_once_has_the_value_of_the_run_that_did_it(
    app: HarnessApp, worker: WorkerProcess, journal: Journal
) -> None:
    """While that is stored; afterwards `None`, and `get()` does not wait for what never comes."""
    once, key = app.tasks["once"], journal.key()
    first = once.delay(key, 7)
    assert first.get(timeout=PATIENCE) == 7
    journal.wait("coalesce_drain", timeout=PATIENCE)
    results = once.batch_delay([(key, 8), (key, 9), (journal.key("other"), 10)])
    single = once.delay(key, 11)
    assert words([*results, single]) == ["skipped", "skipped", "dispatched", "skipped"]
    assert values([*results, single]) == [7, 7, 10, 7]

    first.forget()
    results = once.batch_delay([(key, 8), (key, 9)])
    for result in (*results, once.delay(key, 11)):
        for same in (result, copy.copy(result), pickle.loads(pickle.dumps(result))):
            assert same.get(timeout=1) is None
            assert (same.ready(), same.state, same.run_task_id) == (True, "SUCCESS", first.id)
    assert GroupResult("group", once.batch_delay([(key, 8), (key, 9)])).get(timeout=1) == [None, None]
    assert len(journal.events("start", key="key")) == 1


def test_what_was_done_once_ends_a_follower_too(app: HarnessApp, worker: WorkerProcess, journal: Journal) -> None:
    """A call with a callback keeps its own id, and gets the value, or `None`."""
    once, key = app.tasks["once"], journal.key()
    first = once.delay(key, 7)
    assert first.get(timeout=PATIENCE) == 7
    journal.wait("coalesce_drain", timeout=PATIENCE)
    link = app.tasks["collect"].s(key=journal.key("link"))
    results = once.batch_apply_async([((key, 8), {}), ((key, 9), {})], link=link)
    assert words(results) == ["skipped", "skipped"]
    assert len({first.id, *(result.id for result in results)}) == 3
    assert values(results) == [7, 7]
    journal.wait("end", key="link", count=2, timeout=PATIENCE)


def test_callbacks_of_a_batch_are_called_once_for_each_call(
    app: HarnessApp, worker: WorkerProcess, journal: Journal
) -> None:
    """Calls that coalesce are followers, with ids of their own."""
    queue, key = app.tasks["queue"], journal.key()
    queue.delay(key, 0, gate="g")
    journal.wait("start", key="key", timeout=PATIENCE)
    link = app.tasks["collect"].s(key=journal.key("link"))
    results = queue.batch_apply_async([((key, n), {}) for n in range(1, 5)], link=link)
    assert words(results) == ["queued", "coalesced", "coalesced", "coalesced"]
    assert len({result.id for result in results}) == 4
    journal.open("g")
    assert values(results) == [4] * 4
    journal.wait("end", key="link", count=4, timeout=PATIENCE)


def test_a_batch_from_within_a_task_follows_its_own_run(
    app: HarnessApp, worker: WorkerProcess, journal: Journal
) -> None:
    """Its calls come after the run that makes them."""
    made = app.tasks["batching"].delay(journal.key(), 3).get(timeout=PATIENCE)
    assert made == ["queued", "coalesced", "coalesced"]
    journal.wait("start", count=2, timeout=PATIENCE)
    journal.wait("coalesce_drain", timeout=PATIENCE)
    assert_no_overlap(journal.events())


def test_eager_calls_run_inline(make_app: MakeApp, journal: Journal) -> None:
    """`task_always_eager`: in order, and only if all of them fit."""
    app = make_app(broker="memory://", conf={"task_always_eager": True})
    queue = app.tasks["queue"]
    with pytest.raises(TypeError):
        queue.batch_delay([(journal.key(), 1), ()])
    assert journal.events() == []
    assert [result.get() for result in queue.batch_delay([(journal.key(), 1), (journal.key(), 2)])] == [1, 2]


def test_under_rpc_every_call_gets_its_value(
    make_app: MakeApp, make_worker: Callable[..., WorkerProcess], journal: Journal
) -> None:
    """Each joined call is a follower, whose reply queue is declared though it publishes nothing."""
    app = make_app(backend="rpc://")
    queue = app.tasks["queue"]
    results = queue.batch_delay([(journal.key(f"k{n % 2}"), n) for n in range(6)])
    assert words(results) == ["dispatched"] * 2 + ["coalesced"] * 4
    assert len({result.id for result in results}) == 6
    make_worker(app, concurrency=2)
    assert values(results) == [4, 5, 4, 5, 4, 5]
