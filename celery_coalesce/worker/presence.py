"""The presence of a worker: what every presence does, and what only a process with a consumer and a pool can."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from celery import bootsteps
from celery.signals import worker_shutdown

from ..dispatch import publish_all
from ..engine import engine_of
from ..errors import CoalesceError, StoreUnavailable
from ..plain import PLAIN
from ..presence import WORKER_PRESENCE, ProcessPresence
from ..signals import EventBus

if TYPE_CHECKING:
    from celery import Celery
    from celery.worker import WorkController

    from ..records import Lease

__all__ = ["Presence", "WorkerPresence", "is_alive", "presence_of"]

logger = logging.getLogger("celery_coalesce")

#: Seconds after which a dead pool process is not going to be reported by Celery any more, which takes up to ten.
DEAD_FOR = 15.0


def presence_of(app: Celery) -> WorkerPresence:
    """Return the presence of the worker that this process is, or was forked from.

    Raises:
        CoalesceError: It is no worker, or the bootstep was not installed in time.
    """
    presence: WorkerPresence | None = app.__dict__.get(WORKER_PRESENCE)
    if presence is None:
        raise CoalesceError("this worker has no presence: the app's tasks were bound after it was built")
    return presence


class Presence(bootsteps.StartStopStep):
    """Starts the presence before the consumer takes its first message.

    It ends with ``worker_shutdown``, after the pool has finished what it runs: a step would be stopped before the pool.
    """

    requires = ("celery.worker.components:Pool",)

    def __init__(self, worker: WorkController, **kwargs: Any) -> None:
        super().__init__(worker, **kwargs)
        self.thread = WorkerPresence(worker)
        worker.app.__dict__[WORKER_PRESENCE] = self.thread
        # Before the pool forks. A store that is not there yet is waited for.
        with contextlib.suppress(StoreUnavailable):
            engine_of(worker.app).transitions.store.connect()

    def start(self, worker: WorkController) -> None:
        """Announce this process.

        Raises:
            SettingError: The state server can not be used.
        """
        self.thread.begin()
        worker_shutdown.connect(self.thread.end, weak=False, dispatch_uid=f"celery_coalesce.{self.thread.owner}")


class WorkerPresence(ProcessPresence):
    """One worker process, as the state server knows it.

    Args:
        worker: The worker.
    """

    def __init__(self, worker: WorkController) -> None:
        super().__init__(worker.app, worker.hostname)
        self._worker = worker
        #: Since when a lease has been without a living process, by the monotonic clock.
        self._dead: dict[str, float] = {}
        #: Since when a lease has been known to the store alone, by its token.
        self._unknown: dict[str, float] = {}

    @property
    def consumer(self) -> Any:
        """The worker's consumer, ``None`` before it is there."""
        return getattr(self._worker, "consumer", None)

    def bus(self) -> EventBus:
        """Return where the worker's events go."""
        dispatcher = getattr(self.consumer, "event_dispatcher", None)
        wanted = engine_of(self._app).settings.events
        return EventBus.of_worker(self._app, dispatcher, self._worker.hostname, wanted=wanted)

    def leased(self, lease: Lease) -> None:
        """Note a lease that hangs from this process."""
        self._note(lease, None)

    def accepted(self, lease: Lease, pid: int | None) -> None:
        """Note which process runs a lease's body."""
        self._note(lease, pid)

    def _goodbye(self) -> None:
        """Hand back what the pool never took."""
        engine = engine_of(self._app)
        for lease, pid in list(self._leases.values()):
            if pid is None:
                sent = engine.transitions.requeue(lease)
                # If it was not acknowledged, the broker gives its message back.
                publish_all(engine, (lease.acknowledged and sent) or ())
        super()._goodbye()

    def _reconcile(self) -> None:
        super()._reconcile()
        self._give_up_unknown()

    def _give_up_unknown(self) -> None:
        """Have dispatched again what this process holds and knows nothing of: the answer that gave it was lost.

        The gate asks again for the message that it has, and gets the same answer; this is for one that went back to the
        broker meanwhile. No body has begun.
        """
        engine = engine_of(self._app)
        transitions = engine.transitions
        unknown: dict[str, float] = {}
        for ref in transitions.all_held(self.owner) - self._leases.keys():
            lease = transitions.lease_of(ref, self.owner)
            if lease is None or lease.task in PLAIN:
                continue
            # By its token: a run's next attempt has the same name.
            since = unknown[lease.token] = self._unknown.get(lease.token, time.monotonic())
            if time.monotonic() - since >= transitions.timing.lease / 1000 and ref not in self._leases:
                logger.warning(
                    "Run %s of %s was given to this worker, which has not heard of it",
                    lease.run,
                    lease.task,
                    extra={"action": "unknown_lease", "run_id": lease.run, "task_id": lease.task_id},
                )
                publish_all(engine, transitions.requeue(lease) or ())
        self._unknown = unknown

    def _bodiless(self, held: dict[str, tuple[Lease, int | None]]) -> Iterator[tuple[Lease, bool]]:
        """Yield also those whose pool child is gone without a word: it died with a report that waited for the store."""
        yield from super()._bodiless(held)
        dead: dict[str, float] = {}
        for ref, (_, pid) in held.items():
            if pid and pid != os.getpid() and not is_alive(pid):
                dead[ref] = self._dead.get(ref, time.monotonic())
        self._dead = dead
        for ref, since in dead.items():
            if time.monotonic() - since >= DEAD_FOR:
                yield held[ref][0], True


def is_alive(pid: int) -> bool:
    """Return whether a process exists."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
