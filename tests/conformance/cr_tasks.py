"""What a worker of the CR tests has beyond the test app: a task that calls itself, a drain receiver, no error receiver."""

from __future__ import annotations

from typing import Any

from celery import shared_task
from celery.signals import task_failure, worker_init

from celery_coalesce import CoalescedTask
from celery_coalesce.signals import coalesce_drain, coalesce_error
from tests.support.journal import journal_of
from tests.support.tasks import recorded

#: Keys of this name are triggered again by the drain receiver, this many times.
AGAIN, TIMES = "again", 2


@shared_task(name="nested", bind=True, base=CoalescedTask, coalesce_key="<key>")
def nested(self: CoalescedTask, key: str, calls: int = 0, value: Any = None) -> Any:
    """Trigger the same key `calls` times from the body; then return `value`."""
    with recorded(self, key) as journal:
        for number in range(calls):
            result = self.delay(key, value=number)
            journal.record("inner", task_id=result.id, disposition=result.disposition)
    return value


@coalesce_drain.connect(weak=False)
def trigger_again(meta: Any = None, sender: Any = None, **_: Any) -> None:
    """Trigger a key that has drained, twice."""
    journal, short = journal_of(meta.key)
    if short == AGAIN:
        round_ = len(journal.events("again"))
        if round_ < TIMES:
            result = sender.delay(meta.key, round_ + 1)
            journal.record("again", drained=meta.session_id, disposition=result.disposition)


@worker_init.connect(weak=False)
def forget_error_receivers(**_: Any) -> None:
    """Leave `coalesce_error` without a receiver, as it is in an app that knows nothing of it."""
    coalesce_error.disconnect(dispatch_uid="journal.error")


@task_failure.connect(weak=False)
def record_failure(sender: Any, task_id: str, exception: Any, args: Any, **_: Any) -> None:
    """Record Celery's own signal, and that nobody listens to ours."""
    journal, short = journal_of(args[0])
    receivers = len(coalesce_error.receivers or ())
    journal.record("task_failure", key=short, failed=task_id, exception=repr(exception), receivers=receivers)
