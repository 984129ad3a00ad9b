"""Tasks and receivers for tests that watch: included by their workers, defined in the test process too.

The receivers read off a key what they are to do: `raises:...` raises in every one, `kills:<where>` kills the
process once, `blocks:<where>` waits at the gate "receiver".
"""

from __future__ import annotations

import json
import os
import signal as signals_of_the_system
from collections.abc import Callable
from typing import Any

from celery import Celery, Task
from celery.exceptions import Ignore, Reject, Retry

import celery_coalesce.signals
from celery_coalesce import CoalescedTask
from celery_coalesce.transitions import Transitions
from tests.support.app import BROKER_VARIABLE
from tests.support.coalesced import EVENTS
from tests.support.journal import Journal, journal_of
from tests.support.tasks import recorded, work


def define(app: Celery) -> None:
    """Register the tasks with an app."""
    tasks: list[tuple[str, Callable[..., Any], dict[str, Any]]] = [
        ("watched_ignoring", ignoring, {}),
        ("replaced", replaced, {}),
        ("replaced_by", work, {"coalesce_scope": "replaced"}),
        ("rerun_if_lost", work, {"acks_late": True, "reject_on_worker_lost": True}),
        ("retried_if_lost", work, {"retry_on_worker_lost": True, "default_retry_delay": 0}),
        ("unprintable", unprintable, {}),
        ("watched_rejecting", rejecting, {"acks_late": True}),
        ("retried_by_hand", retried_by_hand, {}),
        ("stepped", stepped, {"coalesce_steps": {"one": 1, "two": 1}}),
    ]
    for name, body, options in tasks:
        app.task(name=name, shared=False, bind=True, base=CoalescedTask, coalesce_key="<key>", **options)(body)
    app.task(name="whole", shared=False, bind=True, base=CoalescedTask)(whole)


def ignoring(self: Task, key: str, gate: str | None = None) -> None:
    """Wait at a gate, if one is named, and raise a bare `Ignore`."""
    with recorded(self, key) as journal:
        if gate:
            journal.pass_gate(gate)
        raise Ignore


def replaced(self: Task, key: str, by: str, value: Any = None, gate: str | None = None) -> Any:
    """Wait at a gate, if one is named, and be replaced by another task with the same key."""
    with recorded(self, key) as journal:
        if gate:
            journal.pass_gate(gate)
        raise self.replace(self.app.signature(by, args=(key, value)))


def whole(self: Task, key: str) -> None:
    """Have no key but the task."""
    with recorded(self, key):
        pass


class Unprintable(Exception):
    """An error whose own representation fails."""

    def __repr__(self) -> str:
        raise RuntimeError("not to be printed")

    __str__ = __repr__


def unprintable(self: Task, key: str) -> None:
    """Fail with an error that can not be printed."""
    with recorded(self, key):
        raise Unprintable


def rejecting(self: Task, key: str, requeue: bool) -> None:
    """Raise `Reject`, the first time."""
    with recorded(self, key) as journal:
        if len(journal.events("start", task_id=self.request.id)) == 1:
            raise Reject("no", requeue=requeue)


def retried_by_hand(self: Task, key: str) -> None:
    """Raise what `self.retry()` raises, having sent nothing."""
    with recorded(self, key):
        raise Retry("by hand")


def stepped(self: CoalescedTask, key: str) -> None:
    """Wait at the gate "g" in the first step."""
    with recorded(self, key) as journal:
        self.coalesce.step("one")
        journal.record("stepped", key=key.partition(":")[2])
        journal.pass_gate("g")


def _misbehave(meta: Any = None, signal: Any = None, **_: Any) -> None:
    try:
        journal, key = journal_of(meta.key)
    except ValueError:
        return
    what, where = (key + ":").split(":")[:2]
    if what == "raises":
        journal.record("raised", signal=signal.name)
        raise RuntimeError(f"a receiver of {signal.name} raises")
    if what == "kills" and where == signal.name:
        _kill_once(journal, key)
    if what == "blocks" and where == signal.name:
        journal.record("blocked", key=key)
        journal.pass_gate("receiver", timeout=60)


def _kill_once(journal: Journal, key: str) -> None:
    if not journal.events("killed", key=key):
        journal.record("killed", key=key, pid=os.getpid())
        os.kill(os.getpid(), signals_of_the_system.SIGKILL)


_take_drain = Transitions.take_drain


def _take_drain_or_die(self: Transitions, blob: bytes, by: str) -> Any:
    """Die between the record of a drain and its announcement: no signal stands there."""
    journal, key = journal_of(json.loads(blob)["key"])
    if key == "kills:take_drain":
        _kill_once(journal, key)
    return _take_drain(self, blob, by)


if BROKER_VARIABLE in os.environ:  # in a worker
    from tests.support.app import app

    define(app)
    Transitions.take_drain = _take_drain_or_die  # type: ignore[method-assign]
    for event in EVENTS:
        getattr(celery_coalesce.signals, f"coalesce_{event}").connect(_misbehave, weak=False)
