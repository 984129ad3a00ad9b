"""The only module that speaks to Redis.

The server that holds the records is the broker where that is a Redis, else the result backend, else what
``coalesce_redis_url`` names. A connection is made by the first call of a process, and none is shared across a fork:
redis-py's pools notice a new process id.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, urlsplit

import redis
from kombu.exceptions import OperationalError
from kombu.utils.url import maybe_sanitize_url
from redis.backoff import ExponentialBackoff
from redis.cluster import RedisCluster
from redis.exceptions import (
    ConnectionError as RedisConnectionError,
)
from redis.exceptions import (
    NoScriptError,
    RedisClusterException,
    RedisError,
    ResponseError,
)
from redis.exceptions import (
    TimeoutError as RedisTimeoutError,
)
from redis.retry import Retry
from redis.sentinel import Sentinel

from ..errors import SettingError, StoreError, StoreUnavailable
from ..keys import Names
from ..settings import Settings
from . import MOST_AT_ONCE
from .scripts import script

if TYPE_CHECKING:
    from celery import Celery

__all__ = ["RedisStore", "connect"]

logger = logging.getLogger("celery_coalesce")

#: Seconds for one answer of the server.
SOCKET_TIMEOUT = 3.0
#: Seconds for one connection.
CONNECT_TIMEOUT = 3.0
#: How often a call is tried again after a broken connection; not after a timeout, which has cost enough by then.
#: Transitions are idempotent, so a lost reply does no harm.
RETRIES = 2

#: The least time, in seconds, that a command may block for: 0 would be for ever.
LEAST_WAIT = 0.01

#: Whoever waits for its turn has a connection of its own; the heartbeat must not be left without one.
MOST_CONNECTIONS = 10_000

OLDEST_REDIS = (6, 2)

URL_REMEDY = "use redis://, rediss://, unix://, sentinel://host:26379/master-name or redis+cluster://host:port"

Client = Any  # redis.Redis or RedisCluster: their common base is private


class RedisStore:
    """Transitions on a Redis or Valkey server.

    Args:
        make_client: Makes the client, on the first call.
        names: The names of everything in Redis.
        address: The server as it may be shown to people.
    """

    def __init__(self, make_client: Callable[[], Client], names: Names, address: str) -> None:
        self.names = names
        self.address = address
        self._make_client = make_client
        self._client: Client | None = None
        self._lock = threading.Lock()

    def call(self, script_name: str, keys: Sequence[str], *argv: str | bytes | int) -> list[Any]:
        """Run a transition and return its reply.

        Raises:
            StoreUnavailable: The server can not be reached.
            StoreError: It refused.
        """
        transition = script(script_name)
        with self._errors():
            client = self._connected()
            try:
                reply: list[Any] = client.evalsha(transition.sha, len(keys), *keys, *argv)
            except NoScriptError:
                reply = client.eval(transition.text, len(keys), *keys, *argv)
            return reply

    def call_many(self, calls: Sequence[tuple[Any, ...]]) -> Iterator[list[Any]]:
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

    def _call_at_once(self, calls: Sequence[tuple[Any, ...]]) -> Iterator[list[Any]]:
        with self._errors():
            pipeline = self._connected().pipeline(transaction=False)
            sent = set()
            for name, keys, *argv in calls:
                transition = script(name)
                # The first of each brings its text along, for a server that does not know it: to hear so first would
                # cost a round trip, and mix up the order of calls if another client made it known in between.
                known = ("EVALSHA", transition.sha) if name in sent else ("EVAL", transition.text)
                sent.add(name)
                # ClusterPipeline.evalsha (redis-py 6.4-8.1) refuses: it can not know that all keys have one slot.
                pipeline.execute_command(*known, len(keys), *keys, *argv)
            replies = pipeline.execute(raise_on_error=False)
        for reply in replies:
            with self._errors():
                if isinstance(reply, Exception):
                    raise reply
            yield reply

    def members(self, key: str, most: int) -> list[str]:
        """Return some members of a set."""
        with self._errors():
            return [member.decode() for member in self._connected().srandmember(key, most)]

    def receive(self, key: str, seconds: float) -> bytes | None:
        """Take what is handed to a list; ``None`` if nothing is within some seconds.

        Args:
            key: The list.
            seconds: More than 0, and well below the time that an answer of the server may take.
        """
        with self._errors():
            client = self._connected()
            # Moved onto itself: an element that was popped would be gone with a reply that was lost.
            blob: bytes | None = client.blmove(key, key, max(seconds, LEAST_WAIT), "LEFT", "LEFT")
            if blob is not None:
                client.delete(key)
            return blob

    def connect(self) -> None:
        """Make the client now, for the processes that are forked from this one.

        Raises:
            StoreUnavailable: The server can not be reached; the next call tries again.
        """
        with self._errors():
            self._connected()

    def close(self) -> None:
        """Close the connections of this process."""
        client, self._client = self._client, None
        if client is not None:
            client.close()

    def _connected(self) -> Client:
        if self._client is None:
            with self._lock:
                if self._client is None:
                    client = self._make_client()
                    self._inspect(client)
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

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """Turn redis-py's errors into ours; no message of theirs names a password."""
        try:
            yield
        except (RedisConnectionError, RedisTimeoutError, RedisClusterException, OperationalError) as error:
            raise StoreUnavailable(f"the state server {self.address} can not be reached: {error}") from error
        except RedisError as error:
            raise StoreError(f"the state server {self.address} refused: {error}") from error


def connect(app: Celery, settings: Settings) -> RedisStore:
    """Return an app's store; no connection is made yet.

    Raises:
        SettingError: Neither the broker nor the result backend is a Redis, and ``coalesce_redis_url`` is not set; or
            the URL
            can not be read.
    """
    url = settings.redis_url
    if url is not None:
        return RedisStore(_from_url(url), Names("", settings.namespace), _shown(url))
    broker = app.conf.broker_write_url or app.conf.broker_url or ""
    backend = app.conf.result_backend or ""
    if isinstance(broker, list | tuple):
        broker = broker[0] if broker else ""
    if _is_redis(broker):
        prefix = str((app.conf.broker_transport_options or {}).get("global_keyprefix", ""))
        return RedisStore(lambda: _like_broker(app), Names(prefix, settings.namespace), _shown(broker))
    if isinstance(backend, str) and _is_redis(backend):
        options = app.conf.result_backend_transport_options or {}
        prefix = str(options.get("global_keyprefix", ""))
        return RedisStore(lambda: _like_backend(app), Names(prefix, settings.namespace), _shown(backend))
    raise SettingError(
        "coalesce_redis_url",
        None,
        "is not set, and neither the broker nor the result backend is a Redis or Valkey",
        "set coalesce_redis_url to a Redis or Valkey server that all producers and workers share",
    )


def _is_redis(url: str) -> bool:
    return url.split("://", 1)[0].split("+", 1)[0] in {"redis", "rediss", "sentinel", "valkey", "valkeys"}


def _shown(url: str) -> str:
    """Return a URL without its password."""
    try:
        return str(maybe_sanitize_url(url.split(";", 1)[0])).split("?", 1)[0]
    except ValueError:
        return "..."


def _options() -> dict[str, Any]:
    return {
        "socket_timeout": SOCKET_TIMEOUT,
        "socket_connect_timeout": CONNECT_TIMEOUT,
        "retry": Retry(ExponentialBackoff(cap=0.5, base=0.05), RETRIES, supported_errors=(RedisConnectionError,)),
        "decode_responses": False,
        "max_connections": MOST_CONNECTIONS,
        # RESP3's greeting fails on a server that is too old, before it can be refused by its version.
        "protocol": 2,
    }


def _from_url(url: str) -> Callable[[], Client]:
    """Return what makes a client from a URL, once the URL has been read."""
    if url.startswith("sentinel://"):
        try:
            return _sentinel(url)
        except ValueError as error:
            raise SettingError("coalesce_redis_url", "...", f"can not be read ({error})", URL_REMEDY) from None
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 - raises for a port that is no number
    except ValueError as error:
        raise SettingError("coalesce_redis_url", "...", f"can not be read ({error})", URL_REMEDY) from None
    scheme = parts.scheme
    if scheme in {"redis+cluster", "rediss+cluster"}:
        plain = scheme.split("+")[0] + url[len(scheme) :]
        return lambda: RedisCluster.from_url(plain, **_options())
    scheme = {"valkey": "redis", "valkeys": "rediss", "redis+socket": "unix"}.get(scheme, scheme)
    if scheme not in {"redis", "rediss", "unix"}:
        raise SettingError("coalesce_redis_url", _shown(url), f"has the unknown scheme {scheme!r}", URL_REMEDY)
    plain = scheme + url[len(parts.scheme) :]
    try:
        pool = redis.ConnectionPool.from_url(plain, **_options())
    except ValueError as error:
        raise SettingError("coalesce_redis_url", _shown(url), f"can not be read ({error})", URL_REMEDY) from None
    return lambda: redis.Redis(connection_pool=pool)


def _sentinel(url: str) -> Callable[[], Client]:
    """``sentinel://[user:password@]host:port[;sentinel://host:port ...]/master-name?db=0&sentinel_password=...``."""
    hosts = []
    user = password = None
    path, query = "", ""
    for part in url.split(";"):
        parts = urlsplit(part)
        hosts.append((parts.hostname or "127.0.0.1", parts.port or 26379))
        user, password = parts.username or user, parts.password or password
        path, query = parts.path.strip("/") or path, parts.query or query
    given = dict(parse_qsl(query))
    name = path or given.pop("master_name", "")
    if not name:
        raise SettingError(
            "coalesce_redis_url", _shown(url), "names no master", "write sentinel://host:26379/master-name"
        )
    sentinel_options = {
        key: given.pop(f"sentinel_{key}") for key in ("username", "password") if f"sentinel_{key}" in given
    }
    options = {**_options(), "username": user, "password": password, "db": int(given.pop("db", "0"))}
    if given:
        unknown = ", ".join(sorted(given))
        raise SettingError(
            "coalesce_redis_url",
            _shown(url),
            f"has the unknown parameters {unknown}",
            "known are db, master_name, sentinel_username, sentinel_password",
        )

    def make() -> Client:
        sentinel = Sentinel(
            hosts,
            sentinel_kwargs={**_options(), "retry": Retry(ExponentialBackoff(), 0), **sentinel_options},
            **options,
        )
        return sentinel.master_for(name)

    return make


def _like_broker(app: Celery) -> Client:
    """Return a client that reaches the broker as kombu does.

    ``Channel.pool`` (kombu.transport.redis, 5.5-5.7) has worked out TLS, credentials, Sentinel and failover. Its
    settings are taken over into a pool of our own: kombu's is bounded to ten connections and has no timeouts.
    """
    with app.connection_for_write() as connection:
        return _own_pool(connection.default_channel.pool)


def _like_backend(app: Celery) -> Client:
    """Return a client that reaches the result backend as Celery does (celery.backends.redis, 5.5-5.7)."""
    return _own_pool(app.backend.client.connection_pool)


#: What of a pool's settings says where the server is and how to be let in; the rest is that pool's own.
_ADDRESS = frozenset(
    {"host", "port", "path", "db", "username", "password", "credential_provider", "client_name",
     "health_check_interval", "socket_keepalive", "socket_keepalive_options"}
)  # fmt: skip


def _own_pool(pool: Any) -> Client:
    kwargs = {
        name: value
        for name, value in pool.connection_kwargs.items()
        if (name in _ADDRESS or name.startswith("ssl_")) and value is not None
    }
    kwargs.update(_options())
    manager = getattr(pool, "sentinel_manager", None)
    if manager is not None:
        secure = issubclass(pool.connection_class, redis.SSLConnection)
        sentinel_pool = redis.sentinel.SentinelConnectionPool(pool.service_name, manager, ssl=secure, **kwargs)
        return redis.Redis(connection_pool=sentinel_pool)
    if issubclass(pool.connection_class, redis.UnixDomainSocketConnection):
        kwargs.pop("socket_connect_timeout", None)
    return redis.Redis(connection_pool=redis.ConnectionPool(connection_class=pool.connection_class, **kwargs))
