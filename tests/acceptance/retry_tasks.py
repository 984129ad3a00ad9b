"""Coalesced tasks that retry in every way that Celery knows."""

from __future__ import annotations

from typing import Any

from celery import Celery, Task
from celery.exceptions import Retry

from celery_coalesce import CoalescedTask
from tests.support import app as support
from tests.support.tasks import recorded


def define(app: Celery) -> None:
    """Register the tasks with an app."""

    def task(body: Any, **options: Any) -> None:
        app.task(shared=False, name=body.__name__, bind=True, base=CoalescedTask, coalesce_key="<key>", **options)(body)

    task(retry_and_go_on)
    task(retry_automatically, autoretry_for=(RuntimeError,), max_retries=2, default_retry_delay=0)
    task(retry_with_backoff, autoretry_for=(RuntimeError,), max_retries=2, retry_backoff=1, retry_jitter=False)
    task(retry_with_other_arguments)
    task(retry_by_hand)
    task(retry_far_ahead)


def retry_and_go_on(self: Task, key: str, gate: str | None = None) -> str:
    """Ask for a retry without leaving the body; wait at the gate; return."""
    with recorded(self, key) as journal:
        if self.request.retries == 0:
            self.retry(throw=False, countdown=0)
            journal.record("retry_asked", key=key.partition(":")[2])
            if gate:
                journal.pass_gate(gate)
            return "first"
    return "second"


def retry_automatically(self: Task, key: str, fails: int = 1, value: Any = None) -> Any:
    """Fail the first `fails` times."""
    with recorded(self, key):
        if self.request.retries < fails:
            raise RuntimeError(f"attempt {self.request.retries}")
    return value


def retry_with_backoff(self: Task, key: str, fails: int = 1, value: Any = None) -> Any:
    """Fail the first `fails` times, a second and more apart."""
    return retry_automatically(self, key, fails, value)


def retry_with_other_arguments(self: Task, key: str, value: int = 0, **options: Any) -> int:
    """Retry with the next value, given Celery's retry options, until it is 2."""
    with recorded(self, key):
        if value < 2:
            raise self.retry(args=(key,), kwargs={"value": value + 1}, countdown=0, **options)
    return value


def retry_by_hand(self: Task, key: str) -> None:
    """Raise `Retry` without having asked for one."""
    with recorded(self, key):
        raise Retry("by hand")


def retry_far_ahead(self: Task, key: str, countdown: float = 3600, value: Any = None) -> Any:
    """Retry once, in an hour."""
    with recorded(self, key):
        if self.request.retries == 0:
            raise self.retry(countdown=countdown)
    return value


if hasattr(support, "app"):  # in a worker
    define(support.app)
