"""Transitions on Redis.

The server that holds the records is the broker where that is a Redis, else the result backend, else what
``coalesce_redis_url`` names. A connection is made by the first call of a process, and none is shared across a fork:
redis-py's pools notice a new process id.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from redis.cluster import RedisCluster
from redis.exceptions import ResponseError

from ..errors import SettingError, StoreUnavailable
from ..keys import Names
from ..settings import Settings
from . import MOST_AT_ONCE
from .clients import Client, from_url, is_redis, like_backend, like_broker, same_database, shown
from .functions import Functions, by_script, failed
from .refusals import Refusals
from .replicas import WAIT_FOR, connected, piped, sent_and_kept
from .scripts import script
from .wire import Command, Wire

if TYPE_CHECKING:
    from celery import Celery

__all__ = ["RedisStore", "connect"]

logger = logging.getLogger("celery_coalesce")

#: The least time, in seconds, that a command may block for: 0 would be for ever.
LEAST_WAIT = 0.01

OLDEST_REDIS = (6, 2)


class RedisStore:
    """Transitions on a Redis or Valkey server.

    Args:
        make_client: Makes the client, on the first call.
        names: The names of everything in Redis.
        address: The server as it may be shown to people.
        replicas: How many replicas must have a change before it counts as made.

    Attributes:
        is_broker: Whether it is known to be the broker's server, and the same database.
    """

    is_broker = False

    def __init__(self, make_client: Callable[[], Client], names: Names, address: str, replicas: int = 0) -> None:
        self.names = names
        self.address = address
        self._replicas = replicas
        self._make_client = make_client
        self._client: Client | None = None
        #: ``None`` of a Cluster, whose client alone knows which node to ask.
        self._wire: Wire | None = None
        self._functions: Functions | None = None
        self._refusals = Refusals(address)
        self._lock = threading.Lock()

    def call(self, script_name: str, keys: Sequence[str], *argv: str | bytes | int) -> Any:
        """Run a transition and return its reply.

        Raises:
            StoreUnavailable: The server can not be reached, or has too few replicas: then the transition has run, and
                may or may not outlive a failover.
            StoreError: It refused.
        """
        transition = script(script_name)
        what = (len(keys), *keys, *argv)
        with self._refusals:
            self._connected()
            run = self._sent_and_kept if self._replicas and transition.lasting else self._sent
            functions = self._functions
            reply = functions.call(run, transition, what) if functions else by_script(run, transition, what)
            if isinstance(reply, Exception):
                raise reply
            return reply

    def _sent(self, commands: Sequence[Command]) -> list[Any]:
        """Return the replies to commands, the refusals among them."""
        client = self._connected()
        if self._wire is not None:
            return self._wire.ask(commands)
        if len(commands) > 1:
            return piped(client, commands)
        try:
            return [client.execute_command(*commands[0])]
        except ResponseError as refusal:
            return [refusal.with_traceback(None)]

    def _sent_and_kept(self, commands: Sequence[Command]) -> list[Any]:
        client = self._connected()
        ask = self._wire.ask if self._wire is not None else None
        replies, there = sent_and_kept(client, commands, meta=self.names.meta, replicas=self._replicas, ask=ask)
        if there < self._replicas and not isinstance(replies[0], Exception):
            raise self._too_few(f"{there} of them had the change within {WAIT_FOR} s")
        return replies

    def _too_few(self, there: str) -> StoreUnavailable:
        return StoreUnavailable(
            f"the state server {self.address} has not the replicas that "
            f"coalesce_wait_replicas={self._replicas!r} asks for: {there}; bring them back, or ask for fewer"
        )

    def call_many(self, calls: Sequence[tuple[Any, ...]]) -> Iterator[Any]:
        """Run transitions in their order, some hundreds to a round trip.

        What is sent in one go is sent again as a whole after a broken connection.

        Args:
            calls: The arguments of :meth:`call`, of each.

        Yields:
            Their replies, in their order.

        Raises:
            StoreUnavailable: The server can not be reached; of those that were not answered, some may have run.
            StoreError: It refused one. Those before it have run, and of those behind it some may have.
        """
        if len(calls) == 1:
            yield self.call(*calls[0])
            return
        for start in range(0, len(calls), MOST_AT_ONCE):
            yield from self._call_at_once(calls[start : start + MOST_AT_ONCE])

    def _call_at_once(self, calls: Sequence[tuple[Any, ...]]) -> Iterator[Any]:
        with self._refusals:
            run = self._sent_and_kept if self._replicas else self._sent
            self._connected()
            names = {name for name, *_ in calls}
            functions = self._functions
            there = {name for name in names if functions is not None and functions.has(self._sent, script(name))}
            replies = run(_commands(calls, there))
            if functions is not None and there and any(map(failed, replies)):
                # It may be that one of them has gone. All are asked again: those that have run are known again.
                functions.lost()
                replies = run(_commands(calls, set()))
        for reply in replies:
            with self._refusals:
                if isinstance(reply, Exception):
                    raise reply
            yield reply

    def members(self, key: str, most: int | None = None) -> list[str]:
        """Return the members of a set, some hundreds to a command.

        Args:
            key: The set.
            most: How many will do, taken at random.
        """
        with self._refusals:
            client = self._connected()
            found = client.sscan_iter(key, count=MOST_AT_ONCE) if most is None else client.srandmember(key, most)
            return [member.decode() for member in found]

    def push(self, key: str, what: str) -> None:
        """Put something into a list, at its beginning.

        Raises:
            StoreUnavailable: The server can not be reached; it may be there all the same.
            StoreError: It refused.
        """
        with self._refusals:
            [reply] = self._sent([("LPUSH", key, what.encode())])
            if isinstance(reply, Exception):
                raise reply

    def receive(self, key: str, seconds: float) -> bytes | None:
        """Take what is handed to a list; ``None`` if nothing is within some seconds.

        Args:
            key: The list.
            seconds: More than 0, and well below the time that an answer of the server may take.
        """
        with self._refusals:
            client = self._connected()
            # Moved onto itself: an element that was popped would be gone with a reply that was lost.
            blob: bytes | None = client.blmove(key, key, max(seconds, LEAST_WAIT), "LEFT", "LEFT")
            if blob is not None:
                client.delete(key)
            return blob

    def is_at(self, pool: Any) -> bool:
        """Return whether a pool of redis-py's leads to the same database.

        Raises:
            StoreUnavailable: The server can not be reached.
        """
        with self._refusals:
            client = self._connected()
            return not isinstance(client, RedisCluster) and same_database(client.connection_pool, pool)

    def connect(self) -> None:
        """Make the client now, for the processes that are forked from this one.

        Raises:
            StoreUnavailable: The server can not be reached; the next call tries again.
        """
        with self._refusals:
            self._connected()

    def close(self) -> None:
        """Close the connections of this process."""
        client, wire, self._client, self._wire = self._client, self._wire, None, None
        if wire is not None:
            wire.close()
        if client is not None:
            client.close()

    def _connected(self) -> Client:
        if self._client is None:
            with self._lock:
                if self._client is None:
                    client = self._make_client()
                    self._inspect(client)
                    self._count_replicas(client)
                    if not isinstance(client, RedisCluster):
                        self._wire = Wire(client.connection_pool)
                        self._functions = Functions()
                    self._client = client
        return self._client

    def _inspect(self, client: Client) -> None:
        """Refuse a server that is too old, and warn of one that forgets."""
        try:
            info = client.info("server") if isinstance(client, RedisCluster) else client.info()
        except ResponseError:
            return
        if isinstance(client, RedisCluster):
            return
        if "valkey_version" not in info:
            version = str(info.get("redis_version", "0"))
            numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
            if numbers < OLDEST_REDIS:
                raise SettingError(
                    "coalesce_redis_url",
                    self.address,
                    f"is a Redis {version}",
                    "use Redis 6.2 or newer, or Valkey",
                )
        if info.get("redis_mode") == "cluster" or info.get("cluster_enabled"):
            raise SettingError(
                "coalesce_redis_url", self.address, "is a Cluster node", "write redis+cluster://host:port"
            )
        policy = str(info.get("maxmemory_policy", "noeviction"))
        if policy.startswith("allkeys"):
            logger.warning(
                "The state server %s evicts keys (maxmemory-policy %s): runs can be forgotten. "
                "Set maxmemory-policy noeviction, or name another server in coalesce_redis_url.",
                self.address,
                policy,
                extra={"action": "evicting_server", "policy": policy},
            )

    def _count_replicas(self, client: Client) -> None:
        """Fail before anything is changed where there are too few replicas to begin with."""
        if self._replicas and (there := connected(client, self.names.meta)) < self._replicas:
            raise self._too_few(f"{there} are connected")


def _commands(calls: Sequence[tuple[Any, ...]], functions: set[str]) -> list[Command]:
    """Return the commands for calls of transitions, some of which are functions of the server."""
    commands: list[Command] = []
    sent: set[str] = set()
    for name, keys, *argv in calls:
        transition = script(name)
        known: tuple[str, str]
        if name in functions:
            known = ("FCALL", transition.function or "")
        else:
            # The first of each brings its text along, for a server that does not know it: to hear so first would cost
            # a round trip, and mix up the order of calls if another client made it known in between.
            known = ("EVALSHA", transition.sha) if name in sent else ("EVAL", transition.text)
        sent.add(name)
        commands.append((*known, len(keys), *keys, *argv))
    return commands


def connect(app: Celery, settings: Settings) -> RedisStore:
    """Return an app's store; no connection is made yet.

    Raises:
        SettingError: Neither the broker nor the result backend is a Redis, and ``coalesce_redis_url`` is not set; or
            the URL
            can not be read.
    """
    url = settings.redis_url
    if url is not None:
        return RedisStore(from_url(url), Names("", settings.namespace), shown(url), settings.wait_replicas)
    broker = app.conf.broker_write_url or app.conf.broker_url or ""
    backend = app.conf.result_backend or ""
    if isinstance(broker, list | tuple):
        broker = broker[0] if broker else ""
    if is_redis(broker):
        prefix = str((app.conf.broker_transport_options or {}).get("global_keyprefix", ""))
        names = Names(prefix, settings.namespace)
        store = RedisStore(lambda: like_broker(app), names, shown(broker), settings.wait_replicas)
        store.is_broker = True
        return store
    if isinstance(backend, str) and is_redis(backend):
        options = app.conf.result_backend_transport_options or {}
        prefix = str(options.get("global_keyprefix", ""))
        names = Names(prefix, settings.namespace)
        return RedisStore(lambda: like_backend(app), names, shown(backend), settings.wait_replicas)
    raise SettingError(
        "coalesce_redis_url",
        None,
        "is not set, and neither the broker nor the result backend is a Redis or Valkey",
        "set coalesce_redis_url to a Redis or Valkey server that all producers and workers share",
    )
