"""What CR workers have beyond the test app: a task that calls itself, receivers of two signals."""

from __future__ import annotations

from typing import Any

from celery import Celery
from celery.signals import task_failure

from celery_coalesce import CoalescedTask, RunMeta
from celery_coalesce.signals import coalesce_drain, coalesce_error
from tests.support import app as support
from tests.support.journal import journal_of
from tests.support.tasks import recorded

#: A key of this name is triggered again by the drain receiver, so many times.
AGAIN, TIMES = "again", 2


def define(app: Celery) -> None:
    """Register the task with an app."""
    app.task(name="nested", shared=False, bind=True, base=CoalescedTask, coalesce_key="<key>")(nested)


def nested(self: CoalescedTask, key: str, calls: int = 0, mode: str = "queue", value: Any = None) -> Any:
    """Trigger the same key `calls` times from the body; then return `value`."""
    with recorded(self, key) as journal:
        for number in range(calls):
            result = self.apply_async((key,), {"value": number}, coalesce=mode)
            journal.record("inner", task_id=result.id, disposition=result.disposition)
    return value


def trigger_again(meta: RunMeta, sender: CoalescedTask, **_: Any) -> None:
    """Trigger a key that has drained once more."""
    journal, short = journal_of(meta.key)
    # Not by what is recorded below: the session that this begins may have drained before, in another process.
    count = len(journal.events("start", key=AGAIN))
    if short == AGAIN and count <= TIMES:
        result = sender.delay(meta.key, count)
        journal.record("again", drained=meta.session_id, disposition=result.disposition)


def record_failure(task_id: str, exception: BaseException, args: Any, **_: Any) -> None:
    """Record Celery's own signal, and that nobody listens to ours."""
    journal, short = journal_of(args[0])
    receivers = len(coalesce_error.receivers or ())
    journal.record("task_failure", key=short, failed=task_id, exception=repr(exception), receivers=receivers)


def set_up() -> None:
    """Make this worker that of the CR tests."""
    define(support.app)
    coalesce_drain.connect(trigger_again, weak=False)
    task_failure.connect(record_failure, weak=False)
    # Connected by the test app, before modules are included.
    assert coalesce_error.disconnect(dispatch_uid="journal.error")


if hasattr(support, "app"):  # in a worker
    set_up()
