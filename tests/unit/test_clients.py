"""Whether two clients reach the same database."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import redis

from celery_coalesce.store.clients import same_database


def pool(url: str, **options: Any) -> Any:
    return redis.ConnectionPool.from_url(url, **options)


def watched(*ports: int, master: str = "m", db: int = 0) -> Any:
    """Return a pool of a master that some Sentinels tell the address of."""
    sentinel = redis.Sentinel([("localhost", port) for port in ports], db=db)
    return sentinel.master_for(master).connection_pool


PLACES = {
    "a database": lambda: pool("redis://localhost:1/0"),
    "another database": lambda: pool("redis://localhost:1/1"),
    "another port": lambda: pool("redis://localhost:2/0"),
    "another host": lambda: pool("redis://127.0.0.1:1/0"),
    "a socket": lambda: pool("unix:///tmp/a"),
    "another socket": lambda: pool("unix:///tmp/b"),
    "a master": lambda: watched(1, 2),
    "another master": lambda: watched(1, 2, master="n"),
    "its other database": lambda: watched(1, 2, db=1),
    "other Sentinels' master": lambda: watched(3, 4),
}


@pytest.mark.parametrize("name", PLACES)
def test_a_place_is_the_same_as_itself(name: str) -> None:
    """Whatever else is asked of its connections."""
    assert same_database(PLACES[name](), PLACES[name]())


def test_who_comes_in_is_no_matter() -> None:
    """Nor how long anybody waits, nor which Sentinel has answered first."""
    assert same_database(pool("redis://a:b@localhost:1/0", socket_timeout=3), pool("redis://localhost:1/0"))
    assert same_database(watched(2, 1), watched(1, 2))


@pytest.mark.parametrize(("one", "other"), [*itertools.combinations(PLACES, 2)])
def test_two_places_differ(one: str, other: str) -> None:
    """By any part of their address."""
    assert not same_database(PLACES[one](), PLACES[other]())
