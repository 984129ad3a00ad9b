"""Commands as bytes, on redis-py's own connections.

What redis-py does around a command (packing it in many small steps, counting, a look into the socket, a pool with a
mutex) takes longer than the command. Here it is packed in one go, and goes out on a connection that is redis-py's in
all that is difficult: addresses, TLS, credentials, Sentinel, health checks, timeouts, replies, retries.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError

__all__ = ["Command", "Wire"]

#: A command and its arguments; what is of one call alone is better given as bytes.
Command = Sequence[str | bytes | int]


def packed(command: Command) -> bytes:
    """Return a command as it is sent (https://redis.io/docs/latest/develop/reference/protocol-spec)."""
    parts = [_bulk(part) if isinstance(part, bytes) else _named(part) for part in command]
    return b"*%d\r\n%b" % (len(command), b"".join(parts))


def _bulk(value: bytes) -> bytes:
    return b"$%d\r\n%b\r\n" % (len(value), value)


@lru_cache(maxsize=1024)
def _named(name: str | int) -> bytes:
    """Return a part of a command that is the name of something: most of them are in every command."""
    return _bulk(str(name).encode())


class Wire:
    """The connections of a process to a server.

    Args:
        pool: redis-py's pool, which makes them.
    """

    def __init__(self, pool: Any) -> None:
        self._pool = pool
        self._pid = os.getpid()
        #: Those that nobody uses. Both ends of a deque are atomic, and no mutex can be left behind by a fork.
        self._idle: deque[Any] = deque()

    def ask(self, commands: Sequence[Command]) -> list[Any]:
        """Send commands in one go, and return their replies; the refusal of one is among them as an exception.

        After a broken connection all of them are sent again: at once if it may have been closed while nobody used it,
        and then as often as its ``Retry`` says.

        Raises:
            redis.exceptions.RedisError: There is no server, or no answer.
        """
        sent, count = b"".join(map(packed, commands)), len(commands)
        connection = self._taken()
        try:
            try:
                return _exchanged(connection, sent, count)
            except RedisConnectionError:
                connection.disconnect()
            replies: list[Any] = connection.retry.call_with_retry(
                lambda: _exchanged(connection, sent, count), lambda _: connection.disconnect()
            )
            return replies
        finally:
            self._idle.append(connection)

    def close(self) -> None:
        """Close the connections that nobody uses."""
        while self._idle:
            self._idle.pop().disconnect()

    def _taken(self) -> Any:
        if self._pid != os.getpid():
            # Those of the process that this one was forked from are its own.
            self._idle, self._pid = deque(), os.getpid()
        try:
            return self._idle.pop()
        except IndexError:
            return self._pool.make_connection()


def _exchanged(connection: Any, sent: bytes, count: int) -> list[Any]:
    replies: list[Any] = []
    try:
        # Does nothing if it is connected. If not, only this asks a Sentinel where to.
        connection.connect()
        connection.send_packed_command((sent,))
        for _ in range(count):
            try:
                replies.append(connection.read_response())
            except ResponseError as refusal:
                # A reply, whose traceback would keep all that its callers hold until the garbage is collected.
                replies.append(refusal.with_traceback(None))
    except BaseException:
        # Interrupted between the two (a signal, a killed greenlet), it would give this one's reply to the next.
        connection.disconnect()
        raise
    return replies
