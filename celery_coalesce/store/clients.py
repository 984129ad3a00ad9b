"""Clients of the server that holds the records: by its URL, or as Celery reaches its broker or its result backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, urlsplit

import redis
from kombu.utils.url import maybe_sanitize_url
from redis.backoff import ExponentialBackoff
from redis.cluster import RedisCluster
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.retry import Retry
from redis.sentinel import Sentinel

from ..errors import SettingError

if TYPE_CHECKING:
    from celery import Celery

__all__ = ["Client", "from_url", "is_redis", "like_backend", "like_broker", "same_database", "shown"]

Client = Any  # redis.Redis or RedisCluster: their common base is private

#: Seconds for one answer of the server.
SOCKET_TIMEOUT = 3.0
#: Seconds for one connection.
CONNECT_TIMEOUT = 3.0
#: How often a call is tried again after a broken connection; not after a timeout, which has cost enough by then.
#: Transitions are idempotent, so a lost reply does no harm.
RETRIES = 2

#: Whoever waits for its turn has a connection of its own; the heartbeat must not be left without one.
MOST_CONNECTIONS = 10_000

URL_REMEDY = "use redis://, rediss://, unix://, sentinel://host:26379/master-name or redis+cluster://host:port"


def is_redis(url: str) -> bool:
    """Return whether a URL is that of a Redis or Valkey server."""
    return url.split("://", 1)[0].split("+", 1)[0] in {"redis", "rediss", "sentinel", "valkey", "valkeys"}


def shown(url: str) -> str:
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


def from_url(url: str) -> Callable[[], Client]:
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
        raise SettingError("coalesce_redis_url", shown(url), f"has the unknown scheme {scheme!r}", URL_REMEDY)
    plain = scheme + url[len(parts.scheme) :]
    try:
        pool = redis.ConnectionPool.from_url(plain, **_options())
    except ValueError as error:
        raise SettingError("coalesce_redis_url", shown(url), f"can not be read ({error})", URL_REMEDY) from None
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
            "coalesce_redis_url", shown(url), "names no master", "write sentinel://host:26379/master-name"
        )
    sentinel_options = {
        key: given.pop(f"sentinel_{key}") for key in ("username", "password") if f"sentinel_{key}" in given
    }
    options = {**_options(), "username": user, "password": password, "db": int(given.pop("db", "0"))}
    if given:
        unknown = ", ".join(sorted(given))
        raise SettingError(
            "coalesce_redis_url",
            shown(url),
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


def like_broker(app: Celery) -> Client:
    """Return a client that reaches the broker as kombu does.

    ``Channel.pool`` (kombu.transport.redis, 5.5-5.7) has worked out TLS, credentials, Sentinel and failover. Its
    settings are taken over into a pool of our own: kombu's is bounded to ten connections and has no timeouts.
    """
    with app.connection_for_write() as connection:
        return _own_pool(connection.default_channel.pool)


def like_backend(app: Celery) -> Client:
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


def same_database(one: Any, other: Any) -> bool:
    """Return whether two pools lead to the same database, by the same address or the same Sentinel's name for it."""
    return _place(one) == _place(other)


def _place(pool: Any) -> tuple[Any, ...]:
    given = pool.connection_kwargs
    manager = getattr(pool, "sentinel_manager", None)
    # In any order: redis-py moves the one that answered to the front.
    sentinels = frozenset(_place(each.connection_pool) for each in manager.sentinels) if manager is not None else None
    address = (given.get(name) for name in ("host", "port", "path", "db"))
    return (*address, getattr(pool, "service_name", None), sentinels)
