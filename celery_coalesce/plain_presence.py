"""The presence of a process that is no worker: of plain code that holds keys or waits for them."""

from __future__ import annotations

import atexit
import os
import socket
import threading
import time
from typing import TYPE_CHECKING

from . import signals
from .engine import engine_of
from .presence import AWAY_AGAIN, WORKER_PRESENCE, ProcessPresence

if TYPE_CHECKING:
    from celery import Celery

__all__ = ["PlainPresence", "join"]

#: Where an app keeps it.
PLAIN_PRESENCE = "_celery_coalesce_plain_presence"
#: How the owner of a lease begins that is no worker.
PLAIN_OWNER = "plain:"


class PlainPresence(ProcessPresence):
    """A process that is no worker, while it holds keys or waits for them; and a lease longer, for what comes next."""

    def __init__(self, app: Celery) -> None:
        super().__init__(app, PLAIN_OWNER + socket.gethostname())
        self._users = 0
        self._idle_since = time.monotonic()
        #: Since when something is overdue that is a worker's to move on.
        self._seen: dict[str, float] = {}
        self._seen_before: dict[str, float] = {}

    def enter(self) -> None:
        """Note that code of this process waits for a lease, or holds one. The caller has the guard."""
        self._users += 1

    def leave(self) -> None:
        """Note that it does no more."""
        with _guard:
            self._users -= 1
            self._idle_since = time.monotonic()

    def _beat(self) -> float:
        try:
            return super()._beat()
        finally:
            self._end_if_idle()

    def _end_if_idle(self) -> None:
        with _guard:
            idle = not (self._users or self._unreported or self._leases)
            over = idle and time.monotonic() - self._idle_since >= engine_of(self._app).settings.lease
            if over:
                # Whoever comes now gets another.
                self._app.__dict__.pop(PLAIN_PRESENCE, None)
        if over:
            atexit.unregister(self.end)
            self.end()

    def _sweep(self) -> None:
        self._seen_before, self._seen = self._seen, {}
        super()._sweep()

    def _sees_to(self, what: str) -> bool:
        """Return whether no worker has come for it, which would tell its own receivers and monitors.

        Every worker hears of something overdue by its next heartbeat.
        """
        if what.startswith(PLAIN_OWNER):
            return True
        now = time.monotonic()
        since = self._seen.setdefault(what, self._seen_before.get(what, now))
        return now - since >= engine_of(self._app).transitions.timing.heartbeat / 1000 + AWAY_AGAIN

    def _announce(self, drains: tuple[bytes, ...]) -> None:
        # A worker may have the receivers that this process has not.
        if signals.is_watched(signals.coalesce_drain, self.bus()):
            super()._announce(drains)


#: Guards the presences of plain code; another one after a fork, which may have come while it was held.
_guard = threading.Lock()


def _renew_guard() -> None:
    global _guard  # noqa: PLW0603 - there is one per process
    _guard = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_guard)


def join(app: Celery) -> ProcessPresence:
    """Return the presence of this process, begun if there is none, and entered."""
    worker: ProcessPresence | None = app.__dict__.get(WORKER_PRESENCE)
    if worker is not None and worker.is_here:
        worker.enter()
        return worker
    with _guard:
        presence: PlainPresence | None = app.__dict__.get(PLAIN_PRESENCE)
        if presence is None or not presence.is_here:
            presence = PlainPresence(app)
            presence.begin()
            atexit.register(presence.end)
            app.__dict__[PLAIN_PRESENCE] = presence
        presence.enter()
        return presence
