"""What `apply_async` was given reaches the run as given: the first one, a follow-up, and a retry."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
from kombu import Connection
from kombu.serialization import loads, prepare_accept_content

from tests.support.app import HarnessApp
from tests.support.journal import Journal
from tests.support.process import wait_until
from tests.support.rabbit import RabbitServer
from tests.support.servers import ValkeyServer
from tests.support.worker import WorkerProcess

MakeApp = Callable[..., HarnessApp]
MakeWorker = Callable[..., WorkerProcess]

#: Of a message's headers, those that can not be the same for two calls.
OWN = {"id", "root_id", "parent_id", "task", "coalesce", "origin", "argsrepr", "kwargsrepr"}


def take(app: HarnessApp, queue: str, timeout: float = 20) -> tuple[dict[str, Any], dict[str, Any], Any]:
    """Take one message out of a queue: headers, properties and body."""
    with app.connection_for_read() as connection:
        simple = connection.SimpleQueue(queue, accept=["json", "pickle"])
        message = simple.get(timeout=timeout)
        message.ack()
        properties = {
            "content_type": message.content_type,
            "content_encoding": message.content_encoding,
            **{name: message.properties.get(name) for name in ("priority", "delivery_mode", "expiration")},
        }
        accept = prepare_accept_content(["json", "pickle"])
        body = loads(message.body, message.content_type, message.content_encoding, accept=accept)
        simple.close()
        return dict(message.headers), properties, body


def shared(headers: Mapping[str, Any]) -> dict[str, Any]:
    """Return those headers that two calls with the same options have in common."""
    return {name: value for name, value in headers.items() if name not in OWN}


OPTIONS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "shadow": {"shadow": "shown"},
    "headers": {"headers": {"tenant": "7", "trace": {"id": 1}}},
    "priority": {"priority": 5},
    "time limits": {"time_limit": 60, "soft_time_limit": 50},
    "compression": {"compression": "gzip"},
    "serializer": {"serializer": "pickle"},
    "ignore_result": {"ignore_result": True},
    "stamps": {"headers": {"stamps": {"customer": "7"}, "stamped_headers": ["customer"], "customer": "7"}},
    "root and parent": {"root_id": "root", "parent_id": "parent"},
    "reprs": {"argsrepr": "<args>", "kwargsrepr": "<kwargs>"},
    "origin": {"replaced_task_nesting": 2},
    "everything": {
        "shadow": "shown", "headers": {"tenant": "7"}, "priority": 5, "time_limit": 60, "soft_time_limit": 50,
        "compression": "zlib", "serializer": "pickle", "ignore_result": True,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def elsewhere(state_server: ValkeyServer, journal_server: ValkeyServer) -> Any:
    """An app whose worker does not serve the queue "elsewhere", and takes pickle."""
    from tests.acceptance.conftest import INCLUDE, with_tasks
    from tests.support.app import make_app

    url = state_server.new_db()
    conf = {"accept_content": ["json", "pickle"], "result_accept_content": ["json", "pickle"]}
    as_root = {"C_FORCE_ROOT": "1"}  # with pickle, Celery asks for it
    with make_app(url, url, conf) as app:
        with_tasks(app)
        with WorkerProcess.serving(app, include=INCLUDE, env=as_root) as worker:
            yield app, worker


@pytest.mark.parametrize("given", OPTIONS)
def test_messages_of_first_run_and_follow_up_are_a_plain_calls(given: str, elsewhere: Any, journal: Journal) -> None:
    """Header by header, but for the run that they name, whether the caller or a worker publishes."""
    app, _ = elsewhere
    queue = f"elsewhere-{journal.name}"
    options = {"queue": queue, **OPTIONS[given]}
    app.tasks["tell_plain"].apply_async((journal.key(),), **options)
    plain = take(app, queue)
    app.tasks["tell"].apply_async((journal.key("first"),), **options)
    first = take(app, queue)
    running = app.tasks["tell"].apply_async((journal.key(),), {"gate": "a"})
    journal.wait("start", key="key", timeout=20)
    app.tasks["tell"].apply_async((journal.key(),), **options)
    journal.open("a")
    follow_up = take(app, queue)

    assert running.get(timeout=20)
    for kind, message in {"first": first, "follow-up": follow_up}.items():
        assert shared(message[0]) == shared(plain[0]), kind
        assert message[1] == plain[1], kind
        # Arguments that were stored come back as a list, also where pickle would have kept a tuple.
        assert len(message[2][0]) == len(plain[2][0]) == 1, kind
        assert message[2][1:] == plain[2][1:], kind
        for name in ("argsrepr", "kwargsrepr"):
            if name in OPTIONS[given]:
                assert message[0][name] == plain[0][name], kind
        for name in ("root_id", "parent_id"):
            expected = OPTIONS[given].get(name, message[0]["id"] if name == "root_id" else None)
            assert message[0][name] == expected, (kind, name)
        assert message[0]["coalesce"]["run"]


def told(journal: Journal, result: Any) -> dict[str, Any]:
    """Return what the body of a run has seen."""
    return journal.wait("tell", task_id=result.id, timeout=20)


@pytest.fixture
def follow_up(app: HarnessApp, worker: WorkerProcess, journal: Journal) -> Callable[..., dict[str, Any]]:
    """Call `tell` with options while it runs, and return what the follow-up's body has seen."""

    def call(**options: Any) -> dict[str, Any]:
        task = app.tasks["tell"]
        task.apply_async((journal.key(),), {"gate": "a"})
        journal.wait("tell", timeout=20)
        result = task.apply_async((journal.key(),), **options)
        assert result.disposition == "queued"
        journal.open("a")
        return told(journal, result)

    return call


class TestFollowUpSees:
    def test_custom_task_id(self, app: HarnessApp, follow_up: Any, journal: Journal) -> None:
        """The caller's own."""
        seen = follow_up(task_id=f"{journal.name}-mine")
        assert seen["id"] == seen["root_id"] == seen["correlation_id"] == f"{journal.name}-mine"

    def test_shadow_and_headers(self, follow_up: Any) -> None:
        """A name to show, and headers of the caller's own."""
        seen = follow_up(shadow="shown", headers={"tenant": "7"})
        assert seen["shadow"] == "shown"
        assert seen["headers"]["tenant"] == "7"

    def test_stamps(self, app: HarnessApp, worker: WorkerProcess, journal: Journal) -> None:
        """Of a stamped signature."""
        task = app.tasks["tell"]
        task.apply_async((journal.key(),), {"gate": "a"})
        journal.wait("tell", timeout=20)
        sig = task.s(journal.key())
        sig.stamp(customer="7")
        result = sig.apply_async()
        journal.open("a")
        seen = told(journal, result)
        assert seen["stamps"] == {"customer": "7"}
        assert "customer" in seen["stamped_headers"]

    def test_time_limits_and_expiry(self, follow_up: Any) -> None:
        """Of its own call."""
        seen = follow_up(time_limit=60, soft_time_limit=50, expires=99)
        assert seen["timelimit"] == [60, 50]
        assert seen["expires"]

    def test_priority(self, follow_up: Any) -> None:
        """Of its own call."""
        assert follow_up(priority=5)["delivery_info"]["priority"] == 5

    def test_ignore_result(self, follow_up: Any) -> None:
        """Of its own call."""
        assert follow_up(ignore_result=True)["ignore_result"] is True

    def test_no_trace_of_the_run_that_published_it(self, follow_up: Any, journal: Journal) -> None:
        """It is no child of the run before it."""
        seen = follow_up()
        assert seen["parent_id"] is None
        assert seen["root_id"] == seen["id"]
        assert not any(seen[name] for name in ("group", "chord", "chain", "callbacks", "errbacks"))

    def test_parent_and_root_of_a_call_from_a_body(
        self, app: HarnessApp, worker: WorkerProcess, journal: Journal
    ) -> None:
        """A call from another task's body is that task's child, though it is published by another's end."""
        app.tasks["tell"].apply_async((journal.key("other"),), {"gate": "a"})
        journal.wait("tell", timeout=20)
        caller = app.tasks["calling"].apply_async((journal.key("caller"),), {"other": journal.key("other")}, priority=4)
        called = journal.wait("called", timeout=20)
        assert caller.get(timeout=20) == called["task_id"]
        journal.open("a")

        seen = journal.wait("tell", task_id=called["task_id"], timeout=20)
        assert (seen["parent_id"], seen["root_id"]) == (caller.id, caller.id)


def test_priority_is_inherited_where_celery_inherits_it(
    make_app: MakeApp, make_worker: MakeWorker, journal: Journal
) -> None:
    """`task_inherit_parent_priority`, for a follow-up that a body has asked for."""
    app = make_app(conf={"task_inherit_parent_priority": True, "task_default_priority": 1})
    make_worker(app)
    app.tasks["tell"].apply_async((journal.key("other"),), {"gate": "a"}, priority=2)
    journal.wait("tell", timeout=20)
    app.tasks["calling"].apply_async((journal.key("caller"),), {"other": journal.key("other")}, priority=6)
    called = journal.wait("called", timeout=20)
    journal.open("a")

    seen = journal.wait("tell", task_id=called["task_id"], timeout=20)
    assert seen["delivery_info"]["priority"] == 6


def test_routes_of_the_app_apply_to_follow_ups(make_app: MakeApp, make_worker: MakeWorker, journal: Journal) -> None:
    """`task_routes`, and a call's own queue."""
    app = make_app(conf={"task_routes": {"tell": {"queue": "routed"}}})
    make_worker(app, queues=["celery", "routed", "mine"])
    task = app.tasks["tell"]
    first = task.apply_async((journal.key(),), {"gate": "a"})
    assert told(journal, first)["delivery_info"]["routing_key"] == "routed"
    second = task.apply_async((journal.key(),), {"gate": "a"})
    journal.open("a")
    assert told(journal, second)["delivery_info"]["routing_key"] == "routed"
    third = task.apply_async((journal.key(),), queue="mine")
    journal.open("a")
    assert told(journal, third)["delivery_info"]["routing_key"] == "mine"


@pytest.mark.parametrize("name", ["queue_retry", "replaced_by_itself"])
def test_attempts_keep_queue_priority_and_headers(
    name: str, make_app: MakeApp, make_worker: MakeWorker, journal: Journal
) -> None:
    """A retry goes where the first attempt was sent, and is given what it was given."""
    app = make_app()
    make_worker(app, queues=["mine"])
    args = {"queue_retry": (journal.key(), 1), "replaced_by_itself": (journal.key(), 1)}[name]
    kwargs = {"value": 2} if name == "queue_retry" else {}
    result = app.tasks[name].apply_async(args, kwargs, queue="mine", priority=3, headers={"tenant": "7"})

    if name == "queue_retry":
        assert result.get(timeout=20) == 2
    else:
        # As in Celery, a replacement is routed anew.
        _, _, body = take(app, "celery")
        assert body[0] == [journal.key(), 2]


def test_routing_key_and_exchange_reach_the_follow_up(
    rabbit: RabbitServer, state_server: ValkeyServer, make_app: MakeApp, journal: Journal, make_worker: MakeWorker
) -> None:
    """A topic exchange on RabbitMQ, by name and as kombu objects."""
    from kombu import Exchange, Queue

    url = state_server.new_db()
    app = make_app(rabbit.url, url, {"coalesce_redis_url": url})
    make_worker(app)
    exchange = Exchange(f"x-{journal.name}", type="topic", durable=False, auto_delete=False)
    queue = Queue(f"q-{journal.name}", exchange, routing_key="orders.#", durable=False)
    with Connection(rabbit.url) as connection:
        queue(connection.default_channel).declare()
    task = app.tasks["tell"]
    task.apply_async((journal.key(),), {"gate": "a"})
    journal.wait("tell", timeout=20)
    ways: list[dict[str, Any]] = [
        {"exchange": exchange.name, "routing_key": "orders.new"},
        {"exchange": exchange, "routing_key": "orders.old"},
        {"queue": queue},
    ]
    for way in ways:
        result = task.apply_async((journal.key(),), coalesce="serialize", **way)
        assert result.disposition == "queued"
    journal.open("a")

    keys = []
    for _ in ways:
        with Connection(rabbit.url) as connection:
            simple = connection.SimpleQueue(queue(connection.default_channel))
            message = simple.get(timeout=20)
            keys.append(message.delivery_info["routing_key"])
            state = message.headers
            message.ack()
            # It is not run by anybody: end it, so that the next one goes.
            app.send_task(
                "tell",
                (journal.key(),),
                task_id=state["id"],
                headers={"coalesce": state["coalesce"]},
                queue=app.conf.task_default_queue,
            )
    assert keys == ["orders.new", "orders.old", "orders.#"]


@pytest.mark.parametrize("protocol", [1, 2])
def test_both_message_protocols_work(
    protocol: int, make_app: MakeApp, make_worker: MakeWorker, journal: Journal
) -> None:
    """`task_protocol` 1 has no headers for a run: its message is admitted at the gate."""
    app = make_app(conf={"task_protocol": protocol})
    make_worker(app)
    task = app.tasks["queue"]
    first = task.delay(journal.key(), 1, gate="a")
    journal.wait("start", timeout=20)
    second = task.delay(journal.key(), 2)
    third = task.delay(journal.key(), 3)
    journal.open("a")

    assert first.get(timeout=20) == 1
    assert second.get(timeout=20) == third.get(timeout=20) == 3
    assert len(journal.events("start")) == 2


@pytest.mark.parametrize("serializer", ["pickle", "json"])
def test_arguments_survive_their_serializer(serializer: str, elsewhere: Any, journal: Journal) -> None:
    """What the serializer can take arrives in a follow-up, merged or not."""
    app, _ = elsewhere
    value: Any = {3} if serializer == "pickle" else {"ä": [1.5, None, True]}
    task = app.tasks["queue"]
    task.apply_async((journal.key(), 0), {"gate": "a"})
    journal.wait("start", timeout=20)
    task.apply_async((journal.key(), 1), serializer=serializer, ignore_result=True)
    joined = task.apply_async((journal.key(), value), serializer=serializer, ignore_result=True)
    assert joined.disposition == "coalesced"
    journal.open("a")

    start = journal.wait("start", count=2, timeout=20)
    assert start["args"][1] == (value if serializer == "json" else str(value))
    journal.wait("coalesce_drain", timeout=20)


def test_merged_arguments_that_the_runs_own_serializer_can_not_take(elsewhere: Any, journal: Journal) -> None:
    """A call in JSON, joined by one in pickle that JSON can not express: its run may fail, the key goes on."""
    app, _ = elsewhere
    task = app.tasks["queue"]
    task.apply_async((journal.key(), 0), {"gate": "a"})
    journal.wait("start", timeout=20)
    task.apply_async((journal.key(), 1), serializer="json", ignore_result=True)
    task.apply_async((journal.key(), {3}), serializer="pickle", ignore_result=True)
    after = task.apply_async((journal.key(), 4), coalesce="serialize")
    journal.open("a")

    assert after.get(timeout=20) == 4
    journal.wait("coalesce_drain", timeout=20)


def test_serializer_that_workers_do_not_accept_ends_the_run_and_not_the_key(
    app: HarnessApp, worker: WorkerProcess, journal: Journal
) -> None:
    """A record in a format that is not accepted fails its own callers; what waits behind it runs."""
    task = app.tasks["serialize"]
    task.delay(journal.key(), 1, gate="a")
    journal.wait("start", key="key", timeout=20)
    refused = task.apply_async((journal.key(), 2), serializer="pickle")
    after = task.delay(journal.key(), 3)
    journal.open("a")

    assert after.get(timeout=20) == 3
    with pytest.raises(Exception, match="pickle"):
        refused.get(timeout=20)


def test_pydantic_arguments_and_results(app: HarnessApp, worker: WorkerProcess, journal: Journal) -> None:
    """`pydantic=True`: the key is the model's field, and a follow-up gets a model."""
    from tests.acceptance.around_tasks import Order

    task = app.tasks["order"]
    first = task.delay(Order(key=journal.key(), amount=1), gate="a")
    assert first.key == journal.key()
    journal.wait("start", timeout=20)
    second = task.delay(Order(key=journal.key(), amount=2))
    third = task.delay({"key": journal.key(), "amount": 3})
    assert third.disposition == "coalesced"
    journal.open("a")

    assert first.get(timeout=20) == {"key": journal.key(), "amount": 2}
    assert second.get(timeout=20) == {"key": journal.key(), "amount": 4}
    assert [each["type"] for each in journal.events("order")] == ["Order", "Order"]


def test_pydantic_model_in_a_foreign_message(app: HarnessApp, worker: WorkerProcess, journal: Journal) -> None:
    """The gate works the key out from what a message holds of the model."""
    app.tasks["order"].delay({"key": journal.key(), "amount": 1}, gate="a")
    journal.wait("start", timeout=20)
    foreign = app.send_task("order", ({"key": journal.key(), "amount": 5},))
    wait_until(lambda: journal.events("coalesce_trigger", disposition="queued"), 20)
    journal.open("a")

    assert foreign.get(timeout=20) == {"key": journal.key(), "amount": 6}


def test_positional_keyword_and_default_arguments_reach_the_body(
    app: HarnessApp, worker: WorkerProcess, journal: Journal
) -> None:
    """As they were written, not as they were bound."""
    task = app.tasks["queue"]
    task.apply_async((journal.key(),), {"value": 1}).get(timeout=20)
    task.apply_async((), {"key": journal.key(), "value": 2}).get(timeout=20)
    seen = [(each["args"], each["kwargs"]) for each in journal.events("start")]
    assert seen == [([journal.key()], {"value": 1}), ([], {"key": journal.key(), "value": 2})]


def test_task_options_apply_to_follow_ups(app: HarnessApp, worker: WorkerProcess, journal: Journal) -> None:
    """`compression`, `expires` ... of the task itself."""
    task = app.tasks["tell_options"]
    task.apply_async((journal.key(),), {"gate": "a"})
    journal.wait("tell", timeout=20)
    result = task.delay(journal.key())
    journal.open("a")
    assert told(journal, result)["expires"]
