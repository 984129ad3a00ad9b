"""What ``apply_async`` was given, kept so that it can be given again.

A run's arguments, its call and its followers are kept in Celery's own serializers and read back under the app's
``accept_content``: what a worker would refuse in a message it refuses in a record.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any

from celery.app.task import Context
from celery.backends.asynchronous import Drainer
from celery.backends.base import Backend
from celery.utils.time import maybe_iso8601, maybe_make_aware
from kombu import Exchange, Queue, binding
from kombu.exceptions import SerializationError, SerializerNotInstalled
from kombu.serialization import dumps, loads, prepare_accept_content

if TYPE_CHECKING:
    from celery import Celery, Task

__all__ = [
    "CALLBACKS",
    "HEADER",
    "TIMES",
    "UNREADABLE",
    "captured",
    "decode",
    "encode",
    "follower_of",
    "hears_of_calls",
    "message_call",
    "moment",
    "options_of",
    "request_context",
    "without_callbacks",
]

#: What :func:`encode` and :func:`decode` raise of a value that no time makes readable.
UNREADABLE = (SerializationError, SerializerNotInstalled)

#: The message header, and the field of a request, in which a run travels.
HEADER = "coalesce"

#: Options of ``apply_async`` that the record keeps in fields of its own.
TIMES = ("countdown", "eta", "expires")

#: Options that say who is told about the end of a call: no other call's result is an answer to one that has them.
CALLBACKS = ("link", "link_error", "chain", "chord", "group_id", "group_index")

_ENTITIES = {"queue": Queue, "exchange": Exchange, "binding": binding}

#: Options that only mean something while the call is made.
_TRANSIENT = frozenset(
    {"producer", "publisher", "connection", "router", "result_cls", "add_to_parent", "event_dispatcher",
     "task_type", "retry", "retry_policy", "timeout", "confirm_timeout"}
)  # fmt: skip


def encode(value: Any, serializer: str | None) -> bytes:
    """Serialize a value with a kombu serializer, its content type put in front.

    Raises:
        kombu.exceptions.EncodeError: The serializer can not take it.
    """
    content_type, encoding, data = dumps(value, serializer=serializer)
    payload = data.encode(encoding) if isinstance(data, str) else data
    return f"{content_type} {encoding}\n".encode("ascii") + payload


def decode(app: Celery, blob: bytes) -> Any:
    """Read what :func:`encode` wrote.

    Raises:
        kombu.exceptions.ContentDisallowed: The app's ``accept_content`` does not allow it.
    """
    head, _, payload = blob.partition(b"\n")
    content_type, _, encoding = head.decode("ascii").partition(" ")
    accept = prepare_accept_content(app.conf.accept_content)
    return loads(payload, content_type, encoding, accept=accept)


def captured(app: Celery, options: Mapping[str, Any], parent: Task | None) -> dict[str, Any]:
    """Return a call's options as they can be stored and given again.

    What Celery would take from the surroundings at the time of publishing (parent, root, inherited priority, the
    caller's reply queue) is taken now: a follow-up is published by whoever ends the run before it.

    Args:
        app: The app.
        options: The options.
        parent: The task that makes the call (``app.current_worker_task``), if one does.
    """
    call = {
        name: _plain(value)
        for name, value in options.items()
        if value is not None and name not in _TRANSIENT and name not in TIMES
    }
    headers = {name: value for name, value in (call.pop("headers", None) or {}).items() if name != HEADER}
    if headers:
        call["headers"] = headers
    if parent is not None:
        request = parent.request
        call.setdefault("root_id", request.root_id or request.id)
        call.setdefault("parent_id", request.id)
        if app.conf.task_inherit_parent_priority and "priority" not in call:
            priority = (request.delivery_info or {}).get("priority")
            if priority is not None:
                call["priority"] = priority
    if is_rpc(app):
        call.setdefault("reply_to", app.thread_oid)
    return call


def is_rpc(app: Celery) -> bool:
    """Whether results go to their caller's own queue, where only that caller can read them."""
    backend = app.backend
    # Celery imports it where it is used. By the backend, and not by its setting, which takes long to look up.
    module = sys.modules.get("celery.backends.rpc")
    return module is not None and isinstance(backend, module.RPCBackend)


def hears_of_calls(backend: Any) -> bool:
    """Return whether a result backend wants to know of a call before anybody asks for its result.

    Redis's subscribes then. Whoever waits subscribes anyway, before it looks what is there (``add_pending_result`` and
    ``on_wait_for_pending``, celery.backends.asynchronous and .redis, 5.5-5.7); most callers never do. Only where
    greenlets drain the subscription is somebody told who does not wait (``AsyncResult.then``).
    """
    told = type(backend).on_task_call
    module = sys.modules.get("celery.backends.redis")
    if module is not None and told is module.RedisBackend.on_task_call:
        return type(backend.result_consumer.drainer) is not Drainer
    return told is not Backend.on_task_call


def _plain(value: Any) -> Any:
    """Return a value that a serializer takes: queues, exchanges and their bindings as mappings of their attributes."""
    if isinstance(value, Queue | Exchange | binding):
        attributes = {name: _plain(item) for name, item in value.as_dict().items() if item is not None}
        return {"__kombu__": type(value).__name__.lower(), **attributes}
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def options_of(call: Mapping[str, Any]) -> dict[str, Any]:
    """Return a stored call as options of ``apply_async``."""
    return {name: _revived(value) for name, value in call.items()}


def _revived(value: Any) -> Any:
    if isinstance(value, dict) and "__kombu__" in value:
        entity = _ENTITIES[value["__kombu__"]]
        return entity(**{name: _revived(item) for name, item in value.items() if name != "__kombu__"})
    if isinstance(value, list):
        return [_revived(item) for item in value]
    return value


def without_callbacks(call: Mapping[str, Any]) -> dict[str, Any]:
    """Return a call without its caller's own callbacks."""
    return {name: value for name, value in call.items() if name not in CALLBACKS and name != "reply_to"}


def follower_of(task: str, task_id: str, call: Mapping[str, Any], *, received: bool = False) -> dict[str, Any]:
    """Return what completes a call that another call's run covers.

    Args:
        task: The task's name.
        task_id: The call's own id.
        call: Its options, as captured.
        received: Whether a worker has received a message with that id, so that monitors wait for its end.
    """
    kept = (*CALLBACKS, "root_id", "parent_id", "reply_to", "ignore_result", "priority", "stamped_headers")
    stamps = call.get("stamped_headers") or ()
    follower = {name: call[name] for name in (*kept, *stamps) if name in call}
    return {"task": task, "task_id": task_id, "received": received, **follower}


def request_context(
    task: str,
    task_id: str,
    call: Mapping[str, Any],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> Context:
    """Return the request that a result backend completes: result, chord, errbacks and chain of a call."""

    def listed(value: Any) -> Any:
        return [value] if isinstance(value, dict) else value

    return Context(
        id=task_id,
        task=task,
        args=list(args),
        kwargs=dict(kwargs or {}),
        callbacks=listed(call.get("link")),
        errbacks=listed(call.get("link_error")),
        chain=call.get("chain"),
        chord=call.get("chord"),
        group=call.get("group_id"),
        group_index=call.get("group_index"),
        root_id=call.get("root_id") or task_id,
        parent_id=call.get("parent_id"),
        reply_to=call.get("reply_to"),
        correlation_id=task_id,
        ignore_result=bool(call.get("ignore_result")),
        delivery_info={"priority": call.get("priority")},
        headers=None,
    )


def message_call(request: Mapping[str, Any]) -> dict[str, Any]:
    """Return the call that a message without a run was made by.

    Args:
        request: The message's headers and embedded callbacks, as the worker's request holds them.
    """
    context = Context(request)
    call = {name: _plain(value) for name, value in context.as_execution_options().items() if value}
    for name in ("task_id", "headers", "origin", *TIMES):
        call.pop(name, None)
    if request.get("ignore_result") is not None:
        call["ignore_result"] = request["ignore_result"]
    delivery = request.get("delivery_info") or {}
    if delivery.get("priority") is not None:
        call["priority"] = delivery["priority"]
    routing_key, exchange = delivery.get("routing_key"), delivery.get("exchange")
    # A delayed message comes from RabbitMQ's delay exchanges, with a routing key that means nothing elsewhere.
    if routing_key and not str(exchange or "").startswith("celery_delayed"):
        if exchange:
            call["exchange"], call["routing_key"] = exchange, routing_key
        else:
            call["queue"] = routing_key
    return call


def moment(app: Celery, value: Any) -> int:
    """Return a moment given to Celery as milliseconds since the epoch.

    Args:
        app: The app.
        value: A datetime or an ISO 8601 string; UTC where it names no time zone, as everywhere in Celery.
    """
    when = maybe_make_aware(maybe_iso8601(value), app.timezone)
    return int(when.timestamp() * 1000)


def eta_header(delay: int) -> str:
    """Return the ``eta`` header of a message that waits for some milliseconds."""
    return (datetime.now(timezone.utc) + timedelta(milliseconds=delay)).isoformat()


def eta_here(eta: datetime | None, header: object) -> datetime | None:
    """Return the moment at which a worker brings a waiting message to the gate, by the worker's own clock.

    Args:
        eta: The moment by the clock of whoever published the message. A worker whose clock is ahead comes too early,
            and is told by the record how long to wait; one whose clock is behind would come hours late.
        header: What the message says of its run.
    """
    wait = header.get("wait") if isinstance(header, dict) else None
    if eta is None or not isinstance(wait, int):
        return eta
    return min(eta, datetime.now(timezone.utc) + timedelta(milliseconds=wait))
