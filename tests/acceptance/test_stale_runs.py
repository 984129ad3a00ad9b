"""A run that outlived its lease and comes back: it stores nothing, calls nothing and dispatches nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
from celery import chain
from celery.exceptions import WorkerLostError

from celery_coalesce import Coalescer
from celery_coalesce.errors import LeaseLost
from celery_coalesce.states import RunState
from tests.support.app import HarnessApp
from tests.support.journal import Journal
from tests.support.process import wait_until
from tests.support.worker import WorkerProcess

MakeApp = Callable[..., HarnessApp]
MakeWorker = Callable[..., WorkerProcess]


@dataclass
class Pair:
    """Two workers of one app, with leases of two seconds."""

    app: HarnessApp
    workers: list[WorkerProcess]

    def of(self, hostname: str) -> WorkerProcess:
        """Return the worker with a name."""
        return next(worker for worker in self.workers if worker.hostname == hostname)


@pytest.fixture
def pair(make_app: MakeApp, make_worker: MakeWorker) -> Pair:
    """Two workers."""
    app = make_app(conf={"coalesce_lease": 2, "coalesce_redispatch_after": 2})
    workers = [make_worker(app, wait=False) for _ in range(2)]
    for worker in workers:
        worker.wait_ready()
    return Pair(app, workers)


def test_stale_run_stores_and_calls_nothing(pair: Pair, journal: Journal) -> None:
    """Its callers got `LeaseLost`; neither its links nor its chain nor its value appear later."""
    app = pair.app
    task, collect = app.tasks["queue"], app.tasks["collect"]
    result = chain(
        task.si(journal.key(), "stale", gate="a").set(
            link=collect.s(key=journal.key("link")),
            link_error=app.tasks["on_error"].s(key=journal.key("error")),
        ),
        collect.s(key=journal.key("chain")),
    ).apply_async()
    stale = result.parent
    start = journal.wait("start", timeout=20)
    follow_up = task.apply_async((journal.key(), "next"), task_id=f"{journal.name}-next")
    frozen = pair.of(start["hostname"])
    frozen.pause()

    lost = journal.wait("coalesce_lost", timeout=30)
    assert (lost["task_id"], lost["again"]) == (stale.id, "False")
    with pytest.raises(LeaseLost) as caught:
        stale.get(timeout=20)
    assert isinstance(caught.value, WorkerLostError)
    assert follow_up.get(timeout=20) == "next"
    journal.wait("coalesce_drain", timeout=20)
    journal.wait("on_error", key="error", timeout=20)

    journal.open("a")
    frozen.resume()
    end = journal.wait("end", key="key", count=2, timeout=20)
    assert (end["task_id"], end["outcome"]) == (stale.id, "returned")

    journal.assert_never("start", within=1.0, key="link")
    assert journal.events("start", key="chain") == []
    assert stale.state == "FAILURE"
    assert isinstance(app.AsyncResult(stale.id).result, LeaseLost)
    assert len(journal.events("on_error")) == 1
    assert len(journal.events("coalesce_drain")) == 1
    assert journal.events("coalesce_success", task_id=stale.id) == []


def test_followers_of_a_stale_run_get_lease_lost_once(pair: Pair, journal: Journal) -> None:
    """What had joined it ends with it, and is not completed again by it."""
    app = pair.app
    task = app.tasks["skip"]
    task.delay(journal.key(), "stale", gate="a")
    start = journal.wait("start", timeout=20)
    joined = task.apply_async(
        (journal.key(), "x"),
        link=app.tasks["collect"].s(key=journal.key("link")),
        link_error=app.tasks["on_error"].s(key=journal.key("error")),
    )
    assert joined.disposition == "skipped"
    frozen = pair.of(start["hostname"])
    frozen.pause()

    with pytest.raises(LeaseLost):
        joined.get(timeout=30)
    assert journal.wait("on_error", timeout=20)["failed"] == joined.id
    journal.open("a")
    frozen.resume()
    journal.wait("end", timeout=20)

    journal.assert_never("start", within=1.0, key="link")
    assert joined.state == "FAILURE"
    assert len(journal.events("on_error")) == 1


def test_late_acknowledged_run_runs_again_and_the_stale_one_is_refused(pair: Pair, journal: Journal) -> None:
    """With `acks_late` it is dispatched again under the same id; the value is the second execution's."""
    app = pair.app
    result = app.tasks["late_again"].apply_async(
        (journal.key(), "value"), {"gate": "a"}, link=app.tasks["collect"].s(key=journal.key("link"))
    )
    start = journal.wait("start", timeout=20)
    frozen = pair.of(start["hostname"])
    frozen.pause()

    second = journal.wait("start", count=2, key="key", timeout=30)
    assert second["task_id"] == start["task_id"] == result.id
    assert second["coalesce_run_id"] == start["coalesce_run_id"]
    assert second["coalesce_token"] > start["coalesce_token"]
    assert result.get(timeout=20) == "value"
    journal.wait("end", key="link", timeout=20)
    journal.open("a")
    frozen.resume()
    journal.wait("end", key="key", run=start["run"], timeout=20)

    journal.assert_never("start", within=1.0, key="link", retries=1)
    assert len(journal.events("start", key="link")) == 1
    assert len(journal.events("start", key="key")) == 2
    assert len(journal.events("coalesce_success")) == 1
    assert len(journal.events("coalesce_drain")) == 1


def test_stale_failure_is_not_stored(pair: Pair, journal: Journal) -> None:
    """A stale body that raises calls no errback, and leaves the result of the second execution alone."""
    app = pair.app
    errback = app.tasks["on_error"].s(key=journal.key("error"))
    result = app.tasks["queue"].apply_async((journal.key(),), {"gate": "a", "error": "stale"}, link_error=errback)
    start = journal.wait("start", timeout=20)
    frozen = pair.of(start["hostname"])
    frozen.pause()

    with pytest.raises(LeaseLost):
        result.get(timeout=30)
    journal.wait("on_error", timeout=20)
    journal.open("a")
    frozen.resume()
    journal.wait("end", timeout=20)

    journal.assert_never("coalesce_error", within=1.0, hostname=frozen.hostname)
    assert isinstance(app.AsyncResult(result.id).result, LeaseLost)
    assert len(journal.events("on_error")) == 1


def test_stale_retry_is_not_sent(pair: Pair, journal: Journal) -> None:
    """A stale body that retries makes no further attempt."""
    app = pair.app
    result = app.tasks["queue_retry"].delay(journal.key(), times=1, gate="a")
    start = journal.wait("start", timeout=20)
    frozen = pair.of(start["hostname"])
    frozen.pause()

    with pytest.raises(LeaseLost):
        result.get(timeout=30)
    journal.open("a", 2)
    frozen.resume()
    journal.wait("end", timeout=20)

    journal.assert_never("start", within=1.5, retries=1)
    assert isinstance(app.AsyncResult(result.id).result, LeaseLost)


def test_stale_replacement_is_not_sent(pair: Pair, journal: Journal) -> None:
    """A stale body that replaces itself sends nothing."""
    app = pair.app
    result = app.tasks["replaced_by_plain"].delay(journal.key(), 1, gate="a")
    start = journal.wait("start", timeout=20)
    frozen = pair.of(start["hostname"])
    frozen.pause()

    with pytest.raises(LeaseLost):
        result.get(timeout=30)
    journal.open("a")
    frozen.resume()
    journal.wait("end", timeout=20)

    journal.assert_never("start", within=1.0, key="key-plain")
    assert isinstance(app.AsyncResult(result.id).result, LeaseLost)


def test_check_raises_in_a_stale_body(pair: Pair, journal: Journal) -> None:
    """`self.coalesce.check()` ends a stale body before it does harm."""
    app = pair.app
    app.tasks["checking"].delay(journal.key(), gate="a")
    start = journal.wait("start", timeout=20)
    assert journal.wait("checked", count=1, timeout=20)["held"] is True
    frozen = pair.of(start["hostname"])
    frozen.pause()
    journal.wait("coalesce_lost", timeout=30)
    journal.open("a")
    frozen.resume()

    assert journal.wait("end", timeout=20)["outcome"] == "LeaseLost"
    assert journal.events("checked")[-1]["held"] is False


def test_body_does_not_begin_with_a_lease_that_was_lost_on_the_way(
    make_app: MakeApp, make_worker: MakeWorker, journal: Journal
) -> None:
    """A run that stood in a thread pool's queue while its worker stood still is another's by then."""
    app = make_app(conf={"coalesce_lease": 2, "coalesce_redispatch_after": 2})
    frozen = make_worker(app, pool="threads", concurrency=1)
    app.tasks["queue"].delay(journal.key("before"), gate="a")
    journal.wait("start", key="before", timeout=20)
    result = app.tasks["queue"].delay(journal.key())
    wait_until(lambda: {run.state for run in Coalescer(app).runs()} == {RunState.RUNNING}, 20)
    frozen.pause()
    make_worker(app)

    with pytest.raises(LeaseLost):
        result.get(timeout=30)
    journal.open("a")
    frozen.resume()

    wait_until(lambda: frozen.logs().count("has lost its lease, and reports nothing") == 2, 20)
    assert journal.events("start", key="key") == []
    assert journal.events("coalesce_start", key="key") == []
    assert journal.events("coalesce_success") == []


def test_short_pause_costs_nothing(pair: Pair, journal: Journal) -> None:
    """A worker that comes back before anybody noticed keeps its runs."""
    app = pair.app
    result = app.tasks["queue"].delay(journal.key(), 1, gate="a")
    start = journal.wait("start", timeout=20)
    frozen = pair.of(start["hostname"])
    frozen.pause()
    journal.assert_never("coalesce_lost", within=0.5)
    frozen.resume()
    journal.open("a")

    assert result.get(timeout=20) == 1
