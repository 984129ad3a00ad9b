"""What a key has left in the state server."""

from __future__ import annotations

from typing import Any

import redis
from celery import Celery

from celery_coalesce.keys import state_id


def traces(app: Celery, scope: str, key: str) -> list[str]:
    """Return the names in the library's namespace, and members of these, that tell of a key."""
    wanted = (state_id(scope, key).encode(), key.encode())
    url = app.conf.get("coalesce_redis_url") or app.conf.broker_url
    found: list[str] = []
    with redis.Redis.from_url(url) as client:
        for name in client.scan_iter(match="*{coalesce}:*"):
            parts = [name, *_content(client, name)]
            found += [repr(part) for part in parts if any(each in part for each in wanted)]
    return found


def _content(client: Any, name: bytes) -> list[bytes]:
    match client.type(name):
        case b"hash":
            return [part for pair in client.hgetall(name).items() for part in pair]
        case b"set":
            return list(client.smembers(name))
        case b"zset":
            return list(client.zrange(name, 0, -1))
        case b"list":
            return list(client.lrange(name, 0, -1))
        case b"none":
            return []
        case kind:
            raise AssertionError(f"{name!r} is a {kind!r}, which the library does not use")
