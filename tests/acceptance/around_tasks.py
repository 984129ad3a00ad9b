"""Coalesced tasks that tell what they were given, and that misbehave in their process."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from celery import Celery, Task
from celery.result import allow_join_result
from pydantic import BaseModel

from celery_coalesce import CoalescedTask
from celery_coalesce.errors import LeaseLost
from tests.support import app as support
from tests.support.journal import journal_of
from tests.support.tasks import recorded, work

#: What a body sees of its call.
SEEN = [
    "id",
    "root_id",
    "parent_id",
    "group",
    "group_index",
    "chord",
    "chain",
    "callbacks",
    "errbacks",
    "shadow",
    "expires",
    "timelimit",
    "headers",
    "stamps",
    "stamped_headers",
    "ignore_result",
    "reply_to",
    "correlation_id",
    "delivery_info",
    "origin",
    "replaced_task_nesting",
    "eta",
    "retries",
    "is_eager",
    "called_directly",
    "redelivered",
]


class Order(BaseModel):
    """A pydantic model, as an argument and as a result."""

    key: str
    amount: int


def define(app: Celery) -> None:
    """Register the tasks with an app."""

    def task(body: Any, **options: Any) -> None:
        name = options.pop("name", body.__name__)
        base = options.pop("base", CoalescedTask)
        if issubclass(base, CoalescedTask):
            options.setdefault("coalesce_key", "<key>")
        app.task(shared=False, name=name, bind=True, base=base, **options)(body)

    task(tell)
    task(tell, name="tell_plain", base=Task)
    task(tell, name="tell_options", compression="gzip", expires=60)
    task(beating)
    task(beating, name="beating_late", acks_late=True)
    task(beating, name="beating_rerun", acks_late=True, reject_on_worker_lost=True)
    task(deaf)
    task(sometimes_exempt, coalesce_key=lambda key, exempt=False: None if exempt else key)
    task(nesting)
    task(exiting)
    task(order, pydantic=True, coalesce_key="<order.key>")
    task(calling)
    task(checking)
    task(late_again, acks_late=True, reject_on_worker_lost=True)
    task(work, name="lost_retry", retry_on_worker_lost=True, max_retries=2, default_retry_delay=0)
    task(work, name="skip_late", coalesce="skip", acks_late=True)
    task(work, name="serialize_late", coalesce="serialize", acks_late=True)
    task(work, name="not_on_failure", acks_late=True, acks_on_failure_or_timeout=False)
    app.task(shared=False, name="errback", bind=False)(errback)
    app.task(shared=False, name="multiply")(multiply)


def tell(self: Task, key: str, gate: str | None = None) -> dict[str, Any]:
    """Record and return what the body sees of its call."""
    seen = {name: getattr(self.request, name, None) for name in SEEN}
    journal, short = journal_of(key)
    with recorded(self, key):
        journal.record("tell", key=short, task=self.name, task_id=self.request.id, **seen)
        if gate:
            journal.pass_gate(gate)
    return {"told": self.request.id}


def beating(self: Task, key: str, value: Any = None, seconds: float = 30) -> Any:
    """Record a "beat" as fast as the journal takes them, from the first execution only; others return `value`."""
    with recorded(self, key) as journal:
        if len(journal.events("start", key=key.partition(":")[2])) > 1:
            return value
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            journal.record("beat", key=key.partition(":")[2], task_id=self.request.id)
    return value


def deaf(self: Task, key: str, value: Any = None) -> Any:
    """As `beating`, deaf to SIGTERM."""
    if not journal_of(key)[0].events("start", key=key.partition(":")[2]):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return beating(self, key, value)


def exiting(self: Task, key: str) -> None:
    """End the process from within, as a crash would."""
    with recorded(self, key):
        os._exit(3)


def nesting(self: Task, key: str, inner: bool = False) -> Any:
    """Call itself and another task as functions, and `.apply()` one."""
    if inner:
        return "inner"
    with recorded(self, key):
        other = self.app.tasks["queue"]
        with allow_join_result():
            applied = other.apply((f"{key}-other", "inner")).get()
        return [self(key, True), other(f"{key}-other", "inner"), applied]


def sometimes_exempt(self: Task, key: str, exempt: bool = False) -> str:
    """A call that may have no key."""
    with recorded(self, key):
        return "ran"


def order(self: Task, order: Order, gate: str | None = None) -> Order:
    """Take and return a model."""
    with recorded(self, order.key) as journal:
        journal.record("order", type=type(order).__name__, amount=order.amount)
        if gate:
            journal.pass_gate(gate)
        return Order(key=order.key, amount=order.amount + 1)


def checking(self: Task, key: str, gate: str) -> None:
    """Ask for the lease before and after a gate."""
    with recorded(self, key) as journal:
        for passing in (False, True):
            if passing:
                journal.pass_gate(gate)
            try:
                self.coalesce.check()
            except LeaseLost:
                journal.record("checked", key=key.partition(":")[2], held=False)
                raise
            journal.record("checked", key=key.partition(":")[2], held=True)


def calling(self: Task, key: str, gate: str | None = None, other: str | None = None, name: str = "tell") -> Any:
    """Call another task from the body."""
    with recorded(self, key) as journal:
        result = self.app.tasks[name].delay(other)
        journal.record("called", key=key.partition(":")[2], task_id=result.id)
        if gate:
            journal.pass_gate(gate)
    return result.id


def late_again(self: Task, key: str, value: Any = None, gate: str | None = None) -> Any:
    """Wait at a gate in the first execution only."""
    with recorded(self, key) as journal:
        if gate and len(journal.events("start", key=key.partition(":")[2])) == 1:
            journal.pass_gate(gate)
    return value


def errback(request: Any, exc: BaseException, traceback: Any, *, key: str = "") -> None:
    """An errback of three arguments: record what it is given."""
    journal, short = journal_of(key)
    journal.record("errback", key=short, failed=request.id, exception=repr(exc))


def multiply(value: int, by: int) -> int:
    """Multiply; a plain task for chains."""
    return value * by


if hasattr(support, "app"):  # in a worker
    define(support.app)
