"""Records that nobody of ours has written: what can not be read is refused, and keeps nobody else."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis

from celery_coalesce import CoalesceError, Coalescer
from celery_coalesce.engine import engine_of
from celery_coalesce.keys import state_id
from tests.support.app import HarnessApp
from tests.support.journal import Journal
from tests.support.process import wait_until
from tests.support.servers import ValkeyServer
from tests.support.worker import WorkerProcess

Spoil = Callable[[redis.Redis, str], None]


def _cut(client: redis.Redis, record: str, field: str) -> None:
    for name in client.hkeys(record):  # type: ignore[union-attr]
        if name.decode().startswith(field):
            client.hset(record, name, client.hget(record, name)[:-7])  # type: ignore[index]


def _packed(client: redis.Redis, record: str, field: str, value: str) -> None:
    client.eval(f"redis.call('HSET', KEYS[1], '{field}', cmsgpack.pack({value}))", 1, record)


SPOILS: dict[str, Spoil] = {
    "a string": lambda client, record: (client.delete(record), client.set(record, "x"))[0],
    "a list": lambda client, record: (client.delete(record), client.rpush(record, "x"))[0],
    "an empty head": lambda client, record: client.hset(record, "head", b""),
    "a head of another kind": lambda client, record: _packed(client, record, "head", "7"),
    "a head without fields": lambda client, record: _packed(client, record, "head", "{v = 2}"),
    "a cut head": lambda client, record: _cut(client, record, "head"),
    "cut runs": lambda client, record: _cut(client, record, "run:"),
    "no runs": lambda client, record: [
        client.hdel(record, name)
        for name in client.hkeys(record)
        if name.startswith(b"run:")  # type: ignore[union-attr]
    ],
    "noise": lambda client, record: client.hset(record, "head", bytes(range(256))),
    "a newer version": lambda client, record: _packed(client, record, "head", "{v = 99}"),
}


@pytest.fixture
def client(app: HarnessApp, state_server: ValkeyServer) -> Iterator[redis.Redis]:
    """A client of the server that holds the records."""
    with state_server.client(int(app.given["broker"].rsplit("/", 1)[1]), decode_responses=False) as client:
        yield client


@pytest.mark.parametrize("spoil", SPOILS.values(), ids=SPOILS)
def test_a_spoilt_record_is_refused_and_keeps_nobody_else(
    app: HarnessApp, worker: WorkerProcess, journal: Journal, client: redis.Redis, spoil: Spoil
) -> None:
    """Calls of its key raise; its worker, its sweep and all other keys go on; and it can be deleted."""
    task = app.tasks["queue"]
    names = engine_of(app).transitions.store.names
    state = state_id("queue", journal.key("spoilt"))
    record, wait, *_ = names.record(state)
    running = task.delay(journal.key("spoilt"), 1, gate="a")
    journal.wait("start", key="spoilt", timeout=20)
    waiting = task.delay(journal.key("spoilt"), 2)
    spoil(client, record)

    with pytest.raises(CoalesceError) as caught:
        task.delay(journal.key("spoilt"), 3)
    assert "redis" not in type(caught.value).__module__
    # A sweep that comes upon it, and a message.
    client.zadd(names.timers, {f"{state}/{waiting.run_id}": 1, "no such state/1": 1, "not even a name": 1})
    header = {"state": state, "run": str(waiting.run_id), "attempt": 0, "version": 0}
    app.send_task("queue", (journal.key("spoilt"), 4), task_id=waiting.id, headers={"coalesce": header})
    Coalescer(app).runs()
    assert task.delay(journal.key("other"), "fine").get(timeout=20) == "fine"
    # The body goes on, and its end can not be reported.
    journal.open("a")
    assert running.get(timeout=20) == 1
    assert task.delay(journal.key("another"), "fine").get(timeout=20) == "fine"
    assert worker.running

    client.delete(record, wait)
    client.zrem(names.timers, f"{state}/{waiting.run_id}", "no such state/1", "not even a name")

    def free() -> Any:
        try:
            return task.delay(journal.key("spoilt"), "again").get(timeout=20) == "again"
        except CoalesceError:
            return False

    wait_until(free, 20)


@pytest.mark.parametrize("name", ["timers", "presence", "meta", "drains", "limits", "slots", "lines", "resting"])
def test_an_index_of_the_wrong_type_is_an_error_and_no_crash(
    app: HarnessApp, worker: WorkerProcess, journal: Journal, client: redis.Redis, name: str
) -> None:
    """Whoever has put something else there can take it away again."""
    names = engine_of(app).transitions.store.names
    key = names.meta.removesuffix("meta") + name
    kept = client.dump(key)
    client.delete(key)
    client.rpush(key, "x")
    try:
        task = app.tasks["queue"]
        with contextlib.suppress(CoalesceError):
            task.delay(journal.key("k"), 1)
    finally:
        client.delete(key)
        if kept is not None:
            client.restore(key, 0, kept, replace=True)  # type: ignore[arg-type]
    wait_until(lambda: _runs(app, journal), 30, "it does not recover")
    assert worker.running


def _runs(app: HarnessApp, journal: Journal) -> bool:
    try:
        return app.tasks["queue"].delay(journal.key("after"), "fine").get(timeout=10) == "fine"  # type: ignore[no-any-return]
    except CoalesceError:
        return False
