"""Pushing messages within a transition, where the broker is the Redis that holds the records.

There, publishing is one ``LPUSH``. Kombu's own code makes the message and is watched for what it would push; the
script that accepts the call pushes that if it dispatches the run, and else does not: one round trip, and nothing to be
killed in between. A message that is made for a call which then coalesces is work for nothing, so a process remembers
for a moment which keys were busy, and asks without one for those. Being wrong costs no more than the message, or a
second round trip.

Relied on are, of kombu (5.5-5.7), in transport.redis ``Channel.conn_or_acquire``, ``pool``, ``global_keyprefix`` and
``_expires``, and the ``LPUSH`` of ``Channel._put``. Whatever it does otherwise (fanout, several queues, queues that
expire, another transport or server) is left to kombu. Its transport is imported late: it needs redis-py, which other
brokers do without.
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

from .records import Push

if TYPE_CHECKING:
    from .store import Store

__all__ = ["Broker"]

logger = logging.getLogger("celery_coalesce")

#: For how many seconds a key counts as busy, and of how many keys that is remembered.
BUSY_FOR, MOST_BUSY = 1.0, 10_000

#: What kombu asks for while it declares a queue: that is done at once.
DECLARING = frozenset({"sadd", "smembers", "exists", "pipeline"})


class _UnpushableError(Exception):
    """Publishing this message is something else than one push."""


class Broker:
    """The broker, where it is the Redis that holds the records.

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
            if not self.is_behind(producer.channel):
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

    def is_behind(self, channel: Any) -> bool:
        """Return whether a channel of kombu's leads to the very database that holds the records.

        Raises:
            StoreUnavailable: The server can not be reached.
        """
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
