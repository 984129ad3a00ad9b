"""A worker whose connection to the broker is lost once, between a lease and the pool."""

from __future__ import annotations

from typing import Any

from celery_coalesce.worker.presence import WorkerPresence

_leased = WorkerPresence.leased


def _lose() -> None:
    raise ConnectionResetError("made up: the broker closed the connection")


def _leased_and_lost(self: WorkerPresence, lease: Any, request: Any) -> None:
    _leased(self, lease, request)
    if lease.key.endswith("dropped"):
        WorkerPresence.leased = _leased  # type: ignore[method-assign]
        # Before the event loop writes to any child.
        self.consumer.hub.call_soon(_lose)


WorkerPresence.leased = _leased_and_lost  # type: ignore[method-assign]
