"""What coalescing costs, counted in round trips to the state server: never measured in seconds."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import redis
from redis.connection import AbstractConnection

from celery_coalesce import QueueFull, signals
from celery_coalesce.store.scripts import SCRIPTS, script
from tests.integration.counting import CountingProxy
from tests.support.app import HarnessApp, make_app
from tests.support.journal import Journal
from tests.support.process import HOST, wait_until
from tests.support.servers import ValkeyServer
from tests.support.worker import WorkerProcess


@dataclass
class Counted:
    """An app and its worker, each with a counted way to the state server.

    Attributes:
        calls: What this process asks.
        runs: What the worker's parent and children ask.
        broker: What this process asks of the broker, which is another server.
    """

    app: HarnessApp
    calls: CountingProxy
    runs: CountingProxy
    broker: CountingProxy

    def forget(self) -> None:
        """Start to count anew."""
        for proxy in (self.calls, self.runs, self.broker):
            proxy.forget()


@pytest.fixture(scope="module")
def warm(journal_server: ValkeyServer, state_server: ValkeyServer) -> Iterator[Counted]:
    """A worker that beats so slowly that no beat comes in between, and servers that know every script."""
    with (
        ValkeyServer() as state,
        CountingProxy(state.port) as calls,
        CountingProxy(state.port) as runs,
        CountingProxy(state_server.port) as broker,
    ):
        with state.client() as client:
            for name in SCRIPTS:
                client.script_load(script(name).text)
        url = state_server.new_db()
        slow = {"coalesce_lease": 3600, "coalesce_redispatch_after": 3600, "task_send_sent_event": False}
        ours = {**slow, "coalesce_redis_url": f"redis://{HOST}:{calls.port}/0"}
        theirs = {**slow, "coalesce_redis_url": f"redis://{HOST}:{runs.port}/0"}
        # Without -E and receivers: what is asked is asked by the runs alone.
        with (
            make_app(url.replace(str(state_server.port), str(broker.port)), url, ours) as app,
            WorkerProcess.serving(
                app, broker=url, conf=theirs, concurrency=1, events=False, include=["tests.integration.silent"]
            ),
        ):
            app.tasks["queue"].delay(f"{uuid.uuid4().hex[:8]}:warm", 1).get(timeout=20)
            app.tasks["work"].delay(f"{uuid.uuid4().hex[:8]}:warm", 1).get(timeout=20)
            yield Counted(app, calls, runs, broker)


@pytest.fixture
def counted(warm: Counted, journal: Journal) -> Counted:
    """The warm worker, with nothing to do."""
    idle(warm)
    warm.forget()
    return warm


def idle(counted: Counted) -> None:
    """Wait until no run holds a slot: its result is there a moment before its end is reported."""
    with redis.Redis(port=counted.calls.target_port) as client:
        wait_until(lambda: not list(client.scan_iter(match="{coalesce}:rec:*", count=1000)))


def test_a_trigger_is_one_round_trip_beside_the_publish(counted: Counted, journal: Journal) -> None:
    """idle -> dispatched."""
    queue = counted.app.tasks["queue"]
    plain = counted.app.tasks["work"]
    plain.delay(journal.key("plain"))
    journal.wait("end", key="plain")
    published = counted.broker.counted()
    counted.forget()

    queue.delay(journal.key(), 1, gate="g")

    assert counted.calls.counted() == {"transition": 1}
    assert counted.calls.round_trips == 1
    assert counted.broker.counted() == published  # as a plain task's


def test_a_coalesced_trigger_is_one_round_trip_and_no_publish(counted: Counted, journal: Journal) -> None:
    """Nothing goes to the broker."""
    queue = counted.app.tasks["queue"]
    queue.delay(journal.key(), 1, gate="g")
    journal.wait("start", key="key")
    queue.delay(journal.key(), 2)
    counted.forget()

    for value in range(3, 13):
        assert queue.delay(journal.key(), value).coalesced

    assert counted.calls.counted() == {"transition": 10}
    assert counted.calls.round_trips == 10
    assert counted.broker.counted() == {}


@pytest.mark.parametrize("name", ["skip", "reject"])
def test_a_refused_trigger_is_one_round_trip_and_no_publish(counted: Counted, journal: Journal, name: str) -> None:
    """Skipped or rejected."""
    task = counted.app.tasks[name]
    task.delay(journal.key(), 1, gate="g")
    journal.wait("start", key="key")
    if name == "reject":
        task.delay(journal.key(), 2)
    counted.forget()

    with contextlib.suppress(QueueFull):
        task.delay(journal.key(), 3)

    assert counted.calls.counted() == {"transition": 1}
    assert counted.broker.counted() == {}


def test_an_exempt_call_asks_nothing(counted: Counted, journal: Journal) -> None:
    """`coalesce_key=None`: a plain Celery call."""
    counted.app.tasks["queue"].apply_async((journal.key(), 1), coalesce_key=None).get(timeout=20)
    assert counted.calls.counted() == {}
    assert counted.runs.counted() == {}


def test_a_run_is_a_start_and_a_finish(counted: Counted, journal: Journal) -> None:
    """One question of the parent, one of the child, where nobody listens."""
    for n in range(3):
        counted.app.tasks["queue"].delay(journal.key(f"k{n}"), 1).get(timeout=20)
    idle(counted)
    assert counted.runs.counted() == {"transition": 6}
    assert counted.runs.round_trips == 6


def test_a_follow_up_costs_the_same(counted: Counted, journal: Journal) -> None:
    """It is dispatched by the finish of the run before."""
    queue = counted.app.tasks["queue"]
    queue.delay(journal.key(), 1, gate="g")
    journal.wait("start", key="key")
    last = queue.delay(journal.key(), 2)
    journal.open("g")
    last.get(timeout=20)
    idle(counted)
    assert counted.runs.counted() == {"transition": 4}


def test_a_failing_run_costs_the_same(counted: Counted, journal: Journal) -> None:
    """Its end is a finish too."""
    result = counted.app.tasks["queue"].delay(journal.key(), error="boom")
    with pytest.raises(RuntimeError, match="boom"):
        result.get(timeout=20)
    idle(counted)
    assert counted.runs.counted() == {"transition": 2}


def test_a_retried_run_costs_two_more(counted: Counted, journal: Journal) -> None:
    """A retry in the place of the finish, and a start."""
    counted.app.tasks["queue_retry"].delay(journal.key(), times=1, value=5).get(timeout=20)
    idle(counted)
    assert counted.runs.counted() == {"transition": 4}


def test_callbacks_cost_one_check(counted: Counted, journal: Journal) -> None:
    """Before anything is called in the key's name, the lease is asked for."""
    link = counted.app.tasks["collect"].s(key=journal.key("link"))
    counted.app.tasks["queue"].apply_async((journal.key(), 1), link=link)
    journal.wait("end", key="link", timeout=20)
    idle(counted)
    assert counted.runs.counted() == {"transition": 3}


def test_followers_cost_one_finish_more(counted: Counted, journal: Journal) -> None:
    """However many there are, up to a hundred."""
    queue = counted.app.tasks["queue"]
    queue.delay(journal.key(), 1, gate="g")
    journal.wait("start", key="key")
    results = [queue.apply_async((journal.key(), n), task_id=f"{journal.name}-{n}") for n in range(20)]
    journal.open("g")
    assert [result.get(timeout=20) for result in results] == [19] * 20
    idle(counted)
    # start and finish of the first; start, finish that asks for the followers to be told, and finish of the second
    assert counted.runs.counted() == {"transition": 5}


def test_a_foreign_message_is_admitted_by_one_more(counted: Counted, journal: Journal) -> None:
    """`send_task`: the gate makes the trigger."""
    counted.app.send_task("queue", (journal.key(), 1)).get(timeout=20)
    idle(counted)
    assert counted.calls.counted().get("transition", 0) == 0
    assert counted.runs.counted() == {"transition": 3}


def test_a_receiver_of_the_trigger_costs_nothing_more(counted: Counted, journal: Journal) -> None:
    """What it is told comes with the reply."""
    told: list[Any] = []

    def receiver(meta: Any, **given: Any) -> None:
        told.append(meta)

    signals.coalesce_trigger.connect(receiver)
    try:
        counted.app.tasks["queue"].delay(journal.key(), 1)
    finally:
        signals.coalesce_trigger.disconnect(receiver)
    assert len(told) == 1
    assert counted.calls.counted() == {"transition": 1}


class TestBatches:
    """1,000 triggers: few round trips to the state server, and one producer."""

    @pytest.fixture
    def trips(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """The ports that this process speaks to, once for each time that it speaks and then listens.

        A proxy can not tell: a server answers the first calls of a pipeline while the client still sends the others.
        """
        ports: list[int] = []
        send = AbstractConnection.send_packed_command

        def counted_send(connection: Any, *args: Any, **kwargs: Any) -> None:
            ports.append(connection.port)
            send(connection, *args, **kwargs)

        monkeypatch.setattr(AbstractConnection, "send_packed_command", counted_send)
        return ports

    @pytest.fixture
    def producers(self, counted: Counted, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
        """The producers that were taken out of the pool."""
        taken: list[Any] = []
        pool = counted.app.amqp.producer_pool
        acquire = pool.acquire

        def counted_acquire(*args: Any, **kwargs: Any) -> Any:
            taken.append(acquire(*args, **kwargs))
            return taken[-1]

        monkeypatch.setattr(pool, "acquire", counted_acquire)
        return taken

    def test_of_one_key(self, counted: Counted, journal: Journal, trips: list[int], producers: list[Any]) -> None:
        """One run, one message."""
        results = counted.app.tasks["queue"].batch_delay([(journal.key(), n) for n in range(1000)])
        assert counted.calls.counted() == {"transition": 10}
        assert trips.count(counted.calls.port) == 1
        assert len(producers) == 1
        assert counted.broker.counted()["LPUSH"] == 1
        assert results[0].get(timeout=20) == 999

    @pytest.mark.timeout(120)
    def test_of_many_keys(self, counted: Counted, journal: Journal, trips: list[int], producers: list[Any]) -> None:
        """A hundred runs, and their messages over one connection."""
        calls = [(journal.key(f"k{n % 100}"), n) for n in range(1000)]
        results = counted.app.tasks["queue"].batch_delay(calls)
        assert counted.calls.counted()["transition"] == 100
        assert trips.count(counted.calls.port) == 1
        assert len(producers) == 1
        assert counted.broker.counted()["LPUSH"] == 100
        assert [result.get(timeout=60) for result in results[:100]] == list(range(900, 1000))

    def test_with_a_merge_function(
        self, counted: Counted, journal: Journal, trips: list[int], producers: list[Any]
    ) -> None:
        """The merges of a key are worked out here, and sent together."""
        results = counted.app.tasks["merge"].batch_delay([(journal.key(f"k{n % 2}"), 1) for n in range(1000)])
        assert trips.count(counted.calls.port) == 2
        assert len(producers) == 1
        assert [result.get(timeout=20) for result in results[:2]] == [500, 500]

    def test_of_one_call(self, counted: Counted, journal: Journal, trips: list[int], producers: list[Any]) -> None:
        """As `delay`."""
        [result] = counted.app.tasks["queue"].batch_delay([(journal.key(), 1)])
        assert counted.calls.counted() == {"transition": 1}
        assert result.get(timeout=20) == 1

    def test_of_exempt_calls(self, counted: Counted, journal: Journal, trips: list[int], producers: list[Any]) -> None:
        """Nothing is asked of the state server."""
        calls: list[Any] = [((journal.key(), n), {}) for n in range(10)]
        results = counted.app.tasks["queue"].batch_apply_async(calls, coalesce_key=None)
        assert trips.count(counted.calls.port) == 0
        assert len(producers) == 1
        assert [result.get(timeout=20) for result in results] == list(range(10))
