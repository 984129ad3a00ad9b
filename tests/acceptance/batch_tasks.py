"""Tasks that are called in batches: one that is done once, one with keys by function, one that names constraints."""

from __future__ import annotations

from typing import Any

from celery import Celery

from celery_coalesce import CoalescedTask, Constraint
from tests.support import app as support
from tests.support.tasks import recorded, work


def define(app: Celery) -> None:
    """Register the tasks with an app."""

    def task(name: str, **options: Any) -> None:
        app.task(name=name, shared=False, bind=True, base=CoalescedTask, **options)(work)

    task("once", coalesce_key="<key>", coalesce_once=True)
    task("once_ignored", coalesce_key="<key>", coalesce_once=True, ignore_result=True)
    task("keyed", coalesce_key=key_of)
    app.task(name="batching", shared=False, bind=True, base=CoalescedTask, coalesce_key="<key>")(batching)
    task("constrained", coalesce_key="<key>", coalesce_constraints=Constraint(name_of))


def batching(self: CoalescedTask, key: str, calls: int = 0) -> list[str]:
    """Call this very key `calls` times from the body, in a batch."""
    with recorded(self, key):
        return [str(result.disposition) for result in self.batch_delay([(key,)] * calls)]


def key_of(key: str, value: Any = None, gate: str | None = None, error: str | None = None) -> str | None:
    """Return a call's key; one with a negative value has none."""
    return None if value is not None and value < 0 else key


def name_of(key: str, value: Any = None, gate: str | None = None, error: str | None = None) -> Any:
    """Return the name of a constraint, which is the value."""
    return value


if hasattr(support, "app"):  # in a worker
    define(support.app)
