"""`revoke`, `expires` and `purge`: the key goes on, and one caller's revoke is not another's loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from celery import chain, chord
from celery.exceptions import TaskRevokedError

from tests.support.app import HarnessApp
from tests.support.journal import Journal, assert_no_overlap
from tests.support.process import wait_until
from tests.support.worker import WorkerProcess

MakeApp = Callable[..., HarnessApp]
MakeWorker = Callable[..., WorkerProcess]


def revoke(app: HarnessApp, worker: WorkerProcess, task_id: str, **options: Any) -> None:
    """Revoke a task, and wait until the worker has heard of it."""
    to = {"destination": [worker.hostname], "reply": True, "timeout": 10, "limit": 1}
    reply = app.control.revoke(task_id, **to, **options)
    assert reply, "the worker has not answered"
    assert "ok" in reply[0][worker.hostname]


def assert_revoked(result: Any, timeout: float = 20) -> None:
    """Fail unless a result is that of a revoked task."""
    with pytest.raises(TaskRevokedError):
        result.get(timeout=timeout)
    assert result.state == "REVOKED"


Busy = tuple[HarnessApp, WorkerProcess]


class TestRevokeQueued:
    def test_queued_run_ends_revoked_and_the_key_goes_on(self, busy: Busy, journal: Journal) -> None:
        """A dispatched run that nobody joined is revoked; a later call runs."""
        app, worker = busy
        first = app.tasks["serialize"].delay(journal.key(), 1)
        second = app.tasks["serialize"].delay(journal.key(), 2)
        revoke(app, worker, first.id)
        journal.open("busy")

        assert_revoked(first)
        assert second.get(timeout=20) == 2
        journal.wait("coalesce_drain", key="key", timeout=20)
        assert [each["args"][1] for each in journal.events("start", key="key")] == [2]
        assert "revoked" in journal.wait("coalesce_skip", key="key")["outcome"]

    def test_joined_callers_are_carried_over(self, busy: Busy, journal: Journal) -> None:
        """The revoked id stays REVOKED; followers complete with a new run that has the merged arguments."""
        app, worker = busy
        task = app.tasks["queue"]
        own = task.apply_async((journal.key(), 1), link=app.tasks["collect"].s(key=journal.key("own")))
        joined = task.apply_async((journal.key(), 2), link=app.tasks["collect"].s(key=journal.key("link")))
        named = task.apply_async((journal.key(), 3), task_id=f"{journal.name}-named")
        assert (joined.coalesced, named.coalesced) == (True, True)
        revoke(app, worker, own.id)
        journal.open("busy")

        assert joined.get(timeout=20) == named.get(timeout=20) == 3
        assert_revoked(own)
        journal.wait("end", key="link", timeout=20)
        journal.wait("coalesce_drain", key="key", timeout=20)
        (start,) = journal.events("start", key="key")
        assert start["task_id"] not in (own.id, joined.id, named.id)
        assert start["args"][1] == 3
        assert journal.events("start", key="own") == []
        assert own.state == "REVOKED"

    def test_carried_over_chord_members_count(self, busy: Busy, journal: Journal) -> None:
        """A chord whose members had joined a revoked run fires."""
        app, worker = busy
        task = app.tasks["queue"]
        own = task.delay(journal.key(), 1)
        result = chord([task.s(journal.key(), 2), task.s(journal.key(), 3)])(
            app.tasks["collect"].s(key=journal.key("body"))
        )
        revoke(app, worker, own.id)
        journal.open("busy")

        assert result.get(timeout=20) == [3, 3]

    def test_carried_over_run_keeps_its_place(self, busy: Busy, journal: Journal) -> None:
        """What is carried over is not overtaken by what was queued after it."""
        app, worker = busy
        task = app.tasks["queue"]
        own = task.delay(journal.key(), 1)
        joined = task.apply_async((journal.key(), 2), task_id=f"{journal.name}-f")
        behind = task.apply_async((journal.key(), 3), coalesce_max_queued=2)
        assert behind.disposition == "queued"
        revoke(app, worker, own.id)
        journal.open("busy")

        assert behind.get(timeout=20) == 3
        assert joined.get(timeout=20) == 2
        journal.wait("coalesce_drain", key="key", timeout=20)
        assert [each["args"][1] for each in journal.events("start", key="key")] == [2, 3]
        assert_no_overlap(journal.events())

    def test_revoked_chain_head_ends_the_chain(self, busy: Busy, journal: Journal) -> None:
        """As in Celery, the steps after a revoked one never run; a joined chain does."""
        app, worker = busy
        task, collect = app.tasks["queue"], app.tasks["collect"]
        chains = [chain(task.si(journal.key(), n), collect.s(key=journal.key(f"c{n}"))).apply_async() for n in range(2)]
        revoke(app, worker, chains[0].parent.id)
        journal.open("busy")

        assert chains[1].get(timeout=20) == 1
        journal.wait("coalesce_drain", key="key", timeout=20)
        journal.assert_never("start", within=0.3, key="c0")

    def test_revoking_a_followers_id_touches_nobody_else(self, busy: Busy, journal: Journal) -> None:
        """A follower has no message: the run that covers it goes on for the others."""
        app, worker = busy
        task = app.tasks["queue"]
        own = task.delay(journal.key(), 1)
        revoked = task.apply_async((journal.key(), 2), task_id=f"{journal.name}-r")
        joined = task.apply_async((journal.key(), 3), task_id=f"{journal.name}-f")
        revoke(app, worker, revoked.id)
        journal.open("busy")

        assert own.get(timeout=20) == 3
        assert joined.get(timeout=20) == 3
        assert revoked.ready()

    def test_revoke_by_stamp(self, busy: Busy, journal: Journal) -> None:
        """A run is revoked by its stamp, and its key goes on."""
        app, worker = busy
        task = app.tasks["serialize"]
        sig = task.s(journal.key(), 1)
        sig.stamp(visitor=None, customer="7")
        first = sig.apply_async()
        second = task.delay(journal.key(), 2)
        reply = app.control.revoke_by_stamped_headers(
            {"customer": "7"}, destination=[worker.hostname], reply=True, timeout=10
        )
        assert reply
        journal.open("busy")

        assert_revoked(first)
        assert second.get(timeout=20) == 2


class TestRevokePending:
    def test_pending_run_is_revoked_when_its_turn_comes(
        self, app: HarnessApp, worker: WorkerProcess, journal: Journal
    ) -> None:
        """The running run goes on; the pending one ends revoked; the next call runs."""
        task = app.tasks["serialize"]
        running = task.delay(journal.key(), 1, gate="a")
        journal.wait("start")
        pending, after = task.delay(journal.key(), 2), task.delay(journal.key(), 3)
        revoke(app, worker, pending.id, terminate=True)
        journal.assert_never("end", within=0.3)
        journal.open("a")

        assert running.get(timeout=20) == 1
        assert_revoked(pending)
        assert after.get(timeout=20) == 3
        journal.wait("coalesce_drain", timeout=20)
        assert [each["args"][1] for each in journal.events("start")] == [1, 3]

    def test_joined_callers_of_a_pending_run_are_carried_over(
        self, app: HarnessApp, worker: WorkerProcess, journal: Journal
    ) -> None:
        """As for a queued one."""
        task = app.tasks["queue"]
        running = task.delay(journal.key(), 1, gate="a")
        journal.wait("start")
        pending = task.delay(journal.key(), 2)
        joined = task.apply_async((journal.key(), 3), task_id=f"{journal.name}-f")
        revoke(app, worker, pending.id)
        journal.open("a")

        assert running.get(timeout=20) == 1
        assert joined.get(timeout=20) == 3
        assert_revoked(pending)
        journal.wait("coalesce_drain", timeout=20)

    def test_waiting_retry_is_revoked(self, app: HarnessApp, worker: WorkerProcess, journal: Journal) -> None:
        """A run that waits for its retry ends revoked, with its followers; the key goes on."""
        task = app.tasks["queue_retry"]
        retried = task.delay(journal.key(), times=1, countdown=1)
        journal.wait("end", retries=0, timeout=20)
        waiting = task.delay(journal.key(), times=0, value=2)
        revoke(app, worker, retried.id)

        assert_revoked(retried)
        assert waiting.get(timeout=20) == 2
        journal.wait("coalesce_drain", timeout=20)


class TestRevokeRunning:
    @pytest.mark.parametrize("name", ["queue", "queue_late", "queue_rerun"])
    def test_terminated_run_ends_revoked_and_the_next_starts(
        self, name: str, app: HarnessApp, worker: WorkerProcess, journal: Journal
    ) -> None:
        """`revoke(terminate=True)` of the running run: revoked, followers too, and the follow-up runs."""
        task = app.tasks[name]
        running = task.delay(journal.key(), 1, gate="never")
        start = journal.wait("start", timeout=20)
        follow_up = task.delay(journal.key(), 2)
        revoke(app, worker, running.id, terminate=True)

        assert follow_up.get(timeout=30) == 2
        assert_revoked(running)
        journal.wait("coalesce_drain", timeout=20)
        second = journal.wait("start", count=2)
        assert second["task_id"] == follow_up.id
        assert start["coalesce_session_id"] == second["coalesce_session_id"]
        assert len(journal.events("start")) == 2

    def test_terminated_runs_never_overlap_with_the_next(
        self, app: HarnessApp, worker: WorkerProcess, journal: Journal
    ) -> None:
        """The next run starts only once the terminated process is gone."""
        task = app.tasks["beating"]
        running = task.delay(journal.key())
        journal.wait("beat", timeout=20)
        follow_up = task.delay(journal.key(), 2)
        revoke(app, worker, running.id, terminate=True)

        assert follow_up.get(timeout=30) == 2
        events = [each["event"] for each in journal.events() if each["event"] in ("beat", "start")]
        assert "beat" not in events[events.index("start", 1) :]

    def test_followers_of_a_terminated_run_are_revoked(
        self, app: HarnessApp, worker: WorkerProcess, journal: Journal
    ) -> None:
        """They had joined what is now revoked, and it had begun."""
        task = app.tasks["skip"]
        running = task.delay(journal.key(), 1, gate="never")
        journal.wait("start", timeout=20)
        joined = task.apply_async((journal.key(), 2), task_id=f"{journal.name}-f")
        revoke(app, worker, running.id, terminate=True, signal="SIGKILL")

        assert_revoked(running)
        assert_revoked(joined)
        journal.wait("coalesce_drain", timeout=20)

    def test_revoke_without_terminate_lets_a_running_run_go_on(
        self, app: HarnessApp, worker: WorkerProcess, journal: Journal
    ) -> None:
        """As in Celery."""
        running = app.tasks["queue"].delay(journal.key(), 1, gate="a")
        journal.wait("start", timeout=20)
        revoke(app, worker, running.id)
        journal.open("a")

        assert running.get(timeout=20) == 1
        journal.wait("coalesce_drain", timeout=20)


class TestExpires:
    def test_expired_run_is_revoked_and_the_key_goes_on(self, busy: Busy, journal: Journal) -> None:
        """A queued run that is too late ends `expired`; what waits behind it runs."""
        app, _ = busy
        task = app.tasks["serialize"]
        late = task.apply_async((journal.key(), 1), expires=0.5)
        after = task.delay(journal.key(), 2)
        journal.assert_never("start", within=0.6, key="key")
        journal.open("busy")

        assert_revoked(late)
        assert after.get(timeout=20) == 2
        assert "expired" in journal.wait("coalesce_skip", key="key")["outcome"]
        journal.wait("coalesce_drain", key="key", timeout=20)
        assert [each["args"][1] for each in journal.events("start", key="key")] == [2]

    def test_expired_pending_run_never_starts(self, app: HarnessApp, worker: WorkerProcess, journal: Journal) -> None:
        """A pending run that is too late ends `expired`, with its followers."""
        task = app.tasks["queue"]
        task.delay(journal.key(), 1, gate="a")
        journal.wait("start")
        pending = task.apply_async((journal.key(), 2), expires=0.3)
        joined = task.apply_async((journal.key(), 3), expires=0.3, task_id=f"{journal.name}-f")
        journal.assert_never("end", within=0.5)
        journal.open("a")

        assert_revoked(pending)
        assert_revoked(joined)
        journal.wait("coalesce_drain", timeout=20)
        assert len(journal.events("start")) == 1

    def test_run_expires_only_when_all_its_triggers_have(
        self, app: HarnessApp, worker: WorkerProcess, journal: Journal
    ) -> None:
        """One that never expires keeps the run alive for all."""
        task = app.tasks["queue"]
        task.delay(journal.key(), 1, gate="a")
        journal.wait("start")
        pending = task.apply_async((journal.key(), 2), expires=0.3)
        task.delay(journal.key(), 3)
        journal.assert_never("end", within=0.5)
        journal.open("a")

        assert pending.get(timeout=20) == 3

    def test_run_that_is_in_time_runs(self, app: HarnessApp, worker: WorkerProcess, journal: Journal) -> None:
        """And its body is told when it would have expired."""
        result = app.tasks["tell"].apply_async((journal.key(),), expires=60)

        assert result.get(timeout=20) == {"told": result.id}
        assert journal.wait("tell")["expires"]

    def test_task_option_expires_counts_as_the_calls(
        self, app: HarnessApp, worker: WorkerProcess, journal: Journal
    ) -> None:
        """`expires` of the task itself."""
        app.tasks["tell_options"].delay(journal.key())
        assert journal.wait("tell", timeout=20)["expires"]

    def test_long_countdown_that_expires_first(self, app: HarnessApp, worker: WorkerProcess, journal: Journal) -> None:
        """A run that is worthless before it is due ends `expired` when it would be due."""
        result = app.tasks["queue"].apply_async((journal.key(), 1), countdown=0.6, expires=0.2)

        assert_revoked(result)
        journal.wait("coalesce_drain", timeout=20)
        assert journal.events("start") == []


class TestPurge:
    def test_purged_runs_are_dispatched_again(
        self, make_app: MakeApp, make_worker: MakeWorker, journal: Journal
    ) -> None:
        """Nobody is told of a purge: the runs come back, with everything that joined them."""
        app = make_app(conf={"coalesce_lease": 2, "coalesce_redispatch_after": 1})
        task = app.tasks["queue"]
        own = task.delay(journal.key(), 1)
        joined = task.apply_async((journal.key(), 2), link=app.tasks["collect"].s(key=journal.key("link")))
        assert app.control.purge() == 1
        make_worker(app)

        assert own.get(timeout=20) == joined.get(timeout=20) == 2
        journal.wait("end", key="link", timeout=20)
        journal.wait("coalesce_drain", key="key", timeout=20)
        assert len(journal.events("start", key="key")) == 1

    def test_purge_that_was_undone_by_a_late_copy_runs_once(
        self, make_app: MakeApp, make_worker: MakeWorker, journal: Journal
    ) -> None:
        """A message that was only slow, and the one dispatched in its place, make one run."""
        app = make_app(conf={"coalesce_lease": 2, "coalesce_redispatch_after": 1})
        worker = make_worker(app, queues=["elsewhere"])
        result = app.tasks["queue"].delay(journal.key(), 1)
        wait_until(lambda: "published again" in worker.logs(), 20)

        reply = app.control.add_consumer("celery", destination=[worker.hostname], reply=True, timeout=10)
        assert reply

        assert result.get(timeout=20) == 1
        journal.wait("coalesce_drain", timeout=20)
        wait_until(lambda: "needs no run of its own" in worker.logs(), 20)
        assert len(journal.events("start")) == 1


def test_revoked_and_expired_runs_leave_nothing_behind(busy: Busy, journal: Journal) -> None:
    """Nothing of an idle key is left in Redis."""
    app, worker = busy
    task = app.tasks["queue"]
    own = task.delay(journal.key(), 1)
    task.apply_async((journal.key(), 2), task_id=f"{journal.name}-f")
    revoke(app, worker, own.id)
    task.apply_async((journal.key("other"), 1), expires=0.1)
    journal.assert_never("start", within=0.2, key="other")
    journal.open("busy")
    journal.wait("coalesce_drain", key="key", timeout=20)
    journal.wait("coalesce_drain", key="other", timeout=20)

    from celery_coalesce.engine import engine_of

    coalescer = engine_of(app).transitions
    assert coalescer.show("queue", journal.key()) is None
    assert coalescer.show("queue", journal.key("other")) is None
    assert_no_overlap(journal.events())
