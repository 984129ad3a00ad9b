"""What `apply_async` was given, stored and given again."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest
from celery import Celery, chain, group
from celery._state import _deregister_app
from kombu import Exchange, Queue, binding
from kombu.exceptions import ContentDisallowed, EncodeError

from celery_coalesce.calls import (
    HEADER,
    captured,
    decode,
    encode,
    eta_header,
    follower_of,
    message_call,
    moment,
    options_of,
    without_callbacks,
)

MakeApp = Callable[..., Celery]


@pytest.fixture
def make_app() -> Iterator[MakeApp]:
    """Make an app that no other test meets, with settings."""
    apps: list[Celery] = []

    def make(**conf: Any) -> Celery:
        app = Celery("unit", broker="memory://", set_as_current=False)
        app.conf.update(conf)
        apps.append(app)
        return app

    yield make
    for app in apps:
        app.close()
        _deregister_app(app)


@pytest.fixture
def app(make_app: MakeApp) -> Celery:
    """An app with Celery's defaults."""
    return make_app()


def kept(app: Celery, **options: Any) -> dict[str, Any]:
    """Return options as they are given again, after having been stored."""
    return options_of(decode(app, encode(captured(app, options, None), None)))


class TestBlobs:
    @pytest.mark.parametrize("serializer", ["json", "yaml", "msgpack", "pickle", None])
    def test_a_value_survives(self, make_app: MakeApp, serializer: str | None) -> None:
        """In each serializer that is installed and accepted."""
        app = make_app(accept_content=["json", "yaml", "msgpack", "pickle"])
        if serializer in ("yaml", "msgpack"):
            pytest.importorskip(serializer)
        value = {"args": [1, "ü\U0001f600", None, True, 2.5], "kwargs": {"a": {"b": []}}}
        assert decode(app, encode(value, serializer)) == value

    @pytest.mark.parametrize(
        "value",
        [datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=timezone.utc), Decimal("1.50"), UUID(int=7), "\0", "\n", "é"],
    )
    def test_what_kombus_json_knows_survives(self, app: Celery, value: Any) -> None:
        """Datetimes, decimals and UUIDs are themselves again."""
        assert decode(app, encode([value], "json")) == [value]

    def test_bytes_survive_in_json(self, app: Celery) -> None:
        """As kombu's JSON has them."""
        assert decode(app, encode([b"\x00\xff\n"], "json")) == [b"\x00\xff\n"]

    @pytest.mark.parametrize("blob", [b"nonsense", b"application/json utf-8\n{", b"\xff\xfe\n{}"])
    def test_a_broken_blob_raises(self, app: Celery, blob: bytes) -> None:
        """Never half a value."""
        with pytest.raises(Exception):  # noqa: B017, PT011 - whatever the serializer raises
            decode(app, blob)

    def test_what_a_serializer_can_not_take_is_refused_at_the_call(self, app: Celery) -> None:
        """As Celery refuses it at publishing."""
        with pytest.raises(EncodeError):
            encode([object()], "json")


class TestAcceptContent:
    def test_pickle_is_refused_unless_accepted(self, app: Celery) -> None:
        """What a worker would refuse in a message it refuses in a record."""
        blob = encode([1], "pickle")
        with pytest.raises(ContentDisallowed):
            decode(app, blob)

    def test_pickle_is_read_where_it_is_accepted(self, make_app: MakeApp) -> None:
        """By its name or its content type."""
        for accepted in (["json", "pickle"], ["application/x-python-serialize"]):
            assert decode(make_app(accept_content=accepted), encode([{1}], "pickle")) == [{1}]

    def test_a_forged_record_is_never_unpickled(self, app: Celery) -> None:
        """Whatever it says that it is."""
        payload = pickle.dumps(Trap())
        for head in (b"application/x-python-serialize binary", b"application/json utf-8", b"pickle binary"):
            with pytest.raises(Exception):  # noqa: B017, PT011 - whatever refuses it
                decode(app, head + b"\n" + payload)
        assert not Trap.sprung

    def test_json_is_refused_where_it_is_not_accepted(self, make_app: MakeApp) -> None:
        """The list counts, not our taste."""
        with pytest.raises(ContentDisallowed):
            decode(make_app(accept_content=["yaml"]), encode([1], "json"))


class Trap:
    """Notices being unpickled."""

    sprung = False

    def __reduce__(self) -> Any:
        return _spring, ()


def _spring() -> None:
    Trap.sprung = True


class TestOptions:
    def test_plain_options_are_as_given(self, app: Celery) -> None:
        """Everything that publishing takes."""
        options: dict[str, Any] = {
            "queue": "q", "routing_key": "rk", "exchange": "ex", "priority": 3, "serializer": "json",
            "compression": "zlib", "time_limit": 10, "soft_time_limit": 5.5, "shadow": "s", "ignore_result": True,
            "headers": {"x": "y"}, "root_id": "r", "parent_id": "p", "group_id": "g", "group_index": 2,
            "stamped_headers": ["stamp"], "stamp": "v", "replaced_task_nesting": 1,
        }  # fmt: skip
        assert kept(app, **options) == options

    def test_queue_and_exchange_objects_are_themselves_again(self, app: Celery) -> None:
        """With exchange, routing key, durability and arguments."""
        exchange = Exchange("ex", type="topic", durable=False, arguments={"a": 1})
        queue = Queue(
            "q", exchange, routing_key="a.#", durable=False, auto_delete=True, max_priority=5,
            queue_arguments={"x-queue-type": "quorum"},
        )  # fmt: skip
        given = kept(app, queue=queue, exchange=exchange)
        assert isinstance(given["queue"], Queue)
        assert isinstance(given["exchange"], Exchange)
        assert given["exchange"] == exchange
        assert given["queue"].as_dict(recurse=True) == queue.as_dict(recurse=True)
        assert given["queue"] == queue

    def test_a_queue_with_bindings_survives(self, app: Celery) -> None:
        """A queue that is bound to several exchanges."""
        queue = Queue("q", [binding(Exchange("a"), routing_key="1"), binding(Exchange("b"), routing_key="2")])
        given = kept(app, queue=queue)["queue"]
        assert {(b.exchange.name, b.routing_key) for b in given.bindings} == {("a", "1"), ("b", "2")}

    def test_a_bare_queue_survives(self, app: Celery) -> None:
        """Without an exchange."""
        assert kept(app, queue=Queue("q"))["queue"].name == "q"

    def test_signatures_are_themselves_again(self, app: Celery) -> None:
        """Links, error links, chains, chords and groups."""

        @app.task(name="t", shared=False)
        def task(x: int) -> int:
            return x

        link = task.s(1).set(queue="q", countdown=3)
        options = {
            "link": [link, group(task.s(2), task.s(3))],
            "link_error": task.s(4),
            "chain": [task.s(5)],
            "chord": chain(task.s(6), task.s(7)),
        }
        given = kept(app, **options)
        first, second = map(app.signature, given["link"])
        assert (first.task, list(first.args), first.options) == ("t", [1], {"queue": "q", "countdown": 3})
        assert [list(each["args"]) for each in second.tasks] == [[2], [3]]
        assert list(app.signature(given["link_error"]).args) == [4]
        assert list(app.signature(given["chain"][0]).args) == [5]
        assert [list(each["args"]) for each in app.signature(given["chord"]).tasks] == [[6], [7]]

    def test_datetimes_in_headers_and_stamps_survive_json(self, app: Celery) -> None:
        """As datetimes, or as what Celery sends for them."""
        when = datetime(2026, 1, 2, tzinfo=timezone.utc)
        given = kept(app, headers={"when": when}, stamp=when)
        assert given["headers"]["when"] == when
        assert given["stamp"] in (when, when.isoformat())

    def test_what_only_means_something_now_is_left_out(self, app: Celery) -> None:
        """Connections, producers and retry policies; times are the record's own."""
        transient: dict[str, Any] = {
            "producer": object(), "connection": object(), "retry": True, "retry_policy": {"max_retries": 1},
            "add_to_parent": True, "countdown": 1, "eta": datetime.now(timezone.utc), "expires": 3,
        }  # fmt: skip
        assert kept(app, **transient) == {}

    def test_our_own_header_is_never_stored(self, app: Celery) -> None:
        """A retry's headers name the run that it was."""
        given = {HEADER: {"run": "1"}, "mine": 1}
        assert kept(app, headers=given) == {"headers": {"mine": 1}}
        assert kept(app, headers={HEADER: {}}) == {}
        assert HEADER in given  # the caller's own are not changed

    def test_callbacks_can_be_left_out(self) -> None:
        """What a run without its first caller is carried over with."""
        call = {"link": 1, "link_error": 2, "chain": 3, "chord": 4, "group_id": 5, "reply_to": 6, "queue": "q"}
        assert without_callbacks(call) == {"queue": "q"}

    def test_a_follower_has_what_completes_it(self) -> None:
        """Callbacks, lineage and stamps, not the route."""
        call = {"link": [1], "queue": "q", "root_id": "r", "stamped_headers": ["s"], "s": "v", "priority": 3}
        assert follower_of("t", "id", call, received=True) == {
            "task": "t", "task_id": "id", "received": True, "link": [1], "root_id": "r",
            "stamped_headers": ["s"], "s": "v", "priority": 3,
        }  # fmt: skip


class TestMessages:
    def test_a_message_gives_the_call_that_made_it(self) -> None:
        """Route, priority, limits, lineage, callbacks."""
        request = {
            "id": "i", "task": "t", "root_id": "r", "parent_id": "p", "timelimit": [10, 5], "shadow": None,
            "headers": {"x": 1}, "callbacks": [{"task": "c"}], "errbacks": None, "chain": [], "chord": None,
            "ignore_result": False, "reply_to": "q-of-caller", "eta": "2026-01-01T00:00:00Z", "expires": None,
            "delivery_info": {"exchange": "", "routing_key": "celery", "priority": 4, "redelivered": False},
        }  # fmt: skip
        call = message_call(request)
        assert call["queue"] == "celery"
        assert call["priority"] == 4
        assert (call["root_id"], call["parent_id"], call["reply_to"]) == ("r", "p", "q-of-caller")
        assert call["link"] == [{"task": "c"}]
        assert (call["time_limit"], call["soft_time_limit"]) == (10, 5)
        assert call["ignore_result"] is False
        assert not {"eta", "expires", "countdown", "task_id", "exchange", "routing_key"} & set(call)

    def test_an_exchange_is_kept(self) -> None:
        """A message that came over one is sent over it again."""
        call = message_call({"delivery_info": {"exchange": "ex", "routing_key": "rk"}})
        assert (call["exchange"], call["routing_key"]) == ("ex", "rk")
        assert "queue" not in call

    def test_a_delayed_message_is_not_sent_back_into_the_delay(self) -> None:
        """RabbitMQ's native delayed delivery rewrites the route."""
        info = {"exchange": "celery_delayed_5", "routing_key": "0.0.1.celery"}
        assert not {"exchange", "routing_key", "queue"} & set(message_call({"delivery_info": info}))


class TestTimes:
    def test_a_moment_is_milliseconds_since_the_epoch(self, make_app: MakeApp) -> None:
        """Aware or ISO 8601; a naive one is UTC, as in a worker."""
        app = make_app(timezone="Europe/Berlin", enable_utc=False)
        aware = datetime(2026, 1, 2, 12, tzinfo=timezone.utc)
        expected = int(aware.timestamp() * 1000)
        assert moment(app, aware) == expected
        assert moment(app, aware.isoformat()) == expected
        assert moment(app, aware.replace(tzinfo=None)) == expected
        assert moment(app, aware.astimezone(timezone(timedelta(hours=5)))) == expected

    def test_an_eta_header_is_read_as_it_was_meant(self, app: Celery) -> None:
        """To the millisecond, more or less."""
        ahead = moment(app, eta_header(90_000)) - moment(app, datetime.now(timezone.utc))
        assert 89_000 < ahead <= 90_000
