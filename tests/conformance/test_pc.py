"""PC: promise-coalesce. One flight per key, and its result for everybody aboard."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from celery_coalesce import Disposition
from tests.conformance.pc_callers import Callers, call
from tests.conformance.pc_tasks import SETTLING
from tests.conformance.sessions import pass_fence, stories
from tests.support.app import HarnessApp
from tests.support.app import make_app as new_app
from tests.support.journal import Event, Journal, assert_no_overlap
from tests.support.servers import ValkeyServer
from tests.support.worker import WorkerProcess

SOON = 20  # seconds that anything may take on a busy machine


@pytest.fixture(scope="module")
def pc_app(state_server: ValkeyServer, journal_server: ValkeyServer) -> Iterator[HarnessApp]:
    """The app of `pc_worker`."""
    url = state_server.new_db()
    with new_app(url, url) as app:
        yield app


@pytest.fixture(scope="module")
def pc_worker(pc_app: HarnessApp) -> Iterator[WorkerProcess]:
    """A worker that holds runs of the key `SETTLING` between their result and their end."""
    with WorkerProcess.serving(pc_app, include=["tests.conformance.pc_tasks"]) as worker:
        yield worker


@contextmanager
def ten_callers(app: HarnessApp, journal: Journal, **options: Any) -> Iterator[None]:
    """Have five threads and five processes call at once; enter the block when all have called."""
    callers = [
        threading.Thread(target=call, args=(app, journal, number, options), daemon=True) for number in range(5, 10)
    ]
    with Callers(app, journal, 5, "call", **options) as processes:
        for thread in callers:
            thread.start()
        journal.wait("ready", count=10, timeout=SOON)
        journal.open("go", 10)
        journal.wait("called", count=10, timeout=SOON)
        yield
        journal.wait("got", count=10, timeout=SOON)
        assert processes.wait(SOON) == 0
        for thread in callers:
            thread.join(SOON)


def outcomes(journal: Journal) -> list[Event]:
    """Return what the callers got, by caller."""
    return sorted(journal.events("got"), key=lambda event: event["caller"])


def assert_one_run(app: HarnessApp, journal: Journal, story: str) -> Event:
    """Fail unless ten callers were served by one run that one of them made; return its start."""
    journal.wait("coalesce_drain", timeout=SOON)
    pass_fence(app, journal)
    (start,) = journal.events("start", key="key")
    assert stories(journal) == [story]
    assert [event["caller"] for event in outcomes(journal)] == list(range(10))
    assert {event["task_id"] for event in outcomes(journal)} == {start["task_id"]}
    dispositions = Counter(event["disposition"] for event in outcomes(journal))
    assert dispositions == {"dispatched": 1, "skipped": 9}
    return start


def test_pc_1_one_caller_gets_its_runs_value(app: HarnessApp, worker: WorkerProcess, journal: Journal) -> None:
    """One call makes one run, and returns what that returned, falsy or not."""
    for number, value in enumerate([{"org": 7}, 0, None, "", [], False]):
        result = app.tasks["skip"].delay(journal.key(), value)
        assert result.disposition is Disposition.DISPATCHED
        assert result.get(timeout=SOON) == value
        assert type(result.get()) is type(value)
        journal.wait("coalesce_drain", count=number + 1, timeout=SOON)
    pass_fence(app, journal)
    assert stories(journal) == ["s+d"] * 6


def test_pc_2_one_caller_gets_its_runs_exception(app: HarnessApp, worker: WorkerProcess, journal: Journal) -> None:
    """What the body raised is raised from `get()`."""
    result = app.tasks["skip"].delay(journal.key(), error="no such org")
    with pytest.raises(RuntimeError, match=r"^no such org$"):
        result.get(timeout=SOON)
    journal.wait("coalesce_drain", timeout=SOON)
    assert stories(journal) == ["s-d"]


def test_pc_3_ten_concurrent_callers_share_one_run_and_its_value(
    app: HarnessApp, worker: WorkerProcess, journal: Journal
) -> None:
    """Threads and processes that call at once get ten equal values of one run."""
    with ten_callers(app, journal, gate="a"):
        journal.open("a")
    start = assert_one_run(app, journal, "s+d")
    assert [event["value"] for event in outcomes(journal)] == [start["args"][1]] * 10


def test_pc_4_ten_concurrent_callers_share_one_failure(
    app: HarnessApp, worker: WorkerProcess, journal: Journal
) -> None:
    """Threads and processes that call at once get ten equal exceptions of one run."""
    with ten_callers(app, journal, gate="a", error="boom"):
        journal.open("a")
    assert_one_run(app, journal, "s-d")
    errors = [(event["type"], event["args"]) for event in outcomes(journal)]
    assert errors == [("RuntimeError", ["boom"])] * 10


@pytest.mark.parametrize("error", [None, "boom"])
def test_pc_5_a_second_wave_runs_once_more(
    pc_app: HarnessApp, pc_worker: WorkerProcess, journal: Journal, error: str | None
) -> None:
    """Whoever calls after having seen a result gets a new run, be the old one settled or not."""
    skip = pc_app.tasks["skip"]
    runs: list[str] = []
    for wave in range(3):
        calls = [skip.s(journal.key(SETTLING), (wave, n), gate="a", error=error) for n in range(3)]
        results = [call.delay() for call in calls]
        (run,) = {result.id for result in results}
        assert run not in runs
        runs.append(run)
        if wave:
            journal.open(SETTLING)  # only now does the run before come to its end
        journal.wait("start", key=SETTLING, count=wave + 1, timeout=SOON)
        journal.open("a")
        for result in results:
            value = result.get(timeout=SOON, propagate=False)
            assert value == [wave, 0] if error is None else repr(value) == "RuntimeError('boom')"
    journal.open(SETTLING)
    journal.wait("coalesce_drain", key=SETTLING, timeout=SOON)
    assert [event["task_id"] for event in journal.events("start", key=SETTLING)] == runs
    assert_no_overlap(journal.events())


def test_pc_6_the_leaders_arguments_are_used(app: HarnessApp, worker: WorkerProcess, journal: Journal) -> None:
    """A joiner's own arguments are not looked at, whether it joins a queued or a running run."""
    skip, key = app.tasks["skip"], journal.key()
    leader = skip.apply_async((key, "leader"), {"gate": "a"}, countdown=0.3)
    early = skip.delay(key, "joiner", error="joined")
    journal.wait("start", timeout=SOON)
    late = skip.delay(key, value="joiner", error="joined")
    foreign = app.send_task("skip", (key, "joiner"), {"error": "joined"})
    journal.wait("coalesce_trigger", disposition="skipped", task_id=foreign.id, timeout=SOON)
    journal.open("a")
    for result in (leader, early, late, foreign):
        assert result.get(timeout=SOON) == "leader"
    assert {leader.id, early.id, late.id} == {leader.id}
    journal.wait("coalesce_drain", timeout=SOON)
    (start,) = journal.events("start")
    assert (start["args"], start["kwargs"]) == ([key, "leader"], {"gate": "a"})


def test_pc_7_different_keys_run_independently(app: HarnessApp, worker: WorkerProcess, journal: Journal) -> None:
    """Three keys are in flight at the same time, each with its own result or error."""
    skip = app.tasks["skip"]
    errors = {"a": None, "b": "boom", "c": None}
    leaders = {key: skip.delay(journal.key(key), key, gate=key, error=error) for key, error in errors.items()}
    for key in errors:
        journal.wait("start", key=key, timeout=SOON)
    joiners = {key: skip.delay(journal.key(key)) for key in errors}
    for key, error in reversed(errors.items()):
        journal.open(key)
        for result in (leaders[key], joiners[key]):
            value = result.get(timeout=SOON, propagate=False)
            assert value == key if error is None else repr(value) == "RuntimeError('boom')"
        journal.wait("coalesce_drain", key=key, timeout=SOON)
    assert [event["key"] for event in journal.events("end")] == ["c", "b", "a"]
    assert len(journal.events("start")) == 3


def test_pc_8_a_failure_frees_the_key(app: HarnessApp, worker: WorkerProcess, journal: Journal) -> None:
    """After a failure the next call is dispatched, with its own arguments and its own outcome."""
    skip = app.tasks["skip"]
    for count, error in enumerate(["boom", "bang", None], 1):
        result = skip.delay(journal.key(), count, error=error)
        assert result.disposition is Disposition.DISPATCHED
        value = result.get(timeout=SOON, propagate=False)
        assert value == count if error is None else repr(value) == f"RuntimeError({error!r})"
        journal.wait("coalesce_drain", count=count, timeout=SOON)
    assert stories(journal) == ["s-d", "s-d", "s+d"]


def test_pc_9_ten_readers_that_miss_the_cache_call_the_source_once(
    app: HarnessApp, worker: WorkerProcess, journal: Journal
) -> None:
    """Ten processes find the cache empty: the source is called once, and an eleventh finds it."""
    with Callers(app, journal, 10, "read", gate="a") as readers:
        journal.wait("ready", count=10, missed=True, timeout=SOON)
        journal.open("go", 10)
        journal.wait("called", count=10, timeout=SOON)
        journal.open("a")
        assert readers.wait(SOON) == 0
    with Callers(app, journal, 1, "read") as reader:
        journal.open("go")
        assert reader.wait(SOON) == 0
    journal.wait("coalesce_drain", timeout=SOON)
    pass_fence(app, journal)
    (source,) = journal.events("start", key="key")
    values = [event["value"] for event in journal.events("got")]
    assert values == [source["args"][1]] * 11
    assert [event["missed"] for event in journal.events("ready")] == [True] * 10 + [False]
