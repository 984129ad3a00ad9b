"""Made `records.json`: what version 1 of the record leaves in Redis, for each state of a run.

Version 1 is the code before commit 4f5c198. With an empty server at URL:

    git archive 4f5c198^ celery_coalesce | tar x -C DIR
    PYTHONPATH=DIR python tests/faults/v1/make.py URL > tests/faults/v1/records.json

Bytes are written as latin-1. A key is named after its state, and so are its calls' task ids.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import redis
from celery import Celery

from celery_coalesce import CoalescedTask
from celery_coalesce.context import NextAttempt
from celery_coalesce.engine import engine_of
from celery_coalesce.keys import state_id
from celery_coalesce.records import Envelope, Lease, RunMeta
from celery_coalesce.reports import continue_run
from celery_coalesce.store.scripts import script

OWNER = "gone@v1/1/00000000"

app = Celery("v1", broker="memory://", backend="cache+memory://", set_as_current=False)
app.conf.update(coalesce_redis_url=sys.argv[1], coalesce_lease=2)


def work(self: Any, key: str, value: Any = None, gate: str | None = None, error: str | None = None) -> Any:
    """Stand in for the task of the tests."""


def retrying(self: Any, key: str, times: int = 1, countdown: float = 0, value: Any = None) -> Any:
    """Stand in for the one that retries."""


def task(name: str, body: Any = work, **options: Any) -> Any:
    """Return a task as the tests declare it."""
    return app.task(name=name, bind=True, base=CoalescedTask, shared=False, coalesce_key="<key>", **options)(body)


queue, late = task("queue"), task("queue_late", acks_late=True)
again, skip = task("queue_retry", retrying), task("skip", coalesce="skip")
coalescer = engine_of(app).coalescer


def call(task: Any, name: str, *args: Any, **kwargs: Any) -> Any:
    """Make a call that has a task id, and so a follower if it joins a run."""
    return task.apply_async((f"v1:{name}", *args), kwargs.pop("kwargs", {}), task_id=f"{name}-{args}", **kwargs)


def envelope(result: Any, task: Any, name: str) -> Envelope:
    """Return what a call's message says."""
    return Envelope(state_id(task.name, f"v1:{name}"), str(result.run_id), result.id, task.name, 0, 0, 0, b"", b"")


def started(result: Any, task: Any, name: str) -> Lease:
    """Start a call's run, in a process that nobody will hear of again."""
    late = bool(task.acks_late)
    reply = coalescer.start(envelope(result, task, name), owner=OWNER, claim=name, late=late, revoked=False)
    return reply.lease


for value in (1, 2, 3):
    call(queue, "dispatched", value)

for each in (queue, late):
    state = "running" if each is queue else "running_late"
    started(call(each, state, 1), each, state)
    for value in (2, 3):
        call(each, state, value)

call(queue, "delayed", 1, countdown=60)

lease = started(call(again, "retrying", kwargs={"times": 1, "value": 1}), again, "retrying")
continue_run(
    engine_of(app),
    lease,
    NextAttempt("queue_retry", ("v1:retrying",), {"times": 1, "value": 1}, {"retries": 1, "countdown": 60}),
)

call(queue, "cleared", 1)
coalescer.clear("queue", "v1:cleared")

result = call(queue, "withdrawn", 1)
coalescer.withdraw(envelope(result, queue, "withdrawn"), "it can not be read")

for value in (1, 2):
    call(skip, "single", value)

lease = started(call(queue, "drained", 1), queue, "drained")
coalescer.finish(lease, drain=RunMeta.of(lease), announced=True)

coalescer.heartbeat(OWNER)


def text(value: Any) -> Any:
    """Return what JSON can hold."""
    if isinstance(value, bytes):
        return value.decode("latin-1")
    if isinstance(value, dict):
        return {text(name): text(each) for name, each in value.items()}
    return [text(each) for each in value] if isinstance(value, list | tuple | set) else value


client = redis.Redis.from_url(sys.argv[1])
READ = {
    b"hash": client.hgetall,
    b"zset": lambda name: client.zrange(name, 0, -1, withscores=True),
    b"set": client.smembers,
}
stored = {text(name): text(READ[client.type(name)](name)) for name in sorted(client.keys("*coalesce*"))}
start = {"keys": list(script("start").keys), "text": script("start").text.splitlines()}
json.dump({"start": start, "stored": stored}, sys.stdout, indent=1, sort_keys=True)
