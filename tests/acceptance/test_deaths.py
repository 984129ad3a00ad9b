"""Time limits, killed children and workers, and the three shutdowns: the key always goes on."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import celery
import psutil  # type: ignore[import-untyped,unused-ignore]
import pytest
from celery.exceptions import SoftTimeLimitExceeded, TimeLimitExceeded, WorkerLostError

from celery_coalesce.engine import engine_of
from celery_coalesce.errors import LeaseLost
from tests.support.app import HarnessApp, redeliver
from tests.support.journal import Journal, assert_no_overlap
from tests.support.process import wait_until
from tests.support.worker import WorkerProcess

MakeApp = Callable[..., HarnessApp]
MakeWorker = Callable[..., WorkerProcess]

SHORT = {"coalesce_lease": 2, "coalesce_redispatch_after": 2}
CELERY = tuple(int(part) for part in celery.__version__.split(".")[:2])


def follower(app: HarnessApp, journal: Journal, task: Any, value: Any, **kwargs: Any) -> Any:
    """Call with callbacks of its own, journalled under "link" and "error"."""
    return task.apply_async(
        (journal.key(), value),
        kwargs,
        link=app.tasks["collect"].s(key=journal.key("link")),
        link_error=app.tasks["on_error"].s(key=journal.key("error")),
    )


def assert_idle(app: HarnessApp, journal: Journal, task: str) -> None:
    """Fail unless a key's session drained once and left nothing."""
    journal.wait("coalesce_drain", key="key", timeout=20)
    assert len(journal.events("coalesce_drain", key="key")) == 1
    assert engine_of(app).transitions.show(task, journal.key()) is None


def no_beats_beside_another_run(journal: Journal) -> None:
    """Fail if the first run was still alive when the second started."""
    events = [each["event"] for each in journal.events() if each["event"] in ("beat", "start")]
    second = events.index("start", 1)
    assert "beat" in events[:second]
    assert "beat" not in events[second:]


class TestTimeLimits:
    def test_soft_limit_fails_the_run_and_the_next_starts(
        self, app: HarnessApp, worker: WorkerProcess, journal: Journal
    ) -> None:
        """An ordinary failure, told to all."""
        task = app.tasks["queue"]
        first = task.apply_async((journal.key(), 1), {"gate": "never"}, soft_time_limit=1)
        journal.wait("start", timeout=20)
        second = task.delay(journal.key(), 2)

        with pytest.raises(SoftTimeLimitExceeded):
            first.get(timeout=20)
        assert second.get(timeout=20) == 2
        assert_idle(app, journal, "queue")
        assert_no_overlap(journal.events())

    @pytest.mark.parametrize("name", ["beating", "deaf", "beating_late"])
    def test_hard_limit_ends_the_run_and_the_next_starts_when_it_is_dead(
        self, name: str, app: HarnessApp, worker: WorkerProcess, journal: Journal
    ) -> None:
        """The next run never meets the dying process, even one that is deaf to SIGTERM."""
        task = app.tasks[name]
        first = task.apply_async((journal.key(), 1), time_limit=1)
        journal.wait("beat", timeout=20)
        second = task.delay(journal.key(), 2)

        with pytest.raises(TimeLimitExceeded):
            first.get(timeout=20)
        assert second.get(timeout=20) == 2
        assert_idle(app, journal, name)
        no_beats_beside_another_run(journal)
        errors = journal.events("coalesce_error")
        assert [each["task_id"] for each in errors] == [first.id]

    def test_followers_of_a_run_out_of_time_fail_with_it(
        self, app: HarnessApp, worker: WorkerProcess, journal: Journal
    ) -> None:
        """Their errbacks fire once."""
        task = app.tasks["skip"]
        task.apply_async((journal.key(), 1), {"gate": "never"}, time_limit=1)
        journal.wait("start", timeout=20)
        joined = follower(app, journal, task, 2)

        with pytest.raises(TimeLimitExceeded):
            joined.get(timeout=20)
        assert journal.wait("on_error", timeout=20)["failed"] == joined.id
        journal.assert_never("start", within=0.5, key="link")
        assert len(journal.events("on_error")) == 1

    def test_follow_up_has_the_time_limits_of_its_own_call(
        self, app: HarnessApp, worker: WorkerProcess, journal: Journal
    ) -> None:
        """As given, not those of the run before."""
        task = app.tasks["queue"]
        task.apply_async((journal.key(), 1), {"gate": "a"}, time_limit=500)
        journal.wait("start", timeout=20)
        second = task.apply_async((journal.key(), 2), {"gate": "never"}, soft_time_limit=1)
        journal.open("a")

        with pytest.raises(SoftTimeLimitExceeded):
            second.get(timeout=20)


class TestKilledChild:
    def test_early_acknowledged_run_is_lost_and_the_key_goes_on(
        self, app: HarnessApp, worker: WorkerProcess, journal: Journal
    ) -> None:
        """`WorkerLostError`, as in Celery; the pending run is dispatched."""
        task = app.tasks["queue"]
        first = task.delay(journal.key(), 1, gate="never")
        pid = journal.wait("start", timeout=20)["pid"]
        second = follower(app, journal, task, 2)
        os.kill(pid, signal.SIGKILL)
        journal.record("gone", pid=pid)

        with pytest.raises(WorkerLostError):
            first.get(timeout=20)
        assert second.get(timeout=20) == 2
        journal.wait("end", key="link", timeout=20)
        assert_idle(app, journal, "queue")
        assert len(journal.events("start", key="key")) == 2
        assert_no_overlap(journal.events())

    def test_followers_of_a_killed_run_fail_with_it(
        self, app: HarnessApp, worker: WorkerProcess, journal: Journal
    ) -> None:
        """They had joined what is lost now."""
        task = app.tasks["skip"]
        task.delay(journal.key(), 1, gate="never")
        pid = journal.wait("start", timeout=20)["pid"]
        joined = follower(app, journal, task, 2)
        os.kill(pid, signal.SIGKILL)

        with pytest.raises(WorkerLostError):
            joined.get(timeout=20)
        assert journal.wait("on_error", timeout=20)["failed"] == joined.id
        assert_idle(app, journal, "skip")

    def test_rejecting_task_runs_again(self, app: HarnessApp, worker: WorkerProcess, journal: Journal) -> None:
        """`acks_late` with `reject_on_worker_lost`: the same run, before what waits behind it."""
        task = app.tasks["beating_rerun"]
        first = task.delay(journal.key(), 1)
        start = journal.wait("start", timeout=20)
        journal.wait("beat", timeout=20)
        second = task.delay(journal.key(), 2)
        os.kill(start["pid"], signal.SIGKILL)
        journal.record("gone", pid=start["pid"])

        assert first.get(timeout=20) == 1
        assert second.get(timeout=20) == 2
        assert_idle(app, journal, "beating_rerun")
        starts = journal.events("start")
        assert [each["task_id"] for each in starts] == [first.id, first.id, second.id]
        assert starts[0]["coalesce_run_id"] == starts[1]["coalesce_run_id"]
        assert starts[1]["coalesce_token"] > starts[0]["coalesce_token"]
        assert journal.events("coalesce_error") == []
        assert_no_overlap(journal.events())
        no_beats_beside_another_run(journal)

    def test_late_acknowledged_run_without_reject_is_lost(
        self, app: HarnessApp, worker: WorkerProcess, journal: Journal
    ) -> None:
        """`acks_late` alone does not run again when a child dies, as in Celery."""
        task = app.tasks["queue_late"]
        first = task.delay(journal.key(), 1, gate="never")
        pid = journal.wait("start", timeout=20)["pid"]
        second = task.delay(journal.key(), 2)
        os.kill(pid, signal.SIGKILL)
        journal.record("gone", pid=pid)

        with pytest.raises(WorkerLostError):
            first.get(timeout=20)
        assert second.get(timeout=20) == 2
        assert_no_overlap(journal.events())

    @pytest.mark.skipif(CELERY < (5, 7), reason="retry_on_worker_lost is new in Celery 5.7")
    def test_retry_on_worker_lost_is_the_runs_next_attempt(
        self, app: HarnessApp, worker: WorkerProcess, journal: Journal
    ) -> None:
        """The same run and id, counted as a retry, before what waits behind it."""
        task = app.tasks["lost_retry"]
        first = task.delay(journal.key(), 1, gate="a")
        pid = journal.wait("start", timeout=20)["pid"]
        second = task.delay(journal.key(), 2)
        os.kill(pid, signal.SIGKILL)
        journal.record("gone", pid=pid)
        again = journal.wait("start", count=2, timeout=20)
        journal.open("a")

        assert first.get(timeout=20) == 1
        assert second.get(timeout=20) == 2
        assert (again["task_id"], again["retries"]) == (first.id, 1)
        assert_idle(app, journal, "lost_retry")
        assert len({each["coalesce_run_id"] for each in journal.events("start")}) == 2
        assert_no_overlap(journal.events())

    @pytest.mark.skipif(CELERY < (5, 7), reason="retry_on_worker_lost is new in Celery 5.7")
    def test_retry_on_worker_lost_gives_up_after_max_retries(
        self, app: HarnessApp, worker: WorkerProcess, journal: Journal
    ) -> None:
        """Then it is `WorkerLostError`, and the key goes on."""
        task = app.tasks["lost_retry"]
        first = task.delay(journal.key(), 1, gate="never")
        for attempt in range(3):
            pid = journal.wait("start", count=attempt + 1, timeout=20)["pid"]
            os.kill(pid, signal.SIGKILL)

        with pytest.raises(WorkerLostError):
            first.get(timeout=20)
        assert_idle(app, journal, "lost_retry")
        assert len(journal.events("start")) == 3

    def test_child_that_exits_by_itself_is_lost(self, app: HarnessApp, worker: WorkerProcess, journal: Journal) -> None:
        """`os._exit` in the body, as a crash in C code would."""
        task = app.tasks["exiting"]
        first = task.delay(journal.key())
        journal.wait("start", timeout=20)

        with pytest.raises(WorkerLostError):
            first.get(timeout=20)
        assert_idle(app, journal, "exiting")

    def test_child_killed_by_sigterm_frees_its_key(
        self, app: HarnessApp, worker: WorkerProcess, journal: Journal
    ) -> None:
        """As the kernel or an operator may do; nobody asked Celery."""
        task = app.tasks["queue"]
        first = task.delay(journal.key(), 1, gate="never")
        pid = journal.wait("start", timeout=20)["pid"]
        second = task.delay(journal.key(), 2)
        os.kill(pid, signal.SIGTERM)

        assert second.get(timeout=20) == 2
        wait_until(first.ready, 20)
        assert_idle(app, journal, "queue")

    def test_memory_limit_of_the_pool_is_no_loss(
        self, make_app: MakeApp, make_worker: MakeWorker, journal: Journal
    ) -> None:
        """`worker_max_tasks_per_child`: a child that is replaced between runs loses nothing."""
        app = make_app(conf={"worker_max_tasks_per_child": 1})
        make_worker(app, concurrency=1)
        task = app.tasks["serialize"]
        results = [task.delay(journal.key(), n) for n in range(4)]

        assert [result.get(timeout=30) for result in results] == [0, 1, 2, 3]
        assert len({each["pid"] for each in journal.events("start")}) == 4


class TestKilledWorker:
    def test_early_acknowledged_run_is_lost_and_the_key_goes_on(
        self, make_app: MakeApp, make_worker: MakeWorker, journal: Journal
    ) -> None:
        """One lease later another worker stores `LeaseLost`, a `WorkerLostError`, and the pending run starts."""
        app = make_app(conf=SHORT)
        first_worker = make_worker(app)
        task = app.tasks["queue"]
        first = follower(app, journal, task, 1, gate="never")
        pid = journal.wait("start", timeout=20)["pid"]
        second = task.delay(journal.key(), 2)
        first_worker.kill()
        journal.record("gone", pid=pid)
        make_worker(app)

        with pytest.raises(LeaseLost):
            first.get(timeout=30)
        assert second.get(timeout=20) == 2
        assert journal.wait("on_error", timeout=20)["failed"] == first.id
        assert_idle(app, journal, "queue")
        assert_no_overlap(journal.events())

    @pytest.mark.parametrize("name", ["late_again", "beating_late"])
    def test_late_acknowledged_run_runs_again_once(
        self, name: str, make_app: MakeApp, make_worker: MakeWorker, journal: Journal
    ) -> None:
        """`acks_late`: the same run, once more, and once only when its old message comes back as well."""
        # Kept by the broker, so that it does.
        app = make_app(conf={**SHORT, "coalesce_broker_shortcuts": False})
        first_worker = make_worker(app)
        task = app.tasks[name]
        kwargs = {"gate": "never"} if name == "late_again" else {}
        first = follower(app, journal, task, 1, **kwargs)
        pid = journal.wait("start", timeout=20)["pid"]
        second = task.delay(journal.key(), 2)
        first_worker.kill()
        journal.record("gone", pid=pid)
        worker = make_worker(app)

        assert first.get(timeout=30) == 1
        assert second.get(timeout=20) == 2
        journal.wait("end", key="link", timeout=20)
        assert_idle(app, journal, name)
        redeliver(app)
        wait_until(lambda: "needs no run of its own" in worker.logs(), 20)
        journal.assert_never("start", within=0.3, coalesce_run_index=2)
        assert [each["task_id"] for each in journal.events("start", key="key")] == [
            first.id, first.id, second.id,
        ]  # fmt: skip
        assert len(journal.events("start", key="link")) == 1
        assert_no_overlap(journal.events())

    def test_reserved_messages_of_a_killed_worker_run_elsewhere(
        self, make_app: MakeApp, make_worker: MakeWorker, journal: Journal
    ) -> None:
        """What it had received and not started is dispatched again."""
        app = make_app(conf={"coalesce_lease": 2, "coalesce_redispatch_after": 5})
        first_worker = make_worker(app, concurrency=1)
        app.tasks["queue"].delay(journal.key("busy"), gate="never")
        journal.wait("start", key="busy", timeout=20)
        results = [app.tasks["queue"].delay(journal.key(str(n)), n) for n in range(3)]
        wait_until(lambda: first_worker.logs().count(" received") == 4, 4)
        first_worker.kill()
        make_worker(app)

        assert [result.get(timeout=30) for result in results] == [0, 1, 2]
        assert [len(journal.events("start", key=str(n))) for n in range(3)] == [1, 1, 1]

    def test_retry_in_backoff_survives_its_worker(
        self, make_app: MakeApp, make_worker: MakeWorker, journal: Journal
    ) -> None:
        """The next attempt comes from another worker."""
        app = make_app(conf=SHORT)
        first_worker = make_worker(app)
        result = app.tasks["queue_retry"].delay(journal.key(), countdown=2, value=1)
        journal.wait("end", retries=0, timeout=20)
        wait_until(lambda: "retrying" in str(engine_of(app).transitions.show("queue_retry", journal.key())), 5)
        first_worker.kill()
        make_worker(app)

        assert result.get(timeout=30) == 1
        assert [each["retries"] for each in journal.events("start")] == [0, 1]

    def test_session_that_died_drains_once(self, make_app: MakeApp, make_worker: MakeWorker, journal: Journal) -> None:
        """The last run's worker dies: its drain comes from the sweep."""
        app = make_app(conf=SHORT)
        first_worker = make_worker(app)
        app.tasks["queue"].delay(journal.key(), gate="never")
        journal.wait("start", timeout=20)
        first_worker.kill()
        make_worker(app)

        journal.wait("coalesce_drain", timeout=30)
        journal.assert_never("start", within=0.5, coalesce_run_index=1)
        assert len(journal.events("coalesce_drain")) == 1
        assert len(journal.events("coalesce_lost")) == 1


class TestShutdown:
    @pytest.mark.parametrize("name", ["queue", "queue_late"])
    def test_warm_shutdown_ends_the_run_and_leaves_the_next_to_others(
        self, name: str, make_app: MakeApp, make_worker: MakeWorker, journal: Journal
    ) -> None:
        """The running run finishes; its follow-up runs on the next worker; nothing is lost."""
        app = make_app(conf={"coalesce_lease": 2, "coalesce_redispatch_after": 30})
        old = make_worker(app)
        task = app.tasks[name]
        first = task.delay(journal.key(), 1, gate="a")
        journal.wait("start", timeout=20)
        second = follower(app, journal, task, 2)
        old.signal(signal.SIGTERM)
        wait_until(lambda: "Warm shutdown" in old.logs(), 10)
        journal.open("a")
        old.wait(20)

        assert first.get(timeout=5) == 1
        assert journal.events("start", key="key")[1:] == []
        make_worker(app)
        assert second.get(timeout=20) == 2
        journal.wait("end", key="link", timeout=20)
        assert_idle(app, journal, name)
        assert_no_overlap(journal.events())

    def test_lease_is_kept_while_a_warm_shutdown_waits(
        self, make_app: MakeApp, make_worker: MakeWorker, journal: Journal
    ) -> None:
        """A run that outlasts a lease in a worker that is shutting down is not taken for lost."""
        app = make_app(conf={"coalesce_lease": 1, "coalesce_redispatch_after": 30})
        old = make_worker(app)
        task = app.tasks["queue"]
        first = task.delay(journal.key(), 1, gate="a")
        journal.wait("start", timeout=20)
        make_worker(app)
        old.signal(signal.SIGTERM)
        wait_until(lambda: "Warm shutdown" in old.logs(), 10)
        second = task.delay(journal.key(), 2)
        journal.assert_never("coalesce_lost", within=2.5)
        journal.open("a")

        assert first.get(timeout=20) == 1
        assert second.get(timeout=20) == 2
        assert journal.wait("start", count=2)["hostname"] != old.hostname
        assert_no_overlap(journal.events())

    @pytest.mark.parametrize("name", ["queue", "late_again"])
    def test_cold_shutdown_does_as_celery_and_the_key_goes_on(
        self, name: str, make_app: MakeApp, make_worker: MakeWorker, journal: Journal
    ) -> None:
        """Early ack: the run is lost, and says so. Late ack: it runs again on the next worker."""
        app = make_app(conf=SHORT)
        old = make_worker(app)
        task = app.tasks[name]
        first = task.delay(journal.key(), 1, gate="never")
        pid = journal.wait("start", timeout=20)["pid"]
        second = task.delay(journal.key(), 2)
        old.signal(signal.SIGQUIT)
        old.wait(20)
        wait_until(lambda: not psutil.pid_exists(pid), 10)
        journal.record("gone", pid=pid)
        make_worker(app)

        assert second.get(timeout=30) == 2
        if name == "queue":
            with pytest.raises(WorkerLostError):
                first.get(timeout=20)
            assert len(journal.events("start")) == 2
        else:
            assert first.get(timeout=20) == 1
            assert [each["task_id"] for each in journal.events("start")] == [first.id, first.id, second.id]
        assert_idle(app, journal, name)
        assert_no_overlap(journal.events())

    @pytest.mark.parametrize("name", ["queue", "late_again"])
    def test_soft_shutdown_that_waits_in_vain(
        self, name: str, make_app: MakeApp, make_worker: MakeWorker, journal: Journal
    ) -> None:
        """`worker_soft_shutdown_timeout` passes, then the shutdown is cold."""
        app = make_app(conf={**SHORT, "worker_soft_shutdown_timeout": 1.0})
        old = make_worker(app)
        task = app.tasks[name]
        first = task.delay(journal.key(), 1, gate="never")
        pid = journal.wait("start", timeout=20)["pid"]
        second = task.delay(journal.key(), 2)
        old.signal(signal.SIGQUIT)
        old.wait(30)
        wait_until(lambda: not psutil.pid_exists(pid), 10)
        journal.record("gone", pid=pid)
        make_worker(app)

        assert second.get(timeout=30) == 2
        wait_until(first.ready, 20)
        assert first.successful() is (name == "late_again")
        assert_idle(app, journal, name)
        assert_no_overlap(journal.events())

    @pytest.mark.parametrize("name", ["queue", "late_again"])
    def test_soft_shutdown_within_which_the_run_ends(
        self, name: str, make_app: MakeApp, make_worker: MakeWorker, journal: Journal
    ) -> None:
        """It succeeds, once; its follow-up runs on the next worker."""
        app = make_app(conf={**SHORT, "worker_soft_shutdown_timeout": 10.0})
        old = make_worker(app)
        task = app.tasks[name]
        first = follower(app, journal, task, 1, gate="a")
        journal.wait("start", timeout=20)
        second = task.delay(journal.key(), 2)
        old.signal(signal.SIGQUIT)
        wait_until(lambda: "Soft Shutdown" in old.logs() or "soft shutdown" in old.logs(), 10)
        journal.open("a")
        old.wait(30)
        make_worker(app)

        assert first.get(timeout=20) == 1
        assert second.get(timeout=20) == 2
        journal.wait("end", key="link", timeout=20)
        assert_idle(app, journal, name)
        assert len(journal.events("start", key="link")) == 1
        assert_no_overlap(journal.events())
