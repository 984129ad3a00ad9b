"""What binding a task brings along: the bootsteps and the signal handlers. Done once per app and process."""

from __future__ import annotations

from typing import TYPE_CHECKING

from celery.signals import task_failure, task_postrun, task_prerun, task_success

if TYPE_CHECKING:
    from celery import Celery

__all__ = ["install"]

PRESENCE = "celery_coalesce.worker.presence:Presence"
WAKEUPS = "celery_coalesce.worker.wakeups:Wakeups"


def install(app: Celery) -> None:
    """Install the bootsteps in an app, and the reporters in this process."""
    app.steps["worker"].add(PRESENCE)
    app.steps["consumer"].add(WAKEUPS)
    from . import reports

    for signal, handler in (
        (task_prerun, reports.on_prerun),
        (task_success, reports.on_success),
        (task_failure, reports.on_failure),
        (task_postrun, reports.on_postrun),
    ):
        signal.connect(handler, weak=False, dispatch_uid=f"celery_coalesce.{handler.__name__}")
