"""Messages that no coalesced task has sent: `send_task`, beat, other producers. The gate admits them as triggers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest
from celery import Celery, chain, chord, signature
from celery.beat import ScheduleEntry, Scheduler
from celery.exceptions import TaskRevokedError

from celery_coalesce.engine import engine_of
from celery_coalesce.errors import QueueFull
from tests.support.app import HarnessApp, redeliver
from tests.support.journal import Journal, assert_no_overlap
from tests.support.process import wait_until
from tests.support.worker import WorkerProcess

MakeApp = Callable[..., HarnessApp]
MakeWorker = Callable[..., WorkerProcess]


@contextmanager
def foreign_app(app: HarnessApp) -> Iterator[Celery]:
    """Make an app on the same broker that knows neither the tasks nor the library."""
    with Celery("foreign", broker=app.given["broker"], backend=app.given["backend"], set_as_current=False) as other:
        other.finalize()
        # Tasks are shared between all apps of a process, unless they say otherwise.
        for name in [name for name in other.tasks if not name.startswith("celery.")]:
            del other.tasks[name]
        yield other


@pytest.fixture
def foreign(app: HarnessApp, worker: WorkerProcess) -> Iterator[Celery]:
    """An app on the shared worker's broker that knows neither the tasks nor the library."""
    with foreign_app(app) as other:
        yield other


def held(app: HarnessApp, journal: Journal, name: str = "queue") -> Any:
    """Start a run that waits at the gate "a"."""
    result = app.tasks[name].delay(journal.key(), 0, gate="a")
    journal.wait("start", key="key", timeout=20)
    return result


def test_message_to_an_idle_key_runs(foreign: Celery, journal: Journal) -> None:
    """Under its own id, with a run of its own."""
    result = foreign.send_task("queue", (journal.key(), 1))

    assert result.get(timeout=20) == 1
    start = journal.wait("start")
    assert start["task_id"] == result.id
    assert start["coalesce_run_index"] == 0
    journal.wait("coalesce_drain", timeout=20)


def test_messages_during_a_run_make_one_follow_up(app: HarnessApp, foreign: Celery, journal: Journal) -> None:
    """Each keeps its own id's result."""
    first = held(app, journal)
    results = [foreign.send_task("queue", (journal.key(), n)) for n in range(1, 5)]
    wait_until(lambda: len(journal.events("coalesce_trigger")) >= 4, 20)
    journal.open("a")

    assert first.get(timeout=20) == 0
    values = {result.get(timeout=20) for result in results}
    assert len(values) == 1
    journal.wait("coalesce_drain", timeout=20)
    assert len(journal.events("start")) == 2
    assert_no_overlap(journal.events())


def test_callbacks_of_foreign_messages_fire(app: HarnessApp, foreign: Celery, journal: Journal) -> None:
    """Links, errbacks, chains and chords of a message that joins."""
    held(app, journal)
    app.tasks["queue"].delay(journal.key(), 1)

    def callback(key: str) -> Any:
        return signature("collect", kwargs={"key": journal.key(key)}, app=foreign)

    def call(value: int) -> Any:
        return signature("queue", (journal.key(), value), app=foreign, immutable=True)

    linked = foreign.send_task("queue", (journal.key(), 5), link=callback("link"))
    chained = chain(call(5), callback("chain"), app=foreign).apply_async()
    counted = chord([call(5), call(5)], app=foreign)(callback("body"))
    wait_until(lambda: len(journal.events("coalesce_trigger", disposition="coalesced")) >= 4, 20)
    journal.open("a")

    assert linked.get(timeout=20) == 5
    assert chained.get(timeout=20) == 5
    assert counted.get(timeout=20) == [5, 5]
    for key in ("link", "chain", "body"):
        journal.wait("end", key=key, timeout=20)
        assert len(journal.events("start", key=key)) == 1


def test_beat_twice_is_one_run(app: HarnessApp, worker: WorkerProcess, journal: Journal) -> None:
    """Two beats with the same schedule, each with the app: one tick is one run."""
    schedulers = []
    for _ in range(2):
        entry = ScheduleEntry(
            name="tick",
            task="queue",
            schedule=timedelta(hours=1),
            args=(journal.key(), 1),
            kwargs={"gate": "a"},
            app=app,
        )
        scheduler = Scheduler(app=app, lazy=True)
        schedulers.append((scheduler, entry))
    results = [scheduler.apply_async(entry, advance=False) for scheduler, entry in schedulers]
    journal.wait("start", timeout=20)
    journal.open("a", 2)

    for result in results:
        assert result.get(timeout=20) == 1
    journal.wait("coalesce_drain", timeout=20)
    assert len(journal.events("start")) <= 2
    assert_no_overlap(journal.events())


def test_ticks_of_two_beats_that_only_know_names_are_one_run(
    app: HarnessApp, foreign: Celery, journal: Journal
) -> None:
    """Beats without the tasks send plain messages, which coalesce at the gate."""
    held(app, journal)
    entry = ScheduleEntry(name="tick", task="queue", schedule=timedelta(hours=1), args=(journal.key(), 1), app=foreign)
    results = [Scheduler(app=foreign, lazy=True).apply_async(entry, advance=False) for _ in range(2)]
    wait_until(lambda: len(journal.events("coalesce_trigger")) == 2, 20)
    journal.open("a")

    assert [result.get(timeout=20) for result in results] == [1, 1]
    journal.wait("coalesce_drain", timeout=20)
    assert len(journal.events("start")) == 2


def test_scheduler_with_the_task_takes_any_outcome(app: HarnessApp, worker: WorkerProcess, journal: Journal) -> None:
    """Whatever the disposition, beat gets a result, never an exception."""
    held(app, journal)
    entry = ScheduleEntry(name="tick", task="queue", schedule=timedelta(hours=1), args=(journal.key(), 1), app=app)
    scheduler = Scheduler(app=app, lazy=True)
    results = [scheduler.apply_async(entry, advance=False) for _ in range(3)]
    journal.open("a")

    assert [result.get(timeout=20) for result in results] == [1, 1, 1]


@pytest.mark.parametrize("name", ["skip", "serialize", "reject"])
def test_modes_hold_at_the_gate(name: str, app: HarnessApp, foreign: Celery, journal: Journal) -> None:
    """`skip` is answered, `serialize` runs all, `reject` fails what does not fit."""
    first = held(app, journal, name)
    results = [foreign.send_task(name, (journal.key(), n)) for n in (1, 2)]
    wait_until(lambda: len(journal.events("coalesce_trigger")) >= 2, 20)
    journal.open("a")

    assert first.get(timeout=20) == 0
    if name == "skip":
        assert [result.get(timeout=20) for result in results] == [0, 0]
    elif name == "serialize":
        assert sorted(result.get(timeout=20) for result in results) == [1, 2]
    else:
        assert sorted(str(result.get(timeout=20, propagate=False)) for result in results)
        failed = [result for result in results if result.failed()]
        assert len(failed) == 1
        assert isinstance(app.AsyncResult(failed[0].id).result, QueueFull)
    journal.wait("coalesce_drain", timeout=20)
    assert_no_overlap(journal.events())


def test_foreign_countdown_expires_and_revoke(
    app: HarnessApp, foreign: Celery, worker: WorkerProcess, journal: Journal
) -> None:
    """A foreign message's own options count as they do in Celery."""
    late = foreign.send_task("queue", (journal.key("late"), 1), countdown=0.5)
    journal.record("sent", key="late")
    assert late.get(timeout=20) == 1
    assert journal.wait("start", key="late")["time"] - journal.wait("sent")["time"] > 0.3

    revoked = foreign.send_task("queue", (journal.key("revoked"), 1), countdown=2)
    assert app.control.revoke(revoked.id, reply=True, destination=[worker.hostname], timeout=10, limit=1)
    with pytest.raises(TaskRevokedError):
        revoked.get(timeout=20)
    journal.assert_never("start", within=0.2, key="revoked")

    expired = foreign.send_task("queue", (journal.key("expired"), 1), expires=-1)
    with pytest.raises(TaskRevokedError):
        expired.get(timeout=20)
    assert engine_of(app).transitions.show("queue", journal.key("revoked")) is None


def test_arguments_that_do_not_fit_fail_as_in_celery(foreign: Celery, journal: Journal) -> None:
    """A `TypeError` of the body, not of the gate; the worker goes on."""
    wrong = foreign.send_task("queue", (), {"nonsense": 1})
    with pytest.raises(TypeError):
        wrong.get(timeout=20)
    assert foreign.send_task("queue", (journal.key(), 1)).get(timeout=20) == 1


def test_key_that_is_no_string_fails_the_message(foreign: Celery, journal: Journal) -> None:
    """`InvalidKey` is its result."""
    wrong = foreign.send_task("queue", ("",))
    with pytest.raises(ValueError, match="key"):
        wrong.get(timeout=20)
    assert foreign.send_task("queue", (journal.key(), 1)).get(timeout=20) == 1


def test_unregistered_tasks_are_celerys_business(foreign: Celery, worker: WorkerProcess, journal: Journal) -> None:
    """A name that no worker knows is discarded, and nothing else suffers."""
    foreign.send_task("no.such.task", (journal.key(),))
    wait_until(lambda: "no.such.task" in worker.logs(), 20)
    assert foreign.send_task("queue", (journal.key(), 1)).get(timeout=20) == 1


def test_follow_up_of_a_task_that_its_publisher_does_not_know(
    make_app: MakeApp, make_worker: MakeWorker, journal: Journal
) -> None:
    """A run is dispatched from its record, by whatever worker ends the run before it."""
    app = make_app()
    make_worker(app, queues=["a"])
    make_worker(app, queues=["b"])
    first = app.tasks["shared_a"].apply_async((journal.key(), 1), {"gate": "a"}, queue="a")
    journal.wait("start", timeout=20)
    second = app.tasks["shared_b"].apply_async((journal.key(), 2), queue="b")
    journal.open("a")

    assert first.get(timeout=20) == 1
    assert second.get(timeout=20) == 2
    assert_no_overlap(journal.events())


def test_foreign_message_of_an_exempt_call_runs_as_in_celery(foreign: Celery, journal: Journal) -> None:
    """A key function that returns `None`."""
    result = foreign.send_task("sometimes_exempt", (journal.key(), True))
    assert result.get(timeout=20) == "ran"
    journal.assert_never("coalesce_start", within=0.2)


def test_foreign_message_delivered_twice_is_one_run(
    make_app: MakeApp, make_worker: MakeWorker, journal: Journal
) -> None:
    """The same message again, while its run goes on and after it has ended."""
    from tests.acceptance.test_acks import dropped

    app = make_app()
    with foreign_app(app) as other:
        worker = make_worker(app)
        result = other.send_task("queue_late", (journal.key(), 1), {"gate": "a"})
        journal.wait("start", timeout=20)
        redeliver(app)
        wait_until(lambda: dropped(worker) == 1, 20)
        journal.open("a", 2)
        assert result.get(timeout=20) == 1
        other.send_task("queue_late", (journal.key(), 1), task_id=result.id)
        wait_until(lambda: dropped(worker) == 2, 20)
        assert result.get(timeout=5) == 1
    journal.wait("coalesce_drain", timeout=20)
    assert len(journal.events("start")) == 1


def test_map_starmap_and_chunks_call_the_body(app: HarnessApp, worker: WorkerProcess, journal: Journal) -> None:
    """Celery's own tasks over a coalesced one are plain calls within one message."""
    task = app.tasks["tell"]
    task.map([journal.key("a"), journal.key("b")]).apply_async().get(timeout=20)
    app.tasks["queue"].starmap([(journal.key("c"), 1), (journal.key("c"), 2)]).apply_async().get(timeout=20)
    app.tasks["queue"].chunks([(journal.key("d"), 1), (journal.key("d"), 2)], 1).apply_async().get(timeout=20)
    assert [len(journal.events("start", key=key)) for key in "abcd"] == [1, 1, 2, 2]


def test_nothing_is_left_but_the_tombstone(foreign: Celery, app: HarnessApp, journal: Journal) -> None:
    """A foreign message leaves its id behind, until a redelivery is out of the question."""
    result = foreign.send_task("queue", (journal.key(), 1))
    result.get(timeout=20)
    journal.wait("coalesce_drain", timeout=20)
    assert engine_of(app).transitions.show("queue", journal.key()) is None


@pytest.mark.parametrize("name", ["rested", "debounced"])
def test_message_whose_run_has_to_wait_is_its_wake_up(
    name: str, app: HarnessApp, worker: WorkerProcess, journal: Journal
) -> None:
    """It is kept until its run may start: nobody else would publish another for a minute."""
    first = app.send_task(name, (journal.key(), 1))
    assert first.get(timeout=20) == 1
    journal.wait("coalesce_drain", timeout=20)
    second = app.send_task(name, (journal.key(), 2))
    assert second.get(timeout=20) == 2
