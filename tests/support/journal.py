"""What tasks did, in the order of one server, and the gates that hold them.

A journal is a Redis stream of a test's own, on a server that neither the broker nor the library
uses. Its name is the first part of the test's keys: `journal.key("org:7")` is `"<name>:org:7"`, so
a task needs nothing but its key to find the journal, by whatever way it was called, and keys of
different tests never meet on a shared worker. Events carry the key without that name.
"""

from __future__ import annotations

import functools
import json
import os
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import redis

URL_VARIABLE = "TEST_JOURNAL_URL"

Event = dict[str, Any]  # "event", "time" (seconds, the journal server's clock), and its fields


class Journal:
    """The events of one test, shared by its process and its workers."""

    def __init__(self, client: redis.Redis, name: str | None = None) -> None:
        self.client = client
        self.name = name or uuid.uuid4().hex[:8]
        self._stream = f"journal:{self.name}"
        self._open_for_all = f"gates:{self.name}"

    def key(self, key: str = "key") -> str:
        """Return the test's own form of a key, for a task's argument."""
        return f"{self.name}:{key}"

    # Events

    def record(self, event: str, **fields: Any) -> None:
        """Append an event."""
        data = json.dumps({"event": event, **fields}, default=str)
        self.client.xadd(self._stream, {"data": data})

    def events(self, event: str | None = None, **match: Any) -> list[Event]:
        """Return the events so far, oldest first, of one name and with the given fields."""
        entries: Any = self.client.xrange(self._stream)
        events = [_decode(*entry) for entry in entries]
        return [each for each in events if _matches(each, event, match)]

    def wait(
        self,
        event: str | Callable[[Event], Any],
        *,
        count: int = 1,
        timeout: float = 10,
        **match: Any,
    ) -> Event:
        """Wait until `count` events match, counted from the first ever, and return that one."""
        found = self._follow(event, match, count, timeout)
        if len(found) < count:
            story = "\n".join(map(str, self.events())) or "(no events)"
            wanted = f"{event} {match or ''} x{count}"
            raise AssertionError(f"not within {timeout} s: {wanted}; the journal says:\n{story}")
        return found[count - 1]

    def assert_never(self, event: str | Callable[[Event], Any], *, within: float = 0.5, **match: Any) -> None:
        """Fail if an event matches, be it recorded already or in the next `within` seconds."""
        found = self._follow(event, match, 1, within)
        assert not found, f"unexpected: {found[0]}"

    def _follow(self, event: str | Callable[[Event], Any], match: Event, count: int, timeout: float) -> list[Event]:
        deadline = time.monotonic() + timeout
        found: list[Event] = []
        last = "0-0"
        while len(found) < count and (left := deadline - time.monotonic()) > 0:
            block = max(1, int(left * 1000))
            reply: Any = self.client.xread({self._stream: last}, block=block)
            for last, fields in _entries(reply):
                each = _decode(last, fields)
                if _matches(each, event, match):
                    found.append(each)
        return found

    # Gates

    def open(self, gate: str, n: int = 1) -> None:
        """Let the next `n` tasks through a gate, in the order in which they came to it."""
        self.client.rpush(self._gate(gate), *["open"] * n)

    def open_all(self) -> None:
        """Let every task through every gate from now on."""
        self.client.rpush(self._open_for_all, "open")

    def pass_gate(self, gate: str, timeout: float = 30) -> None:
        """Block, in a task, until the gate is opened; fail after `timeout` seconds."""
        popped: Any = self.client.blpop([self._gate(gate), self._open_for_all], timeout=timeout)
        if popped is None:
            raise TimeoutError(f"gate {gate!r} was not opened within {timeout} s")
        if popped[0] == self._open_for_all:
            self.open_all()  # leave it open for the next one

    def _gate(self, gate: str) -> str:
        return f"gate:{self.name}:{gate}"


def connect(url: str) -> redis.Redis:
    """Return a client that decodes its replies and may block as long as its commands ask for."""
    return redis.Redis.from_url(url, decode_responses=True, socket_timeout=None)


def journal_of(key: str) -> tuple[Journal, str]:
    """Return the journal that a test's key belongs to, and the key without its name."""
    name, _, short = key.partition(":")
    return Journal(_environment_client(os.environ[URL_VARIABLE]), name), short


@functools.cache
def _environment_client(url: str) -> redis.Redis:
    return connect(url)  # fork-safe: its pool compares process ids


def assert_no_overlap(events: Iterable[Event], limit: int = 1) -> None:
    """Fail if more than `limit` runs of a key were between "start" and "end" at once.

    A run that was killed has no end: `journal.record("gone", pid=...)` (or any other field of its
    start, `task_id`, `hostname`) ends what it left open.
    """
    running: dict[str, list[Event]] = defaultdict(list)
    for event in events:
        if event["event"] == "start":
            running[event["key"]].append(event)
            assert len(running[event["key"]]) <= limit, f"overlap: {running[event['key']]}"
        elif event["event"] == "end":
            run = event["run"]
            running[event["key"]] = [e for e in running[event["key"]] if e["run"] != run]
        elif event["event"] == "gone":
            match = {name: event[name] for name in event if name not in ("event", "time")}
            for key, runs in running.items():
                running[key] = [e for e in runs if not _matches(e, None, match)]


def _entries(reply: Any) -> list[tuple[str, dict[str, str]]]:
    streams = reply.values() if isinstance(reply, dict) else [entries for _, entries in reply or ()]
    flat: list[tuple[str, dict[str, str]]] = []
    for entries in streams:
        # RESP3 nests the entries of a stream once more.
        flat += entries[0] if entries and isinstance(entries[0], list) else entries
    return flat


def _decode(entry_id: str, fields: dict[str, str]) -> Event:
    event: Event = json.loads(fields["data"])
    event["time"] = int(entry_id.partition("-")[0]) / 1000
    return event


def _matches(each: Event, event: str | Callable[[Event], Any] | None, match: Event) -> bool:
    if callable(event):
        if not event(each):
            return False
    elif event is not None and each["event"] != event:
        return False
    return all(each.get(name) == value for name, value in match.items())
