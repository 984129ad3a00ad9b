"""CR: coalesced-runner. One run, one rerun, and the events of both."""

from __future__ import annotations

import threading
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from celery.exceptions import TaskRevokedError

from celery_coalesce import CoalescedTask, Disposition, InvalidKey
from tests.conformance.cr_tasks import AGAIN, TIMES
from tests.conformance.sessions import SESSION, names, pass_fence, sessions, store, stories
from tests.support.app import HarnessApp
from tests.support.app import make_app as new_app
from tests.support.journal import Event, Journal, assert_no_overlap
from tests.support.process import wait_until
from tests.support.servers import ValkeyServer
from tests.support.worker import WorkerProcess

MakeApp = Callable[..., HarnessApp]
MakeWorker = Callable[..., WorkerProcess]

SOON = 20  # seconds that anything may take on a busy machine


@pytest.fixture(scope="module")
def cr_app(state_server: ValkeyServer, journal_server: ValkeyServer) -> Iterator[HarnessApp]:
    """The app of `cr_worker`."""
    url = state_server.new_db()
    with new_app(url, url) as app:
        yield app


@pytest.fixture(scope="module")
def cr_worker(cr_app: HarnessApp) -> Iterator[WorkerProcess]:
    """A worker with the tasks and receivers of `cr_tasks`."""
    with WorkerProcess.serving(cr_app, concurrency=2, include=["tests.conformance.cr_tasks"]) as worker:
        yield worker


def starts(journal: Journal, key: str = "key") -> list[Event]:
    """Return the starts of a key's bodies."""
    return journal.events("start", key=key)


def test_cr_1_a_trigger_on_an_idle_key_starts_exactly_one_run(
    app: HarnessApp, worker: WorkerProcess, journal: Journal
) -> None:
    """However an idle key is triggered, its body runs once and its caller gets that run's value."""
    queue = app.tasks["queue"]
    ways: dict[str, Callable[[str], Any]] = {
        "delay": lambda key: queue.delay(key, "delay"),
        "apply_async": lambda key: queue.apply_async((key,), {"value": "apply_async"}, task_id=f"id-{key}"),
        "signature": lambda key: queue.s(key, value="signature").delay(),
        "countdown": lambda key: queue.apply_async((key, "countdown"), countdown=0.05),
        "send_task": lambda key: app.send_task("queue", (key, "send_task")),
    }
    results = {way: call(journal.key(way)) for way, call in ways.items()}
    for way, result in results.items():
        assert result.get(timeout=SOON) == way
        journal.wait("coalesce_drain", key=way, timeout=SOON)
    pass_fence(app, journal)
    for way, result in results.items():
        assert [event["task_id"] for event in starts(journal, way)] == [result.id]
        assert stories(journal, way) == ["s+d"]
        assert sessions(journal, way).popitem()[1][0]["triggers"] == 1
    assert results["delay"].disposition is Disposition.DISPATCHED


@pytest.mark.parametrize("calls", [1, 20])
def test_cr_2_any_number_of_triggers_while_running_give_one_follow_up(
    app: HarnessApp, worker: WorkerProcess, journal: Journal, calls: int
) -> None:
    """One call during a run, or twenty, make one more; a burst on the idle key makes two runs at most."""
    queue = app.tasks["queue"]
    first = queue.delay(journal.key(), 0, gate="a")
    journal.wait("start", timeout=SOON)
    results = [queue.delay(journal.key(), value) for value in range(1, calls + 1)]
    journal.open("a")
    assert first.get(timeout=SOON) == 0
    assert [result.get(timeout=SOON) for result in results] == [calls] * calls
    journal.wait("coalesce_drain", timeout=SOON)
    pass_fence(app, journal)
    assert len(starts(journal)) == 2
    assert stories(journal) == ["s+s+d"]
    assert_no_overlap(journal.events())

    def burst(thread: int) -> list[Any]:
        return [queue.delay(journal.key("burst"), (thread, n), gate="b") for n in range(calls)]

    with ThreadPoolExecutor(4) as threads:
        results = sum(threads.map(burst, range(4)), [])
    journal.open("b", 2)
    values = {result.id: result.get(timeout=SOON) for result in results}
    journal.wait("coalesce_drain", key="burst", timeout=SOON)
    pass_fence(app, journal)
    runs = starts(journal, "burst")
    assert 1 <= len(runs) <= 2
    # Every caller holds one of the two runs, and each run returned what it was given.
    assert values == {run["task_id"]: run["args"][1] for run in runs}
    covered = sum(event["triggers"] for event in journal.events("coalesce_start", key="burst"))
    assert covered == len(results)
    assert_no_overlap(journal.events())


def test_cr_3_two_runs_of_one_key_never_overlap(
    app: HarnessApp, worker: WorkerProcess, make_worker: MakeWorker, journal: Journal
) -> None:
    """While a run is held no other starts, on neither of two workers, in whatever way it is asked for."""
    second = f"second-{uuid.uuid4().hex[:8]}"
    other = make_worker(app, queues=[second])
    queue, key = app.tasks["queue"], journal.key()
    asked: list[Any] = []
    for round_ in range(6):
        # A follow-up goes where the trigger that made it sends it: the workers take turns.
        here = second if round_ % 2 else None
        asked.append(queue.apply_async((key, round_), {"gate": "a"}, queue=here))
        journal.wait("start", key="key", count=round_ + 1, timeout=SOON)
        options: list[dict[str, Any]] = [{}, {"queue": second}, {"coalesce": "skip"}, {"coalesce_max_queued": 3}]
        there = None if round_ % 2 else second
        queue.apply_async((key, round_ + 1), {"gate": "a"}, queue=there, task_id=uuid.uuid4().hex)
        asked += [queue.apply_async((key, round_ + 1), {"gate": "a"}, **given) for given in options]
        asked.append(app.send_task("queue", (key, round_ + 1), {"gate": "a"}))
        for each in (None, second):
            pass_fence(app, journal, each)
        assert len(starts(journal)) == round_ + 1
        journal.open("a")
    journal.open_all()
    for result in asked:
        result.get(timeout=SOON)
    journal.wait(lambda each: each["event"] == "coalesce_drain" and each["key"] == "key", timeout=SOON)
    assert_no_overlap(journal.events())
    assert {event["hostname"] for event in starts(journal)} == {worker.hostname, other.hostname}
    assert other.stop(SOON) == 0


def test_cr_4_the_follow_up_gets_the_latest_arguments(
    app: HarnessApp, worker: WorkerProcess, journal: Journal
) -> None:
    """The follow-up has the positional and keyword arguments of the last trigger, and nothing of earlier ones."""
    queue, key = app.tasks["queue"], journal.key()
    queue.delay(key, 0, gate="a")
    journal.wait("start", key="key", timeout=SOON)
    calls = [queue.delay(key, 1, error="earlier"), queue.delay(key, value=2), queue.delay(key, 3, "b")]
    journal.open("a")
    follow_up = journal.wait("start", key="key", count=2, timeout=SOON)
    assert (follow_up["args"], follow_up["kwargs"]) == ([key, 3, "b"], {})

    # During the second run come, as the last, a message from elsewhere and, before it, a call.
    queue.delay(key, 4, error="earlier")
    foreign = app.send_task("queue", (key,), {"value": {"latest": [5]}})
    journal.wait("coalesce_trigger", task_id=foreign.id, disposition="coalesced", timeout=SOON)
    journal.open("b")
    last = journal.wait("start", key="key", count=3, timeout=SOON)
    assert (last["args"], last["kwargs"]) == ([key], {"value": {"latest": [5]}})
    assert [call.get(timeout=SOON) for call in calls] == [3, 3, 3]
    assert foreign.get(timeout=SOON) == {"latest": [5]}
    journal.wait("coalesce_drain", key="key", timeout=SOON)
    assert stories(journal) == ["s+s+s+d"]


def test_cr_5_after_an_error_the_follow_up_still_runs(
    app: HarnessApp, worker: WorkerProcess, journal: Journal
) -> None:
    """A run that fails announces its error and reaches its caller; the pending run then succeeds."""
    queue = app.tasks["queue"]
    failing = queue.delay(journal.key(), gate="a", error="boom")
    journal.wait("start", timeout=SOON)
    following = queue.delay(journal.key(), 2)
    assert following.disposition is Disposition.QUEUED
    journal.open("a")
    with pytest.raises(RuntimeError, match="boom"):
        failing.get(timeout=SOON)
    assert following.get(timeout=SOON) == 2
    journal.wait("coalesce_drain", timeout=SOON)
    assert stories(journal) == ["s-s+d"]
    error = journal.wait("coalesce_error")
    assert (error["task_id"], error["exception"]) == (failing.id, "RuntimeError('boom')")
    assert journal.wait("coalesce_success")["task_id"] == following.id
    assert_no_overlap(journal.events())


def test_cr_6_distinct_keys_do_not_affect_each_other(
    app: HarnessApp, worker: WorkerProcess, journal: Journal
) -> None:
    """While one key is held with a follow-up pending, others, however similar, run, fail and are cleared."""
    queue = app.tasks["queue"]
    held = queue.delay(journal.key("org:1"), "held", gate="a")
    journal.wait("start", key="org:1", timeout=SOON)
    pending = queue.delay(journal.key("org:1"), "pending")

    similar = ["org:11", "org:1 ", " org:1", "ORG:1", "org:", "org:1:", "org:1\N{COMBINING ACUTE ACCENT}"]
    similar += ["org:1\x00", "{org:1}", "org:1" * 2000]
    for key in similar:
        failing = queue.delay(journal.key(key), error="boom")
        assert failing.disposition is Disposition.DISPATCHED, key
        with pytest.raises(RuntimeError, match="boom"):
            failing.get(timeout=SOON)
        journal.wait("coalesce_drain", key=key, timeout=SOON)
        assert queue.clear_key(journal.key(key)) == 0
    # The same key under another task's name is another key.
    assert app.tasks["other"].delay(journal.key("org:1"), "other").get(timeout=SOON) == "other"

    assert len(starts(journal, "org:1")) == 2  # the held one, and the other task's
    journal.open("a")
    assert (held.get(timeout=SOON), pending.get(timeout=SOON)) == ("held", "pending")
    journal.wait("coalesce_drain", key="org:1", name="queue", timeout=SOON)
    assert [stories(journal, key) for key in similar] == [["s-d"]] * len(similar)
    assert sorted(stories(journal, "org:1")) == ["s+d", "s+s+d"]
    states = {event["state_id"] for event in journal.events("coalesce_start")}
    assert len(states) == len(similar) + 2


def test_cr_7_a_session_is_start_then_success_or_error_then_drain(
    app: HarnessApp, worker: WorkerProcess, journal: Journal
) -> None:
    """The events of every session come in their order, around the bodies that they are about."""
    queue, key = app.tasks["queue"], journal.key()
    errors = [[None, "boom", None], ["boom"], [None], ["boom", "boom"]]
    for number, session in enumerate(errors):
        runs = sum(map(len, errors[:number]))
        for error in session:
            queue.delay(key, gate="a", error=error)
            runs += 1
            if error is not session[0] or runs > 1 + sum(map(len, errors[:number])):
                journal.open("a")  # the one before this follow-up
            journal.wait("start", key="key", count=runs, timeout=SOON)
        journal.open("a")
        journal.wait("coalesce_drain", key="key", count=number + 1, timeout=SOON)
    assert stories(journal) == ["s+s-s+d", "s-d", "s+d", "s-s-d"]

    for events in sessions(journal).values():
        assert SESSION.fullmatch("".join(map(_letter, events)))
    story = [event for event in journal.events(key="key") if event["event"] != "coalesce_drain"]
    for run in starts(journal):
        told = [event["event"] for event in story if event["task_id"] == run["task_id"]]
        assert told[:3] == ["coalesce_start", "start", "end"]
        assert told[3:] in (["coalesce_success"], ["coalesce_error"])
