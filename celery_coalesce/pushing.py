"""A call's message, pushed by the script that accepts the call: one round trip, and nothing to be killed in between.

Where the broker is the Redis that holds the records, publishing is one ``LPUSH``. Kombu's own code makes the message
and is watched for what it would push; the script pushes that if it dispatches the run, and else does not. A message
that is made for a call which then coalesces is work for nothing, so a process remembers for a moment which keys were
busy, and asks without one for those. Being wrong costs no more than the message, or a second round trip.

Relied on are ``Channel.conn_or_acquire`` and the ``LPUSH`` of ``Channel._put`` (kombu.transport.redis, 5.5-5.7).
Whatever they do otherwise (fanout, several queues, queues that expire, another transport) is published as ever.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from secrets import token_hex
from typing import Any

from celery.signals import after_task_publish, before_task_publish, task_sent

from .records import Push

__all__ = ["Pusher"]

logger = logging.getLogger("celery_coalesce")

#: For how many seconds a key counts as busy, and of how many keys that is remembered.
BUSY_FOR, MOST_BUSY = 1.0, 10_000

#: What kombu asks for while it declares a queue: that is done at once.
DECLARING = frozenset({"sadd", "smembers", "exists", "pipeline"})


class UnpushableError(Exception):
    """Publishing this message is something else than one push."""


class Pusher:
    """What makes messages for an app's scripts to push."""

    def __init__(self) -> None:
        self._busy: dict[str, float] = {}

    # -- keys that were busy -----------------------------------------------------------------------------------------

    def note(self, state: str) -> None:
        """Note that a key was busy."""
        if len(self._busy) >= MOST_BUSY:
            self._busy.clear()
        self._busy[state] = time.monotonic()

    def was_busy(self, state: str) -> bool:
        """Return whether a key was busy a moment ago."""
        return time.monotonic() - self._busy.get(state, -BUSY_FOR) < BUSY_FOR

    # -- messages ----------------------------------------------------------------------------------------------------

    def is_free(self) -> bool:
        """Return whether nobody is told of a publish, who would be told of one that may not happen."""
        return not (before_task_publish.receivers or after_task_publish.receivers or task_sent.receivers)

    def made(self, producer: Any, publish: Callable[[str], Any]) -> Push | None:
        """Return what publishing would push, ``None`` if that is not for a script to do.

        Args:
            producer: The producer that it would be published with.
            publish: Publishes the message with that; given what stands for the run's id.
        """
        run = token_hex(8)
        try:
            with _watched(producer.channel) as pushed:
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


class _Watched:
    """Takes the place of a client of kombu's: keeps what is pushed."""

    def __init__(self, channel: Any) -> None:
        self._channel = channel
        self.pushed: list[tuple[str, str]] = []

    def lpush(self, queue: str, message: str) -> None:
        self.pushed.append((f"{self._channel.global_keyprefix}{queue}", message))

    def __getattr__(self, name: str) -> Any:
        if name not in DECLARING:
            raise UnpushableError(name)
        return getattr(self._channel._create_client(), name)


@contextmanager
def _watched(channel: Any) -> Iterator[list[tuple[str, str]]]:
    from kombu.transport.redis import Channel

    if not isinstance(channel, Channel) or getattr(channel, "_expires", None):
        raise UnpushableError(channel)
    watched = _Watched(channel)
    # The channel is its producer's alone for as long as that is not back in its pool.
    channel.conn_or_acquire = lambda client=None: nullcontext(client or watched)
    try:
        yield watched.pushed
    finally:
        del channel.conn_or_acquire
