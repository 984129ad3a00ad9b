"""Tasks that hold keys: included by the workers of this directory, defined in the test process too."""

from __future__ import annotations

from typing import Any

from celery import Celery

from celery_coalesce import CoalescedTask, CoalesceError, Coalescer
from tests.support import app as support
from tests.support.tasks import recorded, work


def define(app: Celery) -> None:
    """Register the tasks with an app."""
    tasks: list[tuple[str, Any, dict[str, Any]]] = [
        ("holding", holding, {}),
        ("resting", work, {"coalesce_cooldown": 1}),
    ]
    for name, body, options in tasks:
        app.task(name=name, shared=False, bind=True, base=CoalescedTask, coalesce_key="<key>", **options)(body)


def holding(self: CoalescedTask, key: str, held: str, timeout: float = 5) -> str:
    """Hold a key of the task's own scope in the body; return the error, or "held"."""
    with recorded(self, key):
        try:
            with Coalescer(self.app).hold(held, scope=self, timeout=timeout) as lease:
                lease.check()
                return "held"
        except CoalesceError as error:
            return type(error).__name__


if hasattr(support, "app"):  # in a worker
    define(support.app)
