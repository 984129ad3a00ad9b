"""Messages that the script acknowledges which gives their run its lease: as kombu would, and only then."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, cast

import pytest
import redis

from celery_coalesce.broker import settle
from celery_coalesce.dispatch import named_run
from celery_coalesce.engine import engine_of
from celery_coalesce.records import Lease, Receipt
from celery_coalesce.states import Answer
from celery_coalesce.worker.presence import WorkerPresence
from tests.support.app import HarnessApp
from tests.support.journal import Journal
from tests.support.process import wait_until
from tests.support.servers import ValkeyServer
from tests.support.worker import WorkerProcess

#: By what each supported version of kombu does.
pytestmark = pytest.mark.core

MakeApp = Callable[..., HarnessApp]
MakeWorker = Callable[..., WorkerProcess]

PREFIX = "p:"


@pytest.fixture(params=["", PREFIX], ids=["plain", "prefixed"])
def app(make_app: MakeApp, request: pytest.FixtureRequest) -> HarnessApp:
    """An app whose broker is its state server, and puts a prefix before names or none."""
    return make_app(conf={"broker_transport_options": {"global_keyprefix": request.param}} if request.param else {})


@contextmanager
def delivered(app: HarnessApp, queue: str = "") -> Iterator[Any]:
    """Give the oldest message of a queue, as a worker has it."""
    with app.connection_for_read() as connection:
        message = connection.default_channel.basic_get(queue or app.conf.task_default_queue)
        assert message is not None
        yield message


def receipt_of(app: HarnessApp, message: Any) -> Receipt:
    broker = engine_of(app).broker
    assert broker is not None
    receipt = broker.receipt_of(message)
    assert receipt is not None
    return receipt


def is_kept(app: HarnessApp, receipt: Receipt) -> bool:
    """Return whether the broker keeps a message: in both places, or in none."""
    client = engine_of(app).transitions.store._connected()  # type: ignore[attr-defined]
    kept = bool(client.hexists(receipt.unacked, receipt.tag))
    assert kept == (client.zscore(receipt.unacked_index, receipt.tag) is not None)
    return kept


def start(app: HarnessApp, message: Any, receipt: Receipt | None, claim: str = "c", **given: Any) -> Any:
    headers = message.headers
    envelope = named_run(headers["coalesce"], headers["id"], headers["task"])
    assert envelope is not None
    asked: dict[str, Any] = {"owner": "w/1/a", "claim": claim, "late": False, "revoked": False, **given}
    return engine_of(app).transitions.start(envelope, receipt=receipt, **asked)


class TestAReceipt:
    def test_names_what_kombu_would_remove(self, app: HarnessApp, journal: Journal) -> None:
        """And nothing else is done to acknowledge a message, in the server."""

        class Pipe:
            def __init__(self, prefix: str) -> None:
                self.prefix = prefix
                self.removed: dict[str, tuple[str, str]] = {}

            def __getattr__(self, name: str) -> Any:
                def note(key: str, tag: str) -> Pipe:
                    self.removed[name] = (self.prefix + key, tag)
                    return self

                return note

        app.tasks["queue"].delay(journal.key(), 1)
        with delivered(app) as message:
            pipe = Pipe(message.channel.global_keyprefix)
            message.channel.qos._remove_from_indices(message.delivery_tag, pipe)
            unacked, index, tag = receipt = receipt_of(app, message)
            assert pipe.removed == {"hdel": (unacked, tag), "zrem": (index, tag)}
            assert is_kept(app, receipt)

    def test_is_settled_as_kombu_acknowledges(self, app: HarnessApp, journal: Journal) -> None:
        """It counts no more for what may be fetched, is not acknowledged again, and is not given back."""
        app.tasks["queue"].delay(journal.key(), 1)
        with delivered(app) as message:
            channel = message.channel
            channel.basic_qos(0, 1, False)
            assert not channel.qos.can_consume()
            start(app, message, receipt_of(app, message))
            assert not channel.qos.can_consume()
            settle(message)
            message.ack_log_error("logger", ())
            assert channel.qos.can_consume()
            assert message.acknowledged
        with app.connection_for_read() as connection:
            assert connection.default_channel.basic_get(app.conf.task_default_queue) is None

    @pytest.mark.parametrize(
        "conf",
        [
            {"coalesce_broker_by_script": False},
            {"broker_transport_options": {"ack_emulation": False}},
        ],
        ids=["turned off", "nothing is kept"],
    )
    def test_is_none_where_that_is_not_for_a_script(
        self, conf: dict[str, Any], make_app: MakeApp, journal: Journal
    ) -> None:
        app = make_app(conf=conf)
        app.tasks["queue"].delay(journal.key(), 1)
        broker = engine_of(app).broker
        with delivered(app) as message:
            assert broker is None or broker.receipt_of(message) is None

    def test_is_none_on_another_server(self, app: HarnessApp, make_app: MakeApp, journal: Journal) -> None:
        """A broker that is read elsewhere than it is written, or that failed over: another database is enough."""
        app.tasks["queue"].delay(journal.key(), 1)
        address, _, number = str(app.given["broker"]).rpartition("/")
        other = make_app(conf={"broker_write_url": f"{address}/{(int(number) + 1) % 16}"})
        broker = engine_of(other).broker
        assert broker is not None
        with delivered(app) as message:
            assert broker.receipt_of(message) is None


class TestTheScript:
    def test_acknowledges_the_message_of_a_run_that_starts(self, app: HarnessApp, journal: Journal) -> None:
        """As often as it is asked in the same name; a duplicate stays, for the worker to drop."""
        app.tasks["queue"].delay(journal.key(), 1)
        with delivered(app) as message:
            receipt = receipt_of(app, message)
            started = start(app, message, receipt)
            assert started.answer is Answer.RUNNING
            assert started.lease.acknowledged
            assert not is_kept(app, receipt)
            assert start(app, message, receipt) == started
            message.channel.qos.append(message, message.delivery_tag)
            assert start(app, message, receipt, "another").answer is Answer.DUPLICATE
            assert is_kept(app, receipt)

    @pytest.mark.parametrize(
        ("options", "given", "answer"),
        [
            ({"countdown": 5}, {}, Answer.EARLY),
            ({"expires": -1}, {}, Answer.EXPIRED),
            ({}, {"revoked": True}, Answer.REVOKED),
        ],
    )
    def test_leaves_every_other(
        self, options: dict[str, Any], given: dict[str, Any], answer: Answer, app: HarnessApp, journal: Journal
    ) -> None:
        """One that is held, or whose end is still to be told."""
        app.tasks["queue"].apply_async((journal.key(), 1), **options)
        with delivered(app) as message:
            receipt = receipt_of(app, message)
            started = start(app, message, receipt, **given)
            assert started.answer is answer
            assert started.lease is None or not started.lease.acknowledged
            assert is_kept(app, receipt)


class TestAWorker:
    def test_acknowledges_early_ones_only(self, make_app: MakeApp, make_worker: MakeWorker, journal: Journal) -> None:
        """One that is acknowledged late is the broker's until its run has ended."""
        with ValkeyServer() as server:
            self._acknowledges(make_app(server.url()), make_worker, journal)

    @staticmethod
    def _acknowledges(app: HarnessApp, make_worker: MakeWorker, journal: Journal) -> None:
        make_worker(app)
        engine = engine_of(app)
        client = cast("redis.Redis", engine.transitions.store._connected())  # type: ignore[attr-defined]

        def kept() -> int:
            return cast("int", client.hlen("unacked"))

        def transactions() -> int:
            return cast("int", client.info("commandstats")["cmdstat_exec"]["calls"])

        app.tasks["queue"].delay(journal.key("warm"), 1).get(timeout=20)
        wait_until(lambda: engine.transitions.show("queue", journal.key("warm")) is None, 10)
        before = transactions()
        results = [app.tasks["queue"].delay(journal.key(str(n)), n, gate="early") for n in range(2)]
        journal.wait("start", key="1", timeout=20)
        journal.wait("start", key="0", timeout=20)
        assert kept() == 0
        # Kombu notes in a transaction that a message was delivered, and in another that it was acknowledged.
        assert transactions() - before == len(results)
        journal.open("early", 2)
        assert [result.get(timeout=20) for result in results] == [0, 1]
        late = app.tasks["queue_late"].delay(journal.key("late"), 2, gate="late")
        journal.wait("start", key="late", timeout=20)
        assert kept() == 1
        journal.open("late")
        assert late.get(timeout=20) == 2
        wait_until(lambda: kept() == 0, 10)

    def test_fetches_as_much_as_ever_after_its_connection_was_lost(
        self, make_app: MakeApp, make_worker: MakeWorker, journal: Journal, state_server: ValkeyServer
    ) -> None:
        """Celery fetches less at first, and more with each message that is acknowledged."""
        app = make_app()
        worker = make_worker(app, concurrency=3)
        results = [app.tasks["queue"].delay(journal.key(str(n)), n, gate="a") for n in range(2)]
        for n in range(len(results)):
            journal.wait("start", key=str(n), timeout=20)
        with state_server.client() as client:
            for each in client.client_list(_type="normal"):
                if each["cmd"] == "brpop" and each["db"] == str(app.given["broker"]).rsplit("/", 1)[1]:
                    client.client_kill_filter(_id=each["id"])
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
        queue = app.conf.task_default_queue
        with app.connection_for_read() as connection:
            client = connection.default_channel.client
            # One runs, which counts no more.
            wait_until(lambda: client.llen(queue) == len(results) - 4, 20)
            # The worker's event loop, which fetches, has gone round.
            for _ in range(3):
                assert app.control.inspect([worker.hostname], timeout=10).ping()
            assert client.llen(queue) == len(results) - 4
            assert client.hlen("unacked") == 0
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
            assert client.exists("unacked", "unacked_index", app.conf.task_default_queue) == 0
        assert len(journal.events("start")) == len(results)

    @pytest.mark.parametrize("acknowledged", [True, False])
    def test_hands_back_what_its_pool_never_took(self, acknowledged: bool, make_app: MakeApp, journal: Journal) -> None:
        """There is a new message only for what the script acknowledged: any other is given back by the broker."""
        app = make_app()
        presence = WorkerPresence(cast("Any", SimpleNamespace(app=app, hostname="w")))
        result = app.tasks["queue"].delay(journal.key(), 1)
        with delivered(app) as message:
            receipt = receipt_of(app, message) if acknowledged else None
            lease: Lease = start(app, message, receipt, owner=presence.owner).lease
            # Here, lest it comes back as the connection is closed.
            message.ack()
        presence.leased(lease, cast("Any", None))
        presence._goodbye()
        with app.connection_for_read() as connection:
            again = connection.default_channel.basic_get(app.conf.task_default_queue)
            assert (again is not None) is acknowledged
            if again is not None:
                assert again.headers["coalesce"]["run"] == str(result.run_id)
                assert start(app, again, None, "another").answer is Answer.RUNNING
                again.ack()
