"""Messages that a worker alone has, and the broker does not keep: those that only wake it for a run."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, cast

import pytest
import redis
from celery.utils import uuid

from celery_coalesce import LeaseLost
from celery_coalesce.dispatch import named_run, run_header
from celery_coalesce.engine import engine_of
from celery_coalesce.keys import state_id
from celery_coalesce.records import Lease
from celery_coalesce.states import Answer
from celery_coalesce.worker.presence import WorkerPresence
from celery_coalesce.worker.wakeups import keep_no_wakeups, need_not_keep
from tests.integration.sites import queued, unacknowledged
from tests.support.app import HarnessApp, redeliver
from tests.support.journal import Journal
from tests.support.process import wait_until
from tests.support.servers import ValkeyServer
from tests.support.worker import WorkerProcess

#: By what each supported version of kombu does.
pytestmark = pytest.mark.core

MakeApp = Callable[..., HarnessApp]
MakeWorker = Callable[..., WorkerProcess]

PREFIX = "p:"
KEPT = ("unacked", "unacked_index")
#: What a message of that id says of its run.
RUN = run_header(state_id("queue", "k"), "1", "own")


@pytest.fixture(params=["", PREFIX], ids=["plain", "prefixed"])
def app(make_app: MakeApp, request: pytest.FixtureRequest) -> HarnessApp:
    """An app whose broker is its state server, and puts a prefix before names or none."""
    return make_app(conf={"broker_transport_options": {"global_keyprefix": request.param}} if request.param else {})


@contextmanager
def consuming(app: HarnessApp) -> Iterator[Any]:
    """Give a channel as a worker consumes from it."""
    with app.connection_for_read() as connection:
        channel = connection.default_channel
        if need_not_keep(engine_of(app), channel):
            keep_no_wakeups(engine_of(app), channel)
        yield channel


def delivered(app: HarnessApp, channel: Any) -> Any:
    """Return the oldest message, delivered."""
    message = channel.basic_get(app.conf.task_default_queue)
    assert message is not None
    return message


def waiting(app: HarnessApp) -> list[Any]:
    """Return the messages in the queue, the next one first."""
    with app.connection_for_read() as connection:
        channel = connection.default_channel
        found = []
        while (message := channel.basic_get(app.conf.task_default_queue, no_ack=True)) is not None:
            found.append(message)
        return found


def keeps(app: HarnessApp, channel: Any) -> int:
    """Return how many messages the broker keeps: in both places."""
    unacked, index = (channel.global_keyprefix + name for name in KEPT)
    client = client_of(app)
    numbers = {client.hlen(unacked), client.zcard(index)}
    assert len(numbers) == 1
    return cast("int", numbers.pop())


def client_of(app: HarnessApp) -> redis.Redis:
    return cast("redis.Redis", engine_of(app).transitions.store._connected())  # type: ignore[attr-defined]


def start(app: HarnessApp, message: Any, claim: str = "c", **given: Any) -> Any:
    headers = message.headers
    envelope = named_run(headers["coalesce"], headers["id"], headers["task"])
    assert envelope is not None
    asked: dict[str, Any] = {"owner": "w/1/a", "claim": claim, "late": False, "revoked": False, **given}
    return engine_of(app).transitions.start(envelope, **asked)


class TestAWakeup:
    def test_is_not_kept(self, app: HarnessApp, journal: Journal) -> None:
        app.tasks["queue"].delay(journal.key(), 1)
        with consuming(app) as channel:
            message = delivered(app, channel)
            assert keeps(app, channel) == 0
            message.ack()
        assert waiting(app) == []

    def test_counts_until_it_is_acknowledged(self, app: HarnessApp, journal: Journal) -> None:
        """As any message does, for what may be fetched."""
        app.tasks["queue"].delay(journal.key(), 1)
        with consuming(app) as channel:
            channel.basic_qos(0, 1, False)
            message = delivered(app, channel)
            assert not channel.qos.can_consume()
            message.ack_log_error("logger", ())
            assert message.acknowledged
            assert channel.qos.can_consume()

    def test_is_put_back_when_its_worker_lets_it_go(self, app: HarnessApp, journal: Journal) -> None:
        """Whole, once, by its priority; others that it has acknowledged are not."""
        task = app.tasks["queue"]
        results = [
            task.apply_async((journal.key(str(n)), n), priority=priority) for n, priority in enumerate((0, 0, 9))
        ]
        with consuming(app) as channel:
            acknowledged, *others = [delivered(app, channel) for _ in results]
            acknowledged.ack()
        back = waiting(app)
        assert [message.headers["id"] for message in back] == [message.headers["id"] for message in others]
        for message, before in zip(back, others, strict=True):
            assert (message.body, message.headers) == (before.body, before.headers)
            assert message.properties["delivery_info"]["redelivered"]
            assert start(app, message).answer is Answer.RUNNING

    @pytest.mark.parametrize("kept", [False, True])
    def test_is_requeued_where_any_other_is(self, kept: bool, make_app: MakeApp, journal: Journal) -> None:
        app = make_app(conf={"coalesce_broker_shortcuts": not kept})
        results = [app.tasks["queue"].delay(journal.key(str(n)), n) for n in range(2)]
        with consuming(app) as channel:
            message = delivered(app, channel)
            assert keeps(app, channel) == kept
            message.requeue()
        assert [message.headers["id"] for message in waiting(app)] == [results[1].id, results[0].id]

    def test_goes_when_it_is_rejected(self, app: HarnessApp, journal: Journal) -> None:
        app.tasks["queue"].delay(journal.key(), 1)
        with consuming(app) as channel:
            delivered(app, channel).reject()
        assert waiting(app) == []

    @pytest.mark.parametrize("kept", [False, True])
    def test_is_left_to_its_record_by_a_server_that_is_away(
        self, kept: bool, make_app: MakeApp, journal: Journal
    ) -> None:
        """Whoever wants to put it back hears of that as with any other message."""
        with ValkeyServer() as server:
            app = make_app(server.url(), conf={"coalesce_broker_shortcuts": not kept})
            app.tasks["queue"].delay(journal.key(), 1)
            connection = app.connection_for_read()
            channel = connection.default_channel
            if not kept:
                keep_no_wakeups(engine_of(app), channel)
            message = delivered(app, channel)
            server.stop()
            with pytest.raises(channel.connection_errors):
                message.requeue()
            with pytest.raises(channel.connection_errors):
                channel.qos.restore_unacked_once()
            channel.qos._delivered.clear()


class TestAnyOther:
    @pytest.mark.parametrize(
        ("name", "header"),
        [
            ("queue", None),
            ("queue", {"exempt": True}),
            ("queue", {**RUN, "exempt": True}),
            ("queue", {**RUN, "run": "no number"}),
            ("queue", {**RUN, "id": "another's"}),
            ("queue", "run"),
            ("plain", RUN),
            ("unheard_of", RUN),
        ],
        ids=["no run", "exempt", "exempt run", "bad run", "another's run", "not ours", "plain", "unknown"],
    )
    def test_is_kept(self, name: str, header: object, app: HarnessApp, journal: Journal) -> None:
        app.send_task(name, (journal.key(), 1), headers={"coalesce": header} if header else {}, task_id="own")
        with consuming(app) as channel:
            message = delivered(app, channel)
            assert keeps(app, channel) == 1
            message.ack()
            assert keeps(app, channel) == 0

    def test_is_kept_that_has_another_s_headers(
        self, make_app: MakeApp, make_worker: MakeWorker, journal: Journal
    ) -> None:
        """Of a body that hands its request's headers on, as tracers do: a call, which no killed worker takes along."""
        app = make_app()
        queue = app.tasks["queue"]
        first = queue.delay(journal.key("first"), 1, gate="a")
        with consuming(app) as channel:
            message = delivered(app, channel)
            headers = {"coalesce": message.headers["coalesce"]}
            message.requeue()
        worker = make_worker(app, concurrency=1)
        journal.wait("start", timeout=20)
        second = app.send_task("queue", (journal.key("second"), 2), headers=headers)
        wait_until(lambda: f"[{second.id}] received" in worker.logs(), 20)
        worker.kill()
        make_worker(app)
        redeliver(app)
        assert second.get(timeout=20) == 2
        journal.open("a")
        assert first.id != second.id

    def test_is_kept_whatever_its_task_is(self, app: HarnessApp) -> None:
        """What is no task's name raises nothing here."""
        with consuming(app) as channel:
            for task in ([], None, 1):
                with app.producer_or_acquire() as producer:
                    producer.publish(
                        {},
                        routing_key=app.conf.task_default_queue,
                        headers={"id": "own", "task": task, "coalesce": RUN},
                    )
                message = delivered(app, channel)
                assert keeps(app, channel) == 1
                message.ack()

    @pytest.mark.parametrize(
        "conf",
        [
            {"coalesce_broker_shortcuts": False},
            {"broker_transport_options": {"ack_emulation": False}},
        ],
        ids=["turned off", "nothing is kept"],
    )
    def test_is_every_message_where_that_is_not_known_to_be_right(
        self, conf: dict[str, Any], make_app: MakeApp, journal: Journal
    ) -> None:
        app = make_app(conf=conf)
        app.tasks["queue"].delay(journal.key(), 1)
        with consuming(app) as channel:
            assert not getattr(delivered(app, channel), "is_unkept", False)

    def test_is_every_message_of_another_server(self, app: HarnessApp, make_app: MakeApp, journal: Journal) -> None:
        """Of a broker that is read elsewhere than it is written, or that failed over: another database is enough."""
        app.tasks["queue"].delay(journal.key(), 1)
        address, _, number = str(app.given["broker"]).rpartition("/")
        other = make_app(conf={"broker_write_url": f"{address}/{(int(number) + 1) % 16}"})
        with app.connection_for_read() as connection:
            assert need_not_keep(engine_of(app), connection.default_channel)
            assert not need_not_keep(engine_of(other), connection.default_channel)


class TestAWorker:
    def test_tells_the_broker_nothing(self, make_app: MakeApp, make_worker: MakeWorker, journal: Journal) -> None:
        """Whenever its runs are acknowledged."""
        with ValkeyServer() as server:
            self._tells(make_app(server.url()), make_worker, journal)

    @staticmethod
    def _tells(app: HarnessApp, make_worker: MakeWorker, journal: Journal) -> None:
        make_worker(app)
        engine, client = engine_of(app), client_of(app)

        def transactions() -> int:
            return cast("int", client.info("commandstats")["cmdstat_exec"]["calls"])

        app.tasks["queue"].delay(journal.key("warm"), 1).get(timeout=20)
        wait_until(lambda: engine.transitions.show("queue", journal.key("warm")) is None, 10)
        before = transactions()
        names = ("queue", "queue_late")
        results = [app.tasks[name].delay(journal.key(name), name, gate="a") for name in names]
        for name in names:
            journal.wait("start", key=name, timeout=20)
        assert unacknowledged(app) == 0
        journal.open("a", len(names))
        assert [result.get(timeout=20) for result in results] == list(names)
        # Kombu notes in a transaction that a message was delivered, and in another that it was acknowledged.
        assert transactions() == before

    @pytest.mark.parametrize("elsewhere", [False, True])
    def test_leaves_what_the_records_may_outlive_to_the_broker(
        self, elsewhere: bool, make_app: MakeApp, make_worker: MakeWorker, journal: Journal
    ) -> None:
        """Where records and messages are not in one database, one of them may be lost without the other."""
        app = make_app()
        if elsewhere:
            address, _, number = str(app.given["broker"]).rpartition("/")
            app = make_app(conf={"coalesce_redis_url": f"{address}/{(int(number) + 1) % 16}"})
        results = [app.tasks["queue"].delay(journal.key(str(n)), n, gate="a") for n in range(3)]
        make_worker(app, concurrency=1)
        wait_until(lambda: queued(app) == 0, 20)
        # One runs, and is acknowledged.
        journal.wait("start", timeout=20)
        wait_until(lambda: unacknowledged(app) == (len(results) - 1 if elsewhere else 0), 10)
        journal.open("a", len(results))
        assert [result.get(timeout=20) for result in results] == [0, 1, 2]

    def test_fetches_as_much_as_ever_after_its_connection_was_lost(
        self, make_app: MakeApp, make_worker: MakeWorker, journal: Journal, state_server: ValkeyServer
    ) -> None:
        """Celery fetches less at first, and more with each message that is acknowledged."""
        app = make_app()
        worker = make_worker(app, concurrency=3)
        results = [app.tasks["queue"].delay(journal.key(str(n)), n, gate="a") for n in range(2)]
        for n in range(len(results)):
            journal.wait("start", key=str(n), timeout=20)
        cut(app, state_server)
        wait_until(lambda: "the prefetch count to " in worker.logs() or "Skipping prefetch" in worker.logs(), 20)
        if "Skipping prefetch" in worker.logs():
            pytest.skip("this Celery fetches no less")
        # Before others come: Celery 5.5 gives them to any child now, busy or not.
        journal.open("a", len(results))
        assert [result.get(timeout=20) for result in results] == [0, 1]
        for n in range(2, 12):
            app.tasks["queue"].delay(journal.key(str(n)), n).get(timeout=20)
        wait_until(lambda: "restored to the maximum" in worker.logs(), 10)

    def test_fetches_no_more_than_it_may(self, make_app: MakeApp, make_worker: MakeWorker, journal: Journal) -> None:
        """What stands in the queue of a pool's threads is not done with, though the broker has let go of it."""
        app = make_app()
        results = [app.tasks["queue"].delay(journal.key(str(n)), n, gate="a") for n in range(8)]
        worker = make_worker(app, pool="threads", concurrency=1, extra_args=["--prefetch-multiplier", "3"])
        # One runs, which counts no more.
        wait_until(lambda: queued(app) == len(results) - 4, 20)
        # The worker's event loop, which fetches, has gone round.
        for _ in range(3):
            assert app.control.inspect([worker.hostname], timeout=10).ping()
        assert queued(app) == len(results) - 4
        assert unacknowledged(app) == 0
        journal.open("a", len(results))
        assert [result.get(timeout=20) for result in results] == list(range(len(results)))

    @pytest.mark.parametrize("pool", ["prefork", "threads", "solo", "gevent"])
    def test_leaves_nothing_to_be_delivered_again(
        self, pool: str, make_app: MakeApp, make_worker: MakeWorker, journal: Journal
    ) -> None:
        """Nor does it give anything back when it stops."""
        app = make_app()
        worker = make_worker(app, pool=pool)
        results = app.tasks["queue"].batch_delay([(journal.key(str(n)), n) for n in range(20)])
        assert [result.get(timeout=20) for result in results] == list(range(20))
        assert worker.stop() == 0
        with app.connection_for_read() as connection:
            client = connection.default_channel.client
            assert client.exists(*KEPT, app.conf.task_default_queue) == 0
        assert len(journal.events("start")) == len(results)

    @pytest.mark.parametrize("pool", ["prefork", "threads"])
    def test_gives_back_what_waits_for_a_place_in_its_pool(
        self, pool: str, make_app: MakeApp, make_worker: MakeWorker, journal: Journal
    ) -> None:
        """When it stops: whatever it had fetched runs elsewhere, at once, unless its own threads do it still."""
        app = make_app()
        results = [app.tasks["queue"].delay(journal.key(str(n)), n, gate="a") for n in range(4)]
        worker = make_worker(app, pool=pool, concurrency=1)
        wait_until(lambda: queued(app) == 0, 20)
        journal.wait("start", timeout=20)
        worker.signal(signal.SIGTERM)
        wait_until(lambda: "Warm shutdown" in worker.logs(), 10)
        make_worker(app, concurrency=1)
        journal.open("a", len(results))
        assert [result.get(timeout=20) for result in results] == list(range(len(results)))
        assert len(journal.events("start")) == len(results)
        assert worker.wait(20) == 0

    def test_gives_back_what_it_had_fetched_when_its_connection_was_lost(
        self, make_app: MakeApp, make_worker: MakeWorker, journal: Journal, state_server: ValkeyServer
    ) -> None:
        """A run that had not begun goes on at once, and no run twice; nor is anything kept from then on."""
        app = make_app()
        results = [app.tasks["queue"].delay(journal.key(str(n)), n, gate="a") for n in range(4)]
        worker = make_worker(app, concurrency=1)
        wait_until(lambda: queued(app) == 0, 20)
        journal.wait("start", timeout=20)
        before = worker.logs().count(" received")
        cut(app, state_server)
        # One runs; the others have come again.
        wait_until(lambda: worker.logs().count(" received") == before + 3, 20)
        assert unacknowledged(app) == 0
        journal.open("a", len(results))
        assert [result.get(timeout=20) for result in results] == list(range(len(results)))
        assert len(journal.events("start")) == len(results)

    @pytest.mark.parametrize("name", ["queue", "queue_late"])
    def test_that_is_killed_loses_none_of_what_it_had_fetched(
        self, name: str, make_app: MakeApp, make_worker: MakeWorker, journal: Journal
    ) -> None:
        """Their records have them sent again, `coalesce_redispatch_after` after they were."""
        app = make_app(conf={"coalesce_redispatch_after": 8, "coalesce_lease": 2})
        worker = make_worker(app, concurrency=1)
        results = [app.tasks[name].delay(journal.key(str(n)), n, gate="a") for n in range(4)]
        wait_until(lambda: worker.logs().count(" received") == len(results), 7)
        first = journal.wait("start", timeout=20)
        worker.kill()
        # Nobody has them but the records.
        assert queued(app) == unacknowledged(app) == 0
        journal.open("a", len(results) + 1)
        make_worker(app, concurrency=1)
        begun = results.pop(int(first["key"]))
        assert {result.get(timeout=30) for result in results} == {0, 1, 2, 3} - {int(first["key"])}
        if name == "queue":
            with pytest.raises(LeaseLost):
                begun.get(timeout=30)
        else:
            # Once more, as it is acknowledged late.
            assert begun.get(timeout=30) == int(first["key"])
        again = name == "queue_late"
        assert len(journal.events("start")) == 4 + again

    def test_puts_back_what_it_holds_and_nothing_that_has_ended(
        self, make_app: MakeApp, make_worker: MakeWorker, journal: Journal
    ) -> None:
        """One that waits for its time, beside a revoked and an expired one."""
        # A message is held for two heartbeats at most, of which there are three in a lease.
        app = make_app(conf={"coalesce_lease": 90})
        task = app.tasks["queue"]
        worker = make_worker(app, concurrency=1)
        held = task.apply_async((journal.key("held"), 1), countdown=40).id
        expired = task.apply_async((journal.key("expired"), 2), expires=-1).id
        revoked = uuid()
        app.control.revoke(revoked)
        wait_until(lambda: revoked in (app.control.inspect([worker.hostname]).revoked() or {})[worker.hostname], 20)
        task.apply_async((journal.key("revoked"), 3), task_id=revoked)
        wait_until(lambda: {app.AsyncResult(each).state for each in (expired, revoked)} == {"REVOKED"}, 20)
        wait_until(lambda: worker.logs().count(" received") == 3, 20)
        assert worker.stop() == 0
        [back] = waiting(app)
        assert back.headers["id"] == held
        assert start(app, back).answer is Answer.EARLY

    def test_hands_back_what_its_pool_never_took(self, make_app: MakeApp, journal: Journal) -> None:
        """By a new message: another worker may have had the old one, and found the run running."""
        app = make_app()
        presence = WorkerPresence(cast("Any", SimpleNamespace(app=app, hostname="w")))
        result = app.tasks["queue"].delay(journal.key(), 1)
        with consuming(app) as channel:
            lease: Lease = start(app, delivered(app, channel), owner=presence.owner).lease
        [back] = waiting(app)
        assert start(app, back, "another").answer is Answer.DUPLICATE
        presence.leased(lease, cast("Any", None))
        presence._goodbye()
        [again] = waiting(app)
        assert again.headers["coalesce"]["run"] == str(result.run_id)
        assert start(app, again, "another").answer is Answer.RUNNING


def cut(app: HarnessApp, server: ValkeyServer) -> None:
    """Have the connections closed on which workers wait for messages of an app's broker."""
    with server.client() as client:
        for each in client.client_list(_type="normal"):
            if each["cmd"] == "brpop" and each["db"] == str(app.given["broker"]).rsplit("/", 1)[1]:
                client.client_kill_filter(_id=each["id"])
