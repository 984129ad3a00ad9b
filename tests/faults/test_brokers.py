"""A broker that restarts, and one that loses its queue, while the state server goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.faults.stories import assert_told_once
from tests.integration.sites import Site
from tests.support.app import HarnessApp
from tests.support.journal import Journal
from tests.support.process import wait_until
from tests.support.rabbit import RabbitServer
from tests.support.servers import ValkeyServer

MakeSite = Callable[..., Site]

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def broker() -> Iterator[RabbitServer]:
    """A RabbitMQ that may be killed."""
    with RabbitServer() as server:
        yield server


@pytest.mark.parametrize(("name", "end"), [("queue", "kill"), ("queue_late", "stop")])
def test_rabbitmq_restarts_while_one_runs_and_others_wait(
    name: str, end: str, broker: RabbitServer, make_site: MakeSite, journal: Journal
) -> None:
    """A run goes on without its broker; a message that it kept comes again, and is known."""
    # Killed, RabbitMQ forgets what it has not confirmed, and so may a publisher whose connection is broken.
    confirmed = {"broker_transport_options": {"confirm_publish": True}} if end == "kill" else {}
    site = make_site(broker=broker.url, coalesce_redispatch_after=30, **confirmed)
    worker = site.worker(concurrency=1)
    task = site.app.tasks[name]
    first = task.delay(journal.key(), 1, gate="g")
    journal.wait("start", timeout=20)
    second = task.delay(journal.key(), 2)
    waiting = task.delay(journal.key("waiting"), 3)
    getattr(broker, end)()
    wait_until(lambda: "Connection to broker lost" in worker.logs(), 20)
    merged = task.delay(journal.key(), 4)  # it needs no broker
    assert merged.run_task_id == second.id
    broker.start()
    journal.open("g", 2)

    assert first.get(timeout=20) == 1
    assert second.get(timeout=20) == 4
    assert waiting.get(timeout=20) == 3
    site.wait_idle()
    assert_told_once(journal, runs=2)
    assert_told_once(journal, "waiting", runs=1)
    assert not journal.events("coalesce_lost")


def test_a_run_ends_while_rabbitmq_is_away(broker: RabbitServer, make_site: MakeSite, journal: Journal) -> None:
    """Its follow-up has its slot, and is published when the broker is back."""
    site = make_site(broker=broker.url, coalesce_redispatch_after=30)
    worker = site.worker(concurrency=1)
    queue = site.app.tasks["queue"]
    first = queue.delay(journal.key(), 1, gate="g")
    journal.wait("start", timeout=20)
    second = queue.delay(journal.key(), 2)
    broker.kill()
    journal.open("g")
    assert first.get(timeout=20) == 1
    wait_until(lambda: "could not be published" in worker.logs(), 30)
    wait_until(site.noted_as_unpublished)
    broker.start()
    site.timers_are_over()  # a minute later
    assert second.get(timeout=30) == 2
    site.wait_idle()
    assert_told_once(journal, runs=2)


@pytest.mark.parametrize("kind", ["valkey", "rabbit"])
def test_a_broker_loses_its_queue(kind: str, make_site: MakeSite, journal: Journal, request: Any) -> None:
    """Nobody brings the messages: each run is published again after `coalesce_redispatch_after`, and runs once."""
    if kind == "rabbit":
        url = request.getfixturevalue("broker").url
    else:
        url = request.getfixturevalue("state_server").new_db()
    site = make_site(broker=url, coalesce_redispatch_after=2)
    queue, serialize = site.app.tasks["queue"], site.app.tasks["serialize"]
    results = [queue.delay(journal.key(f"k{n}"), n) for n in range(3)]
    queue.delay(journal.key("k0"), 7)
    delayed = queue.apply_async((journal.key("delayed"), 3), countdown=0.5)
    serial = [serialize.delay(journal.key("serial"), n) for n in range(2)]
    lose_queue(site.app, kind)
    worker = site.worker()

    assert [result.get(timeout=20) for result in results] == [7, 1, 2]
    assert delayed.get(timeout=20) == 3
    assert [each.get(timeout=20) for each in serial] == [0, 1]
    site.wait_idle()
    for key in ("k0", "k1", "k2", "delayed"):
        assert_told_once(journal, key, runs=1)
    assert_told_once(journal, "serial", runs=2)
    assert "its message was lost" in worker.logs()


def lose_queue(app: HarnessApp, kind: str) -> None:
    """Lose all messages, as a broker does that forgot its queue."""
    with app.connection_for_write() as connection:
        channel = connection.default_channel
        if kind == "rabbit":
            wait_until(lambda: channel.queue_declare(app.conf.task_default_queue, passive=True).message_count == 5)
            channel.queue_delete(app.conf.task_default_queue)
        else:
            assert channel.client.llen(app.conf.task_default_queue) == 5
            channel.client.flushdb()


def test_a_broker_loses_its_queue_while_a_run_goes_on(make_site: MakeSite, journal: Journal) -> None:
    """Broker and unacknowledged messages are gone; the run and what waits behind it do not need them."""
    with ValkeyServer() as broker:
        site = make_site(broker=broker.url(), coalesce_redispatch_after=2)
        site.worker(concurrency=1)
        late = site.app.tasks["queue_late"]
        first = late.delay(journal.key(), 1, gate="g")
        journal.wait("start", timeout=20)
        second = late.delay(journal.key(), 2)
        third = late.delay(journal.key("third"), 3)
        with broker.client() as client:
            client.flushall()
        journal.open("g")
        assert first.get(timeout=20) == 1
        assert second.get(timeout=20) == 2
        assert third.get(timeout=20) == 3
        site.wait_idle()
        assert_told_once(journal, runs=2)
        assert_told_once(journal, "third", runs=1)
