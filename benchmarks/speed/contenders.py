"""The same tasks in plain Celery, in celery-coalesce and in what else there is.

Each package is used as its own introduction shows it, with a key for each value of the argument ``key``.
"""

from __future__ import annotations

import functools
import json
import os
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import redis
from celery import Celery

from benchmarks.speed.stamps import stamp

PLAIN, OURS, ONCE, SINGLETON, HEIMDALL = ("plain", "ours", "once", "singleton", "heimdall")
ALL = (PLAIN, OURS, ONCE, SINGLETON, HEIMDALL)
#: Where a worker finds what it is a worker of.
VARIABLE = "SPEED_SETUP"
#: A list that holds something once gated bodies may return.
GATE = "speed.gate"


@dataclass(frozen=True)
class Setup:
    """One contender and its servers.

    Attributes:
        contender: Its name.
        broker: The URL of the broker.
        state: The URL of the Redis for what it keeps of keys.
        results: The URL of the result backend, none if results are off.
        queue: The queue that its calls go to.
        conf: Further settings of its app.
    """

    contender: str
    broker: str
    state: str
    results: str | None = None
    queue: str = ""
    conf: dict[str, Any] = field(default_factory=dict)

    def dump(self) -> str:
        """Return it as text, for another process."""
        return json.dumps(asdict(self))

    @classmethod
    def load(cls, text: str) -> Setup:
        """Return what `dump()` was called on."""
        return cls(**json.loads(text))


def noop(key: str) -> None:
    """Do nothing."""


def stamped(key: str) -> None:
    """Tell when the body began."""
    stamp("start", key=key)


def lasting(self: Any, key: str, seconds: float = 0, number: int = 0) -> None:
    """Tell when the body began and when it ended."""
    known = getattr(self, "coalesce", None)
    session, index = (known.session_id, known.run_index) if known is not None else (None, None)
    stamp("start", key=key, number=number, session=session, index=index)
    time.sleep(seconds)
    stamp("end", key=key, number=number)


def gated(self: Any, key: str, number: int = 0) -> None:
    """Tell when the body began, and wait for the gate to open."""
    stamp("start", key=key, number=number)
    connected(self.app.conf.speed_gate).blmove(GATE, GATE, 120)
    stamp("end", key=key, number=number)


@functools.cache
def connected(url: str) -> redis.Redis:
    """Return a client of this process that waits as long as it is told to."""
    return redis.Redis.from_url(url, socket_timeout=None)


def last(key: str) -> None:
    """Tell that everything that was enqueued before has been begun."""
    stamp("last", key=key)


def base_of(contender: str) -> dict[str, Any]:
    """Return the options of a contender's tasks; import no other contender."""
    if contender == OURS:
        from celery_coalesce import CoalescedTask

        return {"base": CoalescedTask, "coalesce_key": "<key>"}
    if contender == ONCE:
        from celery_once import QueueOnce

        return {"base": QueueOnce, "once": {"graceful": True, "keys": ["key"]}}
    if contender == SINGLETON:
        from celery_singleton import Singleton

        return {"base": Singleton}
    if contender == HEIMDALL:
        from celery_heimdall import HeimdallTask

        return {"base": HeimdallTask, "heimdall": {"unique": True}}
    return {}


def make_app(setup: Setup) -> Celery:
    """Return the app of a contender, with its tasks."""
    app = Celery("speed", broker=setup.broker, backend=setup.results, set_as_current=False)
    app.conf.update(
        broker_connection_retry_on_startup=True,
        task_default_queue=setup.queue or f"speed.{setup.contender}",
        task_ignore_result=setup.results is None,
        worker_cancel_long_running_tasks_on_connection_loss=True,
        ONCE={"backend": "celery_once.backends.Redis", "settings": {"url": setup.state, "default_timeout": 3600}},
        singleton_backend_url=setup.state,
        speed_gate=setup.state,
    )
    if setup.contender == OURS and setup.state != setup.broker:
        app.conf.coalesce_redis_url = setup.state
    app.conf.update(setup.conf)
    options = base_of(setup.contender)
    app.task(name="noop", **options)(noop)
    app.task(name="stamped", **options)(stamped)
    app.task(name="lasting", bind=True, **options)(lasting)
    app.task(name="gated", bind=True, **options)(gated)
    app.task(name="last", ignore_result=True)(last)
    return app


if VARIABLE in os.environ:  # in a worker
    app = make_app(Setup.load(os.environ[VARIABLE]))
    app.set_default()
