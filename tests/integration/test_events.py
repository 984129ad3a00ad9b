"""What can be watched of a key: the signals, and the same events on Celery's event bus."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psutil  # type: ignore[import-untyped,unused-ignore]
import pytest
import redis
from celery.exceptions import TaskRevokedError, WorkerLostError

from celery_coalesce import signals
from celery_coalesce.errors import QueueFull
from celery_coalesce.states import Outcome
from tests.integration import watched
from tests.support.app import HarnessApp
from tests.support.app import make_app as _make_app
from tests.support.events import Monitor
from tests.support.journal import Event, Journal
from tests.support.process import wait_until
from tests.support.servers import ValkeyServer
from tests.support.worker import WorkerProcess

MakeApp = Callable[..., HarnessApp]
MakeWorker = Callable[..., WorkerProcess]

LEASE = 2  # seconds
CONF = {"coalesce_lease": LEASE}
INCLUDE = ("tests.integration.watched",)

#: The fields of every run's metadata.
FIELDS = {
    "key", "scope", "type", "name", "task_id", "state_id", "session_id", "run_id", "run_index", "attempt", "token",
    "triggers", "labels", "is_rerun",
}  # fmt: skip

TRIGGER_FIELDS = {"disposition", "run_task_id", "run_state"}

LIFE = ("coalesce_start", "coalesce_success", "coalesce_error", "coalesce_skip", "coalesce_lost", "coalesce_drain")


@pytest.fixture(scope="module")
def app(state_server: ValkeyServer, journal_server: ValkeyServer) -> Iterator[HarnessApp]:
    """The app of the module's worker: short leases, and tasks of its own."""
    url = state_server.new_db()
    with _make_app(url, url, CONF) as app:
        watched.define(app)
        yield app


@pytest.fixture(scope="module")
def worker(app: HarnessApp) -> Iterator[WorkerProcess]:
    """A prefork worker whose receivers misbehave where a key asks for it."""
    with WorkerProcess.serving(app, concurrency=3, include=INCLUDE) as worker:
        yield worker


@pytest.fixture
def make_watched(make_app: MakeApp) -> MakeApp:
    """Make an app of the test's own with the module's tasks."""

    def make(**conf: Any) -> HarnessApp:
        app = make_app(conf=CONF | conf)
        watched.define(app)
        return app

    return make


@contextmanager
def triggers_seen() -> Iterator[list[dict[str, Any]]]:
    """Collect what `coalesce_trigger` reports in this process."""
    seen: list[dict[str, Any]] = []

    def receive(signal: Any = None, **given: Any) -> None:
        seen.append(given)

    signals.coalesce_trigger.connect(receive, weak=False)
    try:
        yield seen
    finally:
        signals.coalesce_trigger.disconnect(receive)


def life(journal: Journal, key: str = "key") -> list[Event]:
    """Return the signals of a key's runs, in their order."""
    return [event for event in journal.events() if event["event"] in LIFE and event["key"] == key]


def order(journal: Journal, key: str = "key") -> list[str]:
    """Return the names of a key's signals, in their order."""
    return [event["event"].removeprefix("coalesce_") for event in life(journal, key)]


def messages(app: HarnessApp, queue: str) -> int:
    """Return how many messages wait in a queue of a Redis broker."""
    with redis.Redis.from_url(app.conf.broker_url) as client:
        return int(client.llen(queue))


def drains_left(app: HarnessApp) -> int:
    """Return how many recorded drains nobody has announced."""
    with redis.Redis.from_url(app.conf.broker_url) as client:
        return int(client.zcard("{coalesce}:drains"))


def metadata(event: Event) -> dict[str, Any]:
    """Return the metadata of a signal as the journal has it, or of an event of the bus."""
    found = {name: event[name] for name in FIELDS | TRIGGER_FIELDS if name in event}
    if "timestamp" in event:  # an event of the bus has a type of its own
        del found["type"]
        if "key_type" in event:
            found["type"] = event["key_type"]
    found["key"] = found["key"].rpartition(":")[2]
    return found


class TestMetadata:
    def test_is_equal_in_all_events_of_a_run(self, app: HarnessApp, worker: WorkerProcess, journal: Journal) -> None:
        """Start, body, success and drain tell the same of one run, and every field of it."""
        result = app.tasks["queue"].delay(journal.key(), 1)
        journal.wait("coalesce_drain")

        events = life(journal)
        body = journal.wait("start")
        told = {name: body[f"coalesce_{name}"] for name in FIELDS}
        assert [metadata(event) for event in events] == [{**told, "key": "key"}] * 3
        assert order(journal) == ["start", "success", "drain"]
        first = metadata(events[0])
        assert set(first) == FIELDS
        assert first["run_id"] == result.run_id
        assert first["task_id"] == result.id
        assert (first["name"], first["scope"], first["type"]) == ("queue", "queue", "key")
        assert (first["run_index"], first["attempt"], first["triggers"]) == (0, 0, 1)
        assert first["is_rerun"] is False
        assert events[1]["result"] == "1"

    def test_of_a_follow_up_belongs_to_the_same_session(
        self, app: HarnessApp, worker: WorkerProcess, journal: Journal
    ) -> None:
        """The follow-up has a run, a token and a count of its own, in the session and state of the first."""
        queue = app.tasks["queue"]
        queue.delay(journal.key(), 0, gate="g")
        journal.wait("start")
        for value in (1, 2, 3):
            queue.delay(journal.key(), value)
        journal.open("g")
        journal.wait("coalesce_drain")

        assert order(journal) == ["start", "success", "start", "success", "drain"]
        events = [metadata(event) for event in life(journal)]
        first, second = events[0], events[2]
        assert events == [first, first, second, second, second]
        assert (second["run_index"], second["is_rerun"], second["triggers"]) == (1, True, 3)
        for same in ("session_id", "state_id", "scope", "name"):
            assert first[same] == second[same]
        for grows in ("run_id", "token"):
            assert first[grows] < second[grows]
        assert first["task_id"] != second["task_id"]

        queue.delay(journal.key())
        third = metadata(journal.wait("coalesce_drain", count=2))
        assert third["state_id"] == first["state_id"]
        assert third["session_id"] > second["session_id"]
        assert third["run_index"] == 0

    def test_of_a_task_without_a_key_is_of_type_task(
        self, app: HarnessApp, worker: WorkerProcess, journal: Journal
    ) -> None:
        """The whole task is one key, named as the task."""
        result = app.tasks["whole"].delay(journal.key())
        body = journal.wait("start")
        assert (body["coalesce_type"], body["coalesce_key"], body["coalesce_scope"]) == ("task", "whole", "whole")
        result.get(timeout=10)

    def test_of_a_retried_run_is_that_of_one_run(
        self, app: HarnessApp, worker: WorkerProcess, journal: Journal
    ) -> None:
        """Each attempt starts, under a token that grows; the run ends once, and a retry is no error."""
        app.tasks["queue_retry"].delay(journal.key(), 2)
        journal.wait("coalesce_drain")

        assert order(journal) == ["start", "start", "start", "success", "drain"]
        events = [metadata(event) for event in life(journal)]
        assert len({(event["run_id"], event["task_id"], event["run_index"]) for event in events}) == 1
        assert [event["attempt"] for event in events] == [0, 1, 2, 2, 2]
        assert events[0]["token"] < events[1]["token"] < events[2]["token"] == events[3]["token"]


class TestErrors:
    def test_error_is_followed_by_the_next_run(self, app: HarnessApp, worker: WorkerProcess, journal: Journal) -> None:
        """A failure is told with its exception, is loud, and its session goes on."""
        queue = app.tasks["queue"]
        failing = queue.delay(journal.key(), gate="g", error="broken")
        journal.wait("start")
        queue.delay(journal.key())
        journal.open("g")
        journal.wait("coalesce_drain")

        assert order(journal) == ["start", "error", "start", "success", "drain"]
        assert life(journal)[1]["exception"] == "RuntimeError('broken')"
        with pytest.raises(RuntimeError, match="broken"):
            failing.get(timeout=10)

    def test_hard_time_limit_is_one_error(self, app: HarnessApp, worker: WorkerProcess, journal: Journal) -> None:
        """Celery reports it twice, from a process that is being killed; it is told once."""
        app.tasks["queue"].apply_async((journal.key(),), {"gate": "never"}, time_limit=1)
        app.tasks["other"].apply_async((journal.key("other"),), {"gate": "never"}, time_limit=1)
        journal.wait("coalesce_drain", key="key")
        journal.wait("coalesce_drain", key="other")
        app.tasks["queue"].delay(journal.key())
        journal.wait("coalesce_drain", count=2, key="key")

        assert order(journal) == ["start", "error", "drain", "start", "success", "drain"]
        assert order(journal, "other") == ["start", "error", "drain"]
        assert "TimeLimitExceeded" in life(journal)[1]["exception"]
        assert metadata(life(journal)[1]) == metadata(life(journal)[0])

    def test_killed_child_is_an_error(self, app: HarnessApp, worker: WorkerProcess, journal: Journal) -> None:
        """The parent tells of the child that can not, and the follow-up runs."""
        queue = app.tasks["queue"]
        result = queue.delay(journal.key(), gate="never")
        pid = journal.wait("start")["pid"]
        queue.delay(journal.key())
        os.kill(pid, signal.SIGKILL)
        journal.wait("coalesce_drain")

        assert order(journal) == ["start", "error", "start", "success", "drain"]
        assert "WorkerLostError" in life(journal)[1]["exception"]
        assert metadata(life(journal)[1]) == metadata(life(journal)[0])
        with pytest.raises(WorkerLostError):
            result.get(timeout=10)

    @pytest.mark.parametrize("task", ["rerun_if_lost", "retried_if_lost"])
    def test_killed_child_is_no_error_where_celery_runs_it_again(
        self, task: str, app: HarnessApp, worker: WorkerProcess, journal: Journal
    ) -> None:
        """Redelivered or retried, the run starts once more, and has one end."""
        app.tasks[task].delay(journal.key(), gate="g")
        first = journal.wait("start")
        os.kill(first["pid"], signal.SIGKILL)
        second = journal.wait("start", count=2)
        journal.open("g", 2)
        journal.wait("coalesce_drain")

        assert order(journal) == ["start", "start", "success", "drain"]
        assert first["coalesce_run_id"] == second["coalesce_run_id"]

    @pytest.mark.parametrize(("task", "given"), [("watched_rejecting", {"requeue": False}), ("retried_by_hand", {})])
    def test_end_that_celery_does_not_call_a_failure_is_an_error(
        self, task: str, given: dict[str, Any], app: HarnessApp, worker: WorkerProcess, journal: Journal
    ) -> None:
        """A rejected run, and one whose retry nobody has sent, have failed: told once."""
        app.tasks[task].apply_async((journal.key(),), given)
        journal.wait("coalesce_drain")
        app.tasks[task].apply_async((journal.key("after"),), given)
        journal.wait("coalesce_drain", key="after")
        assert order(journal) == ["start", "error", "drain"]

    def test_requeued_run_starts_again(self, app: HarnessApp, worker: WorkerProcess, journal: Journal) -> None:
        """`Reject(requeue=True)` ends nothing."""
        app.tasks["watched_rejecting"].delay(journal.key(), requeue=True)
        journal.wait("coalesce_drain")
        assert order(journal) == ["start", "start", "success", "drain"]

    def test_exception_that_can_not_be_printed_is_still_told(
        self, app: HarnessApp, worker: WorkerProcess, journal: Journal
    ) -> None:
        """Whatever the application's error does when it is shown."""
        with Monitor(app) as monitor:
            app.tasks["unprintable"].delay(journal.key())
            monitor.wait("coalesce-drain")
            kinds = [event["type"] for event in monitor.events("coalesce-", key=journal.key())]
        assert kinds == ["coalesce-start", "coalesce-error", "coalesce-drain"]


class TestTriggers:
    def test_trigger_tells_disposition_run_and_unused_arguments(
        self, app: HarnessApp, worker: WorkerProcess, journal: Journal
    ) -> None:
        """In the producer, each call tells what became of it and what arguments no run will see."""
        key = journal.key()
        with triggers_seen() as seen:
            queue = app.tasks["queue"]
            running = queue.delay(key, 0, gate="g")
            journal.wait("start")
            pending = queue.delay(key, 1)
            queue.delay(key, value=2)

        metas = [each["meta"] for each in seen]
        assert [str(meta.disposition) for meta in metas] == ["dispatched", "queued", "coalesced"]
        assert [str(meta.run_state) for meta in metas] == ["dispatched", "pending", "pending"]
        assert [each["unused"] for each in seen] == [None, None, ([key, 1], {})]
        assert {each["sender"].name for each in seen} == {"queue"}
        assert [meta.run_id for meta in metas] == [running.run_id, pending.run_id, pending.run_id]
        assert [meta.run_task_id for meta in metas] == [running.id, pending.id, pending.id]
        assert {meta.key for meta in metas} == {key}
        journal.open("g")
        journal.wait("coalesce_drain")
        assert {meta.state_id for meta in metas} == {life(journal)[0]["state_id"]}

    @pytest.mark.parametrize(
        ("task", "disposition"), [("skip", "skipped"), ("first", "coalesced"), ("reject", "rejected")]
    )
    def test_arguments_of_the_later_call_are_unused(
        self, task: str, disposition: str, app: HarnessApp, worker: WorkerProcess, journal: Journal
    ) -> None:
        """A call that another run answers, joins as it is, or refuses has arguments that nobody sees."""
        called = app.tasks[task]
        called.delay(journal.key(), 0, gate="g")
        journal.wait("start")
        if task != "skip":
            called.delay(journal.key(), 1)
        with triggers_seen() as seen:
            try:
                called.delay(journal.key(), value=2)
            except QueueFull:
                assert task == "reject"
        journal.open("g")
        journal.wait("coalesce_drain")

        (told,) = seen
        assert told["meta"].disposition == disposition
        assert tuple(map(list, told["unused"][0:1])) == ([journal.key()],)
        assert told["unused"][1] == {"value": 2}

    def test_message_without_a_run_is_a_trigger_in_the_worker(
        self, app: HarnessApp, worker: WorkerProcess, journal: Journal
    ) -> None:
        """`send_task` knows nothing of keys: the gate tells, once for every message."""
        with triggers_seen() as seen:
            for value in range(3):
                app.send_task("queue", (journal.key(), value), {"gate": "g"})
                journal.wait("coalesce_trigger", count=value + 1)
        journal.open("g", 2)
        journal.wait("coalesce_drain")

        assert seen == []
        told = [event["disposition"] for event in journal.events("coalesce_trigger")]
        assert told == ["dispatched", "queued", "coalesced"]
        assert order(journal) == ["start", "success", "start", "success", "drain"]


class TestSkips:
    def test_bare_ignore_is_a_skip(self, app: HarnessApp, worker: WorkerProcess, journal: Journal) -> None:
        """A run that did nothing has started, and is told to have been skipped."""
        app.tasks["watched_ignoring"].delay(journal.key())
        journal.wait("coalesce_drain")

        assert order(journal) == ["start", "skip", "drain"]
        assert life(journal)[1]["outcome"] == repr(Outcome.SKIPPED)
        assert metadata(life(journal)[0]) == metadata(life(journal)[1])

    def test_revoked_before_its_start_is_a_skip(self, app: HarnessApp, worker: WorkerProcess, journal: Journal) -> None:
        """A pending run that is revoked never starts; the session drains after it."""
        queue = app.tasks["queue"]
        queue.delay(journal.key(), gate="g")
        journal.wait("start")
        pending = queue.delay(journal.key())
        app.control.revoke(pending.id, reply=True, timeout=5, limit=1)
        journal.open("g")
        journal.wait("coalesce_drain")

        assert order(journal) == ["start", "success", "skip", "drain"]
        skip = life(journal)[2]
        assert (skip["outcome"], skip["run_id"]) == (repr(Outcome.REVOKED), pending.run_id)
        with pytest.raises(TaskRevokedError):
            pending.get(timeout=10)

    def test_expired_before_its_start_is_a_skip(self, app: HarnessApp, worker: WorkerProcess, journal: Journal) -> None:
        """A pending run that expires never starts."""
        queue = app.tasks["queue"]
        queue.delay(journal.key(), gate="g")
        journal.wait("start")
        pending = queue.apply_async((journal.key(),), expires=0.05)
        journal.assert_never("start", within=0.1, task_id=pending.id)
        journal.open("g")
        journal.wait("coalesce_drain")

        assert order(journal) == ["start", "success", "skip", "drain"]
        assert life(journal)[2]["outcome"] == repr(Outcome.EXPIRED)

    def test_terminated_run_is_a_skip(self, app: HarnessApp, worker: WorkerProcess, journal: Journal) -> None:
        """A run that is revoked while it runs has one end, `revoked`, and its session drains."""
        result = app.tasks["queue"].delay(journal.key(), gate="never")
        journal.wait("start")
        result.revoke(terminate=True)
        journal.wait("coalesce_drain")

        assert order(journal) == ["start", "skip", "drain"]
        assert life(journal)[1]["outcome"] == repr(Outcome.REVOKED)

    @pytest.mark.parametrize("followers", [0, 1])
    def test_replaced_by_another_kind_of_task_is_no_skip(
        self, followers: int, app: HarnessApp, worker: WorkerProcess, journal: Journal
    ) -> None:
        """Whether or not others had joined, a replaced run is told of in the same way."""
        task = app.tasks["replaced"]
        task.delay(journal.key(), "work", gate="g")
        journal.wait("start", task="replaced")
        for n in range(followers + 1):
            task.apply_async((journal.key(), "work"), {"gate": "g"}, task_id=f"{journal.name}-{n}")
        journal.open("g", 2)
        journal.wait("coalesce_drain")
        journal.wait("end", count=2, task="work")

        assert order(journal) == ["start", "start", "drain"]

    def test_replaced_by_its_own_key_goes_on(self, app: HarnessApp, worker: WorkerProcess, journal: Journal) -> None:
        """A task of the same key takes the run over: the next attempt of one run."""
        app.tasks["replaced"].delay(journal.key(), "replaced_by")
        journal.wait("coalesce_drain")
        assert order(journal) == ["start", "start", "success", "drain"]
        assert len({event["run_id"] for event in life(journal)}) == 1

    def test_cleared_run_drains_its_session(self, app: HarnessApp, worker: WorkerProcess, journal: Journal) -> None:
        """A session that ends by `clear_key` tells so, with the metadata of its key."""
        queue = app.tasks["queue"]
        drains: list[Any] = []
        queue.apply_async((journal.key(),), countdown=60)

        def drained(meta: Any = None, **_: Any) -> None:
            drains.append(meta)

        signals.coalesce_drain.connect(drained, weak=False)
        try:
            assert queue.clear_key(journal.key()) == 1
        finally:
            signals.coalesce_drain.disconnect(drained)

        (meta,) = drains
        assert (meta.key, meta.scope, meta.name) == (journal.key(), "queue", "queue")
        assert meta.session_id > 0

    def test_session_that_somebody_else_clears_drains_where_it_is_watched(
        self, app: HarnessApp, worker: WorkerProcess, journal: Journal
    ) -> None:
        """An operator's process that has no receivers ends a session: the workers' receivers hear of its drain."""
        queue = app.tasks["queue"]
        queue.delay(journal.key(), gate="g")
        started = journal.wait("start")
        queue.apply_async((journal.key(),), queue="idle")
        journal.open("g")
        wait_until(lambda: messages(app, "idle"))
        assert queue.clear_key(journal.key()) == 1

        drain = journal.wait("coalesce_drain")
        assert drain["session_id"] == started["coalesce_session_id"]
        assert order(journal) == ["start", "success", "drain"]


class TestDeaths:
    @pytest.mark.parametrize(
        ("where", "ended"),
        [
            ("coalesce_start", "error"),
            ("coalesce_success", "success"),
            ("coalesce_drain", "success"),
            ("take_drain", "success"),
        ],
    )
    def test_session_drains_once_wherever_its_child_dies(
        self, where: str, ended: str, app: HarnessApp, worker: WorkerProcess, journal: Journal
    ) -> None:
        """SIGKILL at any point around the end of the last run: one end, and one drain, late at most."""
        key = f"kills:{where}"
        queue = app.tasks["queue"]
        result = queue.delay(journal.key(key), 1)
        journal.wait("coalesce_drain", timeout=10 + 2 * LEASE, key=key)

        journal.wait("killed", key=key)
        assert order(journal, key) == ["start", ended, "drain"]
        assert isinstance(result.get(timeout=10, propagate=False), WorkerLostError if ended == "error" else int)
        # A second drain would come before the next session, or be left for the sweep.
        queue.delay(journal.key(key), 2)
        journal.wait("coalesce_drain", count=2, key=key)
        assert order(journal, key) == ["start", ended, "drain", "start", "success", "drain"]
        wait_until(lambda: not drains_left(app))

    @pytest.mark.parametrize("where", ["coalesce_error", "coalesce_skip"])
    def test_session_drains_once_if_the_child_dies_while_it_tells_the_end(
        self, where: str, app: HarnessApp, worker: WorkerProcess, journal: Journal
    ) -> None:
        """The parent, which can not know what was told, tells what Celery makes of it: the process was lost."""
        key = f"kills:{where}"
        if where == "coalesce_error":
            app.tasks["queue"].delay(journal.key(key), error="broken")
        else:
            app.tasks["watched_ignoring"].delay(journal.key(key))
        journal.wait("coalesce_drain", key=key)

        told = order(journal, key)
        assert (told[0], told[1], told[-1]) == ("start", where.removeprefix("coalesce_"), "drain")
        assert told.count("drain") == 1
        assert set(told[2:-1]) <= {"error"}
        wait_until(lambda: not drains_left(app))


class TestReceivers:
    def test_receiver_that_raises_breaks_nothing(
        self, app: HarnessApp, worker: WorkerProcess, journal: Journal
    ) -> None:
        """Runs, follow-ups, failures and skips go on as if nobody had raised."""
        queue, key = app.tasks["queue"], journal.key("raises:key")
        with triggers_seen():
            first = queue.delay(key, 1, gate="g")
            journal.wait("start")
            second = queue.delay(key, 2, error="broken")
        journal.open("g")
        assert first.get(timeout=10) == 1
        with pytest.raises(RuntimeError, match="broken"):
            second.get(timeout=10)
        journal.wait("coalesce_drain", key="raises:key")
        app.tasks["watched_ignoring"].delay(journal.key("raises:ignore"))
        journal.wait("coalesce_drain", key="raises:ignore")

        assert order(journal, "raises:key") == ["start", "success", "start", "error", "drain"]
        assert order(journal, "raises:ignore") == ["start", "skip", "drain"]
        journal.wait("raised", count=8)
        assert psutil.pid_exists(worker.pid)

    def test_receiver_that_raises_in_the_producer_does_not_stop_the_call(
        self, app: HarnessApp, worker: WorkerProcess, journal: Journal
    ) -> None:
        """`.delay()` returns its result whatever a receiver does."""

        def receive(**_: Any) -> None:
            raise RuntimeError("a receiver")

        signals.coalesce_trigger.connect(receive, weak=False)
        try:
            assert app.tasks["queue"].delay(journal.key(), 5).get(timeout=10) == 5
        finally:
            signals.coalesce_trigger.disconnect(receive)


class TestSweep:
    def test_runs_of_a_killed_worker_are_lost(
        self, app: HarnessApp, worker: WorkerProcess, make_worker: MakeWorker, journal: Journal
    ) -> None:
        """The sweep of another worker tells so, by signal and event: an error, or the run starts once more."""
        victim = make_worker(app, queues=["victim"], include=INCLUDE)
        with Monitor(app) as monitor:
            failed = app.tasks["queue"].apply_async((journal.key("early"),), {"gate": "never"}, queue="victim")
            app.tasks["queue_rerun"].apply_async((journal.key("late"),), {"gate": "late"}, queue="victim")
            journal.wait("start", count=2)
            app.tasks["queue"].delay(journal.key("early"), 2)
            victim.kill()
            journal.wait("coalesce_lost", count=2, timeout=20)
            journal.open("late")
            victim.restart()  # it alone consumes the queue of the run that starts again
            for key in ("early", "late"):
                journal.wait("coalesce_drain", key=key, timeout=20)
            monitor.wait("coalesce-drain", count=2)
            monitor.assert_healthy(worker.hostname, victim.hostname)

        assert order(journal, "early") == ["start", "lost", "error", "start", "success", "drain"]
        start, lost, error = life(journal, "early")[:3]
        assert (lost["again"], "LeaseLost" in error["exception"]) == ("False", True)
        assert lost["token"] == error["token"] > start["token"]
        for event in (lost, error):
            assert metadata(event) | {"token": 0} == metadata(start) | {"token": 0}
        with pytest.raises(WorkerLostError):
            failed.get(timeout=10)

        assert order(journal, "late") == ["start", "lost", "start", "success", "drain"]
        assert life(journal, "late")[1]["again"] == "True"
        assert len({event["run_id"] for event in life(journal, "late")}) == 1

        seen = monitor.events("coalesce-lost")
        assert {(e["key"], e["again"], e["hostname"]) for e in seen} == {
            (journal.key("early"), False, worker.hostname),
            (journal.key("late"), True, worker.hostname),
        }
        assert len(seen) == 2

    def test_slow_receiver_in_the_sweep_costs_nobody_a_lease(
        self, app: HarnessApp, worker: WorkerProcess, make_worker: MakeWorker, journal: Journal
    ) -> None:
        """While a receiver of one lost run takes its time, the sweeper's own runs stay its own."""
        victim = make_worker(app, queues=["victim"], concurrency=1, include=INCLUDE)
        key = "blocks:coalesce_lost"
        app.tasks["queue"].apply_async((journal.key(key),), {"gate": "never"}, queue="victim")
        app.tasks["queue"].delay(journal.key("alive"), gate="g")
        journal.wait("start", count=2)
        victim.kill()
        journal.wait("blocked", timeout=20)
        journal.assert_never("coalesce_lost", within=2 * LEASE, key="alive")
        journal.open("receiver")
        journal.wait("coalesce_drain", key=key)
        journal.open("g")
        journal.wait("coalesce_drain", key="alive")

        assert order(journal, "alive") == ["start", "success", "drain"]
        assert order(journal, key) == ["start", "lost", "error", "drain"]


class TestBus:
    @pytest.mark.parametrize("pool", ["prefork", "threads", "gevent", "solo"])
    def test_every_pool_sends_what_its_signals_tell(
        self, pool: str, make_watched: MakeApp, make_worker: MakeWorker, journal: Journal
    ) -> None:
        """An event receiver on another machine sees each event with the metadata of its signal, from the worker."""
        app = make_watched()
        worker = make_worker(app, pool=pool, concurrency=2, include=INCLUDE)
        with Monitor(app) as monitor:
            for value in range(3):
                app.send_task("queue", (journal.key(), value), {"gate": "g"})
                if pool != "solo":
                    journal.wait("coalesce_trigger", count=value + 1)
            journal.open("g", 3)
            monitor.wait("coalesce-drain")
            app.tasks["queue"].delay(journal.key("failing"), error="broken")
            monitor.wait("coalesce-drain", key=journal.key("failing"))
            app.tasks["watched_ignoring"].delay(journal.key("watched_ignoring"))
            monitor.wait("coalesce-drain", key=journal.key("watched_ignoring"))
            keys = ["key", "failing", "watched_ignoring"]
            if pool in ("prefork", "gevent"):  # nothing stops the body elsewhere
                app.tasks["queue"].delay(journal.key("terminated"), gate="never")
                started = journal.wait("start", key="terminated")
                app.control.revoke(started["task_id"], terminate=True)
                monitor.wait("coalesce-drain", key=journal.key("terminated"))
                keys.append("terminated")
                assert order(journal, "terminated") == ["start", "skip", "drain"]
            monitor.assert_healthy(worker.hostname)

            told = [event for event in journal.events() if event["event"].startswith("coalesce_")]
            seen = monitor.events("coalesce-")
            for key in keys:
                # The gate's process tells of triggers, another of the run: each in its own order.
                ours = sorted(
                    (event for event in told if event["key"] == key), key=lambda e: e["event"] == "coalesce_trigger"
                )
                theirs = sorted(
                    (event for event in seen if event["key"] == journal.key(key)),
                    key=lambda e: e["type"] == "coalesce-trigger",
                )
                assert [e["event"].replace("_", "-") for e in ours] == [e["type"] for e in theirs]
                assert [metadata(e) for e in ours] == [metadata(e) for e in theirs]
            assert {event["hostname"] for event in seen} == {worker.hostname}

    def test_worker_without_task_events_sends_none_until_asked(
        self, make_watched: MakeApp, make_worker: MakeWorker, journal: Journal
    ) -> None:
        """Nothing without `-E`; everything once a monitor has switched events on."""
        app = make_watched()
        worker = make_worker(app, events=False, concurrency=1, include=INCLUDE)
        with Monitor(app) as monitor:
            for name in ("queue", "watched_ignoring"):
                app.tasks[name].delay(journal.key(name))
                journal.wait("coalesce_drain", key=name)
            app.tasks["work"].delay(journal.key("after")).get(timeout=10)
            monitor.settle()
            assert monitor.events("coalesce-") == monitor.events("task-") == []

            app.control.enable_events(reply=True, timeout=5, limit=1)
            app.tasks["queue"].delay(journal.key())
            monitor.wait("coalesce-drain")
            kinds = [event["type"] for event in monitor.events("coalesce-")]
            assert kinds == ["coalesce-start", "coalesce-success", "coalesce-drain"]
            monitor.assert_healthy(worker.hostname)

    def test_nothing_is_sent_if_events_are_switched_off(
        self, make_watched: MakeApp, make_worker: MakeWorker, journal: Journal
    ) -> None:
        """`coalesce_events=False`: Celery's own events are all there is."""
        app = make_watched(coalesce_events=False, task_send_sent_event=True)
        worker = make_worker(app, concurrency=1, include=INCLUDE)
        with Monitor(app) as monitor:
            app.tasks["queue"].delay(journal.key(), gate="g")
            journal.wait("start")
            for _ in range(2):
                app.tasks["queue"].delay(journal.key())
            journal.open("g")
            journal.wait("coalesce_drain")
            app.tasks["work"].delay(journal.key("after")).get(timeout=10)
            monitor.settle()
            assert monitor.events("coalesce-") == []
            assert monitor.events("task-succeeded")
            monitor.assert_healthy(worker.hostname)

    @pytest.mark.parametrize("asked", [True, False])
    def test_producer_sends_triggers_only_if_asked(self, asked: bool, make_watched: MakeApp, journal: Journal) -> None:
        """`task_send_sent_event` is what lets a producer send; no worker appears for it."""
        app = make_watched(task_send_sent_event=asked)
        with Monitor(app) as monitor, triggers_seen() as seen:
            for value in range(3):
                app.tasks["queue"].delay(journal.key(), value)
            monitor.assert_healthy()
            events = monitor.events("coalesce-")
            assert [event["type"] for event in events] == ["coalesce-trigger"] * 3 * asked
            if asked:
                assert [event["disposition"] for event in events] == ["dispatched", "coalesced", "coalesced"]
                for event, each in zip(events, seen, strict=True):
                    told = each["meta"].as_dict()
                    assert {name: event[name] for name in told} == told
                # What an application calls with may be large, or secret: for receivers in the process alone.
                assert all("unused" not in event for event in events)
