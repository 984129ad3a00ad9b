"""What the journal tells of a key's sessions, for the conformance tests."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import redis

from tests.support.app import HarnessApp
from tests.support.journal import Event, Journal

#: The letters of a session's story.
LETTERS = {
    "coalesce_start": "s",
    "coalesce_success": "+",
    "coalesce_error": "-",
    "coalesce_drain": "d",
}

#: start, (success | error), [start ...], drain.
SESSION = re.compile(r"(s[+-])+d")


def sessions(journal: Journal, key: str = "key") -> dict[int, list[Event]]:
    """Return the lifecycle events of a key by session, both in the order in which they came."""
    found: dict[int, list[Event]] = {}
    for event in journal.events(key=key):
        if event["event"] in LETTERS:
            found.setdefault(event["session_id"], []).append(event)
    return found


def stories(journal: Journal, key: str = "key") -> list[str]:
    """Return one word per session, of the letters above."""
    return ["".join(LETTERS[event["event"]] for event in events) for events in sessions(journal, key).values()]


def pass_fence(app: HarnessApp, journal: Journal, queue: str | None = None) -> None:
    """Return once a worker has looked at every message that was in the queue before this call.

    A worker of one queue takes its messages in their order, and asks the gate in that order.
    """
    key = f"fence:{uuid.uuid4().hex[:8]}"
    app.tasks["work"].apply_async((journal.key(key),), queue=queue)
    journal.wait("end", key=key, timeout=20)


@contextmanager
def store(app: HarnessApp) -> Iterator[redis.Redis]:
    """Open the database that holds an app's records, which is its broker's."""
    with redis.Redis.from_url(app.given["broker"], decode_responses=True) as client:
        yield client


def names(client: redis.Redis, pattern: str = "{coalesce}:*") -> set[str]:
    """Return the names in a database that match."""
    return set(client.scan_iter(pattern, count=1000))
