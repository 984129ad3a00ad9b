"""What else happens to processes: stopped for a while, in part or whole, and asked to end by nobody that Celery knows.

Killed children and workers, time limits and shutdowns are in `test_deaths`, stopped workers in `test_stale_runs`.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import psutil  # type: ignore[import-untyped,unused-ignore]
import pytest
from celery import chord
from celery.exceptions import TimeLimitExceeded

from celery_coalesce.engine import engine_of
from celery_coalesce.errors import LeaseLost
from tests.support.app import HarnessApp
from tests.support.journal import Journal, assert_no_overlap
from tests.support.process import wait_until
from tests.support.worker import WorkerProcess

MakeApp = Callable[..., HarnessApp]
MakeWorker = Callable[..., WorkerProcess]

LEASE = 2


@pytest.fixture
def short(make_app: MakeApp) -> HarnessApp:
    """An app with short leases."""
    return make_app(conf={"coalesce_lease": LEASE, "coalesce_redispatch_after": 2})


def stop(pid: int) -> None:
    """Stop a process alone."""
    os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: psutil.Process(pid).status() == psutil.STATUS_STOPPED, 5)


def assert_idle(app: HarnessApp, journal: Journal, task: str) -> None:
    """Fail unless a key's session drained once and left nothing."""
    journal.wait("coalesce_drain", key="key", timeout=20)
    assert len(journal.events("coalesce_drain", key="key")) == 1
    assert engine_of(app).transitions.show(task, journal.key()) is None


class TestStoppedChild:
    @pytest.mark.parametrize("name", ["queue", "queue_rerun"])
    def test_key_waits_for_a_child_that_is_stopped_longer_than_a_lease(
        self, name: str, short: HarnessApp, make_worker: MakeWorker, journal: Journal
    ) -> None:
        """Its worker lives, and so does the lease: nobody else runs, and the run ends when its process goes on."""
        make_worker(short, concurrency=2)
        task = short.tasks[name]
        first = task.delay(journal.key(), 1, gate="a")
        start = journal.wait("start", timeout=20)
        second = task.delay(journal.key(), 2)
        stop(start["pid"])
        journal.open("a")
        journal.assert_never("start", within=LEASE + 1.5, coalesce_run_index=1)
        assert journal.events("coalesce_lost") == []
        os.kill(start["pid"], signal.SIGCONT)

        assert first.get(timeout=20) == 1
        assert second.get(timeout=20) == 2
        assert_idle(short, journal, name)
        assert_no_overlap(journal.events())

    @pytest.mark.parametrize("name", ["queue", "queue_late"])
    def test_hard_limit_ends_a_child_that_is_stopped(
        self, name: str, short: HarnessApp, make_worker: MakeWorker, journal: Journal
    ) -> None:
        """A limit is what keeps a stopped child from keeping its key."""
        make_worker(short, concurrency=2)
        task = short.tasks[name]
        first = task.apply_async((journal.key(), 1), {"gate": "never"}, time_limit=1)
        pid = journal.wait("start", timeout=20)["pid"]
        second = task.delay(journal.key(), 2)
        stop(pid)
        journal.record("gone", pid=pid)

        with pytest.raises(TimeLimitExceeded):
            first.get(timeout=20)
        assert second.get(timeout=20) == 2
        assert not psutil.pid_exists(pid)
        assert_idle(short, journal, name)
        assert_no_overlap(journal.events())


class TestStoppedParent:
    def test_child_of_a_parent_that_is_stopped_longer_than_a_lease_tells_nobody(
        self, short: HarnessApp, make_worker: MakeWorker, journal: Journal
    ) -> None:
        """No heartbeat, no lease: the body goes on, and can not end the run, call a link, or complete a follower."""
        workers = {worker.hostname: worker for worker in (make_worker(short), make_worker(short))}
        collect, skip = short.tasks["collect"], short.tasks["skip"]
        skip.apply_async((journal.key(), "stale"), {"gate": "a"}, link=collect.s(key=journal.key("link")))
        start = journal.wait("start", timeout=20)
        member = skip.si(journal.key(), "joined")
        body = chord([member])(collect.s(key=journal.key("body")))
        stale = workers[start["hostname"]]
        stale.signal(signal.SIGSTOP)
        journal.wait("coalesce_lost", timeout=20)
        journal.wait("coalesce_drain", key="key", timeout=20)
        wait_until(body.ready, 20)
        journal.open("a")
        journal.wait("end", key="key", run=start["run"], timeout=20)
        assert skip.delay(journal.key(), "next").get(timeout=20) == "next"
        stale.signal(signal.SIGCONT)

        journal.assert_never("start", within=1.0, key="link")
        assert journal.events("start", key="body") == []
        assert isinstance(short.AsyncResult(start["task_id"]).result, LeaseLost)
        assert body.failed()
        assert journal.events("coalesce_success", task_id=start["task_id"]) == []


class TestTerminatedChild:
    @pytest.mark.parametrize("name", ["queue_late", "queue_rerun"])
    def test_child_that_gets_sigterm_frees_its_key(
        self, name: str, short: HarnessApp, make_worker: MakeWorker, journal: Journal
    ) -> None:
        """As a child that is killed: lost with late ack, run again if it rejects on a lost worker."""
        make_worker(short, concurrency=2)
        task = short.tasks[name]
        first = task.delay(journal.key(), 1, gate="a")
        pid = journal.wait("start", timeout=20)["pid"]
        # Within the body, which tells of its end: at the gate.
        wait_until(lambda: any(each["cmd"] == "blpop" for each in journal.client.client_list()), 20)
        second = task.delay(journal.key(), 2)
        os.kill(pid, signal.SIGTERM)
        wait_until(lambda: not psutil.pid_exists(pid), 20)
        journal.open("a", 3)

        assert second.get(timeout=20) == 2
        wait_until(first.ready, 20)
        assert first.successful() is (name == "queue_rerun")
        assert len(journal.events("start")) == (3 if name == "queue_rerun" else 2)
        assert_idle(short, journal, name)
        assert_no_overlap(journal.events())
