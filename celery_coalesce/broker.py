"""The broker, where it is the Redis that holds the records: what else scripts do in the same go.

**Pushing.** Publishing is one ``LPUSH``. Kombu's own code makes the message and is watched for what it would push; the
script that accepts the call pushes that if it dispatches the run, and else does not: one round trip, and nothing to be
killed in between. A message that is made for a call which then coalesces is work for nothing, so a process remembers
for a moment which keys were busy, and asks without one for those. Being wrong costs no more than the message, or a
second round trip.

**Acknowledging.** A run that starts needs its message no more, unless its task is acknowledged late. The script that
gives it the lease takes the message out of what kombu keeps of unacknowledged ones. Kombu's count of them in this
process, which bounds what it fetches, is left to Celery: it goes down when the pool has taken the run.

Relied on are, of kombu (5.5-5.7), in transport.redis ``Channel.conn_or_acquire``, ``pool``, ``global_keyprefix`` and
``_expires``, and the ``LPUSH`` of ``Channel._put``; ``QoS.ack``, which removes a message from ``Channel.unacked_key``
and ``unacked_index_key``, and the ``QoS.ack`` of transport.virtual beneath it; and ``ack`` and ``_state`` of messages.
Whatever they do otherwise (fanout, several queues, queues that expire, another transport or server) is left to kombu.
Its transport is imported late: it needs redis-py, which other brokers do without.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from secrets import token_hex
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from celery.signals import after_task_publish, before_task_publish, task_sent
from kombu.transport import virtual

from .records import Push, Receipt

if TYPE_CHECKING:
    from .store import Store

__all__ = ["Broker", "settle"]

logger = logging.getLogger("celery_coalesce")

#: For how many seconds a key counts as busy, and of how many keys that is remembered.
BUSY_FOR, MOST_BUSY = 1.0, 10_000

#: What kombu asks for while it declares a queue: that is done at once.
DECLARING = frozenset({"sadd", "smembers", "exists", "pipeline"})


def settle(message: Any) -> None:
    """Leave to a message's ``ack`` what is to be done in this process once a script has acknowledged it."""
    qos = message.channel.qos

    def ack(multiple: bool = False) -> None:
        virtual.QoS.ack(qos, message.delivery_tag)
        message._state = "ACK"

    # Called by its ack_log_error (kombu.message, 5.5-5.7), which Celery has made a promise of, with more to come after.
    message.ack = ack


class _UnpushableError(Exception):
    """Publishing this message is something else than one push."""


class Broker:
    """The broker, where scripts may use it: what publishing would push, and what acknowledging would remove.

    Args:
        store: The server that is the broker as well.
        tells: Whether an event of Celery's own tells of each message that is published.
    """

    def __init__(self, store: Store, *, tells: bool = False) -> None:
        self._store = store
        self._tells = tells
        self._busy: dict[str, float] = {}
        #: Whether a channel of kombu's leads to that very server.
        self._here: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()

    # -- keys that were busy -----------------------------------------------------------------------------------------

    def note_busy(self, state: str) -> None:
        """Note that a key was busy."""
        if len(self._busy) >= MOST_BUSY:
            self._busy.clear()
        self._busy[state] = time.monotonic()

    def was_busy(self, state: str) -> bool:
        """Return whether a key was busy a moment ago."""
        return time.monotonic() - self._busy.get(state, -BUSY_FOR) < BUSY_FOR

    # -- messages ----------------------------------------------------------------------------------------------------

    def may_push(self) -> bool:
        """Return whether nobody is told of a publish, who would be told of one that may not happen."""
        heard = before_task_publish.receivers or after_task_publish.receivers or task_sent.receivers
        return not (heard or self._tells)

    def push_of(self, producer: Any, publish: Callable[[str], Any]) -> Push | None:
        """Return what publishing would push, ``None`` if that is not for a script to do.

        Args:
            producer: The producer that it would be published with.
            publish: Publishes the message with that; given what stands for the run's id.
        """
        run = token_hex(8)
        try:
            if not self._leads_here(producer.channel):
                return None
            with _recording(producer.channel) as pushed:
                publish(run)
        except Exception as error:
            # The same will be wrong when it is published as ever, and is told then.
            logger.debug("A message is published by itself: %r", error, extra={"action": "not_pushed"})
            return None
        if len(pushed) != 1:
            return None
        [(queue, message)] = pushed
        before, found, after = message.partition(run)
        return Push(queue, before, after) if found else None

    # -- acknowledging -----------------------------------------------------------------------------------------------

    def receipt_of(self, message: Any) -> Receipt | None:
        """Return what acknowledging a message would remove, ``None`` if that is not for a script to do.

        Raises:
            StoreUnavailable: The server can not be reached.
        """
        from kombu.transport.redis import QoS

        channel = message.channel
        if not self._leads_here(channel) or type(channel.qos).ack is not QoS.ack:
            return None
        prefix = channel.global_keyprefix
        unacked, index = f"{prefix}{channel.unacked_key}", f"{prefix}{channel.unacked_index_key}"
        return Receipt(unacked, index, message.delivery_tag)

    def _leads_here(self, channel: Any) -> bool:
        here = self._here.get(channel)
        if here is None:
            from kombu.transport.redis import Channel

            here = self._here[channel] = isinstance(channel, Channel) and self._store.is_at(channel.pool)
        return here


class _Recorder:
    """Takes the place of a client of kombu's: keeps what is pushed."""

    def __init__(self, channel: Any) -> None:
        self._channel = channel
        self.pushed: list[tuple[str, str]] = []

    def lpush(self, queue: str, message: str) -> None:
        self.pushed.append((f"{self._channel.global_keyprefix}{queue}", message))

    def __getattr__(self, name: str) -> Any:
        if name not in DECLARING:
            raise _UnpushableError(name)
        return getattr(self._channel._create_client(), name)


@contextmanager
def _recording(channel: Any) -> Iterator[list[tuple[str, str]]]:
    if getattr(channel, "_expires", None):
        raise _UnpushableError(channel)
    recorder = _Recorder(channel)
    # The channel is its producer's alone for as long as that is not back in its pool.
    channel.conn_or_acquire = lambda client=None: nullcontext(client or recorder)
    try:
        yield recorder.pushed
    finally:
        del channel.conn_or_acquire
