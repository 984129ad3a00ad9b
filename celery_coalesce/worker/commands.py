"""Remote control: what a worker does when another asks."""

from __future__ import annotations

from typing import Any

from celery.worker import state as worker_state
from celery.worker.control import control_command

from ..stopping import STOP
from .ends import ReportingRequest

__all__ = ["coalesce_stop"]


@control_command(name=STOP, args=[("task_id", str), ("run", str)], signature="<task_id> <run>")
def coalesce_stop(state: Any, task_id: str, run: str) -> dict[str, str]:
    """Terminate a run of this worker that a newer trigger replaces."""
    request = worker_state.requests.get(task_id)
    if not isinstance(request, ReportingRequest):
        return {"error": f"no run of task {task_id}"}
    return request.supersede(state.consumer.pool, run)
