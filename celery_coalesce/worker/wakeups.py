"""Messages that only wake a worker: the broker need not keep them until they are acknowledged.

A message of a run that has a record is worth nothing by itself: if it is lost with its worker, the record's timer has
another one sent. Kombu's Redis transport notes each message that it delivers, in a transaction, lest it is lost, and
takes that back in another when it is acknowledged. Both are spared for a wake-up, where the broker is the Redis that
holds the records: it is noted in this process alone. There it counts for what may be fetched until it is acknowledged,
and is put back when the channel closes, as any message that kombu has noted.

Every other message is kept as ever: one without a run, which is the only copy of what it asks for, and one of another
transport or server.

Relied on are, of kombu (5.5-5.7): that it notes a message, is done with it and puts it back by ``append``, ``ack`` and
``restore_by_tag`` of transport.redis ``QoS`` alone, looked up on the instance; ``append`` and ``ack`` of
transport.virtual ``QoS``, which do the counting; ``_delivered``; and ``Channel._do_restore_message``.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from celery import bootsteps
from kombu.transport import virtual

from ..calls import HEADER
from ..dispatch import named_run
from ..engine import Engine, engine_of
from ..errors import StoreUnavailable

if TYPE_CHECKING:
    from celery.worker.consumer import Consumer

__all__ = ["Wakeups", "keep_no_wakeups", "need_not_keep"]


class Wakeups(bootsteps.StartStopStep):
    """Has no wake-ups kept, on each channel that the worker consumes from."""

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def include_if(self, parent: Consumer) -> bool:
        """Return whether the broker is the server that holds the records: a consumer of another is left as it is."""
        return engine_of(parent.app).broker is not None

    def start(self, consumer: Consumer) -> None:
        """Take the consumer's new channel in hand, before it consumes."""
        channel, engine = consumer.task_consumer.channel, engine_of(consumer.app)
        # With a server that is away kombu keeps them, for as long as this connection lasts.
        with contextlib.suppress(StoreUnavailable):
            if need_not_keep(engine, channel):
                keep_no_wakeups(engine, channel)


def need_not_keep(engine: Engine, channel: Any) -> bool:
    """Return whether a channel keeps what it delivers, and does so in the very database that holds the records.

    Raises:
        StoreUnavailable: The server can not be reached.
    """
    if engine.broker is None or not engine.broker.is_behind(channel):
        return False
    from kombu.transport.redis import QoS

    return type(channel.qos) is QoS


def keep_no_wakeups(engine: Engine, channel: Any) -> None:
    """Have a channel note wake-ups in this process alone.

    Args:
        engine: The engine of the app that consumes.
        channel: A channel of kombu's Redis transport, which has delivered nothing yet.
    """
    qos = channel.qos
    keep, acknowledge, put_back = qos.append, qos.ack, qos.restore_by_tag

    def append(message: Any, delivery_tag: str) -> None:
        if _is_wakeup(engine, message):
            message.is_unkept = True
            virtual.QoS.append(qos, message, delivery_tag)
        else:
            keep(message, delivery_tag)

    def ack(delivery_tag: str) -> None:
        if _unkept(qos, delivery_tag) is not None:
            virtual.QoS.ack(qos, delivery_tag)
        else:
            acknowledge(delivery_tag)

    def restore_by_tag(tag: str, client: Any = None, leftmost: bool = False) -> None:
        message = _unkept(qos, tag)
        if message is None:
            put_back(tag, client=client, leftmost=leftmost)
            return
        sent_to = message.delivery_info
        with channel.conn_or_acquire(client) as given, given.pipeline() as pipe:
            channel._do_restore_message(message._raw, sent_to["exchange"], sent_to["routing_key"], pipe, leftmost)
            pipe.execute()

    qos.append, qos.ack, qos.restore_by_tag = append, ack, restore_by_tag


def _is_wakeup(engine: Engine, message: Any) -> bool:
    """Return whether a message is of a run that is its own."""
    headers = message.headers
    header = headers.get(HEADER) if isinstance(headers, dict) else None
    if not isinstance(header, dict) or header.get("exempt") is True:
        return False
    task = headers.get("task")
    if not isinstance(task, str) or engine.policy_of(task) is None:
        return False
    task_id = headers.get("id")
    return header.get("id") == task_id and named_run(header, task_id, task) is not None


def _unkept(qos: Any, tag: str) -> Any:
    """Return the message of that tag, ``None`` if it is kept or not there."""
    message = qos._delivered.get(tag)
    return message if getattr(message, "is_unkept", False) else None
