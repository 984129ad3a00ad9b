"""The core of the promises under other pools and brokers: one body of tests, many environments."""

from __future__ import annotations

import importlib.util
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from celery import chord

from celery_coalesce import Disposition
from tests.support.app import HarnessApp, make_app
from tests.support.journal import Journal, assert_no_overlap
from tests.support.process import absent
from tests.support.rabbit import RabbitServer
from tests.support.servers import RedisServer, ValkeyServer
from tests.support.traces import traces
from tests.support.worker import WorkerProcess

PATIENCE = 20  # seconds

pytestmark = pytest.mark.timeout(120)  # RabbitMQ takes its time to start


@dataclass(frozen=True)
class Environment:
    """A pool, a broker and what they need to be told.

    On RabbitMQ results and state are on the Valkey; elsewhere all three are in one database.
    """

    pool: str = "prefork"
    broker: str = "valkey"
    conf: dict[str, Any] = field(default_factory=dict)

    @property
    def needs(self) -> str:
        """The module that the pool is made from."""
        return self.pool if self.pool in ("gevent", "eventlet") else "celery"


def on_quorum_queue() -> dict[str, Any]:
    """Return what Celery documents for quorum queues with native delayed delivery."""
    name = f"quorum-{uuid.uuid4().hex[:8]}"
    return {
        "task_default_queue": name,
        "task_default_queue_type": "quorum",
        "task_default_exchange": name,
        "task_default_exchange_type": "topic",
        "task_default_routing_key": name,
        "broker_transport_options": {"confirm_publish": True},
    }


ENVIRONMENTS = {
    "threads": Environment("threads"),
    "gevent": Environment("gevent"),
    "eventlet": Environment("eventlet"),
    "solo": Environment("solo"),
    "redis": Environment(broker="redis"),
    "rabbit": Environment(broker="rabbit"),
    "quorum": Environment(broker="rabbit", conf=on_quorum_queue()),
}


def each() -> list[Any]:
    """Return the environments as parameters, each a group of its own for `--dist=loadgroup`."""
    return [
        pytest.param(environment, id=name, marks=pytest.mark.xdist_group(name))
        for name, environment in ENVIRONMENTS.items()
    ]


@pytest.fixture(scope="module", params=each())
def environment(request: pytest.FixtureRequest) -> Environment:
    """The environment of this round."""
    environment: Environment = request.param
    if importlib.util.find_spec(environment.needs) is None:
        absent(environment.needs)
    return environment


@pytest.fixture(scope="module")
def app(
    environment: Environment,
    request: pytest.FixtureRequest,
    state_server: ValkeyServer,
    journal_server: ValkeyServer,
) -> Iterator[HarnessApp]:
    """The environment's app."""
    url = state_server.new_db()
    conf = dict(environment.conf)
    broker = url
    if environment.broker == "redis":
        redis_server: RedisServer = request.getfixturevalue("redis_server")
        broker = url = redis_server.new_db()
    elif environment.broker == "rabbit":
        rabbit: RabbitServer = request.getfixturevalue("rabbit")
        broker = rabbit.url
        conf["coalesce_redis_url"] = url
        conf.setdefault("task_default_queue", f"classic-{uuid.uuid4().hex[:8]}")
    with make_app(broker, url, conf) as app:
        yield app


@pytest.fixture(scope="module")
def worker(app: HarnessApp, environment: Environment) -> Iterator[WorkerProcess]:
    """The environment's worker."""
    concurrency = 1 if environment.pool == "solo" else 4
    with WorkerProcess.serving(app, pool=environment.pool, concurrency=concurrency) as worker:
        yield worker


def test_a_burst_is_one_run_and_one_follow_up_with_the_latest_arguments(
    app: HarnessApp, worker: WorkerProcess, journal: Journal
) -> None:
    """Whatever is called during a run is covered by one more."""
    queue = app.tasks["queue"]
    first = queue.delay(journal.key(), 0, gate="a")
    journal.wait("start", timeout=PATIENCE)
    results = [queue.delay(journal.key(), value) for value in range(1, 6)]
    assert len({result.id for result in results}) == 1
    journal.open("a")
    assert first.get(timeout=PATIENCE) == 0
    assert [result.get(timeout=PATIENCE) for result in results] == [5] * 5
    journal.wait("coalesce_drain", timeout=PATIENCE)
    starts = [(each["task_id"], each["coalesce_run_index"]) for each in journal.events("start")]
    assert starts == [(first.id, 0), (results[0].id, 1)]
    words = [each["event"] for each in journal.events() if each["event"].startswith("coalesce_")]
    assert words == ["coalesce_start", "coalesce_success"] * 2 + ["coalesce_drain"]


def test_runs_of_one_key_never_overlap_and_keep_their_order(
    app: HarnessApp, worker: WorkerProcess, journal: Journal
) -> None:
    """Two keys take their turns side by side, five runs each."""
    serialize = app.tasks["serialize"]
    results = [serialize.delay(journal.key(key), n, gate=key) for n in range(5) for key in "ab"]
    journal.wait("start", timeout=PATIENCE)
    for key in "ab":
        journal.open(key, 5)
    assert [result.get(timeout=PATIENCE) for result in results] == [n for n in range(5) for _ in "ab"]
    for key, own in (("a", results[::2]), ("b", results[1::2])):
        starts = journal.events("start", key=key)
        assert [each["task_id"] for each in starts] == [result.id for result in own]
    assert_no_overlap(journal.events())


def test_a_failure_frees_the_key(app: HarnessApp, worker: WorkerProcess, journal: Journal) -> None:
    """The error reaches its caller, what waits still runs, and the key can be used again."""
    queue, key = app.tasks["queue"], journal.key()
    bad = queue.delay(key, error="boom", gate="a")
    journal.wait("start", timeout=PATIENCE)
    next_one = queue.delay(key, 1)
    journal.open("a")
    with pytest.raises(RuntimeError, match="boom"):
        bad.get(timeout=PATIENCE)
    assert next_one.get(timeout=PATIENCE) == 1
    journal.wait("coalesce_drain", timeout=PATIENCE)
    assert len(journal.events("coalesce_error")) == 1
    again = queue.delay(key, 2)
    assert again.disposition is Disposition.DISPATCHED
    assert again.get(timeout=PATIENCE) == 2


def test_a_retry_keeps_the_run(app: HarnessApp, worker: WorkerProcess, journal: Journal) -> None:
    """All attempts are one run with one id, and what waits comes after the last."""
    retry, key = app.tasks["queue_retry"], journal.key()
    first = retry.delay(key, times=2, value=1, gate="a")
    journal.wait("start", timeout=PATIENCE)
    second = retry.delay(key, times=0, value=2)
    journal.open("a", 3)
    assert first.get(timeout=PATIENCE) == 1
    assert second.get(timeout=PATIENCE) == 2
    journal.wait("coalesce_drain", timeout=PATIENCE)
    starts = journal.events("start")
    assert [each["task_id"] for each in starts] == [first.id] * 3 + [second.id]
    assert [each["coalesce_attempt"] for each in starts] == [0, 1, 2, 0]
    runs = [each["coalesce_run_id"] for each in starts]
    assert runs == [first.run_id] * 3 + [second.run_id]
    assert_no_overlap(journal.events())


def test_a_countdown_is_kept_unless_an_earlier_call_joins(
    app: HarnessApp, worker: WorkerProcess, journal: Journal
) -> None:
    """A run starts at its due time, which is the earliest that any of its calls asked for."""
    queue = app.tasks["queue"]
    journal.record("called")
    late = queue.apply_async((journal.key("late"), 1), countdown=1)
    hasty = queue.apply_async((journal.key("hasty"), 2), countdown=600)
    joined = queue.delay(journal.key("hasty"), 3)
    assert joined.disposition is Disposition.COALESCED
    assert hasty.get(timeout=PATIENCE) == joined.get(timeout=PATIENCE) == 3
    assert late.get(timeout=PATIENCE) == 1
    waited = journal.wait("start", key="late")["time"] - journal.wait("called")["time"]
    assert waited > 0.999
    assert len(journal.events("start")) == 2


def test_a_chord_with_duplicate_members_fires_its_body_once(
    app: HarnessApp, worker: WorkerProcess, journal: Journal
) -> None:
    """Three members that one run covers are three results to the chord."""
    queue, collect, key = app.tasks["queue"], app.tasks["collect"], journal.key()
    running = queue.delay(key, 0, gate="a")
    journal.wait("start", timeout=PATIENCE)
    result = chord(queue.s(key, n) for n in (1, 2, 3))(collect.s(key=journal.key("body")))
    journal.open("a")
    assert result.get(timeout=PATIENCE) == [3, 3, 3]
    assert running.get(timeout=PATIENCE) == 0
    assert [member.get(timeout=PATIENCE) for member in result.parent] == [3, 3, 3]
    journal.wait("coalesce_drain", timeout=PATIENCE)
    assert len(journal.events("start", key="key")) == 2
    assert len(journal.events("start", key="body")) == 1


def test_send_task_is_admitted_at_the_gate(
    app: HarnessApp, worker: WorkerProcess, journal: Journal, environment: Environment
) -> None:
    """Messages that carry no run obey the same rules; a solo worker meets them after its run."""
    key, solo = journal.key(), environment.pool == "solo"
    first = app.tasks["queue"].delay(key, 0, gate="a")
    journal.wait("start", timeout=PATIENCE)
    foreign = [app.send_task("queue", (key, value)) for value in (1, 2)]
    if not solo:
        journal.wait("coalesce_trigger", count=2, timeout=PATIENCE)
    journal.open("a")
    assert first.get(timeout=PATIENCE) == 0
    values = [result.get(timeout=PATIENCE) for result in foreign]
    journal.wait("coalesce_drain", timeout=PATIENCE)
    words = [each["disposition"] for each in journal.events("coalesce_trigger")]
    if solo:
        assert values == [1, 2]
        assert words == ["dispatched", "dispatched"]
    else:
        assert values == [2, 2]
        assert words == ["queued", "coalesced"]
        assert len(journal.events("start")) == 2
    assert_no_overlap(journal.events())


def test_an_idle_key_leaves_nothing(app: HarnessApp, worker: WorkerProcess, journal: Journal) -> None:
    """After a burst, a retry, a failure and a countdown the store has never heard of the key."""
    queue, key = app.tasks["queue"], journal.key()
    queue.apply_async((key, 0), {"gate": "a"}, countdown=0.2)
    journal.wait("start", timeout=PATIENCE)
    assert traces(app, "queue", key) != []
    follower = queue.apply_async((key, 1), {"error": "boom"}, task_id=f"own-{journal.name}")
    journal.open("a")
    with pytest.raises(RuntimeError, match="boom"):
        follower.get(timeout=PATIENCE)
    journal.wait("coalesce_drain", timeout=PATIENCE)
    assert traces(app, "queue", key) == []

    retry = app.tasks["queue_retry"]
    assert retry.delay(key, times=1, value=2).get(timeout=PATIENCE) == 2
    journal.wait("coalesce_drain", count=2, timeout=PATIENCE)
    assert traces(app, "queue_retry", key) == []
