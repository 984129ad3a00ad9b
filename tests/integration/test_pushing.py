"""Messages that the script pushes which accepts their call: Celery's own, and only where nobody could tell."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
from celery.exceptions import TimeoutError as CeleryTimeoutError
from celery.signals import after_task_publish, before_task_publish
from kombu import Exchange, Queue
from kombu.exceptions import OperationalError
from redis.exceptions import ResponseError

from celery_coalesce.calls import encode
from celery_coalesce.dispatch import publish_all
from celery_coalesce.engine import engine_of
from celery_coalesce.records import Envelope
from tests.support.app import HarnessApp
from tests.support.journal import Journal
from tests.support.process import wait_until

#: By what each supported version of kombu does.
pytestmark = pytest.mark.core

MakeApp = Callable[..., HarnessApp]


class Asked:
    """What transitions an app asks for."""

    def __init__(self, app: HarnessApp, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: list[str] = []
        self.calls: list[tuple[Any, ...]] = []
        store = engine_of(app).transitions.store
        plain, many = store.call, store.call_many

        def call(name: str, keys: Any, *argv: Any) -> Any:
            self.names.append(name)
            self.calls.append((name, keys, *argv))
            return plain(name, keys, *argv)

        def call_many(calls: Any) -> Any:
            if len(calls) > 1:
                self.names += [name for name, *_ in calls]
            return many(calls)

        monkeypatch.setattr(store, "call", call)
        monkeypatch.setattr(store, "call_many", call_many)


@pytest.fixture
def app(make_app: MakeApp) -> HarnessApp:
    """An app whose broker is its state server, without a worker."""
    return make_app()


@pytest.fixture
def asked(app: HarnessApp, monkeypatch: pytest.MonkeyPatch) -> Asked:
    """What it asks for."""
    return Asked(app, monkeypatch)


def messages(app: HarnessApp, queue: str = "") -> list[dict[str, Any]]:
    """Take the messages out of a queue, the oldest first."""
    with app.connection_for_read() as connection:
        client = connection.default_channel.client
        name = queue or app.conf.task_default_queue
        found = [json.loads(message) for message in reversed(client.lrange(name, 0, -1))]
        client.delete(name)
    return found


def test_a_pushed_message_is_the_one_that_celery_would_publish(app: HarnessApp, asked: Asked, journal: Journal) -> None:
    """Field by field, but for what is another in every message."""
    queue = app.tasks["queue"]
    given: dict[str, Any] = {"headers": {"x": 1}, "shadow": "s", "time_limit": 9, "expires": 60, "priority": 3}
    pushed = queue.apply_async((journal.key(), "é"), {"gate": "g"}, **given)
    [one] = messages(app, "celery\x06\x163")
    with app.producer_or_acquire() as producer:
        published = queue.apply_async((journal.key("other"), "é"), {"gate": "g"}, producer=producer, **given)
    [other] = messages(app, "celery\x06\x163")
    assert asked.names == ["publish", "trigger"]
    for message, result in ((one, pushed), (other, published)):
        headers, properties = message["headers"], message["properties"]
        assert headers.pop("id") == headers.pop("root_id") == properties.pop("correlation_id") == result.id
        assert headers["coalesce"].pop("run") == str(result.run_id)
        assert headers["coalesce"].pop("state")
        assert headers["coalesce"].pop("id") == result.id
        assert properties.pop("delivery_tag")
        assert journal.name in headers.pop("argsrepr")
        assert message.pop("body")
    assert one == other


def test_a_busy_key_is_asked_for_without_a_message(app: HarnessApp, asked: Asked, journal: Journal) -> None:
    """The first call that joins has made one for nothing; those that come soon after it do not."""
    results = [app.tasks["queue"].delay(journal.key(), n) for n in range(4)]
    assert asked.names == ["publish", "publish", "trigger", "trigger"]
    assert [result.coalesced for result in results] == [False, True, True, True]
    assert len(messages(app)) == 1


def test_of_a_batch_each_key_has_one_message_made(app: HarnessApp, asked: Asked, journal: Journal) -> None:
    """And one call of the script that accepts them all."""
    keys = [journal.key(name) for name in ("a", "b", "a", "a", "b")]
    app.tasks["queue"].batch_delay([(key,) for key in keys])
    assert asked.names == ["publish", "publish"]
    assert len(messages(app)) == 2


class TestALargeBatch:
    """A few of its calls tell whether its keys are busy; then each part is asked as the one before was answered."""

    @pytest.fixture(autouse=True)
    def small(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Parts of four, after a sample of two."""
        monkeypatch.setattr("celery_coalesce.making.SAMPLE", 2)
        monkeypatch.setattr("celery_coalesce.making.MOST_AT_ONCE", 4)

    def keys(self, journal: Journal, count: int) -> list[str]:
        """Return keys that nobody has used."""
        return [journal.key(str(n)) for n in range(count)]

    def test_of_idle_keys_is_pushed(self, app: HarnessApp, asked: Asked, journal: Journal) -> None:
        """All of it."""
        results = app.tasks["queue"].batch_delay([(key,) for key in self.keys(journal, 12)])
        assert asked.names == ["publish"] * 12
        assert [result.disposition for result in results] == ["dispatched"] * 12
        assert len(messages(app)) == 12

    def test_of_busy_keys_has_no_messages_made_but_for_the_first(
        self, app: HarnessApp, asked: Asked, journal: Journal
    ) -> None:
        """Though nobody here has called them before they were."""
        calls = [(key,) for key in self.keys(journal, 12)]
        with app.producer_or_acquire() as producer:
            for call in calls:
                app.tasks["queue"].apply_async(call, producer=producer)
        asked.names.clear()
        results = app.tasks["queue"].batch_delay(calls)
        assert asked.names == ["publish"] * 2 + ["trigger"] * 10
        assert {result.disposition for result in results} == {"coalesced"}
        assert len(messages(app)) == 12

    def test_that_turns_out_otherwise_costs_a_message_or_a_publish(
        self, app: HarnessApp, asked: Asked, journal: Journal
    ) -> None:
        """Busy keys, then idle ones, then busy ones: every run has one message."""
        keys = self.keys(journal, 14)
        busy = [*keys[:2], *keys[6:]]
        with app.producer_or_acquire() as producer:
            for key in busy:
                app.tasks["queue"].apply_async((key,), producer=producer)
        asked.names.clear()
        results = app.tasks["queue"].batch_delay([(key,) for key in keys])
        assert asked.names == ["publish"] * 2 + ["trigger"] * 4 + ["publish"] * 4 + ["trigger"] * 4
        assert [result.disposition for result in results] == ["coalesced"] * 2 + ["dispatched"] * 4 + ["coalesced"] * 8
        sent = [message["headers"]["coalesce"]["run"] for message in messages(app)]
        assert sorted(sent) == sorted({str(result.run_id) for result in results})

    def test_counts_keys_and_not_calls(self, app: HarnessApp, asked: Asked, journal: Journal) -> None:
        """What joins a run of the same batch says nothing of the keys behind it."""
        one, other, *others = self.keys(journal, 6)
        app.tasks["queue"].batch_delay([(key,) for key in (one, one, other, other, other, other, *others)])
        assert asked.names == ["publish"] * 6
        assert len(messages(app)) == 6


def test_a_call_that_is_asked_again_pushes_nothing_again(app: HarnessApp, asked: Asked, journal: Journal) -> None:
    """Its reply was lost: the same answer, and the one message."""
    result = app.tasks["queue"].delay(journal.key(), 1)
    [call] = asked.calls
    again = engine_of(app).transitions.store.call(*call)
    assert again.decode() == f"dispatched {result.run_id} dispatched -1 {result.id}"
    assert len(messages(app)) == 1


def test_a_key_that_was_taken_to_be_busy_costs_a_second_round_trip(
    app: HarnessApp, asked: Asked, journal: Journal
) -> None:
    """And nothing else: its message is published as ever."""
    queue = app.tasks["queue"]
    for n in range(2):
        queue.delay(journal.key(), n)
    assert queue.clear_key(journal.key()) == 1
    messages(app)
    result = queue.delay(journal.key(), 3)
    assert asked.names[-1] == "trigger"
    [message] = messages(app)
    assert message["headers"]["coalesce"]["run"] == str(result.run_id)


@pytest.mark.parametrize("signal", [before_task_publish, after_task_publish])
def test_nobody_is_told_of_a_message_that_is_not_sent(
    signal: Any, app: HarnessApp, asked: Asked, journal: Journal
) -> None:
    """Where somebody listens, messages are published as ever: one for the two calls."""
    told: list[str] = []

    def receiver(sender: Any = None, **_: Any) -> None:
        told.append(sender)

    signal.connect(receiver)
    try:
        for n in range(2):
            app.tasks["queue"].delay(journal.key(), n)
    finally:
        signal.disconnect(receiver)
    assert asked.names == ["trigger", "trigger"]
    assert told == ["queue"]


@pytest.mark.parametrize(
    "conf",
    [
        {"coalesce_broker_shortcuts": False},
        {"task_send_sent_event": True},
        {"task_queues": [Queue("celery", Exchange("celery"), expires=60)]},
        {"task_queues": [Queue("celery", Exchange("all", type="fanout"))]},
    ],
    ids=["turned off", "sent events", "a queue that expires", "fanout"],
)
def test_what_is_more_than_one_push_is_left_to_the_producer(
    conf: dict[str, Any], make_app: MakeApp, monkeypatch: pytest.MonkeyPatch, journal: Journal
) -> None:
    """The message of a call that makes a run is published as ever."""
    app = make_app(conf=conf)
    with app.connection_for_write() as connection:
        expires = any(queue.expires for queue in conf.get("task_queues", ()))
        if expires and not hasattr(connection.default_channel, "_expires"):
            pytest.skip("to this kombu a queue that expires is like any other")
    asked = Asked(app, monkeypatch)
    app.tasks["queue"].delay(journal.key(), 1)
    assert asked.names == ["trigger"]
    fanout = any(queue.exchange.type == "fanout" for queue in conf.get("task_queues", ()))
    assert len(messages(app)) == int(not fanout)


def test_a_topic_with_one_queue_is_one_push(
    make_app: MakeApp, monkeypatch: pytest.MonkeyPatch, journal: Journal
) -> None:
    """Wherever it goes in the end."""
    app = make_app(conf={"task_queues": [Queue("celery", Exchange("some", type="topic"), routing_key="#")]})
    asked = Asked(app, monkeypatch)
    app.tasks["queue"].delay(journal.key(), 1)
    assert asked.names == ["publish"]
    assert len(messages(app)) == 1


def test_the_broker_s_prefix_is_kept(make_app: MakeApp, monkeypatch: pytest.MonkeyPatch, journal: Journal) -> None:
    """`global_keyprefix`: kombu's client puts it before names."""
    app = make_app(conf={"broker_transport_options": {"global_keyprefix": "p:"}})
    asked = Asked(app, monkeypatch)
    app.tasks["queue"].delay(journal.key(), 1)
    assert asked.names == ["publish"]
    with app.connection_for_read() as connection:
        channel = connection.default_channel
        assert channel.client.llen("celery") == 1
        assert {name.decode() for name in channel.client.keys("*celery*")} >= {"p:celery"}


def test_what_can_not_be_pushed_is_published_and_what_can_not_be_published_is_taken_back(
    app: HarnessApp, asked: Asked, journal: Journal
) -> None:
    """The queue's name is taken by something else: the caller hears of it, and nothing is left behind."""
    app.tasks["queue"].delay(journal.key("warm"), 1)
    messages(app)
    with app.connection_for_write() as connection:
        client = connection.default_channel.client
        client.set("celery", "no list")
        with pytest.raises((ResponseError, OperationalError), match="WRONGTYPE"):
            app.tasks["queue"].delay(journal.key(), 1)
        client.delete("celery")
    assert asked.names == ["publish", "publish", "rollback"]
    assert engine_of(app).transitions.show("queue", journal.key()) is None
    assert app.tasks["queue"].delay(journal.key(), 2).disposition == "dispatched"


@pytest.fixture(params=[True, False], ids=["pushed", "published"])
def call(app: HarnessApp, request: pytest.FixtureRequest) -> Iterator[Callable[..., Any]]:
    """Make a call, whose message is pushed by the script or published by a producer: `call(key, value)`."""
    with app.producer_or_acquire() as producer:
        given: dict[str, Any] = {} if request.param else {"producer": producer}
        yield lambda key, value: app.tasks["queue"].apply_async((key, value), **given)


def test_a_caller_subscribes_to_a_result_when_it_asks_for_it(
    call: Callable[..., Any], app: HarnessApp, journal: Journal
) -> None:
    """And then looks what is there. Celery subscribes with every call, which most callers have no use for."""
    subscribed = app.backend.result_consumer.subscribed_to
    result = call(journal.key(), 1)
    assert subscribed == set()
    with pytest.raises(CeleryTimeoutError):
        result.get(timeout=0.1)
    assert subscribed == {app.backend.get_key_for_task(result.id)}
    app.backend.store_result(result.id, 1, "SUCCESS")
    assert result.get(timeout=10) == 1
    ended = call(journal.key("other"), 2)
    app.backend.store_result(ended.id, 2, "SUCCESS")
    assert ended.get(timeout=10) == 2


def test_a_caller_among_greenlets_is_subscribed_at_once(
    call: Callable[..., Any], app: HarnessApp, journal: Journal
) -> None:
    """There a callback is called that nobody waits for."""
    consumer = app.backend.result_consumer

    class Greenlets(type(consumer.drainer)):  # type: ignore[misc]
        pass

    consumer.drainer = Greenlets(consumer)
    result = call(journal.key(), 1)
    assert consumer.subscribed_to == {app.backend.get_key_for_task(result.id)}


@pytest.mark.parametrize("joins", [False, True])
def test_another_backend_hears_of_calls(
    joins: bool, call: Callable[..., Any], app: HarnessApp, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that has its own way to hear of them, of those that have a result of their own."""
    heard = []

    class Hearing(type(app.backend)):  # type: ignore[misc]
        def on_task_call(self, producer: Any, task_id: str) -> None:
            heard.append(task_id)

    first = call(journal.key(), 1) if joins else None
    monkeypatch.setattr(type(app), "backend", Hearing(app=app, url=app.conf.result_backend))
    result = call(journal.key(), 2)
    assert heard == ([] if joins else [result.id])
    assert first is None or first.id == result.id


class TestFollowUps:
    """What whoever ends a run publishes in its place."""

    @pytest.fixture
    def pushed(self, app: HarnessApp, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """The queues that were pushed to on the state server's own connection."""
        store = engine_of(app).transitions.store
        queues: list[str] = []
        plain = store.push

        def push(key: str, what: str) -> None:
            queues.append(key)
            plain(key, what)

        monkeypatch.setattr(store, "push", push)
        return queues

    @staticmethod
    def envelope(journal: Journal, **given: Any) -> Envelope:
        args = encode(((journal.key(), "é"), {"gate": "g"}), "json")
        call = encode({"headers": {"x": 1}, "shadow": "s", "time_limit": 9, "priority": 3, "root_id": "root"}, "json")
        what = {"state": "a" * 26, "run": "17", "task_id": "id", "task": "queue", "attempt": 1, "version": 2}
        return Envelope(**{**what, "delay": 0, "args": args, "call": call, **given})

    @pytest.mark.parametrize("delay", [0, 60_000])
    @pytest.mark.parametrize("task", ["queue", "unknown"])
    def test_a_pushed_message_is_the_one_that_celery_would_publish(
        self, task: str, delay: int, app: HarnessApp, pushed: list[str], journal: Journal
    ) -> None:
        """Field by field; who listens for publishes is told of it, and it is published as ever."""
        told: list[str] = []

        def receiver(sender: Any = None, **_: Any) -> None:
            told.append(sender)

        envelope = self.envelope(journal, task=task, delay=delay)
        before_task_publish.connect(receiver)
        try:
            publish_all(engine_of(app), [envelope])
        finally:
            before_task_publish.disconnect(receiver)
        assert (pushed, told) == ([], [task])
        publish_all(engine_of(app), [envelope])
        assert (pushed, told) == (["celery\x06\x163"], [task])
        found = messages(app, "celery\x06\x163")
        for message in found:
            assert message["properties"].pop("delivery_tag")
            eta = message["headers"].pop("eta")
            assert (eta is not None) == bool(delay)
        published, pushed_one = found
        assert published["headers"]["coalesce"]["run"] == "17"
        assert pushed_one == published

    def test_one_that_can_not_be_pushed_is_tried_again(
        self, app: HarnessApp, asked: Asked, pushed: list[str], journal: Journal, caplog: pytest.LogCaptureFixture
    ) -> None:
        """The queue's name is taken by something else: the record knows that it was not sent."""
        publish_all(engine_of(app), [self.envelope(journal, call=b"")])
        messages(app)
        with app.connection_for_write() as connection:
            client = connection.default_channel.client
            client.set("celery", "no list")
            publish_all(engine_of(app), [self.envelope(journal, call=b"")])
            client.delete("celery")
        assert pushed == ["celery", "celery"]
        assert asked.names == ["unpublished"]
        assert [getattr(record, "action", "") for record in caplog.records] == ["publish_failed"]


class TestTheWire:
    """Connections that nobody looks into before they are used."""

    def test_one_that_was_closed_while_idle_is_opened_again_at_once(self, app: HarnessApp, journal: Journal) -> None:
        """By the server's own timeout, or somebody else's."""
        queue, transitions = app.tasks["queue"], engine_of(app).transitions
        queue.delay(journal.key(), 1)
        with transitions.store._connected() as client:
            client.client_kill_filter(_type="normal", skipme=True)
        assert queue.delay(journal.key(), 2).coalesced

    def test_a_reply_is_nobody_else_s(self, app: HarnessApp, journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
        """Whoever is interrupted while it waits leaves no reply behind for the next."""
        from redis.connection import Connection

        queue = app.tasks["queue"]
        first = queue.delay(journal.key(), 1)
        read = Connection.read_response

        def interrupted(self: Any, *args: Any, **kwargs: Any) -> Any:
            raise KeyboardInterrupt

        monkeypatch.setattr(Connection, "read_response", interrupted)
        with pytest.raises(KeyboardInterrupt):
            queue.delay(journal.key("other"), 1)
        monkeypatch.setattr(Connection, "read_response", read)
        assert queue.delay(journal.key(), 2).run_task_id == first.id

    def test_a_refusal_keeps_nobody_s_result(self, app: HarnessApp, journal: Journal) -> None:
        """That a function is missing is a reply: a result that is let go goes at once, and so does its subscription."""
        client = engine_of(app).transitions.store._connected()
        with suppress(ResponseError):
            client.function_flush()
        gc.disable()
        try:
            app.tasks["queue"].delay(journal.key(), 1)
            assert set(app.backend.result_consumer.subscribed_to) == set()
        finally:
            gc.enable()

    def test_a_fork_has_connections_of_its_own(self, app: HarnessApp, journal: Journal) -> None:
        """Neither reads the other's replies."""
        queue = app.tasks["queue"]
        runs = [queue.delay(journal.key(str(n)), 0).run_task_id for n in range(2)]
        children = []
        for n in range(2):
            pid = os.fork()
            if pid == 0:
                with suppress(BaseException):
                    same = {queue.delay(journal.key(str(n)), value).run_task_id for value in range(50)}
                    os._exit(0 if same == {runs[n]} else 1)
                os._exit(2)
            children.append(pid)
        same = {queue.delay(journal.key("0"), value).run_task_id for value in range(50)}
        ended = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
        assert same == {runs[0]}
        assert ended == [0, 0]


def test_a_killed_caller_leaves_a_message_or_nothing(app: HarnessApp, journal: Journal) -> None:
    """As state and message are one: whoever is accepted has both."""
    result = app.tasks["queue"].delay(journal.key(), 1)
    wait_until(lambda: engine_of(app).transitions.show("queue", journal.key()), 5)
    [message] = messages(app)
    assert message["headers"]["id"] == result.id
