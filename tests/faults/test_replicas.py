"""A primary and its replica: what a failover can lose, and what `coalesce_wait_replicas` does about it."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from kombu.exceptions import OperationalError

from celery_coalesce import StoreUnavailable
from celery_coalesce.engine import engine_of
from celery_coalesce.keys import state_id
from celery_coalesce.records import Envelope
from tests.faults.stories import assert_told_once
from tests.support.app import HarnessApp
from tests.support.journal import Journal
from tests.support.process import HOST, wait_until
from tests.support.servers import Sentinel, ValkeyServer
from tests.support.worker import WorkerProcess

MakeApp = Callable[..., HarnessApp]
MakeWorker = Callable[..., WorkerProcess]

TOO_FEW = r"coalesce_wait_replicas=1 asks for: 0 of them had the change within 1.0 s"

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def sentinel() -> Iterator[Sentinel]:
    """A primary, a replica and a sentinel."""
    with Sentinel() as sentinel:
        yield sentinel


@pytest.fixture
def make_safe_app(make_app: MakeApp, sentinel: Sentinel) -> Callable[..., HarnessApp]:
    """Make an app whose state is on the sentinel's primary, and whose broker is elsewhere."""

    def make(replicas: int = 1, **conf: Any) -> HarnessApp:
        url = f"sentinel://{HOST}:{sentinel.sentinel.port}/{sentinel.master_name}"
        settings = {"coalesce_redis_url": url, "coalesce_wait_replicas": replicas, "coalesce_redispatch_after": 30}
        return make_app(conf={**settings, "coalesce_lease": 3, **conf})

    return make


def left(sentinel: Sentinel) -> set[str]:
    """Return what the primary has stored for keys."""
    with sentinel.client() as client:
        names = {name.removeprefix("{coalesce}:") for name in client.scan_iter(count=1000)}
    return names - {"meta", "presence", "history", "seen"}


def wait_idle(sentinel: Sentinel) -> None:
    """Wait until nothing is left."""
    wait_until(lambda: not left(sentinel), 20, lambda: f"left: {left(sentinel)}")


class TestAReplicaThatDoesNotAnswer:
    def test_a_call_raises_and_makes_no_second_run(
        self, make_safe_app: Callable[..., HarnessApp], make_worker: MakeWorker, sentinel: Sentinel, journal: Journal
    ) -> None:
        """The change may be lost, so nobody is told that it was made; the caller tries again, and both are one run."""
        app = make_safe_app(coalesce_redispatch_after=2)
        queue = app.tasks["queue"]
        queue.delay(journal.key("warm"))
        sentinel.replica.pause()
        began = time.monotonic()
        with pytest.raises(StoreUnavailable, match=TOO_FEW) as raised:
            queue.delay(journal.key(), 1)
        assert isinstance(raised.value, OperationalError)
        assert time.monotonic() - began < 3
        with pytest.raises(StoreUnavailable, match=TOO_FEW):
            queue.batch_delay([(journal.key("batch"), n) for n in range(3)])
        sentinel.replica.resume()

        result = queue.delay(journal.key(), 2)
        make_worker(app, concurrency=1)
        assert result.get(timeout=20) == 2
        journal.wait("coalesce_drain", key="batch", timeout=20)
        wait_idle(sentinel)
        assert_told_once(journal, runs=1)
        assert_told_once(journal, "batch", runs=1)

    def test_reading_and_asking_for_a_lease_that_holds_need_no_replica(
        self, make_safe_app: Callable[..., HarnessApp], sentinel: Sentinel, journal: Journal
    ) -> None:
        """What changes nothing waits for nobody."""
        app = make_safe_app()
        app.tasks["queue"].delay(journal.key(), 1)
        sentinel.replica.pause()
        view = engine_of(app).transitions.show("queue", journal.key())
        assert view is not None
        assert [run["state"] for run in view.runs] == ["dispatched"]

    def test_a_question_that_is_repeated_over_another_connection_waits_as_well(
        self, make_safe_app: Callable[..., HarnessApp], sentinel: Sentinel, journal: Journal
    ) -> None:
        """It writes nothing, and nobody has what the first one has written."""
        app, twin = make_safe_app(), make_safe_app()
        result = app.tasks["queue"].delay(journal.key(), 1)
        twin.tasks["queue"].delay(journal.key("warm"), 1)
        state = state_id("queue", journal.key())
        envelope = Envelope(state, str(result.run_id), result.id, "queue", 0, 0, 0, b"", b"")
        sentinel.replica.pause()
        for each in (app, twin):
            transitions = engine_of(each).transitions
            with pytest.raises(StoreUnavailable, match=TOO_FEW):
                transitions.start(envelope, owner="w/1/x", claim="claim", late=False, revoked=False)

    def test_the_gate_keeps_the_message_until_the_lease_is_kept(
        self, make_safe_app: Callable[..., HarnessApp], make_worker: MakeWorker, sentinel: Sentinel, journal: Journal
    ) -> None:
        """A body begins once its lease is where a failover finds it; asked again, the answer is the same lease."""
        app = make_safe_app()
        worker = make_worker(app, concurrency=1)
        queue = app.tasks["queue"]
        assert queue.delay(journal.key("warm"), 0).get(timeout=20) == 0
        wait_idle(sentinel)
        worker.signal(signal.SIGSTOP)
        result = queue.delay(journal.key(), 1)
        sentinel.replica.pause()
        worker.signal(signal.SIGCONT)
        wait_until(lambda: "has not the replicas" in worker.logs(), 20)
        journal.assert_never("start", key="key", within=2.5)
        assert app.tasks["work"].delay(journal.key("plain"), 7).get(timeout=20) == 7

        sentinel.replica.resume()
        assert result.get(timeout=20) == 1
        wait_idle(sentinel)
        assert_told_once(journal, runs=1)

    def test_an_end_is_reported_again_until_it_is_kept(
        self, make_safe_app: Callable[..., HarnessApp], make_worker: MakeWorker, sentinel: Sentinel, journal: Journal
    ) -> None:
        """The run has ended and its follow-up has a slot, but nobody publishes it before a replica knows."""
        app = make_safe_app()
        worker = make_worker(app, concurrency=1)
        queue = app.tasks["queue"]
        first = queue.delay(journal.key(), 1, gate="g")
        journal.wait("start", timeout=20)
        second = queue.delay(journal.key(), 2)
        sentinel.replica.pause()
        journal.open("g")
        wait_until(lambda: "could not be reported yet" in worker.logs(), 20)
        journal.assert_never("coalesce_drain", within=1)
        assert len(journal.events("start")) == 1

        sentinel.replica.resume()
        assert first.get(timeout=20) == 1
        assert second.get(timeout=20) == 2
        journal.wait("coalesce_drain", timeout=20)
        wait_idle(sentinel)
        assert_told_once(journal, runs=2)


class TestAFailover:
    def test_what_was_acknowledged_is_there(
        self, make_safe_app: Callable[..., HarnessApp], make_worker: MakeWorker, sentinel: Sentinel, journal: Journal
    ) -> None:
        """A call returns once the replica has it, so it outlives the primary. Then there has to be another replica."""
        app = make_safe_app()
        queue = app.tasks["queue"]
        make_worker(app, concurrency=1)
        first = queue.delay(journal.key(), 1, gate="g")
        journal.wait("start", timeout=20)
        with ThreadPoolExecutor(1) as threads:
            sentinel.replica.pause()
            call = threads.submit(queue.delay, journal.key(), 2)
            with pytest.raises(TimeoutError):
                call.result(0.3)
            sentinel.replica.resume()
            second = call.result(20)
        sentinel.kill_master()
        journal.open("g")
        assert first.get(timeout=20) == 1
        journal.assert_never("coalesce_drain", within=1)
        sentinel.revive()
        assert second.get(timeout=20) == 2
        journal.wait("coalesce_drain", timeout=20)
        wait_idle(sentinel)
        assert_told_once(journal, runs=2)

    def test_what_no_replica_had_is_lost_and_its_message_runs(
        self, make_safe_app: Callable[..., HarnessApp], make_worker: MakeWorker, sentinel: Sentinel, journal: Journal
    ) -> None:
        """Without waiting, accepted triggers are lost: those with a message are admitted by it, the others are gone."""
        app = make_safe_app(replicas=0)
        queue = app.tasks["queue"]
        queue.apply_async((journal.key("before"),), countdown=3600)
        with sentinel.client() as client:
            assert client.wait(1, 5000) == 1
        sentinel.cut_off_replica()
        first = queue.delay(journal.key(), 1)
        merged = queue.apply_async((journal.key(), 2), link=app.tasks["collect"].s(key=journal.key("link")))
        sentinel.kill_master()
        transitions = engine_of(app).transitions
        wait_until(lambda: shown(transitions, journal.key("before")), 20)
        assert transitions.show("queue", journal.key()) is None

        make_worker(app, concurrency=1)
        assert first.get(timeout=20) == 1  # the message's own arguments: those that were merged went with the record
        journal.wait("coalesce_drain", timeout=20)
        assert_told_once(journal, runs=1)
        assert not merged.ready()
        assert journal.events("start", key="link") == []
        assert queue.delay(journal.key(), 3).get(timeout=20) == 3
        assert queue.clear_key(journal.key("before")) == 1
        wait_idle(sentinel)

    def test_what_no_replica_would_have_is_not_accepted(
        self, make_safe_app: Callable[..., HarnessApp], sentinel: Sentinel, journal: Journal
    ) -> None:
        """The same with `coalesce_wait_replicas`: the caller knows."""
        app = make_safe_app()
        app.tasks["queue"].delay(journal.key("warm"))
        sentinel.cut_off_replica()
        with pytest.raises(StoreUnavailable, match=TOO_FEW):
            app.tasks["queue"].delay(journal.key(), 1)


def shown(transitions: Any, key: str) -> bool:
    """Tell whether a record can be read, and is there."""
    try:
        return transitions.show("queue", key) is not None
    except StoreUnavailable:
        return False


def test_too_few_replicas_to_begin_with(make_app: MakeApp, journal: Journal) -> None:
    """The first call says how many there are, and changes nothing; once they are there it goes on."""
    with ValkeyServer(extra=("--repl-diskless-sync-delay", "0")) as server:
        conf = {"coalesce_redis_url": server.url(), "coalesce_wait_replicas": 1}
        queue = make_app(conf=conf).tasks["queue"]
        with pytest.raises(StoreUnavailable, match=r"coalesce_wait_replicas=1 asks for: 0 are connected; bring them"):
            queue.delay(journal.key(), 1)
        with server.client() as client:
            assert client.dbsize() == 0
        with ValkeyServer(extra=("--replicaof", HOST, str(server.port))) as replica, replica.client() as client:
            wait_until(lambda: client.info("replication")["master_link_status"] == "up", 20)
            assert queue.delay(journal.key(), 1).disposition.value == "dispatched"
            assert client.exists("{coalesce}:meta")
