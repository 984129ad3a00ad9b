"""Asking a worker, wherever it is, to stop a run that a newer trigger replaces."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from celery import Celery

    from .records import Stop

__all__ = ["STOP", "being_stopped", "stop_runs"]

logger = logging.getLogger("celery_coalesce")

#: The name of the remote-control command.
STOP = "coalesce_stop"

#: The runs of this process that it has been told to stop, until their end has been reported.
being_stopped: set[str] = set()


def stop_runs(app: Celery, stops: Iterable[Stop]) -> None:
    """Have runs terminated, each by the worker that runs it."""
    for stop in stops:
        hostname = stop.owner.rsplit("/", 2)[0]
        try:
            app.control.broadcast(
                STOP, arguments={"task_id": stop.task_id, "run": stop.run}, destination=[hostname], reply=False
            )
        except Exception:
            # It is asked again.
            logger.warning(
                "Run %s could not be told to stop yet",
                stop.run,
                exc_info=True,
                extra={"action": "stop_unsent", "run_id": stop.run},
            )
