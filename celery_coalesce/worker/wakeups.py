"""Messages that only wake a worker: the broker need not keep them until they are acknowledged.

A message of a run that has a record is worth nothing by itself: if it is lost with its worker, the record's timer has
another one sent. Kombu's Redis transport notes each message that it delivers, in a transaction, lest it is lost, and
takes that back in another when it is acknowledged. Both are spared for a wake-up, where the broker is the Redis that
holds the records: it is noted in this process alone. There it counts for what may be fetched until it is acknowledged,
and is put back when the channel closes, as any message that kombu has noted.

Every other message is kept as ever: one without a run, which is the only copy of what it asks for; one of a task that
is acknowledged late, which Celery may give back; one of another transport or server.

Relied on are, of kombu (5.5-5.7), that nothing else calls ``append``, ``ack`` and ``restore_by_tag`` of
transport.redis ``QoS`` to note a message, to be done with it and to put it back; ``append`` and ``ack`` of
transport.virtual ``QoS``, which do the counting; ``_delivered``; and ``Channel._do_restore_message``.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from celery import bootsteps
from kombu.transport import virtual

from ..calls import HEADER
from ..engine import Engine, engine_of
from ..errors import StoreUnavailable

if TYPE_CHECKING:
    from celery.worker.consumer import Consumer

__all__ = ["Wakeups", "is_unkept", "keep", "may_spare", "spare"]


class Wakeups(bootsteps.StartStopStep):
    """Spares the broker the keeping of wake-ups, on each channel that the worker consumes from."""

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def start(self, consumer: Consumer) -> None:
        """Take the consumer's new channel in hand, before it consumes."""
        channel, engine = consumer.task_consumer.channel, engine_of(consumer.app)
        # Its connection is the next to notice that the server is away.
        with contextlib.suppress(StoreUnavailable):
            if may_spare(engine, channel):
                spare(engine, channel)


def may_spare(engine: Engine, channel: Any) -> bool:
    """Return whether a channel keeps what it delivers, and does so in the very database that holds the records.

    Raises:
        StoreUnavailable: The server can not be reached.
    """
    if engine.broker is None or not engine.broker.is_behind(channel):
        return False
    from kombu.transport.redis import QoS

    return isinstance(channel.qos, QoS)


def spare(engine: Engine, channel: Any) -> None:
    """Have a channel keep no wake-ups.

    Args:
        engine: The engine of the app that consumes.
        channel: A channel of kombu's Redis transport, which has delivered nothing yet.
    """
    qos = channel.qos
    keep, acknowledge, put_back = qos.append, qos.ack, qos.restore_by_tag

    def append(message: Any, delivery_tag: str) -> None:
        if _is_wakeup(engine, message):
            message.is_wakeup = True
            virtual.QoS.append(qos, message, delivery_tag)
        else:
            keep(message, delivery_tag)

    def ack(delivery_tag: str) -> None:
        if _wakeup(qos, delivery_tag) is not None:
            virtual.QoS.ack(qos, delivery_tag)
        else:
            acknowledge(delivery_tag)

    def restore_by_tag(tag: str, client: Any = None, leftmost: bool = False) -> None:
        message = _wakeup(qos, tag)
        if message is None:
            put_back(tag, client=client, leftmost=leftmost)
        else:
            sent_to = message.delivery_info
            with channel.conn_or_acquire(client) as given:
                channel._do_restore_message(message._raw, sent_to["exchange"], sent_to["routing_key"], given, leftmost)

    qos.append, qos.ack, qos.restore_by_tag = append, ack, restore_by_tag


def _is_wakeup(engine: Engine, message: Any) -> bool:
    """Return whether a message says that it comes for a run. If there is none, the gate has it kept."""
    headers = message.headers
    header = headers.get(HEADER) if isinstance(headers, dict) else None
    if not isinstance(header, dict) or "run" not in header:
        return False
    name = headers.get("task")
    task = engine.tasks.get(name) if isinstance(name, str) else None
    return task is not None and getattr(task, "coalesce_policy", None) is not None and not task.acks_late


def _wakeup(qos: Any, tag: str) -> Any:
    """Return the wake-up of that tag, ``None`` if it is none."""
    message = qos._delivered.get(tag)
    return message if is_unkept(message) else None


def is_unkept(message: Any) -> bool:
    """Return whether this process alone has a message."""
    return getattr(message, "is_wakeup", False)


def keep(message: Any) -> None:
    """Have the broker keep a message that is no mere wake-up, as it turned out."""
    message.is_wakeup = False
    qos = message.channel.qos
    type(qos).append(qos, message, message.delivery_tag)
