"""Delays, rests, constraints, errors, retries and replacement, with real workers and what can go wrong around them."""

from __future__ import annotations

import os
import signal
import uuid
from collections.abc import Callable
from typing import Any

import pytest
import redis
from celery.exceptions import TaskRevokedError

from celery_coalesce import Coalescer, Disposition, PredecessorFailed, Superseded
from celery_coalesce.dispatch import run_header
from celery_coalesce.keys import state_id
from celery_coalesce.states import RunState
from tests.support.app import HarnessApp
from tests.support.journal import Journal, assert_no_overlap
from tests.support.process import wait_until
from tests.support.rabbit import RabbitServer
from tests.support.traces import traces
from tests.support.worker import WorkerProcess

MakeApp = Callable[..., HarnessApp]
MakeWorker = Callable[..., WorkerProcess]

SOON = 20  # seconds that anything may take on a busy machine


def seconds(journal: Journal, since: Any, until: Any) -> float:
    """Return the seconds from one event to another."""
    return float(until["time"] - since["time"])


class TestDebounce:
    def test_a_burst_costs_one_message(self, make_app: MakeApp, journal: Journal) -> None:
        """A thousand triggers within the quiet period; the broker holds what it would for one."""
        app = make_app()
        task = app.tasks["debounced"]
        for n in range(1000):
            task.delay(journal.key(), n)
        with redis.Redis.from_url(app.given["broker"]) as client:
            assert client.llen("celery") == 1

    def test_the_last_arguments_run_once_after_the_quiet(
        self, app: HarnessApp, worker: WorkerProcess, journal: Journal
    ) -> None:
        """Exactly then: not before, and not much later than Celery takes to dispatch."""
        task = app.tasks["debounced"]
        results = task.batch_delay([(journal.key(), n) for n in range(50)])
        journal.record("quiet")
        assert {result.get(timeout=SOON) for result in results} == {49}
        (start,) = journal.events("start")
        assert 0.9 <= seconds(journal, journal.events("quiet")[0], start) < SOON
        journal.wait("coalesce_drain", timeout=SOON)
        assert traces(app, "debounced", journal.key()) == []

    @pytest.mark.parametrize("queue_type", ["classic", "quorum"])
    def test_fractions_of_a_second_work_on_rabbitmq(
        self,
        queue_type: str,
        rabbit: RabbitServer,
        state_server: Any,
        make_app: MakeApp,
        make_worker: MakeWorker,
        journal: Journal,
    ) -> None:
        """Native delayed delivery knows whole seconds alone, and is not used."""
        url = state_server.new_db()
        conf: dict[str, Any] = {"coalesce_redis_url": url, "task_default_queue": f"test-{uuid.uuid4().hex[:8]}"}
        if queue_type == "quorum":
            conf |= {"task_default_queue_type": "quorum", "worker_detect_quorum_queues": True}
        app = make_app(rabbit.url, url, conf)
        make_worker(app)
        results = app.tasks["debounced_briefly"].batch_delay([(journal.key(), n) for n in range(3)])
        assert [result.get(timeout=SOON) for result in results] == [2, 2, 2]
        assert len(journal.events("start")) == 1

    def test_a_worker_that_is_killed_with_the_message_loses_no_trigger(
        self, make_app: MakeApp, make_worker: MakeWorker, journal: Journal
    ) -> None:
        """The record's timer brings another message."""
        # With a lease of nine seconds six are near enough for a message that a worker holds.
        app = make_app(conf={"coalesce_lease": 9, "coalesce_redispatch_after": 1})
        worker = make_worker(app)
        result = app.tasks["debounced"].apply_async((journal.key(), 1), coalesce_delay=5)
        wait_until(lambda: f"{result.id}] received" in worker.logs(), SOON)
        worker.kill()
        make_worker(app)
        assert result.get(timeout=SOON) == 1
        assert len(journal.events("start")) == 1


class TestCooldown:
    def test_the_waiter_starts_by_itself_after_the_rest(
        self, app: HarnessApp, worker: WorkerProcess, journal: Journal
    ) -> None:
        """From the end of a run to the start of the next; also where the key was idle in between."""
        task = app.tasks["rested"]
        first = task.delay(journal.key(), 1, gate="a")
        journal.wait("start", timeout=SOON)
        second = task.delay(journal.key(), 2)
        journal.open("a")
        assert [first.get(timeout=SOON), second.get(timeout=SOON)] == [1, 2]
        journal.wait("coalesce_drain", timeout=SOON)
        third = task.delay(journal.key(), 3)
        assert third.get(timeout=SOON) == 3
        ends, starts = journal.events("end"), journal.events("start")
        for end, start in zip(ends, starts[1:], strict=False):
            assert 0.95 <= seconds(journal, end, start) < SOON

    def test_an_idle_key_forgets_its_rest(self, app: HarnessApp, worker: WorkerProcess, journal: Journal) -> None:
        """By itself, when it is over."""
        app.tasks["rested"].delay(journal.key(), 1).get(timeout=SOON)
        journal.wait("coalesce_drain", timeout=SOON)
        wait_until(lambda: traces(app, "rested", journal.key()) == [], SOON)


class TestConstraints:
    def test_a_killed_child_frees_its_slot(self, make_app: MakeApp, make_worker: MakeWorker, journal: Journal) -> None:
        """The next in line, of another key, starts."""
        app = make_app()
        make_worker(app)
        task = app.tasks["limited"]
        task.delay(journal.key("a"), 1, gate="never")
        start = journal.wait("start", key="a", timeout=SOON)
        waits = task.delay(journal.key("b"), 2)
        assert waits.disposition is Disposition.QUEUED
        os.kill(start["pid"], signal.SIGKILL)
        assert waits.get(timeout=SOON) == 2
        wait_until(lambda: Coalescer(app).constraints() == [], SOON)

    @pytest.mark.parametrize("name", ["limited", "limited_late"])
    def test_a_killed_worker_frees_its_slot(
        self, name: str, make_app: MakeApp, make_worker: MakeWorker, journal: Journal
    ) -> None:
        """One lease later, by whoever sweeps; one that is run again keeps it."""
        app = make_app(conf={"coalesce_lease": 2})
        worker = make_worker(app)
        task = app.tasks[name]
        task.delay(journal.key("a"), 1, gate="a")
        journal.wait("start", key="a", timeout=SOON)
        waits = task.delay(journal.key("b"), 2)
        worker.kill()
        make_worker(app)
        if name == "limited_late":
            journal.wait("start", key="a", count=2, timeout=SOON)
            assert journal.events("start", key="b") == []
            journal.open("a")
        assert waits.get(timeout=SOON) == 2
        wait_until(lambda: Coalescer(app).constraints() == [], SOON)

    def test_a_limit_is_set_while_they_wait(self, app: HarnessApp, worker: WorkerProcess, journal: Journal) -> None:
        """As many more start as it lets go."""
        coalescer, task = Coalescer(app), app.tasks["limited"]
        results = [task.delay(journal.key(f"key {n}"), n, gate="a") for n in range(4)]
        journal.wait("start", timeout=SOON)
        try:
            coalescer.set_limit("limited", 3)
            journal.wait("start", count=3, timeout=SOON)
            (view,) = coalescer.constraints()
            assert (view.name, view.limit, view.declared, view.running, view.waiting) == ("limited", 3, 1, 3, 1)
        finally:
            coalescer.set_limit("limited", None)
        journal.open("a", 4)
        assert [result.get(timeout=SOON) for result in results] == [0, 1, 2, 3]
        wait_until(lambda: coalescer.constraints() == [], SOON)

    @pytest.mark.parametrize(("name", "limit"), [("", 1), (7, 1), ("x", -1), ("x", 1.5), ("x", True), ("x", "3")])
    def test_a_bad_limit_is_refused(self, app: HarnessApp, name: Any, limit: Any) -> None:
        """With the value, and nothing is set."""
        with pytest.raises(ValueError, match="is a"):
            Coalescer(app).set_limit(name, limit)


class TestOnce:
    def test_callers_get_the_value_of_the_run_that_did_it(
        self, app: HarnessApp, worker: WorkerProcess, journal: Journal
    ) -> None:
        """Those of before, those of after, those with callbacks and ids of their own, and those by name."""
        task, key = app.tasks["once"], journal.key()
        first = task.delay(key, 1, gate="a")
        journal.wait("start", timeout=SOON)
        before = task.delay(key, 2)
        journal.open("a")
        assert first.get(timeout=SOON) == 1
        assert before.get(timeout=SOON) == 1
        journal.wait("coalesce_drain", timeout=SOON)
        after = task.delay(key, 3)
        assert (after.disposition, after.id, after.get(timeout=SOON)) == (Disposition.SKIPPED, first.id, 1)
        link = app.tasks["collect"].s(key=journal.key("link"))
        own = task.apply_async((key, 4), task_id=f"own-{journal.name}", link=link)
        assert own.get(timeout=SOON) == 1
        assert journal.wait("start", key="link", timeout=SOON)["args"] == [1]
        assert app.send_task("once", (key, 5)).get(timeout=SOON) == 1
        assert len(journal.events("start", key="key")) == 1
        task.clear_key(key)
        assert task.delay(key, 6).get(timeout=SOON) == 6
        journal.wait("coalesce_drain", count=2, timeout=SOON)
        task.clear_key(key)
        assert traces(app, "once", key) == []


class TestStopOnError:
    def test_what_waited_is_not_run_and_its_callers_are_told(
        self, app: HarnessApp, worker: WorkerProcess, journal: Journal
    ) -> None:
        """With links and a chain; and the key works again at once."""
        task, key = app.tasks["stop"], journal.key()
        bad = task.delay(key, error="boom", gate="a")
        journal.wait("start", timeout=SOON)
        errback = app.tasks["on_error"].s(key=journal.key("errback"))
        waiting = [
            task.delay(key, 1),
            task.apply_async((key, 2), link_error=errback),
            task.apply_async((key, 3), countdown=60),
        ]
        journal.open("a")
        with pytest.raises(RuntimeError, match="boom"):
            bad.get(timeout=SOON)
        for result in waiting:
            with pytest.raises(PredecessorFailed, match=f"run {bad.run_id} failed with RuntimeError"):
                result.get(timeout=SOON)
        journal.wait("on_error", key="errback", failed=waiting[1].id, timeout=SOON)
        journal.wait("coalesce_skip", count=3, outcome="<Outcome.STOPPED: 'stopped'>", timeout=SOON)
        assert task.delay(key, 4).get(timeout=SOON) == 4
        assert len(journal.events("start", key="key")) == 2

    def test_what_is_called_after_the_failure_runs(
        self, app: HarnessApp, worker: WorkerProcess, journal: Journal
    ) -> None:
        """By the run's own errback, and by a caller that has seen the error."""
        task, key = app.tasks["stop"], journal.key()
        errback = task.si(key, "mended")
        for turn in range(1, 6):
            bad = task.apply_async((key,), {"error": "boom"}, link_error=errback)
            with pytest.raises(RuntimeError, match="boom"):
                bad.get(timeout=SOON)
            assert task.delay(key, turn).get(timeout=SOON) == turn
            journal.wait("start", args=[key, "mended"], count=turn, timeout=SOON)

    def test_a_killed_run_is_a_failure_too(self, make_app: MakeApp, make_worker: MakeWorker, journal: Journal) -> None:
        """The parent stops what waits."""
        app = make_app()
        make_worker(app)
        task = app.tasks["stop"]
        task.delay(journal.key(), gate="never")
        start = journal.wait("start", timeout=SOON)
        waiting = task.delay(journal.key(), 1)
        os.kill(start["pid"], signal.SIGKILL)
        with pytest.raises(PredecessorFailed):
            waiting.get(timeout=SOON)

    def test_a_run_of_a_killed_worker_is_a_failure_too(
        self, make_app: MakeApp, make_worker: MakeWorker, journal: Journal
    ) -> None:
        """The sweep stops what waits, unless the run is run again."""
        app = make_app(conf={"coalesce_lease": 2})
        worker = make_worker(app)
        lost = app.tasks["stop"].delay(journal.key("early"), gate="never")
        again = app.tasks["stop_late"].delay(journal.key("late"), 0, gate="late")
        journal.wait("start", count=2, timeout=SOON)
        after_lost = app.tasks["stop"].delay(journal.key("early"), 1)
        after_again = app.tasks["stop_late"].delay(journal.key("late"), 2)
        worker.kill()
        make_worker(app)
        with pytest.raises(PredecessorFailed):
            after_lost.get(timeout=SOON)
        journal.open("late", 2)
        assert [again.get(timeout=SOON), after_again.get(timeout=SOON)] == [0, 2]
        assert lost.state == "FAILURE"


class TestOnRetry:
    def test_release_lets_the_key_go_on_meanwhile(
        self, app: HarnessApp, worker: WorkerProcess, journal: Journal
    ) -> None:
        """A trigger during the backoff runs before the retry, never with it."""
        task = app.tasks["retry_released"]
        retried = task.delay(journal.key(), times=1, countdown=5, value=1)
        journal.wait("end", outcome="Retry", timeout=SOON)
        between = task.delay(journal.key(), times=0, value=2)
        assert between.get(timeout=SOON) == 2
        assert retried.get(timeout=SOON) == 1
        journal.wait("coalesce_drain", timeout=SOON)
        order = [(event["task_id"], event["retries"]) for event in journal.events("start")]
        assert order == [(retried.id, 0), (between.id, 0), (retried.id, 1)]
        assert len(journal.events("coalesce_drain")) == 1
        assert_no_overlap(journal.events())

    def test_merge_takes_triggers_into_the_retry(
        self, app: HarnessApp, worker: WorkerProcess, journal: Journal
    ) -> None:
        """They get its value, which comes from the latest arguments."""
        task = app.tasks["retry_merged"]
        retried = task.delay(journal.key(), times=1, countdown=5, value=1)
        journal.wait("end", outcome="Retry", timeout=SOON)
        coalescer = Coalescer(app)
        wait_until(lambda: [run.state for run in coalescer.runs(task="retry_merged")] == [RunState.RETRYING], SOON)
        later = task.delay(journal.key(), times=1, value=2)
        assert (later.disposition, later.id) == (Disposition.COALESCED, retried.id)
        assert retried.get(timeout=SOON) == 2
        assert [event["retries"] for event in journal.events("start")] == [0, 1]


class TestReplace:
    def test_a_stubborn_run_is_terminated_and_its_caller_told_why(
        self, app: HarnessApp, worker: WorkerProcess, journal: Journal
    ) -> None:
        """After the grace; the newer one, with the latest arguments, begins when it is gone."""
        task = app.tasks["replaced_soon"]
        old = task.delay(journal.key(), 1, gate="never")
        journal.wait("start", timeout=SOON)
        newer = [task.delay(journal.key(), n) for n in (2, 3)]
        assert [result.disposition for result in newer] == [Disposition.QUEUED, Disposition.COALESCED]
        assert [result.get(timeout=SOON) for result in newer] == [3, 3]
        with pytest.raises(Superseded, match="a newer trigger") as told:
            old.get(timeout=SOON)
        assert isinstance(told.value, TaskRevokedError)
        assert old.state == "REVOKED"
        first, second = journal.events("start")
        assert 0.9 <= seconds(journal, first, second) < SOON
        journal.wait("coalesce_skip", run_id=old.run_id, outcome="<Outcome.STOPPED: 'stopped'>", timeout=SOON)
        journal.wait("coalesce_drain", timeout=SOON)
        assert traces(app, "replaced_soon", journal.key()) == []

    def test_a_willing_run_gives_way_by_itself(self, app: HarnessApp, worker: WorkerProcess, journal: Journal) -> None:
        """It sees that it is superseded long before it would be terminated."""
        task = app.tasks["replaced_willingly"]
        old = task.delay(journal.key(), 1, gate="any")
        journal.wait("start", timeout=SOON)
        newer = task.delay(journal.key(), 2)
        assert newer.get(timeout=SOON) == 2
        with pytest.raises(Superseded):
            old.get(timeout=SOON)
        journal.wait("coalesce_skip", run_id=old.run_id, timeout=SOON)
        assert journal.events("coalesce_error") == []
        assert_no_overlap(journal.events())

    def test_without_a_grace_nobody_is_terminated(
        self, app: HarnessApp, worker: WorkerProcess, journal: Journal
    ) -> None:
        """The newer one waits until the older has ended."""
        task = app.tasks["replaced_never"]
        old = task.delay(journal.key(), 1, gate="a")
        journal.wait("start", timeout=SOON)
        newer = task.delay(journal.key(), 2)
        journal.assert_never("start", task_id=newer.id)
        journal.open("a")
        assert [old.get(timeout=SOON), newer.get(timeout=SOON)] == [1, 2]
        assert_no_overlap(journal.events())

    @pytest.mark.parametrize("pool", ["gevent", "eventlet"])
    def test_a_green_worker_sweeps_while_a_run_goes_on(
        self, pool: str, make_app: MakeApp, make_worker: MakeWorker, journal: Journal
    ) -> None:
        """And terminates what is to be replaced."""
        app = make_app(conf={"coalesce_lease": 2, "coalesce_redispatch_after": 1})
        worker = make_worker(app, pool=pool, concurrency=10)
        app.tasks["queue"].delay(journal.key("long"), gate="long")
        journal.wait("start", key="long", timeout=SOON)
        # Four seconds are too far for a message: a sweep dispatches it.
        far = app.tasks["queue"].apply_async((journal.key("far"), 1), countdown=4)
        assert far.get(timeout=SOON) == 1
        task = app.tasks["replaced_soon"]
        old = task.delay(journal.key("old"), 1, gate="never")
        journal.wait("start", key="old", timeout=SOON)
        assert task.delay(journal.key("old"), 2).get(timeout=SOON) == 2
        with pytest.raises(Superseded):
            old.get(timeout=SOON)
        journal.wait("coalesce_skip", run_id=old.run_id, timeout=SOON)
        journal.open("long")
        assert "The heartbeat failed" not in worker.logs()

    def test_a_run_that_waits_for_a_thread_is_not_lost(
        self, make_app: MakeApp, make_worker: MakeWorker, journal: Journal
    ) -> None:
        """It was to be stopped before its body began, and the pool can not: it runs."""
        app = make_app()
        worker = make_worker(app, pool="threads", concurrency=1)
        app.tasks["work"].delay(journal.key("busy"), gate="busy")
        journal.wait("start", key="busy", timeout=SOON)
        task = app.tasks["replaced_soon"]
        old = task.delay(journal.key(), 1)
        wait_until(lambda: [run.state for run in Coalescer(app).runs()] == [RunState.RUNNING], SOON)
        newer = task.delay(journal.key(), 2)
        wait_until(lambda: "needs no run of its own: stop" in worker.logs(), SOON)
        journal.open("busy")
        assert [old.get(timeout=SOON), newer.get(timeout=SOON)] == [1, 2]

    def test_a_duplicate_message_does_not_hide_a_run_from_its_end(
        self, app: HarnessApp, worker: WorkerProcess, journal: Journal
    ) -> None:
        """It is dropped, and the run can still be terminated."""
        task = app.tasks["replaced_soon"]
        old = task.delay(journal.key(), 1, gate="never")
        journal.wait("start", timeout=SOON)
        header = run_header(state_id("replaced_soon", journal.key()), str(old.run_id), old.id)
        app.send_task("replaced_soon", (journal.key(), 1), task_id=old.id, headers={"coalesce": header})
        wait_until(lambda: f"{old.id}] needs no run of its own: duplicate" in worker.logs(), SOON)
        newer = task.delay(journal.key(), 2)
        assert newer.get(timeout=SOON) == 2
        with pytest.raises(Superseded):
            old.get(timeout=SOON)

    @pytest.mark.parametrize("pool", ["threads", "solo"])
    def test_a_pool_that_can_not_terminate_goes_on(
        self, pool: str, make_app: MakeApp, make_worker: MakeWorker, journal: Journal
    ) -> None:
        """The run is asked, and that is all; nothing overlaps."""
        app = make_app()
        make_worker(app, pool=pool, concurrency=1 if pool == "solo" else 2)
        task = app.tasks["replaced_soon"]
        old = task.delay(journal.key(), 1, gate="a")
        journal.wait("start", timeout=SOON)
        newer = task.delay(journal.key(), 2)
        journal.assert_never("start", task_id=newer.id, within=1.5)
        journal.open("a")
        assert [old.get(timeout=SOON), newer.get(timeout=SOON)] == [1, 2]
        assert_no_overlap(journal.events())

    def test_a_run_that_waits_for_its_retry_is_replaced(
        self, app: HarnessApp, worker: WorkerProcess, journal: Journal
    ) -> None:
        """It does not come back."""
        task = app.tasks["replaced_retry"]
        old = task.delay(journal.key(), times=1, countdown=600)
        journal.wait("end", outcome="Retry", timeout=SOON)
        newer = task.delay(journal.key(), times=0, value=2)
        assert newer.get(timeout=SOON) == 2
        with pytest.raises(Superseded):
            old.get(timeout=SOON)
